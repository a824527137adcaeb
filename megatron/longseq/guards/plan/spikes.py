"""Score a loss against the losses before it, by median and median absolute deviation (MAD).

Both are robust: up to half of the window may be spikes without moving them much. So a spike is added to the window like
any other loss, and a loss that stays high becomes the new normal after half a window.
"""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

SIGMA = 1.4826  # standard deviation of normally distributed values, divided by their MAD
FLOOR = 1e-3  # smallest scale, as a part of the median: losses that hardly vary would make any change a spike


def robust_score(value: float, values: Iterable[float]) -> float:
    """Return how many robust standard deviations a value lies above the median of others.

    Args:
        value: the new value.
        values: the values before it, at least one.

    Returns:
        The score, negative below the median, NaN if `value` is NaN.
    """
    values = list(values)
    middle = median(values)
    scale = max(SIGMA * median(abs(one - middle) for one in values), FLOOR * abs(middle), math.ulp(1.0))
    return (value - middle) / scale


class LossHistory:
    """The last losses of a run.

    Args:
        window: number of losses to keep. None is scored before half of the window is filled.
        losses: losses of an earlier run that this one continues.
    """

    def __init__(self, window: int, losses: Iterable[float] = ()) -> None:
        self.window = window
        self.losses = deque(losses, maxlen=window)

    def add(self, loss: float) -> float | None:
        """Add the loss of a step.

        Args:
            loss: a finite loss, or one that is not, which is not kept.

        Returns:
            Its score against the losses before it, or None if there are too few.
        """
        score = robust_score(loss, self.losses) if 2 * len(self.losses) >= self.window else None
        if math.isfinite(loss):
            self.losses.append(loss)
        return score

    @property
    def middle(self) -> float:
        """Median of the losses."""
        return median(self.losses)
