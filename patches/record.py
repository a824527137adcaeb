"""What a patch is: plain data. Importing this module imports neither torch nor megatron."""

from dataclasses import dataclass
from typing import Literal

Action = Literal["replace", "wrap", "context"]
Stage = Literal["start", "flags"]


@dataclass(frozen=True, slots=True)
class Record:
    """One change to upstream, declared; `patches.engine` carries it out and undoes it.

    Attributes:
        id: unique, `system.short-name`.
        system: the system it belongs to (`entry`, `cpu`, `seq1f1b`, ...).
        action: `replace` puts `impl` in the target's place; `wrap` puts `impl(original)` there; `context` enters the
            context manager that `impl()` returns, for a scope of many small twins (its target is a module name).
        target: `module:Qual.name` of the upstream symbol (`context`: a module name).
        impl: `module:name` of ours, imported only when applied.
        why: one sentence: what upstream does not do, or does wrongly, without this.
        when: `module:name` of a predicate; called as `predicate(args)`, with None for records of stage `start`.
        test: pytest id of the test that is red without this record.
        remove_when: what has to happen upstream for this record to go.
        aliases: further `module:Qual.name` places that hold the same object under import (`from x import f`); they
            are bound together with the target. An alias that is not named here is an error of the alias scan.
        stage: `start` is applied before upstream is imported, `flags` once the command line is parsed.
        link: the upstream fix, when this is a backport.
    """

    id: str
    system: str
    action: Action
    target: str
    impl: str
    why: str
    when: str
    test: str
    remove_when: str
    aliases: tuple[str, ...] = ()
    stage: Stage = "flags"
    link: str | None = None
