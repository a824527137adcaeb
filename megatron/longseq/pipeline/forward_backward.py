"""The function that replaces upstream's forward-backward function; upstream calls it once per step."""

import atexit
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from megatron.longseq.attention.module import ContextParallel
from megatron.longseq.attention.runtime.document_layouts import DocumentLayouts
from megatron.longseq.attention.runtime.packed_batch import PackedReader
from megatron.longseq.pipeline.plan.from_args import PipelinePlan
from megatron.longseq.pipeline.plan.receives import ReceiveOrder
from megatron.longseq.pipeline.plan.schedule import Action, Schedule
from megatron.longseq.pipeline.plan.simulate import ActionTime
from megatron.longseq.pipeline.runtime.document_cuts import DocumentCuts
from megatron.longseq.pipeline.runtime.executor import Executor, StepRequest
from megatron.longseq.pipeline.runtime.grad_sync import GradSums
from megatron.longseq.pipeline.runtime.hang_report import HangReporter
from megatron.longseq.pipeline.runtime.p2p import StageChannels, open_channels
from megatron.longseq.pipeline.runtime.segmented_model import SegmentedModel
from megatron.longseq.pipeline.runtime.step_timer import DeviceClock, HostClock, StepTimer
from megatron.longseq.pipeline.runtime.weight_grad import Attachment, WeightGradStore, attach


