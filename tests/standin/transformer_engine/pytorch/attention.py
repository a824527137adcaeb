"""Attention over context-parallel ranks: keys and values are gathered, whichever --cp-comm-type is named."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .module import TransformerEngineBaseModule


class _Gather(torch.autograd.Function):
    """Gather the ranks' tensors, [ranks, ...]; the gradient of each part is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


class DotProductAttention(TransformerEngineBaseModule):
    """Causal attention of tensors in `sbhd` form, with windows."""

    def __init__(  # noqa: PLR0917
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if attention_dropout or return_max_logit or softmax_type != "vanilla" or isinstance(cp_group, list):
            raise NotImplementedError("no dropout, no maximum, and one group of ranks")
        self.window = window_size[0] if window_size is not None else -1
        self.scale = softmax_scale or (kv_channels if isinstance(kv_channels, int) else kv_channels[0]) ** -0.5
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)

        def accept_missing(module: Any, incompatible_keys: Any) -> None:
            """TransformerEngine's own module takes checkpoints without its state, by this name alone."""
            for key in [key for key in incompatible_keys.missing_keys if "core_attention._extra_state" in key]:
                incompatible_keys.missing_keys.remove(key)

        self.register_load_state_dict_post_hook(accept_missing)

    def set_context_parallel_group(
        self, cp_group: Any, cp_global_ranks: list[int] | None, cp_stream: Any, cp_comm_type: str = "p2p"
    ) -> None:
        """Keep the group."""
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type

    def forward(  # noqa: PLR0917
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        num_splits: int | None = 1,
    ) -> Tensor:
        """Return [tokens, batch, heads * dim]."""
        if attn_mask_type != "causal" or qkv_format not in (None, "sbhd") or core_attention_bias is not None:
            raise NotImplementedError("causal attention of sbhd tensors without bias")
        rows = columns = _positions(len(query_layer), self.cp_group)
        keys, values = key_layer, value_layer
        if self.cp_group is not None and self.cp_group.size() > 1:
            keys, values = (_Gather.apply(x, self.cp_group).flatten(0, 1) for x in (keys, values))
            size, tokens = self.cp_group.size(), len(query_layer)
            columns = torch.cat([_chunks(tokens, size, rank) for rank in range(size)])
        far = rows[:, None] - columns
        hidden = far < 0
        if self.window >= 0:
            hidden |= far > self.window
        repeated = query_layer.shape[2] // keys.shape[2]
        keys, values = (x.repeat_interleave(repeated, 2) for x in (keys, values))
        scores = torch.einsum("qbhd,kbhd->bhqk", query_layer, keys) * self.scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", weights, values).flatten(2)


def _positions(tokens: int, group: Any) -> Tensor:
    return torch.arange(tokens) if group is None else _chunks(tokens, group.size(), group.rank())


def _chunks(tokens: int, size: int, rank: int) -> Tensor:
    """Return the positions of a rank's tokens: chunks `rank` and `2 size - 1 - rank` of 2 size."""
    half = tokens // 2
    if size == 1:
        return torch.arange(tokens)
    first = torch.arange(half)
    return torch.cat([first + rank * half, first + (2 * size - 1 - rank) * half])
