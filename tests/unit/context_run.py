"""Run one layer's attention on emulated context-parallel ranks, and compute the dense result to compare with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.kernels.torch_cpu import CpuFlash
from megatron.longseq.attention.plan.comm_volume import LayerShape, Volume
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Layout, Mesh, Pieces
from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.attention.runtime.function import (
    AttentionCall,
    Result,
    context_attention,
    forward_for_recompute,
    make_call,
)
from megatron.longseq.attention.runtime.kv_cache import SegmentKVCache
from megatron.longseq.attention.runtime.strategies import CPStrategy
from megatron.longseq.segment import Segment
from tests.unit.attention_bed import SCALE, qkv
from tests.unit.context_bed import dense, on_all, strategies


@dataclass(frozen=True)
class Problem:
    """What is computed.

    Attributes:
        mesh: the ranks.
        heads: of queries, and of keys and values.
        lengths: tokens of every segment; more than one: computed one after another, through a store.
        batch, dim: of the tensors.
        window, documents, pieces: see `context.make_call`.
        gathers, inner: all-gather instead of a ring; ranks of a window of a double ring.
        dtype: of the inputs.
        kernel: of the blocks.
    """

    mesh: Mesh
    heads: tuple[int, int] = (4, 2)
    lengths: tuple[int, ...] = (64,)
    batch: int = 2
    dim: int = 8
    window: int | None = None
    documents: Documents | None = None
    pieces: Pieces | None = None
    gathers: bool = False
    inner: int | None = None
    dtype: torch.dtype = torch.float64
    kernel: Kernel = field(default_factory=CpuFlash)

    @property
    def layout(self) -> Layout:
        """Return the layout of the tokens."""
        return Layout(self.mesh, self.lengths, pieces=self.pieces)

    @property
    def setup(self) -> LayerShape:
        """Return the layer as the formulas of communication volume describe it."""
        sizes = {torch.float64: (8, 8), torch.float32: (4, 4), torch.bfloat16: (2, 4)}[self.dtype]
        return LayerShape(self.layout, Heads(*self.heads), self.batch, self.dim, *sizes)

    def inputs(self, seed: int = 0) -> list[Tensor]:
        """Return q, k, v and the gradient of the output, of the whole sequence."""
        return qkv(sum(self.lengths), self.batch, self.heads, self.dim, seed=seed, dtype=self.dtype)

    def strategies(self) -> list[CPStrategy]:
        """Return the strategy of every rank."""
        return strategies(self.mesh, window=self.inner, gathers=self.gathers)

    def positions(self, rank: int, segment: int) -> Tensor:
        """Return the positions of a rank's tokens, in the rank's order."""
        return torch.cat([torch.arange(*span) for span in self.layout.positions(rank, segment)])

    def expected(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return out, dq, dk, dv by the formula, in float64."""
        q, k, v, grad = (x.double() for x in inputs)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = dense(*leaves, SCALE, self.window, self.documents)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@dataclass
class Part:
    """A segment's tokens on one rank."""

    at: Tensor
    leaves: list[Tensor]
    out: Tensor | None = None
    result: Result | None = None


