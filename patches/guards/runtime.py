"""Put the guards around upstream's passes, updates, evaluations and saves."""

import contextlib
import functools
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from megatron.longseq.guards import arguments as conditions
from megatron.longseq.pipeline.arguments import wants_our_schedule
from patches.engine import session

STEPS, MONITOR = "guards.steps", "guards.monitor"
STORE_SECONDS = 10.0


@dataclass
class _Guards:
    """What the guards keep from step to step: progress for the monitor, and the guard of training steps, if any."""

    progress: Any
    guard: Any

    def close(self) -> None:
        """Stop watching."""
        self.progress.is_over = True


def acts_in_passes(args: Namespace) -> bool:
    """Return whether the forward-backward function is wrapped."""
    return conditions.follows_steps(args) or conditions.stops_early(args)


def current_record() -> Any:
    """Return the record of this process's gradients, or None if they are not located."""
    from megatron.training import get_args

    if not acts_in_passes(get_args()):
        return None
    guard = _guards().guard
    return None if guard is None else guard.record


def recording_norms(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `check_grads`, which a bucket group calls before it is reduced: record norms without waiting for them."""

    def check_grads(self: Any, check_for_nan_or_inf: bool, check_for_large: bool) -> None:
        record = current_record()
        if record is None:
            original(self, check_for_nan_or_inf, check_for_large)
            return
        if check_for_nan_or_inf:
            record.before_reduction(self)
        if check_for_large:
            original(self, False, check_for_large)

    return check_grads


def noting_backwards(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `backward_step`: note progress, and record gradients after each micro-batch of upstream's schedules."""

    def backward_step(*args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        guards = _guards()
        guards.progress.mark()
        if guards.guard is not None and guards.guard.record is not None:
            guards.guard.record.after_backward()
        return result

    return backward_step


def with_guarded_passes(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_forward_backward_func`: examine training steps, note progress, and let evaluations end early."""

    def get_forward_backward_func(*args: Any, **named: Any) -> Any:
        passes = original(*args, **named)
        return functools.partial(_run_passes, passes)

    return get_forward_backward_func


def _run_passes(passes: Callable[..., Any], *, forward_step_func: Any, forward_only: bool = False, **named: Any) -> Any:
    from megatron.training import get_args

    from megatron.longseq.guards.runtime.stopping import EvaluationInterrupted

    args, guards = get_args(), _guards()
    if forward_only and conditions.stops_early(args) and _is_asked_to_stop():
        raise EvaluationInterrupted

    @functools.wraps(forward_step_func)
    def forward_step(*args: Any, **kwargs: Any) -> Any:
        guards.progress.mark()
        return forward_step_func(*args, **kwargs)

    named = {**named, "forward_step_func": forward_step, "forward_only": forward_only}
    try:
        if forward_only:
            guards.progress.mark()
            return passes(**named)
        step = getattr(args, "curr_iteration", 0) + 1
        guards.progress.begin_step(step)
        if guards.guard is None:
            return passes(**named)
        return guards.guard.run(passes, step, _stage(), _order(args, named), named)
    except BaseException:
        guards.progress.is_over = True  # the run ends; its last acts are not those of a step
        raise


def _order(args: Namespace, named: dict[str, Any]) -> list[tuple[int, int]]:
    """Return chunk and micro-batch of each backward of upstream's schedules. Ours say themselves where they are."""
    if wants_our_schedule(args):
        return []
    model, microbatches = named["model"], named["num_microbatches"]
    chunks = len(model) if isinstance(model, list) else 1
    if chunks == 1:
        return [(0, microbatch) for microbatch in range(microbatches)]
    from megatron.core.pipeline_parallel.schedules import get_schedule_table
    from megatron.core.utils import get_model_config

    size = get_model_config(model[0]).microbatch_group_size_per_vp_stage
    return [(chunks - 1 - chunk, microbatch) for microbatch, chunk in get_schedule_table(microbatches, chunks, size)]


def _stage() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_pipeline_model_parallel_rank())


def _guards() -> _Guards:
    state = session.SESSION.state
    if STEPS not in state:
        from megatron.training import get_args

        from megatron.longseq.guards.runtime.monitor import StepProgress

        state[STEPS] = _Guards(StepProgress(), _step_guard(get_args()))
    guards: _Guards = state[STEPS]
    return guards


def _step_guard(args: Namespace) -> Any:
    if not conditions.guards_steps(args):
        return None
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import print_rank_0

    from megatron.longseq.guards.plan.spikes import LossHistory
    from megatron.longseq.guards.runtime.gradients import GradientRecord
    from megatron.longseq.guards.runtime.steps import StepGuard

    return StepGuard(
        record=GradientRecord() if conditions.locates_gradients(args) else None,
        policy=args.loss_spike_policy,
        threshold=args.loss_spike_threshold,
        history=LossHistory(args.loss_spike_window),
        rerun=None if args.rerun_mode == "disabled" else get_rerun_state_machine(),
        say=print_rank_0,
    )


def with_judged_update(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `train_step`: the guard decides, between passes and update, whether the model may change."""

    def train_step(
        forward_step_func: Any, data_iterator: Any, model: Any, optimizer: Any, *rest: Any, **named: Any
    ) -> Any:
        from megatron.training import get_args

        from megatron.longseq.guards.plan.spikes import LossHistory
        from megatron.longseq.guards.runtime.steps import GuardedOptimizer

        args, guard = get_args(), _guards().guard
        if guard is None:
            return original(forward_step_func, data_iterator, model, optimizer, *rest, **named)

        if not guard.history.losses:  # the first step: a checkpoint may be loaded by now
            guard.history = LossHistory(guard.history.window, getattr(args, "longseq_losses", ()))

        def refuses_update() -> bool:
            refuses: bool = guard.refuses_update(getattr(args, "curr_iteration", 0) + 1)
            args.longseq_losses = list(guard.history.losses)  # upstream saves its arguments in checkpoints
            return refuses

        guarded = GuardedOptimizer(optimizer, refuses_update)
        return original(forward_step_func, data_iterator, model, guarded, *rest, **named)

    return train_step


def continuing_history(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_load_base_checkpoint`: continue with the losses of the checkpoint."""

    def _load_base_checkpoint(load_dir: Any, args: Namespace, *rest: Any, **named: Any) -> Any:
        result = original(load_dir, args, *rest, **named)
        saved = (result[0] or {}).get("args")
        if saved is not None and not (args.finetune or args.no_load_optim):
            args.longseq_losses = list(getattr(saved, "longseq_losses", ()))
        return result

    return _load_base_checkpoint


def _is_asked_to_stop() -> bool:
    """Return whether a rank was asked to stop. All ranks call this together."""
    from megatron.training.global_vars import get_signal_handler

    return any(get_signal_handler().signals_received())


def ending_early(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `evaluate`: if a rank was asked to stop, end as upstream does at its time limit. It saves and exits next."""

    def evaluate(forward_step_func: Any, data_iterator: Any, model: Any, *rest: Any, **named: Any) -> Any:
        from megatron.core.rerun_state_machine import get_rerun_state_machine
        from megatron.core.utils import get_model_config
        from megatron.training import get_timers, print_rank_0

        from megatron.longseq.guards.runtime.stopping import EvaluationInterrupted

        rerun, config, timers = get_rerun_state_machine(), get_model_config(model[0]), get_timers()
        mode = rerun.get_mode()
        try:
            return original(forward_step_func, data_iterator, model, *rest, **named)
        except EvaluationInterrupted:
            print_rank_0("> the evaluation ends early: a rank was asked to stop")
            config.timers = timers
            rerun.set_mode(mode)
            for chunk in model:
                chunk.train()
            timers("evaluate").stop()
            return None, None, True

    return evaluate


def stopping_after_a_save(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `checkpoint_and_decide_exit`: after a save, look for a request to stop that came in the meantime."""

    def checkpoint_and_decide_exit(
        model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any, **named: Any
    ) -> bool:
        from megatron.training import get_args
        from megatron.training.training import print_datetime

        if original(model, optimizer, scheduler, iteration, *rest, **named):
            return True
        args = get_args()
        has_saved = args.save and args.save_interval and iteration % args.save_interval == 0
        if has_saved and _is_asked_to_stop():
            print_datetime("exiting program: asked to stop while the checkpoint was saved.")
            return True
        return False

    return checkpoint_and_decide_exit


def with_stall_monitor(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `initialize_megatron`: once the ranks are connected, watch this one."""

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        finish = original(*args, **kwargs)
        if callable(finish):  # with --lazy-mpu-init the caller connects the ranks later, by this function
            return with_stall_monitor(finish)
        if MONITOR not in session.SESSION.state:
            monitor = _monitor(get_args())
            if monitor is not None:
                session.SESSION.state[MONITOR] = monitor
                monitor.start()
        return finish

    return initialize_megatron


def _monitor(args: Namespace) -> Any:
    import torch
    import torch.distributed as dist

    from megatron.longseq.guards.runtime.flight_record import record_file, write_record
    from megatron.longseq.guards.runtime.monitor import StallMonitor

    if not dist.is_initialized() or dist.get_backend() == "fake":
        return None
    in_steps, elsewhere = conditions.stall_limits(args)
    prepare: Callable[[], object] = lambda: None  # noqa: E731
    if torch.cuda.is_available():
        prepare = functools.partial(torch.cuda.set_device, torch.cuda.current_device())
    file = record_file(os.environ, getattr(args, "start_folder", None), dist.get_rank())
    is_recorded = file is not None and dist.get_backend() == "nccl"
    return StallMonitor(
        rank=dist.get_rank(),
        ranks=dist.get_world_size(),
        store=_store(),
        progress=_guards().progress,
        in_steps=in_steps,
        elsewhere=elsewhere,
        on_gpu=torch.cuda.is_available(),
        record=functools.partial(write_record, file) if is_recorded else lambda: None,
        prepare=prepare,
    )


def _store() -> Any:
    """Connect once more to the store of the job: a connection serves one thread at a time, and others may block."""
    import torch.distributed as dist

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        return None
    with contextlib.suppress(RuntimeError, ValueError):  # the ranks met elsewhere; each reports for itself
        return dist.TCPStore(
            address, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_SECONDS)
        )
    return None
