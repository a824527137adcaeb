"""The command `grid`: plans of several models, lengths and clusters in one table and one picture."""

from pathlib import Path

import pytest

from megatron.longseq.planner.plan.cluster import cluster
from megatron.longseq.planner.plan.model import architecture
from megatron.longseq.planner.plan.task import planning_task
from megatron.longseq.planner.tools import grid_command
from megatron.longseq.planner.tools.cli import main
from megatron.longseq.planner.tools.search_command import search

SMALL = ["--models", "gpt-1.7b", "llama-65b", "--clusters", "a100-4", "a800-4", "--seq-lengths", "4K", "8K"]


def test_a_grid_shows_the_best_plan_of_every_cell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["grid", *SMALL, "--global-batch-tokens", "64K", "--output", str(tmp_path / "grid.png")]) == 0
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.strip().splitlines()
    ]
    assert lines[0] == ["model", "tokens", "GPUs", "a100", "step s", "MFU", "a800", "step s", "MFU"]
    assert [line[:3] for line in lines[2:]] == [
        [model, length, "4"] for model in ("gpt-1.7b", "llama-65b") for length in ("4K", "8K")
    ]
    assert all(line[3] == line[6] == "no plan fits" for line in lines[4:])  # four GPUs are too few for 65B
    task = planning_task(architecture("gpt-1.7b", {}), cluster("a800-4"), 8192, 8)
    best = search(task, 1).ranked[0][1]
    assert lines[3][7] == f"{best.seconds:.4g}"
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_errors_say_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_command, "branch_and_bound", lambda *_: pytest.fail("searched before all names are known"))
    assert main(["grid", *SMALL, "--models", "gpt-1.7b", "gpt-0", "--global-batch-tokens", "64K"]) == 1
    assert "no model 'gpt-0'" in capsys.readouterr().err
    assert main(["grid", *SMALL, "--global-batch-tokens", "6K"]) == 1
    assert "--global-batch-tokens 6144 is not a multiple of 4096 tokens" in capsys.readouterr().err
    assert main(["grid", *SMALL, "--output", str(tmp_path / "grid.pdf")]) == 1
    assert "the suffix must be .svg or .png" in capsys.readouterr().err
