"""With selective overlap, units are gathered and released as planned, and no message of attention is delayed."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.longseq.pipeline.plan.generators import make
from megatron.longseq.pipeline.plan.schedule import ActionKind, Pipeline
from megatron.longseq.planner.plan.data_parallel import data_seconds, gathers_of_a_unit
from megatron.longseq.planner.plan.flags import read
from megatron.longseq.planner.plan.memory import StageParams
from megatron.longseq.sharding.plan.comm_volume import CommVolume, comm_volume
from megatron.longseq.sharding.plan.gather_window import (
    CollectiveLaunch,
    Direction,
    Point,
    gather_count,
    launch_point,
    launches,
    window,
)
from megatron.longseq.sharding.plan.memory import Model as Sizes
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Strategy
from megatron.longseq.sharding.runtime.selective_hooks import SelectiveGatherHooks
from megatron.longseq.sharding.runtime.unit_hooks import Unit
from tests.unit.test_sharding_units import FakeStore


class Message(torch.autograd.Function):
    """Attention's message between ranks: a line in a log, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str]) -> Tensor:
        ctx.log = log
        log.append("message")
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.log.append("message")
        return grads[0], None


class Attention(torch.nn.Module):
    """Two messages around a computation."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def forward(self, x: Tensor) -> Tensor:
        return Message.apply(Message.apply(x, self.log).sin(), self.log)


class Layer(torch.nn.Module):
    """Queries, attention and an MLP three times as large; only usable while its store is whole."""

    def __init__(self, store: FakeStore, log: list[str], attends: bool) -> None:
        super().__init__()
        self.store, self.log = store, log
        self.linear_qkv = torch.nn.Linear(4, 4)
        self.attention = torch.nn.Module()
        self.attention.core_attention = Attention(log) if attends else None
        self.mlp = torch.nn.Sequential(torch.nn.Linear(4, 12), torch.nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        assert self.store.is_whole, self.store.name
        self.log.append(f"F{self.store.name}")
        y, attention = self.linear_qkv(x), self.attention.core_attention
        y = self.mlp(y if attention is None else attention(y))
        if y.requires_grad:
            y.grad_fn.register_prehook(self._check)
        return y

    def _check(self, *unused: object) -> None:
        assert self.store.is_whole, self.store.name
        self.log.append(f"B{self.store.name}")


class Model:
    """Units a, b, c, ...; in the middle ones attention communicates."""

    def __init__(self, names: str, depth: int, attends: bool) -> None:
        self.log: list[str] = []
        self.stores = [FakeStore(name, self.log) for name in names]
        last = len(names) - 1
        self.layers = [Layer(store, self.log, attends and 0 < at < last) for at, store in enumerate(self.stores)]
        units = [Unit(store.name, layer, [store]) for store, layer in zip(self.stores, self.layers, strict=True)]  # type: ignore[list-item]
        self.is_last = True
        self.hooks = SelectiveGatherHooks(units, depth, communicates=attends, is_last=lambda: self.is_last)
        self.step(1)  # shows the order of units, and which ones have a backward
        self.log.clear()

    def forward(self, recompute: int = 0) -> Tensor:
        x = torch.ones(2, 4, requires_grad=True)
        for at in range(0, len(self.layers), recompute or 1):
            run = torch.nn.Sequential(*self.layers[at : at + (recompute or 1)])
            x = checkpoint(run, x, use_reentrant=True) if recompute else run(x)
        return x.sum()

    def step(self, microbatches: int, recompute: int = 0) -> None:
        self.run("FB" * microbatches, recompute)

    def run(self, passes: str, recompute: int = 0) -> None:
        """Run a step: F is a forward, B the backward of the oldest forward."""
        self.hooks.begin_step()
        losses = []
        for at, one in enumerate(passes):
            self.is_last = "B" not in passes[at + 1 :]
            if one == "F":
                losses.append(self.forward(recompute))
            else:
                losses.pop(0).backward()

    def held(self) -> list[int]:
        """Return after each event of the log how many units are whole."""
        held: list[int] = [0]
        for event in self.log:
            held.append(held[-1] + (event[0] == "+") - (event[0] == "-"))
        return held


def points(names: str, attends: bool, depth: int) -> list[tuple[Point, Point]]:
    """Return the launch points of a model's units: 16 elements of queries, 96 of the MLP."""
    chosen = tuple(launch_point(direction, depth, 16, 96) for direction in Direction)
    return [
        chosen if attends and 0 < at < len(names) - 1 else (Point.START, Point.START)  # type: ignore[misc]
        for at in range(len(names))
    ]


