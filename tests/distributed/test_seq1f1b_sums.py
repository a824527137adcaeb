"""With segments a micro-batch is added to 16-bit gradients once, so their error does not grow with the segments."""

from collections.abc import Callable

import numpy
import pytest

from tests.distributed.flags import OVERLAP, PP2, TINY, VPP, flags
from tests.pool import RankPool
from tests.regression.arm import run_arm

STEP = "--train-iters 1 --lr-warmup-iters 0 --clip-grad 0"
HALF = "--bf16 --grad-reduce-in-bf16"
MICRO_BATCHES = 8
# M additions make M roundings, and the first one none with whole sequences, whose gradients are bf16 already. Partial
# sums of m gradients, none of which knows the others, have m times one's square: (1+...+M) / (2+...+M) in all.
MORE = (MICRO_BATCHES * (MICRO_BATCHES + 1) / 2 / (MICRO_BATCHES * (MICRO_BATCHES + 1) / 2 - 1)) ** 0.5
CHANCE = 1.1  # the two runs round other numbers


def gradients(pool: RankPool, world: int, own: str, precision: str) -> numpy.ndarray:
    """Return Adam's first moments after one step, all in one: the gradients of that step, times 0.1."""
    tiny = TINY.replace("--untie-embeddings-and-output-weights", "") if "--tied" in own else TINY
    run = run_arm(pool, "O", world, flags(tiny, STEP, own.replace("--tied", ""), precision), snapshots=(1,))
    moments = run.snapshots[1].first_moments
    return numpy.concatenate([moments[name].ravel() for name in sorted(moments)])


def error(pool: RankPool, world: int, own: str) -> float:
    """Return the relative error of gradients summed in bf16. All else is bitwise the run that sums in float32."""
    exact, found = (gradients(pool, world, own, precision) for precision in ("--bf16", HALF))
    return float(numpy.linalg.norm(found - exact) / numpy.linalg.norm(exact))


# Ranks, flags of layout, flags of whole sequences and of segments
LAYOUTS = {
    "one stage": (1, "", "", ["--seq1f1b-splits 16"]),
}
SLOW = {
    "one stage, few segments": (1, "", "", ["--seq1f1b-splits 4"]),
    "tied, zero bubble": (2, f"--tied {PP2}", "", ["--seq1f1b-splits 8 --zero-bubble"]),
    "DP 2, overlap": (2, OVERLAP, "", ["--seq1f1b-splits 16"]),
    "DP 2, no distributed optimizer, overlap": (2, "--overlap-grad-reduce", "", ["--seq1f1b-splits 16"]),
    "PP 2, DP 2, V 2, overlap": (4, f"{PP2} {VPP} {OVERLAP}", "", ["--seq1f1b-splits 16"]),
    "CP 2": (2, "--context-parallel-size 2", "", ["--seq1f1b-splits 16"]),
}


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_error_is_that_of_whole_sequences(ranks: RankPool, name: str, tell: Callable[[str], None]) -> None:
    world, layout, whole, splits = (LAYOUTS | SLOW)[name]
    once = error(ranks, world, f"{layout} {whole}")
    found = {own: error(ranks, world, f"{layout} {own}") for own in splits}
    errors = ", ".join(f"{own} {value:.1e}" for own, value in found.items())
    tell(f"bf16     {name}: gradients added up in bf16, whole sequences {once:.1e}, {errors}")
    assert once > 0 and all(0 < value < MORE * CHANCE * once for value in found.values())
