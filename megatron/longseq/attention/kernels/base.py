"""Interface of a block attention kernel."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """Scale and mask of a block's scores; the mask is aligned bottom-right: the last row is at the last key.

    Attributes:
        scale: factor of the products of queries and keys.
        causal: row i sees keys j <= i + sk - sq only.
        window: row i sees keys j >= i + sk - sq - window only; None: there is no such bound.
    """

    scale: float
    causal: bool = False
    window: int | None = None


def copy_to(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device.

    A copy from the host to a GPU starts from pinned memory. From other memory the host would wait for all earlier work
    of the stream.
    """
    is_copied = x.device.type == "cpu" and device.type == "cuda"
    return (x.pin_memory() if is_copied else x).to(device, non_blocking=is_copied)


@dataclass(frozen=True, slots=True)
class PackedLengths:
    """Lengths of blocks whose queries, and whose keys, are packed one after another.

    Attributes:
        rows: queries of every block, at least one.
        keys: keys of every block, at least one.
        memo: what kernels derive from the lengths, such as offsets on a device.
    """

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the first query and the first key of every block and the totals, two tensors int32 [blocks + 1]."""
        key = ("offsets", device)
        if key not in self.memo:
            self.memo[key] = tuple(
                copy_to(torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32), device)
                for lengths in (self.rows, self.keys)
            )
        return self.memo[key]  # type: ignore[no-any-return]

    def longest(self) -> tuple[int, int, tuple[int, int]]:
        """Return the most rows, the most keys, and the lengths of the block with the most rows beside its keys.

        Returns:
            Numbers of queries and keys: the most queries of a block, the most keys of a block, and (queries, keys) of
            the
            block whose queries exceed its keys by the most.
        """
        if "longest" not in self.memo:
            steepest = max(zip(self.rows, self.keys, strict=True), key=lambda block: block[0] - block[1])
            self.memo["longest"] = max(self.rows), max(self.keys), steepest
        return self.memo["longest"]  # type: ignore[no-any-return]


class BackwardInputs(NamedTuple):
    """What a backward reads besides the mask; see `Kernel` for the layouts."""

    grad_out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which results and gradients of a type are summed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous. Kernels take any other strides, but some misread this one.

    Args:
        x: tensor of any shape.

    Returns:
        `x` itself if its last dimension is contiguous, else a contiguous copy.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


class Kernel(Protocol):
    """Attention of some queries to some keys, with the log-sum-exp by which partial results are merged.

    Layouts: q [sq, b, hq, d], k [sk, b, hk, d], v [sk, b, hk, dv], where hk divides hq; out [sq, b, hq, dv] in the type
    of q; lse [b, hq, sq], the natural log-sum-exp of the scaled scores, in float32 (float64 for float64). There is at
    least one row and one key. A row that sees no key has out 0 and lse -inf.

    The packed functions compute many blocks in one call. Their queries, and their keys, lie one after another in
    tensors of batch size 1. Every row sees at least one key of its block.

    Attributes:
        name: name in the log.
        rectangular: takes a causal block with sk > sq, and windows, as fast as squares.
        wide: takes float32 beside narrower types, so that partial results need not be rounded before they are merged.
        dropout: probability of dropping an attention weight. Random numbers come from torch's generator of the device,
            in backward in the same order as in forward; the caller restores the generator's state.
    """

    name: str
    rectangular: bool
    wide: bool
    dropout: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return (out, lse).

        Args:
            q, k, v: see the class.
            scores: scale and mask of the block.

        Returns:
            out [sq, b, hq, dv] and lse [b, hq, sq].
        """
        ...

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of a block.

        `out` and `lse` are those of all keys that the rows see, not of the block alone.

        Args:
            grad_out: gradient of `out`, [sq, b, hq, dv].
            q, k, v, out, lse: see the class.
            scores: scale and mask of the block, as in forward.

        Returns:
            dq, dk and dv, of the shapes of q, k and v.
        """
        ...

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, lengths: PackedLengths
    ) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of packed blocks with one mask.

        Args:
            q: [all queries, 1, hq, d].
            k, v: [all keys, 1, hk, d] and [all keys, 1, hk, dv].
            scores: scale and mask, the same for every block.
            lengths: queries and keys of every block.

        Returns:
            out [all queries, 1, hq, dv] and lse [1, hq, all queries].
        """
        ...

    def backward_packed(
        self, inputs: BackwardInputs, scores: Scores, lengths: PackedLengths
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) of packed blocks; see `backward`.

        Args:
            inputs: packed as in `forward_packed`.
            scores: scale and mask, as in forward.
            lengths: queries and keys of every block.

        Returns:
            dq, dk and dv, of the shapes of q, k and v.
        """
        ...
