"""Measure what the guards cost: CPU seconds of a training step without checks, with upstream's, and with ours.

    python -m tests.benchmarks.guards [--rounds 3]

One CPU rank trains steps of eight micro-batches. Arms alternate, and the least of the rounds counts. Wall-clock time is
not compared. Waits for a device, which a GPU adds to upstream's check, do not exist here.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.distributed.flags import TINY, flags
from tests.pool import RankPool
from tests.regression.arm import Job, train_on_this_rank
from tests.regression.planted import Planted, wrapped

MODEL = "--hidden-size 256 --ffn-hidden-size 512 --seq-length 128 --max-position-embeddings 128 --rerun-mode disabled"
STEPS, WARM = 24, 4
UNGUARDED = "--loss-spike-policy off --stall-timeout-minutes 0 --first-step-timeout-minutes 0"
ARMS = {
    "no check": f"{UNGUARDED} --no-check-for-nan-in-loss-and-grad",
    "upstream's": f"{UNGUARDED} --no-locate-nonfinite-gradients",
    "guards": "",
}
VARIABLE = "LONGSEQ_TEST_SECONDS"


@contextmanager
def timed_steps() -> Iterator[Planted]:
    """Write the CPU seconds of each step to the file that the environment names."""
    from megatron.training import training

    def train_step(original: Any, *rest: Any, **named: Any) -> Any:
        began = time.process_time()
        result = original(*rest, **named)
        with Path(os.environ[VARIABLE]).open("a") as file:
            file.write(f"{time.process_time() - began}\n")
        return result

    with wrapped(training, "train_step", train_step):
        yield Planted()


def run(line: list[str], file: str) -> None:
    """Train on this rank."""
    os.environ[VARIABLE] = file
    train_on_this_rank(Job("O", tuple(line), mutant="tests.benchmarks.guards:timed_steps"))


def main() -> None:
    """Print one line for each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        pool, least = RankPool(Path(folder)), dict.fromkeys(ARMS, float("inf"))
        for number in range(rounds):
            for name, own in ARMS.items():
                file = Path(folder) / f"{number}-{name.split()[0].strip(chr(39))}.txt"
                pool.run(1, run, flags(TINY, MODEL, f"--train-iters {STEPS}", own), str(file))
                seconds = sorted(map(float, file.read_text().split()[WARM:]))
                least[name] = min(least[name], seconds[len(seconds) // 2])
    base = least["no check"]
    for name, seconds in least.items():
        print(f"{name:12} {1000 * seconds:8.1f} ms of CPU time per step, {100 * (seconds / base - 1):+.1f} %")


if __name__ == "__main__":
    main()
