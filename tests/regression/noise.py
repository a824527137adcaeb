"""Compare runs in single and half precision with a noise floor that is measured in the same run.

The floor is the difference between U and U with another order of the same sums (another micro-batch size or layout). No
constant was fitted: `FACTOR` is a choice of design, and the rest is statistics.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy
from numpy.typing import NDArray

from tests.regression.compare import Check, Evidence, Kind, broken, relative, relative_errors
from tests.regression.snapshot import Array

FACTOR = 3.0
ULPS = 4.0  # smallest floor; a floor below the rounding of the numbers is accidental
# Share of a tensor's elements that the floor of weights leaves out. Where an element's gradient is almost zero, Adam
# divides rounding by rounding: one of 32,768 elements can hold 90% of the square of a difference. Its first moment,
# which is linear in the gradients, is judged together with all others.
TAIL = 1e-3
EPSILON = 2.0**-23  # of float32, which holds losses, norms, moments and main weights even with bf16
# Two-sided 99% quantiles of Student's t, because the standard error of few samples is uncertain.
STUDENT = {1: 63.66, 2: 9.92, 3: 5.84, 4: 4.60, 5: 4.03, 6: 3.71, 7: 3.50, 8: 3.36, 9: 3.25, 10: 3.17, 12: 3.05}
FEWEST_SEEDS = 3
Curve = Sequence[float]


@dataclass(frozen=True)
class Floor:
    """Several curves of U for the same training.

    Args:
        reference: arm U.
        others: U in other orders of summation.
    """

    reference: Curve
    others: Sequence[Curve]

    def __post_init__(self) -> None:
        if not self.others:
            raise ValueError("a noise floor needs at least one more run of U")

    def differences(self) -> list[NDArray[numpy.float64]]:
        """Return the difference of each other run from the reference, per step."""
        return [numpy.subtract(other, self.reference) for other in self.others]

    def band(self) -> NDArray[numpy.float64]:
        """Return the largest difference up to each step, because the noise grows with the steps."""
        seen = numpy.maximum.accumulate(numpy.abs(self.differences()).max(axis=0))
        return cast(NDArray[numpy.float64], numpy.maximum(seen, ULPS * EPSILON * numpy.abs(self.reference)))


def within_noise(name: str, floor: Floor, ours: Curve) -> Check:
    """Class E1 in float32: each step differs by at most FACTOR times the floor's band."""
    difference = numpy.subtract(ours, floor.reference)
    ratios = numpy.abs(difference) / (FACTOR * floor.band())
    where = int(numpy.argmax(numpy.where(numpy.isnan(ratios), numpy.inf, ratios)))
    return Check(
        name,
        float(ratios[where]),
        f"step {where + 1}: differs by {difference[where]:.2e}, floor {floor.band()[where]:.2e}",
    )


def without_trend(name: str, floor: Floor, ours: Curve) -> Check:
    """Class E1 in float32: the slope of the differences is within FACTOR times the floor's slope or its error."""
    slope, _ = line(numpy.subtract(ours, floor.reference))
    lines = [line(difference) for difference in floor.differences()]
    smallest = ULPS * EPSILON * float(numpy.abs(floor.reference).mean()) / len(floor.reference)
    allowed = FACTOR * max(smallest, *(max(abs(s), error) for s, error in lines))
    return Check(f"{name}, trend", abs(slope) / allowed, f"slope {slope:.2e} per step, allowed {allowed:.2e}")


def line(values: Curve | NDArray[numpy.float64]) -> tuple[float, float]:
    """Return the least-squares slope per step and its standard error."""
    y = numpy.asarray(values, float)
    x = numpy.arange(len(y)) - (len(y) - 1) / 2
    spread = float((x**2).sum())
    slope = float((x * y).sum()) / spread
    rest = y - y.mean() - slope * x
    return slope, math.sqrt(float((rest**2).sum()) / max(1, len(y) - 2) / spread)


