"""The base class of quantized tensors, of which there are none here."""

import torch


class QuantizedTensor(torch.Tensor):
    """Upstream asks whether parameters are instances of it."""
