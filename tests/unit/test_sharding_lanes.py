"""Collectives run in one order on all ranks, overlap, and report errors with the collective that failed."""

import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from megatron.longseq.sharding.plan.collectives import (
    GATHER_BETWEEN,
    GATHER_INSIDE,
    REDUCE_BETWEEN,
    SCATTER_BETWEEN,
    SCATTER_INSIDE,
    Collective,
    CollectiveKind,
    Collectives,
    Scope,
)
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.runtime.collectives import CollectiveRunner, Region, region_of
from megatron.longseq.sharding.runtime.comm_queue import CommError, CommQueues, Work
from megatron.longseq.sharding.runtime.comm_streams import CommThread
from megatron.longseq.sharding.runtime.process_groups import Communicators
from tests.unit.lanes_bed import LIMIT, Fake, FakeRendezvous, bucket, on_ranks

CPU = torch.device("cpu")
SCATTER = (SCATTER_INSIDE, SCATTER_BETWEEN)
GATHER = (GATHER_BETWEEN, GATHER_INSIDE)
ALL_REDUCE = (SCATTER_INSIDE, REDUCE_BETWEEN, GATHER_INSIDE)
JOBS: list[Collectives] = [
    SCATTER,
    GATHER,
    ALL_REDUCE,
    (Collective(CollectiveKind.ALL_REDUCE, Scope.FLAT),),
    (GATHER_INSIDE,),
    (),
]


@contextmanager
def lanes(runner: Fake, *, is_overlapped: bool = True, lag: int = 1) -> Iterator[CommQueues]:
    with closing(CommQueues(runner, CPU, runner.member, is_overlapped=is_overlapped, lag=lag)) as made:
        yield made


def soon(holds: Callable[[], bool]) -> bool:
    """Wait until a thread has released what it ran."""
    deadline = time.monotonic() + LIMIT
    while not holds() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return holds()


