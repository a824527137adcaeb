"""The measured benchmark of FlexSP: whose turn a step is, and what its lines say."""

from pathlib import Path

import pytest

from tests.benchmarks.flexsp_measured import LONGEST, ArmTimes, arms_of, measure, place, reachable, reason, rows_of
from tests.pool import RankPool


@pytest.mark.slow
def test_plans_train_in_turn(ranks: RankPool, tmp_path: Path) -> None:
    arms = measure(ranks, tmp_path, 2, 2, 1)
    assert [arm.name for arm in arms] == ["flexible", "sorted", "static 2"]
    assert all(len(arm.measured) == len(arm.predicted) == 1 for arm in arms)
    # Only groups of one rank save messages, and only plans with several degrees have them beside others.
    assert arms[0].predicted[0] <= min(arm.predicted[0] for arm in arms[1:])


def test_every_round_has_every_kind_of_plan_in_another_order() -> None:
    rounds = [[place(step, 3) for step in range(3 * number, 3 * number + 3)] for number in range(3)]
    assert [{number for number, _ in one} for one in rounds] == [{0}, {1}, {2}]
    assert all(sorted(arm for _, arm in one) == [0, 1, 2] for one in rounds)
    assert sorted(one[0][1] for one in rounds) == [0, 1, 2]


def test_static_degrees_hold_the_longest_document() -> None:
    assert list(arms_of(4, LONGEST // 2)) == ["flexible", "sorted", "static 2", "static 4"]
    assert list(arms_of(4, LONGEST // 4)) == ["flexible", "sorted", "static 4"]


def test_ratios_are_those_of_rounds() -> None:
    """A machine that slows down during the run does not change a ratio."""
    slower = [1.0, 2.0, 4.0, 8.0]
    parts = [[0.5, 0.25, 0.0, 0.25, 0.0]] * 4

    def arm(name: str, factor: float) -> ArmTimes:
        return ArmTimes(name, [factor * one for one in slower], [factor] * 4, [0.8] * 4, parts)

    arms = [arm("flexible", 1.0), arm("static 2", 1.5), arm("static 4", 1.2)]
    ours, two, four = rows_of(4, 1024, arms)
    assert ours.ratio == 1 and (two.ratio, four.ratio) == pytest.approx((1.5, 1.2))
    assert (four.ratio_low, four.ratio_high, four.predicted_ratio) == pytest.approx((1.2, 1.2, 1.2))
    assert reachable(arms) == pytest.approx(1.2 / 0.8)
    assert reason(arms) == (
        "static 4 by the model: attention 50%, linear layers 25%, all-to-alls 25%; no plan is more than 1.50x as fast, "
        "so that 1.3x is reachable"
    )
