"""Run regression cases and their planted errors. The exit status is 0 if all are as expected."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.pool import RankPool
from tests.regression.case import Case, CaseError, load_cases
from tests.regression.suite import Outcome, Suite


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and print a JSON object as the last line.

    Returns:
        0 if all cases passed and all planted errors were detected, 1 if not, 2 for a wrong command line.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.regression", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases (default: all)")
    parser.add_argument("--list", action="store_true", help="print the cases, and what each one shows")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/regression"), help="folder for curves, reports and pictures"
    )
    parser.add_argument("--no-mutants", action="store_true", help="leave the planted errors out")
    args = parser.parse_intermixed_args(argv)
    try:
        cases = chosen(load_cases(), args.cases)
    except CaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.list:
        for case in cases:
            mutants = f"  [{', '.join(case.mutants)}]" if case.mutants else ""
            print(f"{case.name:20} {case.klass} {case.arithmetic:8} {case.proves}{mutants}")
        print(json.dumps({"cases": len(cases), "mutants": sum(len(case.mutants) for case in cases)}))
        return 0
    with tempfile.TemporaryDirectory(prefix="regression-") as scratch:
        outcomes = run(cases, args.out, Path(scratch), mutants=not args.no_mutants)
    summary = summarize(outcomes)
    print(json.dumps(summary))
    return 0 if summary["passed"] == summary["cases"] and summary["mutants_red"] == summary["mutants"] else 1


def chosen(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Return the named cases, or all.

    Raises:
        CaseError: a case does not exist.
    """
    unknown = set(names) - {case.name for case in cases}
    if unknown:
        known = ", ".join(case.name for case in cases)
        raise CaseError(f"there is no case {', '.join(sorted(unknown))}; cases are {known}")
    return [case for case in cases if not names or case.name in names]


def run(
    cases: Sequence[Case], out: Path, scratch: Path, *, mutants: bool = True, say: Callable[[str], Any] = print
) -> list[Outcome]:
    """Run cases and their planted errors, print a line for each, and write the reports into `out`."""
    from tests.regression import report

    header = report.upstream_header()
    logs = scratch / "logs"
    logs.mkdir(parents=True)
    suite = Suite(RankPool(logs), scratch)
    header["data sha256"] = suite.corpus("paragraphs").sha256
    outcomes = []
    for case in cases:
        outcome = suite.run_case(case)
        outcomes.append(outcome)
        say(report.line(outcome))
        for name in case.mutants if mutants else ():
            start = time.monotonic()
            outcome.mutants[name] = suite.run_mutant(outcome, name)
            say(report.mutant_line(name, outcome.mutants[name], time.monotonic() - start))
        report.write(outcome, out / case.name, header)
    return outcomes


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the last line: numbers of cases and planted errors, and the largest ratio of error to tolerance."""
    verdicts = [verdict for outcome in outcomes for verdict in outcome.mutants.values()]
    return {
        "cases": len(outcomes),
        "passed": sum(outcome.passed for outcome in outcomes),
        "mutants": len(verdicts),
        "mutants_red": sum(verdict.red for verdict in verdicts),
        "worst": max((outcome.worst.ratio for outcome in outcomes), default=0.0),
    }
