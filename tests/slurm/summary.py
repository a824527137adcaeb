"""Count the slurm cases, for the summary of the fault suite.

python -m tests.slurm          # run all cases, and print {"slurm_cases": ..., "slurm_passed": ...}
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@dataclass
class CaseCounter:
    """Count the results of a pytest session. Register it as a plugin.

    Attributes:
        outcomes: by test id; a case that was skipped is not in it.
    """

    outcomes: dict[str, bool] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note whether a case has passed. An error in its setup or its end counts as a failure."""
        if report.failed:
            self.outcomes[report.nodeid] = False
        elif report.when == "call" and report.passed:
            self.outcomes.setdefault(report.nodeid, True)

    def summary(self) -> dict[str, int]:
        """Return the numbers of cases that ran and that passed."""
        return {"slurm_cases": len(self.outcomes), "slurm_passed": sum(self.outcomes.values())}


def run_cases(arguments: Sequence[str] = ()) -> dict[str, int]:
    """Run the slurm cases, the slow ones too, in this process.

    Args:
        arguments: further arguments of pytest, such as `-k pgid`.

    Returns:
        `slurm_cases` and `slurm_passed`. Both are 0 where slurm cannot start.
    """
    counter = CaseCounter()
    pytest.main(["-q", "-m", "slow or not slow", str(FOLDER), *arguments], plugins=[counter])
    return counter.summary()
