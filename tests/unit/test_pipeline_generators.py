"""Generated schedules equal upstream's orders and the closed forms of bubble and memory; invalid sizes are refused."""

import math
from types import SimpleNamespace

import pytest

from megatron.longseq.pipeline.plan import generators as orders
from megatron.longseq.pipeline.plan.generators import forward_only, interleaved, make, one_f_one_b, zb_h1
from megatron.longseq.pipeline.plan.schedule import Action, ActionKind, Pipeline, Schedule, ScheduleError
from megatron.longseq.pipeline.plan.simulate import simulate, uniform_costs
from megatron.longseq.pipeline.plan.validate import prove

STAGES = (2, 3, 4, 8, 16)
MICROBATCHES = (1, 2, 3, 5, 8, 32)
SEGMENTS = (1, 2, 3, 4, 8)
GRID = [(p, m, k) for p in STAGES for m in MICROBATCHES for k in SEGMENTS if p * m * k <= 2048]
# Every size of stages, and of the others the ends and an odd one in between; -m slow goes through all of GRID.
QUICK = [(p, m, k) for p, m, k in GRID if m in (1, 3, 8, 32) and k in (1, 3, 8)]
GRIDS = pytest.mark.parametrize(
    "grid", [pytest.param(QUICK, id="quick"), pytest.param(GRID, id="whole", marks=pytest.mark.slow)]
)


def bubble_seconds(schedule, costs):
    """Return the seconds in which a rank computes nothing."""
    timeline = simulate(schedule, costs)
    return timeline.makespan * timeline.bubble


