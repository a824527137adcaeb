"""Checkpoints of runs that train only some layers."""

import functools
from collections.abc import Callable
from typing import Any


def by_layer(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap `_build_sharded_state_dict_metadata`: give every layer tensors of its own, so that a layer may have none.

    Upstream reads a checkpoint in the form that it was written in, so checkpoints of both forms load.
    """

    @functools.wraps(original)
    def metadata(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return original(*args, **kwargs) | {"non_homogeneous_layers": True}

    return metadata
