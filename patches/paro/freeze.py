"""Checkpoints of runs that train only some layers."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any


def freezes(args: Namespace) -> bool:
    """Return whether --train-only is given, which only this project's script has."""
    return getattr(args, "train_only", None) is not None


def by_layer(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap `_build_sharded_state_dict_metadata`: give every layer tensors of its own, so that a layer may have none.

    Upstream reads a checkpoint in the form that it was written in, so checkpoints of both forms load.
    """

    def metadata(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return original(*args, **kwargs) | {"non_homogeneous_layers": True}

    return metadata
