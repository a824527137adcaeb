"""Rows of tensors that a launch computes with, and the way back."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import BackwardInputs, Kernel, PackedLengths, Scores, copy_to
from megatron.longseq.attention.plan.launches import Launch
from megatron.longseq.attention.plan.layout import ReceivedRows
from megatron.longseq.attention.plan.ranges import TokenRange, TokenRanges

FEW_RANGES = 8  # so many ranges of rows are taken one by one; more are taken by an index
FEW_PARTS = 64  # likewise for rows of several ranks, which are written to memory by one call


def index_of(ranges: Sequence[TokenRange], device: torch.device) -> Tensor:
    """Return the numbers of some ranges in order, int64.

    Args:
        ranges: ranges of rows.
        device: device of the result.

    Returns:
        int64 [total size of the ranges].
    """
    begins, sizes = torch.tensor([one.begin for one in ranges]), torch.tensor([one.size for one in ranges])
    shifts = begins - (sizes.cumsum(0) - sizes)
    return copy_to(torch.arange(int(sizes.sum())) + shifts.repeat_interleave(sizes), device)


@lru_cache(maxsize=64)
def _cached_index(ranges: TokenRanges, device: torch.device) -> Tensor:
    return index_of(ranges, device)


def take_rows(x: Tensor, ranges: TokenRanges) -> Tensor:
    """Return some rows of [s, ...] as a contiguous tensor, without a copy if they are one range.

    Args:
        x: [s, ...].
        ranges: rows of `x`.

    Returns:
        [rows, ...], in the order of `ranges`.
    """
    if len(ranges) > FEW_RANGES:
        return x.index_select(0, _cached_index(ranges, x.device))
    parts = [x[one.slice()] for one in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_rows(total: Tensor, ranges: TokenRanges, values: Tensor, batch: TokenRange) -> None:
    """Add values to some rows of some sequences.

    Args:
        total: [s, b, ...], changed in place.
        ranges: rows of `total`.
        values: [rows, sequences, ...], in the order of `ranges`.
        batch: sequences of `total`.
    """
    part = total[:, batch.slice()]
    if len(ranges) > FEW_RANGES:
        part.index_add_(0, _cached_index(ranges, total.device), values.to(total.dtype))
        return
    begin = 0
    for one in ranges:
        part[one.slice()].add_(values[begin : begin + one.size])
        begin += one.size


@lru_cache(maxsize=32)
def _order_index(order: tuple[ReceivedRows, ...], rows: int, device: torch.device) -> Tensor:
    """Return the places in [sources * rows] of some received rows."""
    return index_of([one.rows.shifted(one.source * rows) for one in order], device)


def take_in_order(x: Tensor, order: tuple[ReceivedRows, ...], out: Tensor | None = None) -> Tensor:
    """Return rows of several sources, [sources, rows, ...], in another order, [sources * rows, ...].

    Args:
        x: [sources, rows, ...].
        order: ranges of rows of the sources, in the order of the result.
        out: tensor to write to, of the result's shape; None: a new one.
    """
    if len(order) <= FEW_PARTS:
        return torch.cat([x[source, rows.slice()] for source, rows in order], out=out)
    return torch.index_select(x.flatten(0, 1), 0, _order_index(order, x.shape[1], x.device), out=out)


def put_in_order(x: Tensor, order: tuple[ReceivedRows, ...], values: Tensor) -> None:
    """Write [sources * rows, ...] to the rows of their sources, [sources, rows, ...].

    Args:
        x: [sources, rows, ...], changed in place.
        order: as in `take_in_order`.
        values: [sources * rows, ...]; converted to the type of `x`.
    """
    if len(order) > FEW_PARTS:
        x.flatten(0, 1).index_copy_(0, _order_index(order, x.shape[1], x.device), values.to(x.dtype))
        return
    begin = 0
    for source, rows in order:
        x[source, rows.slice()] = values[begin : begin + rows.size]
        begin += rows.size


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of [s, b, ...] tensors that a launch packs, as [rows, sequences, ...].

    Attributes:
        rows: the rows, if they are one range, in all sequences of `batch`.
        batch: sequences.
        index: otherwise the places of the rows in [s * b], int64, each of them once.
    """

    rows: TokenRange
    batch: TokenRange
    index: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """Return the rows of [s, b, ...], a view where they are one range; packed rows have batch size 1.

        Args:
            x: [s, b, ...].

        Returns:
            [rows, sequences, ...]; [rows, 1, ...] where the rows are no single range.
        """
        if self.index is None:
            return x[self.rows.slice(), self.batch.slice()]
        return x.flatten(0, 1).index_select(0, self.index).unsqueeze(1)

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write packed rows to their places.

        Args:
            x: [s, b, ...], changed in place.
            values: packed rows, in the shape that `take` returns.
        """
        if self.index is None:
            x[self.rows.slice(), self.batch.slice()] = values
        elif x.shape[1] == 1:
            x[:, 0].index_copy_(0, self.index, values[:, 0].to(x.dtype))
        else:
            x[self.places(x.shape[1])] = values[:, 0].to(x.dtype)

    def add(self, x: Tensor, values: Tensor) -> None:
        """Add packed rows to their places.

        Args:
            x: [s, b, ...], changed in place.
            values: packed rows, in the shape that `take` returns.
        """
        if self.index is None:
            x[self.rows.slice(), self.batch.slice()].add_(values)
        elif x.shape[1] == 1:
            x[:, 0].index_add_(0, self.index, values[:, 0].to(x.dtype))
        else:
            x.index_put_(self.places(x.shape[1]), values[:, 0].to(x.dtype), accumulate=True)

    def places(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the rows in dimensions s and b.

        Args:
            batch: sequences b of the tensor.

        Returns:
            Two tensors int64 [rows].
        """
        assert self.index is not None, "the rows are no range"
        return self.index // batch, self.index % batch

    def covers(self, x: Tensor) -> bool:
        """Return whether the rows are all of [s, b, ...], in order."""
        return self.index is None and (self.rows.size, self.batch.size) == tuple(x.shape[:2])


