"""Find who still holds an object under another name: `from x import f as g`, default arguments, tables, specs.

Scanned is what loaded modules reach without running code: their globals; in these, classes (their dicts and bases),
functions (defaults, closures, `__wrapped__`), partials, containers and instances of scanned modules' classes. The
standard library, this package and a patched library's own internals other than Megatron's are left out: they cannot
hold an upstream object by name, or (torch) look their names up in their modules.
"""

import functools
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patches.record import Record

_DEPTH = 6
_SKIPPED = frozenset({*sys.stdlib_module_names, "patches", "torch", "torchgen", "triton", "numpy", "sympy"}) - {
    "__main__"
}
_SCALARS = frozenset({int, float, str, bytes, bool, complex, type(None), types.ModuleType})
_CACHED = type(functools.lru_cache(lambda: None))
_Leads = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Original:
    """An object that nobody should hold any more: the raw `__dict__` entry and the function inside of it."""

    record: Record
    raw: Any
    core: Any


@dataclass(frozen=True)
class Hit:
    """`name` says where the object was found, starting with `module:`."""

    record: Record
    module: str
    name: str


def scan(originals: Sequence[Original], installed: frozenset[int] = frozenset()) -> list[Hit]:
    """Every place in loaded modules that holds one of the originals.

    Args:
        originals: what to look for.
        installed: ids of our own objects, which hold the originals by design and are not looked into.
    """
    if not originals:
        return []
    needles = {id(thing): original.record for original in originals for thing in (original.raw, original.core)}
    search = _Search(needles, set(installed))
    hits = []
    for name, module in _modules():
        for key, value in list(vars(module).items()):
            hits += [Hit(record, name, where) for where, record in search.walk(value, f"{name}:{key}", 0)]
    return hits


def _modules() -> list[tuple[str, types.ModuleType]]:
    """Loaded modules worth a look, each once, by name."""
    unique = {id(m): (n, m) for n, m in reversed(list(sys.modules.items())) if isinstance(m, types.ModuleType)}
    return sorted(((n, m) for n, m in unique.values() if n.partition(".")[0] not in _SKIPPED), key=lambda item: item[0])


class _Search:
    """One pass; what was looked into once is not looked into again."""

    def __init__(self, needles: Mapping[int, Record], seen: set[int]) -> None:
        self.needles, self.seen = needles, seen

    def walk(self, value: Any, where: str, depth: int) -> Iterator[tuple[str, Record]]:
        """Yield the name and record of every needle that is `value` or is reached through it."""
        kind = type(value)
        if kind in _SCALARS:
            return
        record = self.needles.get(id(value))
        if record is not None:
            yield where, record
            return
        if depth == _DEPTH or id(value) in self.seen:
            return
        self.seen.add(id(value))
        for suffix, inner in _leads(value, kind, where):
            yield from self.walk(inner, where + suffix, depth + 1)


def _leads(value: Any, kind: type, where: str) -> _Leads:
    """What `value` holds, each with what to append to its name."""
    if kind is types.FunctionType:
        yield from _function_leads(value)
    elif isinstance(value, type):
        if value.__module__ == where.partition(":")[0]:
            yield from ((".__bases__", base) for base in value.__bases__)
            yield from ((f".{name}", inner) for name, inner in list(vars(value).items()))
    elif kind in (staticmethod, classmethod, types.MethodType):
        yield "", value.__func__
    elif kind is property:
        yield from (("", part) for part in (value.fget, value.fset, value.fdel))
    elif kind in (functools.partial, functools.partialmethod):
        yield " (partial)", value.func
        yield from ((f" (partial argument {i})", inner) for i, inner in enumerate(value.args))
        yield from ((f" (partial argument {k})", inner) for k, inner in value.keywords.items())
    elif kind is _CACHED:
        yield " (cached)", value.__wrapped__
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", inner) for key, inner in list(value.items()))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{i}]", inner) for i, inner in enumerate(list(value)))
    elif kind.__module__.partition(".")[0] not in _SKIPPED:
        fields = _instance_dict(value)
        yield from ((f".{name}", inner) for name, inner in fields)


def _function_leads(function: types.FunctionType) -> _Leads:
    yield from ((f" (default argument {i})", inner) for i, inner in enumerate(function.__defaults__ or ()))
    yield from ((f" (default argument {k})", inner) for k, inner in (function.__kwdefaults__ or {}).items())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f" (closure variable {name})", cell.cell_contents
        except ValueError:  # a cell that is not filled yet
            continue
    if "__wrapped__" in vars(function):
        yield " (wrapped function)", vars(function)["__wrapped__"]


def _instance_dict(value: Any) -> list[tuple[str, Any]]:
    try:
        fields = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return []
    return list(fields.items()) if type(fields) is dict else []
