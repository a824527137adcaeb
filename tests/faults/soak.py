"""Train for minutes on four CPU ranks with all systems on, with a fault every few minutes; then train undisturbed.

    python -m tests.faults.soak --minutes 60 [--every SECONDS] [--folder DIR]

The disturbed run gets half of the time. Ranks are killed, stopped, and asked to stop, and the run resumes each time.
Then a run without faults makes the same steps. Printed are a line per fault and, last, a JSON object; the status is 1
unless both curves are equal bit by bit and memory is flat.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.distributed.flags import TINY, flags
from tests.faults.cases import SYSTEMS, lost_steps
from tests.faults.plant import losses, train
from tests.pool import RankFailure, RankPool

SEED, RANKS = 3, 4
LAST = 50_000  # more steps than it makes; each start builds the index of all their samples
KINDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
RUN = (
    f"--train-iters {LAST} --lr-decay-iters {LAST} --save-interval 20 --exit-signal-handler --rerun-mode disabled "
    "--global-batch-size 8 --first-step-timeout-minutes 10"
)
FLAT = 0.02  # largest growth of memory from the second quarter of the undisturbed run to its last one


@dataclass
class SoakResult:
    """Figures of a soak.

    Attributes:
        minutes: of both runs.
        faults, resumed: faults, and starts of the disturbed run after them.
        steps: that both runs have.
        lost_steps: steps whose losses differ, or that are missing.
        memory_mib: resident memory of a rank at the end of the undisturbed run.
        growth: of its memory from its second quarter to its last, as a part.
    """

    minutes: float = 0.0
    faults: int = 0
    resumed: int = 0
    steps: int = 0
    lost_steps: int = 0
    memory_mib: float = 0.0
    growth: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether the curves are equal and memory is flat."""
        return self.steps > 0 and self.faults > 0 and not self.lost_steps and self.growth <= FLAT


class Soak:
    """One soak.

    Args:
        folder: for checkpoints and logs.
        seconds: of the disturbed run.
        every: seconds between faults.
    """

    def __init__(self, folder: Path, seconds: float, every: float) -> None:
        self.folder, self.seconds, self.every = folder, seconds, every
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.pool, self.result, self.random = RankPool(logs), SoakResult(), random.Random(SEED)
        # On a busy machine a step may wait for long; a rank that is stopped must be reported before the next fault.
        self.line = flags(TINY, SYSTEMS["all"][1], RUN, f"--stall-timeout-minutes {max(0.5, every / 120):g}")

    def run(self) -> SoakResult:
        """Run both trainings and compare them."""
        began = time.monotonic()
        disturbed, undisturbed = self.folder / "disturbed", self.folder / "undisturbed"
        self._disturb(disturbed, began + self.seconds)
        curve = losses(disturbed)
        steps = max(curve)
        self._say(f"the disturbed run made {steps} steps; the undisturbed one follows")
        train_to = [*self.line, "--exit-interval", str(steps)]
        train(self.pool, RANKS, train_to, undisturbed, timeout=20 * self.seconds + 600)
        expected = {step: values[-1] for step, values in losses(undisturbed).items()}
        self.result.steps, self.result.lost_steps = len(expected), lost_steps(expected, curve)
        self._measure_memory(undisturbed)
        self.result.minutes = round((time.monotonic() - began) / 60, 1)
        return self.result

    def _disturb(self, folder: Path, deadline: float) -> None:
        while True:
            ended = threading.Event()
            runner = threading.Thread(target=self._train, args=(folder, ended))
            runner.start()
            self.result.resumed += 1
            is_last = deadline - time.monotonic() < self.every
            before = len(losses(folder))
            ended.wait(max(1.0, min(self.every, deadline - time.monotonic())))
            while not ended.is_set() and len(losses(folder)) <= before:  # let each start make a step
                ended.wait(0.2)
            if not ended.is_set():
                self._hit(folder, signal.SIGTERM if is_last else KINDS[self.result.faults % len(KINDS)])
            runner.join()
            if is_last:
                return

    def _train(self, folder: Path, ended: threading.Event) -> None:
        try:
            train(self.pool, RANKS, self.line, folder, timeout=20 * self.seconds + 600)
        except RankFailure as failure:
            self._say(f"the run ended: {str(failure).splitlines()[0]}")
        finally:
            ended.set()

    def _hit(self, folder: Path, number: signal.Signals) -> None:
        rank = self.random.randrange(RANKS)
        self.result.faults += 1
        self._say(f"{number.name} to rank {rank} after step {max(losses(folder))}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((folder / f"pid-{rank}").read_text()), number)

    def _measure_memory(self, folder: Path) -> None:
        sizes = [json.loads(line)[2] for line in (folder / "losses.jsonl").read_text().splitlines()]
        quarter = max(1, len(sizes) // 4)
        early, late = (sum(part) / len(part) for part in (sizes[quarter : 2 * quarter] or sizes, sizes[-quarter:]))
        self.result.memory_mib, self.result.growth = round(late / 2**20, 1), round(late / early - 1, 4)

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> int:
    """Run a soak; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=180.0, metavar="SECONDS", help="between faults")
    parser.add_argument("--folder", type=Path, help="default: a new one, which is removed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = Soak(args.folder or Path(temporary), 30 * args.minutes, args.every).run()
    print(json.dumps({**asdict(result), "is_good": result.is_good}))
    return 0 if result.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
