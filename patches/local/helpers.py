"""Upstream's compiled dataset helper, where it is there already."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import invalidate_caches
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path


def only_when_missing(original: Callable[[], None]) -> Callable[[], None]:
    """Wrap `compile_helpers`: compile only what cannot be imported."""

    @functools.wraps(original)
    def compile_helpers() -> None:
        if find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers


@contextmanager
def wheels_helper_for_a_tree() -> Iterator[None]:
    """Let a Megatron tree that has not compiled its helper find the installed wheel's, if the sources are the same."""
    from megatron.core import datasets

    found = None
    if find_spec("megatron.core.datasets.helpers_cpp") is None:
        own = Path(datasets.__path__[0], "helpers.cpp")
        found = next((str(folder) for folder in _compiled_folders() if _same(own, folder / "helpers.cpp")), None)
    if found is None:
        yield
        return
    datasets.__path__.append(found)
    invalidate_caches()
    try:
        yield
    finally:
        datasets.__path__.remove(found)


def _compiled_folders() -> Iterator[Path]:
    import megatron

    for root in megatron.__path__:
        folder = Path(root, "core", "datasets")
        if any(Path(folder, f"helpers_cpp{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
            yield folder


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()
