"""Samples whose documents end after end-of-document tokens or before padding, and data sets on every pipeline stage."""

from collections.abc import Callable
from typing import Any

PADDING = 128  # tokens of a document of padding: few, since their work is their square


def ending_at_eod(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `GPTDataset.__getitem__`: documents end where --reset-attention-mask ends them.

    Upstream's --dataloader-inter-document-masking takes the borders of stored documents instead, and always counts
    positions from them.
    """

    def __getitem__(self: Any, idx: int | None) -> dict[str, Any]:
        sample = original(self, idx)
        lengths = _lengths(sample["tokens"], self.config.tokenizer.eod)
        return {**sample, **_documents(lengths, self.config.reset_position_ids)}

    return __getitem__


def ending_before_padding(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `SFTDataset.__getitem__`: the padding at the end of a sample belongs to no conversation.

    Upstream's data set joins it to the last conversation, whose attention then costs the square of both. Here it is
    documents of its own. No token of a conversation sees it, and it has no loss, so that nothing else changes.
    """

    def __getitem__(self: Any, idx: int) -> dict[str, Any]:
        import torch

        sample = original(self, idx)
        counts = (sample["tokens"] != self.config.tokenizer.pad) | (sample["loss_mask"] != 0)
        total, end = counts.numel(), int(torch.nonzero(counts).max()) + 1 if counts.any() else 0
        borders = torch.unique_consecutive(sample["cu_seqlens"])
        if end <= int(borders[-2]) or end == total:
            return sample  # the last conversation is truncated, or fills the sample
        pieces = torch.arange(end, total, PADDING, dtype=borders.dtype)
        borders = torch.cat((borders[:-1], pieces, borders[-1:]))
        sample["cu_seqlens"] = torch.full_like(sample["cu_seqlens"], total)
        sample["cu_seqlens"][: len(borders)] = borders
        sample["max_seqlen"] = borders.diff().max()
        return sample

    return __getitem__


def _lengths(tokens: Any, eod: int) -> Any:
    """Return the lengths of the documents of a sample; the end-of-document token belongs to the one that it ends."""
    import torch

    ends = torch.nonzero(tokens == eod).flatten() + 1
    borders = torch.cat((ends.new_zeros(1), ends, ends.new_full((1,), tokens.numel())))
    return borders.diff()


def _documents(lengths: Any, resets_positions: bool) -> dict[str, Any]:
    import torch

    total = int(lengths.sum())
    lengths = lengths[lengths > 0]
    ends = lengths.cumsum(0)
    borders = torch.full((total + 1,), total, dtype=torch.int32)  # upstream pads to this length, so that samples stack
    borders[0] = 0
    borders[1 : 1 + len(ends)] = ends
    positions = torch.arange(total)
    if resets_positions:
        positions -= torch.repeat_interleave(ends - lengths, lengths)
    return {"position_ids": positions, "cu_seqlens": borders, "max_seqlen": lengths.max().to(torch.int32)}


def on_every_stage(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `BlendedMegatronDatasetBuilder.__init__`: every pipeline stage reads cu_seqlens from the data set."""

    def __init__(self: Any, cls: Any, sizes: Any, is_built_on_rank: Callable[[], bool], config: Any) -> None:
        from megatron.core import parallel_state

        def reads_documents() -> bool:
            return is_built_on_rank() or parallel_state.get_tensor_model_parallel_rank() == 0

        original(self, cls, sizes, reads_documents if config.inter_document_masking else is_built_on_rank, config)

    return __init__
