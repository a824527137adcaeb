"""Put the guards around upstream's passes and updates."""

import functools
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.longseq.guards import arguments as conditions
from megatron.longseq.pipeline.arguments import wants_our_schedule
from patches.engine import session
from patches.guards.stopping import interrupt_if_asked_to_stop

STEPS = "guards.steps"


@dataclass
class Guards:
    """What the guards keep from step to step.

    Attributes:
        progress: of this rank, for the monitor.
        guard: the guard of training steps, if any.
        may_interrupt: whether passes without a backward belong to an evaluation, which may end before any of its steps.
    """

    progress: Any
    guard: Any
    may_interrupt: bool = False

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
    guard = current_guards().guard
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
        guards = current_guards()
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

    args, guards = get_args(), current_guards()
    # Upstream collects other data than losses on the last rank alone, where a collective of all ranks would hang.
    if guards.may_interrupt and forward_only and not named.get("collect_non_loss_data"):
        interrupt_if_asked_to_stop()

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


def current_guards() -> Guards:
    """Return the guards of this process, which are made when they are first needed."""
    state = session.SESSION.state
    if STEPS not in state:
        from megatron.training import get_args

        from megatron.longseq.guards.runtime.monitor import StepProgress

        state[STEPS] = Guards(StepProgress(), _step_guard(get_args()))
    guards: Guards = state[STEPS]
    return guards


def _step_guard(args: Namespace) -> Any:
    if not conditions.guards_steps(args):
        return None
    import torch
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
        device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
    )


def with_judged_update(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `train_step`: the guard decides, between passes and update, whether the model may change."""

    def train_step(
        forward_step_func: Any, data_iterator: Any, model: Any, optimizer: Any, *rest: Any, **named: Any
    ) -> Any:
        from megatron.training import get_args

        from megatron.longseq.guards.plan.spikes import LossHistory
        from megatron.longseq.guards.runtime.steps import GuardedOptimizer

        args, guard = get_args(), current_guards().guard
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
