"""Training under sharding strategies on the two-node bed: seconds of a step, and bytes at the collective calls.

An arm is a command line of `examples/pretrain_gpt.py`, so whatever these flags run is what is measured. Arms take
turns: each is started anew in every round.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.longseq.sharding.plan.collectives import CollectivesMode
from megatron.longseq.sharding.plan.memory import Widths
from tests.benchmarks.calls import SentMessages, watching
from tests.benchmarks.twonodes import Bed
from tests.bucket_volume import Bucket, describe_buckets

QUIET_S = 1.0  # a message takes some 0.1 s
WARM = 2  # steps before those that count: the first allocates, and what one leaves to the next is there from then on
WIDTHS = Widths(param=4, grad=4, optimizer=12, grad_wire=4)  # float32 throughout

# Wide and shallow, with short sequences: much to send, little to compute.
MODEL = """
--num-layers 2 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 1024 --swiglu --normalization RMSNorm
--position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0
--attention-dropout 0 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 --lr 1e-4 --lr-decay-iters 1000
--weight-decay 0.1 --tokenizer-type NullTokenizer --vocab-size 4095 --make-vocab-size-divisible-by 64 --mock-data
--split 90,5,5 --eval-iters 0 --eval-interval 1000 --log-interval 1000 --num-workers 0 --seed 1
--no-create-attention-mask-in-dataloader
"""
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: of the arm.
        strategy: what it is.
        mode: of its collectives.
        flags: that ask for it.
    """

    name: str
    strategy: str
    mode: CollectivesMode
    flags: str


def arm(strategy: str, mode: CollectivesMode, size: int) -> Arm:
    """Return an arm of ours."""
    grouped = "" if mode is CollectivesMode.FLAT else f"--paro-group-size {size} "
    links = "--paro-links 10 1 " if mode is CollectivesMode.OVERLAPPED else ""  # the same choice in every round
    flags = f"--paro {strategy} {grouped}--paro-collectives {mode} {links}{OVERLAP}"
    return Arm(f"{strategy} {mode}", strategy, mode, flags)


def arms(size: int) -> tuple[Arm, ...]:
    """Return all arms; the first is upstream's own.

    Args:
        size: of a group.
    """
    upstream = Arm("upstream ZeRO-1", "NNG", CollectivesMode.FLAT, f"--use-distributed-optimizer {OVERLAP}")
    flat = [arm(strategy, CollectivesMode.FLAT, size) for strategy in ("NNG", "NGG", "GGG")]
    ours = [arm(strategy, CollectivesMode.OVERLAPPED, size) for strategy in ("NNG", "NIG", "NGG", "IIG", "IGG", "GGG")]
    return (upstream, *flat, *ours)


@dataclass
class TrainingResult:
    """What one rank saw of a run.

    Attributes:
        starts: when each step began, seconds of this machine's clock.
        seen: collectives before the first step that counts, and before the step after the last one.
        buckets: what formulas count.
        losses: of every step.
    """

    starts: list[float] = field(default_factory=list)
    seen: list[SentMessages] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Return the elements of all buckets: trained parameters, with padding."""
        return sum(bucket.numel for bucket in self.buckets)

    def seconds(self) -> list[float]:
        """Return the seconds of every step that counts, to the next one's beginning."""
        return [after - before for before, after in zip(self.starts[WARM:-1], self.starts[WARM + 1 :], strict=True)]

    def sent(self) -> SentMessages:
        """Return what was seen in all steps that count."""
        before, after = self.seen
        return after - before


def train_on_this_rank(flags: Sequence[str]) -> TrainingResult:
    """Train by `pretrain` with these flags, on one thread; runs in a rank of the bed."""
    torch.set_num_threads(1)
    sys.argv = ["pretrain_gpt.py", *flags]
    found = TrainingResult()
    with watching() as seen:
        import patches

        patches.start()
        from megatron.training import get_args, training

        from megatron.longseq.pretrain_gpt import main

        training.train_step = _watched(training.train_step, found, seen, lambda: int(get_args().train_iters) - 1)
        main()
    return found


def _watched(
    train_step: Callable[..., Any], found: TrainingResult, seen: SentMessages, last: Callable[[], int]
) -> Callable[..., Any]:
    """Return upstream's `train_step`, recorded. `last` returns the number of the step after those that count."""

    def step(forward_step_func: Any, data_iterator: Any, model: Any, *args: Any, **named: Any) -> Any:
        number = len(found.starts)
        if number == WARM:
            found.seen.append(_once_quiet(seen))
        if number in (0, WARM):
            torch.distributed.barrier()
        found.starts.append(time.perf_counter())
        if number == last():
            found.seen.append(_once_quiet(seen))
        result = train_step(forward_step_func, data_iterator, model, *args, **named)
        found.losses.append(float(result[0]["lm loss"]))
        found.buckets = [bucket for chunk in model for bucket in _buckets(chunk)]
        return result

    return step


def _once_quiet(seen: SentMessages) -> SentMessages:
    """Return what was seen, once no message begins any more.

    What a step leaves to the next one's forward is sent from threads, which may still be at it when the next step
    begins. So single steps cannot be told apart by their messages.
    """
    known = None
    while known is None or known.collectives != seen.copy().collectives:
        known = seen.copy()
        time.sleep(QUIET_S)
    return known


def _buckets(chunk: Any) -> list[Bucket]:
    if hasattr(chunk, "gather_hooks"):  # ours
        return describe_buckets(chunk)
    return [Bucket(bucket.grad_data.numel()) for buffer in chunk.buffers for bucket in buffer.buckets]


@dataclass(frozen=True)
class Result:
    """An arm's runs.

    Attributes:
        arm: which.
        seconds: of every step that counts, by round: of the slowest rank.
        ranks: the last run's, by rank.
    """

    arm: Arm
    seconds: list[list[float]]
    ranks: list[TrainingResult]

    @property
    def rounds(self) -> list[float]:
        """Return the median seconds of a step, by round."""
        return [statistics.median(each) for each in self.seconds]


def train(bed: Bed, contestants: Sequence[Arm], *, rounds: int, steps: int, microbatches: int) -> list[Result]:
    """Train under every arm, in turns.

    Args:
        bed: where.
        contestants: the arms.
        rounds: runs of each.
        steps: of a run, that count.
        microbatches: of a rank in a step, A.
    """
    size = f"--global-batch-size {microbatches * bed.world_size} --train-iters {WARM + steps + 1}"
    results = [Result(one, [], []) for one in contestants]
    for number in range(rounds):
        cut = number * len(results) // rounds
        for result in [*results[cut:], *results[:cut]]:
            flags = [*MODEL.split(), *size.split(), *result.arm.flags.split()]
            ranks = bed.run(train_on_this_rank, flags, timeout=1800)
            result.seconds.append([max(each) for each in zip(*(rank.seconds() for rank in ranks), strict=True)])
            result.ranks[:] = ranks
    return results
