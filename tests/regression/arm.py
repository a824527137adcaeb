"""Train arm U (upstream) or arm O (this project) on a pool of ranks, and record every step."""

import dataclasses
import importlib
import platform
import queue
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from tests.pool import RankPool
from tests.regression.record import Batch, Recorder, Step, merge
from tests.regression.snapshot import Part, Snapshot, assemble

Arm = Literal["U", "O"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        curve: one record per step, joined over the ranks.
        folder: folder of its checkpoints (`iter_NNNNNNN`).
        batches: the batches of every step, if requested.
        header: versions, applied patches and their digest.
        snapshots: weights and optimizer states after the requested iterations.
        planted: how often the planted error acted, summed over all ranks.
        seconds: wall-clock time of the run.
    """

    curve: list[Step]
    folder: Path | None
    batches: list[list[Batch]]
    header: dict[str, Any]
    snapshots: dict[int, Snapshot]
    planted: int
    seconds: float

    def checkpoint(self, iteration: int) -> Path:
        """Return the folder of the checkpoint after `iteration` steps."""
        assert self.folder is not None, "this run saves no checkpoints"
        return self.folder / f"iter_{iteration:07d}"


@dataclasses.dataclass(frozen=True)
class Job:
    """The task of one rank. The fields are the arguments of `run_arm`."""

    arm: Arm
    flags: tuple[str, ...]
    float64: bool = False
    mutant: str | None = None
    keep_batches: bool = False
    snapshots: tuple[int, ...] = ()
    script: str | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one rank, see `Run`."""

    steps: list[Step]
    batches: list[list[Batch]]
    parts: dict[int, list[Part]]
    header: dict[str, Any]
    planted: int


def run_arm(
    pool: RankPool,
    arm: Arm,
    world_size: int,
    flags: list[str],
    folder: Path | None = None,
    *,
    float64: bool = False,
    mutant: str | None = None,
    keep_batches: bool = False,
    snapshots: tuple[int, ...] = (),
    script: str | None = None,
    timeout: float = 400.0,
) -> Run:
    """Train with `pretrain` on `world_size` ranks.

    Args:
        pool: provides the ranks.
        arm: U applies the cpu and local patches only, O applies all patches that the flags select.
        world_size: number of ranks.
        flags: command-line flags of upstream and, in arm O, of this project.
        folder: folder for checkpoints, which are written as `--save-interval` says and at the end. None saves nothing.
        float64: run in double precision.
        mutant: `module:function` of a planted error, which is a context manager.
        keep_batches: also return the batches.
        snapshots: iterations after which weights and optimizer states are kept. The iteration of a loaded checkpoint
            gives its state as loaded.
        script: `module:function` of a context manager in which the script does something else than ours.
        timeout: in seconds.

    Raises:
        RankFailure: a rank raised an exception, died or hung.
        RankDisagreement: ranks disagree on a value that all must share.
    """
    start = time.monotonic()
    if folder is not None:
        flags = [*flags, "--save", str(folder)]
    job = Job(arm, tuple(flags), float64, mutant, keep_batches, snapshots, script)
    results: list[Result] = pool.run(world_size, train_on_this_rank, job, timeout=timeout)
    return Run(
        curve=merge([result.steps for result in results]),
        folder=folder,
        batches=results[0].batches,
        header=results[0].header,
        snapshots={at: assemble([result.parts[at] for result in results]) for at in results[0].parts},
        planted=sum(result.planted for result in results),
        seconds=time.monotonic() - start,
    )


@contextmanager
def patched(arm: Arm) -> Iterator[Any]:
    """Apply the patches of an arm, and yield what was applied."""
    import patches
    from patches.engine import session
    from tests import ledgers

    if arm == "O":
        yield patches.start()
    else:
        floor = session.select(ledgers.of_systems("cpu", "local"), None)
        with patches.applied(floor) as applied:
            yield applied


def train_on_this_rank(job: Job) -> Result:
    """Train on one rank of the pool."""
    recorder = Recorder(job.keep_batches, job.snapshots)
    sys.argv = ["pretrain_gpt.py", *job.flags]
    with ExitStack() as stack:
        stack.enter_context(patched(job.arm))
        if job.float64:
            from tests.regression.float64 import double_precision

            stack.enter_context(double_precision())
        planted = stack.enter_context(_context(job.mutant)) if job.mutant else None
        if job.script:
            stack.enter_context(_context(job.script))
        if "--async-save" not in job.flags:
            stack.enter_context(_write_results_in_this_process())
        from megatron.training import training

        from megatron.longseq.pretrain_gpt import main

        training.train_step = recorder.wrap(training.train_step)
        with _early_end():
            main()
        header = _header(job.arm)
    return Result(recorder.steps, recorder.batches, recorder.parts, header, planted.times if planted else 0)


def _context(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)()


@contextmanager
def _early_end() -> Iterator[None]:
    """Treat the `sys.exit(0)` with which upstream ends after `--exit-interval` as a normal end."""
    try:
        yield
    except SystemExit as end:
        if end.code not in (0, None):
            raise RuntimeError(f"upstream ended with status {end.code}") from end


@contextmanager
def _write_results_in_this_process() -> Iterator[None]:
    """Give upstream's checkpoint writer a queue of this process for its results.

    Upstream would start another Python process on every rank for the queue, which takes longer than the whole run.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async as writer

    before, writer._results_queue = writer._results_queue, queue.Queue()
    try:
        yield
    finally:
        writer._results_queue = before


def _header(arm: Arm) -> dict[str, Any]:
    from patches.engine.digest import combined
    from patches.engine.session import SESSION

    applied = sorted(SESSION.hashes)
    foreign = [name for name in applied if not name.startswith(("cpu.", "local."))]
    if arm == "U" and foreign:
        raise RuntimeError(f"arm U must be upstream alone, but the patches {', '.join(foreign)} are applied")
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "patches": applied,
        "digest": combined(SESSION.hashes),
    }
