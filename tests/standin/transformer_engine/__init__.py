"""In TransformerEngine's place on a CPU: its public names that upstream's layers use, computed by plain PyTorch.

Parameters are those of TransformerEngine's own classes, in `tests/standin/signatures.json`. What this package does not
compute (tensor parallelism, FP8, dropout) it refuses.
"""

from . import common, pytorch

__all__ = ["__version__", "common", "pytorch"]
__version__ = "2.16.1"
