"""Explain why a checkpoint cannot be loaded. Files are examined after a failure, so that loading takes no longer."""

import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron.longseq.checkpoints.changes import explain_group_mismatch
from megatron.longseq.checkpoints.faults import find_fault, find_file_fault


def with_named_faults(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_load_base_checkpoint`: if it fails, say which file of the checkpoint is at fault.

    Raises:
        ValueError: on every rank that fails; what upstream raised is its cause. Other failures stay as they are.
    """

    def _load_base_checkpoint(load_dir: Any, args: Namespace, *rest: Any, **named: Any) -> Any:
        try:
            return original(load_dir, args, *rest, **named)
        except BaseException as error:  # upstream ends by sys.exit, and PyTorch's CheckpointException is no Exception
            if isinstance(error, KeyboardInterrupt) or not _is_local(load_dir):
                raise
            found = find_fault(Path(load_dir), getattr(args, "ckpt_step", None))
            if found is not None:
                raise ValueError(f"rank {args.rank}: {found}") from error
            raise

    return _load_base_checkpoint


def _is_local(path: Any) -> bool:
    return path is not None and "://" not in str(path)


def with_explained_failures(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_checkpoint`: if it fails, or ends the process, say why.

    Raises:
        ValueError: on every rank that fails; what upstream raised is its cause. Other failures stay as they are.
    """

    def load_checkpoint(*args: Any, **named: Any) -> Any:
        try:
            return original(*args, **named)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
            raise ValueError(_not_loaded()) from end
        except Exception as error:
            found = _group_mismatch(error) or _file_fault(error)
            if found is None:
                raise
            raise ValueError(found) from error

    return load_checkpoint


def _not_loaded() -> str:
    from megatron.training import get_args

    args = get_args()
    missing = "--exit-on-missing-checkpoint: there is none" if args.exit_on_missing_checkpoint else ""
    why = missing or "The lines before this one say why"
    return f"rank {args.rank}: no checkpoint was loaded from --load {args.load}. {why}."


def _group_mismatch(error: Exception) -> str | None:
    """Explain which settings differ if the distributed optimizer did not find a parameter group in the checkpoint."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys as keys

    wanted = error.args[0] if isinstance(error, KeyError) and error.args else None
    if not isinstance(wanted, tuple) or len(wanted) != len(keys):
        return None
    state_dict = _argument(error.__traceback__, "load_state_dict", "state_dict")
    return None if state_dict is None else explain_group_mismatch(keys, wanted, state_dict["optimizer"]["param_groups"])


def _file_fault(error: Exception) -> str | None:
    """Say what is wrong with the distributed optimizer's own file (--ckpt-format torch)."""
    file = _argument(error.__traceback__, "load_parameter_state", "filename")
    return find_file_fault(Path(file)) if _is_local(file) else None


def _argument(trace: TracebackType | None, function: str, name: str) -> Any:
    """Return an argument of a method of upstream's distributed optimizer that the exception passed through, or None."""
    for frame, _ in traceback.walk_tb(trace):
        code = frame.f_code
        if code.co_name == function and Path(code.co_filename).name == "distrib_optimizer.py":
            return frame.f_locals.get(name)
    return None
