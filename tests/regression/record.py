"""Record every step of a training run at full precision, from upstream's `train_step`.

Upstream's log has six digits, and its second line is the mean of steps 1 and 2.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron.longseq.flexsp.runtime.steps import PlannedStep
from tests.regression.snapshot import Array, Part, parts_of_this_rank

Step = dict[str, Any]
Batch = dict[str, Array]
BATCH_FIELDS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens")
ORACLE_FIELDS = (*BATCH_FIELDS[:3], BATCH_FIELDS[-1])  # what the oracle computes from


class BatchRecorder:
    """Wrap a data iterator and keep copies of its batches."""

    def __init__(self, iterable: Any) -> None:
        self.iterable = iterable
        self.batches: list[dict[str, torch.Tensor]] = []

    def __iter__(self) -> "BatchRecorder":
        return self

    def __next__(self) -> Any:
        batch = next(self.iterable)
        if isinstance(batch, PlannedStep):
            self.batches += documents_of(batch)
            return batch
        self.batches.append({name: batch[name].clone() for name in BATCH_FIELDS if name in batch})
        return batch

    def take(self) -> list[dict[str, torch.Tensor]]:
        """Return the batches since the last call."""
        batches, self.batches = self.batches, []
        return batches


def documents_of(step: PlannedStep) -> list[dict[str, torch.Tensor]]:
    """Return the documents of a step of --flexsp on one rank, each a batch of one sample."""
    from megatron.core import mpu

    if mpu.get_data_parallel_rank() != 0 or mpu.get_tensor_model_parallel_rank() != 0:
        return []
    documents = step.documents(range(len(step.batch.lengths)))
    return [{name: torch.from_numpy(value)[None] for name, value in one._asdict().items()} for one in documents]


def sample_hashes(batches: list[dict[str, torch.Tensor]]) -> list[str]:
    """Hash tokens, labels and mask of every sample of a step, independently of micro-batches."""
    hashes = []
    for batch in batches:
        for row in range(batch["tokens"].shape[0]):
            content = b"".join(batch[name][row].to(torch.int64).numpy().tobytes() for name in BATCH_FIELDS[:3])
            hashes.append(hashlib.sha256(content).hexdigest()[:16])
    return hashes


class Recorder:
    """Wrap `train_step` and append one record per call to `steps`.

    Args:
        keep_batches: also keep the batches, for the oracle.
        snapshots: iterations after which this rank's parts of weights and optimizer states are kept. That of a loaded
            checkpoint is taken before the first step.
    """

    def __init__(self, keep_batches: bool = False, snapshots: Collection[int] = ()) -> None:
        self.steps: list[Step] = []
        self.batches: list[list[Batch]] = []
        self.parts: dict[int, list[Part]] = {}
        self.keep_batches = keep_batches
        self.snapshots = snapshots
        self._batch_recorders: dict[int, BatchRecorder] = {}

    def wrap(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a `train_step` that records every call."""
        from megatron.training import get_args

        def train_and_record(
            forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, *rest: Any, **named: Any
        ) -> Any:
            batch_recorder = self._record_batches(data_iterator)
            iteration = get_args().curr_iteration + 1
            if not self.steps and iteration - 1 in self.snapshots:
                self.parts[iteration - 1] = parts_of_this_rank(model, optimizer)
            learning_rate = optimizer.param_groups[0]["lr"] if optimizer.param_groups else None
            with exact_norm(optimizer) as norm:
                result = train_step(forward_step, data_iterator, model, optimizer, *rest, **named)
            batches = batch_recorder.take() if batch_recorder else []
            loss = result[0].get("lm loss")
            self.steps.append(
                {
                    "iteration": iteration,
                    "loss": None if loss is None else float(loss),
                    "grad_norm": norm[0],
                    "learning_rate": learning_rate,
                    "skipped": int(result[1]),
                    "tokens": int(sum(batch["loss_mask"].sum() for batch in batches)),
                    "samples": sample_hashes(batches),
                }
            )
            if self.keep_batches:
                names = [name for name in ORACLE_FIELDS if batches and name in batches[0]]
                self.batches.append([{name: batch[name].numpy() for name in names} for batch in batches])
            if iteration in self.snapshots:
                self.parts[iteration] = parts_of_this_rank(model, optimizer)
            return result

        return train_and_record

    def _record_batches(self, data_iterator: Any) -> BatchRecorder | None:
        """Wrap the data of the first model chunk on the first pipeline stage.

        Context-parallel ranks read the same samples, so only the first of them records.
        """
        from megatron.core import mpu

        first = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        if first is None or mpu.get_pipeline_model_parallel_rank() != 0 or mpu.get_context_parallel_rank() != 0:
            return None
        batch_recorder = self._batch_recorders.get(id(first))
        if batch_recorder is None:
            batch_recorder = self._batch_recorders[id(first)] = BatchRecorder(first.iterable)
            first.iterable = batch_recorder
        return batch_recorder


@contextmanager
def exact_norm(optimizer: Any) -> Iterator[list[float | None]]:
    """Yield a list that receives the norm of `optimizer.step` before upstream rounds it."""
    seen: list[float | None] = [None]
    step = optimizer.step

    def step_and_record_norm() -> Any:
        success, norm, zeros = step()
        seen[0] = None if norm is None else float(norm)
        return success, norm, zeros

    optimizer.step = step_and_record_norm
    try:
        yield seen
    finally:
        del optimizer.step


class RankDisagreement(ValueError):
    """Ranks disagree on a value that all must share."""


def merge(ranks: list[list[Step]]) -> list[Step]:
    """Join the records of all ranks into one curve.

    Raises:
        RankDisagreement: ranks disagree on a value that all must share, or on the number of steps.
    """
    if len({len(steps) for steps in ranks}) != 1:
        raise RankDisagreement(f"ranks made different numbers of steps: {[len(steps) for steps in ranks]}")
    return [_join([steps[index] for steps in ranks]) for index in range(len(ranks[0]))]


def _join(steps: list[Step]) -> Step:
    curve: Step = {}
    for name in ("iteration", "loss", "grad_norm", "learning_rate", "skipped"):
        values = {step[name] for step in steps if step[name] is not None}
        if name == "grad_norm" and not values and all(step["skipped"] for step in steps):
            values = {None}  # upstream computes no norm in a step that overflows
        elif len(values) != 1 and not (values and all(math.isnan(value) for value in values)):
            raise RankDisagreement(f"step {steps[0]['iteration']}: ranks disagree on {name}: {sorted(values)}")
        curve[name] = values.pop()
    samples = sorted(sample for step in steps for sample in step["samples"])
    curve["tokens"] = sum(step["tokens"] for step in steps)
    curve["samples"] = hashlib.sha256("".join(samples).encode()).hexdigest()
    return curve
