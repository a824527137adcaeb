"""Examine a training step between its passes and the update of the weights, with all ranks agreeing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.guards.plan.spikes import LossHistory
from megatron.longseq.guards.runtime.gradients import GradientRecord, Turn, describe, largest

UNCHANGED = "The weights are those before this step; resume from the last checkpoint."


class NonFiniteGradients(RuntimeError):
    """A gradient or a loss is NaN or infinite. All ranks raise it, with the same message."""


class LossSpike(RuntimeError):
    """A loss is far above those before it. All ranks raise it, with the same message."""


@dataclass
class StepGuard:
    """Examines every step of this process.

    Attributes:
        record: norms of the step's gradients; None: gradients are not examined.
        policy: what a loss spike causes: "off", "warn", "skip" or "stop".
        threshold: score from which a loss is a spike.
        history: the last losses.
        rerun: upstream's rerun state machine, which repeats a step whose result it rejects; None: it is disabled.
        say: prints a line in the log.
        device: on which this rank trains.
        loss: mean loss per token of the step over all ranks; None: its passes are not done, or report none.
        has_warned: whether the log says that a step has no loss.
    """

    record: GradientRecord | None
    policy: str
    threshold: float
    history: LossHistory
    rerun: Any
    say: Callable[[str], None]
    device: torch.device
    loss: float | None = None
    has_warned: bool = False

    def run(self, passes: Callable[..., Any], step: int, stage: int, order: Sequence[Turn], named: Any) -> Any:
        """Run the passes of a training step and examine the result. All ranks call this.

        Args:
            passes: the forward-backward function.
            step: number of the step, from 1.
            stage: this rank's pipeline stage.
            order: see `GradientRecord.begin`.
            named: keyword arguments of `passes`.

        Raises:
            NonFiniteGradients: on all ranks, unless upstream repeats the step to tell a passing fault from a lasting
                one. It does not in the first step of a process.
        """
        model = named["model"]
        if self.record is not None:
            chunks = model if isinstance(model, list) else [model]
            self.record.begin(chunks, named["num_microbatches"], order)
        reports = passes(**named)
        self._examine(reports, step, stage)
        return reports

    def refuses_update(self, step: int) -> bool:
        """Judge the loss of the step; return whether the weights must stay as they are. All ranks decide alike.

        Raises:
            LossSpike: the policy is to stop.
        """
        if self.policy == "off":
            return False
        if self.loss is None:
            if not self.has_warned:
                self.say(
                    f"> WARNING: step {step} has no loss that --loss-spike-policy {self.policy} could judge: the "
                    "script reports none first, or no token of the step counts."
                )
            self.has_warned = True
            return False
        before = self.history.middle if self.history.losses else math.nan
        score = self.history.add(self.loss)
        if score is None or score < self.threshold:
            return False
        spike = (
            f"step {step}: loss spike, {self.loss:.6g} after a median of {before:.6g} in the last "
            f"{self.history.window} steps at most, {score:.1f} robust standard deviations above it "
            f"(--loss-spike-threshold {self.threshold:g})."
        )
        if self.policy == "stop":
            raise LossSpike(f"{spike} {UNCHANGED} With --loss-spike-policy skip, such steps change nothing.")
        if self.policy == "skip":
            self.say(f"> WARNING: {spike} The step is skipped: its samples are consumed, the model stays as it is.")
            return True
        self.say(f"> WARNING: {spike}")
        return False

    def _examine(self, reports: list[Any], step: int, stage: int) -> None:
        pairs = _sums_and_weights(reports)
        losses = torch.zeros(0) if pairs is None else pairs[:, 0]
        own = reduced = None
        if self.record is not None:
            own, reduced = largest([*self.record.own(), losses]), largest(self.record.reduced())
        origins, bad, total, weight = self._reduce(own, reduced, pairs)
        self.loss = total / weight if weight else None
        if self.record is None:
            return
        if origins or bad:
            self._report(losses, step, stage)
        if self.rerun is not None:
            # Ranks that only got a NaN from others have nothing to repeat.
            result = own if origins else reduced if bad else None
            self.rerun.validate_result(
                result=torch.zeros(()) if result is None else result,
                rejection_func=lambda value: not math.isfinite(value),
                message="a gradient or loss of this rank is not finite",
                tolerance=0.001,  # as upstream's: attention kernels may not be deterministic
                fatal=True,
            )

    def _reduce(
        self, own: Tensor | None, reduced: Tensor | None, pairs: Tensor | None
    ) -> tuple[float, float, float, float]:
        """Sum over all ranks which norms are not finite, the loss, and the tokens. The host waits here, and only here.

        Args:
            own, reduced: the largest norm of this rank's own and of the reduced gradients, scalars.
            pairs: [micro-batches, 2], see `_sums_and_weights`.
        """
        values = torch.zeros(4, dtype=torch.float64, device=self.device)  # a copy from the host would wait for a GPU
        for place, norm in enumerate((own, reduced)):
            if norm is not None:
                values[place] = ~torch.isfinite(norm)
        if pairs is not None:
            values[2:] = pairs.sum(dim=0, dtype=torch.float64)
        dist.all_reduce(values)
        origins, bad, total, weight = values.tolist()
        return origins, bad, total, weight

    def _report(self, losses: Tensor, step: int, stage: int) -> None:
        assert self.record is not None
        findings: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(findings, self.record.find(losses.unbind(), dist.get_rank(), stage))
        text = describe(findings, step)
        if self.rerun is None or not self.rerun.first_iteration_complete:
            raise NonFiniteGradients(f"{text} {UNCHANGED}")
        self.say(f"> ERROR: {text}")


def _sums_and_weights(reports: Sequence[Any]) -> Tensor | None:
    """Return the losses that a step's micro-batches report on this rank.

    A loss function reports a sum and its tokens, or a mean, which gets weight 1. A script may report something else
    than a loss first; that is not judged.

    Args:
        reports: what upstream's schedule returns: a dict for each micro-batch on the last stage, none elsewhere.

    Returns:
        [micro-batches, 2], sum and weight; None: this rank reports no loss.
    """
    values = [next(iter(report.values())) for report in reports if isinstance(report, dict) and report]
    sums = [one.detach().view(-1) for one in values if isinstance(one, Tensor) and one.numel() in (1, 2)]
    if not sums:
        return None
    return torch.stack([one if one.numel() == 2 else torch.stack([one[0], torch.ones_like(one[0])]) for one in sums])


class GuardedOptimizer:
    """An optimizer whose step changes nothing if the guard refuses the update.

    Args:
        optimizer: upstream's.
        refuses_update: returns whether the step must change nothing, the same on all ranks.
    """

    def __init__(self, optimizer: Any, refuses_update: Callable[[], bool]) -> None:
        self._optimizer, self._refuses_update = optimizer, refuses_update

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> Any:
        """See upstream. A refused update is reported like one that upstream skips because a gradient overflowed."""
        return (False, None, None) if self._refuses_update() else self._optimizer.step()
