"""The pool returns results in rank order, and its errors name the rank."""

import time

import psutil
import pytest

from tests.distributed import jobs
from tests.pool import RankFailure, RankPool


def test_every_rank_takes_part(ranks: RankPool) -> None:
    assert ranks.run(3, jobs.all_reduce_of_ranks) == [3.0, 3.0, 3.0]


def test_a_raising_rank_is_named_and_the_others_are_not_waited_for(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"rank 1 raised[\s\S]*planted on rank 1"):
        ranks.run(2, jobs.raise_on, 1, timeout=300)


def test_a_killed_rank_is_named(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="rank 1 died without an error message"):
        ranks.run(2, jobs.die_on, 1, timeout=300)


def test_a_hang_ends_at_the_limit(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"ranks \[0, 1\] did not end in time"):
        ranks.run(2, jobs.sleep, 60, timeout=1.0)


def test_what_a_rank_started_ends_with_it(ranks: RankPool) -> None:
    helpers = ranks.run(2, jobs.start_helper)
    deadline = time.monotonic() + 60
    while any(map(_alive, helpers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, helpers))


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
