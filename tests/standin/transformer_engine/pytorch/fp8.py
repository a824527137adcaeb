"""FP8 is off."""

from typing import Any


class FP8GlobalStateManager:
    """Says that FP8 is off."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Return whether linear layers compute in FP8."""
        return False


def fp8_autocast(enabled: bool = True, **_: Any) -> Any:
    """Refuse."""
    raise NotImplementedError("FP8 needs a GPU")


def fp8_model_init(enabled: bool = True, **_: Any) -> Any:
    """Refuse."""
    raise NotImplementedError("FP8 needs a GPU")
