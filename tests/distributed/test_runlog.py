"""The record of a real run, compared with what upstream's `train_step` returned and with the written timeline."""

import re
from pathlib import Path

import pytest

from megatron.longseq.pipeline.tools.chrome_trace import read_measured
from megatron.longseq.runlog import record
from megatron.longseq.runlog.folder import RunFolder, Start
from tests.distributed.flags import PP2, TINY, flags
from tests.pool import RankPool
from tests.regression.arm import Run, run_arm

STEPS = 4
FLOAT32 = 2**-22  # a sum and a division, each of them rounded to float32, in another order


def recorded(ranks: RankPool, folder: Path, world: int, *own: str) -> tuple[Run, Start, str]:
    """Train with the record on, and return the run, its record and what the ranks printed."""
    words = flags(TINY, f"--train-iters {STEPS} --global-batch-size 4 --log-interval 1", *own)
    run = run_arm(ranks, "O", world, [*words, "--start-folder", str(folder / "start-0")])
    files = sorted(Path(ranks.logs).glob(f"job{ranks.jobs:03d}-rank*.log"))
    reader = RunFolder(folder)
    reader.refresh()
    (start,) = reader.starts
    return run, start, "\n".join(file.read_text() for file in files)


def check_steps(run: Run, start: Start, printed: str) -> None:
    """Check that each step's record has the values of `train_step`, and that its line shows the record."""
    assert start.unreadable == 0
    assert [step["iteration"] for step in start.steps] == list(range(1, STEPS + 1))
    for step, expected in zip(start.steps, run.curve, strict=True):
        assert step["losses"]["lm loss"] == pytest.approx(expected["loss"], rel=FLOAT32)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=FLOAT32)
        assert step["steps"] == 1 and step["skipped"] == 0 and step["tokens"] == 4 * 64
        assert step["samples"] == 4 * step["iteration"]
        assert record.step_line(step) in printed.splitlines()
    learning_rates = re.findall(r"learning rate: (\S+) ", printed)
    assert [f"{step['learning_rate']:.6E}" for step in start.steps] == learning_rates[-STEPS:]


def test_records_of_a_pipeline_in_segments(ranks: RankPool, tmp_path: Path) -> None:
    run, start, printed = recorded(ranks, tmp_path, 2, PP2, "--seq1f1b-splits 2", "--peak-tflops-per-gpu 0.001")
    check_steps(run, start, printed)
    assert start.run is not None and start.run["world_size"] == 2 and start.run["layout"]["pipeline"] == 2
    assert start.memory is not None and len(start.memory["peak_bytes"]) == 2
    assert start.arguments["seq1f1b_splits"] == 2 and start.arguments["longseq_patches"]
    # The files of the first two steps hold every action of both ranks, from which the simulator's class has the bubble.
    folders = sorted((start.folder / "timeline").iterdir())
    assert [folder.name for folder in folders] == ["step-00000001", "step-00000002"]
    for folder, step in zip(folders, start.steps, strict=False):
        measured = read_measured(folder)  # from Unix times, of which float64 resolves 2^-22 s
        rounding = 2 * len(measured.spans[0]) * 2**-22 / measured.makespan
        assert step["bubble"] == pytest.approx(measured.bubble, abs=rounding)
        assert 0 < step["bubble"] < 1
    for step in start.steps:
        speed = step["tokens"] / step["seconds"]
        assert step["tokens_per_second_per_gpu"] == pytest.approx(speed / 2)
        assert step["mfu"] == pytest.approx(step["tflops_per_gpu"] / 0.001)
    assert start.steps[-1]["memory_bytes"] >= max(start.memory["peak_bytes"])


def test_upstreams_schedule_has_no_bubble_and_no_timeline(ranks: RankPool, tmp_path: Path) -> None:
    run, start, printed = recorded(ranks, tmp_path, 2, PP2)
    check_steps(run, start, printed)
    assert not any("bubble" in step or "mfu" in step for step in start.steps)
    assert not (start.folder / "timeline").exists()


@pytest.mark.slow
def test_an_interval_is_a_mean_and_an_unwritable_record_stops_no_training(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "start-0/steps.jsonl").mkdir(parents=True)  # it cannot be opened
    run, _, printed = recorded(ranks, tmp_path, 1, "--log-interval 2")
    assert len(run.curve) == STEPS
    assert printed.count("later steps are logged without it") == 1
    found = re.findall(r"iteration +(\d+)/ +4 \| lm loss: (\S+) ", printed)
    losses = [step["loss"] for step in run.curve]
    expected = {"1": losses[0], "2": losses[1], "4": (losses[2] + losses[3]) / 2}
    assert {step: float(loss) for step, loss in found} == pytest.approx(expected, rel=1e-5)
