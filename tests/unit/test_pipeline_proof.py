"""The proof refuses every broken schedule, naming rank and action, and counts what lives as plain counting does."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.longseq.pipeline.action import Action, Kind, Pipeline, Schedule, ScheduleError
from megatron.longseq.pipeline.orders import forward_only, make
from megatron.longseq.pipeline.proof import prove

F, B, W = Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT


def changed(schedule: Schedule, rank: int, order) -> Schedule:
    orders = list(schedule.orders)
    orders[rank] = tuple(order)
    return replace(schedule, orders=tuple(orders))


def moved(schedule: Schedule, rank: int, action: Action, before: Action) -> Schedule:
    order = [other for other in schedule.orders[rank] if other != action]
    order.insert(order.index(before), action)
    return changed(schedule, rank, order)


def seq(**kwargs) -> Schedule:
    return make(Pipeline(4, 4, 3), **kwargs)


def test_a_dropped_action():
    order = seq().orders[2]
    with pytest.raises(ScheduleError, match="rank 2 never runs the backward of micro-batch 1, segment 0"):
        prove(changed(seq(), 2, [action for action in order if action != Action(B, 1, 0)]))


def test_a_dropped_weight_gradient():
    schedule = seq(zero_bubble=True)
    order = [action for action in schedule.orders[1] if action != Action(W, 3, 2)]
    with pytest.raises(ScheduleError, match="rank 1 never runs the weight gradient of micro-batch 3, segment 2"):
        prove(changed(schedule, 1, order))


def test_a_repeated_action():
    order = seq().orders[1]
    with pytest.raises(ScheduleError, match="rank 1, action 24: the backward of micro-batch 3, segment 0 ran before"):
        prove(changed(seq(), 1, [*order, order[-1]]))


@pytest.mark.parametrize("action", [Action(F, 4, 0), Action(F, 0, 3), Action(F, 0, 0, 1), Action(W, 0, 0)])
def test_an_action_of_no_unit(action):
    schedule = changed(seq(), 0, [action, *seq().orders[0]])
    with pytest.raises(ScheduleError, match=r"rank \d"):
        prove(schedule)


def test_an_order_too_few():
    with pytest.raises(ScheduleError, match="3 orders for 4 ranks"):
        prove(replace(seq(), orders=seq().orders[:3]))


def test_a_forward_before_that_of_the_segment_before():
    with pytest.raises(ScheduleError, match=r"rank 0, action 0: the forward of micro-batch 0, segment 1 .* the keys"):
        prove(moved(seq(), 0, Action(F, 0, 1), Action(F, 0, 0)))


def test_a_backward_before_all_segments_are_forwarded():
    with pytest.raises(
        ScheduleError, match=r"rank 3, action 2: the backward of micro-batch 0, segment 2 .* activations"
    ):
        prove(moved(seq(), 3, Action(B, 0, 2), Action(F, 0, 2)))


def test_a_backward_before_that_of_the_segment_after():
    with pytest.raises(
        ScheduleError, match=r"rank 3, action \d: the backward of micro-batch 0, segment 1 .*gradients of"
    ):
        prove(moved(seq(), 3, Action(B, 0, 1), Action(B, 0, 2)))


def test_a_stage_before_the_one_that_feeds_it_on_the_same_rank():
    """One rank with two virtual stages sends nothing, so only its own order can be wrong."""
    schedule = make(Pipeline(1, 2, 2, 2))
    prove(schedule)
    with pytest.raises(
        ScheduleError, match=r"rank 0, action 0: the forward of .*, virtual stage 1 runs before .* input"
    ):
        prove(moved(schedule, 0, Action(F, 0, 0, 1), Action(F, 0, 0, 0)))


def test_a_weight_gradient_before_its_backward():
    schedule = seq(zero_bubble=True)
    with pytest.raises(ScheduleError, match=r"rank 2, action \d+: the weight gradient of micro-batch 1, segment 1 "):
        prove(moved(schedule, 2, Action(W, 1, 1), Action(B, 1, 1)))


def test_sends_out_of_order():
    """Both micro-batches are legal on rank 1 itself, but rank 0 sends the other one first."""
    pipeline = Pipeline(2, 2)
    orders = (
        (Action(F, 0), Action(F, 1), Action(B, 0), Action(B, 1)),
        (Action(F, 1), Action(F, 0), Action(B, 0), Action(B, 1)),
    )
    message = (
        "rank 0, action 0 sends the input of the forward of micro-batch 0, segment 0, but rank 1 receives in another "
        "order: its action 0 awaits the input of the forward of micro-batch 1, segment 0"
    )
    with pytest.raises(ScheduleError, match=message):
        prove(Schedule("crossed", pipeline, orders))


def test_gradients_out_of_order():
    pipeline = Pipeline(2, 2)
    forwards = (Action(F, 0), Action(F, 1))
    orders = ((*forwards, Action(B, 0), Action(B, 1)), (*forwards, Action(B, 1), Action(B, 0)))
    with pytest.raises(ScheduleError, match="rank 1, action 2 sends the input of the backward of micro-batch 1"):
        prove(Schedule("crossed", pipeline, orders))


def test_the_two_directions_of_two_ranks_are_apart():
    """With P=2, V=2 forwards from rank 0 and gradients that wrap around to rank 1 use two communicators."""
    prove(make(Pipeline(2, 4, 1, 2)))
    prove(make(Pipeline(2, 3, 2, 3)))


def test_a_cyclic_wait():
    """Rank 0 wants the gradient of micro-batch 0 before it sends micro-batch 1, rank 1 wants both forwards first."""
    pipeline = Pipeline(2, 2)
    orders = (
        (Action(F, 0), Action(B, 0), Action(F, 1), Action(B, 1)),
        (Action(F, 0), Action(F, 1), Action(B, 0), Action(B, 1)),
    )
    message = (
        r"never ends: rank 0 waits in action 1 \(backward of micro-batch 0, segment 0\) for its input from rank 1; "
        r"rank 1 waits in action 1 \(forward of micro-batch 1, segment 0\) for its input from rank 0, which waits"
    )
    with pytest.raises(ScheduleError, match=message):
        prove(Schedule("circle", pipeline, orders))


def test_what_runs_with_blocking_sends():
    pipeline = Pipeline(4, 8, 4)
    assert prove(make(pipeline)).runs_blocking
    assert prove(make(pipeline, slack=1)).runs_blocking
    assert prove(forward_only(pipeline)).runs_blocking
    assert not prove(make(Pipeline(4, 8, 4, 2))).runs_blocking
    assert not prove(make(pipeline, zero_bubble=True, slack=1)).runs_blocking


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_two_swapped_actions_are_refused_or_legal_by_plain_rules(data):
    """Swap any two actions of a rank: refused exactly if some plain rule is broken."""
    kwargs = data.draw(st.sampled_from([{}, {"slack": 1}, {"zero_bubble": True}]))
    pipeline = Pipeline(3, 3, 2)
    schedule = make(pipeline, **kwargs)
    rank = data.draw(st.integers(0, 2))
    order = list(schedule.orders[rank])
    first, second = (data.draw(st.integers(0, len(order) - 1)) for _ in range(2))
    order[first], order[second] = order[second], order[first]
    mutant = changed(schedule, rank, order)
    try:
        prove(mutant)
        refused = False
    except ScheduleError as error:
        refused = True
        assert "rank" in str(error) and "action" in str(error)
    assert refused == breaks_a_rule(mutant)


def breaks_a_rule(schedule: Schedule) -> bool:
    """Whether a one-virtual-stage schedule is illegal: local order, order per direction, or a run that gets stuck."""
    last, stages = schedule.pipeline.segments - 1, schedule.pipeline.stages
    lanes = []
    for order in schedule.orders:
        at = {action: number for number, action in enumerate(order)}
        for action, number in at.items():
            kind, m, s = action.kind, action.microbatch, action.segment
            before = {
                F: [Action(F, m, s - 1)] if s else [],
                B: [Action(F, m, s)] + ([Action(B, m, s + 1)] if s < last else []),
                W: [Action(B, m, s)],
            }[kind]
            if any(at[needed] > number for needed in before):
                return True
        lanes.append([[action for action in order if action.kind is kind] for kind in (F, B)])
    if any(lane != lanes[0] for lane in lanes):
        return True
    done: set[tuple[int, Action]] = set()
    progress = True
    heads = [0] * stages
    while progress:
        progress = False
        for rank, order in enumerate(schedule.orders):
            if heads[rank] == len(order):
                continue
            action = order[heads[rank]]
            peer = rank - 1 if action.kind is F else rank + 1 if action.kind is B else -1
            if not 0 <= peer < stages or (peer, action) in done:
                done.add((rank, action))
                heads[rank] += 1
                progress = True
    return any(head < len(order) for head, order in zip(heads, schedule.orders, strict=True))


def test_peak_live_by_length():
    """P=4, K=2, lengths 3 and 1: rank 0 peaks at both segments of two sequences and the first of a third."""
    proof = prove(make(Pipeline(4, 8, 2)))
    assert proof.peak_units == (5, 4, 3, 2)
    assert proof.peak_live() == (2.5, 2.0, 1.5, 1.0)
    assert proof.peak_live([3, 1]) == (2.75, 2.5, 1.75, 1.5)


def test_peak_live_of_the_memo():
    """7B, 32k, P=4, K=4, the authors' balanced lengths: 1.93 sequences, 2.67 with slack 1, 3.40 with slack 2."""
    lengths = [11024, 8416, 7088, 6240]
    peaks = [max(prove(make(Pipeline(4, 8, 4), slack=slack)).peak_live(lengths)) for slack in (0, 1, 2)]
    assert peaks == pytest.approx([1.93, 2.67, 3.40], abs=0.005)


