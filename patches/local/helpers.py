"""Upstream's compiled dataset helper, where it is there already."""

import functools
from collections.abc import Callable
from importlib.util import find_spec


def only_when_missing(original: Callable[[], None]) -> Callable[[], None]:
    """Wrap `compile_helpers`: compile only what cannot be imported."""

    @functools.wraps(original)
    def compile_helpers() -> None:
        if find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers
