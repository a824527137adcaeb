"""One training run on a pool of ranks: arm U (upstream's wheel) or arm O (ours), recorded step by step."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from tests.pool import RankPool
from tests.regression.record import Recorder, Step, merge

Arm = Literal["U", "O"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        curve: one record per step, joined over the ranks.
        folder: where its checkpoints lie (`iter_NNNNNNN`).
        food: the batches of every step, when they were asked for.
        header: what ran: versions, patches applied and their digest.
    """

    curve: list[Step]
    folder: Path | None
    food: list[list[dict[str, torch.Tensor]]]
    header: dict[str, Any]

    def checkpoint(self, iteration: int) -> Path:
        """Return the folder of the checkpoint after `iteration` steps."""
        assert self.folder is not None, "this run was told to save nothing"
        return self.folder / f"iter_{iteration:07d}"


def run_arm(
    pool: RankPool,
    arm: Arm,
    world_size: int,
    flags: list[str],
    folder: Path | None = None,
    *,
    float64: bool = False,
    mutant: str | None = None,
    keep_food: bool = False,
    timeout: float = 300.0,
) -> Run:
    """Train through `pretrain` on `world_size` ranks and return the run.

    Args:
        pool: where the ranks come from.
        arm: U runs the wheel with the cpu and local patches alone; O opens the whole ledger.
        world_size: ranks.
        flags: upstream's and (arm O) our command-line flags.
        folder: checkpoints are written here, when the flags say (`--save-interval`) and at the end; None: nowhere.
        float64: run in double precision.
        mutant: `module:function` of a planted error (a context manager), to prove that the comparison sees it.
        keep_food: return the batches too.
        timeout: seconds.
    """
    if folder is not None:
        flags = [*flags, "--save", str(folder)]
    job = (arm, flags, float64, mutant, keep_food)
    results = pool.run(world_size, train_on_this_rank, *job, timeout=timeout)
    return Run(merge([steps for steps, _, _ in results]), folder, results[0][1], results[0][2])


@contextmanager
def patched(arm: Arm) -> Iterator[Any]:
    """Open the ledger as the arm has it; yields what was applied."""
    import patches
    from patches import ledger, session

    if arm == "O":
        yield patches.start()
    else:
        floor = [record for record in ledger.of_systems("cpu", "local") if session.wanted(record, None)]
        with patches.applied(floor) as applied:
            yield applied


def _to_the_end(main: Callable[[], None]) -> None:
    """Call `main`; upstream leaves an `--exit-interval` through `sys.exit(0)`, which is an end like any other."""
    try:
        main()
    except SystemExit as end:
        if end.code not in (0, None):
            raise


def train_on_this_rank(
    arm: Arm, flags: list[str], float64: bool, mutant: str | None, keep_food: bool
) -> tuple[list[Step], list[Any], dict[str, Any]]:
    """Run in a rank of the pool: train, and return (steps, food, header)."""
    import importlib

    recorder = Recorder(keep_food)
    sys.argv = ["pretrain_gpt.py", *flags]
    with ExitStack() as stack:
        stack.enter_context(patched(arm))
        if float64:
            from tests.regression.float64 import double_precision

            stack.enter_context(double_precision())
        if mutant:
            module, name = mutant.split(":")
            stack.enter_context(getattr(importlib.import_module(module), name)())
        from megatron.training import training

        from megatron.longseq.gpt import main
        from patches.digest import combined
        from patches.session import SESSION

        training.train_step = recorder.wrap(training.train_step)
        _to_the_end(main)
        header = {"torch": torch.__version__, "patches": sorted(SESSION.hashes), "digest": combined(SESSION.hashes)}
    return recorder.steps, recorder.food, header
