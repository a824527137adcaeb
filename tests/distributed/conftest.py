"""Runs that several files compare with: a seed checkpoint and upstream's own run, once per model."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import sharding_bed
from tests.distributed.equality import SNAPSHOTS, Start
from tests.distributed.flags import EVALUATED, TINY, flags
from tests.pool import RankPool
from tests.regression.arm import Run, run_arm


@pytest.fixture(scope="session")
def start(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Return a function that makes (once per model) a seed checkpoint and returns the flags of a run from it."""

    @functools.cache
    def from_seed(model: str) -> list[str]:
        folder: Path = tmp_path_factory.mktemp("seed")
        base = [flag for flag in flags(TINY) if not ("--tied" in model and flag.startswith("--untie"))]
        base += flags(EVALUATED, model.replace("--tied", ""))
        still = flags("--train-iters 1 --lr 0 --min-lr 0 --weight-decay 0 --eval-iters 0")
        run_arm(ranks, "U", 1, base + still, folder, float64=True)
        return [*base, "--load", str(folder), *flags("--finetune --no-load-optim --no-load-rng")]

    return from_seed


@pytest.fixture(scope="session")
def upstream(ranks: RankPool, start: Start) -> Callable[[str], Run]:
    """Return a function that makes (once per model) upstream's own run."""

    @functools.cache
    def run(model: str, twist: str | None = None) -> Run:
        return run_arm(ranks, "U", 1, start(model), float64=True, snapshots=SNAPSHOTS, mutant=twist)

    return run


@pytest.fixture(scope="session")
def sharded_run(ranks: RankPool) -> Callable[[str], list[sharding_bed.Seen]]:
    """Return a function that trains (once per case) under a sharding strategy, and what every rank noted."""
    return functools.cache(functools.partial(sharding_bed.train, ranks))
