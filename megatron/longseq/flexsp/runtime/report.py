"""The log of planned steps: lengths, plan, predicted and measured times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron.longseq.flexsp.plan.plan import Microbatch, SequenceGroup
from megatron.longseq.flexsp.runtime.clock import StepClock
from megatron.longseq.flexsp.runtime.steps import PlannedBatch


class GroupSample(NamedTuple):
    """A measured group.

    Attributes:
        ulysses, ring: its kind.
        lengths: tokens of its documents.
        seconds: time of its micro-batch, on its slowest rank.
    """

    ulysses: int
    ring: int
    lengths: tuple[int, ...]
    seconds: float


def describe_microbatch(microbatch: Microbatch) -> str:
    """Return the groups of a micro-batch, such as `<8 4r 2x2 1x4>`: degree, kind (none: Ulysses), times how often."""
    names = [_name(group) for group in microbatch.groups]
    counts = {name: names.count(name) for name in names}
    return "<" + " ".join(name if count == 1 else f"{name}*{count}" for name, count in counts.items()) + ">"


def _name(group: SequenceGroup) -> str:
    kind, degree = group.kind, group.kind.ulysses * group.kind.ring
    name = f"{degree}" if kind.ring == 1 else f"{degree}r" if kind.ulysses == 1 else f"{kind.ulysses}x{kind.ring}"
    return name if group.sequences else f"{name}(idle)"


@dataclass
class StepReport:
    """Logs steps at an interval.

    Attributes:
        domain: ranks that share the documents of a step.
        interval: steps between two lines (--log-interval).
        stages: pipeline stages; with several, times of single micro-batches are not known.
        say: prints a line.
        on_step: told of the documents of every step.
    """

    domain: dist.ProcessGroup
    interval: int
    stages: int
    say: Callable[[str], None]
    on_step: Callable[[PlannedBatch], None] = field(default=lambda batch: None)
    samples: list[GroupSample] = field(default_factory=list, init=False)
    _steps: list[tuple[PlannedBatch, StepClock]] = field(default_factory=list, init=False)

    def add(self, batch: PlannedBatch, clock: StepClock, late: int = 0) -> None:
        """Add a step; at the interval, all ranks of the domain gather their times, and a line is printed."""
        self.on_step(batch)
        self._steps.append((batch, clock))
        if (batch.step + 1) % self.interval:
            return
        steps, self._steps = self._steps, []
        own = [(clock.microbatch_seconds(), clock.pass_seconds(), clock.step_seconds()) for _, clock in steps]
        gathered: list[Any] = [None] * self.domain.size()
        dist.all_gather_object(gathered, own, group=self.domain)
        if self.stages == 1:
            for index, (one, _) in enumerate(steps):
                self.samples += measured_groups(one, [times[index][0] for times in gathered])
        errors = []
        for index, (one, _) in enumerate(steps):
            slowest = max(times[index][1] for times in gathered)
            errors.append(abs(one.plan.seconds - slowest) / slowest)
        self.say(describe_step(batch, [times[-1] for times in gathered], sum(errors) / len(errors), late))


def measured_groups(batch: PlannedBatch, seconds: Sequence[Sequence[float]]) -> list[GroupSample]:
    """Return what every group of a step has taken.

    Args:
        batch: the step.
        seconds: times of micro-batches, [ranks][micro-batches].
    """
    return [
        GroupSample(
            group.kind.ulysses,
            group.kind.ring,
            tuple(batch.lengths[index] for index in group.sequences),
            max(seconds[rank][number] for rank in group.ranks),
        )
        for number, microbatch in enumerate(batch.plan.microbatches)
        for group in microbatch.groups
        if group.sequences
    ]


def describe_step(
    batch: PlannedBatch, times: Sequence[tuple[Sequence[float], float, float]], error: float, late: int
) -> str:
    """Return the log line of a step.

    Args:
        batch: the step.
        times: of every rank, seconds of its micro-batches, of its passes, and of the step.
        error: mean relative error of the predicted time since the last line.
        late: steps of the run that had to wait for their plan.
    """
    plan, lengths = batch.plan, sorted(batch.lengths)
    passes = [one[1] for one in times]
    measured = max(passes)
    waits = 1 - sum(passes) / (measured * len(passes))
    groups = " ".join(describe_microbatch(one) for one in plan.microbatches)
    return (
        f"flexsp step {batch.step + 1}: {len(lengths)} documents, {sum(lengths):,} tokens (median "
        f"{lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}) | {groups} | passes {measured:.3f} s, predicted "
        f"{plan.seconds:.3f} s, error since the last line {100 * error:.1f}% | idle {100 * plan.idle_share:.1f}% "
        f"planned, {100 * waits:.1f}% at the end | planner {plan.planner_seconds:.3f} s, "
        f"late {late}, gap {100 * plan.gap:.2f}%"
    )