def tensors_within_noise(
    name: str,
    reference: Mapping[str, Array],
    others: Sequence[Mapping[str, Array]],
    ours: Mapping[str, Array],
    tail: float = 0.0,
) -> Check:
    """Each tensor differs by at most FACTOR times the floor of that tensor or the average floor of all tensors.

    Args:
        name: of the check.
        reference: tensors of arm U.
        others: tensors of U in other orders of summation.
        ours: tensors of arm O.
        tail: share of each tensor's elements that is left out, those with the largest differences, rounded up.
    """
    if not reference or set(reference) != set(ours):
        return broken(name, f"the arms do not hold the same tensors: {sorted(set(reference) ^ set(ours))}")
    errors = relative_errors(reference, ours, tail)
    floors = [relative_errors(reference, other, tail) for other in others]
    average = max(math.sqrt(sum(e**2 for e in floor.values()) / len(floor)) for floor in floors)
    allowed = {key: FACTOR * max(ULPS * EPSILON, average, *(floor[key] for floor in floors)) for key in reference}
    ratios = {key: relative(errors[key], allowed[key]) for key in reference}
    key = max(ratios, key=lambda k: math.inf if math.isnan(ratios[k]) else ratios[k])
    return Check(name, ratios[key], f"{key} differs by {errors[key]:.2e} of its norm, allowed {allowed[key]:.2e}")


@dataclass(frozen=True)
class Noisy:
    """Rules of class E1 in float32.

    Args:
        others: runs of U in other orders of summation.
    """

    others: Sequence[Evidence]

    def numbers(self, name: str, theirs: Curve, ours: Curve) -> list[Check]:
        """See compare.Rules."""
        steps = len(theirs)
        floor = Floor(theirs, [[step[name] for step in other.curve[:steps]] for other in self.others])
        return [within_noise(name, floor, ours), without_trend(name, floor, ours)]

    def tensors(self, kind: Kind, at: int, theirs: Mapping[str, Array], ours: Mapping[str, Array]) -> list[Check]:
        """See compare.Rules."""
        others = [getattr(other.snapshots[at], kind) for other in self.others]
        tail = TAIL if kind == "weights" else 0.0
        return [tensors_within_noise(f"{kind} at {at}", theirs, others, ours, tail)]


@dataclass(frozen=True)
class Paired(Noisy):
    """Rules of class E2: tensors as in Noisy, and curves over all seeds together by `unbiased`."""

    def numbers(self, name: str, theirs: Curve, ours: Curve) -> list[Check]:
        """See compare.Rules. No number is judged by one seed alone."""
        return []


def unbiased(name: str, floors: Sequence[Floor], ours: Sequence[Curve]) -> list[Check]:
    """Class E2: compare paired differences over several seeds.

    Args:
        name: what is compared.
        floors: one per seed.
        ours: arm O's curve per seed.

    Returns:
        Two checks. Mean: the mean difference over all seeds and steps is within Student's 99% of the standard error of
        the floor's means, whose expectation is 0. Size: no step differs by more than FACTOR times the largest
        difference in the floor of all seeds.
    """
    if len(floors) < FEWEST_SEEDS or len(floors) != len(ours):
        return [broken(name, f"class E2 needs {FEWEST_SEEDS} seeds in both arms, has {len(floors)} and {len(ours)}")]
    pairs = [numpy.subtract(curve, floor.reference) for floor, curve in zip(floors, ours, strict=True)]
    noise = [difference for floor in floors for difference in floor.differences()]
    mean = float(numpy.mean([pair.mean() for pair in pairs]))
    squares = [float(difference.mean()) ** 2 for difference in noise]
    error = math.sqrt(sum(squares) / len(squares) / len(pairs))
    allowed = student(len(noise)) * error
    size, largest = max(float(abs(p).max()) for p in pairs), FACTOR * max(float(abs(d).max()) for d in noise)
    return [
        Check(f"{name}, mean", relative(abs(mean), allowed), f"mean {mean:.2e}, allowed {allowed:.2e}"),
        Check(f"{name}, size", relative(size, largest), f"largest {size:.2e}, allowed {largest:.2e}"),
    ]


def student(samples: int) -> float:
    """Return the 99% quantile of Student's t for a number of samples of known mean."""
    return STUDENT[max(n for n in STUDENT if n <= samples)]
