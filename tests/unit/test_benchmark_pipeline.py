"""The pipeline benchmark runs to its JSON line, on sizes that take seconds; its figures are not judged here."""

import json

import pytest

from tests.benchmarks.pipeline import main

TINY = "--hidden-size 32 --ffn-hidden-size 64 --kv-channels 16 --seq-length 128 --max-position-embeddings 128"


@pytest.mark.slow
def test_last_line_holds_every_ratio(capsys):
    assert main(["--rounds", "1", "--", *TINY.split()]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    cells = {f"M{m}K{k}" for m in (2, 4, 8) for k in (1, 2, 4, 8)}
    assert found["throughput_ratio"].keys() == found["simulated_ratio"].keys() == cells
    assert cells <= found["activation_ratio"].keys()
    assert all(ratio > 0 for ratio in found["throughput_ratio"].values())
    assert found["simulated_ratio"]["M2K1"] == 1
    kept, formula = found["activation_ratio"]["P4M4K4"], found["activation_formula"]["P4M4K4"]
    assert len(kept) == len(formula) == 4
    assert kept[0] < 0.6  # far below upstream's, whatever the sizes