@pytest.mark.parametrize("is_overlapped", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_all_ranks_have_one_order_however_late_each_is(is_overlapped: bool, seed: int) -> None:
    groups = RankGroups(4, 2)
    meeting, script = FakeRendezvous(groups), random.Random(seed)
    jobs = [script.choice(JOBS) for _ in range(24)]
    waits = {job: script.sample(range(job + 1), 2 if job else 1) for job in range(2, 24, 3)}
    fakes = [Fake(meeting, member, 10 * seed + member) for member in range(4)]

    def act(member: int) -> None:
        with lanes(fakes[member], is_overlapped=is_overlapped, lag=1 + seed % 2) as mine:
            handles: list[Work] = []
            for number, collectives in enumerate(jobs):
                handles.append(mine.submit(collectives, bucket(number), f"bucket {number}"))
                for earlier in waits.get(number, []):
                    handles[earlier].wait()

    on_ranks(4, act)
    assert all(fake.ran == fakes[0].ran for fake in fakes)
    ran = sorted(one for each in fakes[0].ran.values() for one in each)
    assert ran == sorted((number, collective) for number, collectives in enumerate(jobs) for collective in collectives)
    assert len(fakes[0].ran) == 1 + is_overlapped


def blocked(
    fake: Fake, collective: Collective, number: int
) -> tuple[threading.Event, Callable[[Collective, int], bool]]:
    """Block a phase of a bucket until an event. Return it and a function that waits for another phase's start."""
    go, started = threading.Event(), {}

    def planted(now: Collective, of: int) -> None:
        started.setdefault((now, of), threading.Event()).set()
        if (now, of) == (collective, number):
            assert go.wait(LIMIT), "blocked for ever"

    def starts(now: Collective, of: int, seconds: float = LIMIT) -> bool:
        return started.setdefault((now, of), threading.Event()).wait(seconds)

    fake.planted = planted
    return go, starts


def test_one_bucket_goes_inside_while_another_is_between() -> None:
    fake = Fake()
    go, starts = blocked(fake, SCATTER_BETWEEN, 0)
    with lanes(fake) as mine:
        for number in range(2):
            mine.submit(SCATTER, bucket(number), "x")
        assert starts(SCATTER_BETWEEN, 0) and starts(SCATTER_INSIDE, 1)
        assert not starts(SCATTER_BETWEEN, 1, 0.05)  # never two on one lane
        go.set()
    assert starts(SCATTER_BETWEEN, 1, 0)


def test_serial_phases_wait_for_all_before_them() -> None:
    fake = Fake()
    go, starts = blocked(fake, SCATTER_BETWEEN, 0)
    with lanes(fake, is_overlapped=False) as mine:
        for number in range(2):
            mine.submit(SCATTER, bucket(number), "x")
        assert starts(SCATTER_BETWEEN, 0) and not starts(SCATTER_INSIDE, 1, 0.05)
        go.set()
    assert starts(SCATTER_INSIDE, 1, 0)


def test_an_all_reduce_comes_back_inside_behind_the_next_ones_first_phase() -> None:
    fake = Fake()
    go, starts = blocked(fake, REDUCE_BETWEEN, 0)
    with lanes(fake) as mine:
        first = mine.submit(ALL_REDUCE, bucket(0), "x")
        second = mine.submit(ALL_REDUCE, bucket(1), "x")
        assert starts(REDUCE_BETWEEN, 0) and starts(SCATTER_INSIDE, 1)
        go.set()
        first.wait()
        assert not starts(GATHER_INSIDE, 1, 0.05)  # held back: nobody waits for it
        second.wait()
    assert fake.ran["paro-inside"] == [(0, SCATTER_INSIDE), (1, SCATTER_INSIDE), (0, GATHER_INSIDE), (1, GATHER_INSIDE)]


def test_what_is_held_back_goes_on_lanes_at_the_same_wait_however_fast_jobs_are() -> None:
    """A wait for a finished job still determines what is submitted, because it may be unfinished on another rank."""
    fake, ended = Fake(), threading.Event()
    with lanes(fake, lag=9) as mine:
        mine.submit(ALL_REDUCE, bucket(0), "x")
        handle = mine.submit(SCATTER, bucket(1), "x", ended.set)
        assert ended.wait(LIMIT)
        time.sleep(0.05)
        handle.wait()
        mine.submit(ALL_REDUCE, bucket(2), "x")
    order = fake.ran["paro-inside"]
    assert order.index((0, GATHER_INSIDE)) < order.index((2, SCATTER_INSIDE))


@pytest.mark.parametrize("collectives", JOBS, ids=str)
def test_what_comes_after_runs_once_behind_the_last_phase(collectives: Collectives) -> None:
    fake, seen = Fake(), []
    with lanes(fake) as mine:
        handle = mine.submit(
            collectives,
            bucket(0),
            "x",
            lambda: seen.append((sum(map(len, fake.ran.values())), torch.is_grad_enabled())),
        )
        handle.wait()
        assert seen == [(len(collectives), False)]
        handle.wait()
    assert seen == [(len(collectives), False)]


@pytest.mark.parametrize("is_overlapped", [True, False])
def test_an_error_names_what_failed_and_stops_what_comes_later(is_overlapped: bool) -> None:
    fake = Fake(member=3)

    def planted(collective: Collective, number: int) -> None:
        if (collective, number) == (SCATTER_BETWEEN, 1):
            raise OSError("connection lost")

    fake.planted = planted
    with lanes(fake, is_overlapped=is_overlapped) as mine:
        first = mine.submit(SCATTER, bucket(0), "bucket 0 of gradients")
        first.wait()
        second = mine.submit(SCATTER, bucket(1), "bucket 1 of gradients")
        named = r"rank 3: reduce-scatter between of bucket 1 of gradients failed: OSError: connection lost"
        with pytest.raises(CommError, match=rf"^{named}"):
            second.wait()
        with pytest.raises(CommError, match=rf"bucket 2 did not run because an earlier collective failed: {named}"):
            mine.submit(SCATTER, bucket(2), "bucket 2")
        first.wait()
        with pytest.raises(CommError, match=named):
            second.wait()
    assert (1, SCATTER_BETWEEN) not in fake.ran["paro-between"]


@pytest.mark.parametrize("is_overlapped", [True, False])
def test_what_was_submitted_before_an_error_fails_rather_than_hangs(is_overlapped: bool) -> None:
    fake, first_starts, go = Fake(), threading.Event(), threading.Event()

    def planted(collective: Collective, number: int) -> None:
        first_starts.set()
        assert go.wait(LIMIT)
        raise OSError("gone")

    fake.planted = planted
    with lanes(fake, is_overlapped=is_overlapped) as mine:
        handles = [mine.submit(ALL_REDUCE, bucket(number), f"bucket {number}") for number in range(4)]
        assert first_starts.wait(LIMIT)
        go.set()
        with pytest.raises(CommError, match="reduce-scatter inside of bucket 0 failed: OSError: gone"):
            handles[0].wait()
        for number, handle in enumerate(handles[1:], 1):
            with pytest.raises(
                CommError, match=rf"bucket {number} did not run because .* of bucket 0 failed: OSError: gone"
            ):
                handle.wait()
    assert not fake.ran


def test_a_phase_that_cannot_run_is_refused_before_anything_starts() -> None:
    fake = Fake()

    def check(collective: Collective, region: Region) -> None:
        if collective is SCATTER_BETWEEN:
            raise ValueError("no")

    fake.check = check  # type: ignore[method-assign]
    with lanes(fake) as mine:
        with pytest.raises(ValueError, match="no"):
            mine.submit(SCATTER, bucket(0), "x")
        mine.submit((SCATTER_INSIDE,), bucket(1), "x").wait()
    assert fake.ran == {"paro-inside": [(1, SCATTER_INSIDE)]}


def test_closing_ends_what_was_submitted_and_refuses_more() -> None:
    fake = Fake(seed=1)
    before = threading.active_count()
    with lanes(fake, lag=5) as mine:
        for number in range(4):
            mine.submit(ALL_REDUCE, bucket(number), "x")
    assert sum(map(len, fake.ran.values())) == 12 and threading.active_count() == before
    mine.close()
    with pytest.raises(CommError, match="rank 0: bucket 4 was submitted after the queues were closed"):
        mine.submit(SCATTER, bucket(4), "bucket 4")
    lane = CommThread("one")
    lane.close()
    with pytest.raises(RuntimeError, match="one is closed and cannot run more tasks"):
        lane.put(lambda: None, None)


def test_memory_is_kept_until_the_end_and_no_longer() -> None:
    fake = Fake()
    go, starts = blocked(fake, SCATTER_INSIDE, 0)
    with lanes(fake) as mine:
        region = bucket(0)
        part = weakref.ref(region.group_slice)
        handle = mine.submit(SCATTER, region, "x")
        del region
        assert starts(SCATTER_INSIDE, 0)
        gc.collect()
        assert part() is not None
        go.set()
        handle.wait()
        assert soon(lambda: part() is None)


@pytest.mark.parametrize("is_overlapped", [True, False])
def test_threads_end_with_the_lanes_that_nobody_has(is_overlapped: bool) -> None:
    before = threading.active_count()
    mine = CommQueues(Fake(), CPU, 0, is_overlapped=is_overlapped)
    mine.submit(SCATTER, bucket(0), "x").wait()
    assert threading.active_count() == before + 1 + is_overlapped
    del mine
    assert soon(lambda: threading.active_count() == before)


def test_a_process_ends_though_a_collective_does_not() -> None:
    script = """
import threading
from megatron.longseq.sharding.runtime.comm_streams import CommThread
begun = threading.Event()
lane = CommThread("stuck")
lane.put(lambda: (begun.set(), threading.Event().wait()), None)
assert begun.wait(10)
"""
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, timeout=300, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


BUCKET = torch.zeros(24)
GROUPS = RankGroups(6, 3)


@pytest.mark.parametrize(
    ("collective", "region", "wrong"),
    [
        (SCATTER_INSIDE, Region(BUCKET, BUCKET[8:16]), None),
        (SCATTER_BETWEEN, Region(None, BUCKET[:8]), None),
        (SCATTER_INSIDE, region_of(BUCKET, GROUPS, 4), None),
        (SCATTER_INSIDE, Region(None, BUCKET[8:16]), "works on the full bucket, and only a slice is given"),
        (
            Collective(CollectiveKind.ALL_GATHER, Scope.FLAT),
            Region(BUCKET, BUCKET[8:16]),
            "there is no process group for it.*`nontrivial`",
        ),
        (SCATTER_BETWEEN, Region(None, BUCKET[:7]), "7 elements does not split into 2 shards: pad the bucket"),
        (SCATTER_INSIDE, Region(BUCKET, BUCKET[8:14]), "6 torch.float32 elements are no slice, 1/3, of a bucket of 24"),
        (SCATTER_INSIDE, Region(BUCKET, BUCKET[8:16].bfloat16()), "torch.bfloat16 elements are no slice"),
        (SCATTER_INSIDE, Region(BUCKET, BUCKET[:8]), "is not slice 1 of the bucket: give a view into it"),
        (SCATTER_BETWEEN, Region(BUCKET, BUCKET[8:16].clone()), "is not slice 1 of the bucket"),
        (SCATTER_BETWEEN, Region(None, BUCKET[::2]), "not flat and contiguous"),
        (SCATTER_INSIDE, Region(BUCKET.view(2, 12), BUCKET[8:16]), "not flat and contiguous"),
    ],
)
def test_regions_that_do_not_fit_are_refused(collective: Collective, region: Region, wrong: str | None) -> None:
    made = dict.fromkeys((Scope.INSIDE, Scope.BETWEEN))
    runner = CollectiveRunner(GROUPS, Communicators(4, made, None))  # type: ignore[arg-type]
    if wrong is None:
        runner.check(collective, region)
        return
    with pytest.raises(
        ValueError, match=rf"{collective.kind} {collective.scope}, data-parallel rank 4 of 6 in 2 .*{wrong}"
    ):
        runner.check(collective, region)
