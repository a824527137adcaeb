"""Failures of loading, explained: nothing is read beforehand, so that a good checkpoint loads as fast as before."""

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.longseq.checkpoints import explain_group_mismatch, find_fault, find_file_fault


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
            found = find_fault(Path(load_dir), getattr(args, "ckpt_step", None))
            if found is not None:
                raise ValueError(f"rank {args.rank}: {found}") from error
            raise

    return _load_base_checkpoint


def _is_here(load_dir: Any) -> bool:
    return load_dir is not None and "://" not in str(load_dir)


def with_failure_status(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_checkpoint`: where upstream gives up, the process fails and does not end as a finished run does.

    Raises:
        ValueError: on every rank that gives up; upstream's own lines before it say why.
    """

    @functools.wraps(original)
    def load_checkpoint(*args: Any, **named: Any) -> Any:
        try:
            return original(*args, **named)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
            from megatron.training import get_args

            flags = get_args()
            missing = "--exit-on-missing-checkpoint: there is none" if flags.exit_on_missing_checkpoint else ""
            raise ValueError(
                f"rank {flags.rank}: no checkpoint was loaded from --load {flags.load}. "
                f"{missing or 'The lines before this one say why'}."
            ) from end

    return load_checkpoint


def with_named_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the reading of the optimizer's own file (--ckpt-format torch): where it fails, say what is wrong with it.

    Raises:
        ValueError: the file is missing, empty or cut short; what upstream raised is its cause.
    """

    @functools.wraps(original)
    def load_parameter_state(self: Any, filename: str, *rest: Any, **named: Any) -> Any:
        try:
            return original(self, filename, *rest, **named)
        except Exception as error:
            found = find_file_fault(Path(filename)) if _is_here(filename) else None
            if found is None:
                raise
            raise ValueError(found) from error

    return load_parameter_state


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
            raise ValueError(explain_group_mismatch(param_group_identifier_keys, wanted, saved)) from error

    return load_state_dict
