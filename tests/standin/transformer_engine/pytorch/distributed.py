"""Names that upstream imports; its own functions serve where there is no FP8."""

from typing import Any


class CudaRNGStatesTracker:
    """Upstream derives a class from it, which --te-rng-tracker asks for."""

    def __init__(self) -> None:
        raise NotImplementedError("give no --te-rng-tracker")


def activation_recompute_forward(**_: Any) -> Any:
    """Refuse: upstream asks for it where layers in FP8 are recomputed."""
    raise NotImplementedError("FP8 needs a GPU")
