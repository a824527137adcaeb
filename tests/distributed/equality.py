"""How equal a run has to be to upstream's own, in float64: by reassociation alone."""

from collections.abc import Callable

import numpy

from tests.regression.arm import Run
from tests.regression.snapshot import Snapshot

# Another order of a sum of n terms changes it by at most n eps (2.2e-16 in float64). Behind a loss or a gradient of
# these models are some 1e4 terms (four layers of 700 forward, twice that backward, 1,000 tokens), and a dozen steps
# pass changes on: 3e-11, which leaves a factor of 40 for terms that cancel. One rounding to float32 would be 6e-8.
RELATIVE = 1e-9
STEPS = 3  # a first one, one on what that has updated, and after an evaluation one more
SNAPSHOTS = (1, STEPS)
Start = Callable[[str], list[str]]


def worst(run: Run, reference: Run, name: str) -> float:
    """Return the largest difference of one quantity over the steps, relative to the reference."""
    assert len(run.curve) == len(reference.curve) == STEPS
    assert [step["tokens"] for step in run.curve] == [step["tokens"] for step in reference.curve]
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(run.curve, reference.curve, strict=True))


def assert_equal(run: Run, reference: Run, name: str, tell: Callable[[str], None], learns: float = 0.1) -> None:
    """Hold losses and norms to 1e-9, every gradient (Adam's first moments) and weight to 1e-8 of its norm.

    The reference's loss has to fall by `learns`.
    """
    loss, norm = worst(run, reference, "loss"), worst(run, reference, "grad_norm")
    tensors = max(_tensors(run.snapshots[at], reference.snapshots[at]) for at in SNAPSHOTS)
    figures = f"loss {loss:.1e}, norm {norm:.1e}, gradient {tensors:.1e}"
    tell(f"float64  {name}: largest relative difference of {figures}")
    assert max(loss, norm) <= RELATIVE
    assert tensors <= 10 * RELATIVE
    assert reference.curve[-1]["loss"] < reference.curve[0]["loss"] - learns


def _tensors(ours: Snapshot, theirs: Snapshot) -> float:
    assert not ours.torn
    pairs = [(ours.weights, theirs.weights), (ours.first_moments, theirs.first_moments)]
    errors = []
    for mine, yours in pairs:
        assert mine.keys() == yours.keys() and mine
        norms = {name: float(numpy.linalg.norm(array)) for name, array in yours.items()}
        errors += [float(numpy.linalg.norm(mine[name] - yours[name])) / norm for name, norm in norms.items() if norm]
    return max(errors)
