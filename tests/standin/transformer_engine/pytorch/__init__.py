"""Modules in TransformerEngine's place."""

from . import distributed, fp8, router, tensor
from .attention import DotProductAttention
from .module import GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
    "router",
    "tensor",
]
