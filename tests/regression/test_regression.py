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
from tests.regression.case import load_cases
from tests.regression.suite import Outcome, Suite
from tests.regression.tensors import logical_tensors

STEPS = 12  # by default: six more than a mutant's, and two after a resumption; with --all a case's own number
CASES = {case.name: case for case in load_cases()}
# tests/distributed/ has these layouts too; here they run with -m slow, and in the command.
SLOW = {
    *("seq1f1b-bf16", "seq1f1b-float32", "seq1f1b-four-stages", "seq1f1b-tp-sp", "seq1f1b-virtual"),
    *("seq1f1b-dp", "seq1f1b-zero-bubble"),
    *("usp-bf16", "usp-float32", "usp-pipeline", "usp-ring", "usp-ring-recompute", "usp-tensor", "usp-ulysses"),
    "usp-multi-query",
    "half-precision",  # test_layouts.py: PP 2 in bf16 within the noise; its mutant is one of pipeline.toml's too
    "tensor-pipeline",  # test_layouts.py: TP 2 x PP 2, sequence parallel, tied
    "seq1f1b-recompute",  # test_seq1f1b.py: full recompute, zero bubble; its mutant is one of seq1f1b.toml's too
    *("paro-bf16", "paro-bf16-wire", "paro-igg-pipeline", "paro-nng"),
    "paro-resume",  # test_sharding_checkpoints.py resumes to the bit, too
}


def marked(name: str, *more: str) -> Any:
    """Return a test's parameters, marked slow where the case is."""
    return pytest.param(name, *more, marks=[pytest.mark.slow] * (name in SLOW))


class Outcomes:
    """Run each case when it is first needed."""

    def __init__(self, suite: Suite, most_steps: int) -> None:
        self.suite, self.most_steps = suite, most_steps
        self.known: dict[str, Outcome] = {}

    def of(self, name: str) -> Outcome:
        if name not in self.known:
            case = CASES[name]
            self.known[name] = self.suite.run_case(replace(case, steps=min(case.steps, self.most_steps)))
        return self.known[name]


@pytest.fixture(scope="module")
def outcomes(ranks: RankPool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    most_steps = max(case.steps for case in CASES.values()) if request.config.option.all else STEPS
    return Outcomes(Suite(ranks, tmp_path_factory.mktemp("regression")), most_steps)


def test_arm_u_is_the_locked_wheel_untouched() -> None:
    assert set(report.upstream_header()) == {"upstream", "RECORD sha256"}


def test_a_snapshot_is_what_a_checkpoint_holds(ranks: RankPool, outcomes: Outcomes, tmp_path: Path) -> None:
    """Check a layout that shards everything: tensors, their gate and up halves, and optimizer states."""
    suite = outcomes.suite
    flags = [*suite.models["tied"], *suite.corpus.flags, "--train-iters", "1", "--lr-warmup-iters", "0"]
    layout = "--pipeline-model-parallel-size 2 --use-distributed-optimizer --tensor-model-parallel-size 2"
    layout += " --dist-ckpt-optim-fully-reshardable"
    run = run_arm(ranks, "O", 4, [*flags, *layout.split()], tmp_path / "saved", float64=True, snapshots=(1,))
    saved, made = logical_tensors(run.checkpoint(1)), run.snapshots[1].tensors
    assert {name for name in saved if name.split(".")[0] in ("decoder", "embedding", "optimizer")} == set(made)
    for name, array in made.items():
        assert numpy.array_equal(saved[name].numpy(), array), name
    assert run.snapshots[1].first_moments and not run.snapshots[1].torn


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
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
    ("name", "mutant"), [marked(case.name, mutant) for case in CASES.values() for mutant in case.mutants]
)
def test_planted_error_turns_its_case_red(name: str, mutant: str, outcomes: Outcomes) -> None:
    verdict = outcomes.suite.run_mutant(outcomes.of(name), mutant)
    print(report.mutant_line(mutant, verdict, 0.0))
    assert verdict.red and not verdict.error, verdict.by
