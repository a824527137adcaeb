"""Fixtures that several test folders share, and the figures that tests tell at the end of a session."""

from collections.abc import Callable
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests one worker of pytest-xdist runs in their order: those of ranks, and those of each other file.

    Ranks use both cores, and their runs and fixtures are shared.
    """
    for item in items:
        group = "ranks" if "ranks" in getattr(item, "fixturenames", ()) else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


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
