"""Symbols and fingerprints without imports: what is found, where, and what moves a fingerprint."""

import sys

import pytest

from patches.errors import UnknownTarget
from patches.upstream.source import ImportPath, Upstream

pytest_plugins = ["tests.unit.patch_bed"]

MODULE = """\
import os, sys as system
from pathlib import (
    Path,
    PurePath as Pure,
)

@staticmethod
def plain(x):
    return x

try:
    def chosen(): return 1
except ImportError:
    def chosen(): return 2

TABLE = {
    "a": 1,
}

class Base:
    def inherited(self):
        pass

class Owner(Base):
    class Nested:
        @classmethod
        def deep(cls):
            return 1

    @property
    def prop(self):
        return 1

    @prop.setter
    def prop(self, value):
        pass

    async def later(self): pass
"""


def fingerprint(bed, source: str, qual: str) -> str:
    bed.write("planted_mod", source)
    return Upstream().symbol(f"planted_mod:{qual}").fingerprint


@pytest.mark.parametrize(
    ("qual", "line", "text"),
    [
        ("plain", 7, "@staticmethod\ndef plain(x):\n    return x"),
        ("chosen", 12, "def chosen(): return 1\ndef chosen(): return 2"),
        ("TABLE", 16, 'TABLE = {\n    "a": 1,\n}'),
        ("Path", 2, "from pathlib import Path as Path"),
        ("Pure", 2, "from pathlib import PurePath as Pure"),
        ("system", 1, "import sys as system"),
        ("Owner.Nested.deep", 26, "@classmethod\ndef deep(cls):\n    return 1"),
        ("Owner.inherited", 21, "def inherited(self):\n    pass"),
        ("Owner.later", 38, "async def later(self): pass"),
    ],
)
def test_symbols(bed, qual, line, text):
    path = bed.write("planted_mod", MODULE)
    symbol = Upstream().symbol(f"planted_mod:{qual}")
    assert (symbol.path, symbol.line, symbol.text) == (str(path), line, text)
    assert "planted_mod" not in sys.modules


def test_a_property_is_all_of_its_parts(bed):
    before = fingerprint(bed, MODULE, "Owner.prop")
    assert before != fingerprint(
        bed, MODULE.replace("(self, value):\n        pass", "(self, value):\n        1"), "Owner.prop"
    )


def test_only_the_symbols_own_text_moves_its_fingerprint(bed):
    base = fingerprint(bed, MODULE, "Owner.Nested.deep")
    assert fingerprint(bed, "# more\n\n" + MODULE, "Owner.Nested.deep") == base
    assert fingerprint(bed, MODULE.replace("def deep(cls):", "def deep(cls):  "), "Owner.Nested.deep") == base
    assert fingerprint(bed, MODULE.replace("\n", "\r\n"), "Owner.Nested.deep") == base
    assert fingerprint(bed, MODULE.replace("@classmethod", "@staticmethod"), "Owner.Nested.deep") != base
    assert fingerprint(bed, MODULE.replace("return 1\n\n    @", "return 3\n\n    @"), "Owner.Nested.deep") != base


def test_an_import_binding_does_not_depend_on_its_neighbours(bed):
    base = fingerprint(bed, MODULE, "Path")
    assert fingerprint(bed, MODULE.replace("    PurePath as Pure,\n", ""), "Path") == base
    assert fingerprint(bed, MODULE.replace("from pathlib", "from shutil"), "Path") != base


def test_inherited_through_imports_of_a_namespace_package(bed):
    bed.write("planted_pkg.deep.base", "class Base:\n    def m(self):\n        return 5\n")
    bed.write("planted_pkg.deep.child", "from .base import Base as B\nclass Child(B):\n    pass\n")
    symbol = Upstream().symbol("planted_pkg.deep.child:Child.m")
    assert symbol.path.endswith("base.py") and symbol.text == "def m(self):\n    return 5"


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("planted_gone:f", "there is no module planted_gone"),
        ("planted_mod:gone", "planted_mod has no `gone`"),
        ("planted_mod:Owner.gone", r"planted_mod\.Owner has no `gone`"),
        ("planted_mod:plain.x", "is not a class"),
        ("planted_bad:f", "is not valid Python"),
    ],
)
def test_what_is_not_there(bed, place, text):
    bed.write("planted_mod", MODULE)
    bed.write("planted_bad", "def f(:\n")
    with pytest.raises(UnknownTarget, match=text):
        Upstream().symbol(place)


def test_an_upstream_tree_earlier_on_the_path_is_the_one_found(bed):
    path = bed.write("megatron.core.__init__", "def f(): pass\n")
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "megatron"}
    for name in loaded:
        del sys.modules[name]
    try:
        found = ImportPath().find("megatron.core")
    finally:
        sys.modules.update(loaded)
    assert found is not None and found.path == str(path)


def test_a_loaded_module_is_read_where_it_was_loaded_from(bed, tmp_path):
    path = bed.write("planted_mod", MODULE)
    bed.load("planted_mod")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "planted_mod.py").write_text("def plain(): pass\n")
    sys.path.insert(0, str(tmp_path / "earlier"))
    try:
        assert Upstream().symbol("planted_mod:plain").path == str(path)
    finally:
        sys.path.remove(str(tmp_path / "earlier"))


def test_the_lock_holds_for_the_wheels_of_other_pythons(tmp_path):
    from patches.upstream.wheel import Distribution, Tree

    sources = {"megatron/core/a.py": "x"}
    builds = [{**sources, f"megatron/core/helpers_cpp.cpython-{v}.so": v} for v in ("312", "313")]
    hashes = {Distribution(Tree(tmp_path), "1", build).record_sha256 for build in builds}
    assert len(hashes) == 1
    assert Distribution(Tree(tmp_path), "1", {"megatron/core/a.py": "y"}).record_sha256 not in hashes
