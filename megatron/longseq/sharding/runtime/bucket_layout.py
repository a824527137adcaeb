"""Which parameters share a unit and a bucket, and where each lies in it."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

PARAM_ALIGNMENT = 64  # elements; as upstream's optimizer wants it
BUCKET_ALIGNMENT = 128

_LAYER = re.compile(r"(?:^|.*\.)layers\.\d+(?=\.)")
_EMBEDDING = re.compile(r"(?:^|.*\.)embedding(?=\.)")


def unit_of(name: str) -> str:
    """Return the name of the unit of a parameter: its layer, the embedding, or the module that holds it."""
    found = _LAYER.match(name) or _EMBEDDING.match(name)
    return found.group(0) if found else name.rpartition(".")[0]


@dataclass
class Buckets:
    """Where parameters lie in a buffer that is cut into buckets.

    Attributes:
        places: (first element, one after the last, bucket) in the buffer, of every parameter.
        bounds: (first element, one after the last) of every bucket, padded.
    """

    places: dict[torch.nn.Parameter, tuple[int, int, int]] = field(default_factory=dict)
    bounds: list[tuple[int, int]] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        """Elements of every bucket."""
        return [end - begin for begin, end in self.bounds]


def lay_out(
    params: Sequence[tuple[str, torch.nn.Parameter]], ranks: int, at_least: int, *, padding: int = 1
) -> Buckets:
    """Lay parameters out in reverse, as backward reaches them, in buckets that end where units do.

    Args:
        params: with their names, in order.
        ranks: n; every bucket is padded to n equal shards.
        at_least: elements after which a bucket ends; 0: every unit is a bucket of its own.
        padding: a number that a bucket's size is a multiple of, besides.
    """
    made, begin, end, unit = Buckets(), 0, 0, None
    whole = math.lcm(ranks, BUCKET_ALIGNMENT, padding)
    is_alone = False
    for name, param in reversed(params):
        shared = getattr(param, "shared_embedding", False)
        is_full = unit != unit_of(name) and end - begin >= at_least
        if end > begin and (is_full or shared or is_alone):
            begin = end = _close(made, begin, end, whole)
        unit, is_alone = unit_of(name), shared
        first = _up(end, PARAM_ALIGNMENT)
        end = first + param.numel()
        made.places[param] = (first, end, len(made.bounds))
    if end > begin:
        _close(made, begin, end, whole)
    return made


def by_unit(params: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """Return parameters by unit, in order."""
    units: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, param in params:
        units.setdefault(unit_of(name), []).append((name, param))
    return units


def _close(made: Buckets, begin: int, end: int, whole: int) -> int:
    made.bounds.append((begin, _up(end, whole)))
    return made.bounds[-1][1]


def _up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
