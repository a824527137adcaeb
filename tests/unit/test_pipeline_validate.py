"""The validation refuses every wrong schedule with its rank and action, and its memory equals a plain count."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.pipeline.plan.generators import forward_only, make
from megatron.longseq.pipeline.plan.schedule import (
    Action,
    ActionKind,
    Pipeline,
    Schedule,
    ScheduleError,
    source,
    target,
)
from megatron.longseq.pipeline.plan.validate import prove

F, B, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.WEIGHT


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
    with pytest.raises(ScheduleError, match="rank 1, action 24: the backward of micro-batch 3, segment 0 is also"):
        prove(changed(seq(), 1, [*order, order[-1]]))


@pytest.mark.parametrize("action", [Action(F, 4, 0), Action(F, 0, 3), Action(F, 0, 0, 1), Action(W, 0, 0)])
def test_an_action_of_no_unit(action):
    schedule = changed(seq(), 0, [action, *seq().orders[0]])
    with pytest.raises(ScheduleError, match=r"rank \d"):
        prove(schedule)


def test_an_order_too_few():
    with pytest.raises(ScheduleError, match="3 orders, not 4, one per rank"):
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
    """A single rank with two virtual stages sends nothing, so only its own order can be wrong."""
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
    """Both micro-batches are legal on rank 1, but rank 0 sends the other one first."""
    pipeline = Pipeline(2, 2)
    forwards = (Action(F, 0), Action(F, 1))
    orders = ((*forwards, Action(B, 0), Action(B, 1)), (*forwards, Action(B, 1), Action(B, 0)))
    message = (
        "rank 1, action 2 sends the input of the backward of micro-batch 1, segment 0, but rank 0 receives in a "
        "different order: its action 2 expects the input of the backward of micro-batch 0, segment 0"
    )
    with pytest.raises(ScheduleError, match=message):
        prove(Schedule("crossed", pipeline, orders))


def swap_on_all_ranks(schedule: Schedule, one: Action, other: Action) -> Schedule:
    """Exchange two actions on every rank, so that the order of messages stays consistent."""
    names = {one: other, other: one}
    orders = tuple(tuple(names.get(action, action) for action in order) for order in schedule.orders)
    return replace(schedule, orders=orders)


@pytest.mark.parametrize("kwargs", [{}, {"slack": 1}, {"zero_bubble": True}])
@pytest.mark.parametrize("stages", [1, 3])
def test_samples_of_two_micro_batches_do_not_mix(kwargs, stages):
    """In F00 F10 F01 F11 each unit has its keys, but a data iterator yields one micro-batch after the other."""
    schedule = make(Pipeline(stages, 4, 2), **kwargs)
    orders = []
    for order in schedule.orders:
        forwards = [action for action in order if action.kind is F]
        mixed = [forwards[0], forwards[2], forwards[1], forwards[3], *forwards[4:]]
        orders.append((*mixed, *(action for action in order if action.kind is not F)))
    message = "rank 0, action 1: the forward of micro-batch 1, segment 0 runs before the forward of .* segment 1, but"
    with pytest.raises(ScheduleError, match=message):
        prove(replace(schedule, orders=tuple(orders)))


def test_micro_batches_run_in_the_order_of_the_data():
    pipeline = Pipeline(2, 2)
    order = (Action(F, 1), Action(F, 0), Action(B, 1), Action(B, 0))
    with pytest.raises(
        ScheduleError, match="rank 0, action 0: the forward of micro-batch 1, segment 0 runs before the"
    ):
        prove(Schedule("backwards", pipeline, (order, order)))


def test_virtual_stages_draw_each_for_itself():
    schedule = forward_only(Pipeline(2, 4, 2, 2))
    one, other = Action(F, 0, 1, 1), Action(F, 1, 0, 1)
    prove(schedule)
    with pytest.raises(
        ScheduleError, match="virtual stage 1 runs before the forward of micro-batch 0, segment 1, virt"
    ):
        prove(swap_on_all_ranks(schedule, one, other))


def test_backwards_of_two_micro_batches_may_mix():
    """Backward uses state that is stored per micro-batch."""
    forwards = [Action(F, m, s) for m in (0, 1) for s in (0, 1)]
    order = (*forwards, Action(B, 0, 1), Action(B, 1, 1), Action(B, 1, 0), Action(B, 0, 0))
    schedule = Schedule("mixed", Pipeline(2, 2, 2), (order, order))
    prove(schedule)
    assert executed(schedule)


def test_gradients_out_of_order():
    pipeline = Pipeline(2, 2)
    forwards = (Action(F, 0), Action(F, 1))
    orders = ((*forwards, Action(B, 0), Action(B, 1)), (*forwards, Action(B, 1), Action(B, 0)))
    with pytest.raises(ScheduleError, match="rank 1, action 2 sends the input of the backward of micro-batch 1"):
        prove(Schedule("crossed", pipeline, orders))


def test_the_two_directions_of_two_ranks_are_apart():
    """With P=2, V=2, forwards from rank 0 and gradients that wrap around to rank 1 use two communicators."""
    prove(make(Pipeline(2, 4, 1, 2)))
    prove(make(Pipeline(2, 3, 2, 3)))


def test_a_cyclic_wait():
    """Rank 0 needs the gradient of micro-batch 0 before it sends micro-batch 1; rank 1 needs both forwards first."""
    pipeline = Pipeline(2, 2)
    orders = (
        (Action(F, 0), Action(B, 0), Action(F, 1), Action(B, 1)),
        (Action(F, 0), Action(F, 1), Action(B, 0), Action(B, 1)),
    )
    message = (
        r"deadlocks: rank 0 waits in action 1 \(backward of micro-batch 0, segment 0\) for its input from rank 1; "
        r"rank 1 waits in action 1 \(forward of micro-batch 1, segment 0\) for its input from rank 0, which is waiting"
    )
    with pytest.raises(ScheduleError, match=message):
        prove(Schedule("deadlock", pipeline, orders))


@given(st.data())
def test_two_swapped_actions_are_refused_or_legal_by_plain_rules(data):
    """Any two actions of a rank are swapped. The schedule is refused exactly if a plain rule is broken."""
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
    assert refused == violates_a_rule(mutant)


class Rank:
    """What one rank of the executor keeps: samples, keys, activations and gradients, by virtual stage."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.pipeline, self.rank, self.at = schedule.pipeline, rank, 0
        virtual = range(self.pipeline.virtual)
        self.data = [iter(range(self.pipeline.microbatches)) for _ in virtual]
        self.drawn: list[int | None] = [None for _ in virtual]
        self.written: dict[tuple[int, int], int] = {}  # (virtual stage, micro-batch) -> segments whose keys are there
        self.left: dict[tuple[int, int], int] = {}  # -> segments whose backward is to come
        self.products: set[Action] = set()
        self.losses: list[int] = []

    def run(self, action: Action, is_evaluation: bool, splits_weights: bool) -> None:
        """Do what the executor does. An AssertionError means that its run would fail."""
        slot = action.vstage, action.microbatch
        if action.kind is F:
            if action.segment == 0:
                self.drawn[action.vstage] = next(self.data[action.vstage])
            assert self.drawn[action.vstage] == action.microbatch, "other samples"
            assert self.written.get(slot, 0) == action.segment, "keys are missing"
            self.written[slot] = action.segment + 1
            self.left[slot] = self.pipeline.segments
            if action.segment == self.pipeline.segments - 1:
                self.losses += [action.microbatch] if action.vstage == self.pipeline.virtual - 1 else []
                if is_evaluation:
                    del self.written[slot], self.left[slot]
        elif action.kind is B:
            assert self.written[slot] == self.pipeline.segments and action.segment == self.left[slot] - 1
            self.left[slot] -= 1
            if not self.left[slot]:
                del self.written[slot], self.left[slot]
            if splits_weights:
                self.products.add(replace(action, kind=W))
        else:
            self.products.remove(action)


