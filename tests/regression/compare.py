"""Compare arm O with arm U in every step and every tensor. All functions are pure.

Every check has a ratio of error to tolerance and passes if it is at most 1. The ratio of an exact check is 0 or BROKEN.
docs/regression.md explains the classes of equality.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy

from tests.regression.record import Step
from tests.regression.snapshot import Array, Snapshot

BROKEN = 1e99  # ratio of a failed exact check; finite, because JSON has no infinity
NUMBERS = ("loss", "grad_norm")
EXACT = ("iteration", "learning_rate", "tokens", "samples", "skipped")
# Another order of summation changes a sum of n terms by at most n eps (eps is 2.2e-16 in float64). A loss or a gradient
# of these models sums some 1e4 terms (four layers of 700 forward, twice that backward, 1,000 tokens), and a dozen steps
# add up: 3e-11. This leaves a factor of 40 for terms that cancel. One rounding to float32 would be 6e-8.
LOSS_TOLERANCE = 1e-9  # relative, float64
TENSOR_TOLERANCE = 1e-8  # of the tensor's norm, float64
Kind = Literal["weights", "first_moments"]


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what is compared.
        ratio: error over tolerance.
        detail: where the error is largest, or what is wrong.
    """

    name: str
    ratio: float
    detail: str

    def __post_init__(self) -> None:
        if not self.ratio <= BROKEN:  # NaN too
            object.__setattr__(self, "ratio", BROKEN)

    @property
    def passed(self) -> bool:
        """Return whether the error is within the tolerance."""
        return self.ratio <= 1.0


@dataclass(frozen=True)
class Evidence:
    """The part of a run that is compared: its curve, and its snapshots by iteration."""

    curve: Sequence[Step]
    snapshots: Mapping[int, Snapshot] = field(default_factory=dict)


class Rules(Protocol):
    """The rules of one class of equality."""

    def numbers(self, name: str, theirs: Sequence[float], ours: Sequence[float]) -> list[Check]:
        """Compare losses or gradient norms, one per step."""

    def tensors(self, kind: Kind, at: int, theirs: Mapping[str, Array], ours: Mapping[str, Array]) -> list[Check]:
        """Compare weights or first moments of one iteration."""


class Bitwise:
    """Class E0: the same bits."""

    def numbers(self, name: str, theirs: Sequence[float], ours: Sequence[float]) -> list[Check]:
        """See Rules."""
        return [bitwise(name, theirs, ours)]

    def tensors(self, kind: Kind, at: int, theirs: Mapping[str, Array], ours: Mapping[str, Array]) -> list[Check]:
        """See Rules."""
        return [bitwise_tensors(f"{kind} at {at}", theirs, ours)]


class Reassociated:
    """Class E1 in float64: only the order of summation differs."""

    def numbers(self, name: str, theirs: Sequence[float], ours: Sequence[float]) -> list[Check]:
        """See Rules."""
        return [close(name, theirs, ours)]

    def tensors(self, kind: Kind, at: int, theirs: Mapping[str, Array], ours: Mapping[str, Array]) -> list[Check]:
        """See Rules."""
        return [close_tensors(f"{kind} at {at}", theirs, ours)]


def broken(name: str, detail: str) -> Check:
    """Return a failed exact check."""
    return Check(name, BROKEN, detail)


def compare(reference: Evidence, candidate: Evidence, steps: int, at: Sequence[int], rules: Rules) -> list[Check]:
    """Compare every step and every snapshot.

    Args:
        reference: arm U.
        candidate: arm O.
        steps: number of steps that both must have made.
        at: iterations of which both must have snapshots. Weights are compared in the last one.
        rules: the rules of a class.

    Returns:
        The checks. If a run is incomplete, only its faults are returned, because nothing else could be trusted.
    """
    flaws = [*whole("U", reference, steps, at), *whole("O", candidate, steps, at)]
    if flaws:
        return flaws
    checks = [_same(name, reference.curve, candidate.curve) for name in EXACT]
    for name in NUMBERS:
        checks += rules.numbers(name, [s[name] for s in reference.curve], [s[name] for s in candidate.curve])
    for iteration in at:
        ours, theirs = candidate.snapshots[iteration], reference.snapshots[iteration]
        checks.append(_replicas(iteration, ours))
        checks += rules.tensors("first_moments", iteration, theirs.first_moments, ours.first_moments)
        if iteration == at[-1]:
            checks += rules.tensors("weights", iteration, theirs.weights, ours.weights)
    return checks


