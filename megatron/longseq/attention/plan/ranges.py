"""Sets of numbers as sorted ranges that neither touch nor overlap: positions, and rows of a rank's keys."""

from collections.abc import Iterable

from megatron.longseq.attention.plan.tiles import Span

Spans = tuple[Span, ...]


def union(spans: Iterable[Span]) -> Spans:
    """Return what is in any of some spans."""
    merged: list[Span] = []
    for span in sorted(spans):
        if span.size <= 0:
            continue
        if merged and span.begin <= merged[-1].end:
            merged[-1] = Span(merged[-1].begin, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return tuple(merged)


def common(left: Spans, right: Spans) -> Spans:
    """Return what is in both sets."""
    met = (Span(max(a.begin, b.begin), min(a.end, b.end)) for a in left for b in right)
    return tuple(span for span in met if span.size > 0)


def minus(left: Spans, right: Spans) -> Spans:
    """Return what is in the left set alone."""
    if not left:
        return ()
    ends = [left[0].begin, *(edge for span in right for edge in span), left[-1].end]
    gaps = [Span(ends[i], ends[i + 1]) for i in range(0, len(ends), 2)]
    return common(left, tuple(gap for gap in gaps if gap.size > 0))


def size(spans: Spans) -> int:
    """Return how many numbers are in a set."""
    return sum(span.size for span in spans)


def clipped(spans: Spans, begin: int, end: int) -> Spans:
    """Return what lies in [begin, end)."""
    return common(spans, (Span(begin, end),)) if begin < end else ()


def before(spans: Spans, bound: int) -> int:
    """Return how many numbers of a set are smaller than a bound: the index of the bound in a buffer that holds them."""
    return sum(min(span.end, bound) - span.begin for span in spans if span.begin < bound)


def located(held: Spans, wanted: Spans) -> Spans:
    """Return where a buffer that holds one set has the members of another.

    Raises:
        ValueError: something wanted is not held.
    """
    missing = minus(wanted, held)
    if missing:
        raise ValueError(f"of {[tuple(x) for x in wanted]}, {[tuple(x) for x in missing]} is not held")
    return union(Span(before(held, span.begin), before(held, span.end)) for span in wanted)
