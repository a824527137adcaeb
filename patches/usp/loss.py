"""Normalise the loss of a sequence on context-parallel ranks over all of its valid tokens."""

import functools
from collections.abc import Callable
from typing import Any


def over_the_whole_sequence(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `forward_step_calc_loss`: sum the number of valid tokens over the context-parallel ranks.

    Upstream averages gradients over context-parallel ranks as over data-parallel ones, so each rank's sum of losses is
    multiplied by the number of ranks. A loss function with two results has averaged already and is left as it is. With
    --calculate-per-token-loss, upstream counts tokens over all ranks itself.
    """

    @functools.wraps(original)
    def forward_step_calc_loss(
        model: Any, output_tensor: Any, loss_func: Any, config: Any, *args: Any, **kw: Any
    ) -> Any:
        if loss_func is not None and not config.calculate_per_token_loss:
            loss_func = _counted(loss_func)
        return original(model, output_tensor, loss_func, config, *args, **kw)

    return forward_step_calc_loss


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
