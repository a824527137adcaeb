"""Checkpoints of runs that train some layers only."""

import functools
from collections.abc import Callable
from typing import Any


def by_layer(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap the description of a checkpoint's form: each layer has tensors of its own, which some layers may lack.

    Upstream reads a checkpoint in the form that it was written in, so the whole model's still loads, and so does this.
    """

    @functools.wraps(original)
    def metadata(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return original(*args, **kwargs) | {"non_homogeneous_layers": True}

    return metadata
