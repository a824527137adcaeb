"""Sums of the gradients of keys and values that several blocks, and several ranks of a ring, contribute to."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import accumulation_dtype
from megatron.longseq.attention.plan.ranges import RowFinder, TokenRange, TokenRanges, intersection, rows_of, size
from megatron.longseq.attention.runtime.packing import add_rows, take_rows

KV = tuple[Tensor, Tensor]  # keys and values [rows, b, hk, d], contiguous, or the gradients of both
Received = tuple[KV, TokenRanges]  # keys or gradients from another rank, and their rows in the source's buffer


def empty_kv(like: Tensor, rows: int, dtype: torch.dtype) -> KV:
    """Return uninitialised keys and values of some rows.

    Args:
        like: keys or values [n, b, hk, d]; gives the last dimensions and the device.
        rows: number of rows.
        dtype: type of the new tensors.

    Returns:
        Two tensors [rows, b, hk, d].
    """
    first, second = (like.new_empty(rows, *like.shape[1:], dtype=dtype) for _ in range(2))
    return first, second


class GradAccumulator:
    """Sum of the gradients of some rows of a source's keys and values, in the accumulation dtype.

    Args:
        like: keys [..., b, hk, d]; gives shape, type and device.
        grad_rows: rows of the source that are summed.
        kv_rows: rows of the source through which the blocks count keys.
    """

    def __init__(self, like: Tensor, grad_rows: TokenRanges, kv_rows: TokenRanges) -> None:
        self._like, self._grad_rows, self._kv_rows = like, grad_rows, kv_rows
        self._total = size(grad_rows)
        self._sum: KV | None = None

    def add(self, batch: TokenRange, keys: TokenRange, dk: Tensor, dv: Tensor) -> None:
        """Add the gradients of some blocks. The tensors may become the sum and change later.

        Args:
            batch: sequences.
            keys: keys of the blocks, counted through `kv_rows`.
            dk, dv: [keys, sequences, hk, d]; zero for keys that are not summed, which no block sees.
        """
        summed, rows = self._summed_rows(keys)
        whole = batch == TokenRange(0, self._like.shape[1]) and rows == (TokenRange(0, self._total),)
        if self._sum is None and summed is None and whole:
            dtype = accumulation_dtype(self._like.dtype)
            self._sum = dk.to(dtype).contiguous(), dv.to(dtype).contiguous()
            return
        for total, grad in zip(self.result(), (dk, dv), strict=True):
            add_rows(total, rows, grad if summed is None else take_rows(grad, summed), batch)

    def add_received(self, sums: Iterable[Received]) -> None:
        """Add what other ranks have summed."""
        for kv, rows in sums:
            for total, received in zip(self.result(), kv, strict=True):
                add_rows(total, rows_of(self._grad_rows, rows), received, TokenRange(0, total.shape[1]))

    def result(self) -> KV:
        """Return the sums of dk and dv, zeros if nothing was added."""
        if self._sum is None:
            first, second = empty_kv(self._like, self._total, accumulation_dtype(self._like.dtype))
            self._sum = first.zero_(), second.zero_()
        return self._sum

    def _summed_rows(self, keys: TokenRange) -> tuple[TokenRanges | None, TokenRanges]:
        """Return which of a range of `kv_rows` are summed (None: all of them), and their places in `grad_rows`."""
        if self._kv_rows == self._grad_rows:
            return None, (keys,)
        positions = RowFinder(self._kv_rows).positions(keys)
        common = intersection(positions, self._grad_rows)
        return None if common == positions else rows_of(positions, common), rows_of(self._grad_rows, common)
