"""When upstream falls back on PyTorch's own kernels: neither TransformerEngine nor apex can be imported."""

from importlib.util import find_spec
from typing import Any


def no_fused_norm(args: Any) -> bool:
    """Whether the local spec's norm is PyTorch's (upstream asks for apex alone)."""
    return find_spec("apex") is None


def no_fused_adam(args: Any) -> bool:
    """Whether the optimizer is PyTorch's (upstream asks for TransformerEngine, then apex)."""
    return find_spec("transformer_engine") is None and find_spec("apex") is None
