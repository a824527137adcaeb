"""Run a planned step under upstream's schedule: its micro-batches are ordinary ones."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config

from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.attention.runtime.strategies import CPStrategy
from megatron.longseq.flexsp.plan.plan import SequenceGroup
from megatron.longseq.flexsp.runtime.clock import StepClock
from megatron.longseq.flexsp.runtime.groups import FlexibleGroups
from megatron.longseq.flexsp.runtime.microbatch import GroupBatch, pack_documents
from megatron.longseq.flexsp.runtime.report import StepReport
from megatron.longseq.flexsp.runtime.steps import PlannedBatch, PlannedStep, restored


def device() -> torch.device:
    """Return the device on which this rank trains."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@dataclass
class StepRunner:
    """Runs the steps of a process.

    Attributes:
        groups: process groups of all plans.
        pad: id of padding.
        tensor: tensor-parallel ranks that share a rank's tokens under --sequence-parallel, else 1.
        report: logs plans and times.
    """

    groups: FlexibleGroups
    pad: int
    tensor: int
    report: StepReport

    def run(
        self,
        schedule: Callable[..., Any],
        *args: Any,
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        forward_only: bool = False,
        **named: Any,
    ) -> Any:
        """Run the passes of a step. All ranks of the job call this.

        Args:
            schedule: upstream's forward-backward function.
            *args, **named: passed on.
            data_iterator: yields `PlannedStep`; a list of iterators has one for each model chunk.
            model: model chunks of this rank.
            num_microbatches: upstream's number, which the plan replaces.
            forward_only: whether this is an evaluation.

        Raises:
            ValueError: The script's iterator yields something else, or ranks have different plans.
        """
        step = self._next(data_iterator)
        self._agree(step.batch)
        self._connect(step.batch)
        chunks = model if isinstance(model, list) else [model]
        clock = StepClock()
        iterators = [self._microbatches(step, clock if chunk == 0 else None) for chunk in range(len(chunks))]
        with _Ending(chunks[0], clock):
            result = schedule(
                *args,
                data_iterator=iterators if isinstance(data_iterator, list) else iterators[0],
                model=model,
                num_microbatches=len(step.batch.plan.microbatches),
                forward_only=forward_only,
                **named,
            )
        if forward_only:
            return self._whole_loss(result)
        self.report.add(step, clock)
        return result

    def own_group(self, groups: Sequence[SequenceGroup]) -> SequenceGroup:
        """Return the group of a micro-batch that this rank is in."""
        return next(group for group in groups if self.groups.rank in group.ranks)

    def _next(self, data_iterator: Any) -> PlannedStep:
        first = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        step = restored(next(first), first)
        if not isinstance(step, PlannedStep):
            raise ValueError(
                f"--flexsp: the script's data iterator yields {type(step).__name__}, not steps of whole documents. "
                "Train with examples/pretrain_gpt.py, or build iterators with megatron.longseq.flexsp.runtime.steps."
            )
        return step

    def _agree(self, batch: PlannedBatch) -> None:
        own = torch.tensor([batch.digest, -batch.digest], dtype=torch.int64, device=device())
        dist.all_reduce(own, dist.ReduceOp.MAX)
        most, least = own.tolist()
        if most == -least:
            return
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (batch.step, batch.digest))
        alike = {one: [rank for rank, other in enumerate(everyone) if other == one] for one in everyone}
        raise ValueError(
            f"FlexSP, rank {dist.get_rank()}: ranks have different documents or plans; (step, digest) and their ranks: "
            f"{alike}. Plans follow from the data, the flags and the cost model: check that all ranks read the same."
        )

    def _connect(self, batch: PlannedBatch) -> None:
        """Connect the groups of the step that no step before it has used, in the order of micro-batches on all ranks.

        The clock does not run yet: connecting takes long, and is no part of the time of a group.
        """
        for microbatch in batch.plan.microbatches:
            self.groups.connect(self._strategy(self.own_group(microbatch.groups)))

    def _strategy(self, group: SequenceGroup) -> CPStrategy:
        return self.groups.strategy(Mesh(group.kind.ulysses, group.kind.ring), tuple(group.ranks))

    def _microbatches(self, step: PlannedStep, clock: StepClock | None) -> Iterator[GroupBatch]:
        for microbatch in step.batch.plan.microbatches:
            if clock is not None:
                clock.begin()
            group = self.own_group(microbatch.groups)
            yield pack_documents(
                step.documents(group.sequences), self._strategy(group), self.pad, self.tensor, device()
            )

    def _whole_loss(self, reports: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """Sum the (loss, tokens) of an evaluation over micro-batches and ranks.

        Upstream takes the mean over micro-batches in some cases (--sft), which would weigh documents by the plan.
        """
        if not reports or not all(value.numel() == 2 for report in reports for value in report.values()):
            return reports
        sums = {}
        for name in reports[0]:
            total = torch.vstack([report[name].view(-1) for report in reports]).sum(dim=0)
            dist.all_reduce(total, group=self.groups.domain)
            sums[name] = total
        return [sums]


class _Ending:
    """Marks the end of the passes where upstream begins to finalize gradients, and the end of the step.

    Args:
        model: this rank's first model chunk.
        clock: clock of the step.
    """

    def __init__(self, model: Any, clock: StepClock) -> None:
        self.config, self.clock = get_model_config(model), clock

    def __enter__(self) -> None:
        self.before = finalize = self.config.finalize_model_grads_func
        if finalize is None:
            return

        def marked(*args: Any, **named: Any) -> Any:
            self.clock.end()
            return finalize(*args, **named)

        self.config.finalize_model_grads_func = marked

    def __exit__(self, *_: object) -> None:
        self.config.finalize_model_grads_func = self.before
        self.clock.end()
