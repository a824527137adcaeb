"""The planner's example: it measures this machine, and trains with the plan that it finds."""

import json
from functools import partial
from pathlib import Path

import pytest

from tests.scripts import example_scripts

example = partial(example_scripts.example, "planner")


@pytest.mark.slow
def test_the_example_trains_with_the_best_plan(tmp_path: Path) -> None:
    done = example(tmp_path / "run", "--steps", "4")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "| 1 |" in done.stdout and "iteration        4/" in done.stdout and "predicted (ms):" in done.stdout
    plan = json.loads((tmp_path / "run/plans/plans.json").read_text())["plans"][0]
    assert plan["fits"] and not plan["reasons"]
    for name, value in plan["flags"].items():
        words = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        assert words.split("[", maxsplit=1)[0].strip() in (tmp_path / "run/launch.sh").read_text(), words
    again = example(tmp_path / "run")
    assert again.returncode == 2 and "already holds a run" in again.stderr


@pytest.mark.parametrize(
    ("words", "message"), [(("--fast",), "unknown option --fast"), (("--ranks", "0"), "--ranks 0")]
)
def test_the_example_refuses_what_means_nothing(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = example(tmp_path / "run", *words)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "run").exists()
