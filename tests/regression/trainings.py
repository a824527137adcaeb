"""Trainings that several cases and tests compare with: each one is made once."""

import shlex
from pathlib import Path
from typing import Any

from tests.pool import RankPool
from tests.regression.arm import Arm, Run, run_arm

SEED_RUN = "--train-iters 1 --lr-decay-iters 1 --lr-warmup-iters 0 --lr 0 --min-lr 0 --weight-decay 0 --eval-iters 0"
LOAD = ("--finetune", "--no-load-optim", "--no-load-rng")


class Trainings:
    """Runs arms in a pool of ranks, and remembers seed checkpoints and runs by their flags.

    Args:
        pool: where ranks come from.
        folder: where seed checkpoints are written.
    """

    def __init__(self, pool: RankPool, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        self._seeds: dict[tuple[str, ...], Path] = {}
        self._runs: dict[Any, Run] = {}

    def seed(self, *model: str) -> Path:
        """Return a float64 checkpoint (`iter_0000001`) of upstream's own initial weights of a model.

        Args:
            model: upstream's flags of the model and of the data.
        """
        if model not in self._seeds:
            folder = self.folder / f"seed-{len(self._seeds)}"
            flags = [*model, *shlex.split(SEED_RUN), "--seed", "1"]
            self._seeds[model] = run_arm(self.pool, "U", 1, flags, folder, float64=True).checkpoint(1)
        return self._seeds[model]

    def load(self, *model: str) -> list[str]:
        """Return the flags of a run that starts from the seed of a model."""
        return ["--load", str(self.seed(*model).parent), *LOAD]

    def once(self, arm: Arm, world: int, flags: list[str], key: Any = None, **named: Any) -> Run:
        """Return `run_arm`'s run: an earlier one, if it had the same arguments and the same `key`."""
        known = (arm, world, tuple(flags), key, *sorted(named.items()))
        if known not in self._runs:
            self._runs[known] = run_arm(self.pool, arm, world, flags, **named)
        return self._runs[known]
