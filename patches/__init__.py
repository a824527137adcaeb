"""The wiring between upstream Megatron and `megatron.longseq`: one declared, checked, undoable record per change.

Importing this package imports neither torch nor megatron. `start()` and `select_and_apply(args)` are what a training
run uses, `applied(...)` is what a test uses; `python -m patches --help` lists the tools.
"""

from patches.engine.session import applied, select_and_apply, start
from patches.errors import PatchError

__all__ = ["PatchError", "applied", "select_and_apply", "start"]
