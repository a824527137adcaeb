"""Run the cases and planted errors of the regression command as tests. Equal runs are trained once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.pool import RankPool
from tests.regression import report
from tests.regression.arm import run_arm
from tests.regression.case import Case, load_cases
from tests.regression.suite import Outcome, Suite
from tests.regression.tensors import logical_tensors

STEPS = 7  # one more than a mutant's, and two after a resumption
CASES = {case.name: case for case in load_cases()}
# By default: each system, each class of equality and each way to compare.
QUICK = {
    *("same-layout", "pipeline", "tensor-sequence", "tied-virtual-stages", "documents", "recompute"),
    *("data-parallel", "data-overlap", "resume", "single-precision"),  # a resumed run has the same bits, as `rerun`
    *("seq1f1b", "seq1f1b-zero-bubble", "usp-hybrid", "paro-iig"),
}
# One planted error for each check that can turn red, and for each system.
QUICK_MUTANTS = {
    ("same-layout", "late_learning_rate"),
    ("pipeline", "scaled_loss"),
    ("single-precision", "scaled_loss"),
    ("documents", "leaking_documents"),
    ("data-overlap", "stale_parameter"),
    ("tensor-sequence", "norm_not_summed"),
    ("seq1f1b", "lost_prefix_gradient"),
    ("usp-hybrid", "rope_of_local_positions"),
    ("paro-iig", "norm_of_own_shard"),
}


def marked(is_quick: bool, *values: str) -> Any:
    """Return a test's parameters, marked slow unless they are quick."""
    return pytest.param(*values, marks=[] if is_quick else pytest.mark.slow)


def shortened(case: Case, most_steps: int) -> Case:
    """Return the case with at most so many steps, the last two of them after its resumption."""
    if case.steps <= most_steps:
        return case
    resume_at = case.o.resume_at and min(case.o.resume_at, most_steps - 2)
    return replace(case, steps=most_steps, o=replace(case.o, resume_at=resume_at))


class Outcomes:
    """Run each case when it is first needed.

    With --all, cases whose noise is measured have their own number of steps, because differences may grow. The others
    are short here: a wrong sum shows in the first steps of float64. `python -m tests.regression` runs all steps.
    """

    def __init__(self, suite: Suite, runs_all: bool) -> None:
        self.suite, self.runs_all = suite, runs_all
        self.known: dict[str, Outcome] = {}

    def of(self, name: str) -> Outcome:
        if name not in self.known:
            case = CASES[name]
            is_whole = self.runs_all and case.floor
            self.known[name] = self.suite.run_case(case if is_whole else shortened(case, STEPS))
        return self.known[name]


@pytest.fixture(scope="module")
def outcomes(ranks: RankPool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Outcomes(Suite(ranks, tmp_path_factory.mktemp("regression")), request.config.option.all)


def test_arm_u_is_the_locked_wheel_untouched() -> None:
    assert set(report.upstream_header()) == {"upstream", "RECORD sha256"}


@pytest.mark.slow
def test_a_snapshot_is_what_a_checkpoint_holds(ranks: RankPool, outcomes: Outcomes, tmp_path: Path) -> None:
    """Check a layout that shards everything: tensors, their gate and up halves, and optimizer states."""
    suite = outcomes.suite
    flags = [*suite.models["tied"], *suite.corpus("paragraphs").flags, "--train-iters", "1", "--lr-warmup-iters", "0"]
    layout = "--pipeline-model-parallel-size 2 --use-distributed-optimizer --tensor-model-parallel-size 2"
    layout += " --dist-ckpt-optim-fully-reshardable"
    run = run_arm(ranks, "O", 4, [*flags, *layout.split()], tmp_path / "saved", float64=True, snapshots=(1,))
    saved, made = logical_tensors(run.checkpoint(1)), run.snapshots[1].tensors
    assert {name for name in saved if name.split(".")[0] in ("decoder", "embedding", "optimizer")} == set(made)
    for name, array in made.items():
        assert numpy.array_equal(saved[name].numpy(), array), name
    assert run.snapshots[1].first_moments and not run.snapshots[1].differing_copies


@pytest.mark.parametrize("name", [marked(name in QUICK, name) for name in CASES])
def test_case_equals_upstream(name: str, outcomes: Outcomes, tmp_path: Path) -> None:
    outcome = outcomes.of(name)
    report.write(outcome, tmp_path, {})
    print(report.line(outcome))
    assert outcome.passed, report.line(outcome)
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True
    assert (tmp_path / "curve.svg").stat().st_size > 0
    assert len((tmp_path / "curve.png").read_bytes()) > 0
    for curve in tmp_path.glob("*.jsonl"):
        assert len(curve.read_text().splitlines()) == outcome.case.steps


@pytest.mark.parametrize(
    ("name", "mutant"),
    [marked((name, mutant) in QUICK_MUTANTS, name, mutant) for name, case in CASES.items() for mutant in case.mutants],
)
def test_planted_error_turns_its_case_red(name: str, mutant: str, outcomes: Outcomes) -> None:
    verdict = outcomes.suite.run_mutant(outcomes.of(name), mutant)
    print(report.mutant_line(mutant, verdict, 0.0))
    assert verdict.red and not verdict.error, verdict.by
