"""Report which patches changed since a checkpoint was written."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from patches.engine import digest, session


def compare_with_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_load_base_checkpoint`: rank 0 prints how the patches differ from those of the checkpoint.

    It raises no error, because a run that moves from CPU to GPU or uses another system has other patches.
    """

    def _load_base_checkpoint(load_dir: Any, args: Namespace, rank0: bool = False, *rest: Any, **named: Any) -> Any:
        found = original(load_dir, args, rank0, *rest, **named)
        if not rank0 and args.rank == 0 and not args.finetune:  # upstream reads the common part first, with rank0
            _report(getattr((found[0] or {}).get("args"), "longseq_patch_hashes", None))
        return found

    return _load_base_checkpoint


def _report(saved: dict[str, str] | None) -> None:
    hashes = session.SESSION.hashes
    change = digest.difference(hashes, saved) if saved is not None else ""
    if saved is not None and change:
        print(
            "> WARNING: the patches differ from those of the run that saved the checkpoint (its digest "
            f"{digest.combined(saved)}, now {digest.combined(hashes)}): {change}",
            flush=True,
        )
