"""The loss of a sequence that is spread over ranks: normalised over all of its valid tokens."""

import functools
from collections.abc import Callable
from typing import Any


def over_the_whole_sequence(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_forward_backward_func`: of the loss and number of tokens of a rank, the number is the whole sequence's.

    Upstream then averages gradients over the context-parallel ranks as over data-parallel ones, so each rank's sum is
    multiplied by their number. A loss that the script has averaged itself (two results) is left to the script. With
    --calculate-per-token-loss upstream counts tokens over all ranks anyway.
    """

    @functools.wraps(original)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        run = original(*args, **kwargs)
        return run if get_args().calculate_per_token_loss else functools.partial(_run_counted, run)

    return get_forward_backward_func


def _run_counted(run: Callable[..., Any], *args: Any, forward_step_func: Callable[..., Any], **kwargs: Any) -> Any:
    """Run a step's passes with a forward step whose loss function counts the tokens of all context-parallel ranks."""

    @functools.wraps(forward_step_func)
    def forward_step(*inputs: Any, **named: Any) -> tuple[Any, Any]:
        output, loss_func = forward_step_func(*inputs, **named)
        return output, None if loss_func is None else _counted(loss_func)

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
