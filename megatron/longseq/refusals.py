"""Flags that do not go together: one table per reason, and one error that lists every match."""

import os
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# flag: (whether the arguments use it, why it is not supported)
Refusals = Mapping[str, tuple[Callable[[Namespace], Any], str]]


def refused(args: Namespace, refusals: Refusals, beside: str = "") -> list[str]:
    """Return one line for each flag that is used and refused.

    Args:
        args: upstream's arguments.
        refusals: the flags, with a predicate and a reason each.
        beside: the flag of ours that cannot be combined with them.
    """
    with_ours = f" with {beside}" if beside else ""
    return [f"  {flag}{with_ours}: {why}" for flag, (is_used, why) in refusals.items() if is_used(args)]


def refuse(args: Namespace, tables: Iterable[tuple[str, Refusals]]) -> None:
    """Refuse flags that cannot be combined with ours.

    Args:
        args: upstream's arguments.
        tables: for each flag of ours that is given, its name and the flags that it refuses.

    Raises:
        ValueError: lists every refused flag with the reason.
    """
    lines = [line for beside, refusals in tables for line in refused(args, refusals, beside)]
    if lines:
        raise ValueError("These flags cannot be combined:\n" + "\n".join(lines))


def refuse_without_effect(args: Namespace, missing: str, **defaults: Any) -> None:
    """Refuse flags of ours that have no effect because another flag is missing.

    Args:
        args: parsed arguments.
        missing: the reason, such as "--paro is not given".
        **defaults: for each flag, by its attribute, the value that it has when it is not given.

    Raises:
        ValueError: names the first flag that has another value.
    """
    for name, default in defaults.items():
        value = getattr(args, name, default)
        if value != default:
            values = value if isinstance(value, list | tuple) else () if value is True else (value,)
            text = "".join(f" {one}" for one in values)
            raise ValueError(f"--{name.replace('_', '-')}{text}: {missing}, so it has no effect; give both.")


def refuse_unwritable(flag: str, folder: Path, advice: str) -> None:
    """Refuse a folder that this process cannot write to.

    A folder that does not exist is accepted if its nearest existing parent is writable.

    Args:
        flag: the flag and its value, for the message.
        folder: the folder to check. It need not exist.
        advice: what the user should give instead, for the message.

    Raises:
        ValueError: the folder, or its nearest existing parent, is not a writable folder.
    """
    existing = folder.absolute()
    try:
        while not existing.exists():
            existing = existing.parent
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"{flag}: {error.strerror}; {advice}.") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{flag}: {existing} is not a folder that this process can write to; {advice}.")


@contextmanager
def explained_refusals(what: str) -> Iterator[None]:
    """Turn errors of upstream's checks into one that says what was checked. Many of its assertions have no message.

    Args:
        what: what upstream checks in the body of this context.

    Raises:
        ValueError: names the check that failed, by its message or its source, and where it stands.
    """
    try:
        yield
    except (
        AssertionError,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        NotImplementedError,
        OSError,
    ) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        text = str(error).strip() or f"this does not hold: {(place.line or '').removeprefix('assert ')}"
        where = f"{Path(place.filename).name}, line {place.lineno}"
        raise ValueError(
            f"upstream refuses {what}: {kind}{text} ({where}). Change the flags that this names."
        ) from error


def is_dry_run(args: Namespace | None) -> bool:
    """Return whether --dry-run-world is given."""
    return getattr(args, "dry_run_world", None) is not None
