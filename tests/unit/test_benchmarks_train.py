"""The benchmarks that train run once at their smallest size: counts are exact, and lines hold what they promise."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import guards, packed, planner_measured
from tests.packed_corpus import write_documents
from tests.pool import RankPool


@pytest.mark.slow
def test_guards_add_one_read_and_one_collective_to_a_step() -> None:
    table = guards.summary(guards.measure(1))
    assert list(table) == list(guards.ARMS)
    counts = {name: (row["operations"], row["reads"], row["collectives"]) for name, row in table.items()}
    assert counts["no check again"] == counts["no check"]
    for arm in ("gradients", "loss spikes", "guards"):
        assert [more - base for more, base in zip(counts[arm][1:], counts["no check"][1:], strict=True)] == [1, 1]
    assert counts["upstream's check"][1] > counts["no check"][1] + guards.MICROBATCHES


@pytest.mark.slow
def test_packed_documents_are_counted_and_compared_with_one_document(ranks: RankPool, tmp_path: Path) -> None:
    tokens = 8192
    data = write_documents(tmp_path / "text", packed.document_lengths(), 10 * tokens)
    causal, mask, thd = rows = packed.measure(ranks, tokens, data, 1)
    assert [row.arm for row in rows] == list(packed.ARMS)
    assert causal.documents == 1 < thd.documents == mask.documents
    assert causal.over_ideal == 1.0
    assert causal.flops > thd.flops == mask.flops
    assert all(row.peak_bytes > 2 * 2**20 and row.seconds > 0 for row in rows)


@pytest.mark.slow
def test_plans_are_calibrated_predicted_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert planner_measured.main(["--ranks", "2", "--rounds", "1", "--steps", "1", "--seconds", "5"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["plan"] for row in found["rows"]] == list(planner_measured.PLANS[2])
    assert found["bytes_error_worst"] <= 0.025  # counted, so the same on every machine
    assert found["ratio_error_mean"] <= found["ratio_error_worst"]
    assert -1 <= found["rank_correlation"] <= 1
