"""Samples whose documents end after end-of-document tokens, and data sets on every pipeline stage."""

from collections.abc import Callable
from typing import Any


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
