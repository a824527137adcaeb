"""Fixtures that several test folders share, and the figures that tests tell at the end of a session."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.pool import RankPool

FIGURES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --all, which runs the tests marked slow too, with every example and to every case's last step."""
    parser.addoption("--all", action="store_true", help="run everything: slow tests, all examples, full cases")


def pytest_configure(config: pytest.Config) -> None:
    """Let --all lift the marker expression of pyproject.toml."""
    if config.option.all and config.option.markexpr == "not slow":
        config.option.markexpr = ""


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> RankPool:
    """Return the session's pool of gloo ranks, forked from one warm process."""
    return RankPool(tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that takes a measured figure; all of them are printed after the tests."""
    return request.config.stash.setdefault(FIGURES, []).append


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the figures that tests told."""
    figures = config.stash.get(FIGURES, [])
    if figures:
        terminalreporter.section("measured")
        for figure in figures:
            terminalreporter.write_line(figure)