class Ranks:
    """All ranks of a problem.

    Args:
        problem: what is computed.
        inputs: of the whole sequence, see `Problem.inputs`.
        joined: spreads of `Problem.strategies`, to look at what they sent.
        repeats: run every forward twice, as recomputation does: keeping the result of the first.
        cut: turns a rank's q, k, v into the leaves given to attention.
    """

    def __init__(
        self,
        problem: Problem,
        inputs: Sequence[Tensor],
        joined: Sequence[CPStrategy] | None = None,
        *,
        repeats: bool = False,
        cut: Callable[[list[Tensor]], list[Tensor]] = lambda leaves: leaves,
    ) -> None:
        self.problem, self.repeats, self.cut = problem, repeats, cut
        self.strategies = list(joined or problem.strategies())
        self.grad = inputs[3]
        self.stores = [SegmentKVCache() if len(problem.lengths) > 1 else None for _ in self.strategies]
        self.parts = []
        for rank in range(problem.mesh.size):
            places = [problem.positions(rank, segment) for segment in range(len(problem.lengths))]
            self.parts.append([Part(at, [x[at].clone().requires_grad_() for x in inputs[:3]]) for at in places])

    def on_each(self, job: Callable[[int], Any]) -> list[Any]:
        """Run a job on every rank at the same time."""
        return on_all([lambda rank=rank: job(rank) for rank in range(len(self.strategies))])

    def forward(self) -> "Ranks":
        """Run the forward of every segment on every rank."""
        self.on_each(self.forward_of)
        return self

    def backward(self) -> "Ranks":
        """Run the backward of every segment, last to first, on every rank."""
        self.on_each(self.backward_of)
        return self

    def forward_of(self, rank: int) -> None:
        """Run the forwards of one rank."""
        for segment, part in enumerate(self.parts[rank]):
            q, k, v = self.cut(part.leaves)
            if self.repeats:
                part.out, part.result = forward_for_recompute(q, k, v, self.call(rank, segment, q, k))
            else:
                part.out = context_attention(q, k, v, self.call(rank, segment, q, k))

    def backward_of(self, rank: int) -> None:
        """Run the backwards of one rank."""
        for segment, part in reversed(list(enumerate(self.parts[rank]))):
            if self.repeats:
                q, k, v = self.cut(part.leaves)
                first, part.out = part.out, context_attention(q, k, v, self.call(rank, segment, q, k), part.result)
                assert first is not None and torch.equal(part.out, first)
            self.call(rank, segment, *part.leaves[:2])  # announces the segment to the store
            assert part.out is not None
            part.out.backward(self.grad[part.at])
        cache = self.stores[rank]
        if cache is not None:
            cache.assert_empty()

    def call(self, rank: int, segment: int, q: Tensor, k: Tensor) -> AttentionCall:
        """Make a segment the current one and return its call."""
        problem, cache = self.problem, self.stores[rank]
        if cache is not None:
            cache.current = Segment(0, segment, problem.lengths)
        options: dict[str, Any] = {
            "window": problem.window,
            "documents": problem.documents,
            "pieces": problem.pieces,
        }
        return make_call(q, k, self.strategies[rank], problem.kernel, SCALE, **options, layer=1, cache=cache)

    def results(self) -> list[Tensor]:
        """Return out, dq, dk, dv of the whole sequence."""
        leaves = self.parts[0][0].leaves
        whole = [torch.full_like(self.grad, torch.nan)]
        whole += [leaf.new_full((self.grad.shape[0], *leaf.shape[1:]), torch.nan) for leaf in leaves]
        for part in (part for parts in self.parts for part in parts):
            assert part.out is not None
            for place, piece in zip(whole, (part.out.detach(), *(leaf.grad for leaf in part.leaves)), strict=True):
                assert piece is not None
                place[part.at] = piece
        return whole


def run(problem: Problem, **kwargs: Any) -> list[Tensor]:
    """Return out, dq, dk, dv for a problem's own inputs."""
    return Ranks(problem, problem.inputs(), **kwargs).forward().backward().results()


def alone(problem: Problem) -> Problem:
    """Compute the same attention on one rank without segments, with one kernel call per tile."""
    return replace(problem, mesh=Mesh(1, 1), lengths=(sum(problem.lengths),), gathers=False, inner=None)


def all_gather(layer: LayerShape, *, kept: bool) -> Volume:
    """Return the volume of --cp-comm-type all_gather: one all-gather of keys, one reduce-scatter of gradients.

    Args:
        layer: shape of the layer.
        kept: backward still holds the gathered keys (always so with segments); otherwise it gathers them again.
    """
    mesh = layer.layout.mesh
    if mesh.ring == 1:
        return Volume(0, 0, 0, 0)
    elements = layer.key_elements((mesh.ring - 1) * layer.tokens)
    messages = mesh.size * layer.segments
    keys, again = elements * layer.item, 0 if kept else 1
    return Volume(keys, again * keys + elements * layer.grad_item, messages, (1 + again) * messages)
