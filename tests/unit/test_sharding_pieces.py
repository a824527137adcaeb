"""Shards of flattened parameters are cut into boxes of whole tensors, in order and without gaps."""

import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron.longseq.sharding.runtime.pieces import boxes, cut_into_pieces, joined, sharded_pieces


@given(st.lists(st.integers(1, 6), max_size=4), st.data())
def test_boxes_hold_the_range_in_order(shape: list[int], data: st.DataObject) -> None:
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    numbers = numpy.arange(total).reshape(shape)
    found = [
        numbers[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].reshape(-1)
        for offset, size in boxes(shape, start, stop)
    ]
    assert [number for box in found for number in box] == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def halves(key: str, data: torch.Tensor, replica: object, flattened: object) -> list[ShardedTensor]:
    """Split a gated layer's weight as upstream does: two tensors of one name, each on two tensor-parallel ranks."""
    first, second = data.chunk(2)
    return [
        ShardedTensor.from_rank_offsets(key, first, (0, 3, 5), (1, 1, 4), replica_id=replica, prepend_axis_num=1),
        ShardedTensor.from_rank_offsets(key, second, (0, 3, 5), (1, 3, 4), replica_id=replica, prepend_axis_num=1),
    ]


@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_pieces_of_all_ranks_make_up_what_upstream_saves(ranks: int) -> None:
    """The oracle is upstream's own description of the whole parameter."""
    param = torch.arange(8 * 5.0).view(8, 5)
    plain = ShardedTensor.from_rank_offsets("w", param, (0, 2, 3), replica_id=(0, 1, 2), prepend_axis_num=0)
    split = ShardedTensorFactory("w", param, halves, torch.cat, (0, 1, 2))
    for base, upstreams in ((plain, [plain]), (split, split.build())):
        expected, got = numpy.full((2, *upstreams[0].global_shape), -1.0)
        for whole in upstreams:
            expected[whole.global_slice()] = whole.data
        for rank in range(ranks):
            span = range(rank * 40 // ranks, (rank + 1) * 40 // ranks)
            cut = cut_into_pieces(base, span)
            assert cut is not None
            flat = param.view(-1)[span.start : span.stop]
            described = sharded_pieces(cut, "state.", flat, span.start, (0, 1, 0))
            for piece in described.values():
                assert piece.key == "state.w" and piece.data is not None and not piece.has_regular_grid
                assert (got[piece.global_slice()] == -1).all()  # no overlap
                got[piece.global_slice()] = piece.data
            assert joined({name: piece.data for name, piece in described.items()}).equal(flat)  # type: ignore[misc]
        assert (got == expected).all()


def test_a_parameter_split_along_another_dimension_is_left_to_upstream() -> None:
    param = torch.zeros(4, 6)
    base = ShardedTensorFactory(
        "w",
        param,
        lambda key, data, *rest: [ShardedTensor.from_rank_offsets(key, half) for half in data.chunk(2, 1)],
        lambda loaded: torch.cat(loaded, 1),
    )
    assert cut_into_pieces(base, range(3, 9)) is None
