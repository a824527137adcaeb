"""Every layout that upstream offers on CPU equals the single-process run step for step.

In float64 the layouts differ by reassociation alone (1e-9 relative is asked, 1e-13 is seen). In float32 and bf16 the
bound is three times the single-process run's own rounding error, measured in the same session against float64 from the
same weights.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.equality import RELATIVE
from tests.distributed.flags import EVALUATED, TINY, flags
from tests.pool import RankPool
from tests.regression.arm import Run, run_arm

TP = "--tensor-model-parallel-size 2"
PP = "--pipeline-model-parallel-size 2"
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn mlp"

LAYOUTS = {
    "TP 2": (2, TP),
    "TP 2, sequence parallel": (2, f"{TP} --sequence-parallel"),
    "PP 2": (2, PP),
    "PP 4": (4, "--pipeline-model-parallel-size 4"),
    "PP 2, two virtual stages": (2, f"{PP} --num-layers-per-virtual-pipeline-stage 1"),
    "DP 2": (2, ""),
    "DP 2, overlapped gradients": (2, "--overlap-grad-reduce"),
    "DP 2, distributed optimizer": (2, DISTRIBUTED_OPTIMIZER),
    "DP 2, distributed optimizer, overlap": (2, f"{DISTRIBUTED_OPTIMIZER} {OVERLAP}"),
    "TP 2 x PP 2": (4, f"{TP} {PP}"),
    "TP 2 x PP 2, sequence parallel": (4, f"{TP} {PP} --sequence-parallel"),
    "PP 2 x DP 2": (4, PP),
    "PP 2 x DP 2, distributed optimizer, overlap": (4, f"{PP} {DISTRIBUTED_OPTIMIZER} {OVERLAP}"),
    "full recompute": (1, FULL),
    "full recompute, PP 2": (2, f"{FULL} {PP}"),
    "selective recompute": (1, SELECTIVE),
    "selective recompute, TP 2, sequence parallel": (2, f"{SELECTIVE} {TP} --sequence-parallel"),
}
# What a regression case or a neighbour above proves, too; -m slow runs it.
SLOW = {
    "TP 2",  # TP 2 x PP 2, sequence parallel, tied
    "TP 2, sequence parallel",  # tensor-sequence.toml, single-precision.toml, half-precision.toml
    "PP 2",  # pipeline.toml
    "PP 2, two virtual stages",  # tied-virtual-stages.toml
    "DP 2, distributed optimizer",  # data-parallel.toml, data-overlap.toml
    "DP 2, distributed optimizer, overlap",  # data-parallel.toml
    "PP 4",  # tied; pipeline.toml
    "DP 2",  # with overlapped gradients
    "TP 2 x PP 2",  # with sequence parallelism, tied
    "TP 2 x PP 2, sequence parallel",  # tied; tensor-sequence.toml, pipeline.toml
    "PP 2 x DP 2, distributed optimizer, overlap",  # tied; data-parallel.toml, pipeline.toml
    "PP 2 x DP 2",  # with distributed optimizer and overlap, tied
    "full recompute",  # recompute.toml
    "selective recompute",  # with TP 2, sequence parallel
}
TIED = {"PP 4", "TP 2 x PP 2, sequence parallel", "PP 2 x DP 2, distributed optimizer, overlap"}
NOISY_SLOW = {"TP 2, sequence parallel", "TP 2 x PP 2"}  # single-precision.toml, half-precision.toml
NOISY = ["TP 2, sequence parallel", "PP 2", "DP 2, distributed optimizer, overlap", "TP 2 x PP 2"]
ARITHMETIC = {"float64": "", "float32": "", "bf16": "--bf16"}
STEPS = 3  # those of EVALUATED


def in_float64() -> Iterator[Any]:
    """Every layout untied, and tied where it touches the embeddings (recomputation does not)."""
    for tied, kind in ((False, "untied"), (True, "tied")):
        for name in LAYOUTS:
            slow = name not in TIED if tied else name in SLOW
            if not (tied and "recompute" in name):
                yield pytest.param(name, tied, marks=[pytest.mark.slow] * slow, id=f"{name}-{kind}")


Start = Callable[[str, bool], list[str]]


@pytest.fixture(scope="module")
def start(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Return a function that makes (once) a seed checkpoint and returns the flags of a run from it."""

    @functools.cache
    def from_seed(arithmetic: str, tied: bool) -> list[str]:
        folder: Path = tmp_path_factory.mktemp("seed")
        base = [flag for flag in flags(TINY) if not (tied and flag == "--untie-embeddings-and-output-weights")]
        base += [*flags(EVALUATED), *flags(ARITHMETIC[arithmetic])]
        still = flags("--train-iters 1 --lr 0 --min-lr 0 --weight-decay 0 --eval-iters 0")
        run_arm(ranks, "U", 1, base + still, folder, float64=arithmetic == "float64")
        return [*base, "--load", str(folder), *flags("--finetune --no-load-optim --no-load-rng")]

    return from_seed


