"""The rank's side of the attention benchmark: all contestants in turns, in one job, one core and one thread a rank."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.attention.plan.heads import Heads
from tests.benchmarks import ours, peers
from tests.benchmarks.attention_contest import (
    HALVES,
    ONE_PROCESS,
    OURS,
    TORCH,
    Contestant,
    Measured,
    Size,
    TrialRun,
    held_positions,
)
from tests.benchmarks.attention_truth import errors, truth, whole
from tests.benchmarks.peak import Peak
from tests.benchmarks.wire import Counting

# From [n, b, h, d] to what a contestant takes.
TOKENS_FIRST, BATCH_FIRST, HEADS_FIRST = (0, 1, 2, 3), (1, 0, 2, 3), (1, 2, 0, 3)


@dataclass(frozen=True)
class Job:
    """What the ranks are told.

    Attributes:
        sizes: with the contestants and the number of rounds of each.
        trial: length of the short first call.
        dtype: of the tensors.
    """

    sizes: tuple[tuple[Size, tuple[Contestant, ...], int], ...]
    trial: int
    dtype: torch.dtype


def run_on_this_rank(job: Job) -> tuple[list[TrialRun], list[Measured]]:
    """Run all contestants, each on as many of the first ranks as it has; in a rank of the pool."""
    rank, cores = int(os.environ["RANK"]), sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # before gloo starts its threads, which inherit it
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    race = _Race(job)
    tried = race.trials()
    failed = {(one.contestant, one.size.heads) for one in tried if one.failure}
    return tried, list(race.rounds(failed))


class _Race:
    """The contestants of one rank."""

    def __init__(self, job: Job) -> None:
        self.job, self.rank = job, dist.get_rank()
        everyone = list(dict.fromkeys(one for _, contestants, _ in job.sizes for one in contestants))
        self.groups = {ranks: _block(ranks) for ranks in sorted({one.ranks for one in everyone})}
        self.attends = {one: _attend(one, self.groups[one.ranks]) for one in everyone}

    def trials(self) -> list[TrialRun]:
        """Run everyone once at a short length: count what is sent, find out who cannot."""
        trials = dict.fromkeys(
            (one, Size(self.job.trial, size.heads, size.dim)) for size, who, _ in self.job.sizes for one in who
        )
        return [self._trial(one, size) for one, size in trials]

    def _trial(self, one: Contestant, size: Size) -> TrialRun:
        tried, failure = TrialRun(one, size), None
        if self.rank < one.ranks:
            local = self._local(one, whole(size, self.job.dtype))
            try:
                with Counting() as counting:
                    self._call(one, local)
                tried.sent_bytes = counting.bytes
            except Exception as error:
                failure = f"{type(error).__name__}: {error}".splitlines()[0]
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        tried.failure = next(filter(None, failures), None)
        return tried

    def rounds(self, failed: set[tuple[Contestant, Heads]]) -> Iterator[Measured]:
        """Run everyone else in turns, each round in another order; compare the first round's results."""
        for size, who, rounds in self.job.sizes:
            able = [one for one in who if (one, size.heads) not in failed]
            tensors = whole(size, self.job.dtype)
            right = truth(*tensors)
            for number in range(rounds):
                cut = number * len(able) // rounds
                for one in (*able[cut:], *able[:cut]):
                    if self.rank < one.ranks:
                        measured, results = self._measured(one, size, tensors)
                        if number == 0:
                            expected = _heads(one, right, self.rank)
                            measured.errors = errors(results, expected, held_positions(one, size.length, self.rank))
                        del results
                        yield measured
                    dist.barrier()

    def _measured(self, one: Contestant, size: Size, tensors: tuple[Tensor, ...]) -> tuple[Measured, list[Tensor]]:
        local = self._local(one, tensors)
        peak = Peak()
        dist.barrier(self.groups[one.ranks])
        start, cpu_start = time.perf_counter(), time.process_time()
        results = self._call(one, local)
        cpu_seconds, seconds = time.process_time() - cpu_start, time.perf_counter() - start
        measured = Measured(one, size, cpu_seconds, seconds, peak.bytes())
        order = [_axes(one).index(axis) for axis in range(4)]
        return measured, [x.permute(order) for x in results]

    def _local(self, one: Contestant, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """Return this rank's part of q, k, v and the output's gradient, as the contestant takes them."""
        spans = held_positions(one, tensors[0].shape[0], self.rank)
        mine = _heads(one, tensors, self.rank)
        parts = [torch.cat([x[span.slice()] for span in spans]).permute(_axes(one)).contiguous() for x in mine]
        return [*(x.requires_grad_() for x in parts[:3]), parts[3]]

    def _call(self, one: Contestant, local: list[Tensor]) -> list[Tensor]:
        """Run forward and backward; return out, dq, dk and dv."""
        q, k, v, grad = local
        with peers.self_sends_copied(one):
            out = self.attends[one](q, k, v)
            return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def _block(ranks: int) -> dist.ProcessGroup:
    """Return this rank's group, of as many neighbours; all others' are made, too."""
    firsts = range(0, dist.get_world_size(), ranks)
    return [dist.new_group(range(first, first + ranks)) for first in firsts][dist.get_rank() // ranks]


def _heads(one: Contestant, tensors: Sequence[Tensor], rank: int) -> Sequence[Tensor]:
    """Return the heads, of all in [n, b, h, d], that a rank computes."""
    return [x.chunk(2, dim=2)[rank] for x in tensors] if one.who == HALVES else tensors


def _axes(one: Contestant) -> tuple[int, ...]:
    """Return the order of a contestant's axes, out of [n, b, h, d]."""
    if one.who == OURS:
        return TOKENS_FIRST
    return HEADS_FIRST if one.who in (TORCH, ONE_PROCESS, HALVES) else BATCH_FIRST


def _attend(one: Contestant, group: dist.ProcessGroup) -> peers.Attend:
    if one.who in (ONE_PROCESS, HALVES):
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
    return (ours.attention if one.who == OURS else peers.peer)(one, group)
