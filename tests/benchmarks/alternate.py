"""Several pipeline schedules in one training run: each step is run by the next contestant, in turns.

Both contestants of a ratio then train the same model on the same cores under the same weather; what a machine does in
the background hits all of them alike. Upstream's schedule and ours are called by upstream's own `train_step`, and
attention is the same flash operator for both, so that the schedule is all that differs.
"""

import functools
import gc
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

PARTITION = "balanced"


@dataclass(frozen=True)
class Contestant:
    """A schedule to run a step by.

    Attributes:
        segments: K; 0: upstream's own function, 1: 1F1B by our executor.
        microbatches: M.
    """

    segments: int
    microbatches: int


@dataclass
class Measured:
    """What one rank measured of one step.

    Attributes:
        contestant: who ran it.
        step_seconds: upstream's whole `train_step`, from a common start.
        schedule_seconds: its forward-backward function alone.
        spans: (kind, segment, seconds) of every action (ours alone).
        lengths: tokens per segment (ours alone).
        peak_bytes: most bytes kept for backward at any moment, keys and values of earlier segments included.
    """

    contestant: Contestant
    step_seconds: float = 0.0
    schedule_seconds: float = 0.0
    spans: list[tuple[str, int, float]] = field(default_factory=list)
    lengths: tuple[int, ...] = ()
    peak_bytes: int = 0


class SavedBytes:
    """Counts the bytes that autograd keeps for backward: storages, each once, without parameters."""

    def __init__(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        self.excluded = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.holders: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.bytes = self.peak = 0
        self.further: Callable[[], int] = lambda: 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved inside."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield

    def _pack(self, tensor: torch.Tensor) -> Any:
        kept = _SavedTensor(tensor)
        place = tensor.untyped_storage().data_ptr()
        if place not in self.excluded:
            if self.holders.setdefault(place, 0) == 0:
                self.sizes[place] = tensor.untyped_storage().nbytes()
                self.bytes += self.sizes[place]
            self.holders[place] += 1
            weakref.finalize(kept, self._drop, place)
        self.peak = max(self.peak, self.bytes + self.further())
        return kept

    def _drop(self, place: int) -> None:
        self.holders[place] -= 1
        if self.holders[place] == 0:
            self.bytes -= self.sizes.pop(place)
            del self.holders[place]


class _SavedTensor:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def stored_bytes(runner: Any, kept: SavedBytes) -> int:
    """Return the bytes of segments' keys, values and their gradients that autograd does not keep as well."""
    slots = [slot for chunk in runner.chunks for slot in chunk.store._layers.values()] if runner else []
    storages = [x.untyped_storage() for slot in slots for part in (*slot.parts, *slot.grads.values()) for x in part]
    return sum(storage.nbytes() for storage in storages if not kept.holders.get(storage.data_ptr()))


# The guards would wrap the functions that are replaced here, in the turns of all contestants.
NO_GUARDS = (
    *("--no-locate-nonfinite-gradients", "--stall-timeout-minutes", "0"),
    *("--first-step-timeout-minutes", "0", "--loss-spike-policy", "off"),
)


@dataclass(frozen=True)
class Job:
    """What the ranks are told.

    Attributes:
        flags: upstream's command line.
        turns: who runs which step.
        count_bytes: count what is kept for backward (slows the step down).
    """

    flags: tuple[str, ...]
    turns: tuple[Contestant, ...]
    count_bytes: bool = False


def run_on_this_rank(job: Job) -> list[Measured]:
    """Train by `pretrain`, one contestant per step; runs in a rank of the pool, on one core and one thread."""
    rank, cores = int(os.environ["RANK"]), sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    sys.argv = ["pretrain_gpt.py", *job.flags, *NO_GUARDS]
    import patches

    patches.start()
    from megatron.training import training

    from megatron.longseq.pretrain_gpt import main

    race = _Race(job, training.get_forward_backward_func)
    training.get_forward_backward_func = lambda **_: race.forward_backward
    training.train_step = race.timed(training.train_step)
    main()
    return race.results


class _Race:
    """Holds the contestants of one rank."""

    def __init__(self, job: Job, upstream: Callable[..., Any]) -> None:
        self.job, self.upstream = job, upstream
        self.runners: dict[int, Any] = {}
        self.results: list[Measured] = []
        self.kept: SavedBytes | None = None

    @property
    def turn(self) -> Measured:
        """Return the step that is running."""
        return self.results[-1]

    def timed(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap upstream's `train_step`."""

        def step(*args: Any, **kwargs: Any) -> Any:
            self.results.append(Measured(self.job.turns[len(self.results)]))
            gc.collect()
            torch.distributed.barrier()
            start = time.perf_counter()
            result = train_step(*args, **kwargs)
            self.turn.step_seconds = time.perf_counter() - start
            return result

        return step

    def forward_backward(self, *, model: Any, num_microbatches: int, **named: Any) -> Any:
        """Run a step's forwards and backwards by the contestant whose turn it is."""
        contestant = self.turn.contestant
        named |= {"model": model, "num_microbatches": contestant.microbatches}
        runner = self._runner(contestant.segments)
        with ExitStack() as stack:
            if self.job.count_bytes:
                self.kept = SavedBytes(parameter for chunk in model for parameter in chunk.parameters())
                self.kept.further = functools.partial(stored_bytes, runner, self.kept)
                stack.enter_context(self.kept.counting())
            start = time.perf_counter()
            if runner is None:
                stack.enter_context(flash_attention(model))
                result = self.upstream()(**named)
            else:
                result = self._ours(runner, stack, named)
            self.turn.schedule_seconds = time.perf_counter() - start
            if self.kept is not None:
                self.turn.peak_bytes = self.kept.peak
        return result

    def _ours(self, runner: Any, stack: ExitStack, named: dict[str, Any]) -> Any:
        if len(runner.plan.lengths) == 1:
            stack.enter_context(flash_attention(named["model"]))
        self.turn.lengths = runner.plan.lengths
        result = runner(**named)
        for chunk in runner.chunks:
            chunk.detach()
        runner.chunks = []
        return result

    def _note(self, schedule: Any, rank: int, spans: Any) -> None:
        self.turn.spans = [(span.action.kind.value, span.action.segment, span.end - span.start) for span in spans]

    def _runner(self, segments: int) -> Any:
        from megatron.training import get_args

        from megatron.longseq.pipeline.forward_backward import ForwardBackward
        from megatron.longseq.pipeline.plan.from_args import plan_from_args

        if segments == 0:
            return None
        if segments not in self.runners:
            args = get_args()
            args.seq1f1b_splits, args.seq1f1b_partition = segments, PARTITION
            self.runners[segments] = ForwardBackward(plan_from_args(args), trace=self._note)
            args.seq1f1b_splits = 1
        return self.runners[segments]


@contextmanager
def flash_attention(model: list[torch.nn.Module]) -> Iterator[None]:
    """Give upstream's layers the flash operator that segments are computed with, in place of their unfused product."""
    from megatron.core.transformer.attention import SelfAttention

    layers = [module for chunk in model for module in chunk.modules() if isinstance(module, SelfAttention)]

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    for layer in layers:
        layer.core_attention.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.core_attention.forward
