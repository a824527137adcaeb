"""Long-sequence training systems on upstream Megatron; `megatron.core` and `megatron.training` come from its wheel."""

__version__ = "0.1.0"