def executed(schedule: Schedule) -> bool:
    """Run all ranks with first-in-first-out messages per direction and pair of ranks, and return whether they end."""
    pipeline = schedule.pipeline
    ranks = [Rank(schedule, rank) for rank in range(pipeline.stages)]
    lanes: dict[tuple[ActionKind, int, int], list[Action]] = {}
    moved = True
    while moved:
        moved = False
        for rank, order in zip(ranks, schedule.orders, strict=True):
            while rank.at < len(order):
                action = order[rank.at]
                sender, receiver = source(pipeline, rank.rank, action), target(pipeline, rank.rank, action)
                if sender is not None and sender[0] != rank.rank:
                    lane = lanes.setdefault((action.kind, sender[0], rank.rank), [])
                    if not lane:
                        break
                    assert lane.pop(0) == action, "another message"
                elif sender is not None:
                    assert sender[1] in order[: rank.at], "its input is not there"
                rank.run(action, schedule.is_forward_only, schedule.splits_weights)
                if receiver is not None and receiver[0] != rank.rank:
                    lanes.setdefault((action.kind, rank.rank, receiver[0]), []).append(receiver[1])
                rank.at, moved = rank.at + 1, True
    assert all(rank.at == len(order) for rank, order in zip(ranks, schedule.orders, strict=True)), "it never ends"
    assert not any(lanes.values()), "messages are left"
    assert not any(rank.written or rank.left or rank.products for rank in ranks), "something is left"
    return all(rank.losses == list(range(pipeline.microbatches)) for rank in ranks)


