"""The log of planned steps: lengths, plan, predicted and measured times."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.longseq.flexsp.plan.cost_file import save_cost
from megatron.longseq.flexsp.plan.plan import Microbatch, SequenceGroup
from megatron.longseq.flexsp.refit import GroupSample, refit, relative_error
from megatron.longseq.flexsp.runtime.clock import StepClock
from megatron.longseq.flexsp.runtime.steps import Lookahead, PlannedBatch, PlannedStep

SAMPLES = 4096  # the last measured groups, to which the cost model is fitted


def describe_microbatch(microbatch: Microbatch) -> str:
    """Return the groups of a micro-batch, such as `<8 4r 2x2 1*4>`: degree, kind (none: Ulysses), number."""
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
        refits: whether the cost model is fitted to measured times (--flexsp-refit).
        save: file for the fitted cost model.
    """

    domain: dist.ProcessGroup
    interval: int
    stages: int
    say: Callable[[str], None]
    on_step: Callable[[PlannedBatch], None] = field(default=lambda batch: None)
    refits: bool = False
    save: str | None = None
    samples: deque[GroupSample] = field(default_factory=lambda: deque(maxlen=SAMPLES), init=False)
    _steps: list[tuple[PlannedBatch, StepClock]] = field(default_factory=list, init=False)

    def add(self, step: PlannedStep, clock: StepClock) -> None:
        """Add a step; at the interval, all ranks of the domain gather their times, and a line is printed.

        Args:
            step: the step.
            clock: this rank's times of it.
        """
        self.on_step(step.batch)
        self._steps.append((step.batch, clock))
        if (step.batch.step + 1) % self.interval:
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
        times, error = [times[-1] for times in gathered], sum(errors) / len(errors)
        self.say(describe_step(step.batch, times, error, step.lookahead.late))
        if self.refits:
            self._refit(step.lookahead)

    def _refit(self, lookahead: Lookahead) -> None:
        """Fit the cost model on the first rank of the job, from which all ranks take it. Their plans stay alike."""
        before, samples = lookahead.cost, list(self.samples)
        fitted = [refit(before, samples) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(fitted, src=0)
        assert fitted[0] is not None, "the first rank has sent it"
        lookahead.cost = fitted[0]
        self.say(
            f"flexsp cost model: error of {len(samples)} measured groups {100 * relative_error(before, samples):.1f}%, "
            f"{100 * relative_error(fitted[0], samples):.1f}% after the fit"
        )
        if self.save is not None and dist.get_rank() == 0:
            save_cost(fitted[0], Path(self.save))


def measured_groups(batch: PlannedBatch, seconds: Sequence[Sequence[float]]) -> list[GroupSample]:
    """Return what every group of a step has taken.

    Args:
        batch: the step.
        seconds: times of micro-batches, [ranks][micro-batches].
    """
    return [
        GroupSample(
            group.kind,
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
