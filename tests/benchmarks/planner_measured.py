"""The planner on CPU ranks: predicted and measured step time of unlike plans, and predicted and counted live bytes.

    python -m tests.benchmarks.planner_measured [--ranks 2 4] [--rounds N] [--steps N]

For each number of ranks `calibrate` measures this machine, and the planner predicts a small GPT under several layouts,
schedules and shardings. Then each of them trains, one after the other, in several rounds. Times of plans are compared
by their ratios: each is divided by the geometric mean of all plans on as many ranks, and the error is the difference of
the logarithms, because the planner chooses by ratios. In one more run of each plan the storages of all tensors are
counted, without time; the table shows the peak of the last step on the fullest rank. Where there are more ranks than
cores, ranks compute while others wait, so a predicted step has no bubble.

The last line is one JSON object: `ratio_error_mean` and `ratio_error_worst`; `rank_correlation` (Kendall's tau, the
mean over the numbers of ranks); `regret` (measured seconds of the plan that is predicted to be the fastest, over those
of the fastest one, minus 1; the worst number of ranks); `bytes_error_mean` and `bytes_error_worst`; `spread` (the
median of a plan's largest over its smallest time, minus 1); all rows.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from megatron.longseq.command_line import markdown_table
from megatron.longseq.planner.plan.flags import read
from megatron.longseq.planner.plan.step import StepPrediction, predict
from megatron.longseq.planner.tools.calibrate import measure_ranks, profile_of
from megatron.longseq.planner.tools.predict_command import flags_of
from tests.pool import RankPool

MODEL = """
--num-layers 4 --hidden-size 256 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--ffn-hidden-size 704 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 64
--vocab-size 1024 --seq-length 512 --max-position-embeddings 512 --micro-batch-size 1 --global-batch-size 8
--transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-create-attention-mask-in-dataloader
"""
TRAINING = """
--lr 1e-4 --lr-decay-iters 1000 --eval-iters 0 --eval-interval 1000 --num-workers 0 --seed 1 --mock-data --split 1,0,0
--tokenizer-type NullTokenizer --log-interval 100
"""
DATA_PARALLEL = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
RING, ULYSSES = "--context-parallel-attention longseq", "--context-parallel-attention longseq --cp-comm-type a2a"
PLANS = {
    2: {
        "DP 2": DATA_PARALLEL,
        "DP 2, recompute": f"{DATA_PARALLEL} --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
        "TP 2": "--tensor-model-parallel-size 2 --sequence-parallel",
        "PP 2": "--pipeline-model-parallel-size 2",
        "PP 2, 2 segments": "--pipeline-model-parallel-size 2 --seq1f1b-splits 2",
        "CP 2, Ulysses": f"--context-parallel-size 2 {ULYSSES} {DATA_PARALLEL}",
    },
    4: {
        "DP 4": DATA_PARALLEL,
        "DP 4, PaRO GGG": "--paro GGG --paro-collectives flat --overlap-grad-reduce",
        "TP 2, DP 2": f"--tensor-model-parallel-size 2 --sequence-parallel {DATA_PARALLEL}",
        "PP 4": "--pipeline-model-parallel-size 4",
        "PP 2, DP 2": f"--pipeline-model-parallel-size 2 {DATA_PARALLEL}",
        "CP 2, DP 2, ring": f"--context-parallel-size 2 {RING} {DATA_PARALLEL}",
    },
}


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the storages of all tensors that operators return, until they are freed.

    Attributes:
        live: bytes now.
        peak: most bytes since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes = WeakIdKeyDictionary()

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, list | tuple) else (result,):
            if isinstance(one, torch.Tensor) and one.device.type != "meta":
                self.note(one.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, or its new size."""
        held = self._sizes.get(storage)
        if held is None:
            held = self._sizes[storage] = [0]
            weakref.finalize(storage, self._change, held, 0)
        self._change(held, storage.nbytes())

    def _change(self, held: list[int], size: int) -> None:
        self.live += size - held[0]
        held[0] = size
        self.peak = max(self.peak, self.live)


@contextmanager
def counting() -> Iterator[LiveBytes]:
    """Count live bytes in this thread."""
    counter, resize, swap = LiveBytes(), torch.UntypedStorage.resize_, torch.UntypedStorage._swap_data_ptr_

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        counter.note(storage)
        return result

    def swapped(storage: torch.UntypedStorage, other: torch.UntypedStorage) -> Any:
        result = swap(storage, other)
        for one in sorted((storage, other), key=torch.UntypedStorage.nbytes):  # the emptied one first: no false peak
            counter.note(one)
        return result

    storages = mock.patch.multiple(torch.UntypedStorage, resize_=resized, _swap_data_ptr_=swapped)
    with storages, counter:
        yield counter


def train(flags: Sequence[str], counts: bool) -> tuple[list[float], int]:
    """Train; return the seconds of every step, and the peak of live bytes in the last one. Runs on a rank."""
    import patches

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"])))  # as calibrate has
    sys.argv = ["pretrain_gpt.py", *flags]
    patches.start()
    from megatron.training import training

    from megatron.longseq.pretrain_gpt import main as pretrain

    seconds: list[float] = []
    counter = LiveBytes()
    step = training.train_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        counter.restart()
        torch.distributed.barrier()
        began = time.perf_counter()
        result = step(*args, **kwargs)
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - began)
        return result

    training.train_step = timed
    if counts:
        with counting() as counter:
            pretrain()
    else:
        pretrain()
    return seconds, counter.peak


