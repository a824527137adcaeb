"""Find a symbol's source and fingerprint it, without importing the module that holds it.

A fingerprint is the sha256 of the raw source lines, dedented and right-stripped: it moves with every change of the
text and with nothing else (not with the Python version, not with the place in the file). A name that is bound by
an import has the one binding as its text, so other names in the same import statement do not matter.
"""

import ast
import hashlib
import importlib.util
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from patches.errors import UnknownTarget


@dataclass(frozen=True, slots=True)
class Source:
    """The source file of a module.

    Attributes:
        module: dotted name.
        path: path of the file, for messages.
        data: its bytes.
    """

    module: str
    path: str
    data: bytes

    def lines(self) -> list[str]:
        """Return the lines of the text as Python counts them, without line ends."""
        return self.data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n").split("\n")


@dataclass(frozen=True, slots=True)
class Symbol:
    """One name that a module or class binds.

    Attributes:
        place: `module:Qual.name`.
        path: path of the file, for messages.
        line: its first line, from 1.
        text: the source that the fingerprint covers.
    """

    place: str
    path: str
    line: int
    text: str

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of `text`, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class Finder(Protocol):
    """A provider of modules' sources: the import path, a folder, a wheel file."""

    label: str

    def find(self, module: str) -> Source | None:
        """Return the module's source, or None if there is no such module or it has no Python source."""


class ImportPath:
    """Sources as `import` finds them: loaded modules first, then `sys.path` and the installed finders."""

    label = "the import path"

    def find(self, module: str) -> Source | None:
        """Return the file that is, or would be, imported as `module`. Import nothing."""
        origin, locations, name = None, None, ""
        for part in module.split("."):
            name = f"{name}.{part}" if name else part
            found = _step(name, locations)
            if found is None:
                return None
            origin, locations = found
        if origin is None or not origin.endswith(".py") or not Path(origin).is_file():
            return None
        return Source(module, origin, Path(origin).read_bytes())


def _step(name: str, locations: list[str] | None) -> tuple[str | None, list[str] | None] | None:
    """Find one level of a dotted name. Return (file, search path of its children), or None if there is no module."""
    loaded = sys.modules.get(name)
    if isinstance(loaded, ModuleType):
        path = getattr(loaded, "__path__", None)
        return getattr(loaded, "__file__", None), None if path is None else list(path)
    if locations is not None:
        found = _in_folders(name.rpartition(".")[2], locations)
        if found is not None:
            return found
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, locations)
        except KeyError:  # a namespace package inside a parent that is not imported: covered by _in_folders
            continue
        if spec is not None:
            children = spec.submodule_search_locations
            return spec.origin if spec.has_location else None, None if children is None else list(children)
    return None


def _in_folders(part: str, folders: Iterable[str]) -> tuple[str | None, list[str] | None] | None:
    portions = []
    for folder in map(Path, folders):
        if (folder / part / "__init__.py").is_file():
            return str(folder / part / "__init__.py"), [str(folder / part)]
        if (folder / f"{part}.py").is_file():
            return str(folder / f"{part}.py"), None
        if (folder / part).is_dir():
            portions.append(str(folder / part))
    return (None, portions) if portions else None


