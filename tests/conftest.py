"""Fixtures that several test folders share, and the figures that tests print at the end of a session."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pool import RankPool


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --all, which runs the tests marked slow too, with every example and to every case's last step."""
    parser.addoption("--all", action="store_true", help="run everything: slow tests, all examples, full cases")


def pytest_configure(config: pytest.Config) -> None:
    """Let --all lift the marker expression of pyproject.toml."""
    if config.option.all and config.option.markexpr == "not slow":
        config.option.markexpr = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one worker run all tests on several ranks, one after another, and the other one all other files.

    Ranks use both cores, and share runs and fixtures. pytest-xdist has `--dist loadgroup` for this, but version 3.8
    loses the groups under pytest 9.2: it writes them into an attribute that pytest no longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class RanksOnOneWorker(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ranks" if runs_on_ranks(config.rootpath / file) else file

    return RanksOnOneWorker(config, log)


@functools.cache
def runs_on_ranks(file: Path) -> bool:
    """Return whether the tests of a file run on ranks; those of scripts are processes that mostly run one at a time."""
    return file.parent.name not in ("scripts", "unit") or "RankPool" in file.read_text()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> RankPool:
    """Return the session's pool of gloo ranks, forked from one warm process."""
    return RankPool(tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Return a function that takes a measured figure; all of them are printed after the tests."""
    return lambda figure: record_property("measured", figure)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the figures that tests told."""
    reports = (one for kind in terminalreporter.stats.values() for one in kind if getattr(one, "when", None) == "call")
    figures = [text for one in reports for name, text in one.user_properties if name == "measured"]
    if figures:
        terminalreporter.section("measured")
        for figure in figures:
            terminalreporter.write_line(figure)
