"""Read, set and restore a place: an entry of one `__dict__`."""

import functools
import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patches.errors import BadImplementation, UnknownTarget
from patches.record import Callback, Record

ABSENT = object()
Owner = types.ModuleType | type


@dataclass(frozen=True)
class Place:
    """One entry of a `__dict__`.

    Attributes:
        label: `module:Qual.name` of the entry.
        owner: the module or class.
        name: the key in `owner.__dict__`.
    """

    label: str
    owner: Owner
    name: str

    @property
    def key(self) -> tuple[int, str]:
        """Return a key that is equal for two labels of the same place."""
        return id(self.owner), self.name

    def own(self) -> Any:
        """Return the raw entry (a descriptor, not its value), or ABSENT."""
        return vars(self.owner).get(self.name, ABSENT)

    def raw(self) -> Any:
        """Return the raw entry, or an inherited one, or ABSENT."""
        if isinstance(self.owner, type):
            return next((vars(c)[self.name] for c in self.owner.__mro__ if self.name in vars(c)), ABSENT)
        return self.own()

    def put(self, value: Any) -> None:
        """Set the raw entry. ABSENT deletes it."""
        if value is ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)

    def file(self) -> str:
        """Return the file of the module that the place is in, for messages."""
        return getattr(importlib.import_module(self.label.partition(":")[0]), "__file__", None) or self.label


def resolve(label: str) -> Place:
    """Import the module of `module:Qual.name` and walk to the owner of the last name.

    Raises:
        UnknownTarget: the module cannot be imported or a name is missing.
    """
    home, _, qual = label.partition(":")
    *outer, name = qual.split(".")
    owner: Any = module(home)
    for part in outer:
        holder, owner = owner, getattr(owner, part, ABSENT)
        if not isinstance(owner, type | types.ModuleType):
            why = f"`{part}` of {holder.__name__} is " + ("missing" if owner is ABSENT else "neither class nor module")
            raise _unknown(label, home, why)
    place = Place(label, owner, name)
    if place.raw() is ABSENT:
        raise _unknown(label, home, f"{owner.__name__} has no `{name}`")
    return place


def module(name: str) -> types.ModuleType:
    """Import a module that is to be patched.

    Raises:
        UnknownTarget: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _unknown(name, name, f"importing it failed: {error}") from error


def _unknown(label: str, module: str, why: str) -> UnknownTarget:
    return UnknownTarget(
        f"there is no {label} to patch",
        where=module,
        why=why,
        todo="correct the record's target or alias; `python -m patches verify` shows what changed upstream",
    )


def underlying(raw: Any) -> Any:
    """Return the function in a static method, class method or property (its getter); otherwise the value itself."""
    if isinstance(raw, staticmethod | classmethod):
        return raw.__func__
    return raw.fget if isinstance(raw, property) else raw


def like(raw: Any, new: Any) -> Any:
    """Return `new` as the same kind of descriptor as `raw`. A property keeps its setter and deleter.

    Args:
        raw: raw entry of a place.
        new: function to put there.
    """
    if isinstance(new, staticmethod | classmethod | property):
        return new
    if isinstance(raw, property):
        return property(new, raw.fset, raw.fdel, raw.__doc__)
    return type(raw)(new) if isinstance(raw, staticmethod | classmethod) else new


def implementation(part: Record | Callback) -> Callable[..., Any]:
    """Import the implementation of a record or callback.

    Raises:
        BadImplementation: it does not exist or cannot be called.
    """
    return load(part.impl, f"the implementation of {part.id}")


def load(label: str, role: str) -> Callable[..., Any]:
    """Import an object that must be callable.

    Args:
        label: `module:Qual.name`.
        role: description of the object, for the message.

    Raises:
        BadImplementation: it does not exist or cannot be called.
    """
    module, _, qual = label.partition(":")
    try:
        found = functools.reduce(getattr, qual.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise bad(f"{role} cannot be loaded", label, f"{type(error).__name__}: {error}") from error
    if not callable(found):
        raise bad(f"{role} cannot be called", label, f"it is a {type(found).__name__}")
    return found


def bad(what: str, label: str, why: str) -> BadImplementation:
    """Return a `BadImplementation` error about the object named `label`.

    Args:
        what: what is wrong.
        label: `module:name` of the implementation.
        why: the reason.
    """
    return BadImplementation(what, where=label, why=why, todo="correct the implementation, or the record that names it")


def wrapped(record: Record, original: Any) -> Any:
    """Wrap the original in a wrap's implementation, or in the callbacks of a hook, the first one innermost.

    Each function that comes about has the one inside of it as `__wrapped__`.

    Args:
        record: a record of action `wrap` or `hook`.
        original: the function to wrap.

    Raises:
        BadImplementation: an implementation returns nothing callable, or the function that it was given.
    """
    inner = original
    for part in record.parts:
        new = implementation(part)(inner)
        if not callable(new) or new is inner:
            why = "it returned the original" if new is inner else f"it returned a {type(new).__name__}"
            raise bad(f"the wrap {part.id} does not return a new callable", part.impl, why)
        if getattr(new, "__wrapped__", None) is not inner:
            functools.update_wrapper(new, inner)
        inner = new
    return inner
