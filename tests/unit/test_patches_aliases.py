"""The alias scan: every way to hold an original under another name, and what it must not complain about."""

import sys
import time
from collections.abc import Callable

import pytest

from patches.engine import alias_scan as aliases
from patches.engine import apply as engine
from patches.errors import StaleAlias, UnknownTarget
from tests.unit.patch_bed import record

pytest_plugins = ["tests.unit.patch_bed"]

UPSTREAM = """
    def f(x):
        return x

    class Owner:
        @staticmethod
        def static(x):
            return x

    class Old:
        pass
"""
IMPL = "def impl(*args):\n    return 'ours'\nclass New:\n    pass\n"

STALE = {
    "plain import": ("from planted_up import f", "planted_user:f"),
    "renamed import": ("from planted_up import f as other", "planted_user:other"),
    "default argument": (
        "import planted_up\ndef use(h=planted_up.f): pass",
        r"planted_user:use \(default argument 0\)",
    ),
    "keyword default": (
        "import planted_up\ndef use(*, h=planted_up.f): pass",
        r"planted_user:use \(default argument h\)",
    ),
    "class attribute": ("import planted_up\nclass C:\n    h = planted_up.f", r"planted_user:C\.h"),
    "static method": ("import planted_up\nclass C:\n    h = staticmethod(planted_up.f)", r"planted_user:C\.h"),
    "class method": ("import planted_up\nclass C:\n    h = classmethod(planted_up.f)", r"planted_user:C\.h"),
    "property": ("import planted_up\nclass C:\n    h = property(planted_up.f)", r"planted_user:C\.h"),
    "method default": (
        "import planted_up\nclass C:\n    def m(self, h=planted_up.f): pass",
        r"C\.m \(default argument 0\)",
    ),
    "table": ("import planted_up\nT = {'a': planted_up.f}", r"planted_user:T\['a'\]"),
    "nested table": ("import planted_up\nT = {'a': [(1, planted_up.f)]}", r"planted_user:T\['a'\]\[0\]\[1\]"),
    "partial": ("import functools, planted_up\np = functools.partial(planted_up.f, 1)", r"planted_user:p \(partial\)"),
    "partial argument": (
        "import functools, planted_up\np = functools.partial(map, planted_up.f)",
        r"planted_user:p \(partial argument 0\)",
    ),
    "closure": (
        "import planted_up\ndef make(h):\n    return lambda x: h(x)\nuse = make(planted_up.f)",
        r"planted_user:use \(closure variable h\)",
    ),
    "cache": ("import functools, planted_up\nc = functools.lru_cache(planted_up.f)", r"planted_user:c \(cached\)"),
    "decorated": (
        "import functools, planted_up\n@functools.wraps(planted_up.f)\ndef d(x): pass",
        r"planted_user:d \(wrapped function\)",
    ),
    "instance": ("import planted_up\nclass S: pass\ns = S()\ns.h = planted_up.f", r"planted_user:s\.h"),
}


@pytest.fixture
def up(bed):
    bed.load("planted_impl", IMPL)
    return bed.load("planted_up", UPSTREAM)


@pytest.mark.parametrize("kind", STALE)
def test_each_kind_of_stale_alias_is_an_error_that_names_it(bed, up, kind):
    source, name = STALE[kind]
    user = bed.load("planted_user", source)
    original = up.f
    with pytest.raises(StaleAlias, match=name) as error:
        engine.apply([record("planted_up:f")])
    assert user.__file__ in str(error.value)
    assert up.f is original, "after a scan error everything is undone"


def test_alias_of_a_static_method(bed, up):
    bed.load("planted_user", "import planted_up\nh = planted_up.Owner.static")
    with pytest.raises(StaleAlias, match="planted_user:h"):
        engine.apply([record("planted_up:Owner.static")])
    bed.load("planted_user").h = None
    engine.apply([record("planted_up:Owner.static")]).undo()


def test_subclass_of_a_replaced_class(bed, up):
    bed.load("planted_user", "import planted_up\nclass Child(planted_up.Old): pass")
    with pytest.raises(StaleAlias, match=r"planted_user:Child\.__bases__"):
        engine.apply([record("planted_up:Old", "planted_impl:New")])


def test_declared_aliases_are_imported_bound_and_restored(bed, up):
    bed.write("planted_user", "from planted_up import f as other\n")
    original = up.f
    applied = engine.apply([record("planted_up:f", aliases=("planted_user:other",))])
    user = bed.load("planted_user")
    assert user.other(1) == up.f(1) == "ours"
    applied.undo()
    assert user.other is up.f is original


def test_declared_alias_of_a_static_method_stays_callable(bed, up):
    user = bed.load("planted_user", "import planted_up\nh = planted_up.Owner.static")
    applied = engine.apply([record("planted_up:Owner.static", aliases=("planted_user:h",))])
    assert user.h(1) == up.Owner.static(1) == "ours" and not isinstance(user.h, staticmethod)
    applied.undo()
    assert user.h(1) == 1


def test_a_declared_alias_that_holds_something_else_is_refused(bed, up):
    user = bed.load("planted_user", "def f(x):\n    return 'another'\n")
    with pytest.raises(UnknownTarget, match="planted_user:f is not an alias of planted_up:f"):
        engine.apply([record("planted_up:f", aliases=("planted_user:f",))])
    assert up.f(1) == 1 and user.f(1) == "another"


def test_depth_is_not_cut_by_the_order_of_discovery(bed, up):
    """An object that was first reached by a long path is scanned by a short one too."""
    source = "import planted_up\nshort = [[planted_up.f]]\nlong = [[[[[short]]]]]\nglobals()['a'] = long\n"
    bed.load("planted_user", source)
    with pytest.raises(StaleAlias, match=r"planted_user:short\[0\]\[0\]"):
        engine.apply([record("planted_up:f")])


def test_scan_with_upstream_loaded(tell: Callable[[str], None]):
    import megatron.training
    from megatron.training import arguments

    original = aliases.Original(record("planted_up:f"), arguments.parse_args, arguments.parse_args)
    seconds = []
    for _ in range(5):
        began = time.process_time()
        hits = aliases.scan([original])
        seconds.append(time.process_time() - began)
    assert [hit.name for hit in hits] == ["megatron.training.arguments:parse_args"]
    assert megatron.training
    tell(f"alias scan: {min(seconds):.2f} s over {len(sys.modules)} modules")
