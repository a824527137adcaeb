"""A rank's host memory while it saves or loads grows with its own shard, and not with the model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.flags import TINY, flags
from tests.pool import RankPool
from tests.regression.arm import run_arm

RANKS = 4
SIZES = (256, 640)
VARIANTS = "tests.distributed.script_variants"
STATES = 16  # bytes of weights, main parameters and two moments of a parameter, in fp32


def line(hidden: int, paro: str) -> list[str]:
    """Return the flags of a model whose size is that of its layers."""
    model = f"--num-layers 2 --hidden-size {hidden} --ffn-hidden-size {4 * hidden} --train-iters 2 --exit-interval 1"
    return flags(TINY, model, "--seq-length 16 --max-position-embeddings 16 --global-batch-size 4", paro)


def elements(hidden: int) -> int:
    """Return the number of parameters: attention, gated MLP, norms, and embedding and output layer."""
    layer = 3 * hidden * hidden + 12 * hidden * hidden + 2 * hidden
    return 2 * layer + hidden + 2 * 256 * hidden


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["GGG", "NGG"])
def test_grows_with_the_shard(ranks: RankPool, tmp_path: Path, tell: Callable[[str], None], strategy: str) -> None:
    peaks: dict[str, list[float]] = {"save": [], "load": []}
    paro = f"--paro {strategy} --paro-group-size 2"
    for hidden in SIZES:
        folder = tmp_path / str(hidden)
        saving = run_arm(ranks, "O", RANKS, line(hidden, paro), folder, mutant=f"{VARIANTS}:host_memory_of_save")
        peaks["save"].append(saving.planted / RANKS)
        resume = [*line(hidden, paro), "--load", str(folder), "--exit-interval", "2"]
        loading = run_arm(ranks, "O", RANKS, resume, mutant=f"{VARIANTS}:host_memory_of_load")
        peaks["load"].append(loading.planted / RANKS)
    grown = elements(SIZES[1]) - elements(SIZES[0])
    for what, (small, large) in peaks.items():
        slope = (large - small) / grown
        tell(
            f"{strategy}, {RANKS} ranks, {what}: {small / 2**20:.0f} and {large / 2**20:.0f} MiB above the state for "
            f"{elements(SIZES[0]):,} and {elements(SIZES[1]):,} parameters: {slope:.1f} bytes a parameter "
            f"(own shard {STATES / RANKS:.1f}, whole states {STATES})"
        )
        # NGG keeps whole weights on every rank, and one rank of four writes a quarter of them.
        assert slope < 2 * STATES / RANKS, (what, slope)
