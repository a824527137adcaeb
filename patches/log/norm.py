"""Wait for the all-gather of parameters before upstream computes their norm."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any


def is_early(args: Namespace) -> bool:
    """Return whether --log-params-norm would read parameters before their all-gather. In bf16 it reads main parameters.

    Flags from a YAML file of upstream may leave out any of them.
    """
    log, overlap, bf16 = (getattr(args, name, False) for name in ("log_params_norm", "overlap_param_gather", "bf16"))
    return bool(log and overlap and not bf16)


def of_gathered(original: Callable[..., float]) -> Callable[..., float]:
    """Wrap `calc_params_l2_norm`: wait for the all-gather of parameters first. The next forward does not wait again."""

    def calc_params_l2_norm(model: Any, *args: Any, **kwargs: Any) -> float:
        for chunk in model if isinstance(model, list) else [model]:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        return original(model, *args, **kwargs)

    return calc_params_l2_norm
