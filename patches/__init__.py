"""Connect upstream Megatron to `megatron.longseq`: one record per change, which is checked and can be undone.

Importing this package imports neither torch nor megatron. `start()` and `select_and_apply(args)` are what a training
run uses, `applied(...)` is what a test uses; `python -m patches --help` lists the tools.
"""

from patches.engine.session import applied, select_and_apply, start
from patches.errors import PatchError

__all__ = ["PatchError", "applied", "select_and_apply", "start"]
