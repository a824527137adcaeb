"""What a patch is: plain data. Importing this module imports neither torch nor megatron."""

import re
from dataclasses import dataclass
from typing import Literal

from patches.errors import LedgerError

Action = Literal["replace", "wrap", "context"]
Stage = Literal["start", "flags"]

_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_PLACE = re.compile(rf"{_NAME}:{_NAME}")
_MODULE = re.compile(_NAME)
_ID = re.compile(r"[a-z0-9_]+\.[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True, slots=True)
class Record:
    """One change to upstream, declared; `patches.engine.apply` carries it out and undoes it.

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
        reads: upstream places that are not changed but whose source the patch relies on; fingerprints guard them too.
        stage: `start` is applied before upstream is imported, `flags` once the command line is parsed.
        link: the upstream fix, when this is a backport.

    Raises:
        LedgerError: a field is empty or malformed.
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
    reads: tuple[str, ...] = ()
    stage: Stage = "flags"
    link: str | None = None

    def __post_init__(self) -> None:
        for reason in self._faults():
            raise LedgerError(
                f"patch record {self.id!r} is malformed",
                where=f"patches.{self.system}",
                why=reason,
                todo="correct the record; patches/record.py says what each field holds",
            )

    def _faults(self) -> list[str]:
        faults = [f"{name} is empty" for name in ("why", "test", "remove_when") if not getattr(self, name).strip()]
        if not _ID.fullmatch(self.id) or not self.id.startswith(self.system + "."):
            faults.append(f"id must read `{self.system}.short-name`, in lower case")
        if self.action not in ("replace", "wrap", "context"):
            faults.append(f"action {self.action!r} is none of replace, wrap, context")
        if self.stage not in ("start", "flags"):
            faults.append(f"stage {self.stage!r} is neither start nor flags")
        shape = _MODULE if self.action == "context" else _PLACE
        if not shape.fullmatch(self.target):
            wanted = "a module name" if self.action == "context" else "`module:Qual.name`"
            faults.append(f"target {self.target!r} is not {wanted}")
        for name, place in [("impl", self.impl), ("when", self.when), *self._further()]:
            if not _PLACE.fullmatch(place):
                faults.append(f"{name} {place!r} is not `module:name`")
        if self.action == "context" and self.aliases:
            faults.append("a context has no aliases: its context manager restores everything it changes")
        if len(set(self.places)) != len(self.places):
            faults.append("the target or an alias is named twice")
        return faults

    def _further(self) -> list[tuple[str, str]]:
        return [*(("alias", place) for place in self.aliases), *(("reads", place) for place in self.reads)]

    @property
    def places(self) -> tuple[str, ...]:
        """The target and its aliases, target first."""
        return (self.target, *self.aliases)

    @property
    def upstream_places(self) -> tuple[str, ...]:
        """Those places, changed or read, whose source is upstream Megatron's: a fingerprint guards each."""
        return tuple(place for place in (*self.places, *self.reads) if is_upstream(place))


def is_upstream(place: str) -> bool:
    """Whether `module:Qual.name` (or a module name) is upstream Megatron's; `megatron.longseq` is ours."""
    module = place.partition(":")[0]
    return module.startswith("megatron.") and not f"{module}.".startswith("megatron.longseq.")
