"""Bytes that KV caches hold, now and at most."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.longseq.attention.runtime.kv_cache import SegmentKVCache
from tests.regression.planted import wrapped


def held_bytes(cache: SegmentKVCache) -> int:
    """Return the bytes of all keys, values and sums of gradients."""
    groups = (group for layer in cache._layers.values() for group in (*layer.parts, *layer.grads.values()))
    return sum(tensor.nbytes for group in groups for tensor in group)


@contextmanager
def peaks() -> Iterator[dict[SegmentKVCache, int]]:
    """Yield the peak of every cache: after each write, and before each finish, when gradients have been added."""
    found: dict[SegmentKVCache, int] = {}

    def note(cache: SegmentKVCache) -> None:
        found[cache] = max(found.get(cache, 0), held_bytes(cache))

    def write(original: Any, cache: SegmentKVCache, *args: Any) -> Any:
        layer = original(cache, *args)
        note(cache)
        return layer

    def finish(original: Any, cache: SegmentKVCache, *args: Any) -> Any:
        note(cache)
        return original(cache, *args)

    with wrapped(SegmentKVCache, "write", write), wrapped(SegmentKVCache, "finish", finish):
        yield found
