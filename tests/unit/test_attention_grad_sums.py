"""Sums of the gradients of keys: every gradient is added to its own row, whatever rows a block happens to have."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron.longseq.attention.plan.ranges import TokenRange, TokenRanges, union
from megatron.longseq.attention.runtime.grad_sums import GradAccumulator

ROWS = 6


def ranges(numbers: set[int]) -> TokenRanges:
    return union(TokenRange(number, number + 1) for number in sorted(numbers))


@settings(max_examples=200)
@given(st.data())
def test_equals_adding_row_by_row(data: st.DataObject) -> None:
    rows = st.sets(st.integers(0, ROWS - 1), min_size=1)
    held, summed = sorted(data.draw(rows)), data.draw(rows)
    like = torch.zeros(len(held), 2, 1, 3, dtype=torch.float64)
    sums = GradAccumulator(like, ranges(summed), ranges(set(held)))
    expected = torch.zeros(2, ROWS, 2, 1, 3, dtype=torch.float64)
    for number in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(held) - 1))
        keys = TokenRange(begin, data.draw(st.integers(begin + 1, len(held))))
        batch = data.draw(st.sampled_from([TokenRange(0, 2), TokenRange(0, 1), TokenRange(1, 2)]))
        grads = torch.rand(2, keys.size, batch.size, 1, 3, dtype=torch.float64)
        places = held[keys.slice()]
        assume(summed.intersection(places))  # a block has keys that its queries see
        for at, place in enumerate(places):
            if place not in summed:
                grads[:, at] = 0  # no block sees this key
        expected[:, places, batch.slice()] += grads
        if number % 2:
            own = [at for at, place in enumerate(places) if place in summed]
            arrived = torch.rand(2, len(own), 2, 1, 3, dtype=torch.float64)
            expected[:, [places[at] for at in own]] += arrived
            sums.add_received([((arrived[0], arrived[1]), ranges({places[at] for at in own}))])
        sums.add(batch, keys, grads[0].clone(), grads[1].clone())
    assert torch.allclose(torch.stack(sums.result()), expected[:, sorted(summed)], rtol=0, atol=1e-12)
