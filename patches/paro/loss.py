"""Check the script's loss function, which runs when sharded parameters are released."""

import functools
from collections.abc import Callable
from typing import Any

from megatron.longseq.sharding.arguments import shards_parameters


def without_released_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_forward_backward_func`: refuse a loss function that reads a parameter, by name, before it crashes."""

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        run = original(*args, **kwargs)
        return functools.partial(_run_checked, run) if shards_parameters(get_args()) else run

    return get_forward_backward_func


def _run_checked(
    run: Callable[..., Any], *args: Any, forward_step_func: Callable[..., Any], model: Any, **kwargs: Any
) -> Any:
    from megatron.training import get_args

    from megatron.longseq.sharding.runtime.released import ReleasedParameters

    chunks, strategy = model if isinstance(model, list) else [model], get_args().paro

    @functools.wraps(forward_step_func)
    def forward_step(*inputs: Any, **named: Any) -> tuple[Any, Any]:
        output, loss_func = forward_step_func(*inputs, **named)
        if loss_func is None:
            return output, None

        def checked(*results: Any, **options: Any) -> Any:
            with ReleasedParameters(chunks, strategy):
                return loss_func(*results, **options)

        return output, checked

    return run(*args, forward_step_func=forward_step, model=model, **kwargs)
