"""The simulation equals an independent one (longest paths by relaxation), closed forms and known figures."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.pipeline.plan.generators import forward_only, make
from megatron.longseq.pipeline.plan.schedule import ActionKind, Pipeline, Schedule, ScheduleError, source
from megatron.longseq.pipeline.plan.simulate import Costs, simulate, uniform_costs
from tests.counted import calls


def longest_paths(schedule: Schedule, costs: Costs, latency: float) -> dict:
    """Return the earliest starts, by relaxing every edge of the dependency graph of (rank, action)."""
    splits = schedule.splits_weights

    def seconds(rank, action):
        stage = schedule.pipeline.stage(rank, action.vstage)
        if action.kind is ActionKind.FORWARD:
            return costs.forward[stage][action.segment]
        if action.kind is ActionKind.WEIGHT:
            return costs.weight[stage][action.segment]
        return costs.backward[stage][action.segment] + (0 if splits else costs.weight[stage][action.segment])

    edges = []  # (from, to, seconds between their starts)
    for rank, order in enumerate(schedule.orders):
        nodes = [("start", rank), *((rank, action) for action in order)]
        for index, action in enumerate(order):
            before, node = nodes[index], nodes[index + 1]
            own = seconds(*before) if index else 0.0
            edges.append((before, node, own))
            sender = source(schedule.pipeline, rank, action)
            if sender is not None and sender[0] != rank:
                edges.append((sender, node, seconds(*sender) + latency))
    starts = dict.fromkeys([node for edge in edges for node in edge[:2]], 0.0)
    moved = True
    while moved:
        moved = False
        for one, other, gap in edges:
            if starts[one] + gap > starts[other]:
                starts[other], moved = starts[one] + gap, True
    return starts


@st.composite
def runs(draw):
    stages, segments = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    virtual = draw(st.integers(1, 3))
    kwargs = {"slack": draw(st.integers(0, 2))}
    if virtual == 1:
        kwargs["zero_bubble"] = draw(st.booleans())
        microbatches = draw(st.integers(1, 4))
    else:
        microbatches = math.ceil(math.ceil(stages * (2 + kwargs["slack"]) / 2) / segments) * draw(st.integers(1, 2))
    pipeline = Pipeline(stages, microbatches, segments, virtual)
    schedule = draw(st.sampled_from([make(pipeline, **kwargs), forward_only(pipeline)]))
    row = st.tuples(*[st.integers(1, 9).map(float)] * segments)
    table = st.tuples(*[row] * pipeline.depth)
    return schedule, Costs(draw(table), draw(table), draw(table)), float(draw(st.integers(0, 3)))


@given(runs())
def test_every_start_is_the_longest_path(run):
    schedule, costs, latency = run
    wanted = longest_paths(schedule, costs, latency)
    timeline = simulate(schedule, costs, latency)
    for rank, spans in enumerate(timeline.spans):
        assert tuple(span.action for span in spans) == schedule.orders[rank]
        assert [span.start for span in spans] == [wanted[rank, span.action] for span in spans]


def test_one_microbatch_through_two_stages():
    schedule = make(Pipeline(2, 1))
    timeline = simulate(schedule, uniform_costs(schedule.pipeline, 1, 2), latency=0.5)
    assert [[(span.start, span.end) for span in rank] for rank in timeline.spans] == [
        [(0.0, 1.0), (5.0, 7.0)],
        [(1.5, 2.5), (2.5, 4.5)],
    ]
    assert timeline.name == "1F1B, simulated"
    assert timeline.bubble == pytest.approx(1 - 6 / 14)


def test_weight_costs_join_the_backward_unless_split():
    pipeline = Pipeline(2, 1)
    costs = uniform_costs(pipeline, 1, 2, 4)
    assert simulate(make(pipeline), costs).makespan == 1 + 1 + 6 + 6
    assert simulate(make(pipeline, zero_bubble=True), costs).makespan == 1 + 1 + 2 + 2 + 4


def cut_costs(lengths, attention, linear, stages) -> Costs:
    """Return costs: backward is 2.5 times the forward in attention and twice elsewhere, half of it for weights."""
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    cells = [attention * (end**2 - (end - length) ** 2) / 2 for end, length in zip(ends, lengths, strict=True)]
    tokens = [linear * length for length in lengths]
    pairs = list(zip(cells, tokens, strict=True))
    rows = ([c + t for c, t in pairs], [2.5 * c + t for c, t in pairs], tokens)
    return Costs(*(((tuple(row),) * stages) for row in rows))


SIZES = {"7B": (32, 4096, 32, 4), "30B": (64, 6144, 64, 8)}  # layers, hidden, heads, pipeline stages
EVEN_7B, EVEN_30B = [8192] * 4, [16384] * 4
CUT_7B, CUT_30B = [11024, 8416, 7088, 6240], [23424, 16624, 13640, 11848]


def paper_costs(name: str, lengths: list[int]) -> Costs:
    layers, hidden, heads, stages = SIZES[name]
    return cut_costs(lengths, layers * (4 * hidden + 3 * heads), layers * 24 * hidden**2, stages)


@pytest.mark.parametrize(
    "name, lengths, microbatches, bubbles",
    [
        ("7B", EVEN_7B, 8, (0.292, 0.111, 0.111)),
        ("7B", CUT_7B, 8, (0.111, 0.088, 0.088)),
        ("7B", EVEN_7B, 32, (0.259, 0.030, 0.030)),
        ("7B", CUT_7B, 32, (0.053, 0.024, 0.024)),
        ("30B", EVEN_30B, 8, (0.389, 0.232, 0.232)),
        ("30B", CUT_30B, 8, (0.198, 0.183, 0.183)),
        ("30B", EVEN_30B, 32, (0.309, 0.070, 0.070)),
        ("30B", CUT_30B, 32, (0.075, 0.053, 0.053)),
        ("7B", [11480, 8352, 6912, 6024], 32, (0.037,)),
        ("30B", [24200, 16464, 13344, 11528], 32, (0.068,)),
    ],
)
def test_uneven_segments_and_slack(name, lengths, microbatches, bubbles):
    costs = paper_costs(name, lengths)
    pipeline = Pipeline(SIZES[name][3], microbatches, 4)
    found = [simulate(make(pipeline, slack=slack), costs).bubble for slack in range(len(bubbles))]
    assert found == pytest.approx(bubbles, abs=0.0006)


def test_half_the_bubble_at_30b():
    """At 64k tokens and P=8, split weight gradients with slack 1 halve Seq1F1B's bubble; so do two virtual stages."""
    for microbatches in (16, 32):
        pipeline = Pipeline(8, microbatches, 4)
        costs = paper_costs("30B", CUT_30B)
        own = simulate(make(pipeline), costs).bubble
        assert simulate(make(pipeline, zero_bubble=True, slack=1, costs=costs), costs).bubble < 0.5 * own
        interleaved = Pipeline(8, microbatches, 4, 2)
        halves = Costs(
            *(tuple(tuple(c / 2 for c in row) for row in (*t, *t)) for t in map(costs.table, ActionKind, [True] * 3))
        )
        assert simulate(make(interleaved), halves).bubble < 0.55 * own


