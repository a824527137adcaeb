"""Measure what each guard costs: CPU time, operations, and reads by the host in a training step.

    python -m tests.benchmarks.guards [--rounds 3]

Every arm trains the same model on one CPU rank of its own. The ranks take turns: after a step of one arm comes the same
step of the next one, so that what else the machine does meets all arms alike. An arm's cost is the median of the
differences from the first arm's steps. The second arm repeats the first one: its cost shows what this machine can tell
apart. The last step of an arm is counted instead of timed: counts are the same on every machine.

Waits for a device do not exist here. A read is where a GPU would make the host wait.
The last line is one JSON object.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.flags import TINY, flags
from tests.pool import RankPool
from tests.regression.arm import Job, train_on_this_rank
from tests.regression.planted import Planted, wrapped

MODEL = "--hidden-size 256 --ffn-hidden-size 512 --seq-length 128 --max-position-embeddings 128 --rerun-mode disabled"
MICROBATCHES = 8  # with TINY's global batch on one rank
STEPS, WARM = 24, 4
QUIET = "--no-check-for-nan-in-loss-and-grad"
CALM = "--loss-spike-policy off"
UNWATCHED = "--stall-timeout-minutes 0 --first-step-timeout-minutes 0"
ARMS = {
    "no check": f"{QUIET} {CALM} {UNWATCHED}",
    "no check again": f"{QUIET} {CALM} {UNWATCHED}",
    "upstream's check": f"--no-locate-nonfinite-gradients {CALM} {UNWATCHED}",
    "gradients": f"{CALM} {UNWATCHED}",
    "loss spikes": f"{QUIET} {UNWATCHED}",
    "stalls": f"{QUIET} {CALM}",
    "guards": "",
}
VARIABLE = "LONGSEQ_TEST_TURN"
PATIENCE = 3600.0  # seconds until a rank has its turn
READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"}
NORMS = {"_foreach_norm", "linalg_vector_norm", "norm"}


@dataclass
class Counts:
    """What a step does.

    Attributes:
        operations: of torch, which a GPU launches as one kernel or more.
        reads: values that the host reads from tensors.
        collectives: of torch.distributed.
        norm_elements: elements of which norms are taken.
    """

    operations: int = 0
    reads: int = 0
    collectives: int = 0
    norm_elements: int = 0


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts.collectives += 1
        else:
            self.counts.operations += 1
        if func.overloadpacket.__name__ in NORMS:
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.counts.norm_elements += sum(tensor.numel() for tensor in tensors)
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts.reads += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Turn:
    """A rank's place among the arms.

    Attributes:
        port: of the store by which ranks take turns.
        place: of this rank's arm.
        steps: of every arm.
        file: for the result, one JSON object.
    """

    port: int
    place: int
    steps: int
    file: str


@contextmanager
def steps_in_turns() -> Iterator[Planted]:
    """Run every step when it is this rank's turn; measure its CPU time, or count, in the last one."""
    from megatron.training import training

    turn = Turn(**json.loads(os.environ[VARIABLE]))
    store = dist.TCPStore("127.0.0.1", turn.port, is_master=False, wait_for_workers=False)
    seconds: list[float] = []

    def train_step(original: Any, *rest: Any, **named: Any) -> Any:
        number = len(seconds) * len(ARMS) + turn.place
        if number:
            store.wait([f"turn {number}"], timedelta(seconds=PATIENCE))
        counts = Counts()
        began = time.process_time()
        if len(seconds) + 1 == turn.steps:
            with _Operations(counts), _Reads(counts):
                result = original(*rest, **named)
            Path(turn.file).write_text(json.dumps({"seconds": seconds, "counts": asdict(counts)}))
        else:
            result = original(*rest, **named)
        seconds.append(time.process_time() - began)
        store.set(f"turn {number + 1}", "")
        return result

    with wrapped(training, "train_step", train_step):
        yield Planted()


def run(lines: list[list[str]], steps: int, folder: str) -> None:
    """Train this rank's arm. The rank is the only one of its training."""
    place = int(os.environ["RANK"])
    turn = Turn(int(os.environ["MASTER_PORT"]), place, steps, f"{folder}/{place}.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE")
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_PORT": str(port), VARIABLE: json.dumps(asdict(turn))}
    train_on_this_rank(Job("O", tuple(lines[place]), mutant="tests.benchmarks.guards:steps_in_turns"))


def measure(rounds: int) -> list[dict[str, Any]]:
    """Train all arms in turns, and return seconds and counts of each.

    Args:
        rounds: `STEPS` timed steps of every arm each.
    """
    steps = WARM + rounds * STEPS + 1
    with tempfile.TemporaryDirectory() as folder:
        lines = [flags(TINY, MODEL, f"--train-iters {steps} --lr-decay-iters {steps}", own) for own in ARMS.values()]
        RankPool(Path(folder)).run(len(ARMS), run, lines, steps, folder, timeout=PATIENCE)
        return [json.loads(Path(folder, f"{place}.json").read_text()) for place in range(len(ARMS))]


def summary(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return what each arm costs beside the first one.

    Args:
        found: of every arm, in their order, see `measure`.
    """
    base = found[0]["seconds"][WARM:]
    table = {}
    for name, one in zip(ARMS, found, strict=True):
        seconds = one["seconds"][WARM:]
        added = [1000 * (mine - other) for mine, other in zip(seconds, base, strict=True)]
        quarters = statistics.quantiles(added, n=4)
        table[name] = {
            "cpu_ms": round(1000 * statistics.median(seconds), 2),
            "added_ms": round(statistics.median(added), 2),
            # Standard error of the median of normally distributed differences, from their quartiles.
            "error_ms": round(1.253 * (quarters[2] - quarters[0]) / 1.349 / len(added) ** 0.5, 2),
            **one["counts"],
        }
    return table


def main() -> None:
    """Print one line for each arm, and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    table = summary(measure(rounds))
    print(f"{'CPU time of a step':18}  ms      more than no check  operations  reads  collectives  elements of norms")
    for name, row in table.items():
        share = 100 * row["added_ms"] / table["no check"]["cpu_ms"]
        print(
            f"{name:18} {row['cpu_ms']:6.1f}  {row['added_ms']:+6.2f} +- {row['error_ms']:.2f} ({share:+.1f}%)"
            f"  {row['operations']:10d}  {row['reads']:5d}  {row['collectives']:11d}  {row['norm_elements']:,}"
        )
    print(json.dumps({"rounds": rounds, "steps": rounds * STEPS, "microbatches": MICROBATCHES, "arms": table}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
