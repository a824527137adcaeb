"""Attention within packed documents on one rank, in the place of upstream's local core attention."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron.longseq.attention.kernels.select import KernelSelector
from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.attention.runtime.comm import Message, P2PWork
from megatron.longseq.attention.runtime.function import context_attention, make_call
from megatron.longseq.attention.runtime.packed_batch import PackedDocuments
from megatron.longseq.attention.runtime.ring import RingChannels
from megatron.longseq.attention.runtime.strategies import CPStrategy


class NoPeers:
    """Channel of a ring of one rank, on which nothing is sent."""

    def post(self, sends: list[Message], receives: list[Message]) -> P2PWork:
        """See `P2PChannel.post`.

        Raises:
            RuntimeError: Always; a ring of one rank sends nothing.
        """
        raise RuntimeError(f"a ring of one rank posts {len(sends)} sends and {len(receives)} receives")


def single_rank_strategy() -> CPStrategy:
    """Return the strategy of attention that is not distributed."""
    channel = NoPeers()
    return CPStrategy(Mesh(1, 1), 0, ring=RingChannels(channel, channel, channel, channel))


@dataclass
class DocumentAttention:
    """Computes what upstream's local core attention would, within documents and without a score matrix.

    Attributes:
        strategy: strategy of one rank.
        kernels: selects kernels.
    """

    strategy: CPStrategy = field(default_factory=single_rank_strategy)
    kernels: KernelSelector = field(default_factory=lambda: KernelSelector("packed documents"))

    def __call__(self, core: Any, q: Tensor, k: Tensor, v: Tensor, packed: PackedDocuments) -> Tensor:
        """Return attention [n, b, hq * d].

        Args:
            core: upstream's `DotProductAttention`, whose scale and window apply.
            q: [n, b, hq, d].
            k, v: [n, b, hk, d].
            packed: documents of the micro-batch.

        Raises:
            ValueError: The attention has dropout.
        """
        if core.training and core.attention_dropout.p:
            raise ValueError(
                f"layer {core.layer_number}: attention within packed documents has no dropout of attention weights, "
                f"and this one drops {core.attention_dropout.p}; give --attention-dropout 0"
            )
        softmax = core.scale_mask_softmax
        window = softmax.window_size
        call = make_call(
            q,
            k,
            self.strategy,
            self.kernels.select(q, v, core.config.attention_backend.name),
            core.softmax_scale * (softmax.scale or 1.0),
            window=window[0] if window is not None and window[0] >= 0 else None,
            documents=packed.documents,
            layer=core.layer_number,
        )
        return context_attention(q, k, v, call)
