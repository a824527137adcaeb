"""Data preparation: text or jsonl to upstream's `.bin/.idx`; planning here imports neither torch nor megatron.core."""


class DataError(ValueError):
    """An input, an option or an existing output that preparation refuses: what, where and what to do."""
