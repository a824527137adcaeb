"""The errors of patches. Each message says what is wrong, where, why and what to do."""

from typing import Self


class PatchError(RuntimeError):
    """A patch was refused, or found broken, and nothing of it was left in place.

    Args:
        what: what is wrong.
        where: the file, place or patch.
        why: the reason.
        todo: what to do about it.
    """

    def __init__(self, what: str, *, where: str, why: str, todo: str) -> None:
        self.what, self.where, self.why, self.todo = what, where, why, todo
        super().__init__(f"{what}\n  where: {where}\n  why: {why}\n  what to do: {todo}")

    def about(self, patch: str) -> Self:
        """Put the patch that the error concerns before its message; return the error."""
        self.args = (f"{patch}: {self}",)
        return self


class LedgerError(PatchError):
    """The declarations contradict each other: an id twice, a malformed target, a missing reason."""


class UnknownTarget(PatchError):
    """Upstream has no symbol of that name."""


class Drift(PatchError):
    """Upstream's source differs from the source the patch was written against."""


class Conflict(PatchError):
    """Two records claim one place in a way that would silently drop one of them."""


class StaleAlias(PatchError):
    """Somebody holds the original under another name and would go on calling it."""


class ForeignChange(PatchError):
    """A patched place holds neither the original nor our object: somebody else changed it."""


class BadImplementation(PatchError):
    """The implementation cannot be imported, or is not what its action needs."""


class RankMismatch(PatchError):
    """The ranks of one job run under different sets of patches."""
