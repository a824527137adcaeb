"""Find upstream's compiled dataset helper where there is one, and compile it only where there is none."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import invalidate_caches
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path


@contextmanager
def compiled_helper_is_found() -> Iterator[None]:
    """Let upstream use a compiled helper; everything is restored on exit.

    A Megatron tree that has not compiled its helper finds the installed wheel's, if both have the same source.
    """
    from megatron.core import datasets
    from megatron.core.datasets import utils

    folders, compile_helpers = list(datasets.__path__), utils.compile_helpers
    if not _is_compiled():
        own = Path(folders[0], "helpers.cpp")
        found = next((str(folder) for folder in _compiled_folders() if _same(own, folder / "helpers.cpp")), None)
        if found is not None:
            datasets.__path__.append(found)
            invalidate_caches()
    utils.compile_helpers = _unless_compiled(compile_helpers)
    try:
        yield
    finally:
        utils.compile_helpers = compile_helpers
        datasets.__path__[:] = folders


def _unless_compiled(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def compile_helpers() -> None:
        if not _is_compiled():
            original()

    return compile_helpers


def _is_compiled() -> bool:
    return find_spec("megatron.core.datasets.helpers_cpp") is not None


def _compiled_folders() -> Iterator[Path]:
    import megatron

    for root in megatron.__path__:
        folder = Path(root, "core", "datasets")
        if any(Path(folder, f"helpers_cpp{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
            yield folder


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()
