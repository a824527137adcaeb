"""The split backward: bitwise upstream's gradients, no weight product in B, all of them in W."""

from collections import Counter

import pytest

from tests.pool import RankPool
from tests.unit import weight_bed
from tests.unit.weight_bed import Case

FULL = (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1))
CASES = {
    "one rank": Case(),
    "bf16": Case(bf16=True),
    "biases": Case(bias=True),
    "tied": Case(tied=True),
    "last stage, tied": Case(tail=True, tied=True),
    "gated": Case(config=(("gated_linear_unit", True), ("normalization", "RMSNorm"))),
    "full recompute": Case(config=FULL),
    "late weights": Case(order="B0 B1 B2 W0 W1 W2"),
    "TP": Case(tp=2),
    "TP, biases, bf16": Case(tp=2, bias=True, bf16=True),
    "TP, last stage": Case(tp=2, tail=True),
    "TP + SP": Case(tp=2, sequence_parallel=True),
    "TP + SP, last stage, biases": Case(tp=2, sequence_parallel=True, tail=True, bias=True),
    "TP + SP, full recompute": Case(tp=2, sequence_parallel=True, config=FULL),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_bitwise_upstreams(ranks: RankPool, name: str) -> None:
    case = CASES[name]
    assert ranks.run(case.tp, weight_bed.differing, case) == [[]] * case.tp


@pytest.mark.parametrize("name", ["one rank", "full recompute", "TP + SP, last stage, biases"])
def test_no_weight_product_in_b_and_all_of_them_in_w(ranks: RankPool, name: str) -> None:
    case = CASES[name]
    for count in ranks.run(case.tp, weight_bed.counted, case):
        assert count["W"] == count["weights"]
        assert count["W"].total() == count["linears"] == 9  # 4 of each of 2 layers, and the head
        assert count["fused"] == count["B"] + count["W"]
        assert count["held"] > 0
        assert count["left"] == 0