@given(st.data())
def test_what_the_proof_accepts_runs_in_a_model_of_the_executor(data):
    """Actions are exchanged on one rank or on all. An accepted schedule must read the right samples and end."""
    stages, microbatches, segments = (data.draw(st.integers(1, 3)) for _ in range(3))
    virtual = data.draw(st.sampled_from([1, 1, 2])) if stages > 1 else 1
    pipeline = Pipeline(stages, microbatches + stages * (virtual > 1), segments, virtual)
    kwargs = data.draw(st.sampled_from([{}, {"slack": 1}] + ([{"zero_bubble": True}] if virtual == 1 else [])))
    try:
        schedule = forward_only(pipeline) if data.draw(st.booleans()) else make(pipeline, **kwargs)
    except ScheduleError:
        return
    for _ in range(data.draw(st.integers(0, 3))):
        rank = data.draw(st.integers(0, stages - 1))
        order = list(schedule.orders[rank])
        first = data.draw(st.integers(0, len(order) - 1))
        second = data.draw(st.integers(max(first - 3, 0), min(first + 3, len(order) - 1)))
        if data.draw(st.booleans()):
            schedule = swap_on_all_ranks(schedule, order[first], order[second])
        else:
            order[first], order[second] = order[second], order[first]
            schedule = changed(schedule, rank, order)
    try:
        prove(schedule)
    except ScheduleError:
        return
    assert executed(schedule)


def violates_a_rule(schedule: Schedule) -> bool:
    """Return whether a schedule without virtual stages breaks a rule: local order, data, message order, deadlock."""
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
        if [action for action in order if action.kind is F] != sorted(action for action in order if action.kind is F):
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
    """With P=4, K=2 and lengths 3 and 1, rank 0 peaks at two sequences and the first segment of a third."""
    proof = prove(make(Pipeline(4, 8, 2)))
    assert proof.peak_units == (5, 4, 3, 2)
    assert proof.peak_live() == (2.5, 2.0, 1.5, 1.0)
    assert proof.peak_live([3, 1]) == (2.75, 2.5, 1.75, 1.5)


def test_peak_live_of_the_memo():
    """For 7B, 32k, P=4, K=4 the peaks are 1.93 sequences, 2.67 with slack 1 and 3.40 with slack 2."""
    lengths = [11024, 8416, 7088, 6240]
    peaks = [max(prove(make(Pipeline(4, 8, 4), slack=slack)).peak_live(lengths)) for slack in (0, 1, 2)]
    assert peaks == pytest.approx([1.93, 2.67, 3.40], abs=0.005)


def test_peak_live_with_virtual_stages():
    """With P=4, V=2, K=4 the peak is 14 units of an eighth of a sequence."""
    proof = prove(make(Pipeline(4, 8, 4, 2)))
    assert proof.peak_units[0] == 14 and proof.peak_live()[0] == pytest.approx(1.75)


def test_peak_live_with_weight_gradients():
    order = (Action(F, 0), Action(F, 1), Action(B, 0), Action(B, 1), Action(W, 0), Action(W, 1))
    late = prove(Schedule("late", Pipeline(1, 2), (order,)))
    assert late.peak_units == (2,) and late.peak_live() == (2.0,)
    order = (Action(F, 0), Action(B, 0), Action(F, 1), Action(B, 1), Action(W, 0), Action(W, 1))
    turns = prove(Schedule("in turn", Pipeline(1, 2), (order,)))
    assert turns.peak_units == (2,)
    assert turns.peak_live() == (2.0,)


def test_evaluation_keeps_nothing():
    proof = prove(forward_only(Pipeline(4, 8, 4)))
    assert proof.peak_live() == (0.0,) * 4


@pytest.mark.parametrize("lengths", [[1, 2, 3], [1, -1], [0, 0]])
def test_peak_live_refuses(lengths):
    with pytest.raises(ValueError, match="not"):
        prove(make(Pipeline(2, 2, 2))).peak_live(lengths)