@pytest.mark.parametrize("attends", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_launches_are_those_of_the_plan(depth: int, attends: bool) -> None:
    names = "abcdef"
    model = Model(names, depth, attends)
    for microbatches in (1, 3):
        model.step(microbatches)  # shows the order of passes
        model.log.clear()
        model.step(microbatches)
        planned = launches([True] * len(names), points(names, attends, depth), depth, tuple(Direction) * microbatches)
        gathers = [launch for launch in planned if launch.kind == "gather"]
        assert [event[1] for event in model.log if event[0] == "+"] == [names[launch.unit] for launch in gathers]
        assert [event for event in model.log if event[0] in "FB"] == [
            f"{way}{name}"
            for _ in range(microbatches)
            for way, order in (("F", names), ("B", names[::-1]))
            for name in order
        ]
        assert max(model.held()) == depth + 1 and model.held()[-1] == 0
        for (before, after, messages), launch in zip(_places(model.log), gathers, strict=True):
            during = f"{launch.direction.value[0].upper()}{names[launch.during]}"
            if launch.point is Point.AFTER_ATTENTION:
                assert (before, messages) == (during, 2), launch
            else:
                assert after == during and messages in (0, 2), launch
    assert len(gathers) == 3 * (2 * len(names) - 2 * (depth + 1)) + depth + 1, "the units at both ends stay"


def _places(log: list[str]) -> list[tuple[str, str, int]]:
    """Return for every gather the computations before and after it, and the messages of the first so far."""
    found, before, messages = [], "", 0
    for at, event in enumerate(log):
        if event[0] in "FB":
            before, messages = event, 0
        elif event == "message":
            messages += 1
        elif event[0] == "+":
            after = next((later for later in log[at:] if later[0] in "FB"), "")
            found.append((before, after, messages))
    return found


@pytest.mark.parametrize("attends", [False, True])
@pytest.mark.parametrize("passes", ["FFBB", "FFBFBB", "FFFBFBFBBB"])
def test_a_pipelines_passes_are_foreseen_in_its_second_step(passes: str, attends: bool) -> None:
    """The first units are gathered ahead where a forward follows a forward, and the last ones before a backward."""
    for depth in (1, 2, 4, 6):
        model = Model("abcde", depth, attends)
        model.run(passes)
        assert not any(store.is_whole for store in model.stores)
        for _ in range(2):
            model.log.clear()
            model.run(passes)
            directions = [Direction.FORWARD if one == "F" else Direction.BACKWARD for one in passes]
            planned = launches([True] * 5, points("abcde", attends, depth), depth, directions)
            gathers = [launch for launch in planned if launch.kind == "gather"]
            assert [event[1] for event in model.log if event[0] == "+"] == ["abcde"[launch.unit] for launch in gathers]
            own = [launch for launch in gathers if launch.unit == launch.during]
            assert own == gathers[:1], "a unit is gathered ahead, except the first one of the step"
            turns = sum(one != other for one, other in pairwise(passes))
            assert len(gathers) == gather_count(5, depth, len(passes), turns)
            assert max(model.held()) == min(depth + 1, 5) and model.held()[-1] == 0


def test_a_step_with_other_passes_gathers_what_it_needs() -> None:
    """Layers check that they are whole when a step is longer, shorter or in another order than the one before."""
    model = Model("abcde", 1, True)
    for passes in ("FFBB", "FFFFBBBB", "FB", "FBFB", "FFBFBB", "F", "FB"):
        model.run(passes)
        assert model.held()[-1] == sum(store.is_whole for store in model.stores) <= 2


@pytest.mark.parametrize("recompute", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 2])
def test_recomputation_gathers_no_more_often(recompute: int, depth: int) -> None:
    model = Model("abcdef", depth, True)
    model.step(2)  # shows the order of passes
    model.log.clear()
    model.step(2, recompute)
    gathered = [event[1] for event in model.log if event[0] == "+"]
    assert len(gathered) <= 2 * 2 * 6 - (4 if recompute == 1 else 1) and not any(
        store.is_whole for store in model.stores
    )
    assert max(model.held()) <= depth + recompute


def test_other_orders_of_passes_gather_what_they_need() -> None:
    """Layers check that they are whole: two forwards first, an evaluation, an error in a forward, all gathered."""
    model = Model("abcdef", 1, True)
    model.is_last = False
    losses = [model.forward() for _ in range(2)]
    for loss in losses:
        loss.backward()
    for layer in model.layers:
        layer.eval()
    with torch.no_grad():
        model.forward()
    assert not any(store.is_whole for store in model.stores), "no backward follows an evaluation"
    for layer in model.layers:
        layer.train()
    model.forward()  # no backward follows
    model.step(2)
    assert not any(store.is_whole for store in model.stores)
    model.hooks.gather_all()
    model.step(1)
    assert not any(store.is_whole for store in model.stores)