@pytest.fixture(scope="module")
def single(ranks: RankPool, start: Start) -> Callable[[str, bool], Run]:
    """Return a function that makes (once) the single-process run."""

    @functools.cache
    def run(arithmetic: str, tied: bool) -> Run:
        return run_arm(ranks, "O", 1, start(arithmetic, tied), float64=arithmetic == "float64")

    return run


@pytest.fixture(scope="module")
def rounding_error(ranks: RankPool, start: Start, single: Callable[[str, bool], Run]) -> Callable[[str], float]:
    """Return a function that measures (once) how far the single run is from float64, from the same weights."""

    @functools.cache
    def measure(arithmetic: str) -> float:
        base = [flag for flag in start(arithmetic, False) if flag != "--bf16"]
        return worst(run_arm(ranks, "O", 1, base, float64=True), single(arithmetic, False), "loss")

    return measure


def worst(run: Run, reference: Run, name: str) -> float:
    """Return the largest difference of one quantity over the steps, relative to the reference."""
    assert len(run.curve) == len(reference.curve) == STEPS
    assert [step["samples"] for step in run.curve] == [step["samples"] for step in reference.curve]
    assert [step["tokens"] for step in run.curve] == [step["tokens"] for step in reference.curve]
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(run.curve, reference.curve, strict=True))


@pytest.mark.parametrize(("layout", "tied"), in_float64())
def test_layout_equals_one_process_in_float64(
    ranks: RankPool,
    start: Start,
    single: Callable[[str, bool], Run],
    layout: str,
    tied: bool,
    tell: Callable[[str], None],
) -> None:
    world, own = LAYOUTS[layout]
    reference = single("float64", tied)
    run = run_arm(ranks, "O", world, start("float64", tied) + flags(own), float64=True)
    loss, norm = worst(run, reference, "loss"), worst(run, reference, "grad_norm")
    kind = "tied" if tied else "untied"
    tell(f"float64  {layout}, {kind}: largest relative difference of loss {loss:.1e}, of gradient norm {norm:.1e}")
    assert max(loss, norm) <= RELATIVE
    assert worst(run, reference, "learning_rate") == 0
    assert reference.curve[-1]["loss"] < reference.curve[0]["loss"] - 0.1  # it learns


@pytest.mark.parametrize("arithmetic", ["float32", "bf16"])
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (name in NOISY_SLOW)) for name in NOISY]
)
def test_layout_stays_within_the_noise(
    ranks: RankPool,
    start: Start,
    single: Callable[[str, bool], Run],
    rounding_error: Callable[[str], float],
    layout: str,
    arithmetic: str,
    tell: Callable[[str], None],
) -> None:
    world, own = LAYOUTS[layout]
    reference, error = single(arithmetic, False), rounding_error(arithmetic)
    run = run_arm(ranks, "O", world, start(arithmetic, False) + flags(own))
    difference = worst(run, reference, "loss")
    tell(f"{arithmetic:8} {layout}: largest relative difference of loss {difference:.1e}, rounding error {error:.1e}")
    assert error > 0
    assert difference <= 3 * error
