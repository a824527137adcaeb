"""Real ranks start collectives of weights in the order of the plan, and delay no message of attention."""

import sys
from collections import Counter
from typing import Any

import pytest

from megatron.longseq.pipeline.plan.generators import make
from megatron.longseq.pipeline.plan.schedule import ActionKind, Pipeline
from megatron.longseq.sharding.plan.gather_window import Direction, Point, launch_point, launches
from tests.distributed.flags import PP2, TINY, flags
from tests.pool import RankPool
from tests.regression.arm import _early_end
from tests.regression.planted import wrapped

RUN = "--paro IIG --paro-group-size 2 --paro-links 100 1 --overlap-grad-reduce --overlap-param-gather"
ULYSSES = "--context-parallel-size 2 --cp-comm-type a2a"
SELECT = "--paro-selective-overlap"
STEPS, LAYERS = 3, 4
UNITS = ["embedding", *(f"decoder.layers.{layer}" for layer in range(LAYERS)), "output_layer"]


def events_of_a_rank(words: list[str]) -> list[list[str]]:
    """Return what each step did, in order: "F unit", "B unit", "message", and labels of submitted collectives."""
    import patches

    sys.argv = ["pretrain_gpt.py", *words]
    patches.start()
    from megatron.training import training

    from megatron.longseq.attention.runtime.comm import GroupCollectives
    from megatron.longseq.pretrain_gpt import main
    from megatron.longseq.sharding.runtime.comm_queue import CommQueues
    from megatron.longseq.sharding.runtime.ddp import ShardedDataParallel
    from megatron.longseq.sharding.runtime.unit_hooks import GatherHooks

    steps: list[list[str]] = [[]]

    def submit(original: Any, self: Any, collectives: Any, region: Any, label: str, *rest: Any, **named: Any) -> Any:
        steps[-1].append(label)
        return original(self, collectives, region, label, *rest, **named)

    def all_to_all(original: Any, self: Any, sent: Any) -> Any:
        steps[-1].append("message")
        return original(self, sent)

    def hook_units(original: Any, self: Any, named: Any) -> None:
        original(self, named)
        for unit in self.gather_hooks.units:
            note = lambda *_, name=unit.name: steps[-1].append(f"F {name}")  # noqa: E731
            unit.module.register_forward_pre_hook(note, prepend=True)

    def begin_backward(original: Any, self: Any, unit: Any) -> None:
        if f"B {unit.name}" not in steps[-1][-4:]:  # the last layer's unit has the final norm's hook, too
            steps[-1].append(f"B {unit.name}")
        original(self, unit)

    def train_step(original: Any, *args: Any, **named: Any) -> Any:
        steps.append([])
        return original(*args, **named)

    with (
        wrapped(CommQueues, "submit", submit),
        wrapped(GroupCollectives, "all_to_all", all_to_all),
        wrapped(ShardedDataParallel, "_hook_units", hook_units),
        wrapped(GatherHooks, "_begin_backward", begin_backward),
        wrapped(training, "train_step", train_step),
        _early_end(),
    ):
        main()
    return steps[1:]


def run(ranks: RankPool, own: str) -> list[list[list[str]]]:
    step = f"--global-batch-size 2 --train-iters {STEPS} --num-layers {LAYERS} --num-query-groups 4"
    return ranks.run(2, events_of_a_rank, flags(TINY, step, f"{RUN} {ULYSSES} {own}"))


def gathers(step: list[str]) -> list[str]:
    return [
        event.removeprefix("parameters for ").removeprefix("module.") for event in step if "parameters for" in event
    ]


def reductions(step: list[str]) -> list[str]:
    return [event.partition("(")[2].rstrip(")").removeprefix("module.") for event in step if "gradients of" in event]


def messages_around(step: list[str]) -> Counter[tuple[str, int]]:
    """Count all-gathers by the pass and the messages of the layer that computes when they start."""
    found: Counter[tuple[str, int]] = Counter()
    direction, messages = "", 0
    for event in step:
        if event[:2] in ("F ", "B "):
            direction, messages = event[0], 0
        elif event == "message":
            messages += 1
        elif "parameters for" in event:
            found[direction, messages] += 1
    return found


@pytest.mark.parametrize("depth", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_launches_are_those_of_the_plan(ranks: RankPool, depth: int) -> None:
    width, kv, ffn = 64, 64, 128
    before, after = width * (width + 2 * kv), width * width + 3 * width * ffn
    layer = (
        launch_point(Direction.FORWARD, depth, before, after),
        launch_point(Direction.BACKWARD, depth, before, after),
    )
    start = (Point.START, Point.START)
    planned = launches([False, *[True] * (LAYERS + 1)], [start, *[layer] * LAYERS, start], depth, tuple(Direction) * 2)
    for steps in ranks_steps(ranks, f"{SELECT} --paro-prefetch-units {depth}"):
        for step in steps[1:]:  # the first one shows which units have a backward
            assert gathers(step) == [UNITS[launch.unit] for launch in planned if launch.kind == "gather"]
            expected = [UNITS[launch.unit] for launch in planned if launch.kind == "reduce"]
            # With the last micro-batch's reduction of a bucket, the one that ends the step starts.
            last = [name for name in expected[len(UNITS) :] for _ in range(2)]
            assert reductions(step) == [*expected[: len(UNITS)], *last]
            around = messages_around(step)
            assert not around["F", 1] and not around["B", 1], "between the messages of one attention"
            assert around["F", 2] == sum(
                launch.point is Point.AFTER_ATTENTION and launch.direction is Direction.FORWARD for launch in planned
            )


@pytest.mark.slow
def test_stages_of_a_pipeline_gather_as_planned(ranks: RankPool) -> None:
    """The first of two stages runs two forwards before its first backward, and two backwards after its last forward."""
    step = f"--global-batch-size 8 --train-iters {STEPS} --num-layers {LAYERS}"
    found = ranks.run(4, events_of_a_rank, flags(TINY, step, f"{RUN} {PP2} {SELECT}"))
    kinds = {ActionKind.FORWARD: Direction.FORWARD, ActionKind.BACKWARD: Direction.BACKWARD}
    for rank, steps in enumerate(found):
        stage = rank // 2
        units = [*UNITS[: 1 - stage], "decoder.layers.0", "decoder.layers.1", *UNITS[len(UNITS) - stage :]]
        passes = [kinds[action.kind] for action in make(Pipeline(2, 4)).orders[stage]]
        start = [(Point.START, Point.START)] * len(units)
        planned = launches([unit != "embedding" for unit in units], start, 1, passes)
        expected = [units[launch.unit] for launch in planned if launch.kind == "gather"]
        for number, step_events in enumerate(steps[1:]):
            assert gathers(step_events) == expected, (rank, number)


def ranks_steps(ranks: RankPool, own: str) -> list[list[list[str]]]:
    """Return the events of every rank, which are the same on all of them."""
    found = run(ranks, own)
    assert all(steps == found[0] for steps in found)
    return found


@pytest.mark.slow
def test_without_the_flag_a_gather_comes_before_attention_s_messages(ranks: RankPool) -> None:
    """What the flag changes: a layer's gather starts with the layer before it, and every unit is gathered twice."""
    for step in ranks_steps(ranks, "")[0][1:]:
        assert Counter(gathers(step)) == {UNITS[0]: 2, **dict.fromkeys(UNITS[1:], 4)}
        assert not messages_around(step)["F", 2]
