"""Find who still holds an object under another name: `from x import f as g`, default arguments, tables, specs.

Scanned is what loaded modules reach without running code: their globals; in these, classes (their dicts and bases),
functions (defaults, closures, `__wrapped__`), partials, containers and instances of scanned modules' classes. Of other
installed packages only the globals are compared. The standard library, torch and its compiler stack, and this package
are left out: the first cannot hold an upstream object, and this package's wraps hold their originals by design.
"""

import functools
import sys
import types
from collections import deque
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from patches.record import Record

_DEPTH = 6
_SKIPPED = frozenset({*sys.stdlib_module_names, "patches", "torch", "torchgen", "triton", "numpy", "sympy"}) - {
    "__main__"
}
_SCALARS = frozenset({int, float, str, bytes, bool, complex, type(None), types.ModuleType})
_CACHED = type(functools.lru_cache(lambda: None))
_Path = tuple["_Path | None", str, Any]  # how the holder was reached, a format, what goes into it
_Leads = Iterator[tuple[str, Any, Any]]


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
    modules = _modules()
    names = {module.__name__ for module in modules}
    seen, hits = set(installed), []
    # Breadth first: what is reached in several ways is looked into by the shortest, so the depth limit cuts no corner.
    queue: deque[tuple[Any, str, _Path, int]] = deque()
    for module in modules:
        name, depth = module.__name__, 0 if _is_deep(module) else _DEPTH
        queue.extend(
            (v, name, (None, "{}", k), depth) for k, v in list(vars(module).items()) if type(v) not in _SCALARS
        )
    while queue:
        value, name, path, depth = queue.popleft()
        kind = type(value)
        record = needles.get(id(value))
        if record is not None:
            hits.append(Hit(record, name, f"{name}:{_render(path)}"))
        elif depth < _DEPTH and id(value) not in seen and not _belongs_elsewhere(value, kind, name, names):
            seen.add(id(value))
            leads = _leads(value, kind)
            queue.extend((v, name, (path, form, key), depth + 1) for form, key, v in leads if type(v) not in _SCALARS)
    return hits


def _render(path: _Path) -> str:
    before, form, key = path
    return (_render(before) if before else "") + form.format(key)


def _modules() -> list[types.ModuleType]:
    """Loaded modules worth a look, each once, by name."""
    unique = {id(m): m for m in list(sys.modules.values()) if isinstance(m, types.ModuleType)}
    kept = (m for m in unique.values() if m.__name__.partition(".")[0] not in _SKIPPED)
    return sorted(kept, key=lambda module: module.__name__)


def _is_deep(module: types.ModuleType) -> bool:
    """Whether to look into what the module's names hold: Megatron's modules, and any that nobody installed."""
    file = getattr(module, "__file__", None) or ""
    return module.__name__.startswith("megatron") or not ("site-packages" in file or "dist-packages" in file)


def _belongs_elsewhere(value: Any, kind: type, module: str, names: Set[str]) -> bool:
    """A class that another scanned module defines is looked into there, so that it is named by its home."""
    return issubclass(kind, type) and value.__module__ != module and value.__module__ in names


def _leads(value: Any, kind: type) -> _Leads:
    """What `value` holds, each with how to append it to a name.

    Goes by `type(value)`: an isinstance check would ask `__class__`, which proxies answer with code of their own.
    """
    if kind is types.FunctionType:
        yield from _function_leads(value)
    elif issubclass(kind, type):
        yield from ((".__bases__", "", base) for base in value.__bases__)
        yield from ((".{}", name, inner) for name, inner in list(vars(value).items()))
    elif kind in (staticmethod, classmethod, types.MethodType):
        yield "", "", value.__func__
    elif kind is property:
        yield from (("", "", part) for part in (value.fget, value.fset, value.fdel))
    elif kind in (functools.partial, functools.partialmethod):
        yield " (partial)", "", value.func
        yield from ((" (partial argument {})", i, inner) for i, inner in enumerate(value.args))
        yield from ((" (partial argument {})", k, inner) for k, inner in value.keywords.items())
    elif kind is _CACHED:
        yield " (cached)", "", value.__wrapped__
    elif issubclass(kind, dict):
        yield from (("[{!r}]", key, inner) for key, inner in list(dict.items(value)))
    elif issubclass(kind, list | tuple | set | frozenset):
        yield from (("[{}]", i, inner) for i, inner in enumerate(list(value)))
    elif kind.__module__.partition(".")[0] not in _SKIPPED:
        yield from ((".{}", name, inner) for name, inner in _instance_dict(value))


def _function_leads(function: types.FunctionType) -> _Leads:
    yield from ((" (default argument {})", i, inner) for i, inner in enumerate(function.__defaults__ or ()))
    yield from ((" (default argument {})", k, inner) for k, inner in (function.__kwdefaults__ or {}).items())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield " (closure variable {})", name, cell.cell_contents
        except ValueError:  # a cell that is not filled yet
            continue
    if "__wrapped__" in vars(function):
        yield " (wrapped function)", "", vars(function)["__wrapped__"]


def _instance_dict(value: Any) -> list[tuple[str, Any]]:
    try:
        fields = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return []
    return list(fields.items()) if type(fields) is dict else []
