"""Record on the device whether gradients are finite, and find out later where they are not.

A NaN in one gradient makes the sums over all ranks NaN, and it stays in the sum over micro-batches. So norms are taken
where the origin is still known: of every bucket before it is reduced, and of all buckets after each micro-batch. The
device compares them, and the host reads the result once per step. Only if one is not finite, single parameters are
examined. Until then nothing is done for each parameter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Turn = tuple[int, int]  # virtual stage, micro-batch


@dataclass(frozen=True)
class _Norm:
    """Norms of the gradients of one model chunk of this rank."""

    chunk: int
    microbatch: int | None  # None: `value` has one element for each micro-batch, and otherwise one for each bucket
    value: Tensor


@dataclass(frozen=True)
class NonFinite:
    """What is not finite on one rank.

    Attributes:
        rank: global rank.
        stage: pipeline stage of the rank.
        loss_microbatch: first micro-batch whose loss is not finite.
        microbatch: first micro-batch after which a gradient is not finite, before gradients are reduced.
        params: parameters, in the order of the model, whose gradient is not finite now.
        counts: number of elements that are not finite, for each of these parameters.
    """

    rank: int
    stage: int
    loss_microbatch: int | None
    microbatch: int | None
    params: tuple[str, ...]
    counts: tuple[int, ...]


class GradientRecord:
    """The norms of one step on this rank."""

    def __init__(self) -> None:
        self._chunks: list[Any] = []
        self._places: dict[int, int] = {}  # id of a bucket group -> index of its model chunk
        self._norms: list[_Norm] = []
        self._microbatches = 0
        self._order: Sequence[Turn] = ()
        self._calls = 0

    def begin(self, chunks: list[Any], microbatches: int, order: Sequence[Turn] = ()) -> None:
        """Begin a step.

        Args:
            chunks: data-parallel wrappers of this rank's model chunks.
            microbatches: micro-batches of the step.
            order: for upstream's schedules, chunk and micro-batch of each backward, in order.
        """
        self._chunks, self._microbatches, self._order, self._calls = chunks, microbatches, order, 0
        self._places = {id(group): index for index, chunk in enumerate(chunks) for group in _groups(chunk)}
        self._norms.clear()

    def after_backward(self) -> None:
        """Record after a backward of upstream's schedules."""
        if self._calls < len(self._order):
            self.after_microbatch(*self._order[self._calls])
        self._calls += 1

    def after_microbatch(self, chunk: int, microbatch: int) -> None:
        """Record the gradients of a chunk once a micro-batch is added to them.

        After the last one they may be in communication already; `before_reduction` has recorded them then.

        Args:
            chunk: index of the model chunk.
            microbatch: index of the micro-batch in the step.
        """
        if microbatch == self._microbatches - 1:
            return
        groups = [group for group in _groups(self._chunks[chunk]) if not _reduces_each_microbatch(group)]
        tensors = [bucket.grad_data for group in groups for bucket in group.buckets]
        self._add(chunk, microbatch, tensors)

    def before_reduction(self, group: Any) -> None:
        """Record a bucket group whose reduction is about to start; upstream's `check_grads` is called there."""
        chunk = self._places.get(id(group))
        if chunk is None:
            return
        tensors = [bucket.grad_data for bucket in group.buckets]
        if _reduces_each_microbatch(group):  # these are norms, one for each micro-batch
            self._norms += [_Norm(chunk, None, tensor.detach()) for tensor in tensors]
        else:
            self._add(chunk, self._microbatches - 1, tensors)

    def own(self) -> list[Tensor]:
        """Return the norms of this rank's own gradients: of each micro-batch, before they are reduced.

        Returns:
            Tensors of any shape, on the device of the gradients.
        """
        return [one.value for one in self._norms]

    def reduced(self) -> list[Tensor]:
        """Return the norms of the reduced gradients: a sum of finite numbers may overflow.

        Returns:
            Tensors of any shape, on the device of the gradients.
        """
        groups = [group for chunk in self._chunks for group in _groups(chunk)]
        tensors = [tensor for group in groups for tensor in _reduced(group)]
        return [_norms_of(tensors)] if tensors else []

    def find(self, losses: Sequence[Tensor], rank: int, stage: int) -> NonFinite:
        """Find what is not finite on this rank. The host waits for the device, for each parameter.

        Args:
            losses: sums of losses of this rank's micro-batches, in their order.
            rank, stage: of this rank.
        """
        found = [(name, _bad_elements(grad)) for name, grad in _gradients(self._chunks)]
        bad = [(name, count) for name, count in found if count]
        bad_losses = [index for index, loss in enumerate(losses) if _bad_elements(loss)]
        params, counts = tuple(name for name, _ in bad), tuple(count for _, count in bad)
        return NonFinite(rank, stage, min(bad_losses, default=None), self._first_microbatch(), params, counts)

    def _first_microbatch(self) -> int | None:
        bad = []
        for one in self._norms:
            for place in (~torch.isfinite(one.value.reshape(-1))).nonzero().reshape(-1).tolist():
                bad.append(place if one.microbatch is None else one.microbatch)
        return min(bad, default=None)

    def _add(self, chunk: int, microbatch: int, tensors: list[Tensor]) -> None:
        if tensors:
            self._norms.append(_Norm(chunk, microbatch, _norms_of(tensors)))


