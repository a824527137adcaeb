"""The split backward gives bitwise upstream's gradients, and computes all weight products in W."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

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
    "selective recompute": Case(
        tp=2,
        sequence_parallel=True,
        config=(
            ("recompute_granularity", "selective"),
            ("recompute_modules", ["core_attn", "mlp"]),
            ("normalization", "RMSNorm"),
        ),
    ),
    "late weights": Case(order="B0 B1 B2 W0 W1 W2"),
    "TP": Case(tp=2),
    "TP, biases, bf16": Case(tp=2, bias=True, bf16=True),
    "TP, last stage": Case(tp=2, tail=True),
    "TP + SP": Case(tp=2, sequence_parallel=True),
    "TP + SP, last stage, biases": Case(tp=2, sequence_parallel=True, tail=True, bias=True),
    "TP + SP, full recompute": Case(tp=2, sequence_parallel=True, config=FULL),
}


# Each has neighbours with the same and more; -m slow runs them.
SLOW = {
    "biases",  # TP, biases, bf16
    "TP",  # TP, biases, bf16; TP, last stage
    "TP + SP",  # TP + SP, last stage, biases; TP + SP, full recompute
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
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


def _ddp(**options) -> tuple[tuple[str, object], ...]:
    return tuple({"grad_reduce_in_fp32": True, "bucket_size": 3000, **options}.items())


PARALLEL = {
    "no overlap": Case(ddp=_ddp(), bf16=True),
    "overlap": Case(ddp=_ddp(overlap_grad_reduce=True), bf16=True),
    "overlap, sums in bf16": Case(ddp=_ddp(overlap_grad_reduce=True, grad_reduce_in_fp32=False), bf16=True),
    "distributed optimizer": Case(ddp=_ddp(use_distributed_optimizer=True)),
    "distributed optimizer, overlap": Case(ddp=_ddp(use_distributed_optimizer=True, overlap_grad_reduce=True)),
    "overlap, tied": Case(ddp=_ddp(overlap_grad_reduce=True), tied=True),
}


def _parallel() -> list[Any]:
    """Reduce after a step by default, and with "overlap" during backward from the first step on."""
    slow = {name: [pytest.mark.slow] * (name != "overlap") for name in PARALLEL}
    return [pytest.param(name, "fused") for name in PARALLEL] + [
        pytest.param(name, "same", marks=slow[name]) for name in PARALLEL
    ]


@pytest.mark.parametrize(("name", "first"), _parallel())
def test_data_parallel_gradients_are_bitwise_upstreams(ranks: RankPool, name: str, first: str) -> None:
    """Three steps run, because upstream's wrapper learns in the first one which gradients to expect."""
    assert ranks.run(2, weight_bed.differing, replace(PARALLEL[name], first=first), 3) == [[], []]


def test_buckets_are_reduced_while_weight_gradients_are_computed(ranks: RankPool) -> None:
    """A bucket of norms alone before the first product, the others as soon as their last one is computed."""
    case = replace(PARALLEL["overlap"], ddp=_ddp(overlap_grad_reduce=True, bucket_size=1))
    for steps in ranks.run(2, weight_bed.reductions, case):
        for events in steps:
            assert events.count("product") == 27 and events.count("reduction") > 9
            assert events.index("reduction") == 18, "before the first product of the last of three micro-batches"
            last = events[events.index("product", 18) :]
            assert last == ["product", "reduction"] * 9


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_fused_kernel_accumulates_where_upstream_lets_it(ranks: RankPool, name: str) -> None:
    options = {"fp32": _ddp(), "bf16": _ddp(grad_reduce_in_fp32=False)}[name]
    assert ranks.run(1, weight_bed.differing, Case(fused=True, bf16=True, ddp=options), 2) == [[]]


def test_a_weight_used_twice_is_summed_first_as_autograd_does(ranks: RankPool) -> None:
    assert ranks.run(1, weight_bed.used_twice) == [True]


def test_what_cannot_be_split_is_left_or_refused_and_nothing_is_renamed(ranks: RankPool) -> None:
    assert ranks.run(1, weight_bed.attaching) == [None]


@pytest.mark.parametrize("job", [weight_bed.store_keeping, weight_bed.changed_tensors])
def test_a_store_knows_its_units(ranks: RankPool, job) -> None:
    assert ranks.run(1, job) == [None]


def test_our_split_keeps_less_than_torchs(ranks: RankPool, tell: Callable[[str], None]) -> None:
    """`torch.distributed.pipelining` keeps the graph, and computes every product of upstream's linear layers twice."""
    (found,) = ranks.run(1, weight_bed.splits)
    ours, torchs = found["ours"], found["torch, plain"]
    assert {split.gradients for split in found.values()} == {ours.gradients}, "bit by bit"
    assert ours.products == torchs.products and found["torch"].products == (sum(ours.products),) * 2
    assert ours.between < ours.after_forward < torchs.between
    for name, split in found.items():
        kept = f"{split.between:,} bytes between the parts, {split.between / split.after_forward:.2f} of the forward's"
        tell(f"split by {name}: {split.products} products, {kept}")
