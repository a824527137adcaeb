"""A place is an entry of one `__dict__`: read it, set it, put it back exactly as it was."""

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
    """`name` in `owner.__dict__`; `label` is its `module:Qual.name`."""

    label: str
    owner: Owner
    name: str

    @property
    def key(self) -> tuple[int, str]:
        """Equal for two labels of one place."""
        return id(self.owner), self.name

    def own(self) -> Any:
        """The raw entry (a descriptor stays a descriptor), or ABSENT."""
        return vars(self.owner).get(self.name, ABSENT)

    def raw(self) -> Any:
        """The raw entry, inherited ones included, or ABSENT."""
        if isinstance(self.owner, type):
            return next((vars(c)[self.name] for c in self.owner.__mro__ if self.name in vars(c)), ABSENT)
        return self.own()

    def put(self, value: Any) -> None:
        """Set the raw entry; ABSENT deletes it."""
        if value is ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)

    def file(self) -> str:
        """The file of the module that holds the place, for messages."""
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
        todo="correct the record's target or alias; `python -m patches verify` says what drifted upstream",
    )


def underlying(raw: Any) -> Any:
    """What a static method, class method or property wraps (the getter); anything else is itself."""
    if isinstance(raw, staticmethod | classmethod):
        return raw.__func__
    return raw.fget if isinstance(raw, property) else raw


def like(raw: Any, new: Any) -> Any:
    """`new` as the same kind of descriptor as `raw`; a property keeps its setter and deleter."""
    if isinstance(new, staticmethod | classmethod | property):
        return new
    if isinstance(raw, property):
        return property(new, raw.fset, raw.fdel, raw.__doc__)
    return type(raw)(new) if isinstance(raw, staticmethod | classmethod) else new


def implementation(part: Record | Callback) -> Callable[..., Any]:
    """Import what the `impl` of a record or callback names.

    Raises:
        BadImplementation: it does not exist or cannot be called.
    """
    return load(part.impl, f"the implementation of {part.id}")


def load(label: str, role: str) -> Callable[..., Any]:
    """Import `module:Qual.name`, which has to be callable; `role` says what it is, for the message.

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
    """A `BadImplementation` about the object that `label` names."""
    return BadImplementation(what, where=label, why=why, todo="correct the implementation, or the record that names it")


def wrapped(record: Record, original: Any) -> Any:
    """Wrap the original in a wrap's implementation, or in the callbacks of a hook, the first one innermost.

    Each function that comes about has the one inside of it as `__wrapped__`.

    Raises:
        BadImplementation: an implementation returns nothing callable, or the function that it was given.
    """
    inner = original
    for part in record.parts:
        new = implementation(part)(inner)
        if not callable(new) or new is inner:
            why = "it returned the original" if new is inner else f"it returned a {type(new).__name__}"
            raise bad(f"the wrap {part.id} makes no new callable", part.impl, why)
        if getattr(new, "__wrapped__", None) is not inner:
            functools.update_wrapper(new, inner)
        inner = new
    return inner
