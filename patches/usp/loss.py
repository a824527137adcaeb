"""Normalise the loss of a sequence on context-parallel ranks over all of its valid tokens, in evaluation, too."""

import functools
from collections.abc import Callable
from typing import Any


def over_the_whole_sequence(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_forward_backward_func`: sum the number of valid tokens over the context-parallel ranks.

    Upstream averages gradients over context-parallel ranks as over data-parallel ones, so each rank's sum of losses is
    multiplied by the number of ranks. A loss function with two results has averaged already and is left as it is. With
    --calculate-per-token-loss, upstream counts tokens over all ranks itself.

    With --sft upstream's evaluation averages the means of the ranks' micro-batches. There each rank reports the sums
    over its context-parallel ranks, so that these means are those of whole sequences.
    """

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        run, flags = original(*args, **kwargs), get_args()
        if flags.calculate_per_token_loss and not flags.sft:
            return run
        return functools.partial(_run_counted, run, flags)

    return get_forward_backward_func


def _run_counted(
    run: Callable[..., Any], flags: Any, *args: Any, forward_step_func: Callable[..., Any], **kwargs: Any
) -> Any:
    """Run a step's passes with a forward step whose loss function counts the tokens of all context-parallel ranks."""

    @functools.wraps(forward_step_func)
    def forward_step(*inputs: Any, **named: Any) -> tuple[Any, Any]:
        output, loss_func = forward_step_func(*inputs, **named)
        if loss_func is None:
            return output, None
        if not flags.calculate_per_token_loss:
            loss_func = _counted(loss_func)
        return output, _reported(loss_func) if flags.sft and kwargs.get("forward_only") else loss_func

    return run(*args, forward_step_func=forward_step, **kwargs)


def _counted(loss_func: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        import torch.distributed as dist
        from megatron.core import parallel_state

        outputs = loss_func(*args, **kwargs)
        if not isinstance(outputs, tuple) or len(outputs) != 3:
            return outputs
        total, tokens, report = outputs
        group = parallel_state.get_context_parallel_group()
        tokens = tokens.clone()
        dist.all_reduce(tokens, group=group)
        return total * group.size(), tokens, report

    return counted


def _reported(loss_func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss function that reports (sum, number of tokens) over the context-parallel ranks."""

    def reported(*args: Any, **kwargs: Any) -> Any:
        import torch
        import torch.distributed as dist
        from megatron.core import parallel_state

        outputs = loss_func(*args, **kwargs)
        if not isinstance(outputs, tuple) or not isinstance(outputs[-1], dict):
            return outputs
        report = dict(outputs[-1])
        for name, value in report.items():
            if isinstance(value, torch.Tensor) and value.numel() == 2:
                report[name] = value.clone()
                dist.all_reduce(report[name], group=parallel_state.get_context_parallel_group())
        return *outputs[:-1], report

    return reported
