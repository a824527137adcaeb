"""Look for requests to stop inside upstream's evaluations and after its saves."""

import inspect
from collections.abc import Callable
from typing import Any

from megatron.longseq.guards import arguments as conditions


def interrupt_if_asked_to_stop() -> None:
    """Leave an evaluation if a rank was asked to stop. All ranks call this together.

    Raises:
        EvaluationInterrupted: on all ranks.
    """
    from megatron.longseq.guards.runtime.stopping import EvaluationInterrupted

    if _is_asked_to_stop():
        raise EvaluationInterrupted


def _is_asked_to_stop() -> bool:
    from megatron.training.global_vars import get_signal_handler

    return any(get_signal_handler().signals_received())


def ending_early(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `evaluate`: if a rank was asked to stop, end as upstream does at its time limit. It saves and exits next.

    Either way, the samples that were not evaluated count as read. Checkpoints hold the number, and a run that resumes
    would otherwise evaluate other samples than an undisturbed one from then on.
    """
    signature = inspect.signature(original)

    def evaluate(forward_step_func: Any, data_iterator: Any, model: Any, *rest: Any, **named: Any) -> Any:
        from megatron.core.rerun_state_machine import get_rerun_state_machine
        from megatron.core.utils import get_model_config
        from megatron.training import get_args, get_timers, print_rank_0

        from megatron.longseq.guards.runtime.stopping import EvaluationInterrupted
        from patches.guards.runtime import current_guards

        args, guards = get_args(), current_guards()
        rerun, config, timers = get_rerun_state_machine(), get_model_config(model[0]), get_timers()
        mode = rerun.get_mode()
        call = signature.bind(forward_step_func, data_iterator, model, *rest, **named).arguments
        steps = args.eval_iters if call.get("eval_iters") is None else call["eval_iters"]
        samples_read = args.consumed_valid_samples + steps * args.eval_global_batch_size
        guards.may_interrupt = conditions.stops_early(args)
        try:
            results = original(forward_step_func, data_iterator, model, *rest, **named)
        except EvaluationInterrupted:
            print_rank_0("> the evaluation ends early: a rank was asked to stop")
            config.timers = timers
            rerun.set_mode(mode)
            results = None, None, True
        finally:
            guards.may_interrupt = False
        if results[2]:
            args.consumed_valid_samples = samples_read
            for chunk in model:
                chunk.train()
            timers("evaluate").stop()
        return results

    return evaluate


def stopping_after_a_save(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `checkpoint_and_decide_exit`: after a save, look for a request to stop that came in the meantime.

    A non-persistent checkpoint may not outlive its job, so after one of those upstream saves again, as for any request.
    """

    def checkpoint_and_decide_exit(
        model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any, **named: Any
    ) -> bool:
        from megatron.training import get_args
        from megatron.training.training import print_datetime

        if original(model, optimizer, scheduler, iteration, *rest, **named):
            return True
        args = get_args()
        has_saved, has_saved_for_now = (
            bool(args.save and interval and iteration % interval == 0)
            for interval in (args.save_interval, args.non_persistent_save_interval)
        )
        if not (has_saved or has_saved_for_now) or not _is_asked_to_stop():
            return False
        if has_saved:
            print_datetime("exiting program: asked to stop while the checkpoint was saved.")
            return True
        return bool(original(model, optimizer, scheduler, iteration, *rest, **named))

    return checkpoint_and_decide_exit
