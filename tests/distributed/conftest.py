"""Fixtures of runs that several files compare with: seed checkpoints and upstream's runs, once per session."""

import functools
from collections.abc import Callable

import pytest

from tests.distributed import sharding_bed
from tests.distributed.equality import SNAPSHOTS, Equal, Start, assert_equal
from tests.distributed.flags import EVALUATED, TINY, flags
from tests.pool import RankPool
from tests.regression.arm import Run, run_arm
from tests.regression.trainings import Trainings

TRAIN_ONLY = "--train-only"
# Flags that change the parameters.
SHAPES = ("--tied", "--num-layers", "--num-query-groups", "--num-experts", "--position-embedding-type")


@pytest.fixture(scope="session")
def trainings(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """Return the session's runs that are made once."""
    return Trainings(ranks, tmp_path_factory.mktemp("trainings"))


@pytest.fixture(scope="session")
def start(trainings: Trainings) -> Start:
    """Return a function from a model's flags (`--tied`: with a tied embedding) to those of a run from its seed."""

    def from_seed(model: str) -> list[str]:
        tiny = [flag for flag in flags(TINY) if not ("--tied" in model and flag.startswith("--untie"))]
        own = flags(model.replace("--tied", ""))
        shaped = without_partial_training(own) * any(shape in model for shape in SHAPES)
        return [*tiny, *flags(EVALUATED), *own, *trainings.load(*tiny, *shaped)]

    return from_seed


def without_partial_training(own: list[str]) -> list[str]:
    """Return flags without `--train-only PATTERN`: a seed needs every state, and upstream saves a layer's or none."""
    at = own.index(TRAIN_ONLY) if TRAIN_ONLY in own else len(own)
    return own[:at] + own[at + 2 :]


@pytest.fixture(scope="session")
def upstream(trainings: Trainings, start: Start) -> Callable[..., Run]:
    """Return a function that makes (once) upstream's own run of a model on one rank, under a variant."""

    def run(model: str, variant: str | None = None) -> Run:
        return trainings.once("U", 1, start(model), float64=True, snapshots=SNAPSHOTS, mutant=variant)

    return run


@pytest.fixture
def equal(ranks: RankPool, start: Start, upstream: Callable[..., Run], tell: Callable[[str], None]) -> Equal:
    """Return a function that trains and holds the run to upstream's own: see `equality.Equal`."""

    def check(
        name: str,
        world: int,
        model: str,
        own: str,
        variant: str | None = None,
        theirs: str | None = None,
    ) -> Run:
        run = run_arm(ranks, "O", world, start(model) + flags(own), float64=True, snapshots=SNAPSHOTS, mutant=variant)
        assert_equal(run, upstream(model, theirs or variant), name, tell)
        return run

    return check


@pytest.fixture(scope="session")
def sharded_run(ranks: RankPool) -> Callable[[str], list[sharding_bed.RankRecord]]:
    """Return a function that trains (once per case) under a sharding strategy, and what every rank noted."""
    return functools.cache(functools.partial(sharding_bed.train, ranks))
