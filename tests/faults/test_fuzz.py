"""Generated user input is accepted, or refused clearly before any process group exists; nothing hangs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import fuzz, fuzz_flags, fuzz_inputs
from tests.faults.summary import INPUTS
from tests.pool import RankPool

SEED = 20
# kind: number of inputs by default, and in the slow test
COUNTS = {"flags": (30, 1500), "tools": (20, 200), "data": (10, 150), "indices": (20, 150), "checkpoints": (20, 150)}


def run_kind(kind: str, count: int, seed: int, folder: str) -> dict[str, object]:
    """Generate inputs of a kind on a rank, whose process is fresh; return the report as a dict."""
    if kind == "flags":
        report = fuzz_flags.fuzz_flags(count, seed)
    else:
        report = getattr(fuzz_inputs, f"fuzz_{kind}")(count, seed, Path(folder))
    return {"total": report.total, "refused": report.refused, "unclear": report.kinds(), "hung": report.hung}


def _assert_clear(report: dict[str, object], count: int, record: Callable[[str, object], None]) -> None:
    record(INPUTS, count)
    assert report["total"] == count
    assert not report["unclear"], report["unclear"]
    assert not report["hung"], json.dumps(report["hung"])
    assert report["refused"], "every input was accepted: the generator makes no errors"


@pytest.mark.parametrize("kind", ["flags", "checkpoints"])
def test_flags(ranks: RankPool, tmp_path: Path, record_property: Callable[[str, object], None], kind: str) -> None:
    count = COUNTS[kind][0]
    _assert_clear(ranks.run(1, run_kind, kind, count, SEED, str(tmp_path))[0], count, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(COUNTS))
def test_many(ranks: RankPool, tmp_path: Path, record_property: Callable[[str, object], None], kind: str) -> None:
    count = COUNTS[kind][1]
    report = ranks.run(1, run_kind, kind, count, SEED + 1, str(tmp_path), timeout=1500)[0]
    _assert_clear(report, count, record_property)


@pytest.mark.slow
def test_launcher(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    report = fuzz_inputs.fuzz_launcher(120, SEED, tmp_path)
    found = {"total": report.total, "refused": report.refused, "unclear": report.kinds(), "hung": report.hung}
    _assert_clear(found, 120, record_property)


def test_an_unclear_error_is_found() -> None:
    report = fuzz.FuzzReport()
    fuzz.judge(report, "input", lambda: {}["missing"])
    fuzz.judge(report, "input", lambda: int("x"))
    assert report.total == len(report.unclear) == 2
