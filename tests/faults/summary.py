"""Count what the fault suite finds, for its summary."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
LOST, INPUTS = "lost steps", "bad inputs"  # names under which tests record numbers
LATE = "did not end in time"  # of the pool, which ends a job that hangs


@dataclass
class FaultCounter:
    """Count the results of a pytest session. Register it as a plugin.

    Attributes:
        outcomes: by test id, whether it passed; skipped cases are not in it.
        lost_steps, bad_inputs: sums over the cases.
        hung: cases that had to be ended from outside.
    """

    outcomes: dict[str, bool] = field(default_factory=dict)
    lost_steps: int = 0
    bad_inputs: int = 0
    hung: int = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note the result of a case. An error in its setup or its end counts as a failure."""
        if report.failed:
            self.outcomes[report.nodeid] = False
            self.hung += LATE in report.longreprtext or "Timeout" in report.longreprtext
        elif report.when == "call" and report.passed:
            self.outcomes.setdefault(report.nodeid, True)
        if report.when == "call":
            numbers = dict(report.user_properties)
            self.lost_steps += numbers.get(LOST, 0)
            self.bad_inputs += numbers.get(INPUTS, 0)

    def summary(self) -> dict[str, int]:
        """Return the numbers."""
        return {
            "faults": len(self.outcomes),
            "survived": sum(self.outcomes.values()),
            "lost_steps": self.lost_steps,
            "bad_inputs": self.bad_inputs,
            "hung": self.hung,
        }


def run_faults(arguments: Sequence[str] = (), *, with_slurm: bool = True) -> dict[str, int]:
    """Run the suite, the slow cases too, in this process.

    Args:
        arguments: further arguments of pytest, such as `-k killed`.
        with_slurm: run slurm's cases too, where slurm can start.
    """
    from tests.slurm.summary import run_cases

    counter = FaultCounter()
    pytest.main(["-q", "-m", "slow or not slow", str(FOLDER), *arguments], plugins=[counter])
    slurm = run_cases() if with_slurm else {"slurm_cases": 0, "slurm_passed": 0}
    return {**counter.summary(), **slurm}
