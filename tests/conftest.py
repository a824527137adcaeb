"""Fixtures that several test folders share, and the figures that tests print at the end of a session."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

from tests.pool import RankPool

# An example may take long on a machine that is busy with other things.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Tests that need the same trainings: a file goes to the worker of the one that it names.
SHARED_RUNS = {"tests/distributed/test_sharding_bytes.py": "tests/distributed/test_sharding_memory.py"}
# With --all, the cases of one system go to one worker: all of them would take a worker longer than the rest takes.
CASES, SYSTEMS = "tests/regression/test_regression.py", ("seq1f1b", "usp", "paro", "packed", "flexsp")

# With --all, what one worker does for long goes first, so that no worker is left with it at the end.
FIRST = ("tests/slurm/", "tests/regression/", "tests/images/", "tests/faults/", "tests/scripts/")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --all, which runs the tests marked slow too, with every example and every case."""
    parser.addoption("--all", action="store_true", help="run everything: slow tests, all examples, all cases")


def pytest_configure(config: pytest.Config) -> None:
    """Let --all lift the marker expression of pyproject.toml, and switch the garbage collector off for the imports."""
    gc.disable()
    if config.option.all and config.option.markexpr == "not slow":
        config.option.markexpr = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first if all tests run."""
    if config.option.all:
        start = len(FIRST)
        items.sort(key=lambda item: next((i for i, path in enumerate(FIRST) if item.nodeid.startswith(path)), start))


def pytest_collection_finish() -> None:
    """Switch the garbage collector on, for all but the imported modules and the collected tests."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give tests that share many runs to one worker, and single files to whichever worker is free.

    pytest-xdist has `--dist loadgroup` for this, but version 3.8 loses the groups under pytest 9.2: it writes them into
    an attribute that pytest no longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class SharedRunsOnOneWorker(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file == CASES and config.option.all:
                system = nodeid.partition("[")[2].rstrip("]").partition("-")[0]
                return f"{file} {system if system in SYSTEMS else 'upstream'}"
            return SHARED_RUNS.get(file, file)

    return SharedRunsOnOneWorker(config, log)


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
