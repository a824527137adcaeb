"""The script that measures what splitting costs on a GPU runs on a CPU, with a small stack."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import cost_of_splitting as script
from tests.gpu.stack import Measured
from tests.pool import RankPool

SMALL = "--device cpu --layers 2 --model-layers 8 --hidden 32 --heads 4 --groups 4 2 --ffn 48 --sequences 96"
SMALL += " --splits 2 4 --repeats 2 --dtype float32 --stages 4 --microbatches 4 8"


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide GPUs from the script, and restore the environment afterwards."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(arguments: list[str]) -> tuple[int, str]:
    """Return the script's status and what it prints; in a rank of the pool, for it makes a process group."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = script.main(arguments)
    return status, output.getvalue()


def test_it_measures_and_predicts(ranks: RankPool, tmp_path: Path) -> None:
    ((status, output),) = ranks.run(1, run, [*SMALL.split(), "--out", str(tmp_path / "out.json")])
    table, found = output.splitlines()[:-1], json.loads(output.splitlines()[-1])
    assert status == 0 and found == json.loads((tmp_path / "out.json").read_text())
    names = [f"G{groups}N96K{splits}" for groups in (4, 2) for splits in (1, 2, 4)]  # K 1 comes by itself
    assert [line.split()[:3] for line in table[3:]] == [[name[1], "96", name[-1]] for name in names]
    assert list(found["tokens_per_second"]) == names and min(found["tokens_per_second"].values()) > 0
    assert (found["device"], found["layers"], found["did_not_fit"]) == ("cpu", 2, [])
    assert list(found["gradient_difference"]) == [name for name in names if name[-1] != "1"]
    assert 0 < max(found["gradient_difference"].values()) <= script.ROUNDING["float32"]
    for measured, name in zip(found["measured"], names, strict=True):
        assert sum(measured["lengths"]) == 96 and len(measured["lengths"]) == int(name[-1])
        assert 0 < sum(measured["forward"]) + sum(measured["backward"]) <= measured["seconds"]  # means of two steps
        assert measured["kernels"] == ["torch CPU flash"]
        own = found["predicted_ratio"][name], found["predicted_ratio_with_head"][name]
        assert all(list(ratios) == ["P4M4", "P4M8"] and min(ratios.values()) > 0 for ratios in own)
        assert name[-1] != "1" or all(set(ratios.values()) == {1.0} for ratios in own)


def test_gradients_that_differ_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = costing(1), costing(2)
    monkeypatch.setattr(script, "one_rank", contextlib.nullcontext)
    for difference, status in ((9e-5, 0), (2e-4, 1), (float("nan"), 1)):
        known = {one.name: one for one in (whole, cut)}
        monkeypatch.setattr(script, "_measure_all", lambda *_, k=known, d=difference: (k, {cut.name: d}, ["G2N64K4"]))
        assert script.main(SMALL.split()) == status
        output = capsys.readouterr()
        assert ("G2N64K2: the gradient is not that" in output.err) == bool(status)
        assert "G2N64K4: the device's memory does not suffice" in output.out


def costing(segments: int) -> Measured:
    """Return segments that cost exactly their share of one second forward and two backward."""
    share = 1.0 / segments
    return Measured(2, 2, (64 // segments,) * segments, (share,) * segments, (2 * share,) * segments, 3.0, 0)


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_the_prediction_is_the_schedules(segments: int) -> None:
    """A step takes (M*K + P - 1) / K sequences' time. Each of 4 stages has twice the measured stack's layers."""
    options = script._options([*SMALL.split(), "--model-layers", "16", "--microbatches", "8"])
    costs = script.measured_costs(costing(segments), options)
    assert script.step_seconds(costs, 8) == pytest.approx(2 * 3 * (8 + 3 / segments))
    known = {one.name: one for one in (costing(1), costing(segments))}
    row: dict[str, Any] = script._row(costing(segments), known, {}, options)
    assert row["ratio"] == {"P4M8": round((8 + 3) / (8 + 3 / segments), 4)}
    assert row["pipeline"] == {"P4M8": round(8 * 64 / (2 * 3 * (8 + 3 / segments)), 1)}
    assert script._row(costing(segments), {}, {}, options)["ratio"] == {}, "no whole sequence, no ratio"


def test_a_head_makes_the_last_stage_slower() -> None:
    options = script._options([*SMALL.split(), "--vocabulary", "1024"])
    layer = script._layer([costing(1), costing(2), costing(4)])
    assert layer is not None and script._layer([costing(1)]) is None
    costs = script.fitted_costs(layer, costing(1), (40, 24), options)
    assert costs.forward[0] == costs.forward[2] and min(b - a for a, b in zip(*costs.forward[2:], strict=True)) > 0


@pytest.mark.parametrize(
    ("one", "two", "room", "most", "layers"),
    [(20, 30, 100, 32, 8), (20, 30, 99, 32, 7), (20, 30, 1000, 32, 32), (95, 180, 100, 32, 1), (20, 30, 100, 4, 4)],
)
def test_as_many_layers_as_fit(one: int, two: int, room: int, most: int, layers: int) -> None:
    """Nine tenths of the memory may be used; the first layer takes 20 bytes, and each further one 10."""
    assert script.layers_that_fit(one, two, room, most) == layers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "PyTorch finds no GPU here"),
        (["--device", "cpu"], "give --layers"),
        ([*SMALL.split(), "--stages", "3"], "--model-layers 8 cannot be dealt to --stages 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script._options(words)
    assert message in capsys.readouterr().err
