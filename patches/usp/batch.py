"""Batches of sequences that run in segments: each segment is sharded over the context-parallel ranks."""

from collections.abc import Callable
from typing import Any

import torch

_ALONG_ROWS = "attention_mask"  # [b, 1, sequence, keys]; all other tensors have the sequence in dimension 1


def by_segment(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function behind `get_batch_on_this_cp_rank`: shard every segment as upstream shards a sequence."""

    def cut_by_segment(batch: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        from megatron.training import get_args

        from megatron.longseq.pipeline.plan.from_args import segment_lengths

        flags = get_args()
        cut = {name: value for name, value in batch.items() if _is_cut(value, flags.seq_length)}
        rest = {name: value for name, value in batch.items() if name not in cut}
        parts, begin = [], 0
        for length in segment_lengths(flags):
            piece = {name: value.narrow(_dim(name), begin, length) for name, value in cut.items()}
            parts.append(original({**rest, **piece}, *args, **kwargs))
            begin += length
        joined = {name: torch.cat([part[name] for part in parts], dim=_dim(name)) for name in cut}
        return {**parts[-1], **joined}

    return cut_by_segment


def _dim(name: str) -> int:
    return 2 if name == _ALONG_ROWS else 1


def _is_cut(value: Any, length: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and length in value.shape[1:3]
