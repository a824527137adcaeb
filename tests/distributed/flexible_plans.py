"""What tests of --flexsp do to its planner and its steps."""

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.longseq.flexsp.plan.plan import Microbatch, SequenceGroup, StepPlan, validate_plan
from tests.regression.planted import Planted, wrapped

PLANNING, TRAINING = 2.0, 3.0  # seconds


def random_plan(
    lengths: Sequence[int], ranks: int, cost: Any, degrees: Sequence[int], kinds: Sequence[str]
) -> StepPlan:
    """Return a legal plan that follows from the lengths alone: random degrees, kinds, groups and micro-batches."""
    draw, left, microbatches = random.Random(repr(lengths)), list(range(len(lengths))), []
    while left:
        groups: list[tuple[Any, list[int], list[int]]] = []
        start = 0
        while start < ranks:
            degree = draw.choice([one for one in degrees if start % one == 0 and start + one <= ranks])
            kind = draw.choice(cost.kinds(degree, kinds))
            groups.append((kind, list(range(start, start + degree)), []))
            start += degree
        for index in draw.sample(left, draw.randint(1, len(left))):
            fitting = [
                held
                for kind, _, held in groups
                if sum(lengths[one] for one in held) + lengths[index] <= kind.degree * cost.tokens_per_rank
            ]
            if fitting:
                draw.choice(fitting).append(index)
                left.remove(index)
        made = tuple(
            SequenceGroup(kind, tuple(own), tuple(sorted(held)), float(bool(held))) for kind, own, held in groups
        )
        if any(group.sequences for group in made):
            microbatches.append(Microbatch(made, 1.0))
    draw.shuffle(microbatches)
    plan = StepPlan(tuple(microbatches), float(len(microbatches)), 1.0, 0.0)
    validate_plan(plan, lengths, ranks)
    return plan


@contextmanager
def random_plans() -> Iterator[Planted]:
    """Plan at random."""
    from megatron.longseq.flexsp import from_args

    planted = Planted()

    def plan_step(_: Any, lengths: Sequence[int], *, multiple: int, planner: str, **named: Any) -> StepPlan:
        assert planner == "heuristic" and multiple == 1
        planted.times += 1
        return random_plan(lengths, **named)

    with wrapped(from_args, "plan_step", plan_step):
        yield planted


@contextmanager
def unlike_plans() -> Iterator[Planted]:
    """Plan the second step of rank 1 as if its documents were in another order."""
    from megatron.longseq.flexsp import from_args

    planted = Planted()

    def plan_step(original: Any, lengths: Sequence[int], **named: Any) -> StepPlan:
        planted.times += 1
        plan: StepPlan = original(lengths, **named)
        if os.environ["RANK"] != "1" or planted.times != 2:
            return plan
        last = len(lengths) - 1

        def moved(group: SequenceGroup) -> SequenceGroup:
            return SequenceGroup(
                group.kind, group.ranks, tuple(last - index for index in group.sequences), group.seconds
            )

        microbatches = [Microbatch(tuple(map(moved, one.groups)), one.seconds) for one in plan.microbatches]
        return StepPlan(tuple(microbatches), plan.seconds, plan.bound, 0.0)

    with wrapped(from_args, "plan_step", plan_step):
        yield planted


@contextmanager
def slow_planner() -> Iterator[Planted]:
    """Plan for two seconds longer, and train every step for three seconds longer."""
    from megatron.longseq.flexsp import from_args
    from megatron.longseq.flexsp.runtime.runner import StepRunner

    planted = Planted()

    def plan_step(original: Any, *args: Any, **named: Any) -> StepPlan:
        time.sleep(PLANNING)
        planted.times += 1
        plan: StepPlan = original(*args, **named)
        return plan

    def run(original: Any, *args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        time.sleep(TRAINING)
        return result

    with ExitStack() as stack:
        stack.enter_context(wrapped(from_args, "plan_step", plan_step))
        stack.enter_context(wrapped(StepRunner, "run", run))
        yield planted


@contextmanager
def told_samples() -> Iterator[Planted]:
    """Print the samples of every training step."""
    from megatron.longseq.flexsp.runtime.report import StepReport

    planted = Planted()

    def add(original: Any, report: Any, step: Any, clock: Any) -> None:
        planted.times += 1
        batch = step.batch
        print(f"step {batch.step}: samples {batch.samples.start} to {batch.samples.stop}", flush=True)
        original(report, step, clock)

    with wrapped(StepReport, "add", add):
        yield planted
