"""This rank's shards as pieces of whole tensors in a checkpoint, so that no rank builds a whole tensor.

A shard is a range of a flattened parameter. Cut into boxes, it has a place in the tensor that upstream's checkpoints
hold: at most 2 d - 1 boxes for d dimensions. The format stays upstream's, which stores boxes of any size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory
from torch import Tensor

Place = tuple[tuple[int, ...], tuple[int, ...]]  # offset and size of a box


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Place]:
    """Cut a range of a flattened tensor into boxes, in the order of elements.

    Args:
        shape: of the tensor.
        start, stop: first element of the range, and one after its last.

    Yields:
        Offset and size of each box.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    rest = shape[1:]
    row = math.prod(rest)
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # the range lies inside one row
        yield from _in_row(rest, last, start - last * row, stop - last * row)
        return
    yield from _in_row(rest, first - 1, start - (first - 1) * row, row if start < first * row else 0)
    if first < last:
        yield (first, *(0 for _ in rest)), (last - first, *rest)
    yield from _in_row(rest, last, 0, stop - last * row)


def _in_row(rest: Sequence[int], number: int, start: int, stop: int) -> Iterator[Place]:
    for offset, size in boxes(rest, start, stop):
        yield (number, *offset), (1, *size)


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor in a checkpoint.

    Attributes:
        whole: what upstream saves: the tensor of a model-parallel rank, or one of those that it is split into.
        offset, size: of the box in the whole tensor.
        span: elements of the rank's parameter, flattened, that the box holds.
    """

    whole: ShardedTensor
    offset: tuple[int, ...]
    size: tuple[int, ...]
    span: range


def cut_into_pieces(base: ShardedBase, span: range) -> list[Piece] | None:
    """Return where elements of a parameter are in a checkpoint.

    Args:
        base: upstream's description of the parameter: a sharded tensor, or a factory that splits it.
        span: elements of the rank's parameter, flattened.

    Returns:
        Pieces in the order of elements. None if upstream splits the parameter in a way that leaves no ranges whole.
    """
    pieces = []
    leaves = _leaves(base)
    if leaves is None:
        return None
    for leaf, first in leaves:
        inside = range(max(span.start, first), min(span.stop, first + math.prod(leaf.local_shape)))
        at = inside.start
        for offset, size in boxes(leaf.local_shape, inside.start - first, inside.stop - first):
            ones = leaf.prepend_axis_num
            local = (*(0 for _ in range(ones)), *offset)
            place = tuple(there + here for there, here in zip(leaf.global_offset, local, strict=True))
            pieces.append(Piece(leaf, place, (*(1 for _ in range(ones)), *size), range(at, at + math.prod(size))))
            at += math.prod(size)
    return pieces if sum(len(piece.span) for piece in pieces) == len(span) else None


def _leaves(base: ShardedBase) -> list[tuple[ShardedTensor, int]] | None:
    """Return the sharded tensors of a parameter, each with the number of its first element in the parameter."""
    if isinstance(base, ShardedTensor):
        return [(base, 0)]
    if not isinstance(base, ShardedTensorFactory):
        return None
    image = torch.empty(base.data.shape, dtype=base.data.dtype, device="meta")  # the factory makes views of it
    leaves = []
    for leaf in nested_values(replace(base, data=image).build()):
        if not isinstance(leaf, ShardedTensor) or leaf.data is None or not leaf.data.is_contiguous():
            return None
        leaves.append((leaf, leaf.data.storage_offset()))
    return sorted(leaves, key=lambda pair: pair[1])


def sharded_pieces(
    pieces: Sequence[Piece], key_prefix: str, flat: Tensor, first: int, replica_id: Any
) -> dict[str, ShardedTensor]:
    """Describe pieces to upstream.

    Args:
        pieces: of a parameter, see `cut_into_pieces`.
        key_prefix: goes before the names of the whole tensors.
        flat: elements of the rank's parameter, or of one of its optimizer states.
        first: number of the first of them in the flattened parameter.
        replica_id: (pipeline, tensor, copy): which copy of the pieces this rank has.

    Returns:
        Sharded tensors, whose data are views of `flat`, in the order of elements.
    """
    return {
        f"{number:03d}": ShardedTensor(
            key=f"{key_prefix}{piece.whole.key}",
            data=flat[piece.span.start - first : piece.span.stop - first].view(piece.size),
            dtype=flat.dtype,
            local_shape=piece.size,
            global_shape=tuple(piece.whole.global_shape),
            global_offset=piece.offset,
            axis_fragmentations=None,  # the boxes form no regular grid
            replica_id=replica_id,
            prepend_axis_num=0,
            allow_shape_mismatch=piece.whole.allow_shape_mismatch,
        )
        for number, piece in enumerate(pieces)
    }


def joined(loaded: dict[str, Tensor]) -> Tensor:
    """Return loaded pieces as one flat tensor, in the order of elements.

    Args:
        loaded: pieces by their numbers as text, which sort in the order of elements.

    Returns:
        1-D, the elements of the shard.
    """
    return torch.cat([loaded[number].reshape(-1) for number in sorted(loaded)])
