"""Write the curves, the report and the picture of a case, and format its line on the screen."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patches.upstream.lock import PATH as LOCK
from patches.upstream.wheel import installed
from tests.regression import picture
from tests.regression.judge import Verdict
from tests.regression.suite import Outcome


class NotUpstream(RuntimeError):
    """The installed wheel is not the locked, unmodified upstream of arm U."""


def upstream_header() -> dict[str, Any]:
    """Return version and RECORD hash of the installed wheel, after checking that it is the locked one and unmodified.

    Raises:
        NotUpstream: it is another wheel, or its files differ from its RECORD.
    """
    wheel, lock = installed(), json.loads(LOCK.read_text("utf-8"))
    found = {"upstream": wheel.version, "RECORD sha256": wheel.record_sha256}
    wanted = {"upstream": lock["version"], "RECORD sha256": lock["record_sha256"]}
    altered = [f"{path} is {state}" for path, state in wheel.altered()]
    if found != wanted or altered:
        raise NotUpstream(
            f"the installed megatron-core is {found}, the lock says {wanted}; {'; '.join(altered) or 'no file altered'}"
            ". Arm U must be upstream: reinstall the wheel, or run `python -m patches verify` for details"
        )
    return found


def line(outcome: Outcome) -> str:
    """Return the line of a case: name, class, worst check, seconds and result, and the failed checks."""
    worst, case = outcome.worst, outcome.case
    word = "PASS" if outcome.passed else "FAIL"
    ratio = f"{worst.ratio:8.2g}" if worst.ratio else "   exact"
    text = f"{case.name:20} {case.klass} {case.arithmetic:8}{ratio} of tolerance {outcome.seconds:6.1f} s  {word}"
    failed = [f"\n    {check.name}: {check.detail}" for check in outcome.checks if not check.passed]
    return text + "".join(failed)


def mutant_line(name: str, verdict: Verdict, seconds: float) -> str:
    """Return the line of a planted error."""
    word = "ERROR" if verdict.error else "red" if verdict.red else "SURVIVED"
    return f"    mutant {name:22} {seconds:6.1f} s  {word}: {verdict.by}"


def write(outcome: Outcome, folder: Path, header: dict[str, Any]) -> None:
    """Write U.jsonl, O.jsonl, X.jsonl, report.json, curve.svg and curve.png of a case."""
    folder.mkdir(parents=True, exist_ok=True)
    for trial, seed in zip(outcome.trials, outcome.case.seeds, strict=False):
        suffix = "" if trial is outcome.trials[0] else f"-seed{seed}"
        _lines(folder / f"U{suffix}.jsonl", trial.u.curve)
        _lines(folder / f"O{suffix}.jsonl", trial.o.curve)
        for index, run in enumerate(trial.floor):
            _lines(folder / f"U{suffix}-floor{index}.jsonl", run.curve)
    if outcome.oracle:
        _lines(folder / "X.jsonl", outcome.oracle)
    (folder / "report.json").write_text(json.dumps(as_data(outcome, header), indent=1) + "\n", "utf-8")
    if outcome.trials:
        picture.draw(outcome, folder)


def as_data(outcome: Outcome, header: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a case as plain data."""
    case = outcome.case
    return {
        "case": case.name,
        "proves": case.proves,
        "class": case.klass,
        "arithmetic": case.arithmetic,
        "seeds": list(case.seeds),
        "steps": case.steps,
        "flags": {"both": list(case.flags), "U": list(case.u.flags), "O": list(case.o.flags)},
        "header": {**header, "arms": outcome.headers},
        "passed": outcome.passed,
        "worst": {"check": outcome.worst.name, "ratio": outcome.worst.ratio},
        "seconds": round(outcome.seconds, 1),
        "checks": [{"name": c.name, "passed": c.passed, "ratio": c.ratio, "detail": c.detail} for c in outcome.checks],
        "mutants": {name: {"red": v.red, "error": v.error, "by": v.by} for name, v in outcome.mutants.items()},
    }


def _lines(path: Path, curve: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(step) + "\n" for step in curve), "utf-8")