def _groups(chunk: Any) -> list[Any]:
    """Return the bucket groups of a wrapper. Megatron-FSDP, which has none, checks gradients itself."""
    return [*getattr(chunk, "bucket_groups", ()), *getattr(chunk, "expert_parallel_bucket_groups", ())]


def _reduces_each_microbatch(group: Any) -> bool:
    return bool(getattr(group, "reduces_each_microbatch", False))


def _reduced(group: Any) -> list[Tensor]:
    """Return the gradients of a bucket group that the optimizer reads, as one tensor for each bucket.

    The buckets hold what parameters refer to as `main_grad`, one after the other.
    """
    if _reduces_each_microbatch(group):
        return [group.grads.owned] if group.grads.owned.numel() else []
    return [bucket.grad_data for bucket in group.buckets]


def _gradients(chunks: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and accumulated gradient of each trained parameter, in the order of the model."""
    for chunk in chunks:
        if not _groups(chunk):
            continue
        for name, param in chunk.named_parameters():
            grad = getattr(param, "main_grad", None)
            if param.requires_grad and grad is not None:
                yield name.replace("module.", ""), grad


def largest(values: Sequence[Tensor]) -> Tensor | None:
    """Return the largest of the absolute values, NaN or infinite if one of them is; None: there are no values.

    Args:
        values: tensors of any shape and dtype, on one device.

    Returns:
        Scalar tensor, float32.
    """
    flat = [value.detach().reshape(-1).float() for value in values if value.numel()]
    return torch.cat(flat).abs().max() if flat else None


def _norms_of(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norm of each tensor, as upstream's check does. Other norms are not vectorized on CPUs."""
    norms = [norm.float() for norm in torch._foreach_norm(tensors, 2)]  # buckets may have unlike dtypes
    return norms[0] if len(norms) == 1 else torch.stack(norms)


def _bad_elements(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


def describe(findings: Sequence[NonFinite], step: int) -> str:
    """Say which rank, parameter and micro-batch a non-finite gradient comes from.

    Args:
        findings: of all ranks.
        step: number of the step, from 1.
    """
    losses = [one for one in findings if one.loss_microbatch is not None]
    origins = [one for one in findings if one.microbatch is not None]
    head = f"step {step}: a gradient is not finite (NaN or Inf)."
    if losses:
        first = min(losses, key=lambda one: (one.loss_microbatch, one.rank))
        where = f"The loss of micro-batch {first.loss_microbatch} is not finite on rank {first.rank}"
        return f"{head} {where}, so the forward pass computed it. {_others(losses, first)}{_params(findings, first)}"
    if not origins:
        # The first parameter that has it says most; any rank may hold the sum.
        first = next(one for one in findings if one.params) if any(one.params for one in findings) else findings[0]
        return (
            f"{head} All ranks' own gradients are finite, so their sum overflowed or was damaged in communication. "
            f"{_params(findings, first)}"
        )
    # A backward runs from the last stage to the first, and a NaN spreads along it.
    first = min(origins, key=lambda one: (one.microbatch, -one.stage, one.rank))
    where = f"It first appeared on rank {first.rank} (pipeline stage {first.stage}) in micro-batch {first.microbatch}"
    return f"{head} {where}. {_others(origins, first)}{_params(findings, first)}"


def _others(found: Sequence[NonFinite], first: NonFinite) -> str:
    ranks = [str(one.rank) for one in found if one is not first]
    return f"Ranks {', '.join(ranks[:16])} have it too. " if ranks else ""


def _params(findings: Sequence[NonFinite], first: NonFinite) -> str:
    """Name the parameter next to the origin: the last one in the model, since a backward runs towards the first."""
    holders = [one for one in findings if one.params]
    own = first if first.params else next((one for one in holders if one.stage == first.stage), None)
    own = own or next(iter(holders), None)
    if own is None:
        return "No parameter holds it any more."
    others = f"; {len(own.params) - 1} parameters before it too" if len(own.params) > 1 else ""
    return f"Parameter {own.params[-1]} has {own.counts[-1]:,} such elements on rank {own.rank}{others}."
