"""A checkpoint of any sharding strategy resumes under any other, as upstream would without an interruption.

A chain of short runs, each under another strategy, number of ranks or layout, hands its checkpoint on to the next one.
The reference is one run of upstream's on one rank.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.distributed.equality import RELATIVE, assert_steps_equal
from tests.distributed.flags import PP2, SHALLOW, TINY, TP2, flags
from tests.pool import RankPool
from tests.regression.arm import Arm, Run, run_arm
from tests.regression.snapshot import Snapshot
from tests.regression.tensors import logical_tensors

ASYNC = "--overlap-grad-reduce --overlap-param-gather"
PAIRS = "--paro-group-size 2"
BUCKETS = "--ddp-bucket-size 20000"
RESHARDABLE = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"


@dataclass(frozen=True)
class Link:
    """A run of the chain."""

    arm: Arm
    ranks: int
    layout: str


CHAIN = {
    "upstream, DP 2": Link("U", 2, RESHARDABLE),
    "NIG": Link("O", 4, f"--paro NIG {PAIRS} {ASYNC}"),
    "III, DP 2": Link("O", 2, "--paro III --paro-group-size 2"),
    "GGG": Link("O", 4, f"--paro GGG {PAIRS} {ASYNC}"),
    "NNN": Link("O", 4, f"--paro NNN {PAIRS}"),
    "IGG, TP 2": Link("O", 4, f"--paro IGG --paro-group-size 1 {TP2} {ASYNC}"),
    "NNI": Link("O", 4, f"--paro NNI {PAIRS} {ASYNC}"),
    "ING, three ranks": Link("O", 3, f"--paro ING --paro-group-size 3 {ASYNC}"),
    "NGG, PP 2": Link("O", 4, f"--paro NGG {PAIRS} {PP2} {ASYNC}"),
    "IIG": Link("O", 4, f"--paro IIG {PAIRS} {ASYNC}"),
    "NNG, one group": Link("O", 4, f"--paro NNG --paro-group-size 4 {ASYNC}"),
    "NII": Link("O", 4, f"--paro NII {PAIRS}"),
    "upstream, one rank": Link("U", 1, RESHARDABLE),
}
NAMES = list(CHAIN)
# By default the chain leaves out strategies that other default tests compare with upstream: GGG, IIG and IGG in
# test_sharding.py and in regression cases, NNG with zero bubble, ING in test_sharding_partial.py.
SLOW = ["GGG", "IGG, TP 2", "ING, three ranks", "NNG, one group"]
STEPS = f"{TINY} {SHALLOW} --global-batch-size 12 --train-iters {len(CHAIN) + 1} --save-interval 1 {BUCKETS}"
RESUMED = ["IIG"]


def cases(slow: Iterable[str]) -> list[Any]:
    """Return all names as parameters, some of them marked slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in NAMES]


@dataclass(frozen=True)
class Chain:
    """The links that run in this session, and a function that runs the chain up to a link, each link once."""

    names: list[str]
    run: Callable[[str], Run]

    def steps_before(self, name: str) -> int:
        """Return the steps in the checkpoint that a link loads. Each run makes two, and saves between them."""
        return self.names.index(name)

    def loaded(self, name: str) -> Run | None:
        """Return the run whose checkpoint a link loads."""
        at = self.names.index(name)
        return self.run(self.names[at - 1]) if at else None


def train(ranks: RankPool, link: Link, folder: Path | None, loaded: Path | None, first: int, steps: int) -> Run:
    """Run a link from a checkpoint of `first` steps, and keep what it has loaded."""
    line = flags(STEPS, link.layout, f"--exit-interval {first + steps}")
    if loaded is not None:
        line += ["--load", str(loaded), "--ckpt-step", str(first)]
    return run_arm(ranks, link.arm, link.ranks, line, folder, float64=True, snapshots=(first,) if first else ())


@pytest.fixture(scope="module")
def chain(ranks: RankPool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Return the chain, without its slow links if only default tests run."""
    folders = tmp_path_factory.mktemp("chain")
    is_short = request.config.option.markexpr == "not slow"
    names = [name for name in NAMES if not (is_short and name in SLOW)]

    @functools.cache
    def run(name: str) -> Run:
        loaded, at = whole.loaded(name), whole.steps_before(name)
        return train(ranks, CHAIN[name], folders / str(at), loaded and loaded.folder, at, 2)

    whole = Chain(names, run)
    return whole


@pytest.fixture(scope="module")
def undisturbed(ranks: RankPool, chain: Chain) -> Run:
    """Return upstream's run on one rank, without a break."""
    return run_arm(ranks, "U", 1, flags(STEPS), float64=True, snapshots=(len(chain.names) + 1,))


def assert_loaded(loaded: Snapshot, checkpoint: Path) -> None:
    """Require that weights and optimizer states, right after loading, have the bits that were saved."""
    saved = logical_tensors(checkpoint)
    assert loaded.tensors.keys() == saved.keys() and not loaded.differing_copies
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in saved)
    assert [name for name, array in loaded.tensors.items() if not numpy.array_equal(array, saved[name].numpy())] == []


@pytest.mark.parametrize("name", cases(SLOW))
def test_what_one_strategy_saves_another_goes_on_with(
    chain: Chain, undisturbed: Run, name: str, tell: Callable[[str], None]
) -> None:
    at, run, before = chain.steps_before(name), chain.run(name), chain.loaded(name)
    apart = assert_steps_equal(run.curve, undisturbed.curve[at : at + 2])
    tell(f"checkpoint {at} goes on under {name}: largest relative difference of loss and norm {apart:.1e}")
    if before is not None:
        assert_loaded(run.snapshots[at], before.checkpoint(at))


def test_the_chain_ends_where_the_undisturbed_run_does(chain: Chain, undisturbed: Run) -> None:
    last = len(chain.names) + 1
    ours, theirs = logical_tensors(chain.run(chain.names[-1]).checkpoint(last)), undisturbed.snapshots[last].tensors
    main = {name for name in ours if name.startswith("optimizer.state.param.")}  # upstream's plain optimizer has none
    assert ours.keys() - main == theirs.keys()
    for name, expected in theirs.items():
        assert numpy.linalg.norm(ours[name].numpy() - expected) <= 10 * RELATIVE * numpy.linalg.norm(expected), name


@pytest.mark.parametrize("name", cases(set(NAMES) - set(RESUMED)))
def test_resumes_bitwise_under_the_same_strategy(ranks: RankPool, chain: Chain, tmp_path: Path, name: str) -> None:
    run, between = chain.run(name), chain.steps_before(name) + 1
    resumed = train(ranks, CHAIN[name], tmp_path, run.folder, between, 1)
    assert resumed.curve == run.curve[1:]
    one, other = (logical_tensors(each.checkpoint(between + 1)) for each in (run, resumed))
    assert one.keys() == other.keys() and [name for name in one if not one[name].equal(other[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saver", "loader"),
    [*((saver, "GGG") for saver in NAMES), *(("IIG", loader) for loader in NAMES if loader != "GGG")],
)
def test_all_save_for_one_and_one_for_all(
    ranks: RankPool, chain: Chain, undisturbed: Run, saver: str, loader: str
) -> None:
    saved, between = chain.run(saver), chain.steps_before(saver) + 1
    run = train(ranks, CHAIN[loader], None, saved.folder, between, 1)
    assert_loaded(run.snapshots[between], saved.checkpoint(between))
    assert_steps_equal(run.curve, undisturbed.curve[between : between + 1])
