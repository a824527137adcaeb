"""A checksum of a tensor, computed where the tensor is, and the search for values that are not finite."""

import io

import torch
from torch import Tensor

BLOCK = 1 << 20  # elements that are processed at a time, so that temporary memory does not depend on the tensor
_MASK = (1 << 64) - 1


def tensor_digest(tensor: Tensor) -> str:
    """Return a checksum of a tensor's bytes, the same on every device.

    It consists of the sum of the 32-bit words and of the sum of the words times their positions, modulo 2^64. It
    notices every change of one word, and words that have changed places.

    Args:
        tensor: of any dtype and device.

    Returns:
        32 hexadecimal digits.
    """
    flat = tensor.detach().reshape(-1)
    # A tensor of one element keeps any stride. A part of a 16-bit buffer may begin within a word.
    if flat.stride() != (1,) or flat.storage_offset() * flat.element_size() % 4:
        flat = flat.clone(memory_format=torch.contiguous_format)
    data = flat.view(torch.uint8)
    words = data.numel() // 4
    total, weighted = _sums(data[: 4 * words].view(torch.int32), 1)
    rest, weighted_rest = _sums(data[4 * words :], words + 1)
    return f"{(total + rest) & _MASK:016x}{(weighted + weighted_rest) & _MASK:016x}"


def bytes_digest(data: bytes | memoryview) -> str:
    """Return the checksum of bytes, see `tensor_digest`."""
    if len(data) == 0:
        return "0" * 32
    return tensor_digest(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def value_digest(value: Tensor | io.BytesIO) -> str:
    """Return the checksum of a tensor, or of the bytes of a serialized object."""
    return bytes_digest(value.getbuffer()) if isinstance(value, io.BytesIO) else tensor_digest(value)


def _sums(words: Tensor, first: int) -> tuple[int, int]:
    """Return the sum of integers, and the sum of integers times their positions, which begin at `first`."""
    total = weighted = 0
    for start in range(0, words.numel(), BLOCK):
        block = words[start : start + BLOCK].to(torch.int64)
        at = torch.arange(first + start, first + start + block.numel(), dtype=torch.int64, device=words.device)
        total += int(block.sum())
        weighted += int((block * at).sum())
    return total, weighted


def first_not_finite(tensor: Tensor) -> tuple[tuple[int, ...], float] | None:
    """Return the index and the value of the first element that is NaN or infinite, or None if there is none.

    Args:
        tensor: of any shape; integers and 8-bit floats are not searched.

    Returns:
        Index with one number per dimension, and the value; None if all elements are finite.
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return None
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), BLOCK):
        block = flat[start : start + BLOCK]
        wrong = ~torch.isfinite(block)
        if bool(wrong.any()):
            at = start + int(wrong.nonzero()[0])
            index = tuple(int(place) for place in torch.unravel_index(torch.tensor(at), tensor.shape))
            return index, float(flat[at])
    return None
