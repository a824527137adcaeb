"""Plant errors: wrap a function for the duration of a context, and count how often the error acted."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Planted:
    """How often the error acted on this rank."""

    times: int = 0


@contextmanager
def wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Put `wrapper(original, *args, **kwargs)` in place of `owner.name`."""
    original = owner.__dict__[name]
    function = original.__func__ if isinstance(original, staticmethod) else original

    @functools.wraps(function)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(function, *args, **kwargs)

    setattr(owner, name, staticmethod(replacement) if isinstance(original, staticmethod) else replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)
