"""The regression command's cases and planted errors as tests: one suite, so every training runs once."""

import json
from pathlib import Path

import pytest

from tests.pool import RankPool
from tests.regression import report
from tests.regression.case import load_cases
from tests.regression.suite import Outcome, Suite

CASES = {case.name: case for case in load_cases()}


class Outcomes:
    """Runs a case when it is first asked for."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.known: dict[str, Outcome] = {}

    def of(self, name: str) -> Outcome:
        if name not in self.known:
            self.known[name] = self.suite.run_case(CASES[name])
        return self.known[name]


@pytest.fixture(scope="module")
def outcomes(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Outcomes(Suite(ranks, tmp_path_factory.mktemp("regression")))


def test_arm_u_is_the_locked_wheel_untouched() -> None:
    assert set(report.upstream_header()) == {"upstream", "RECORD sha256"}


@pytest.mark.parametrize("name", CASES)
def test_case_equals_upstream(name: str, outcomes: Outcomes, tmp_path: Path) -> None:
    outcome = outcomes.of(name)
    report.write(outcome, tmp_path, {})
    print(report.line(outcome))
    assert outcome.passed, report.line(outcome)
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True
    assert (tmp_path / "curve.svg").stat().st_size > 0
    assert len((tmp_path / "curve.png").read_bytes()) > 0
    for curve in tmp_path.glob("*.jsonl"):
        assert len(curve.read_text().splitlines()) == CASES[name].steps


@pytest.mark.parametrize(
    ("name", "mutant"), [(case.name, mutant) for case in CASES.values() for mutant in case.mutants]
)
def test_planted_error_turns_its_case_red(name: str, mutant: str, outcomes: Outcomes) -> None:
    verdict = outcomes.suite.run_mutant(outcomes.of(name), mutant)
    print(report.mutant_line(mutant, verdict, 0.0))
    assert verdict.red and not verdict.error, verdict.by