def agrees_with_oracle(curve: Sequence[Mapping[str, Any]], last: Snapshot, reference: Evidence) -> list[Check]:
    """Compare arm X's curve and last tensors with arm U's, in float64.

    X computes its own learning rate and counts its own tokens. It has no record of samples, because it uses those of U.
    """
    steps = len(reference.curve)
    flaws = whole("U", reference, steps, [steps])
    if flaws or len(curve) != steps:
        return flaws or [broken("arm X is whole", f"wanted {steps} steps, found {len(curve)}")]
    rules, theirs = Reassociated(), reference.snapshots[steps]
    checks = [_same("tokens", reference.curve, curve)]
    for name in (*NUMBERS, "learning_rate"):
        checks += rules.numbers(name, [s[name] for s in reference.curve], [s[name] for s in curve])
    checks += rules.tensors("first_moments", steps, theirs.first_moments, last.first_moments)
    checks += rules.tensors("weights", steps, theirs.weights, last.weights)
    return [Check(f"oracle: {check.name}", check.ratio, check.detail) for check in checks]


def whole(arm: str, evidence: Evidence, steps: int, at: Sequence[int]) -> list[Check]:
    """Return the faults that make a run incomparable: missing steps or snapshots, NaN, Inf, skipped steps."""
    found = [step["iteration"] for step in evidence.curve]
    if found != list(range(1, steps + 1)):
        return [broken(f"arm {arm} is whole", f"wanted steps 1 to {steps}, found {found}")]
    flaws = []
    for step in evidence.curve:
        for name in (*NUMBERS, "learning_rate"):
            if step[name] is None or not math.isfinite(step[name]):
                flaws.append(broken(f"arm {arm} is finite", f"{name} is {step[name]} in step {step['iteration']}"))
        if step["skipped"]:
            flaws.append(broken(f"arm {arm} skips nothing", f"step {step['iteration']} was skipped"))
    for iteration in at:
        snapshot = evidence.snapshots.get(iteration)
        if snapshot is None or not snapshot.weights or not snapshot.first_moments:
            flaws.append(broken(f"arm {arm} is whole", f"no weights and first moments of iteration {iteration}"))
            continue
        bad = [name for name, tensor in snapshot.tensors.items() if not numpy.isfinite(tensor).all()]
        if bad:
            flaws.append(broken(f"arm {arm} is finite", f"NaN or Inf at iteration {iteration} in {', '.join(bad)}"))
    return flaws


def learned(arm: str, curve: Sequence[Step], margin: float) -> Check:
    """Check that the loss fell by `margin` from the first step to the mean of the last three."""
    if not curve or any(step["loss"] is None or not math.isfinite(step["loss"]) for step in curve):
        return broken(f"arm {arm} learns", "there is no finite loss of every step")
    last = [step["loss"] for step in curve[-3:]]
    fell = curve[0]["loss"] - sum(last) / len(last)
    ratio = margin / fell if fell > 0 else BROKEN
    return Check(f"arm {arm} learns", 0.0 if ratio <= 1 else ratio, f"loss fell by {fell:.3f}, wanted {margin}")


def _same(name: str, theirs: Sequence[Step], ours: Sequence[Mapping[str, Any]]) -> Check:
    for u, o in zip(theirs, ours, strict=True):
        if u[name] != o[name]:
            return broken(name, f"step {u['iteration']}: U has {u[name]}, O has {o[name]}")
    return Check(name, 0.0, "equal in every step")