@given(st.integers(1, 9), st.integers(0, 4), st.lists(st.sampled_from(Direction), min_size=1, max_size=12))
def test_gathers_are_counted_as_they_are_launched(units: int, depth: int, passes: list[Direction]) -> None:
    turns = sum(one is not other for one, other in pairwise(passes))
    start = [(Point.START, Point.START)] * units
    if depth:
        planned = launches([True] * units, start, depth, passes)
        assert gather_count(units, depth, len(passes), turns) == sum(one.kind == "gather" for one in planned)
    else:
        assert gather_count(units, depth, len(passes), turns) == units * len(passes)
    groups, microbatches = RankGroups(4, 2), len(passes)
    sent = comm_volume(Strategy.parse("IIG"), groups, Sizes(8 * units, 8 * units), buckets=units, prefetch_units=depth)
    planned = launches([True] * units, start, depth, tuple(Direction) * microbatches) if depth else []
    count = sum(one.kind == "gather" for one in planned) if depth else 2 * units * microbatches
    # One all-gather inside groups sends 1 of 2 slices, 4 of 8 elements of 2 bytes.
    assert sent.gathers(microbatches) == CommVolume(count * 8, 0, 0, count)
    assert sent.step(microbatches) == sent.gathers(microbatches) + sent.grads * microbatches + sent.finish


def test_the_planner_counts_the_gathers_of_a_schedule() -> None:
    """Of the first stage's first chunk, and fewer of them take less time."""
    flags = {"model": "llama-7b", "cluster": "a800-64", "seq_length": 4096, "global_batch_size": 64, "bf16": True}
    flags |= {"paro": "IIG", "paro_group_size": 8, "micro_batch_size": 1}
    selective = {"paro_selective_overlap": True, "paro_prefetch_units": 2}
    for shape in (
        {},
        {"pipeline_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 4},
        {"pipeline_model_parallel_size": 4, "seq1f1b_splits": 4},
    ):
        model, _, run = read({**flags, **shape, **selective})
        pipeline = Pipeline(run.pipeline_model_parallel_size, run.microbatches, run.seq1f1b_splits, run.virtual_stages)
        kinds = {ActionKind.FORWARD: Direction.FORWARD, ActionKind.BACKWARD: Direction.BACKWARD}
        passes = [kinds[action.kind] for action in make(pipeline).orders[0] if action.vstage == 0]
        assert len(passes) == 2 * run.microbatches * run.seq1f1b_splits
        units = model.num_layers // (pipeline.stages * run.virtual_stages)
        planned = launches([True] * units, [(Point.START, Point.START)] * units, 2, passes)
        count = sum(one.kind == "gather" for one in planned)
        made = gathers_of_a_unit(model.num_layers, run)
        assert made == pytest.approx(2 * count / (units * len(passes))) and made < 2
        assert gathers_of_a_unit(model.num_layers, read({**flags, **shape})[2]) == 2
    # Nothing else changes, and nothing is hidden where compute is replaced by none.
    _, cluster, run = read({**flags, **selective})
    params = StageParams(10**9, 0, 0, 0)
    twice, fewer = (data_seconds(cluster, run, params, 0.0, 0.0, gathers).exposed for gathers in (2.0, 1.5))
    once = data_seconds(cluster, run, params, 0.0, 0.0, 1.0).exposed
    assert twice - fewer == pytest.approx(fewer - once) and fewer < twice


def test_a_point_has_the_longest_computation_before_the_next_attention() -> None:
    """Of a layer with a small part before attention and a large one after it, in forward order."""
    assert launch_point(Direction.FORWARD, 1, 3, 9) is Point.AFTER_ATTENTION
    assert launch_point(Direction.BACKWARD, 1, 3, 9) is Point.START, "the large part comes first in backward"
    assert launch_point(Direction.BACKWARD, 2, 3, 9) is Point.AFTER_ATTENTION, "3 of the layer and 9 of the next one"
    assert launch_point(Direction.FORWARD, 1, 9, 3) is Point.START


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 4), st.integers(1, 3))
def test_a_window_is_what_is_used_next(has_backward: list[bool], depth: int, microbatches: int) -> None:
    """Against the uses written out: whatever is read is gathered, and nothing that stays is gathered again."""
    units = range(len(has_backward))
    uses = [(unit, Direction.FORWARD) for unit in units]
    uses += [(unit, Direction.BACKWARD) for unit in reversed(units) if has_backward[unit]]
    uses = uses * microbatches
    held: set[int] = set()
    expected = []
    for at, (unit, direction) in enumerate(uses):
        coming = list(dict.fromkeys(other for other, _ in uses[at:]))[: depth + 1]
        following = Direction.BACKWARD if direction is Direction.FORWARD else Direction.FORWARD
        if at + len(uses) // microbatches >= len(uses) and direction is Direction.BACKWARD:
            following = None
        made = window(unit, direction, has_backward, depth, following)
        assert list(made)[: len(coming)] == coming[: len(made)] and made[0] == unit
        held &= set(made)
        expected += [other for other in made if other not in held]
        held |= set(made)
    found = launches(
        has_backward, [(Point.START, Point.START)] * len(has_backward), depth, tuple(Direction) * microbatches
    )
    assert [launch.unit for launch in found if launch.kind == "gather"] == expected
    reduced = [launch for launch in found if launch.kind == "reduce"]
    assert [launch.unit for launch in reduced] == list(reversed(units)) * microbatches
    assert CollectiveLaunch("reduce", 0, 0, Direction.BACKWARD, Point.END) in reduced
