"""The quickstart with few steps: text, half a run, resumption, picture and report; a second call repeats nothing."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from examples import loss_curve, quickstart
from examples.quickstart import show
from megatron.longseq.data.__main__ import main as prepare
from tests.pool import RankPool
from tests.regression.arm import run_arm

ROOT = Path(__file__).resolve().parents[2]
STEPS = 16


def check_result(folder: Path, printed: str) -> None:
    """Check the files of a finished run, and what the quickstart printed."""
    for name in ("loss.png", "loss.svg", "log.txt", "arguments.json"):
        assert (folder / name).stat().st_size > 1000
    curves = loss_curve.read(folder / "tensorboard")
    assert [step for step, _ in curves.train] == list(range(1, STEPS + 1))
    assert len(curves.held_out) == 4
    assert curves.train[-1][1] < curves.train[0][1] - 1
    arguments = json.loads((folder / "arguments.json").read_text())
    assert arguments["pipeline_model_parallel_size"] == 2 and "cpu.device" in arguments["longseq_patches"]
    log = (folder / "log.txt").read_text()
    assert f"at iteration {STEPS // 2}" in log and "tokens/s" in log
    assert log.count("> patches:") == 2, "rank 0 alone reports the patches of each of the two runs"
    last = printed[printed.index("\nDone") :]
    assert "Where:" in last and "Try next:" in last
    shown = re.findall(r"held-out loss ([\d.]+)", printed)
    further = re.findall(r"held-out loss, further batches ([\d.]+)", printed)
    assert shown == [f"{loss:.4f}" for _, loss in curves.held_out] + shown[3:4]  # the report repeats the last one
    assert len(further) == 1 and further[0] != shown[-1]  # another quantity, under another name


def test_it_trains_resumes_and_reports(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run all steps in this process. Ranks come from the pool, and the text is the source code of this project."""
    folder, log = tmp_path / "run", tmp_path / "run" / "log.txt"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    corpus = [str(ROOT / "megatron"), "--glob", "*.py", "--output", str(tmp_path / "text"), "--workers", "1"]

    def prepare_text(_: quickstart.QuickstartRun) -> list[str]:
        assert prepare(["prepare", *corpus]) == 0
        capfd.readouterr()
        assert prepare(["flags", str(tmp_path / "text")]) == 0
        return capfd.readouterr().out.split()

    def train(plan: quickstart.QuickstartRun, data: list[str], until: int) -> None:
        stop = [] if until == plan.steps else ["--exit-interval", str(until)]
        start = folder / f"start-{len(list(folder.glob('start-*')))}"  # as the launcher names it
        run_arm(ranks, "O", plan.ranks, [*plan.flags(data), *stop, "--start-folder", str(start)])
        with log.open("a") as file:
            for rank in range(plan.ranks):
                for line in (ranks.logs / f"job{ranks.jobs:03d}-rank{rank}.log").read_text().splitlines():
                    print(f"[rank{rank}]: {line}", file=file)
                    quickstart.show(f"[rank{rank}]: {line}")

    def run(steps: int = STEPS) -> str:
        monkeypatch.setattr(sys, "argv", ["quickstart", "--run-dir", str(folder), "--steps", str(steps)])
        quickstart.main()
        return capfd.readouterr().out

    monkeypatch.setattr(quickstart, "prepare_text", prepare_text)
    monkeypatch.setattr(quickstart, "train", train)
    monkeypatch.setattr(quickstart, "TRAINING", quickstart.TRAINING.replace("size 16", "size 8"))
    check_result(folder, run())
    first = log.read_text()
    again = run()
    assert again.count("done before, skipped") == 2 and "      step" not in again
    with pytest.raises(SystemExit, match=f"holds a run of {STEPS} steps"):
        run(STEPS + 4)
    assert log.read_text() == first


@pytest.mark.slow  # the same steps run above; here the shell, the launcher and the standard library's sources
def test_the_command_trains_resumes_and_reports(tmp_path: Path) -> None:
    def run(steps: int = STEPS) -> subprocess.CompletedProcess[str]:
        command = ["bash", "scripts/quickstart.sh", "--run-dir", str(tmp_path), "--steps", str(steps)]
        environment = {**os.environ, "VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
        )

    done = run()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    check_result(tmp_path, done.stdout)
    log = (tmp_path / "log.txt").read_text()
    for printed, step in ((done.stdout, "      step "), (log, "iteration        1/")):
        lines = printed.splitlines()
        assert next(number for number, line in enumerate(lines, 1) if step in line) <= 60
    again = run()
    assert again.returncode == 0
    assert again.stdout.count("done before, skipped") == 2 and "      step" not in again.stdout
    other = run(STEPS + 4)
    assert other.returncode != 0
    assert f"holds a run of {STEPS} steps" in other.stderr
    assert (tmp_path / "log.txt").read_text() == log


def test_folders_with_spaces_and_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--data-path", f"{tmp_path}/a b/stdlib", "--vocab-size", "3"]
    done = subprocess.CompletedProcess([], 0, stdout=shlex.join(words) + "\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert quickstart.prepare_text(quickstart.QuickstartRun(tmp_path, STEPS, 0)) == words

    def stop(plan: quickstart.QuickstartRun) -> None:
        raise SystemExit(str(plan.folder))

    monkeypatch.setattr(quickstart, "refuse_other_run", stop)
    monkeypatch.setattr(sys, "argv", ["quickstart", "--relative-to", str(tmp_path), "--run-dir", "out"])
    with pytest.raises(SystemExit, match=f"^{re.escape(str(tmp_path / 'out'))}$"):
        quickstart.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--steps", "8"])
    with pytest.raises(SystemExit, match="2"):  # fewer than the steps in which the learning rate rises
        quickstart.main()


def test_a_resumed_curve_takes_the_later_values(tmp_path: Path) -> None:
    import time

    from torch.utils.tensorboard import SummaryWriter

    for start, offset in ((1, 10.0), (3, 20.0)):
        with SummaryWriter(tmp_path) as writer:
            for step in range(start, start + 4):
                writer.add_scalar("lm loss", offset + step, step)
        time.sleep(1.1)  # the event files' order is their time
    assert loss_curve.read(tmp_path).train == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0), (5, 25.0), (6, 26.0)]


def test_of_two_evaluations_at_the_end_the_curve_takes_the_one_during_training(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("lm loss", 1.0, 8)
        writer.add_scalar("lm loss validation", 2.1443, 8)
        writer.add_scalar("lm loss validation", 2.1830, 8)
    assert [(step, round(loss, 4)) for step, loss in loss_curve.read(tmp_path).held_out] == [(8, 2.1443)]


def test_progress_lines(capsys) -> None:  # type: ignore[no-untyped-def]
    show("[rank1]: iteration        5/     320 | lm loss: 4.112900E+00 | grad norm: 1.500 | lr: 1.000E-03 |")
    show("[rank1]: validation loss at iteration 80 | lm loss value: 2.629600E+00 | lm loss PPL: 1.3E+01 |")
    show("[rank1]: validation loss at iteration 80 on validation set | lm loss value: 2.6E+00 | lm loss PPL: 1.3E+01 |")
    show("[rank0]:anything else")
    assert capsys.readouterr().out.splitlines() == [
        "      step    5/320   loss 4.1129",
        "      step   80       held-out loss 2.6296",
        "      step   80       held-out loss, further batches 2.6000",
    ]