@dataclass
class MeasuredPlan:
    """A line of the table; seconds of a step and bytes of the fullest rank."""

    ranks: int
    plan: str
    predicted_seconds: float
    predicted_bytes: float
    times: list[float]
    counted_bytes: int

    @property
    def seconds(self) -> float:
        """Median of the measured times."""
        return median(self.times)


def predict_and_count(pool: RankPool, ranks: int, flags: Sequence[str], profile: Path) -> tuple[StepPrediction, int]:
    """Return what is predicted of a plan, and the most live bytes of a rank that are counted in a training step.

    Raises:
        ValueError: the planner says that the plan is not valid.
    """
    found = predict(*read({**flags_of(flags), "cluster": str(profile)}))
    if found.reasons:
        raise ValueError(f"{' '.join(flags)}: {'; '.join(found.reasons)}")
    results = pool.run(ranks, train, [*flags, *TRAINING.split(), "--train-iters", "2"], True)
    return found, max(peak for _, peak in results)


def measure(pool: RankPool, folder: Path, ranks: int, rounds: int, steps: int, budget: float) -> list[MeasuredPlan]:
    """Calibrate, predict, train and count all plans of a number of ranks."""
    profile = folder / f"profile{ranks}.json"
    profile.write_text(json.dumps(profile_of(measure_ranks(ranks, "cpu", budget), "cpu")))
    rows = []
    for name, words in PLANS[ranks].items():
        flags = [*MODEL.split(), *words.split()]
        found, counted = predict_and_count(pool, ranks, flags, profile)
        seconds = found.step_seconds
        if ranks > len(os.sched_getaffinity(0)):
            seconds -= found.bubble_seconds  # ranks that share cores compute while others wait
        rows.append(MeasuredPlan(ranks, name, seconds, found.peak_bytes, [], counted))
    for _ in range(rounds):
        for row in rows:
            flags = [*MODEL.split(), *PLANS[ranks][row.plan].split(), *TRAINING.split()]
            results = pool.run(ranks, train, [*flags, "--train-iters", str(steps + 1)], False)
            row.times += [max(step) for step in zip(*(times[1:] for times, _ in results), strict=True)]
    return rows


def ratio_errors(rows: Sequence[MeasuredPlan]) -> list[float]:
    """Return the error of every plan's predicted time relative to the other plans on as many ranks."""
    logs = [math.log(row.predicted_seconds / row.seconds) for row in rows]
    return [math.exp(abs(log - mean(logs))) - 1 for log in logs]


def kendall(rows: Sequence[MeasuredPlan]) -> float:
    """Return Kendall's rank correlation of predicted and measured times."""
    signs = [
        math.copysign(1, (one.seconds - two.seconds) * (one.predicted_seconds - two.predicted_seconds))
        for one, two in combinations(rows, 2)
    ]
    return mean(signs)


def regret(rows: Sequence[MeasuredPlan]) -> float:
    """Return how much longer the plan takes that is predicted to be the fastest than the fastest one."""
    return min(rows, key=lambda row: row.predicted_seconds).seconds / min(row.seconds for row in rows) - 1


def summary(rows: Sequence[MeasuredPlan]) -> dict[str, float]:
    """Return the figures of the last line."""
    groups = [[row for row in rows if row.ranks == ranks] for ranks in sorted({row.ranks for row in rows})]
    ratios = [error for group in groups for error in ratio_errors(group)]
    sizes = [abs(row.predicted_bytes / row.counted_bytes - 1) for row in rows]
    return {
        "ratio_error_mean": mean(ratios),
        "ratio_error_worst": max(ratios),
        "rank_correlation": mean(kendall(group) for group in groups),
        "regret": max(regret(group) for group in groups),
        "bytes_error_mean": mean(sizes),
        "bytes_error_worst": max(sizes),
        "spread": median(max(row.times) / min(row.times) - 1 for row in rows),
    }


def table(rows: Sequence[MeasuredPlan]) -> str:
    """Return the rows as a Markdown table; ratios are to the geometric mean of the plans on as many ranks."""
    lines = []
    for row in rows:
        group = [one for one in rows if one.ranks == row.ranks]
        scale = math.exp(mean(math.log(one.seconds) for one in group))
        predicted = math.exp(mean(math.log(one.predicted_seconds) for one in group))
        lines.append(
            (
                str(row.ranks),
                row.plan,
                f"{row.seconds:.3f}",
                f"{max(row.times) / min(row.times) - 1:.0%}",
                f"{row.predicted_seconds:.3f}",
                f"{row.seconds / scale:.2f}",
                f"{row.predicted_seconds / predicted:.2f}",
                f"{row.counted_bytes / 1e6:.1f}",
                f"{row.predicted_bytes / 1e6:.1f}",
            )
        )
    head = ("ranks", "plan", "measured s", "spread", "predicted s", "measured ratio", "predicted ratio")
    return markdown_table((*head, "counted MB", "predicted MB"), lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.planner_measured", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(PLANS), choices=list(PLANS), help="CPU ranks")
    parser.add_argument("--rounds", type=int, default=2, help="runs of every plan, interleaved")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a run")
    parser.add_argument("--seconds", type=float, default=20.0, help="budget of calibrate for each number of ranks")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(Path(folder))
        rows = [
            row
            for ranks in given.ranks
            for row in measure(pool, Path(folder), ranks, given.rounds, given.steps, given.seconds)
        ]
    print(table(rows))
    print(json.dumps({**summary(rows), "rows": [asdict(row) for row in rows]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
