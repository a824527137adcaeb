"""Fixtures that several test folders share."""

import pytest

from tests.pool import RankPool


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> RankPool:
    """Return the session's pool of gloo ranks, forked from one warm process."""
    return RankPool(tmp_path_factory.mktemp("ranks"))
