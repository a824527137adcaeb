"""Run an unmodified Megatron-LM script under the patches that its flags ask for.

The script sees `sys.argv` and `sys.path[0]` as if Python had started it. If its folder holds a `megatron/core` of its
own, that tree is what gets imported (`megatron` is a namespace package, searched in the order of `sys.path`), and the
fingerprints are held against it. With `wheel`, the installed wheel's folder is searched first for every child of
`megatron`, while the script's own modules (`model_provider`, builders) still come from its folder; children that the
wheel does not have (`megatron.post_training`) still come from the tree.
"""

import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from patches.engine import session
from patches.errors import PatchError
from patches.upstream import wheel
from patches.upstream.source import ImportPath

Choice = Literal["tree", "wheel"]
PROJECT = Path(__file__).resolve().parents[1]


def run(script: str, argv: Sequence[str], megatron: Choice = "tree") -> None:
    """Apply the records of stage `start`, then execute the script as `__main__`. The script's exceptions pass through.

    Args:
        script: path of the Python file.
        argv: its arguments.
        megatron: "tree" prefers a `megatron/core` in the script's folder, "wheel" the installed one.

    Raises:
        PatchError: no such script, an unusable `megatron`, or a patch that was refused.
    """
    path = Path(script)
    if not path.is_file():
        raise PatchError(
            f"there is no script {script}",
            where=os.getcwd(),
            why="`run` needs the path of a Python file",
            todo="python -m patches run [--megatron tree|wheel] PATH/pretrain_gpt.py ARGS...",
        )
    sys.path[:] = search_path(sys.path, path.resolve().parent, bool(sys.flags.safe_path))
    sys.argv = [script, *argv]
    importlib.invalidate_caches()
    _refuse_regular_package()
    if megatron == "wheel":
        prefer_wheel()
    if os.environ.get("RANK", "0") == "0":
        core = ImportPath().find("megatron.core")
        print(f"> megatron.core: {core.path if core else 'not found'}", flush=True)
    session.start()
    runpy.run_path(script, run_name="__main__")


def search_path(path: Sequence[str], home: Path, safe: bool) -> list[str]:
    """Return `sys.path` for a script in `home`: its folder first, where `-m` put another one, and this project last.

    Args:
        path: the present `sys.path`, whose first entry is the working directory unless Python runs in safe-path mode.
        home: the script's folder.
        safe: `python -P`: Python adds no script folder, so neither do we.
    """
    new = list(path) if safe else [str(home), *path[1:]]
    known = {os.path.realpath(entry or os.curdir) for entry in new}
    return new if str(PROJECT) in known else [*new, str(PROJECT)]


def prefer_wheel() -> None:
    """Search the installed wheel's folder first for the children of `megatron`.

    Raises:
        PatchError: upstream is imported already, or not installed.
    """
    loaded = sorted(name for name in sys.modules if name.startswith(("megatron.core", "megatron.training")))
    if loaded:
        raise PatchError(
            "megatron is already imported",
            where=str(getattr(sys.modules[loaded[0]], "__file__", loaded[0])),
            why="`--megatron wheel` must choose the place before it is imported",
            todo="call `python -m patches run` in a fresh process",
        )
    first = str(wheel.installed().tree.where("megatron"))
    namespace = importlib.import_module("megatron")
    # A plain list is what the import system searches from here on, and it is not recomputed from sys.path.
    namespace.__path__ = [first, *(p for p in namespace.__path__ if p != first)]


def _refuse_regular_package() -> None:
    for entry in sys.path:
        file = Path(entry or os.curdir, "megatron", "__init__.py")
        if file.is_file():
            raise PatchError(
                "a file megatron/__init__.py hides the other parts of the `megatron` namespace package",
                where=str(file),
                why="with it, Python imports `megatron` from this folder only, which has no `longseq`",
                todo="remove the file if it is empty, or remove its folder from PYTHONPATH",
            )
