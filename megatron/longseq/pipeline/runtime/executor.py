"""Runs one rank's list of actions over upstream's forward and backward steps; one executor for every schedule."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config

from megatron.longseq.pipeline.plan.receives import Posts
from megatron.longseq.pipeline.plan.schedule import Action, Kind, Pipeline, Schedule
from megatron.longseq.pipeline.runtime.grad_sums import GradSums
from megatron.longseq.pipeline.runtime.grad_sync import GradSync
from megatron.longseq.pipeline.runtime.hang_report import Watch
from megatron.longseq.pipeline.runtime.p2p import Lanes, Mailbox
from megatron.longseq.pipeline.runtime.segmented_model import Chunk, Replay
from megatron.longseq.pipeline.runtime.step_timer import Recorder
from megatron.longseq.pipeline.runtime.weight_grad import WeightStore

Unit = tuple[int, int, int]  # micro-batch, segment, virtual stage


@dataclass(frozen=True)
class Step:
    """What upstream's training loop asks of one step; the names are those of upstream's schedules.

    Attributes:
        forward_step_func: the script's forward step.
        data: per virtual stage the script's data iterator.
        micro_batch_size: sequences per micro-batch.
        forward_only: evaluation.
        collect_non_loss_data: the loss function is asked for other data.
        first_val_step: whether this is the first step of an evaluation; None in training.
        cp_size: context-parallel size, which upstream's loss scaling wants.
    """

    forward_step_func: Callable[..., Any]
    data: Sequence[Iterator[Any] | None]
    micro_batch_size: int
    forward_only: bool = False
    collect_non_loss_data: bool = False
    first_val_step: bool | None = None
    cp_size: int = 1


@dataclass
class Executor:
    """One rank's step.

    Attributes:
        schedule: a proven schedule.
        rank: this rank's place in the pipeline.
        chunks: this rank's model chunks, by virtual stage.
        lanes: the pipeline's communicators.
        posts: when this rank posts receives.
        shape: segment -> shape of its hidden states on this rank.
        step: what the training loop asks.
        watch: told of every wait.
        weights: deferred weight gradients, where the schedule has them.
        recorder: told when each action begins and ends.
        sums: per virtual stage, what sums gradients over a micro-batch's segments; empty: upstream's buffers do.
    """

    schedule: Schedule
    rank: int
    chunks: Sequence[Chunk]
    lanes: Lanes
    posts: Posts
    shape: Callable[[int], tuple[int, ...]]
    step: Step
    watch: Watch
    weights: WeightStore | None = None
    recorder: Recorder | None = None
    sums: Sequence[GradSums] = ()
    alive: dict[Unit, tuple[Any, Any, Any]] = field(
        default_factory=dict
    )  # unit -> its input, its output, and a loss with a graph of its own; forward to backward
    reports: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = get_model_config(self.chunks[0].module)
        self.order = self.schedule.orders[self.rank]
        self.tokens = torch.zeros([], dtype=torch.int, device=self._device())
        self.data = [None if samples is None else Replay(samples, self.pipeline.segments) for samples in self.step.data]
        self.sync = GradSync(self.config, [chunk.module for chunk in self.chunks], self.order, self.rank)

    @property
    def pipeline(self) -> Pipeline:
        """The sizes."""
        return self.schedule.pipeline

    def run(self) -> list[Any]:
        """Run all actions; returns what the script's loss function reported, per micro-batch (last stage only).

        After an exception nothing of the step is kept: a script on one stage may catch it and go on.
        """
        try:
            return self._run()
        except BaseException:
            for part in (*self.chunks, *self.sums, *([] if self.weights is None else [self.weights])):
                part.reset()
            raise

    def _run(self) -> list[Any]:
        mail = Mailbox(
            self.lanes,
            self.schedule,
            self.posts,
            self.shape,
            self._empty,
            self.watch,
            self._starts_shape(),
            self.config.timers,
        )
        run = {Kind.FORWARD: self._forward, Kind.BACKWARD: self._backward, Kind.WEIGHT: self._weight}
        with self.sync.paused(forward_only=self.step.forward_only):
            for index, action in enumerate(self.order):
                mail.post()
                received, starts = mail.take(action)
                self.sync.before(index)
                if starts is not None:
                    self.chunks[action.vstage].learn_documents(action.microbatch, starts)
                with self._recorded(action):
                    output = run[action.kind](action, received)
                mail.send(action, output, self.chunks[action.vstage].starts.get(action.microbatch))
                self._release(action)
                self.sync.after(index)
            mail.close()
            self._assert_finished()
        return self.reports

    def _forward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor:
        chunk, data = self._enter(action), self.data[action.vstage]
        if data is not None:
            data.rewind(is_first=action.segment == 0)
        reports: list[Any] = []
        if received is not None and not self.step.forward_only:
            received.requires_grad_()
        is_first = action.microbatch == 0 and action.segment == 0
        is_part, ends = self._is_part(action), action.segment == self.pipeline.segments - 1
        output, tokens = schedules.forward_step(
            self._without_loss(chunk) if is_part and not ends else self.step.forward_step_func,
            data,
            chunk.module,
            self.pipeline.microbatches,
            received,
            reports,
            self.config,
            cp_group_size=self.step.cp_size,
            collect_non_loss_data=self.step.collect_non_loss_data,
            is_first_microbatch=schedules.check_first_val_step(
                self.step.first_val_step, self.step.forward_only, is_first
            ),
            current_microbatch=action.microbatch,
            vp_stage=action.vstage if self.pipeline.virtual > 1 else None,
            is_last_stage=self._is_last(action) and ends,  # the loss needs the outputs of all segments
        )
        self.reports += reports
        self.tokens += tokens
        if not self.step.forward_only:
            left, loss = (chunk.outputs.take_root(), output) if is_part and ends else (output, None)
            self.alive[_unit(action)] = received, left, loss
        return output

    def _without_loss(self, chunk: Chunk) -> Callable[..., Any]:
        """Return the script's forward step for a segment before the last: it returns the root of the graph."""

        def forward_step(*args: Any) -> tuple[torch.Tensor, None]:
            self.step.forward_step_func(*args)
            return chunk.outputs.take_root(), None

        return forward_step

    def _backward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor | None:
        self._enter(action)
        if self.sums:
            self.sums[action.vstage].open()
        if self.weights is not None:
            self.weights.begin(_unit(action))
        entered, left, loss = self.alive.pop(_unit(action))
        if loss is not None:
            with self.sync.around_loss(action):  # upstream scales it, and it leaves the gradient of every output
                schedules.backward_step(None, loss, None, self.config)
            del loss
        if self._is_part(action):
            received = torch.ones_like(left)  # the root of a segment; with None upstream would scale it as a loss
        gradient = schedules.backward_step(entered, left, received, self.config)
        if gradient is None and entered is not None:  # the loss does not depend on the input
            gradient = torch.zeros_like(entered)
        if self.weights is not None:
            self.weights.end()
        return gradient

    def _weight(self, action: Action, received: torch.Tensor | None) -> None:
        assert self.weights is not None, "the schedule has weight actions, but no weight gradient is deferred"
        if self.sums:
            self.sums[action.vstage].open()
        self.weights.run(_unit(action))

    def _enter(self, action: Action) -> Chunk:
        chunk = self.chunks[action.vstage]
        chunk.enter(action.microbatch, action.segment, self.step.forward_only)
        return chunk

    def _release(self, action: Action) -> None:
        """Free what the action has made superfluous."""
        # The last stage sends its loss nowhere; it may be a view, which upstream refuses to deallocate.
        if action.kind is Kind.FORWARD and not self.step.forward_only and not self._is_last(action):
            schedules.deallocate_output_tensor(self.alive[_unit(action)][1], self.config.deallocate_pipeline_outputs)
        last = self.pipeline.segments - 1 if self.step.forward_only else 0
        kind = Kind.FORWARD if self.step.forward_only else Kind.BACKWARD
        if action.kind is kind and action.segment == last:
            self.chunks[action.vstage].leave(action.microbatch)
        ends = Kind.BACKWARD if self.weights is None else Kind.WEIGHT
        if self.sums and action.kind is ends and action.segment == 0:  # backwards of a micro-batch follow one another
            self.sums[action.vstage].close()

    def _assert_finished(self) -> None:
        if self.alive:
            raise RuntimeError(f"pipeline rank {self.rank}: no backward for units {sorted(self.alive)}")
        for chunk in self.chunks:
            chunk.assert_empty()
        if self.weights is not None:
            self.weights.assert_empty()

    def _is_last(self, action: Action) -> bool:
        return self.pipeline.stage(self.rank, action.vstage) == self.pipeline.depth - 1

    def _is_part(self, action: Action) -> bool:
        """Whether it puts out a part of what the loss function is given."""
        return self._is_last(action) and self.pipeline.segments > 1

    def _starts_shape(self) -> tuple[int, int] | None:
        chunk = self.chunks[0]
        return (self.step.micro_batch_size, sum(chunk.lengths)) if chunk.tells_documents else None

    def _recorded(self, action: Action) -> contextlib.AbstractContextManager[Any]:
        return self.recorder.action(action) if self.recorder is not None else contextlib.nullcontext()

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=self.config.pipeline_dtype, device=self._device())

    def _device(self) -> torch.device:
        return next(self.chunks[0].module.parameters()).device


def _unit(action: Action) -> Unit:
    return action.microbatch, action.segment, action.vstage
