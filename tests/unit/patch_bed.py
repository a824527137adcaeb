"""Write importable modules to a temporary folder for the tests of `patches`, and remove them afterwards."""

import importlib
import sys
import textwrap
from pathlib import Path

import pytest

from patches.engine import alias_scan, session
from patches.record import Callback, Record
from patches.upstream import lock
from patches.upstream.source import Upstream


class Bed:
    """Write modules by dotted name; `record` makes a record on them; `lock` locks what is written now."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, module: str, source: str) -> Path:
        path = self.root.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return path

    def load(self, module: str, source: str | None = None):
        if source is not None:
            self.write(module, source)
        return importlib.import_module(module)

    def lock(self, *records: Record) -> lock.Lock:
        return lock.Lock("0", "0", lock.fingerprints(records, Upstream()))


def record(target: str, impl: str = "planted_impl:impl", action: str = "replace", **fields) -> Record:
    fields = {
        "id": "planted.one",
        "system": "planted",
        "why": "A test.",
        "when": "patches.conditions:always",
        "test": "none",
        "remove_when": "the test ends",
    } | fields
    return Record(action=action, target=target, impl=impl, **fields)


def callback(impl: str, **fields) -> Callback:
    fields = {
        "id": "planted.inner",
        "hook": "planted.one",
        "why": "A test.",
        "when": "patches.conditions:always",
        "test": "none",
        "remove_when": "the test ends",
    } | fields
    return Callback(impl=impl, **fields)


def hook(target: str, *callbacks: Callback, **fields) -> Record:
    fields = {"id": "planted.one", "system": "planted", "why": "A test."} | fields
    return Record(action="hook", target=target, callbacks=callbacks, **fields)


@pytest.fixture
def new_modules(monkeypatch):
    """Let the alias scan look only into modules that the test loads, because older ones cannot refer to planted ones.

    A scan of everything that a test process has loaded takes more than a second, and is a test of its own.
    """
    before, modules = frozenset(sys.modules), alias_scan._modules
    monkeypatch.setattr(alias_scan, "_modules", lambda: modules(before))


@pytest.fixture
def bed(tmp_path, monkeypatch, new_modules):
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield Bed(tmp_path)
    for name in set(sys.modules) - before:
        if name.partition(".")[0].startswith("planted") or name.startswith("megatron.planted"):
            del sys.modules[name]


@pytest.fixture
def own_session(monkeypatch, new_modules):
    """Give one test a session of its own, which is undone at the end."""
    fresh = session.Session()
    monkeypatch.setattr(session, "SESSION", fresh)
    yield fresh
    for applied in reversed(list(fresh.stack)):
        fresh.undo(applied)