@dataclass(frozen=True, slots=True)
class PackedLaunch:
    """A launch with the rows that it packs.

    Attributes:
        launch: the launch.
        rows, keys: rows of queries and of keys.
        lengths: lengths of the packed blocks; None: the launch is one block.
    """

    launch: Launch
    rows: PackedRows
    keys: PackedRows
    lengths: PackedLengths | None

    @classmethod
    def of(cls, launch: Launch, batch: int, device: torch.device) -> "PackedLaunch":
        """Return the rows of a launch on tensors [s, batch, ...]; they are kept with the launch.

        Args:
            launch: the launch.
            batch: sequences b of the tensors.
            device: device of the indices.
        """
        key = ("packed", batch, device)
        if key not in launch.memo:
            launch.memo[key] = _pack(launch, batch, device)
        return launch.memo[key]  # type: ignore[no-any-return]

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of packed queries and keys.

        Args:
            kernel: computes the blocks.
            q, k, v: packed, in the shape that `PackedRows.take` returns.
            scale: factor of the scores.

        Returns:
            out and lse of the packed rows, see `Kernel`.
        """
        scores = Scores(scale, self.launch.causal, self.launch.window)
        if self.lengths is None:
            return kernel.forward(q, k, v, scores)
        return kernel.forward_packed(q, k, v, scores, self.lengths)

    def backward(self, kernel: Kernel, tensors: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) of packed grad_out, q, k, v, out and lse.

        Args:
            kernel: computes the blocks.
            tensors: packed grad_out, q, k, v, out and lse.
            scale: factor of the scores.

        Returns:
            dq, dk and dv, of the shapes of packed q, k and v.
        """
        scores = Scores(scale, self.launch.causal, self.launch.window)
        grad_out, q, k, v, out, lse = tensors
        if self.lengths is None:
            return kernel.backward(grad_out, q, k, v, out, lse, scores)
        return kernel.backward_packed(BackwardInputs(grad_out, q, k, v, out, lse), scores, self.lengths)

    def take_lse(self, lse: Tensor) -> Tensor:
        """Return the packed rows of log-sum-exps [b, h, s], as [sequences, h, rows]."""
        return self.rows.take(lse.permute(2, 0, 1)).permute(1, 2, 0)

    def put_lse(self, lse: Tensor, values: Tensor) -> None:
        """Write rows of log-sum-exps [b, h, s].

        Args:
            lse: [b, h, s], changed in place.
            values: packed rows, in the shape that `take_lse` returns.
        """
        if self.rows.index is None:
            lse[self.rows.batch.slice(), :, self.rows.rows.slice()] = values
            return
        row, sequence = self.rows.places(lse.shape[0])
        lse[sequence, :, row] = values[0].T.to(lse.dtype)

    def spread_keys(self, grads: Sequence[Tensor], batch: int) -> tuple[TokenRange, TokenRange, list[Tensor]]:
        """Return the gradients of packed keys on one range of keys, zero for keys that the launch does not see.

        Args:
            grads: gradients of packed keys, in the shape that `PackedRows.take` returns.
            batch: sequences b of the tensors.

        Returns:
            The sequences, the keys, and the gradients [keys, sequences, ...].
        """
        if self.keys.index is None:
            return self.keys.batch, self.keys.rows, list(grads)
        keys = self.keys.rows
        spread = [grad.new_zeros(keys.size * batch, *grad.shape[2:]) for grad in grads]
        index = self.keys.index - keys.begin * batch
        for x, grad in zip(spread, grads, strict=True):
            x.index_copy_(0, index, grad[:, 0])
        return TokenRange(0, batch), keys, [x.unflatten(0, (keys.size, batch)) for x in spread]


def _pack(launch: Launch, batch: int, device: torch.device) -> PackedLaunch:
    blocks = launch.blocks
    if len(blocks) == 1:
        (block,) = blocks
        return PackedLaunch(launch, PackedRows(block.rows, block.batch), PackedRows(block.keys, block.batch), None)
    sequences = [block.batch.begin for block in blocks]
    rows, keys = [block.rows for block in blocks], [block.keys for block in blocks]
    lengths = PackedLengths(tuple(one.size for one in rows), tuple(one.size for one in keys))
    return PackedLaunch(
        launch, _packed_rows(rows, sequences, batch, device), _packed_rows(keys, sequences, batch, device), lengths
    )


def _packed_rows(
    ranges: Sequence[TokenRange], sequences: Sequence[int], batch: int, device: torch.device
) -> PackedRows:
    span = TokenRange(min(one.begin for one in ranges), max(one.end for one in ranges))
    if batch == 1 and all(one.end == following.begin for one, following in pairwise(ranges)):
        return PackedRows(span, TokenRange(0, 1))
    rows = index_of(ranges, torch.device("cpu"))
    sizes = torch.tensor([one.size for one in ranges])
    index = rows * batch + torch.tensor(sequences).repeat_interleave(sizes)
    return PackedRows(span, TokenRange(0, batch), copy_to(index, device))
