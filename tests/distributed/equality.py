"""Compare a run with upstream's in float64, where they may differ only by the order of summation."""

from collections.abc import Callable
from typing import Protocol

import numpy

from tests.regression.arm import Run
from tests.regression.record import Step
from tests.regression.snapshot import Snapshot

# Another order of a sum of n terms changes it by at most n eps (2.2e-16 in float64). Behind a loss or a gradient of
# these models are some 1e4 terms (four layers of 700 forward, twice that backward, 1,000 tokens), and a dozen steps
# pass changes on: 3e-11, which leaves a factor of 40 for terms that cancel. One rounding to float32 would be 6e-8.
RELATIVE = 1e-9
MOVES = 0.01  # of its norm: what the weight that moves most must move by, so that equal runs prove something
STEPS = 3  # a first one, one on what that has updated, and after an evaluation one more
SNAPSHOTS = (1, STEPS)
MAIN = "optimizer.state.param."  # copies of the weights, which upstream's plain optimizer has not
Start = Callable[[str], list[str]]


class Equal(Protocol):
    """Trains as arm O and holds the run to arm U on one rank."""

    def __call__(
        self,
        name: str,
        world: int,
        model: str,
        own: str,
        variant: str | None = None,
        theirs: str | None = None,
    ) -> Run:
        """Train, compare, and return the run.

        Args:
            name: what is printed with the measured differences.
            world: ranks of arm O.
            model: flags of both arms, after those of TINY and EVALUATED.
            own: flags of arm O alone.
            variant: what the script does differently, in both arms.
            theirs: upstream's variant, where it is another one.
        """


def worst(ours: list[Step], theirs: list[Step], name: str) -> float:
    """Return the largest difference of one quantity over the steps of two curves, relative to the second."""
    for same in ("iteration", "tokens", "samples", "learning_rate"):
        assert [step[same] for step in ours] == [step[same] for step in theirs]
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(ours, theirs, strict=True))


def assert_steps_equal(ours: list[Step], theirs: list[Step]) -> float:
    """Require losses and norms to agree within 1e-9. Return the largest relative difference."""
    apart = max(worst(ours, theirs, "loss"), worst(ours, theirs, "grad_norm"))
    assert apart <= RELATIVE
    return apart


def assert_equal(run: Run, reference: Run, name: str, tell: Callable[[str], None]) -> None:
    """Require losses and norms to agree within 1e-9, and weights and optimizer states within 1e-8 of their norms.

    A weight of the reference has to move between the two snapshots by the part `MOVES` of its norm.
    """
    assert len(reference.curve) == STEPS
    apart = assert_steps_equal(run.curve, reference.curve)
    tensors = max(distance(run.snapshots[at], reference.snapshots[at]) for at in SNAPSHOTS)
    tell(f"float64  {name}: largest relative difference of losses and norms {apart:.1e}, of tensors {tensors:.1e}")
    assert tensors <= 10 * RELATIVE
    first, last = (reference.snapshots[at].weights for at in SNAPSHOTS)
    norms = {name: float(numpy.linalg.norm(weight)) for name, weight in first.items()}
    assert (
        max(float(numpy.linalg.norm(last[name] - first[name])) / norm for name, norm in norms.items() if norm) > MOVES
    )


def distance(ours: Snapshot, theirs: Snapshot) -> float:
    """Return the largest difference of a weight or an optimizer state, relative to its norm."""
    assert not ours.differing_copies
    mine, yours = ({name: a for name, a in one.tensors.items() if not name.startswith(MAIN)} for one in (ours, theirs))
    assert mine.keys() == yours.keys() and ours.weights and ours.first_moments
    norms = {name: float(numpy.linalg.norm(array)) for name, array in yours.items()}
    return max(float(numpy.linalg.norm(mine[name] - yours[name])) / norm for name, norm in norms.items() if norm)
