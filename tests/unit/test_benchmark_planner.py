"""The benchmark of measured plans: its figures, and the counter of live bytes."""

import gc

import pytest
import torch

from megatron.longseq.planner.plan.flags import read
from megatron.longseq.planner.plan.step import predict
from megatron.longseq.planner.tools.predict_command import flags_of
from tests.benchmarks.planner_measured import MODEL, PLANS, MeasuredPlan, counting, summary, table


def row(plan: str, measured: float, predicted: float, counted: int = 100, ranks: int = 2) -> MeasuredPlan:
    return MeasuredPlan(ranks, plan, predicted, 110.0, [measured, 1.1 * measured, measured], counted)


def test_a_prediction_that_is_wrong_by_one_factor_has_right_ratios() -> None:
    found = summary([row("a", 1.0, 3.0), row("b", 2.0, 6.0), row("c", 4.0, 12.0)])
    assert found["ratio_error_worst"] == pytest.approx(0.0)
    assert found["rank_correlation"] == 1.0
    assert found["regret"] == 0.0
    assert found["bytes_error_mean"] == pytest.approx(0.1)
    assert found["spread"] == pytest.approx(0.1)


def test_a_wrong_order_is_seen() -> None:
    rows = [row("a", 1.0, 2.0), row("b", 2.0, 1.0), row("c", 8.0, 8.0, ranks=4)]
    found = summary(rows[:2])
    assert found["rank_correlation"] == -1.0
    assert found["regret"] == 1.0
    assert found["ratio_error_mean"] == pytest.approx(1.0)
    assert "| 2 | b | 2.000 | 10% | 1.000 | 1.41 | 0.71 |" in table(rows)


def test_live_bytes_are_those_of_storages() -> None:
    with counting() as counter:
        kept = torch.zeros(1000)
        view = kept[10:].view(-1)
        (torch.ones(5000) + 1).sum()
        gc.collect()
        assert counter.live == pytest.approx(4000, abs=64)
        assert counter.peak == pytest.approx(4000 + 2 * 20000, abs=64)
        counter.restart()
        kept.untyped_storage().resize_(0)
        assert counter.live < 64 and counter.peak >= 4000
        del kept, view
    assert counter.live < 64


def test_memory_that_storages_swap_counts_once() -> None:
    """Pooled buffers of sharded parameters: a bucket without memory takes that of a buffer, and gives it back."""
    with counting() as counter:
        lender, bucket = torch.zeros(1000), torch.zeros(1000)
        bucket.untyped_storage().resize_(0)
        for holder in (bucket, lender):
            bucket.untyped_storage()._swap_data_ptr_(lender.untyped_storage())
            holder.view(-1).fill_(1)
            assert counter.live == pytest.approx(4000, abs=64)
    assert bucket.untyped_storage().nbytes() == 0 and lender.sum() == 1000


@pytest.mark.parametrize("ranks", PLANS)
def test_every_plan_is_valid(ranks: int) -> None:
    for name, words in PLANS[ranks].items():
        found = predict(*read({**flags_of([*MODEL.split(), *words.split()]), "cluster": f"a100-{ranks}"}))
        assert not found.reasons, name
