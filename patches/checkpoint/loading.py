"""Explain why a checkpoint cannot be loaded. Files are examined after a failure, so that loading takes no longer."""

import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron.longseq.checkpoints.changes import explain_group_mismatch, explain_other_optimizer
from megatron.longseq.checkpoints.faults import find_fault, find_file_fault

LOAD, PLAIN, DISTRIBUTED = "checkpointing.py", "optimizer.py", "distrib_optimizer.py"  # files of upstream
MATCH = "_filter_and_reorder_param_groups"


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
        except BaseException as error:  # PyTorch's CheckpointException is no Exception
            if isinstance(error, KeyboardInterrupt) or (isinstance(error, ValueError) and error.__cause__ is not None):
                raise  # the latter is one of our messages
            found = _other_optimizer(error) or _group_mismatch(error) or _file_fault(error)
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


def _other_optimizer(error: BaseException) -> str | None:
    """Explain that a plain and the distributed optimizer cannot continue from each other's states."""
    from megatron.training import get_args

    saved = _argument(error.__traceback__, LOAD, "load_checkpoint", "ckpt_args")
    return None if saved is None else explain_other_optimizer(saved, get_args())


def _group_mismatch(error: BaseException) -> str | None:
    """Explain which settings differ if the optimizer did not find a parameter group in the checkpoint."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys as keys

    trace = error.__traceback__
    if isinstance(error, KeyError):
        wanted = error.args[0] if error.args else None
        state_dict = _argument(trace, DISTRIBUTED, "load_state_dict", "state_dict")
        groups = None if state_dict is None else state_dict["optimizer"]["param_groups"]
    else:
        wanted, groups = (_argument(trace, PLAIN, MATCH, name) for name in ("key", "state_dict_groups"))
    if groups is None or not isinstance(wanted, tuple) or len(wanted) != len(keys):
        return None
    return explain_group_mismatch(keys, wanted, groups)


def _file_fault(error: BaseException) -> str | None:
    """Say what is wrong with the distributed optimizer's own file (--ckpt-format torch)."""
    file = _argument(error.__traceback__, DISTRIBUTED, "load_parameter_state", "filename")
    return find_file_fault(Path(file)) if _is_local(file) else None


def _argument(trace: TracebackType | None, file: str, function: str, name: str) -> Any:
    """Return a variable of a function of upstream's that the exception passed through, or None."""
    for frame, _ in traceback.walk_tb(trace):
        code = frame.f_code
        if code.co_name == function and Path(code.co_filename).name == file:
            return frame.f_locals.get(name)
    return None
