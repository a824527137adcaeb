"""When upstream falls back on PyTorch's own kernels: neither TransformerEngine nor apex can be imported."""

from importlib.util import find_spec
from typing import Any


def no_fused_norm(args: Any) -> bool:
    """Return whether the norm of the local spec is PyTorch's. Upstream looks for apex only."""
    return find_spec("apex") is None


def no_fused_adam(args: Any) -> bool:
    """Return whether the optimizer is PyTorch's. Upstream looks for TransformerEngine, then for apex."""
    return find_spec("transformer_engine") is None and find_spec("apex") is None
