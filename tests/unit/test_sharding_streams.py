"""Collectives on streams are correct in any order that events allow; tests/gpu repeats this on a GPU."""

import random
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch

from megatron.longseq.sharding.plan.collectives import (
    GATHER_BETWEEN,
    GATHER_INSIDE,
    REDUCE_BETWEEN,
    SCATTER_BETWEEN,
    SCATTER_INSIDE,
    Collective,
)
from megatron.longseq.sharding.runtime.collectives import Region
from megatron.longseq.sharding.runtime.comm_queue import CommError, CommQueues
from megatron.longseq.sharding.runtime.comm_streams import allocate_on_default_stream
from tests.unit.streams_bed import Machine, machine

__all__ = ["machine"]
GPU = torch.device("cuda", 0)
ALL_REDUCE = (SCATTER_INSIDE, REDUCE_BETWEEN, GATHER_INSIDE)
JOBS = [(SCATTER_INSIDE, SCATTER_BETWEEN), ALL_REDUCE, (GATHER_BETWEEN, GATHER_INSIDE), ()]


class DoublingRunner:
    """A runner whose phases give the current stream work: what is there, twice and 1 more, in two steps."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.running: set[Collective] = set()
        self.together = 0

    def check(self, collective: Collective, region: Region) -> None:
        """Accept every argument."""

    def run(self, collective: Collective, region: Region) -> None:
        """Submit work to the stream. Only the device holds its tensors."""
        part = weakref.ref(region.group_slice)

        def begin() -> None:
            self.running.add(collective)
            self.together = max(self.together, len({one.scope for one in self.running}))
            assert part() is not None, "given away before the end"
            part().mul_(2)  # type: ignore[union-attr]

        def end() -> None:
            self.running.discard(collective)
            part().add_(1)  # type: ignore[union-attr]

        self.machine.do(begin)
        self.machine.do(end)


def writing(part: torch.Tensor, value: int) -> Callable[[], None]:
    reference = weakref.ref(part)
    return lambda: reference().fill_(value)  # type: ignore[union-attr]


def reading(part: torch.Tensor, seen: list[int]) -> Callable[[], None]:
    reference = weakref.ref(part)
    return lambda: seen.append(int(reference()))  # type: ignore[arg-type]


@pytest.mark.parametrize("is_overlapped", [True, False])
def test_any_order_that_events_allow_is_right(machine: Machine, is_overlapped: bool) -> None:
    together = [one_order(machine, seed, is_overlapped) for seed in range(60)]
    assert max(together) == 1 + is_overlapped


def one_order(machine: Machine, seed: int, is_overlapped: bool) -> int:
    """Run six jobs in one order; return how many lanes worked at once."""
    order, runner = random.Random(seed), DoublingRunner(machine)
    lanes = CommQueues(runner, GPU, 0, is_overlapped=is_overlapped, lag=1 + seed % 3)
    after: list[int] = []
    seen: list[int] = []
    parts, handles, right = [], [], []
    for number in range(6):
        part = torch.zeros(1)
        machine.do(writing(part, number))
        collectives = JOBS[(number + seed) % 4]
        note = reading(part, after)
        handles.append(lanes.submit(collectives, Region(None, part), f"bucket {number}", partial(machine.do, note)))
        parts.append(part)
        right.append((number + 1) * 2 ** len(collectives) - 1)
        machine.run(order, order.randrange(8))
    for handle, part in zip(handles, parts, strict=True):
        handle.wait()
        machine.do(reading(part, seen))
    machine.run(order)
    assert seen == right and sorted(after) == sorted(right)
    return runner.together


def test_a_stream_that_does_not_wait_sees_too_little(machine: Machine) -> None:
    """The orders that are tried would reveal a missing wait."""
    seen: list[int] = []
    for seed in range(30):
        part = torch.zeros(1)
        lanes = CommQueues(DoublingRunner(machine), GPU, 0, is_overlapped=True)
        lanes.submit(JOBS[0], Region(None, part), "x")
        machine.do(reading(part, seen))
        machine.run(random.Random(seed))
    assert set(seen) - {3}


def test_memory_is_kept_until_it_is_waited_for_or_seen_to_be_done(machine: Machine) -> None:
    lanes, order = CommQueues(DoublingRunner(machine), GPU, 0, is_overlapped=True), random.Random(0)
    part = torch.zeros(1)
    reference = weakref.ref(part)
    handle = lanes.submit(JOBS[0], Region(None, part), "nobody waits")
    del part
    assert reference() is not None
    machine.run(order)
    lanes.submit(JOBS[0], Region(None, torch.zeros(1)), "next")
    assert reference() is None and handle
    machine.run(order)


def test_a_phase_that_raises_is_named_at_once(machine: Machine) -> None:
    runner = DoublingRunner(machine)

    def run(collective: Collective, region: Region) -> None:
        raise OSError("gone")

    lanes = CommQueues(runner, GPU, 0, is_overlapped=True)
    runner.run = run  # type: ignore[method-assign]
    region = Region(None, torch.zeros(1))
    with pytest.raises(CommError, match="rank 0: reduce-scatter inside of bucket 5 failed: OSError: gone"):
        lanes.submit(JOBS[0], region, "bucket 5")
    with pytest.raises(CommError, match="bucket 6 did not run"):
        lanes.submit(JOBS[0], region, "bucket 6")


@pytest.mark.parametrize("is_given_back", [True, False])
def test_memory_that_a_hook_gives_back_is_used_again_only_after_lanes(machine: Machine, is_given_back: bool) -> None:
    """Hooks of parameters run in another stream than layers, but both use the memory pool of the layers."""
    seen: list[int] = []
    hooks = machine.stream(GPU)
    for seed in range(40):
        lanes, part = CommQueues(DoublingRunner(machine), GPU, 0, is_overlapped=True), torch.zeros(1)
        with machine.on(hooks):
            note = reading(part, seen)
            lanes.submit(JOBS[0], Region(None, part), "x", partial(machine.do, note)).wait()
            if is_given_back:
                with allocate_on_default_stream(GPU):
                    assert machine.current is machine.streams[0]
        machine.do(writing(part, 99))  # another bucket's gradients, by a layer
        machine.run(random.Random(seed))
    assert (set(seen) == {3}) is is_given_back


def test_without_a_gpu_there_is_no_other_stream(machine: Machine) -> None:
    hooks = machine.stream(GPU)
    with machine.on(hooks), allocate_on_default_stream(torch.device("cpu")):
        assert machine.current is hooks
    with allocate_on_default_stream(GPU):
        assert not any(stream.work for stream in machine.streams)
