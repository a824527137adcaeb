"""Run one rank's list of actions with upstream's forward and backward steps. One executor serves every schedule."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config

from megatron.longseq.pipeline.plan.receives import ReceiveOrder
from megatron.longseq.pipeline.plan.schedule import Action, ActionKind, Pipeline, Schedule
from megatron.longseq.pipeline.runtime.forward_step import ForwardStep
from megatron.longseq.pipeline.runtime.grad_sync import BucketReductions, GradSums, GradSync
from megatron.longseq.pipeline.runtime.hang_report import HangReporter
from megatron.longseq.pipeline.runtime.p2p import Mailbox, StageChannels
from megatron.longseq.pipeline.runtime.segmented_model import SegmentedModel
from megatron.longseq.pipeline.runtime.step_timer import StepTimer
from megatron.longseq.pipeline.runtime.weight_grad import WeightGradStore

Unit = tuple[int, int, int]  # micro-batch, segment, virtual stage


@dataclass(frozen=True)
class StepRequest:
    """The arguments of one step, under the names of upstream's schedules.

    Attributes:
        forward_step_func: the script's forward step.
        data: the script's data iterator of each virtual stage.
        micro_batch_size: sequences per micro-batch.
        forward_only: whether this is an evaluation step.
        collect_non_loss_data: whether the loss function returns other data.
        first_val_step: whether this is the first step of an evaluation; None in training.
        cp_size: context-parallel size, used by upstream's loss scaling.
        tp_group: tensor-parallel group.
    """

    forward_step_func: Callable[..., Any]
    data: Sequence[Iterator[Any] | None]
    micro_batch_size: int
    forward_only: bool = False
    collect_non_loss_data: bool = False
    first_val_step: bool | None = None
    cp_size: int = 1
    tp_group: torch.distributed.ProcessGroup | None = None


@dataclass
class Executor:
    """One rank's step.

    Attributes:
        schedule: a validated schedule.
        rank: this rank's place in the pipeline.
        chunks: this rank's model chunks, by virtual stage.
        channels: process groups of the pipeline.
        receive_order: when this rank posts its receives.
        shape: function from an action to the shape of the hidden states, or of their gradient, that it receives.
        step: arguments of the step.
        reporter: reports waits that take too long.
        weights: keeps deferred weight gradients, if the schedule has WEIGHT actions.
        timer: measures the actions, if the step is traced.
        sums: per virtual stage the sums of gradients over a micro-batch's segments; empty with whole sequences.
        after_microbatch: called with virtual stage and micro-batch when the gradients of the micro-batch are added.
        alive: forward to backward: a unit's input, its output, and its loss if the loss has a graph of its own.
        reports: what the loss function has reported.
    """

    schedule: Schedule
    rank: int
    chunks: Sequence[SegmentedModel]
    channels: StageChannels
    receive_order: ReceiveOrder
    shape: Callable[[Action], tuple[int, ...]]
    step: StepRequest
    reporter: HangReporter
    weights: WeightGradStore | None = None
    timer: StepTimer | None = None
    sums: Sequence[GradSums] = ()
    after_microbatch: Callable[[int, int], None] | None = None
    alive: dict[Unit, tuple[Any, Any, Any]] = field(default_factory=dict)
    reports: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = get_model_config(self.chunks[0].module)
        self.order = self.schedule.orders[self.rank]
        self.device = next(self.chunks[0].module.parameters()).device
        self.tokens = torch.zeros([], dtype=torch.int, device=self.device)
        self.forward_steps = [self._forward_step(vstage) for vstage in range(self.pipeline.virtual)]
        self.sync = GradSync(self.config, [chunk.module for chunk in self.chunks], self.order, self.rank)

    @property
    def pipeline(self) -> Pipeline:
        """Sizes of the pipeline."""
        return self.schedule.pipeline

    def run(self) -> list[Any]:
        """Run all actions.

        If an action raises, all state of the step is dropped, so that a script may catch the error and continue.

        Returns:
            The reports of the script's loss function per micro-batch on the last stage, else an empty list.
        """
        try:
            return self._run()
        except BaseException:
            for part in (*self.chunks, *self.sums, *([] if self.weights is None else [self.weights])):
                part.reset()
            raise

    def _run(self) -> list[Any]:
        mail = Mailbox(
            self.channels,
            self.schedule,
            self.receive_order,
            self.shape,
            lambda shape: torch.empty(shape, dtype=self.config.pipeline_dtype, device=self.device),
            self.reporter,
            self._starts_shape(),
            self.config.timers,
        )
        run = {
            ActionKind.FORWARD: self._forward,
            ActionKind.BACKWARD: self._backward,
            ActionKind.WEIGHT: self._weight,
        }
        with self.sync.paused(forward_only=self.step.forward_only):
            for index, action in enumerate(self.order):
                mail.post()
                received, starts = mail.take(action)
                self.sync.before(index)
                if starts is not None:
                    self.chunks[action.vstage].learn_documents(action.microbatch, starts)
                with self.timer.action(action) if self.timer is not None else contextlib.nullcontext():
                    output = run[action.kind](action, received)
                mail.send(action, output, self.chunks[action.vstage].starts.get(action.microbatch))
                self._release(action)
                self.sync.after(index)
            mail.close()
            self._assert_finished()
        return self.reports

    def _forward_step(self, vstage: int) -> ForwardStep:
        return ForwardStep(
            self.step.forward_step_func,
            self.step.data[vstage],
            self.pipeline.segments,
            self.chunks[vstage].outputs if self._is_last_stage(vstage) else None,
            self.step.tp_group,
            self.device,
        )

    def _forward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor:
        chunk, forward_step = self._enter(action), self.forward_steps[action.vstage]
        reports: list[Any] = []
        if received is not None and not self.step.forward_only:
            received.requires_grad_()
        is_first = action.microbatch == 0 and action.segment == 0
        is_part, ends = self._is_part(action), action.segment == self.pipeline.segments - 1
        output, tokens = schedules.forward_step(
            lambda _, model: forward_step.run(action.segment, model),
            None,  # the forward step holds the data iterator
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
            is_last_stage=self._is_last_stage(action.vstage) and ends,  # the loss needs the outputs of all segments
        )
        self.reports += reports
        self.tokens += tokens
        if not self.step.forward_only:
            root, loss = (chunk.outputs.take_root(), output) if is_part and ends else (output, None)
            self.alive[_unit(action)] = received, root, loss
        return output

    def _backward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor | None:
        self._enter(action)
        if self.sums:
            self.sums[action.vstage].open()
        if self.weights is not None:
            self.weights.begin(_unit(action))
        input, output, loss = self.alive.pop(_unit(action))
        if loss is not None:
            with self.sync.around_loss(action):  # upstream scales the loss; this computes the gradient of every output
                schedules.backward_step(None, loss, None, self.config)
            del loss
        if self._is_part(action):
            received = torch.ones_like(output)  # with None, upstream would scale the root as if it were a loss
        gradient = schedules.backward_step(input, output, received, self.config)
        if gradient is None and input is not None:  # the loss does not depend on the input
            gradient = torch.zeros_like(input)
        if self.weights is not None:
            self.weights.end()
        return gradient

    def _weight(self, action: Action, received: torch.Tensor | None) -> None:
        assert self.weights is not None, "the schedule has WEIGHT actions, but no weight gradient is deferred"
        unit, sums = _unit(action), self.sums[action.vstage] if self.sums else None
        if sums is not None:
            sums.open()
        if self.sync.is_final_weight(action):
            complete = sums.close if sums is not None else None
            reductions = BucketReductions(self.chunks[action.vstage].module, self.weights.weights(unit), complete)
            self.weights.run(unit, reductions.ready)
        else:
            self.weights.run(unit)

    def _enter(self, action: Action) -> SegmentedModel:
        chunk = self.chunks[action.vstage]
        chunk.enter(action.microbatch, action.segment, self.step.forward_only)
        return chunk

    def _release(self, action: Action) -> None:
        """Free what no later action needs."""
        # The last stage sends no output. Its loss may be a view, which upstream refuses to deallocate.
        is_forward = action.kind is ActionKind.FORWARD
        if is_forward and not self.step.forward_only and not self._is_last_stage(action.vstage):
            schedules.deallocate_output_tensor(self.alive[_unit(action)][1], self.config.deallocate_pipeline_outputs)
        last = self.pipeline.segments - 1 if self.step.forward_only else 0
        kind = ActionKind.FORWARD if self.step.forward_only else ActionKind.BACKWARD
        if action.kind is kind and action.segment == last:
            self.chunks[action.vstage].leave(action.microbatch)
        final = ActionKind.BACKWARD if self.weights is None else ActionKind.WEIGHT
        if action.kind is not final or action.segment != 0:  # a micro-batch's backwards follow one another
            return
        if self.sums:
            self.sums[action.vstage].close()
        if self.after_microbatch is not None:
            self.after_microbatch(action.vstage, action.microbatch)

    def _assert_finished(self) -> None:
        if self.alive:
            raise RuntimeError(f"pipeline rank {self.rank}: no backward ran for units {sorted(self.alive)}")
        for chunk in self.chunks:
            chunk.assert_empty()
        if self.weights is not None:
            self.weights.assert_empty()

    def _is_last_stage(self, vstage: int) -> bool:
        return self.pipeline.stage(self.rank, vstage) == self.pipeline.depth - 1

    def _is_part(self, action: Action) -> bool:
        """Return whether the action's output is only a part of what the loss function gets."""
        return self._is_last_stage(action.vstage) and self.pipeline.segments > 1

    def _starts_shape(self) -> tuple[int, int] | None:
        chunk = self.chunks[0]
        return (self.step.micro_batch_size, sum(chunk.lengths)) if chunk.sends_documents else None


def _unit(action: Action) -> Unit:
    return action.microbatch, action.segment, action.vstage
