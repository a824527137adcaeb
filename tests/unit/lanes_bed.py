"""Fake collectives: ranks are threads that wait for each other, and fail if their collectives differ."""

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from megatron.longseq.sharding.plan.collectives import Collective, Scope
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.runtime.collectives import Region

LIMIT = 20.0  # seconds after which a test that waits has failed


def bucket(number: int) -> Region:
    """Return a region that names its bucket."""
    return Region(None, torch.tensor([number]))


class FakeRendezvous:
    """Where fake ranks meet: those of a scope's group go on when all of them are there, with the same collective."""

    def __init__(self, groups: RankGroups) -> None:
        self.groups = groups
        self._there: dict[Any, dict[int, Any]] = defaultdict(dict)
        self._turns: dict[Any, int] = defaultdict(int)
        self._change = threading.Condition()

    def members(self, member: int, scope: Scope) -> tuple[int, ...]:
        """Return who takes part."""
        ranks = range(self.groups.ranks)
        rings = {
            Scope.INSIDE: self.groups.inside(ranks),
            Scope.BETWEEN: self.groups.between(ranks),
            Scope.FLAT: (tuple(ranks),),
        }
        return next(ring for ring in rings[scope] if member in ring)

    def come(self, member: int, collective: Collective, what: Any) -> None:
        """Wait for the other threads. Fail if they bring another bucket or do not arrive."""
        ring = self.members(member, collective.scope)
        with self._change:
            turn = self._turns[member, collective.scope]
            self._turns[member, collective.scope] += 1
            there = self._there[collective.scope, ring, turn]
            there[member] = (collective, what)
            self._change.notify_all()
            if not self._change.wait_for(lambda: len(there) == len(ring), LIMIT):
                raise TimeoutError(f"of {ring} only {sorted(there)} came to {collective} {what}")
        assert len(set(there.values())) == 1, f"ranks bring different collectives: {there}"


class Fake:
    """A runner of one rank: notes what runs, late at random, and calls what a test planted."""

    def __init__(self, meeting: FakeRendezvous | None = None, member: int = 0, seed: int | None = None) -> None:
        self.meeting, self.member = meeting, member
        self.delays = random.Random(seed) if seed is not None else None
        self.ran: dict[str, list[tuple[int, Collective]]] = defaultdict(list)
        self.planted: Callable[[Collective, int], None] = lambda collective, number: None

    def check(self, collective: Collective, region: Region) -> None:
        """Accept every argument."""

    def run(self, collective: Collective, region: Region) -> None:
        """Record the call with its thread."""
        number = int(region.group_slice.item())
        if self.delays:
            time.sleep(self.delays.choice([0, 0, 0.001, 0.004]))
        self.planted(collective, number)
        self.ran[threading.current_thread().name].append((number, collective))
        if self.meeting:
            self.meeting.come(self.member, collective, number)


def on_ranks(ranks: int, act: Callable[[int], None]) -> None:
    """Run a function on several threads, and raise the exception of any of them."""
    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            act(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LIMIT)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
