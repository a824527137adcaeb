"""However a run ends, its ranks and their data workers end too."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.flags import TINY, flags
from tests.faults.test_killed_rank import ROOT, ranks_of, training_rank

LIMIT = 90  # seconds, for a machine that is busy with other things; a run that hangs never ends
SYSTEMS = {
    "upstream": (1, ""),
    "upstream-cyclic": (1, "--dataloader-type cyclic --eval-iters 1 --eval-interval 2"),
    "seq1f1b-pp-eval": (2, "--pipeline-model-parallel-size 2 --seq1f1b-splits 2 --eval-iters 1 --eval-interval 2"),
    "zero-bubble": (2, "--pipeline-model-parallel-size 2 --seq1f1b-splits 2 --zero-bubble"),
    "virtual": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --seq1f1b-splits 2",
    ),
    "usp-seq1f1b": (2, "--transformer-impl local --context-parallel-size 2 --seq1f1b-splits 2 --no-rope-fusion"),
    "paro": (2, "--paro NIG --overlap-grad-reduce --overlap-param-gather"),
}
ENDS = ("finish", "interval", "term-rank", "term-launcher", "save-and-stop", "raise", "kill")
RAISES = """
import sys

if __name__ == "__main__":
    sys.path.insert(0, {root!r})
    import patches

    patches.start()
    import os

    from megatron.longseq import pretrain_gpt

    calls, step = [], pretrain_gpt.forward_step

    def forward_step(*args, **kwargs):
        calls.append(None)
        if len(calls) == 20 and os.environ["RANK"] == "0":
            raise RuntimeError("planted")
        return step(*args, **kwargs)

    pretrain_gpt.forward_step = forward_step
    pretrain_gpt.main()
"""


def _launch(folder: Path, system: str, end: str, handler: bool) -> subprocess.Popen[bytes]:
    """Start a run with upstream's default of two data workers; its output goes to `folder`/log."""
    ranks, own = SYSTEMS[system]
    steps = 4 if end == "finish" else 1_000_000
    words = flags(TINY, own, f"--num-workers 2 --train-iters {steps} --log-interval 1 --save-interval 1000000")
    words += ["--save", str(folder / "checkpoints"), *(["--exit-signal-handler"] if handler else [])]
    words += flags("--exit-interval 3") if end == "interval" else []
    script = "examples/pretrain_gpt.py"
    if end == "raise":
        script = str(folder / "raises.py")
        Path(script).write_text(RAISES.format(root=str(ROOT)))
    command = ["bash", "scripts/launch.sh", "--local", "--nproc", str(ranks), "--run-dir", str(folder)]
    environment = {**os.environ, "VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--", script, *words],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(folder: Path, process: subprocess.Popen[bytes], output: str) -> None:
    """Wait until the output of the run matches, or the run has ended."""
    while process.poll() is None and not re.search(output, (folder / "log").read_text(errors="replace")):
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes], folder: Path, end: str, ranks: int) -> None:
    if end == "term-rank":
        training_rank(folder, 0).send_signal(signal.SIGTERM)
    elif end == "term-launcher":
        process.send_signal(signal.SIGTERM)
    elif end == "save-and-stop":
        process.send_signal(signal.SIGUSR1)
    elif end == "kill":
        training_rank(folder, ranks - 1).kill()


def _left(folder: Path, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return what still runs after a generous time; workers are forks with their rank's command line."""
    deadline = time.monotonic() + LIMIT
    while ranks_of(folder) or process.poll() is None:
        if time.monotonic() > deadline:
            return ranks_of(folder)
        time.sleep(0.1)
    return []


def _matrix() -> list[object]:
    """Return the cases: all ends of one run that has most parts, and of other systems what their own parts decide."""
    cases = [("seq1f1b-pp-eval", end, True) for end in ENDS]
    cases += [("upstream-cyclic", "finish", True), ("virtual", "raise", True), ("zero-bubble", "finish", True)]
    cases += [("paro", end, True) for end in ("finish", "save-and-stop", "raise")]
    cases += [("usp-seq1f1b", "interval", True), ("upstream", "kill", True)]
    # Without --exit-signal-handler, a signal ends the run as it ends any other program.
    cases += [("seq1f1b-pp-eval", end, False) for end in ("term-rank", "save-and-stop")]
    return [pytest.param(*case, id="-".join(case[:2]) + ("" if case[2] else "-default")) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("system", "end", "handler"), _matrix())
def test_no_process_is_left(system: str, end: str, handler: bool, tmp_path: Path) -> None:
    folder = tmp_path
    process = _launch(folder, system, end, handler)
    try:
        _wait(folder, process, {"finish": r"iteration +4/", "raise": "planted"}.get(end, r"iteration +2/"))
        _end(process, folder, end, SYSTEMS[system][0])
        left = _left(folder, process)
    finally:
        for stray in ranks_of(folder):
            stray.kill()
        process.kill()
    output = (folder / "log").read_text(errors="replace")
    assert not left, f"{[(stray.pid, stray.ppid()) for stray in left]} are left\n{output[-3000:]}"
    is_saved = (folder / "checkpoints/latest_checkpointed_iteration.txt").exists()
    if end in ("finish", "interval") or (handler and end in ("term-rank", "save-and-stop")):
        assert process.returncode == 0 and is_saved, output[-3000:]
    else:
        assert process.returncode != 0, output[-3000:]