def test_peak_live_with_virtual_stages():
    """P=4, V=2, K=4: 14 units of an eighth of a sequence each."""
    proof = prove(make(Pipeline(4, 8, 4, 2)))
    assert proof.peak_units[0] == 14 and proof.peak_live()[0] == pytest.approx(1.75)


def test_peak_live_with_weight_gradients():
    order = (Action(F, 0), Action(F, 1), Action(B, 0), Action(B, 1), Action(W, 0), Action(W, 1))
    late = prove(Schedule("late", Pipeline(1, 2), (order,)))
    assert late.peak_units == (2,) and late.peak_live(weight_share=0.25) == (2.0,)
    order = (Action(F, 0), Action(B, 0), Action(F, 1), Action(B, 1), Action(W, 0), Action(W, 1))
    turns = prove(Schedule("in turn", Pipeline(1, 2), (order,)))
    assert turns.peak_units == (2,)
    assert turns.peak_live() == (2.0,)
    assert turns.peak_live(weight_share=0.25) == (1.25,)
    assert turns.peak_live(weight_share=0.0) == (1.0,)


def test_evaluation_keeps_nothing():
    proof = prove(forward_only(Pipeline(4, 8, 4)))
    assert proof.peak_live() == (0.0,) * 4


@pytest.mark.parametrize("lengths, share", [([1, 2, 3], 1.0), ([1, -1], 1.0), ([0, 0], 1.0), ([1, 1], 1.5)])
def test_peak_live_refuses(lengths, share):
    with pytest.raises(ValueError, match="not"):
        prove(make(Pipeline(2, 2, 2))).peak_live(lengths, share)
