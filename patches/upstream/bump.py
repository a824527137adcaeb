"""Compare each patch with another upstream: same, changed, gone, or perhaps fixed there."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from patches.errors import UnknownTarget
from patches.record import Record
from patches.upstream.lock import Lock
from patches.upstream.source import Symbol, Upstream

State = Literal["same", "new", "changed", "fixed upstream?", "gone"]


@dataclass(frozen=True)
class Verdict:
    """The result for one record.

    Attributes:
        record: the record.
        state: what the other upstream has in place of the patched source.
        details: a line or a diff for each place that differs.
    """

    record: Record
    state: State
    details: tuple[str, ...] = ()


def verdict(record: Record, lock: Lock, there: Upstream, here: Upstream) -> Verdict:
    """Judge a record.

    Args:
        record: the record.
        lock: the fingerprints the patches were written against.
        there: the other upstream.
        here: the present one, to draw a diff from where it still matches the lock.
    """
    details, gone, known = [], False, True
    for place in record.upstream_places:
        try:
            symbol = there.symbol(place)
        except UnknownTarget as error:
            gone = True
            details.append(f"{place}: {error.why} ({error.where})")
            continue
        if place not in lock.symbols:
            known = False
            details.append(f"{place}: not in the lock yet ({symbol.path}:{symbol.line})")
        elif symbol.fingerprint != lock.symbols[place]:
            details.append(_difference(place, lock, symbol, here))
    state: State = "same"
    if gone:
        state = "gone"
    elif not known:
        state = "new"
    elif details:
        state = "fixed upstream?" if record.link else "changed"
        if record.link:
            details.append(f"this patch backports {record.link}: see whether it is in, then remove the record")
    return Verdict(record, state, tuple(details))


def _difference(place: str, lock: Lock, new: Symbol, here: Upstream) -> str:
    try:
        old = here.symbol(place)
    except UnknownTarget:
        old = None
    if old is None or old.fingerprint != lock.symbols[place]:
        return f"{place}: changed ({new.path}:{new.line}); the locked source is not installed, so there is no diff"
    return diff(old, new)


def diff(old: Symbol, new: Symbol) -> str:
    """Return a unified diff of two symbols' sources."""
    lines = difflib.unified_diff(
        old.text.split("\n"),
        new.text.split("\n"),
        f"{old.path}:{old.line} {old.place}",
        f"{new.path}:{new.line} {new.place}",
        lineterm="",
    )
    return "\n".join(lines)


def lines(found: Sequence[Verdict]) -> list[str]:
    """Return the report: one line per patch with its changes below, then a summary."""
    out = []
    for one in found:
        out.append(f"{one.state:16} {one.record.id}")
        out += [f"    {line}" for detail in one.details for line in detail.split("\n")]
        if one.state in ("changed", "gone", "fixed upstream?"):
            for part in one.record.parts:
                out += [f"    {part.id} can go: {part.remove_when}", f"    {part.id} test: {part.test}"]
    counts = {state: sum(v.state == state for v in found) for state in dict.fromkeys(v.state for v in found)}
    return [*out, "patches: " + (", ".join(f"{n} {state}" for state, n in counts.items()) or "none")]
