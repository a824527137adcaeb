"""Compute plain attention by autograd, and run sequences through a KV cache segment by segment."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.runtime.kv_cache import SegmentKVCache
from megatron.longseq.attention.runtime.segment_attention import segment_attention
from megatron.longseq.segment import Segment

SCALE = 0.3


def tensors(shapes: Sequence[tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return random tensors for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def segments(microbatch: int, lengths: Sequence[int], forward_only: bool = False) -> list[Segment]:
    """Return all segments of a micro-batch."""
    return [Segment(microbatch, index, tuple(lengths), forward_only) for index in range(len(lengths))]


def qkv(tokens: int, batch: int, heads: tuple[int, int], dim: int = 8, **kwargs: Any) -> list[Tensor]:
    """Return q, k, v and a gradient of the output, [s, b, hq * d]."""
    hq, hk = heads
    q, k, v, grad = tensors([(tokens, batch, h, dim) for h in (hq, hk, hk, hq)], **kwargs)
    return [q, k, v, grad.flatten(2)]


def seen(tokens: int, window: int | None = None) -> Tensor:
    """Return the causal mask [rows, keys], True where a key is seen, computed row by row."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for row in range(tokens):
        mask[row, 0 if window is None else max(0, row - window) : row + 1] = True
    return mask


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, kept: Tensor | None = None) -> Tensor:
    """Compute attention by its formula. The mask [rows, keys] or [b, 1, rows, keys] is True where a key is seen."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = (torch.einsum("sbhd,tbhd->bhst", q, k) * SCALE).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1) if kept is None else scores.softmax(-1) * kept
    return torch.einsum("bhst,tbhd->sbhd", weights, v).flatten(2)


def oracle(inputs: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
    """Return out, dq, dk, dv of unsplit attention in float64."""
    q, k, v, grad = (x.double() for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = plain(*leaves, mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


Wrap = Callable[[Callable[..., Tensor], Tensor, Tensor, Tensor], Tensor]


class Split:
    """One sequence (micro-batch) run through a store: forward and backward of any of its segments, when asked."""

    def __init__(
        self, inputs: Sequence[Tensor], lengths: Sequence[int], cache: SegmentKVCache, kernel: Kernel, **kwargs: Any
    ) -> None:
        self.wrap: Wrap = kwargs.pop("wrap", lambda function, *args: function(*args))
        self.layer = kwargs.pop("layer", 1)
        self.units = segments(kwargs.pop("microbatch", 0), lengths, kwargs.pop("forward_only", False))
        self.leaves = [[x[s.begin : s.end].clone().requires_grad_() for x in inputs[:3]] for s in self.units]
        self.grads = [inputs[3][s.begin : s.end] for s in self.units]
        self.outs: list[Tensor | None] = [None] * len(self.units)
        self.cache, self.kernel, self.kwargs = cache, kernel, kwargs

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Run attention of the current segment."""
        return segment_attention(q, k, v, self.cache, self.layer, self.kernel, SCALE, **self.kwargs)

    def forward(self, index: int) -> Segment:
        """Run the forward of a segment, as an executor does."""
        self.cache.current = self.units[index]
        self.outs[index] = self.wrap(self.attend, *self.leaves[index])
        return self.units[index]

    def backward(self, index: int) -> None:
        """Run the backward of a segment, as an executor does."""
        self.cache.current = self.units[index]
        out = self.outs[index]
        assert out is not None
        out.backward(self.grads[index])

    def run(self) -> "Split":
        """Run all forwards and backwards in order."""
        for index in range(len(self.units)):
            self.forward(index)
        for index in reversed(range(len(self.units))):
            self.backward(index)
        return self

    def results(self) -> list[Tensor]:
        """Return out, dq, dk, dv of the whole sequence."""
        outs = torch.cat([out.detach() for out in self.outs if out is not None])
        grads = [torch.cat([leaves[i].grad for leaves in self.leaves]) for i in range(3)]  # type: ignore[misc]
        return [outs, *grads]


def assert_close(
    results: Sequence[Tensor], expected: Sequence[Tensor], terms: int, dtype: torch.dtype = torch.float64
) -> None:
    """Require results, computed in `dtype`, to differ from `expected` only by another order of the same sums.

    A result is behind four sums one after another (scores, softmax, then out, or the gradients of scores and of inputs)
    of at most `terms` terms each: tokens, or a head's dimension. A sum of n terms errs by at most n eps times the sum
    of their magnitudes, which for terms of random sign is about sqrt(n) times the sum itself.
    """
    largest = max(1.0, *(x[x.isfinite()].abs().max().item() for x in expected if x.isfinite().any()))
    found, most = worst(results, expected), 4 * terms * torch.finfo(dtype).eps * math.sqrt(terms) * largest
    assert found <= most, f"differs by {found:.1e}; the order of sums explains {most:.1e}"


def worst(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of any element."""
    assert all(a.shape == b.shape for a, b in zip(results, expected, strict=True))
    differences = [(a.double() - b.double()).abs().max().item() for a, b in zip(results, expected, strict=True)]
    assert not any(math.isnan(difference) for difference in differences)
    return max(differences)
