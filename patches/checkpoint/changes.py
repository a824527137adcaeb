"""Report flags that changed since a checkpoint was saved and that upstream does not compare."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.longseq.checkpoints.changes import describe_changed_flags


def with_changed_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_load_base_checkpoint`: rank 0 prints which flags differ from those in the checkpoint.

    This is a report and no error, because each change can be intended.
    """

    def _load_base_checkpoint(load_dir: Any, args: Namespace, rank0: bool = False, *rest: Any, **named: Any) -> Any:
        found = original(load_dir, args, rank0, *rest, **named)
        saved = (found[0] or {}).get("args")
        if saved is not None and not rank0 and args.rank == 0:  # upstream reads the common part first, with rank0
            for line in describe_changed_flags(saved, args):
                print(f"> WARNING: {line}.", flush=True)
        return found

    return _load_base_checkpoint
