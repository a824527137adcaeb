"""Which parameters share a unit and a bucket, and where each parameter lies in its buffer."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

PARAM_ALIGNMENT = 64  # elements; what upstream's distributed optimizer requires
BUCKET_ALIGNMENT = 128

_LAYER = re.compile(r"(?:^|.*\.)layers\.\d+(?=\.)")
_EMBEDDING = re.compile(r"(?:^|.*\.)embedding(?=\.)")


def unit_of(name: str) -> str:
    """Return the unit of a parameter: the name of its layer, of the embedding, or of the module that holds it."""
    found = _LAYER.match(name) or _EMBEDDING.match(name)
    return found.group(0) if found else name.rpartition(".")[0]


def units_of(names: Iterable[str]) -> dict[str, str]:
    """Return the unit of every parameter of a model.

    What follows the layers of a block, such as the final norm, belongs to the block's last layer. A unit of its own
    would need collectives of its own for a few thousand elements.

    Args:
        names: of all parameters, frozen ones included, in the model's order.
    """
    units: dict[str, str] = {}
    last: dict[str, str] = {}
    for name in names:
        unit = unit_of(name)
        block, _, layer = unit.rpartition(".layers.")
        if layer.isdecimal():
            last[block] = unit
        units[name] = last.get(unit.rpartition(".")[0], unit)
    return units


@dataclass
class BucketLayout:
    """Where parameters lie in a buffer that is cut into buckets.

    Attributes:
        places: of every parameter, (first element, one after the last, number of the bucket).
        bounds: of every bucket, (first element, one after the last), padded.
    """

    places: dict[torch.nn.Parameter, tuple[int, int, int]] = field(default_factory=dict)
    bounds: list[tuple[int, int]] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        """Elements of every bucket, with padding."""
        return [end - begin for begin, end in self.bounds]


def lay_out(
    params: Sequence[tuple[str, torch.nn.Parameter]],
    ranks: int,
    at_least: int,
    *,
    padding: int = 1,
    units: Mapping[str, str] | None = None,
) -> BucketLayout:
    """Lay parameters out in reverse order, as backward reaches them, in buckets that end where units do.

    Args:
        params: names and parameters, in the model's order.
        ranks: n; every bucket is padded to n equal shards.
        at_least: elements after which a bucket ends; with 0, every unit is a bucket of its own.
        padding: a further divisor of every bucket's size.
        units: unit of every parameter; None: `units_of` these.
    """
    units = units_of(name for name, _ in params) if units is None else units
    layout, begin, end, unit = BucketLayout(), 0, 0, None
    divisor = math.lcm(ranks, BUCKET_ALIGNMENT, padding)
    previous_is_shared = False
    for name, param in reversed(params):
        is_shared = getattr(param, "shared_embedding", False)  # gets a bucket of its own
        is_full = unit != units[name] and end - begin >= at_least
        if end > begin and (is_full or is_shared or previous_is_shared):
            begin = end = _close(layout, begin, end, divisor)
        unit, previous_is_shared = units[name], is_shared
        first = _round_up(end, PARAM_ALIGNMENT)
        end = first + param.numel()
        layout.places[param] = (first, end, len(layout.bounds))
    if end > begin:
        _close(layout, begin, end, divisor)
    return layout


def by_unit(params: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """Return names and parameters by unit, in order.

    Args:
        params: names and parameters of a whole model.
    """
    params = list(params)
    unit, units = units_of(name for name, _ in params), dict[str, list[tuple[str, torch.nn.Parameter]]]()
    for name, param in params:
        units.setdefault(unit[name], []).append((name, param))
    return units


def _close(layout: BucketLayout, begin: int, end: int, divisor: int) -> int:
    layout.bounds.append((begin, _round_up(end, divisor)))
    return layout.bounds[-1][1]


def _round_up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
