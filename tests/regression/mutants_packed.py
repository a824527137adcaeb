"""Planted errors of packed documents; see `mutants.py`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.regression.planted import Planted, wrapped


@contextmanager
def _cut_of_the_data() -> Iterator[None]:
    """Let the model take the batch as it was cut, although it is given other documents: it would refuse them."""
    from megatron.longseq.attention.runtime.document_layouts import DocumentLayouts

    def choice(original: Any, self: Any, documents: Any, length: int) -> Any:
        return original(self, self._last_cut or documents, length)

    with wrapped(DocumentLayouts, "_choice", choice):
        yield


@contextmanager
def leaking_documents() -> Iterator[Planted]:
    """Let tokens attend to earlier documents of their sequence, and count positions over them."""
    from megatron.longseq.attention.plan.ranges import Documents, DocumentSpan
    from megatron.longseq.attention.runtime.packed_batch import PackedReader

    planted = Planted()

    def documents(original: Any, self: Any, params: Any, sequences: int, length: int, *rest: Any, **named: Any) -> Any:
        found = original(self, params, sequences, length, *rest, **named)
        planted.times += any(len(spans) > 1 for spans in found.spans)
        return Documents(((DocumentSpan(0, length, 0),),) * sequences)

    with wrapped(PackedReader, "documents", documents), _cut_of_the_data():
        yield planted


@contextmanager
def batch_by_sequence() -> Iterator[Planted]:
    """Cut the batch as a sequence without documents, where attention takes it for cut by document."""
    from patches.usp import batch

    planted = Planted()

    def cut(original: Callable[..., Any], given: dict[str, Any]) -> None:
        planted.times += original(given) is not None

    with wrapped(batch, "_cut_by_document", cut):
        yield planted


@contextmanager
def batch_of_other_segments() -> Iterator[Planted]:
    """Cut the batch by the segments of a sequence without documents, where the model takes those of its documents."""
    from megatron.longseq.pipeline.plan.from_args import segment_lengths
    from patches.usp import batch

    planted = Planted()

    def lengths(original: Callable[..., Any], flags: Any) -> tuple[int, ...]:
        planted.times += original(flags) != segment_lengths(flags)
        return segment_lengths(flags)

    with wrapped(batch, "_segment_lengths", lengths):
        yield planted


@contextmanager
def border_off_by_one() -> Iterator[Planted]:
    """End every document one token late, where the next one has more than one."""
    from megatron.longseq.attention.runtime import packed_batch

    planted = Planted()

    def documents_of(original: Callable[..., Any], borders: Sequence[int], sequences: int, length: int) -> Any:
        moved = list(borders)
        for index in range(1, len(moved) - 1):
            if moved[index] % length and moved[index] + 1 < moved[index + 1]:
                moved[index] += 1
                planted.times += 1
        return original(moved, sequences, length)

    with wrapped(packed_batch, "documents_of", documents_of), _cut_of_the_data():
        yield planted


@contextmanager
def positions_run_on() -> Iterator[Planted]:
    """Count positions on where a document begins inside a piece of the sequence that a rank or a segment holds."""
    from megatron.longseq.attention.plan.ranges import TokenRange
    from megatron.longseq.attention.runtime import packed_batch

    planted = Planted()

    def positions(original: Any, documents: Any, sequence: int, held: Any) -> Any:
        pieces = []
        for one in held:
            inside = original(documents, sequence, [one])
            planted.times += len(inside) > 1
            pieces.append(TokenRange(inside[0].begin, inside[0].begin + one.size))
        return pieces

    with wrapped(packed_batch, "positions_in_documents", positions):
        yield planted


@contextmanager
def neighbour_at_a_border() -> Iterator[Planted]:
    """Let a document that begins where a piece of the sequence begins see the document before it."""
    from megatron.longseq.attention.plan.ranges import Documents

    planted = Planted()

    def within(original: Any, self: Any, sequence: int, positions: Any) -> Any:
        found = original(self, sequence, positions)
        before = [span for span in self.spans[sequence] if span.end == positions.begin]
        if not before or not found or found[0].start != positions.begin:
            return found
        planted.times += 1
        return (found[0]._replace(start=before[0].start), *found[1:])

    from megatron.longseq.attention.runtime import packed_batch

    def positions_as_they_are(original: Any, *args: Any) -> Any:
        with wrapped(Documents, "within", lambda _, *inputs: unplanted(*inputs)):
            return original(*args)

    unplanted = Documents.within
    with (
        wrapped(Documents, "within", within),
        wrapped(packed_batch, "positions_in_documents", positions_as_they_are),
    ):
        yield planted


ALL = (
    batch_by_sequence,
    batch_of_other_segments,
    leaking_documents,
    border_off_by_one,
    positions_run_on,
    neighbour_at_a_border,
)
