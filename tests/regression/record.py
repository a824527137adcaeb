"""What one training run did, step by step, at full precision: taken from upstream's own `train_step`, never from its log.

(The log prints six digits, and its second line is the mean of steps 1 and 2.)
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Step = dict[str, Any]
FOOD = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


class Tasting:
    """Stand before a data iterator; note what passes."""

    def __init__(self, iterable: Any) -> None:
        self.iterable = iterable
        self.batches: list[dict[str, torch.Tensor]] = []

    def __iter__(self) -> "Tasting":
        return self

    def __next__(self) -> Any:
        batch = next(self.iterable)
        self.batches.append({name: batch[name].clone() for name in FOOD if name in batch})
        return batch

    def take(self) -> list[dict[str, torch.Tensor]]:
        """Return the batches since the last call."""
        batches, self.batches = self.batches, []
        return batches


def sample_hashes(batches: list[dict[str, torch.Tensor]]) -> list[str]:
    """Hash every sample of a step (tokens, labels, mask), whatever the micro-batch it came in."""
    hashes = []
    for batch in batches:
        for row in range(batch["tokens"].shape[0]):
            content = b"".join(batch[name][row].to(torch.int64).numpy().tobytes() for name in FOOD[:3])
            hashes.append(hashlib.sha256(content).hexdigest()[:16])
    return hashes


class Recorder:
    """Wraps `train_step`; `steps` grows by one record per call.

    Args:
        keep_food: keep the batches themselves too, for the oracle (one data-parallel rank).
    """

    def __init__(self, keep_food: bool = False) -> None:
        self.steps: list[Step] = []
        self.food: list[list[dict[str, torch.Tensor]]] = []
        self.keep_food = keep_food
        self._tastings: dict[int, Tasting] = {}

    def wrap(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Return `train_step` with a record made of every call."""

        def recorded(
            forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, *rest: Any, **named: Any
        ) -> Any:
            tasting = self._taste(data_iterator)
            learning_rate = optimizer.param_groups[0]["lr"] if optimizer.param_groups else None
            with exact_norm(optimizer) as norm:
                result = train_step(forward_step, data_iterator, model, optimizer, *rest, **named)
            batches = tasting.take() if tasting else []
            loss = result[0].get("lm loss")
            self.steps.append(
                {
                    "loss": None if loss is None else float(loss),
                    "grad_norm": norm[0],
                    "learning_rate": learning_rate,
                    "skipped": int(result[1]),
                    "tokens": int(sum(batch["loss_mask"].sum() for batch in batches)),
                    "samples": sample_hashes(batches),
                }
            )
            if self.keep_food:
                self.food.append(batches)
            return result

        return recorded

    def _taste(self, data_iterator: Any) -> Tasting | None:
        """Put a `Tasting` before the first chunk's data on a first pipeline stage's reader."""
        from megatron.core import mpu

        first = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        if first is None or mpu.get_pipeline_model_parallel_rank() != 0:
            return None
        tasting = self._tastings.get(id(first))
        if tasting is None:
            tasting = self._tastings[id(first)] = Tasting(first.iterable)
            first.iterable = tasting
        return tasting


@contextmanager
def exact_norm(optimizer: Any) -> Iterator[list[float | None]]:
    """Yield a list whose first entry becomes the gradient norm that `optimizer.step` returns, before upstream rounds it."""
    seen: list[float | None] = [None]
    step = optimizer.step

    def noted() -> Any:
        success, norm, zeros = step()
        seen[0] = None if norm is None else float(norm)
        return success, norm, zeros

    optimizer.step = noted
    try:
        yield seen
    finally:
        del optimizer.step


def merge(ranks: list[list[Step]]) -> list[Step]:
    """Join the records of all ranks into one curve.

    Raises:
        ValueError: ranks disagree on a number that all of them must share, or on the number of steps.
    """
    if len({len(steps) for steps in ranks}) != 1:
        raise ValueError(f"ranks made different numbers of steps: {[len(steps) for steps in ranks]}")
    return [_join(index + 1, [steps[index] for steps in ranks]) for index in range(len(ranks[0]))]


def _join(iteration: int, steps: list[Step]) -> Step:
    curve: Step = {"iteration": iteration}
    for name in ("loss", "grad_norm", "learning_rate", "skipped"):
        values = {step[name] for step in steps if step[name] is not None}
        if len(values) != 1 and not all(value != value for value in values):  # NaN differs from itself
            raise ValueError(f"step {iteration}: ranks disagree on {name}: {sorted(values)}")
        curve[name] = values.pop()
    samples = sorted(sample for step in steps for sample in step["samples"])
    curve["tokens"] = sum(step["tokens"] for step in steps)
    curve["samples"] = hashlib.sha256("".join(samples).encode()).hexdigest()
    return curve