@dataclass
class ForwardBackward:
    """Runs training and evaluation steps; called with the keywords of upstream's schedules.

    Attributes:
        plan: the schedules and the segment lengths.
        needs_mask: whether every micro-batch must have an attention mask (--reset-attention-mask).
        sends_documents: whether the documents of every micro-batch are sent from stage to stage (with segments).
        context: process groups of context parallelism; None without it.
        document_cuts: cuts each micro-batch by its documents; None: all have the plan's segments.
        packed: reads packed documents; None: those of one context-parallel rank without a comparison of ranks.
        patience: seconds after which a waiting rank reports what it waits for.
        timeout: time after which a missing message is an error; None: the backend's own.
        trace: called with the schedule, this rank's place and its measured actions of one step; None: not measured.
        trace_step: training step to measure, from 1; None: every step.
        after_microbatch: called with virtual stage and micro-batch when the gradients of the micro-batch are added.
        wants_times: says of a training step, by its number in this process from 1, whether to measure it for
            `take_measured`; None: no step.
    """

    plan: PipelinePlan
    needs_mask: bool = False
    sends_documents: bool = False
    context: ContextParallel | None = None
    document_cuts: DocumentCuts | None = None
    packed: PackedReader | None = None
    patience: float = 60.0
    timeout: timedelta | None = None
    trace: Callable[[Schedule, int, tuple[ActionTime, ...]], None] | None = None
    trace_step: int | None = None
    after_microbatch: Callable[[int, int], None] | None = None
    wants_times: Callable[[int], bool] | None = None
    channels: StageChannels | None = None
    chunks: list[SegmentedModel] = field(default_factory=list)
    sums: list[GradSums] = field(default_factory=list)
    weights: WeightGradStore = field(default_factory=WeightGradStore)
    split: Attachment | None = None
    reporter: HangReporter | None = None
    steps: int = 0
    kinds: set[bool] = field(default_factory=set)  # `forward_only` of the steps so far
    measured: tuple[Schedule, int, Callable[[], tuple[ActionTime, ...]]] | None = None

    def __call__(  # noqa: PLR0913  # upstream's keywords
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: torch.nn.Module | list[torch.nn.Module],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Any = None,
        p2p_communicator: Any = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
    ) -> list[Any]:
        """Run one step.

        Returns:
            The reports of the loss function per micro-batch on the last stage, else an empty list.

        Raises:
            ValueError: the step cannot be cut into segments; the message says why.
        """
        if decoder_seq_length not in (None, seq_length) or adjust_tensor_shapes_fn is not None:
            raise ValueError("our schedules support decoder-only models of one sequence length, without distillation.")
        if sum(self.plan.lengths) != seq_length:
            raise ValueError(f"segments of {self.plan.lengths} tokens do not sum to the sequence length {seq_length}.")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        modules = model if isinstance(model, list) else [model]
        self._prepare(modules, p2p_communicator.pp_group if p2p_communicator is not None else groups.pp)
        config = get_model_config(modules[0])
        _refuse_config(config)
        if config.timers is not None:
            config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
        step = StepRequest(
            forward_step_func=forward_step_func,
            data=self._cut(data_iterator if isinstance(data_iterator, list) else [data_iterator], num_microbatches),
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
            first_val_step=first_val_step,
            cp_size=groups.cp.size(),
            tp_group=groups.tp,
        )
        executor = self._executor(step, num_microbatches, config, groups)
        if executor.timer is not None:
            executor.timer.start_step()
        reports = executor.run()
        if not forward_only:
            self._keep_times(executor)
            if config.finalize_model_grads_func is not None:
                tokens = executor.tokens if config.calculate_per_token_loss else None
                finalize = config.finalize_model_grads_func
                finalize(modules, tokens, pg_collection=groups, force_all_reduce=force_all_reduce)
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return reports

    def take_measured(self) -> tuple[Schedule, int, tuple[ActionTime, ...]] | None:
        """Return the schedule, this rank's place and its measured actions of the last training step, once.

        On a GPU this waits for the step to end. The result is None if the step was not measured, or is taken already.
        """
        measured, self.measured = self.measured, None
        return None if measured is None else (*measured[:2], measured[2]())

    def _keep_times(self, executor: Executor) -> None:
        """Keep the times of a training step, and write them if it is the step of --pipeline-trace-step."""
        timer, self.measured = executor.timer, None
        if timer is None:
            return
        self.measured = executor.schedule, executor.rank, timer.finish
        if self._is_traced():
            spans = timer.finish()
            self.measured = executor.schedule, executor.rank, lambda: spans
            atexit.unregister(self._warn_of_missing_trace)
            assert self.trace is not None
            self.trace(executor.schedule, executor.rank, spans)

    def _is_traced(self) -> bool:
        return self.trace is not None and self.trace_step in (None, self.steps)

    def _warn_of_missing_trace(self) -> None:
        print(
            f"> WARNING: --pipeline-trace-step {self.trace_step}: this run ended after {self.steps} training steps, "
            "so no timeline was written.",
            flush=True,
        )

    def _prepare(self, modules: list[torch.nn.Module], group: torch.distributed.ProcessGroup) -> None:
        """Open the channels at the first step, and attach to the model whenever it is another one."""
        if self.channels is None:
            self.channels = open_channels(group, self.plan.virtual, self.timeout)
            self.reporter = HangReporter(self.patience, prepare=_use_this_device())
            self.reporter.start()
            if self.trace is not None and torch.distributed.get_rank() == 0:
                atexit.register(self._warn_of_missing_trace)
        if [chunk.module for chunk in self.chunks] == modules:
            return
        for attached in (*self.chunks, *self.sums):
            attached.detach()
        self.chunks = [self._chunk(module) for module in modules]
        if len(self.plan.lengths) > 1:
            for chunk in self.chunks:
                chunk.attach()
            self.sums = [GradSums(module) for module in modules]
        if self.split is not None:
            self.split.detach()
        if self.plan.zero_bubble:
            self.split = attach(modules, self.weights)

    def _chunk(self, module: torch.nn.Module) -> SegmentedModel:
        sends = self.sends_documents and self.plan.stages > 1 and len(self.plan.lengths) > 1
        return SegmentedModel(
            module,
            self.plan.lengths,
            needs_mask=self.needs_mask,
            allows_documents=sends or self.plan.stages == 1,
            sends_documents=sends,
            context=self.context,
            packed=self.packed or PackedReader(1, 0, layouts=DocumentLayouts(lengths=tuple(self.plan.lengths))),
        )

    def _cut(self, data: list[Any], microbatches: int) -> list[Any]:
        """Cut the micro-batches of a step into segments, and return data iterators for it."""
        if self.document_cuts is None:
            return data
        data, cuts = self.document_cuts.of_step(data, microbatches)
        for chunk in self.chunks:
            chunk.cuts = cuts
        return data

    def _shape(self, action: Action, shards: int, micro_batch_size: int, hidden_size: int) -> tuple[int, int, int]:
        """Return the shape of the hidden states of an action, or of their gradient."""
        cuts = self.chunks[action.vstage].cuts
        lengths = cuts[action.microbatch] if cuts else self.plan.lengths
        return lengths[action.segment] // shards, micro_batch_size, hidden_size

    def _receives(self, microbatches: int, forward_only: bool) -> tuple[ReceiveOrder, ...]:
        """Return the receive order of every rank in this step.

        The first step of each kind may load kernels, for which CUDA may wait for the whole device. On serial channels,
        an early receive would delay sends.
        """
        is_first = forward_only not in self.kinds
        self.kinds.add(forward_only)
        is_serial = self.channels is not None and self.channels.is_serial
        return self.plan.receives(microbatches, forward_only, synchronized=is_first or is_serial)

    def _executor(self, step: StepRequest, microbatches: int, config: Any, groups: Any) -> Executor:
        schedule = self.plan.schedule(microbatches, step.forward_only)
        self.steps += not step.forward_only
        wants_times = self.wants_times is not None and self.wants_times(self.steps)
        is_measured = not step.forward_only and (self._is_traced() or wants_times)
        shards = groups.cp.size() * (groups.tp.size() if config.sequence_parallel else 1)
        assert self.channels is not None and self.reporter is not None
        return Executor(
            schedule=schedule,
            rank=groups.pp.rank(),
            chunks=self.chunks,
            channels=self.channels,
            receive_order=self._receives(microbatches, step.forward_only)[groups.pp.rank()],
            shape=lambda action: self._shape(action, shards, step.micro_batch_size, config.hidden_size),
            step=step,
            reporter=self.reporter,
            weights=self.weights if schedule.splits_weights else None,
            sums=self.sums,
            after_microbatch=self.after_microbatch,
            timer=StepTimer(DeviceClock() if torch.cuda.is_available() else HostClock()) if is_measured else None,
        )


def _refuse_config(config: Any) -> None:
    """Refuse settings that a script or a layout of layers puts into the model's configuration past the flags.

    Raises:
        ValueError: names the field and the reason.
    """
    if config.mtp_standalone:
        raise ValueError(
            "our pipeline schedules do not support multi-token prediction in its own pipeline stage, because "
            "upstream's messages then have different sizes. Put its layers into the stage of the last decoder layers."
        )
    if config.num_microbatches_with_partial_activation_checkpoints is not None:
        raise ValueError(
            "our pipeline schedules recompute all micro-batches in the same way; leave "
            "num_microbatches_with_partial_activation_checkpoints out of the model's configuration."
        )


def _use_this_device() -> Callable[[], None]:
    """Return a function for new threads, which would otherwise open a context on the node's first GPU."""
    if not torch.cuda.is_available():
        return lambda: None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())
