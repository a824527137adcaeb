"""Packed blocks as a few batches of padded blocks, for kernels that take batches of one shape.

Blocks of similar lengths make a batch. A shorter block is filled up behind its last row and its last key. A causal mask
hides these keys from the block's own rows if all blocks of the batch have as many more keys than rows; otherwise the
batch has a mask of its own. Results of rows that fill up are dropped.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import BackwardInputs, PackedLengths, Scores, copy_to

LAUNCH_COST = 1 << 13  # scores whose computation takes about as long as one more launch
LAUNCH_SHARE = 64  # a launch must save this part of all scores, too, so that there are a few launches for any lengths
STEPS = 4  # lengths are told apart in steps of a quarter of an octave
BATCH_ROWS = 1 << 15  # rows and keys of a batch of several blocks; bounds the memory of its padded copies
MASK_ELEMENTS = 1 << 24  # elements of a mask that differs from block to block


class _Side(NamedTuple):
    """Queries or keys of a batch.

    Attributes:
        length: of the longest block.
        begin: first packed row of the first block.
        index: packed row of every place, int64 [count * length]; of a place that fills up, that of the block's first.
        places: places that do not fill up, int64; None: all.
    """

    length: int
    begin: int
    index: Tensor
    places: Tensor | None


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Blocks of similar lengths.

    Attributes:
        count: number of blocks.
        rows, keys: their queries and keys.
        hidden: bool, broadcast to [count, rows, keys], True where a key is not seen. None: the mask is that of
            `Scores`, aligned for the batch's lengths.
    """

    count: int
    rows: _Side
    keys: _Side
    hidden: Tensor | None

    def take(self, packed: Tensor, side: _Side) -> Tensor:
        """Return [length, count, ...] of packed [total, 1, ...]; a view if the batch is one block.

        Args:
            packed: [total, 1, ...].
            side: `rows` for tensors of queries, `keys` for tensors of keys.
        """
        if self.count == 1:
            return packed.narrow(0, side.begin, side.length)
        return packed[:, 0].index_select(0, side.index).unflatten(0, (self.count, side.length)).transpose(0, 1)

    def put(self, packed: Tensor, padded: Tensor, side: _Side) -> None:
        """Write [length, count, ...] into packed [total, 1, ...], except for the places that fill up.

        Args:
            packed: [total, 1, ...], changed in place.
            padded: [length, count, ...].
            side: `rows` for tensors of queries, `keys` for tensors of keys.
        """
        if self.count == 1:
            packed.narrow(0, side.begin, side.length).copy_(padded)
            return
        values, index = padded.transpose(0, 1).flatten(0, 1), side.index
        if side.places is not None:
            values, index = values.index_select(0, side.places), index.index_select(0, side.places)
        packed[:, 0].index_copy_(0, index, values)

    def take_lse(self, packed: Tensor) -> Tensor:
        """Return [count, h, rows] of packed log-sum-exps [1, h, total]."""
        return self.take(packed.permute(2, 0, 1), self.rows).permute(1, 2, 0)

    def put_lse(self, packed: Tensor, padded: Tensor) -> None:
        """Write [count, h, rows] into packed log-sum-exps [1, h, total]."""
        self.put(packed.permute(2, 0, 1), padded.permute(2, 0, 1), self.rows)

    def take_gradient(self, packed: Tensor) -> Tensor:
        """Return the gradient of the batch's outputs, zero in places that fill up.

        Args:
            packed: gradient [total, 1, h, d].

        Returns:
            Gradient [rows, count, h, d].
        """
        values = self.take(packed, self.rows)
        if self.rows.places is None:
            return values
        kept = values.new_zeros(self.count * self.rows.length).index_fill_(0, self.rows.places, 1)
        return values * kept.view(self.count, -1).T[..., None, None]


class PaddedKernel(ABC):
    """A kernel that computes packed blocks by batches of blocks of one shape [s, b, h, d].

    Attributes:
        most_scores: scores of a batch of several blocks and one head, at most.
    """

    __slots__ = ()
    most_scores: int

    @abstractmethod
    def forward_padded(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of a batch of blocks of one shape.

        Args:
            q, k, v: [s, blocks, h, d], see `Kernel`.
            scores: scale and mask.
            hidden: see `PaddedBatch`.

        Returns:
            out [sq, blocks, hq, dv] and lse [blocks, hq, sq].
        """

    @abstractmethod
    def backward_padded(
        self, inputs: BackwardInputs, scores: Scores, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) of a batch of blocks of one shape.

        Args:
            inputs: tensors [s, blocks, h, d], and lse [blocks, hq, sq].
            scores: scale and mask.
            hidden: see `PaddedBatch`.

        Returns:
            dq, dk and dv, of the shapes of q, k and v.
        """

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, lengths: PackedLengths
    ) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of packed blocks, see `Kernel.forward_packed`."""
        out, lse = None, None
        for batch in padded_batches(lengths, scores, q.device, self.most_scores):
            tensors = batch.take(q, batch.rows), batch.take(k, batch.keys), batch.take(v, batch.keys)
            block_out, block_lse = self.forward_padded(*tensors, scores, batch.hidden)
            if out is None or lse is None:
                out = block_out.new_empty(q.shape[0], 1, *block_out.shape[2:])
                lse = block_lse.new_empty(1, block_lse.shape[1], q.shape[0])
            batch.put(out, block_out, batch.rows)
            batch.put_lse(lse, block_lse)
        assert out is not None and lse is not None, "there is at least one block"
        return out, lse

    def backward_packed(
        self, inputs: BackwardInputs, scores: Scores, lengths: PackedLengths
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) of packed blocks, see `Kernel.backward_packed`."""
        dq, dk, dv = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (inputs.q, inputs.k, inputs.v)
        )
        for batch in padded_batches(lengths, scores, inputs.q.device, self.most_scores):
            block = BackwardInputs(
                batch.take_gradient(inputs.grad_out),
                batch.take(inputs.q, batch.rows),
                batch.take(inputs.k, batch.keys),
                batch.take(inputs.v, batch.keys),
                batch.take(inputs.out, batch.rows),
                batch.take_lse(inputs.lse),
            )
            grads = self.backward_padded(block, scores, batch.hidden)
            for total, grad, side in zip((dq, dk, dv), grads, (batch.rows, batch.keys, batch.keys), strict=True):
                batch.put(total, grad, side)
        return dq, dk, dv


