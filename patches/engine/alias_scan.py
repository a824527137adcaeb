"""Find further references to an object: `from x import f as g`, default arguments, tables, layer specs.

Scanned is what loaded modules reach without running code: their globals; in these, classes (their dicts and bases),
functions (defaults, closures, `__wrapped__`), partials, containers and instances of scanned modules' classes. Of other
installed packages only the globals are compared. The standard library, torch and its compiler stack, and this package
are left out: the first cannot hold an upstream object, and this package's wraps hold their originals by design.
"""

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

from patches.record import Record

_DEPTH = 6
_SKIPPED = frozenset({*sys.stdlib_module_names, "patches", "torch", "torchgen", "triton", "numpy", "sympy"}) - {
    "__main__"
}
_SCALARS = frozenset({int, float, str, bytes, bool, complex, type(None), types.ModuleType})
_CACHED = type(functools.lru_cache(lambda: None))
_Path = tuple["_Path | None", str, Any]  # path to the holder, format of the last step, its argument
_Leads = list[tuple[str, Any, Any]]  # values that a value refers to, each with the format of its name
_Reader = Callable[[Any], _Leads]


@dataclass(frozen=True)
class Original:
    """A replaced object. No scanned module should refer to it.

    Attributes:
        record: the record that replaced it.
        raw: the raw `__dict__` entry.
        core: the function inside it.
    """

    record: Record
    raw: Any
    core: Any


@dataclass(frozen=True)
class Hit:
    """A reference to a replaced object.

    Attributes:
        record: the record that replaced the object.
        module: name of the module that holds the reference.
        name: path to the reference, starting with `module:`.
    """

    record: Record
    module: str
    name: str


def scan(originals: Sequence[Original], installed: frozenset[int] = frozenset()) -> list[Hit]:
    """Return every place in loaded modules that refers to one of the originals.

    Args:
        originals: what to look for.
        installed: ids of our own objects, which hold the originals by design and are not looked into.
    """
    if not originals:
        return []
    needles = {id(thing): original.record for original in originals for thing in (original.raw, original.core)}
    modules = _modules()
    names = {module.__name__ for module in modules}
    seen, hits, readers = set(installed), [], _Readers()
    # Breadth first: a value is scanned on its shortest path, so the depth limit does not depend on the order.
    queue: deque[tuple[_Leads, str, _Path | None, int]] = deque()
    for module in modules:
        values, depth = list(vars(module).items()), 0
        if not _is_deep(module):
            values, depth = [(name, value) for name, value in values if id(value) in needles], _DEPTH
        queue.append(([("{}", name, value) for name, value in values], module.__name__, None, depth))
    while queue:
        leads, name, before, depth = queue.popleft()
        for form, key, value in leads:
            kind, number = type(value), id(value)
            if kind in _SCALARS:
                continue
            if number in needles:
                hits.append(Hit(needles[number], name, f"{name}:{_render((before, form, key))}"))
            elif depth < _DEPTH and number not in seen and not _belongs_elsewhere(value, kind, name, names):
                seen.add(number)
                reader = readers[kind]
                if reader and (inner := reader(value)):
                    queue.append((inner, name, (before, form, key), depth + 1))
    return hits


def _render(path: _Path) -> str:
    before, form, key = path
    return (_render(before) if before else "") + form.format(key)


def _modules(without: Set[str] = frozenset()) -> list[types.ModuleType]:
    """Return the loaded modules to scan, each once, by name, except those loaded under the names `without`."""
    loaded = [module for name, module in list(sys.modules.items()) if name not in without]
    unique = {id(m): m for m in loaded if isinstance(m, types.ModuleType)}
    kept = (m for m in unique.values() if m.__name__.partition(".")[0] not in _SKIPPED)
    return sorted(kept, key=lambda module: module.__name__)


def _is_deep(module: types.ModuleType) -> bool:
    """Return whether to scan the values of the module's names: in Megatron's modules, and in modules not installed."""
    file = getattr(module, "__file__", None) or ""
    return module.__name__.startswith("megatron") or not ("site-packages" in file or "dist-packages" in file)


def _belongs_elsewhere(value: Any, kind: type, module: str, names: Set[str]) -> bool:
    """Return whether another scanned module defines the class. It is scanned there, under its own module's name."""
    return issubclass(kind, type) and value.__module__ != module and value.__module__ in names


class _Readers(dict[type, "_Reader | None"]):
    """By type, the function that lists the values that a value of it refers to; None if it refers to none.

    Goes by `type(value)`: an isinstance check would ask `__class__`, which proxies answer with code of their own.
    """

    def __missing__(self, kind: type) -> "_Reader | None":
        reader = _BY_TYPE.get(kind) or next((reads for base, reads in _BY_BASE.items() if issubclass(kind, base)), None)
        if reader is None and kind.__module__.partition(".")[0] not in _SKIPPED:
            reader = _of_instance
        self[kind] = reader
        return reader


def _of_class(value: Any) -> _Leads:
    return [
        *((".__bases__", "", base) for base in value.__bases__),
        *[(".{}", name, inner) for name, inner in list(vars(value).items())],
    ]


def _of_attributes(*names: str, form: str = "") -> _Reader:
    return lambda value: [(form, "", getattr(value, name)) for name in names]


def _of_partial(value: Any) -> _Leads:
    return [
        (" (partial)", "", value.func),
        *((" (partial argument {})", i, inner) for i, inner in enumerate(value.args)),
        *((" (partial argument {})", k, inner) for k, inner in value.keywords.items()),
    ]


def _of_dict(value: Any) -> _Leads:
    return [("[{!r}]", key, inner) for key, inner in list(dict.items(value))]


def _of_container(value: Any) -> _Leads:
    return [("[{}]", i, inner) for i, inner in enumerate(list(value))]


def _of_instance(value: Any) -> _Leads:
    try:
        fields = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return []
    return [(".{}", name, inner) for name, inner in list(fields.items())] if type(fields) is dict else []


def _of_function(function: types.FunctionType) -> _Leads:
    leads: _Leads = []
    if function.__defaults__:
        leads += [(" (default argument {})", i, inner) for i, inner in enumerate(function.__defaults__)]
    if function.__kwdefaults__:
        leads += [(" (default argument {})", k, inner) for k, inner in function.__kwdefaults__.items()]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            leads.append((" (closure variable {})", name, cell.cell_contents))
        except ValueError:  # a cell that is not filled yet
            continue
    if "__wrapped__" in vars(function):
        leads.append((" (wrapped function)", "", vars(function)["__wrapped__"]))
    return leads


_BY_TYPE: dict[type, _Reader] = {
    types.FunctionType: _of_function,
    **dict.fromkeys((staticmethod, classmethod, types.MethodType), _of_attributes("__func__")),
    property: _of_attributes("fget", "fset", "fdel"),
    **dict.fromkeys((functools.partial, functools.partialmethod), _of_partial),
    _CACHED: _of_attributes("__wrapped__", form=" (cached)"),
}
_BY_BASE: dict[type, _Reader] = {
    type: _of_class,
    dict: _of_dict,
    **dict.fromkeys((list, tuple, set, frozenset), _of_container),
}
