"""What a patch is: plain data. Importing this module imports neither torch nor Megatron."""

import re
from dataclasses import dataclass, replace
from typing import Literal, Self

from patches.errors import LedgerError

Action = Literal["replace", "wrap", "hook", "context"]
Stage = Literal["start", "flags"]

_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_PLACE = re.compile(rf"{_NAME}:{_NAME}")
_MODULE = re.compile(_NAME)
_ID = re.compile(r"[a-z0-9_]+\.[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True, slots=True)
class Callback:
    """What one system does at an upstream function that is hooked.

    Attributes:
        id: unique, `system.short-name`.
        hook: id of the record that hooks the function.
        impl: `module:name` of a decorator: it takes the function to call and returns a function that calls it.
        why: one sentence: what upstream does not do, or does wrongly, without this.
        when: `module:name` of a predicate on the parsed arguments.
        test: pytest id of the test that is red without this callback.
        remove_when: what has to happen upstream for this callback to go.
        reads: upstream symbols whose source the callback relies on; fingerprints guard them.

    Raises:
        LedgerError: a field is empty or malformed.
    """

    id: str
    hook: str
    impl: str
    why: str
    when: str
    test: str
    remove_when: str
    reads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        faults = _faults_of_part(self)
        if not _ID.fullmatch(self.id):
            faults.append("id must read `system.short-name`, in lower case")
        _refuse(f"callback {self.id!r}", self.system, faults)

    @property
    def system(self) -> str:
        """The system that registers the callback."""
        return self.id.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Record:
    """One change to upstream, declared; `patches.engine.apply` carries it out and undoes it.

    Attributes:
        id: unique, `system.short-name`.
        system: the system it belongs to (`entry`, `cpu`, `seq1f1b`, ...); `hook` for a place that systems share.
        action: `replace` puts `impl` in the target's place; `wrap` puts `impl(original)` there; `hook` wraps the
            target once, in the `callbacks` of all systems; `context` enters the context manager that `impl()` returns,
            for a scope of many small changes (its target is a module name).
        target: `module:Qual.name` of the upstream symbol (`context`: a module name).
        why, test, remove_when, reads: see `Callback`.
        impl: `module:name` of ours, imported only when applied.
        when: `module:name` of a predicate; called as `predicate(args)`, with None for records of stage `start`. A hook
            has no impl, when, test and remove_when: it is applied when one of its callbacks is.
        aliases: further `module:Qual.name` places that hold the same object under import (`from x import f`); they
            are bound together with the target. An alias that is not named here is an error of the alias scan.
        stage: `start` is applied before upstream is imported, `flags` once the command line is parsed.
        link: the upstream fix, when this is a backport.
        callbacks: of a hook, the innermost first: the last one runs first, and sees the result last. The ledger fills
            this in, in the order of systems.

    Raises:
        LedgerError: a field is empty or malformed.
    """

    id: str
    system: str
    action: Action
    target: str
    why: str
    impl: str = ""
    when: str = ""
    test: str = ""
    remove_when: str = ""
    aliases: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    stage: Stage = "flags"
    link: str | None = None
    callbacks: tuple[Callback, ...] = ()

    def __post_init__(self) -> None:
        _refuse(f"patch record {self.id!r}", self.system, self._faults())

    def _faults(self) -> list[str]:
        faults = [] if self.action == "hook" else _faults_of_part(self)
        if not self.why.strip():
            faults.append("why is empty")
        if not _ID.fullmatch(self.id) or not self.id.startswith(self.system + "."):
            faults.append(f"id must read `{self.system}.short-name`, in lower case")
        if self.action not in ("replace", "wrap", "hook", "context"):
            faults.append(f"action {self.action!r} is not replace, wrap, hook or context")
        if self.stage not in ("start", "flags"):
            faults.append(f"stage {self.stage!r} is not start or flags")
        shape = _MODULE if self.action == "context" else _PLACE
        if not shape.fullmatch(self.target):
            form = "a module name" if self.action == "context" else "`module:Qual.name`"
            faults.append(f"target {self.target!r} is not {form}")
        if self.action == "hook" and (self.impl or self.when or self.test or self.remove_when):
            faults.append("a hook has no impl, when, test or remove_when; its callbacks have them")
        if self.action != "hook" and self.callbacks:
            faults.append("only a hook can have callbacks")
        faults += [f"alias {place!r} is not `module:name`" for place in self.aliases if not _PLACE.fullmatch(place)]
        if self.action == "context" and self.aliases:
            faults.append("a context has no aliases: its context manager restores everything it changes")
        if len(set(self.places)) != len(self.places):
            faults.append("the target and its aliases are not unique")
        return faults

    @property
    def parts(self) -> tuple["Record | Callback", ...]:
        """What has an implementation and a predicate: the callbacks of a hook, otherwise the record itself."""
        return self.callbacks if self.action == "hook" else (self,)

    def only(self, parts: "tuple[Record | Callback, ...]") -> Self | None:
        """Return the record without the parts that are not in `parts`, or None if no part is left.

        Args:
            parts: parts of any records.
        """
        if self.action != "hook":
            return self if self in parts else None
        kept = tuple(callback for callback in self.callbacks if callback in parts)
        return replace(self, callbacks=kept) if kept else None

    @property
    def places(self) -> tuple[str, ...]:
        """The target and its aliases, target first."""
        return (self.target, *self.aliases)

    @property
    def upstream_places(self) -> tuple[str, ...]:
        """Those places, changed or read, whose source is upstream Megatron's: a fingerprint guards each."""
        read = (*self.reads, *(place for callback in self.callbacks for place in callback.reads))
        return tuple(place for place in dict.fromkeys((*self.places, *read)) if is_upstream(place))


def is_upstream(place: str) -> bool:
    """Return whether `module:Qual.name`, or a module name, is upstream's. `megatron.longseq` is ours."""
    module = place.partition(":")[0]
    return module.startswith("megatron.") and not f"{module}.".startswith("megatron.longseq.")


def _faults_of_part(part: Record | Callback) -> list[str]:
    faults = [f"{name} is empty" for name in ("why", "test", "remove_when") if not getattr(part, name).strip()]
    for name, place in [("impl", part.impl), ("when", part.when), *(("reads", place) for place in part.reads)]:
        if not _PLACE.fullmatch(place):
            faults.append(f"{name} {place!r} is not `module:name`")
    return faults


def _refuse(what: str, system: str, faults: list[str]) -> None:
    if faults:
        raise LedgerError(
            f"{what} is malformed",
            where=f"patches.{system}",
            why="; ".join(dict.fromkeys(faults)),
            todo="correct it; patches/record.py describes the fields",
        )
