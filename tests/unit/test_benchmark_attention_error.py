"""The benchmark of rounding errors runs to its JSON line and its picture, which repeats to the byte."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.attention_error import RESULTS, Narrow, draw, main
from tests.unit.test_attention_cli import drawn


def test_last_line_holds_every_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.svg"
    assert main(["--tokens", "512", "--rings", "1,32", "--output", str(file)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert (found["tokens"], found["ring"]) == (512, 32)
    for kind, row in found["error_over_one_call"].items():
        assert row.keys() == set(RESULTS) and found["worst"][kind] == max(row.values())
    assert found["worst"]["bf16"] <= 1.1  # the goal, at these sizes
    assert found["worst"]["float32"] <= 0.85, "0.71; with log-sum-exps merged in float32 1.01"
    assert found["error_over_one_call"]["bf16, rounded blocks"]["out"] > 1.1, "what the narrow kernel stands for"
    assert not Narrow.wide and all("| 1.000x |" in line for line in table[2:]), "a ring of one is the one call"
    assert sum("| bf16 |" in line for line in table) == 4 and len(drawn(file)) > 0


def test_the_picture_repeats(tmp_path: Path) -> None:
    ratios = {kind: {name: [1.0, 1.05] for name in RESULTS} for kind in ("float32", "bf16")}
    for name in ("a.svg", "b.svg"):
        draw(ratios, [1, 2], 64, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