def test_slack_hides_latency():
    pipeline = Pipeline(4, 32, 4)
    costs = uniform_costs(pipeline)
    plain, slack = (simulate(make(pipeline, slack=slack), costs, latency=0.5).bubble for slack in (0, 1))
    assert plain > 0.2 and slack < 0.06


def test_a_message_that_is_never_sent():
    whole = make(Pipeline(2, 2))
    schedule = Schedule("cut", whole.pipeline, (whole.orders[0][:1], whole.orders[1]))
    with pytest.raises(
        ScheduleError, match=r"rank 1 waits in action 2 \(forward of micro-batch 1.*rank 0, which has ended"
    ):
        simulate(schedule, uniform_costs(whole.pipeline))


@pytest.mark.parametrize("costs", [uniform_costs(Pipeline(2, 2, 3)), uniform_costs(Pipeline(4, 2, 2))])
def test_costs_of_another_shape(costs):
    with pytest.raises(ValueError, match="the pipeline has 2 x 2"):
        simulate(make(Pipeline(2, 2, 2)), costs)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_costs_that_are_no_seconds(seconds):
    with pytest.raises(ValueError, match="backward cost of stage 0, segment 0"):
        uniform_costs(Pipeline(2, 2, 2), backward=seconds)


def test_costs_of_different_shapes():
    with pytest.raises(ValueError, match="same shape"):
        Costs(((1.0,),), ((1.0, 1.0),), ((1.0,),))
    with pytest.raises(ValueError, match="same shape"):
        Costs(((1.0,), (1.0, 2.0)), ((1.0,), (1.0, 2.0)), ((1.0,), (1.0, 2.0)))


def test_negative_latency():
    with pytest.raises(ValueError, match="latency is -1"):
        simulate(make(Pipeline(2, 2)), uniform_costs(Pipeline(2, 2)), latency=-1)


def test_work_grows_with_the_actions_alone():
    """Calls are counted, because seconds depend on the machine. Twice the micro-batches need twice the calls."""
    counted = []
    for microbatches in (16, 32, 64):
        pipeline = Pipeline(8, microbatches, 4, 2)
        schedule, costs = make(pipeline), uniform_costs(pipeline)
        counted.append(calls(lambda schedule=schedule, costs=costs: simulate(schedule, costs)))
    first, second = counted[1] - counted[0], counted[2] - counted[1]
    assert second < 3 * first, "on a line twice as many; anything quadratic would make it four times"
