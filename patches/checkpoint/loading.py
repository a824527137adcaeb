"""Failures of loading, explained: nothing is read beforehand, so that a good checkpoint loads as fast as before."""

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.longseq.checkpoints import fault, other_settings


def with_named_faults(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the reading of a checkpoint: where it fails, say which file is at fault.

    Raises:
        ValueError: on every rank that fails; what upstream raised is its cause. Other failures stay as they are.
    """

    @functools.wraps(original)
    def _load_base_checkpoint(load_dir: Any, args: Namespace, *rest: Any, **named: Any) -> Any:
        try:
            return original(load_dir, args, *rest, **named)
        except BaseException as error:  # upstream ends by sys.exit, and PyTorch's CheckpointException is no Exception
            if isinstance(error, KeyboardInterrupt) or not _is_here(load_dir):
                raise
            found = fault(Path(load_dir), getattr(args, "ckpt_step", None))
            if found is not None:
                raise ValueError(f"rank {args.rank}: {found}") from error
            raise

    return _load_base_checkpoint


def _is_here(load_dir: Any) -> bool:
    return load_dir is not None and Path(load_dir).is_dir()


def with_named_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the loading of an optimizer: name the settings by which its saved parameter groups are not found.

    Raises:
        ValueError: names each setting, with this run's value and the checkpoint's.
    """

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> Any:
        from megatron.core.optimizer.optimizer import param_group_identifier_keys

        try:
            return original(self, state_dict)
        except KeyError as error:
            wanted = error.args[0] if error.args else None
            if not isinstance(wanted, tuple) or len(wanted) != len(param_group_identifier_keys):
                raise
            saved = state_dict["optimizer"]["param_groups"]
            raise ValueError(other_settings(param_group_identifier_keys, wanted, saved)) from error

    return load_state_dict
