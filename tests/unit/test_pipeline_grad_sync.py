"""Gradients are reduced once and complete, parameters gathered in time; with one segment all calls are upstream's."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megatron.longseq.pipeline.plan.generators import make
from megatron.longseq.pipeline.plan.schedule import Action, ActionKind, Pipeline, ScheduleError
from megatron.longseq.pipeline.runtime.grad_sync import BucketReductions, GradSync
from tests.pool import RankPool
from tests.unit.gradsync_bed import Event, Model, calls_of_a_step

# micro-batches, callback for gradients, callback for parameters, evaluation
ONE_STAGE = [(m, aligned, False, False) for m in (1, 2, 3, 5) for aligned in (False, True)]
VIRTUAL = [(m, aligned, gathers, False) for m in (3, 6) for aligned in (False, True) for gathers in (False, True)]


@pytest.mark.parametrize(
    ("size", "virtual", "cases"),
    [
        pytest.param(3, 1, ONE_STAGE, marks=pytest.mark.slow),
        (3, 2, VIRTUAL),
        (2, 3, [(4, True, True, False)]),
    ],
)
def test_with_one_segment_every_call_is_upstreams(
    ranks: RankPool, size: int, virtual: int, cases: list[tuple[int, bool, bool, bool]]
) -> None:
    theirs = ranks.run(size, calls_of_a_step, False, virtual, cases)
    ours = ranks.run(size, calls_of_a_step, True, virtual, cases)
    for rank in range(size):
        for case, mine, yours in zip(cases, ours[rank], theirs[rank], strict=True):
            assert mine == yours, (rank, case)
            assert yours[-1] == ("finalize",) and ("resume", 0) in yours


def test_evaluation_calls_nothing(ranks: RankPool) -> None:
    """After an evaluation without virtual stages, upstream leaves `no_sync` open. Here it is closed."""
    for rank, (events,) in enumerate(ranks.run(2, calls_of_a_step, True, 2, [(3, True, True, True)])):
        assert {event[0] for event in events} == {"pause", "forward", "resume"}, rank
        assert sum(event[0] == "forward" for event in events) == 6
        assert [event[0] for event in events[-2:]] == ["resume", "resume"]


def schedules() -> Iterator[Any]:
    """Return small schedules of every kind."""
    for stages in (1, 2, 3, 4):
        for segments in (1, 2, 3):
            for microbatches in (1, 2, 3, 4, 6):
                for virtual in (1, 2, 3):
                    if stages == 1 and virtual > 1:
                        continue
                    pipeline = Pipeline(stages, microbatches, segments, virtual)
                    for options in ({}, {"slack": 1}, {"zero_bubble": True}):
                        try:
                            yield make(pipeline, **options)
                        except ScheduleError:
                            continue


def walked(order: tuple[Action, ...], rank: int, virtual: int, aligned: bool, overlaps: bool) -> list[Event]:
    """Return a rank's actions with the calls between them."""
    events: list[Event] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        events.append(("pause",))
        yield
        events.append(("resume",))

    def callback(what: str) -> Any:
        return lambda parameters: events.append((what, *parameters))

    config = Namespace(
        no_sync_func=no_sync if overlaps else None,
        grad_sync_func=callback("reduce") if aligned and overlaps else None,
        param_sync_func=callback("gather"),
    )
    sync = GradSync(config, [Model(chunk, events, overlaps) for chunk in range(virtual)], order, rank)  # type: ignore[misc]
    with sync.paused(forward_only=False):
        for index, action in enumerate(order):
            sync.before(index)
            events.append((action.kind, action.vstage))
            if action.kind is ActionKind.WEIGHT and sync.is_final_weight(action):
                BucketReductions(sync.modules[action.vstage], {action.vstage}).ready(action.vstage)  # type: ignore[arg-type]
            sync.after(index)
    return events


def reductions(events: list[Event]) -> list[tuple[int, int]]:
    """Return (position, chunk) of every reduction, explicit or by the hooks of a backward outside of `no_sync`."""
    found, paused = [], False
    for position, event in enumerate(events):
        if event[0] in ("pause", "resume"):
            assert paused == (event[0] == "resume"), "entered and left in turn"
            paused = event[0] == "pause"
        elif event[0] == "reduce" or (event[0] == ActionKind.BACKWARD and not paused):
            found.append((position, event[1]))
    assert not paused
    return found


@pytest.mark.parametrize("aligned", [False, True])
def test_every_chunk_is_reduced_once_and_complete(aligned: bool) -> None:
    tried = 0
    for schedule in schedules():
        virtual = schedule.pipeline.virtual
        for rank, order in enumerate(schedule.orders):
            events = walked(order, rank, virtual, aligned, True)
            found = reductions(events)
            assert sorted(chunk for _, chunk in found) == list(range(virtual)), (schedule.name, schedule.pipeline, rank)
            for at, chunk in found:
                later = events[at + 1 :]
                assert (ActionKind.BACKWARD, chunk) not in later and (ActionKind.WEIGHT, chunk) not in later
            tried += 1
    assert tried > 500


def test_stages_reduce_at_the_same_time() -> None:
    """With a callback, a rank reduces later by as many backwards as there are ranks before it."""
    for schedule in schedules():
        if schedule.pipeline.virtual == 1 or schedule.splits_weights:
            continue
        for rank, order in enumerate(schedule.orders):
            events = [event for event in walked(order, rank, schedule.pipeline.virtual, True, True)]
            backwards = [at for at, event in enumerate(events) if event[0] == ActionKind.BACKWARD]
            for at, chunk in reductions(events):
                last = max(place for place, b in enumerate(backwards) if events[b][1] == chunk)
                before = sum(b < at for b in backwards)
                assert before == min(last + 1 + rank, len(backwards))


def test_parameters_are_gathered_once_and_before_their_first_use() -> None:
    """A chunk is gathered after the first forward of the previous chunk, earlier by the number of preceding ranks."""
    for schedule in schedules():
        virtual = schedule.pipeline.virtual
        for rank, order in enumerate(schedule.orders):
            events = walked(order, rank, virtual, False, True)
            gathered = [event[1] for event in events if event[0] == "gather"]
            assert gathered == (list(range(virtual)) if virtual > 1 else []), "one stage gathers by its own hooks"
            forwards = [at for at, event in enumerate(events) if event[0] == ActionKind.FORWARD]
            for chunk in gathered:
                at = events.index(("gather", chunk))
                assert at < events.index((ActionKind.FORWARD, chunk))
                if chunk > 1:
                    first = next(place for place, f in enumerate(forwards) if events[f][1] == chunk - 1)
                    assert sum(f < at for f in forwards) == max(first - rank, 0)


def test_without_overlap_nothing_is_called() -> None:
    """Finalization reduces, also in schedules with weight actions."""
    for schedule in schedules():
        if schedule.pipeline.virtual == 1:
            for rank, order in enumerate(schedule.orders):
                kinds = {event[0] for event in walked(order, rank, 1, False, False)}
                assert kinds == {action.kind for action in order}
