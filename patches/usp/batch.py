"""Batches that our attention distributes over context-parallel ranks: by sequence, by document, segment by segment."""

from collections.abc import Callable
from typing import Any

import torch

_ALONG_SEQUENCE = ("tokens", "labels", "loss_mask", "position_ids")  # [b, sequence]
# Of THD batches; never cut, whatever their lengths are.
_METADATA = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")
_ALONG_ROWS = "attention_mask"  # [b, 1, sequence, keys]; all other tensors have the sequence in dimension 1


def by_segment(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function behind `get_batch_on_this_cp_rank`: shard every segment as upstream shards a sequence.

    Packed documents may have a layout of their own (`DocumentLayouts`).

    Upstream joins the sequences of a packed micro-batch into one. They are separated again here, so that every sequence
    is sharded alike and hidden states have the shapes that pipeline stages expect.
    """

    def cut_by_segment(batch: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        from megatron.training import get_args

        from megatron.longseq.attention.runtime.packed_documents import of_batch_and_heads

        flags = get_args()
        batch = as_sequences(batch, flags.seq_length)
        if isinstance(batch.get(_ALONG_ROWS), torch.Tensor):  # upstream cuts dimension 2
            batch = {**batch, _ALONG_ROWS: of_batch_and_heads(batch[_ALONG_ROWS])}
        if flags.context_parallel_size > 1 and _borders(batch) is not None:
            by_document = _cut_by_document(batch)
            if by_document is not None:
                return by_document
        if getattr(flags, "seq1f1b_splits", 1) == 1:
            return original(batch, *args, **kwargs)  # type: ignore[no-any-return]
        cut = {name: value for name, value in batch.items() if _is_cut(name, value, flags.seq_length)}
        rest = {name: value for name, value in batch.items() if name not in cut}
        parts, begin = [], 0
        for length in _segment_lengths(flags):
            piece = {name: value.narrow(_dim(name), begin, length) for name, value in cut.items()}
            parts.append(original({**rest, **piece}, *args, **kwargs))
            begin += length
        joined = {name: torch.cat([part[name] for part in parts], dim=_dim(name)) for name in cut}
        return {**parts[-1], **joined}

    return cut_by_segment


def _segment_lengths(flags: Any) -> tuple[int, ...]:
    """Return the tokens per segment of the micro-batch that is being read."""
    from megatron.longseq.pipeline.plan.from_args import BY_DOCUMENTS, segment_lengths
    from patches.packed.model import packed_reader

    return packed_reader().layouts.lengths if flags.seq1f1b_partition == BY_DOCUMENTS else segment_lengths(flags)


def by_sequence(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that cuts a batch document by document: ours is cut as batches without documents are.

    Upstream's needs TransformerEngine, and documents whose lengths are multiples of twice the number of ranks.
    """

    def cut_by_sequence(batch: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        from megatron.core import utils

        return utils._get_batch_on_this_cp_rank_per_sequence_balancing(batch, *args, **kwargs)  # type: ignore[no-any-return]

    return cut_by_sequence


def _borders(batch: dict[str, Any]) -> torch.Tensor | None:
    """Return the cumulative lengths of a packed batch with padding, as the model's entry reads them."""
    padded = batch.get("cu_seqlens_padded")
    return batch.get("cu_seqlens") if padded is None else padded


def _cut_by_document(batch: dict[str, Any]) -> dict[str, Any] | None:
    """Return this rank's part of a packed batch; None if its documents lie as a sequence without documents does."""
    from megatron.longseq.attention.kernels.base import copy_to
    from megatron.longseq.attention.plan.packing import documents_of
    from patches.packed.model import packed_reader

    known = {name: batch[name] for name in _ALONG_SEQUENCE if isinstance(batch.get(name), torch.Tensor)}
    borders, reader = _borders(batch), packed_reader()
    if not known or borders is None:
        return None
    sequences, length = next(iter(known.values())).shape[:2]
    try:
        documents = documents_of(borders.flatten().tolist(), sequences, length)
    except ValueError:
        return None  # the model's entry refuses them, on all ranks at once
    layout = reader.layouts.cut(documents, length)
    if layout.pieces is None:
        return None
    rows = [torch.arange(*one) for part in range(len(layout.lengths)) for one in layout.positions(reader.rank, part)]
    index = copy_to(torch.cat(rows), borders.device)
    return {**batch, **{name: value.index_select(1, index) for name, value in known.items()}}


def as_sequences(batch: dict[str, Any], length: int) -> dict[str, Any]:
    """Return a packed batch [1, b * length] as [b, length], if no document lies in two of the sequences.

    Args:
        batch: tensors by name; those along the sequence are [1, b * length].
        length: tokens of a sequence.

    Returns:
        The batch with views [b, length]; the same batch if a document lies in two of the sequences, or if it is not
        packed.
    """
    borders = _borders(batch)
    joined = [batch[name] for name in _ALONG_SEQUENCE if isinstance(batch.get(name), torch.Tensor)]
    if borders is None or not joined or joined[0].shape[0] != 1 or joined[0].shape[1] in (0, length):
        return batch
    total = joined[0].shape[1]
    if total % length or not set(range(0, total, length)) <= set(borders.flatten().tolist()):
        return batch
    views = {name: batch[name].view(-1, length) for name in _ALONG_SEQUENCE if batch.get(name) is not None}
    return {**batch, **views}


def _dim(name: str) -> int:
    return 2 if name == _ALONG_ROWS else 1


def _is_cut(name: str, value: Any, length: int) -> bool:
    if name in _METADATA:
        return False
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and length in value.shape[1:3]
