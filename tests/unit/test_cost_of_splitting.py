"""The script that measures what splitting costs on a GPU runs on a CPU, with a small stack."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import cost_of_splitting
from tests.pool import RankPool

SMALL = (
    "--layers 2 --model-layers 8 --hidden 32 --heads 4 --groups 2 4 --ffn 48 --sequences 96 --splits 1 2 4 --repeats 2"
)


def run(arguments: list[str]) -> str:
    """Return what the script prints; in a rank of the pool, for it makes a process group."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cost_of_splitting.main(arguments) == 0
    return said.getvalue()


def test_it_measures_and_predicts(ranks: RankPool, tmp_path: Path) -> None:
    own = ["--dtype", "float32", "--stages", "4", "--microbatches", "4", "8", "--out", str(tmp_path / "out.json")]
    (said,) = ranks.run(1, run, [*SMALL.split(), *own], timeout=60)
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    assert found == json.loads((tmp_path / "out.json").read_text())
    names = [f"G{groups}N96K{splits}" for groups in (2, 4) for splits in (1, 2, 4)]
    assert list(found["tokens_per_second"]) == names and min(found["tokens_per_second"].values()) > 0
    assert found["device"] == "cpu" and [m["tokens"] for m in found["measured"]] == [96] * 6
    for measured, difference in zip(found["measured"], found["gradient_difference"].values(), strict=True):
        assert sum(measured["lengths"]) == 96 and difference < 1e-5
        assert sum(measured["forward"]) + sum(measured["backward"]) < 1.5 * measured["seconds"]
    ratios = found["predicted_ratio"]
    assert list(ratios) == [name for name in names if not name.endswith("K1")]
    assert all(list(each) == ["P4M4", "P4M8"] for each in ratios.values())


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_the_prediction_is_the_schedules(splits: int) -> None:
    """Segments that cost exactly their share: (M*K + P - 1) / K sequences' time, against M + P - 1."""
    options = cost_of_splitting._parser().parse_args(["--layers", "2", "--model-layers", "16", "--stages", "4"])

    def costing(segments: int) -> cost_of_splitting.Measured:
        share = 1.0 / segments
        lengths = (64 // segments,) * segments
        return cost_of_splitting.Measured(2, 64, lengths, (share,) * segments, (2 * share,) * segments, 3.0, 0, 0.0)

    assert cost_of_splitting._step_seconds(costing(splits), 8, options) == pytest.approx(2 * 3 * (8 + 3 / splits))
    if splits > 1:
        options.microbatches = [8]
        ratio = cost_of_splitting._predicted(costing(splits), [costing(1), costing(splits)], options)
        assert ratio == {"P4M8": round((8 + 3) / (8 + 3 / splits), 4)}
        assert cost_of_splitting._predicted(costing(splits), [costing(splits)], options) == {}
