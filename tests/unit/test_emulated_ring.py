"""The GPU script of the emulated ring runs anywhere, at small sizes."""

import json

import pytest

from tests.gpu.emulated_ring import main

SMALL = "--device cpu --dtype float32 --tokens 256 --ranks 2 4 --heads 4 --groups 2 --dim 16 --ffn 96 --ulysses 4"


def test_runs_and_reports_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL.split(), "--rounds", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["ranks"], row["block"]) for row in result["rows"]] == [(2, 64), (4, 32)]
    assert result["packing_bytes_per_second"] > 0 and result["device"] == "cpu"
