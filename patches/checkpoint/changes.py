"""Report flags that changed since a checkpoint was saved, and name those that make it another model."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.longseq.checkpoints.changes import describe_changed_flags, explain_other_model


def with_changed_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_load_base_checkpoint`: rank 0 prints which flags differ from those in the checkpoint.

    This is a report and no error, because each change can be intended.

    Raises:
        ValueError: on every rank that cannot read the tensors, if the checkpoint holds a model of another size or kind.
    """
    common: dict[str, Any] = {}  # arguments in the common part, which upstream reads first, with rank0

    def _load_base_checkpoint(load_dir: Any, args: Namespace, rank0: bool = False, *rest: Any, **named: Any) -> Any:
        try:
            found = original(load_dir, args, rank0, *rest, **named)
        except BaseException as error:  # PyTorch's CheckpointException is no Exception
            other = explain_other_model(common.get(str(load_dir)), args)
            if other is None or isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(f"rank {args.rank}: {load_dir} cannot be loaded: {other}.") from error
        saved = (found[0] or {}).get("args")
        if rank0:
            common[str(load_dir)] = saved
        elif saved is not None and args.rank == 0:
            for line in describe_changed_flags(saved, args):
                print(f"> WARNING: {line}.", flush=True)
        return found

    return _load_base_checkpoint