def padded_batches(lengths: PackedLengths, scores: Scores, device: torch.device, most: int) -> tuple[PaddedBatch, ...]:
    """Return the batches that compute packed blocks; they are kept with the lengths.

    Args:
        lengths: lengths of the blocks.
        scores: mask of the blocks.
        device: device of the indices.
        most: scores of a batch of several blocks and one head.
    """
    key = ("padded", scores.causal, scores.window, device, most)
    if key not in lengths.memo:
        rows, keys = torch.tensor(lengths.rows), torch.tensor(lengths.keys)
        begins = rows.cumsum(0) - rows, keys.cumsum(0) - keys
        made = []
        for blocks in _groups(lengths, scores, most):
            sides = [_side(one[blocks], begin[blocks]) for one, begin in zip((rows, keys), begins, strict=True)]
            hidden = _hidden(rows[blocks], keys[blocks], scores)
            made.append(PaddedBatch(len(blocks), *(_to(side, device) for side in sides), _to_device(hidden, device)))
        lengths.memo[key] = tuple(made)
    return lengths.memo[key]  # type: ignore[no-any-return]


def _side(sizes: Tensor, begins: Tensor) -> _Side:
    """Return the queries or keys of some blocks."""
    length = int(sizes.max())
    place = torch.arange(length)
    is_filled = place >= sizes[:, None]
    index = begins[:, None] + place.masked_fill(is_filled, 0)
    places = None if not is_filled.any() else torch.nonzero(~is_filled.flatten())[:, 0]
    return _Side(length, int(begins[0]), index.flatten(), places)


def _to(side: _Side, device: torch.device) -> _Side:
    return side._replace(index=copy_to(side.index, device), places=_to_device(side.places, device))


def _to_device(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else copy_to(x, device)


def _hidden(rows: Tensor, keys: Tensor, scores: Scores) -> Tensor | None:
    """Return `PaddedBatch.hidden` of blocks of some lengths."""
    if scores.causal or bool((keys == keys[0]).all() & ((rows == rows[0]).all() | (scores.window is None))):
        return None
    key = torch.arange(int(keys.max()))
    hidden = key >= keys[:, None, None]
    if scores.window is not None:
        row = torch.arange(int(rows.max()))[:, None]
        hidden = hidden | (key < row + (keys - rows - scores.window)[:, None, None])
    return hidden


class _Lengths(NamedTuple):
    """Blocks of nearly the same lengths."""

    rows: int
    keys: int
    blocks: list[int]


def _groups(lengths: PackedLengths, scores: Scores, most: int) -> Iterator[list[int]]:
    """Yield the blocks of every batch, chosen so that padding and launches cost least together."""
    alike: dict[int, dict[tuple[int, int], _Lengths]] = {}
    for block, (rows, keys) in enumerate(zip(lengths.rows, lengths.keys, strict=True)):
        offset = keys - rows if scores.causal else 0
        step = round(STEPS * math.log2(keys)), round(STEPS * math.log2(rows))
        kept = alike.setdefault(offset, {}).get(step, _Lengths(0, 0, []))
        kept.blocks.append(block)
        alike[offset][step] = _Lengths(max(kept.rows, rows), max(kept.keys, keys), kept.blocks)
    for by_step in alike.values():
        for rows, keys, blocks in _cheapest([by_step[step] for step in sorted(by_step)]):
            area = most if scores.causal or scores.window is None else min(most, MASK_ELEMENTS)
            count = max(1, min(BATCH_ROWS // max(rows, keys), area // (rows * keys)))
            for begin in range(0, len(blocks), count):
                yield blocks[begin : begin + count]


def _cheapest(kinds: Sequence[_Lengths]) -> Iterator[_Lengths]:
    """Join neighbours of a list so that scores, padding included, and launches cost least together."""
    launch = max(LAUNCH_COST, sum(len(kind.blocks) * kind.rows * kind.keys for kind in kinds) // LAUNCH_SHARE)
    cost, begins = [0], [0]  # least cost of the first kinds, and where their last group begins
    for end in range(1, len(kinds) + 1):
        rows = keys = count = 0
        choices = []
        for begin in range(end - 1, -1, -1):
            rows, keys = max(rows, kinds[begin].rows), max(keys, kinds[begin].keys)
            count += len(kinds[begin].blocks)
            choices.append((cost[begin] + count * rows * keys + launch, begin))
        least, begin = min(choices)
        cost.append(least)
        begins.append(begin)
    end = len(kinds)
    while end:
        group = kinds[begins[end] : end]
        blocks = sorted(block for kind in group for block in kind.blocks)
        yield _Lengths(max(kind.rows for kind in group), max(kind.keys for kind in group), blocks)
        end = begins[end]