class Upstream:
    """The symbols of a tree of sources. Each file is read, parsed and split into lines once."""

    def __init__(self, finder: Finder | None = None) -> None:
        self.finder: Finder = finder or ImportPath()
        self._parsed: dict[str, tuple[Source, ast.Module]] = {}
        self._lines: dict[str, list[str]] = {}

    def source(self, module: str) -> tuple[Source, ast.Module]:
        """Return the module's source and syntax tree.

        Args:
            module: dotted name.

        Raises:
            UnknownTarget: no such module, or its file is not valid Python.
        """
        if module not in self._parsed:
            source = self.finder.find(module)
            if source is None:
                raise _unknown(f"there is no module {module}", module, self.finder.label)
            try:
                self._parsed[module] = (source, ast.parse(source.data))
            except (SyntaxError, ValueError) as error:
                raise _unknown(f"{module} is not valid Python: {error}", module, source.path) from error
        return self._parsed[module]

    def symbol(self, place: str) -> Symbol:
        """Locate `module:Qual.name` (or a whole module): methods, nested classes and inherited methods included.

        Raises:
            UnknownTarget: names what is missing and where it was looked for.
        """
        module, _, qual = place.partition(":")
        source, tree = self.source(module)
        if not qual:
            return Symbol(place, source.path, 1, _plain(self._lines_of(source)))
        nodes, source = self._resolve(module, tree, qual.split("."), place)
        lines = self._lines_of(source)
        text = "\n".join(_text(node, lines, qual.rpartition(".")[2]) for node in nodes)
        return Symbol(place, source.path, _first_line(nodes[0]), text)

    def _lines_of(self, source: Source) -> list[str]:
        if source.module not in self._lines:
            self._lines[source.module] = source.lines()
        return self._lines[source.module]

    def _resolve(self, module: str, tree: ast.Module, parts: list[str], place: str) -> tuple[list[ast.stmt], Source]:
        scope: ast.Module | ast.ClassDef = tree
        holder = home = module
        for depth, part in enumerate(parts):
            nodes = list(_bindings(scope.body, part))
            if not nodes and isinstance(scope, ast.ClassDef):
                nodes, home = self._inherited(home, scope, part)
            if not nodes:
                raise _unknown(f"{holder} has no `{part}`", place, self.source(home)[0].path)
            if depth == len(parts) - 1:
                return nodes, self.source(home)[0]
            owner = nodes[-1]
            if not isinstance(owner, ast.ClassDef):
                raise _unknown(f"`{part}` of {holder} is not a class", place, self.source(home)[0].path)
            scope, holder = owner, f"{holder}.{part}"
        raise AssertionError("a place has at least one name")

    def _inherited(self, module: str, owner: ast.ClassDef, name: str) -> tuple[list[ast.stmt], str]:
        """Return the bindings of `name` in a class's bases, with their module. Follow bases that are plain names."""
        for base in owner.bases:
            if not isinstance(base, ast.Name):
                continue
            found = self._class(module, base.id)
            if found is None:
                continue
            home, node = found
            nodes = list(_bindings(node.body, name))
            if nodes:
                return nodes, home
            nodes, home = self._inherited(home, node, name)
            if nodes:
                return nodes, home
        return [], module

    def _class(self, module: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """Follow a class name through `from ... import` to its definition. Return None outside these sources."""
        source = self.finder.find(module)
        if source is None:
            return None
        for node in reversed(list(_bindings(self.source(module)[1].body, name))):
            if isinstance(node, ast.ClassDef):
                return module, node
            if isinstance(node, ast.ImportFrom):
                entry = next(a for a in node.names if (a.asname or a.name) == name)
                is_package = Path(source.path).name == "__init__.py"
                return self._class(_imported_from(module, is_package, node), entry.name)
        return None


def _imported_from(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module if is_package else module.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def _bindings(body: list[ast.stmt], name: str) -> Iterator[ast.stmt]:
    """Return the statements that bind `name` in this scope, in order, also inside if, try and with."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == name:
                yield node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if any((alias.asname or alias.name.partition(".")[0]) == name for alias in node.names):
                yield node
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (leaf for target in targets for leaf in ast.walk(target))
            if any(isinstance(leaf, ast.Name) and leaf.id == name for leaf in names):
                yield node
        else:
            for block in ("body", "orelse", "finalbody"):
                yield from _bindings(getattr(node, block, []), name)
            for handler in getattr(node, "handlers", []):
                yield from _bindings(handler.body, name)


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _text(node: ast.stmt, lines: list[str], name: str) -> str:
    if isinstance(node, ast.Import | ast.ImportFrom):
        alias = next(a for a in node.names if (a.asname or a.name.partition(".")[0]) == name)
        origin = f"from {'.' * node.level}{node.module or ''} " if isinstance(node, ast.ImportFrom) else ""
        return f"{origin}import {alias.name} as {name}"
    return _plain(lines[_first_line(node) - 1 : node.end_lineno])


def _plain(lines: list[str]) -> str:
    return "\n".join(line.rstrip() for line in textwrap.dedent("\n".join(lines)).split("\n")).rstrip()


def _unknown(why: str, place: str, where: str) -> UnknownTarget:
    return UnknownTarget(
        f"upstream has no {place}",
        where=where,
        why=why,
        todo="correct the record's target or alias; after an upgrade, `python -m patches bump WHEEL` tells what moved; "
        "with a Megatron tree of your own: python -m patches run --megatron wheel SCRIPT ...",
    )
