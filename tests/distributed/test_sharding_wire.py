"""Gradients that are sent in bf16 accumulate in float32, so their error does not grow with the micro-batches."""

from collections.abc import Callable

import numpy
import pytest

from tests.distributed.flags import TINY, flags
from tests.pool import RankPool
from tests.regression.arm import Arm, run_arm

RANKS, FEW, MANY = 4, 1, 48
HALF = "--bf16 --grad-reduce-in-bf16"
PARO = "--paro-group-size 2 --paro-links 100 1"


def gradients(pool: RankPool, arm: Arm, microbatches: int, own: str) -> numpy.ndarray:
    """Return Adam's first moments after one step, all in one: the gradients of that step, times 0.1."""
    step = f"--train-iters 1 --global-batch-size {microbatches * RANKS} --lr-warmup-iters 0 --clip-grad 0"
    run = run_arm(
        pool,
        arm,
        RANKS,
        flags(TINY, "--num-layers 1 --seq-length 16 --hidden-size 32 --ffn-hidden-size 64", step, own),
        snapshots=(1,),
    )
    moments = run.snapshots[1].first_moments
    return numpy.concatenate([moments[name].ravel() for name in sorted(moments)])


@pytest.mark.slow  # half a minute; paro-bf16-wire.toml holds the wire to upstream's own noise
def test_micro_batches_add_up_in_float32(ranks: RankPool, tell: Callable[[str], None]) -> None:
    errors: dict[str, list[float]] = {"upstream": [], "NIG": []}
    for microbatches in (FEW, MANY):
        exact = gradients(ranks, "U", microbatches, "--bf16")  # the same forward and backward, sums in float32
        runs = {
            "upstream": gradients(ranks, "U", microbatches, HALF),
            "NIG": gradients(ranks, "O", microbatches, f"{HALF} --paro NIG {PARO}"),
        }
        for name, found in runs.items():
            errors[name].append(float(numpy.linalg.norm(found - exact) / numpy.linalg.norm(exact)))
    figures = ", ".join(f"{name} {few:.1e} and {many:.1e}" for name, (few, many) in errors.items())
    tell(f"bf16     error of a step's gradients with {FEW} micro-batch and with {MANY}: {figures}")
    few, many = errors["NIG"]
    # Each rank's sum is sent in bf16 once, and only that is lost: by theory as much with many as with few.
    assert 0 < many < 1.3 * few
    few, theirs = errors["upstream"]
    # Upstream rounds a sum 48 times as it grows, which on the average makes sqrt(48 / 3) times one rounding.
    assert theirs > 1.5 * few and theirs > 1.5 * many
