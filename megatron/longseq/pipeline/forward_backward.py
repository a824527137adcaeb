"""Upstream's forward-backward function for our schedules: `pretrain` calls it once per training or evaluation step."""

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
from megatron.longseq.pipeline.plan.from_args import Plan
from megatron.longseq.pipeline.plan.schedule import Schedule
from megatron.longseq.pipeline.plan.timeline import Span
from megatron.longseq.pipeline.runtime.executor import Executor, Step
from megatron.longseq.pipeline.runtime.grad_sums import GradSums
from megatron.longseq.pipeline.runtime.hang_report import Watch
from megatron.longseq.pipeline.runtime.p2p import Lanes, open_lanes
from megatron.longseq.pipeline.runtime.segmented_model import Chunk
from megatron.longseq.pipeline.runtime.step_timer import DeviceClock, HostClock, Recorder
from megatron.longseq.pipeline.runtime.weight_grad import Attachment, WeightStore, attach


@dataclass
class PipelineRunner:
    """Called with the keywords of upstream's schedules; what lasts from step to step is kept here.

    Attributes:
        plan: what the flags ask.
        needs_mask: whether every micro-batch must have an attention mask (--reset-attention-mask).
        tells_documents: whether the documents of every micro-batch are sent from stage to stage, with segments.
        context: groups of context parallelism, which segments need; None: there is one context-parallel rank.
        patience: seconds after which a waiting rank says what it waits for.
        timeout: after which a message between stages that does not come is an error; None: the backend's own.
        trace: given a training step's schedule, this rank's place and its measured spans; None: none is measured.
        trace_step: which step that is, counted from 1; None: every one.
    """

    plan: Plan
    needs_mask: bool = False
    tells_documents: bool = False
    context: ContextParallel | None = None
    patience: float = 60.0
    timeout: timedelta | None = None
    trace: Callable[[Schedule, int, tuple[Span, ...]], None] | None = None
    trace_step: int | None = None
    lanes: Lanes | None = None
    chunks: list[Chunk] = field(default_factory=list)
    sums: list[GradSums] = field(default_factory=list)
    weights: WeightStore = field(default_factory=WeightStore)
    split: Attachment | None = None
    watch: Watch | None = None
    steps: int = 0

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
        """Run one step; returns the reports of the loss function per micro-batch (last stage), else an empty list.

        Raises:
            ValueError: the step is one that cannot be cut into segments; says why.
        """
        if decoder_seq_length not in (None, seq_length) or adjust_tensor_shapes_fn is not None:
            raise ValueError("our schedules serve decoder-only models of one sequence length, without distillation.")
        if sum(self.plan.lengths) != seq_length:
            raise ValueError(f"segments of {self.plan.lengths} tokens do not make up a sequence of {seq_length}.")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        modules = model if isinstance(model, list) else [model]
        self._prepare(modules, p2p_communicator.pp_group if p2p_communicator is not None else groups.pp)
        config = get_model_config(modules[0])
        _refuse_config(config)
        if config.timers is not None:
            config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
        data = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        step = Step(
            forward_step_func=forward_step_func,
            data=data,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
            first_val_step=first_val_step,
            cp_size=groups.cp.size(),
        )
        executor = self._executor(step, num_microbatches, config, groups)
        if executor.recorder is not None:
            executor.recorder.start_step()
        reports = executor.run()
        if not forward_only:
            if executor.recorder is not None and self.trace is not None:
                atexit.unregister(self._say_what_was_not_traced)
                self.trace(executor.schedule, executor.rank, executor.recorder.finish())
            if config.finalize_model_grads_func is not None:
                tokens = executor.tokens if config.calculate_per_token_loss else None
                config.finalize_model_grads_func(
                    modules, tokens, pg_collection=groups, force_all_reduce=force_all_reduce
                )
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return reports

    def _say_what_was_not_traced(self) -> None:
        print(
            f"> WARNING: --pipeline-trace-step {self.trace_step}: this run ended after {self.steps} training steps of "
            "its own, so no timeline was written.",
            flush=True,
        )

    def _prepare(self, modules: list[torch.nn.Module], group: torch.distributed.ProcessGroup) -> None:
        if self.lanes is None:
            self.lanes = open_lanes(group, self.plan.virtual, self.timeout)
            self.watch = Watch(self.patience, prepare=_on_this_device())
            self.watch.start()
            if self.trace is not None and torch.distributed.get_rank() == 0:
                atexit.register(self._say_what_was_not_traced)
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

    def _chunk(self, module: torch.nn.Module) -> Chunk:
        tells = self.tells_documents and self.plan.stages > 1 and len(self.plan.lengths) > 1
        return Chunk(
            module,
            self.plan.lengths,
            needs_mask=self.needs_mask,
            takes_documents=tells or self.plan.stages == 1,
            tells_documents=tells,
            context=self.context,
        )

    def _executor(self, step: Step, microbatches: int, config: Any, groups: Any) -> Executor:
        schedule = self.plan.schedule(microbatches, step.forward_only)
        self.steps += not step.forward_only
        traced = self.trace is not None and not step.forward_only and self.trace_step in (None, self.steps)
        split = groups.cp.size() * (groups.tp.size() if config.sequence_parallel else 1)
        assert self.lanes is not None and self.watch is not None
        return Executor(
            schedule=schedule,
            rank=groups.pp.rank(),
            chunks=self.chunks,
            lanes=self.lanes,
            posts=self.plan.posts(microbatches, step.forward_only)[groups.pp.rank()],
            shape=lambda segment: (self.plan.lengths[segment] // split, step.micro_batch_size, config.hidden_size),
            step=step,
            watch=self.watch,
            weights=self.weights if schedule.splits_weights else None,
            sums=self.sums,
            recorder=Recorder(DeviceClock() if torch.cuda.is_available() else HostClock()) if traced else None,
        )


def _refuse_config(config: Any) -> None:
    """Refuse what a script or a layout of layers sets in the configuration, past the flags.

    Raises:
        ValueError: names the field and the reason.
    """
    if config.mtp_standalone:
        raise ValueError(
            "our pipeline schedules do not serve multi-token prediction in a pipeline stage of its own: upstream's "
            "messages then differ in size from stage to stage. Put its layers into the last decoder layers' stage."
        )
    if config.num_microbatches_with_partial_activation_checkpoints is not None:
        raise ValueError(
            "our pipeline schedules recompute every micro-batch alike; leave "
            "num_microbatches_with_partial_activation_checkpoints out of the model's configuration."
        )


def _on_this_device() -> Callable[[], None]:
    """Return what a thread calls first: a new one would open a context on the first GPU of the node."""
    if not torch.cuda.is_available():
        return lambda: None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())
