"""Examine this machine: apply the records of stage `start`, undo them, and check that the undo was exact."""

import importlib.metadata
import importlib.util
import platform
import sys

from patches.engine import digest
from patches.engine.session import SESSION
from patches.errors import PatchError
from patches.ledger import RECORDS
from patches.upstream import verify
from patches.upstream.lock import read
from patches.upstream.source import ImportPath, Upstream
from patches.upstream.wheel import NAME, installed

OPTIONAL = {"transformer-engine": "transformer_engine", "apex": "apex", "flash-attn": "flash_attn"}


def examine() -> bool:
    """Print the findings. Return whether nothing is wrong."""
    healthy = _upstream()
    _environment()
    return _start_set() and healthy


def _upstream() -> bool:
    distribution = installed()
    found = verify.problems(RECORDS, read(), distribution, ImportPath())
    print(
        f"{NAME:20} {distribution.version} in {distribution.tree.label}: " + ("as locked" if not found else "DIFFERS")
    )
    for module in verify.elsewhere(RECORDS, distribution, Upstream()):
        print(f"{'':20} not from the wheel: {module}")
    for problem in found:
        print(problem, file=sys.stderr)
    return not found


def _environment() -> None:
    import torch

    print(f"{'python':20} {platform.python_version()} ({sys.executable})")
    print(f"{'torch':20} {torch.__version__}, built for CUDA {torch.version.cuda or 'none'}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{'CUDA devices':20} {', '.join(devices) if torch.cuda.is_available() else 'none: gloo on CPU'}")
    for name, module in OPTIONAL.items():
        print(f"{name:20} {_version(name, module)}")


def _version(name: str, module: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "present, version unknown" if importlib.util.find_spec(module) else "not installed (not required)"


def _start_set() -> bool:
    handle = SESSION.start()
    bindings, contexts = list(handle.bindings), len(handle.contexts)
    print("\n".join(digest.report(handle.records, SESSION.hashes)))
    print(f"alias scan: clean; {len(bindings)} places bound, {contexts} contexts entered")
    SESSION.undo(handle)
    first = {binding.place.key: binding for binding in reversed(bindings)}
    wrong = [b.place.label for b in first.values() if b.place.own() is not b.before]
    if wrong:
        raise PatchError(
            "the undo left something behind",
            where=", ".join(wrong),
            why="these places do not hold what they held before",
            todo="this is a fault of patches/engine/apply.py: report it",
        )
    print("undo: exact")
    return True
