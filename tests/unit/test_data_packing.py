"""Packing by lengths keeps documents whole, and is first fit over the open packs."""

from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.data.packing import OPEN, pack_in_order


@given(st.lists(st.integers(1, 40), max_size=300), st.integers(1, 32))
def test_packs_are_those_of_first_fit(lengths: list[int], capacity: int) -> None:
    packs = pack_in_order(lengths, capacity)
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)
    for pack in packs:
        assert sum(lengths[number] for number in pack) <= capacity or len(pack) == 1
    where = {number: index for index, pack in enumerate(packs) for number in pack}
    for number, length in enumerate(lengths):
        starts = [pack for pack in packs if pack[0] < number]
        for index in range(max(0, len(starts) - OPEN), where[number]):
            filled = sum(lengths[other] for other in packs[index] if other < number)
            assert filled + length > capacity, "an earlier open pack had room"
