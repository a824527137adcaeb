"""The faults of the suite, and what must follow: the run ends, nothing is left, and the resumed run loses nothing."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.flags import TINY, flags
from tests.faults.plant import Fault, losses, train
from tests.pool import RankFailure, RankPool

STEPS, SAVED = 5, 2  # a checkpoint every two steps; faults come in step 4, or in the save after it
FAULTY = 4
TWO = "--num-layers 2 --pipeline-model-parallel-size 2 --seq1f1b-splits 2"
SYSTEMS = {
    # Two stages of segments, each spread over two context-parallel ranks, over which the optimizer is sharded.
    "all": (
        4,
        "--num-layers 2 --pipeline-model-parallel-size 2 --seq1f1b-splits 2 --context-parallel-size 2 --paro NIG "
        "--transformer-impl local --no-rope-fusion --overlap-grad-reduce --cross-entropy-chunk-tokens 16",
    ),
    "upstream": (4, "--pipeline-model-parallel-size 4"),
    "two": (2, TWO),
    "background": (2, f"{TWO} --async-save"),
}
RUN = f"--train-iters {STEPS} --save-interval {SAVED} --exit-signal-handler --rerun-mode disabled"
LIMITS = "--stall-timeout-minutes 0.25 --first-step-timeout-minutes 4"


@dataclass(frozen=True)
class Outcome:
    """What followed a fault.

    Attributes:
        text: the message of the run that had the fault; empty if it ended by itself.
        logs: output of all its ranks.
        lost_steps: steps of the undisturbed run whose loss the disturbed and the resumed run together do not have, or
            have differently.
        resumed_from: the step after which the resumed run began.
    """

    text: str
    logs: str
    lost_steps: int
    resumed_from: int


class FaultBed:
    """Runs faults on ranks, beside an undisturbed run of the same flags.

    Args:
        ranks: the pool.
        folder: for the runs.
    """

    def __init__(self, ranks: RankPool, folder: Path) -> None:
        self.ranks, self.folder, self.count = ranks, folder, 0
        self.note_lost: Callable[[int], None] = lambda steps: None
        self._expected: dict[str, dict[int, float]] = {}

    def line(self, system: str) -> list[str]:
        """Return the flags of a system's run."""
        return flags(TINY, "--global-batch-size 8", SYSTEMS[system][1], RUN, LIMITS)

    def expected(self, system: str) -> dict[int, float]:
        """Return the losses of the undisturbed run, made once."""
        if system not in self._expected:
            folder = self.folder / f"undisturbed-{system}"
            train(self.ranks, SYSTEMS[system][0], self.line(system), folder)
            self._expected[system] = {step: values[-1] for step, values in losses(folder).items()}
            assert list(self._expected[system]) == list(range(1, STEPS + 1))
        return self._expected[system]

    def run(self, system: str, fault: Fault, folder: Path | None = None) -> tuple[Path, str, str]:
        """Run with a fault, and return its folder, its message and the output of its ranks."""
        self.count += 1
        folder, text = folder or self.folder / f"run{self.count}", ""
        try:
            train(self.ranks, SYSTEMS[system][0], self.line(system), folder, fault)
        except RankFailure as failure:
            text = str(failure)
        return folder, text, self.logs(SYSTEMS[system][0])

    def copy(self, system: str, step: int) -> Path:
        """Return a folder as the undisturbed run left it after its save of a step."""
        self.expected(system)
        self.count += 1
        folder = self.folder / f"copy{self.count}"
        shutil.copytree(self.folder / f"undisturbed-{system}", folder)
        checkpoints = folder / "checkpoints"
        for later in checkpoints.glob("iter_*"):
            if int(later.name.removeprefix("iter_")) > step:
                shutil.rmtree(later)
        (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))
        return folder

    def logs(self, world: int) -> str:
        """Return the output of the ranks of the last job."""
        files = [self.ranks.logs / f"job{self.ranks.jobs:03d}-rank{rank}.log" for rank in range(world)]
        return "\n".join(file.read_text(errors="replace") for file in files if file.exists())

    def survive(self, system: str, fault: Fault) -> Outcome:
        """Run with a fault, resume without it, and compare with the undisturbed run.

        Raises:
            RankFailure: the resumed run failed.
        """
        expected = self.expected(system)
        folder, text, logs = self.run(system, fault)
        before = losses(folder)
        train(self.ranks, SYSTEMS[system][0], self.line(system), folder)
        lost = lost_steps(expected, losses(folder))
        self.note_lost(lost)
        return Outcome(text, logs, lost, _first_repeated(before, losses(folder)) - 1)


def lost_steps(expected: dict[int, float], found: dict[int, list[float]]) -> int:
    """Count the steps that are missing, or whose loss differs in one of the runs that made them."""
    return sum(not found.get(step) or any(one != loss for one in found[step]) for step, loss in expected.items())


def _first_repeated(before: dict[int, list[float]], after: dict[int, list[float]]) -> int:
    """Return the first step that the resumed run made."""
    return min((step for step, all_of_them in after.items() if len(all_of_them) > len(before.get(step, ()))), default=0)


@contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[bool]:
    """Mount a small file system on a folder; yield False if this process must not.

    Args:
        folder: the mount point.
        kibibytes: its size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def resize(folder: Path, kibibytes: int) -> None:
    """Change the size of a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,size={kibibytes}k", str(folder)], check=True)


def damage(file: Path, how: str) -> None:
    """Damage a file: "truncated" to its first half, "flipped" in one bit in its middle, or "empty"."""
    content = bytearray(file.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    else:
        content[len(content) // 2] ^= 0x10
    with contextlib.suppress(PermissionError):
        file.chmod(0o644)
    file.write_bytes(content)