def upstream_order(pipeline: Pipeline, rank: int, group: int) -> list[tuple[str, int, int]]:
    """Return the actions of a rank in upstream's schedules: (kind, micro-batch, model chunk)."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    virtual = pipeline.virtual
    communicator = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: pipeline.stages, rank=lambda: rank),
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
    )
    total, _, warm_up, remaining = get_pp_rank_microbatches(
        pipeline.microbatches, virtual, group, p2p_communicator=communicator
    )
    table = get_schedule_table(pipeline.microbatches, virtual, group)
    forwards = [("F", microbatch, chunk) for microbatch, chunk in table]
    backwards = [("B", microbatch, virtual - 1 - chunk) for microbatch, chunk in table]
    order = forwards[:warm_up]
    for index in range(remaining):
        order += [forwards[warm_up + index], backwards[index]]
    assert total == len(table)
    return order + backwards[remaining:]


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("microbatches", [1, 2, 3, 8, 17])
def test_one_segment_is_upstreams_1f1b(stages, microbatches):
    pipeline = Pipeline(stages, microbatches)
    for rank, order in enumerate(make(pipeline).orders):
        assert [(a.kind, a.microbatch, a.vstage) for a in order] == upstream_order(pipeline, rank, stages)


@pytest.mark.parametrize("stages, virtual", [(2, 2), (2, 4), (3, 2), (4, 2), (4, 3), (8, 2), (16, 4)])
@pytest.mark.parametrize("wider", [0, 1, 3])
def test_one_segment_is_upstreams_interleaving(stages, virtual, wider):
    group = stages + wider
    for microbatches in (group, 2 * group, 2 * group + stages):
        pipeline = Pipeline(stages, microbatches, 1, virtual)
        for rank, order in enumerate(make(pipeline, group=group if wider else None).orders):
            assert [(a.kind, a.microbatch, a.vstage) for a in order] == upstream_order(pipeline, rank, group)


def test_seq1f1b_in_full():
    schedule = one_f_one_b(Pipeline(2, 2, 2))
    assert schedule.name == "Seq1F1B"
    assert [" ".join(f"{a.kind}{a.microbatch}{a.segment}" for a in order) for order in schedule.orders] == [
        "F00 F01 F10 B01 F11 B00 B11 B10",
        "F00 F01 B01 F10 B00 F11 B11 B10",
    ]


@GRIDS
@pytest.mark.parametrize("slack", [0, 1])
def test_seq1f1b_bubble_and_memory(slack, grid):
    for stages, microbatches, segments in grid:
        pipeline = Pipeline(stages, microbatches, segments)
        proof = prove(one_f_one_b(pipeline, slack))
        bubble = simulate(proof.schedule, uniform_costs(pipeline)).bubble
        assert bubble == pytest.approx((stages - 1) / (pipeline.units + stages - 1))
        assert proof.peak_units == tuple(
            min((1 + slack) * (stages - rank - 1) + segments, pipeline.units) for rank in range(stages)
        )


@pytest.mark.parametrize("virtual", [2, 3, 4])
@pytest.mark.parametrize("slack", [0, 1, 2])
def test_interleaved_bubble_and_memory(virtual, slack):
    for stages, segments in [(2, 1), (2, 3), (3, 2), (4, 1), (4, 3), (4, 4), (8, 3), (8, 8)]:
        least = math.ceil(math.ceil(stages * (2 + slack) / 2) / segments)
        for group in (least, least + 1):
            for microbatches in {group, 2 * group, group + least}:
                pipeline = Pipeline(stages, microbatches, segments, virtual)
                proof = prove(interleaved(pipeline, slack, None if group == least else group))
                bubble = simulate(proof.schedule, uniform_costs(pipeline)).bubble
                assert bubble == pytest.approx((stages - 1) / (virtual * pipeline.units + stages - 1))
                assert proof.peak_units == tuple(
                    min(
                        (2 + slack) * (stages - rank - 1) + (virtual - 1) * group * segments + segments,
                        virtual * pipeline.units,
                    )
                    for rank in range(stages)
                )


def test_interleaved_at_full_size():
    pipeline = Pipeline(16, 32, 8, 4)
    proof = prove(make(pipeline))
    assert proof.peak_units[0] == 2 * 15 + 3 * 16 + 8
    assert simulate(proof.schedule, uniform_costs(pipeline)).bubble == pytest.approx(15 / (4 * 256 + 15))


@pytest.mark.parametrize("forward, backward, weight", [(1, 1, 1), (1, 1.5, 0.5), (1, 1.7, 0.53), (2, 1, 2), (1, 2, 0)])
@pytest.mark.parametrize("slack", [0, 1])
@GRIDS
def test_zero_bubble_reaches_its_closed_form(forward, backward, weight, slack, grid):
    for stages, microbatches, segments in grid:
        pipeline = Pipeline(stages, microbatches, segments)
        if pipeline.units < 3 * stages + segments or pipeline.units > 64:
            continue
        costs = uniform_costs(pipeline, forward, backward, weight)
        proof = prove(zb_h1(pipeline, slack, costs))
        longest = max(forward, backward - slack * forward, forward + backward - (1 + slack) * weight)
        assert bubble_seconds(proof.schedule, costs) == pytest.approx((stages - 1) * longest)
        assert max(proof.peak_units) <= max(prove(one_f_one_b(pipeline, slack)).peak_units)


@GRIDS
def test_zero_bubble_is_legal_where_the_pipe_never_fills(grid):
    for stages, microbatches, segments in grid:
        pipeline = Pipeline(stages, microbatches, segments)
        if pipeline.units > 64:
            continue
        for slack in (0, 1):
            proof = prove(make(pipeline, slack=slack, zero_bubble=True))
            assert max(proof.peak_units) <= segments + (1 + slack) * (stages - 1)


def test_zero_bubble_keeps_forwards_and_backwards_in_the_order_of_1f1b():
    pipeline = Pipeline(4, 8, 3)
    for split, fused in zip(zb_h1(pipeline).orders, one_f_one_b(pipeline).orders, strict=True):
        assert tuple(action for action in split if action.kind is not ActionKind.WEIGHT) == fused


def test_zero_bubble_as_in_its_paper():
    """With P=4, M=8, F=B=W=1, ZB-H1 has a bubble of 3 where 1F1B has 9, with the memory of 1F1B."""
    pipeline = Pipeline(4, 8)
    costs = uniform_costs(pipeline, 1, 1, 1)
    assert bubble_seconds(zb_h1(pipeline), costs) == pytest.approx(3)
    assert bubble_seconds(one_f_one_b(pipeline), costs) == pytest.approx(9)
    assert max(prove(zb_h1(pipeline)).peak_units) == 4


@GRIDS
@pytest.mark.parametrize("virtual", [1, 2, 4])
def test_forward_only_takes_any_number_of_microbatches(virtual, grid):
    for stages, microbatches, segments in grid:
        if microbatches * segments <= 24:
            proof = prove(forward_only(Pipeline(stages, microbatches, segments, virtual)))
            assert proof.schedule.is_forward_only and set(proof.peak_units) == {0}


@pytest.mark.parametrize(
    "kwargs, name",
    [
        ({}, "Seq1F1B"),
        ({"slack": 2}, "Seq1F1B, slack 2"),
        ({"zero_bubble": True}, "Seq-ZB-H1"),
        ({"zero_bubble": True, "slack": 1}, "Seq-ZB-H1, slack 1"),
    ],
)
def test_make_names_what_it_makes(kwargs, name):
    assert make(Pipeline(4, 8, 4), **kwargs).name == name
    assert make(Pipeline(4, 8, 1), **kwargs).name == name.replace("Seq-", "").replace("Seq", "")


def test_make_interleaves_where_there_are_virtual_stages():
    assert make(Pipeline(4, 8, 4, 2)) == interleaved(Pipeline(4, 8, 4, 2))
    assert (
        make(Pipeline(4, 8, 4, 2), group=2) == interleaved(Pipeline(4, 8, 4, 2), group=2) != make(Pipeline(4, 8, 4, 2))
    )
    assert make(Pipeline(4, 8, 4, 2)).name == "Seq1F1B-I"


def test_make_fits_zero_bubble_to_the_costs():
    pipeline = Pipeline(4, 8, 4)
    costs = uniform_costs(pipeline, 1, 3, 0.4)
    assert make(pipeline, zero_bubble=True, costs=costs) == zb_h1(pipeline, costs=costs) != zb_h1(pipeline)


@pytest.mark.parametrize(
    "make_it, words",
    [
        (lambda: interleaved(Pipeline(4, 8, 3, 2), group=1), "at least 2 micro-batches per group"),
        (lambda: interleaved(Pipeline(4, 1, 3, 2)), "at least 2 micro-batches per step"),
        (lambda: interleaved(Pipeline(4, 5, 3, 2)), "use 4 or 6 micro-batches per step"),
        (lambda: interleaved(Pipeline(4, 8, 1, 2), group=5), "use 5 or 9 micro-batches per step"),
        (lambda: interleaved(Pipeline(4, 8, 4, 2), group=0), "at least 1 micro-batches per group"),
        (lambda: interleaved(Pipeline(8, 8, 4, 2), slack=1, group=2), "at least 3 micro-batches per group"),
        (lambda: interleaved(Pipeline(4, 8, 4, 1)), "use one_f_one_b"),
        (lambda: one_f_one_b(Pipeline(4, 8, 4, 2)), "use interleaved"),
        (lambda: one_f_one_b(Pipeline(4, 8, 4), -1), "slack must be at least 0 segments, not -1"),
        (lambda: make(Pipeline(4, 8, 4), slack=-1, zero_bubble=True), "not -1"),
        (lambda: make(Pipeline(4, 8, 4, 2), zero_bubble=True), "one virtual stage per rank, not 2"),
    ],
)
def test_refusals_say_what_to_do(make_it, words):
    with pytest.raises(ScheduleError, match=words):
        make_it()


@pytest.mark.parametrize("stages, segments, group, slack", [(4, 3, 2, 0), (8, 3, 4, 0), (8, 4, 4, 1), (3, 1, 5, 1)])
def test_the_number_of_microbatches_that_a_refusal_names_works(stages, segments, group, slack):
    refused = 0
    for microbatches in range(group, 4 * group):
        try:
            prove(interleaved(Pipeline(stages, microbatches, segments, 2), slack, group))
        except ScheduleError as error:
            refused += 1
            for number in str(error).rsplit("use ", 1)[1].removesuffix(" micro-batches per step").split(" or "):
                prove(interleaved(Pipeline(stages, int(number), segments, 2), slack, group))
    assert refused


@pytest.mark.parametrize("pipeline, slack, group", [(Pipeline(4, 5, 1, 3), 0, 4), (Pipeline(8, 8, 4, 4), 1, 2)])
def test_the_group_rules_are_needed(monkeypatch, pipeline, slack, group):
    monkeypatch.setattr(orders, "_check_group", lambda *_: None)
    with pytest.raises(ScheduleError, match="deadlocks: rank 0 waits in action"):
        prove(interleaved(pipeline, slack, group))


def test_a_group_that_splits_a_sequence_is_refused_by_the_proof():
    """With P=4, K=3 and the authors' groups of 4 segments, backwards precede the last segment's forward."""
    stages, units, segments, virtual, group = 4, 12, 3, 2, 4
    table = [(v, u) for first in range(0, units, group) for v in range(virtual) for u in range(first, first + group)]
    forwards = [Action(ActionKind.FORWARD, u // segments, u % segments, v) for v, u in table]
    wanted = []
    for rank in range(stages):
        ahead = 2 * (stages - rank - 1) + (virtual - 1) * group + segments - 1
        popped: dict[int, int] = dict.fromkeys(range(virtual), 0)
        backwards = []
        for v, _ in table:
            vstage, number = virtual - 1 - v, popped[virtual - 1 - v]
            popped[vstage] += 1
            microbatch, segment = divmod(number, segments)
            backwards.append(Action(ActionKind.BACKWARD, microbatch, segments - 1 - segment, vstage))
        order = forwards[:ahead]
        for index in range(len(forwards) - ahead):
            order += [forwards[ahead + index], backwards[index]]
        wanted.append(tuple(order + backwards[len(forwards) - ahead :]))
    with pytest.raises(
        ScheduleError, match=r"rank \d, action \d+: the backward of micro-batch 1, segment 2.* before the"
    ):
        prove(Schedule("groups of 4", Pipeline(stages, units // segments, segments, virtual), tuple(wanted)))
