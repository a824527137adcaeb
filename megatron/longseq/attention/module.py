"""Core attention over context-parallel ranks, for the slot that upstream's layer specs have for it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from megatron.core.utils import log_single_rank
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.kernels.reference import Reference
from megatron.longseq.attention.kernels.select import select_kernel
from megatron.longseq.attention.plan.layout import Layout
from megatron.longseq.attention.runtime.function import AttentionCall, RecomputeCache, make_call, context_attention, forward_for_recompute
from megatron.longseq.attention.runtime.masks import MaskReader
from megatron.longseq.attention.runtime.strategies import CPStrategy

logger = logging.getLogger(__name__)


@dataclass
class KernelSelector:
    """Kernels by what they are wanted for; the choice is logged once.

    Attributes:
        who: named in the log.
    """

    who: str
    chosen: dict[Any, Kernel] = field(default_factory=dict)

    def of(self, query: Tensor, value: Tensor, dropout: float = 0.0) -> Kernel:
        """Return the kernel for some tensors."""
        wanted = (query.device, query.dtype, query.shape[-1], value.shape[-1], dropout)
        if wanted not in self.chosen:
            choice = select_kernel(*wanted[:3], value_dim=wanted[3], dropout=dropout)
            level = logging.WARNING if choice.kernel.name == Reference.name else logging.INFO
            log_single_rank(logger, level, f"{self.who}: {choice.why}")
            self.chosen[wanted] = choice.kernel
        return self.chosen[wanted]


@dataclass
class ContextParallel:
    """What the layers of a process share.

    Attributes:
        spreads: by --cp-comm-type.
        masks: reads documents.
        kept: results of forwards that recomputation repeats.
    """

    strategies: dict[str, CPStrategy]
    masks: MaskReader
    kept: RecomputeCache = field(default_factory=RecomputeCache)
    kernels: KernelSelector = field(default_factory=lambda: KernelSelector("context parallelism"))

    @property
    def size(self) -> int:
        """Context-parallel ranks."""
        return next(iter(self.strategies.values())).mesh.size

    def strategy(self, comm_type: str | None) -> CPStrategy:
        """Return the spread of a layer.

        Raises:
            ValueError: no layer was to have that type.
        """
        if (comm_type or "p2p") not in self.strategies:
            raise ValueError(f"--cp-comm-type {comm_type}: groups are open for {', '.join(self.strategies)} alone")
        return self.strategies[comm_type or "p2p"]


def attention_scale(config: Any) -> float:
    """Return the factor of the scores."""
    return config.softmax_scale or config.kv_channels**-0.5  # type: ignore[no-any-return]


def attention_window(config: Any, layer: int) -> int | None:
    """Return how many keys before its own position a query of a layer sees; None: all."""
    has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer)
    return config.window_size[0] if has_window and config.window_size[0] >= 0 else None


def refuse_mask_type(kind: AttnMaskType | None, where: str) -> None:
    """Refuse a mask that is not the causal one, which is what our attention computes whatever it is handed.

    Args:
        kind: of a module, or handed to its forward; None: the module's.
        where: for the message: the layer.

    Raises:
        ValueError: names the layer and the type.
    """
    if kind not in (None, AttnMaskType.causal, AttnMaskType.causal_bottom_right):
        raise ValueError(
            f"{where}: attention with mask type {kind.name} is not served, only causal; leave attn_mask_type out, or "
            "train this model without --seq1f1b-splits and --context-parallel-size."
        )


def refuse_window(config: Any, where: str) -> None:
    """Refuse a window that reaches to the right, which a script may set past --window-size.

    Raises:
        ValueError: names the layer and the window.
    """
    window = config.window_size
    if window is not None and window[1] not in (0, -1):
        raise ValueError(
            f"{where}: a window of {tuple(window)} reaches to the right and is not causal; give (left, 0) as the "
            "configuration's window_size."
        )


def attend_once(q: Tensor, k: Tensor, v: Tensor, kept: RecomputeCache, make_call: Callable[[AttentionCall | None], AttentionCall]) -> Tensor:
    """Run attention, but not again where upstream recomputes activations.

    Args:
        q, k, v: see `context_attention`.
        kept: between a forward and its repetition.
        make_call: returns the call; given the call of the first forward, in its repetition.
    """
    if kept.active is not None and not torch.is_grad_enabled():
        call = make_call(None)
        out, result = forward_for_recompute(q, k, v, call)
        kept.active.append((result, call))
        return out
    if kept.active:
        result, first = kept.active.popleft()
        return context_attention(q, k, v, make_call(first), result)
    return context_attention(q, k, v, make_call(None))


class ContextParallelAttention(MegatronModule):
    """Causal self-attention of this rank's tokens to those of all context-parallel ranks.

    Args:
        config: upstream's.
        layer_number: from 1.
        attn_mask_type: causal.
        attention_type: "self".
        attention_dropout: 0; None: as the configuration says.
        softmax_scale: factor of the scores; None: as the configuration says.
        cp_comm_type: of this layer.
        pg_collection: unused: the groups are the context's.
        context: returns the open groups.

    Raises:
        ValueError: attention that is not causal self-attention, or with dropout.
    """

    def __init__(  # noqa: PLR0913
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        pg_collection: Any = None,
        context: Callable[[], ContextParallel],
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if attention_type != "self" or attn_mask_type is AttnMaskType.no_mask or dropout:
            raise ValueError(
                f"layer {layer_number}: {attention_type} attention with mask {attn_mask_type.name} and dropout "
                f"{dropout} over context-parallel ranks; causal self-attention without dropout is served"
            )
        self.layer_number = max(1, layer_number)
        refuse_mask_type(attn_mask_type, f"layer {layer_number}")
        refuse_window(config, f"layer {layer_number}")
        self.context = context()
        self.strategy = self.context.strategy(cp_comm_type)
        self.scale = softmax_scale or attention_scale(config)
        self.window = attention_window(config, self.layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **further: Any,
    ) -> Tensor:
        """Return [n, b, hq * d] of q [n, b, hq, d] and k, v [n, b, hk, d], this rank's tokens.

        Raises:
            ValueError: a bias, packed sequences in THD form, or a mask that is not causal.
        """
        refuse_mask_type(attn_mask_type, f"layer {self.layer_number}")
        if any(further.get(name) is not None for name in ("attention_bias", "packed_seq_params")):
            raise ValueError(
                f"layer {self.layer_number}: attention over context-parallel ranks takes no bias and no "
                "packed_seq_params; documents are packed with --reset-attention-mask"
            )
        context = self.context
        kernel = context.kernels.of(query, value)

        def make_call(first: AttentionCall | None) -> AttentionCall:
            if first is not None:  # the mask may be another by now
                documents = first.documents
            else:
                layout = Layout(self.strategy.mesh, (query.shape[0] * self.strategy.mesh.size,))
                documents = context.masks.documents(attention_mask, layout, query.shape[1], id(self))
            return make_call(query, key, self.strategy, kernel, self.scale, window=self.window, documents=documents)

        return attend_once(query, key, value, context.kept, make_call)