def _replicas(iteration: int, snapshot: Snapshot) -> Check:
    name = f"replicas at {iteration}"
    if snapshot.differing_copies:
        return broken(name, f"ranks hold different copies of {', '.join(snapshot.differing_copies)}")
    return Check(name, 0.0, "all ranks hold the same copies")


def bitwise(name: str, theirs: Sequence[float], ours: Sequence[float]) -> Check:
    """Class E0, numbers: the same bits."""
    for index, (u, o) in enumerate(zip(theirs, ours, strict=True)):
        if float(u).hex() != float(o).hex():
            return broken(name, f"step {index + 1}: U {float(u).hex()}, O {float(o).hex()}")
    return Check(name, 0.0, "same bits in every step")


def bitwise_tensors(name: str, theirs: Mapping[str, Array], ours: Mapping[str, Array]) -> Check:
    """Class E0, tensors: the same bits."""
    flaw = _names_and_shapes(name, theirs, ours)
    if flaw:
        return flaw
    for key, u in theirs.items():
        if u.dtype != ours[key].dtype or u.tobytes() != ours[key].tobytes():
            worst = float(numpy.abs(u - ours[key]).max())
            return broken(name, f"{key} differs by up to {worst:.3g}")
    return Check(name, 0.0, f"same bits in {len(theirs)} tensors")


def close(name: str, theirs: Sequence[float], ours: Sequence[float]) -> Check:
    """Class E1 in float64, numbers: a relative difference of at most LOSS_TOLERANCE in every step."""
    worst, where = -1.0, 0
    for index, (u, o) in enumerate(zip(theirs, ours, strict=True)):
        difference = relative(abs(u - o), abs(u))
        if not difference <= worst:
            worst, where = difference, index + 1
    return Check(name, worst / LOSS_TOLERANCE, f"largest relative difference {worst:.2e}, in step {where}")


def close_tensors(name: str, theirs: Mapping[str, Array], ours: Mapping[str, Array]) -> Check:
    """Class E1 in float64, tensors: a difference of at most TENSOR_TOLERANCE of each tensor's norm."""
    flaw = _names_and_shapes(name, theirs, ours)
    if flaw:
        return flaw
    errors = relative_errors(theirs, ours)
    key = max(errors, key=lambda k: math.inf if math.isnan(errors[k]) else errors[k])
    return Check(name, errors[key] / TENSOR_TOLERANCE, f"largest difference {errors[key]:.2e} of the norm of {key}")


def relative(error: float, size: float) -> float:
    """Return error / size; where the size is 0, no error is small enough but 0."""
    if size == 0:
        return 0.0 if error == 0 else BROKEN
    return error / size


def relative_errors(theirs: Mapping[str, Array], ours: Mapping[str, Array], tail: float = 0.0) -> dict[str, float]:
    """Return per tensor the norm of the difference over the norm of the first.

    Args:
        theirs: the tensors.
        ours: those to compare with them.
        tail: share of the elements that is left out of the difference, those where it is largest, rounded up.
    """
    errors = {}
    for key, u in theirs.items():
        difference = numpy.abs(ours[key] - u).ravel()
        if tail and numpy.isfinite(difference).all():
            difference = numpy.sort(difference)[: difference.size - math.ceil(tail * difference.size)]
        errors[key] = relative(float(numpy.linalg.norm(difference)), float(numpy.linalg.norm(u)))
    return errors


def _names_and_shapes(name: str, theirs: Mapping[str, Array], ours: Mapping[str, Array]) -> Check | None:
    if not theirs or set(theirs) != set(ours):
        odd = sorted(set(theirs) ^ set(ours)) or ["nothing at all"]
        return broken(name, f"the arms do not hold the same tensors: {', '.join(odd)}")
    for key, u in theirs.items():
        if u.shape != ours[key].shape:
            return broken(name, f"{key} is {u.shape} in U and {ours[key].shape} in O")
    return None
