"""Cost models by name or from JSON files.

A file is one object: name, square, linear and fixed (seconds per squared token, per token and per micro-batch),
tokens_per_rank, layers, dim, "heads": {"query", "kv"} and "links": {"node", "all_to_all": [[ranks, bytes per second],
...], "ring_inside", "ring_between", "all_to_all_latency", "ring_latency"}; optional are item, grad_item, overlap,
forward_share and padding. `GroupCostModel` and `GroupLinks` describe them.
"""

import json
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.flexsp.plan.cost import GroupCostModel, GroupLinks
from megatron.longseq.flexsp.plan.paper import BUILT_IN, paper_cost


def load_cost(name: str) -> GroupCostModel:
    """Return a built-in cost model, or read one from a JSON file.

    Args:
        name: one of `BUILT_IN`, or a path.

    Raises:
        ValueError: There is no such file, it is no JSON, a key is unknown or missing, or a value is out of range.
    """
    if name in BUILT_IN:
        return paper_cost(name.removesuffix("-a100"))
    file = Path(name)
    if not file.is_file():
        raise ValueError(f"cost model {name}: it is neither a file nor one of {', '.join(BUILT_IN)}")
    try:
        values = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cost model {name}: it is no JSON: {error}") from None
    return _model(values, name)


def save_cost(cost: GroupCostModel, file: Path) -> None:
    """Write a cost model to a JSON file that `load_cost` reads."""
    values = asdict(replace(cost))  # a copy has an empty cache, whose keys could not be copied
    del values["_cache"]
    file.write_text(json.dumps(values, indent=1) + "\n")


def _model(values: Any, name: str) -> GroupCostModel:
    known = _checked(values, GroupCostModel, name)
    heads = _checked(known.pop("heads"), Heads, f"{name}, heads")
    links = _checked(known.pop("links"), GroupLinks, f"{name}, links")
    label = str(known.pop("name"))
    try:
        table = _table(links.pop("all_to_all"))
        for numbers in (known, heads, links):
            wrong = {key: one for key, one in numbers.items() if isinstance(one, bool) or not _is_number(key, one)}
            if wrong:
                raise ValueError(f"{wrong}: give numbers")
        cost = GroupCostModel(label, **known, heads=Heads(**heads), links=GroupLinks(**links, all_to_all=table))
    except (TypeError, ValueError) as error:
        raise ValueError(f"cost model {name}: {error}") from None
    return cost


def _table(values: Any) -> tuple[tuple[int, float], ...]:
    """Return the speeds of all-to-alls."""
    rows = values if isinstance(values, list) else [values]
    for row in rows:
        if not (isinstance(row, list) and len(row) == 2 and type(row[0]) is int and type(row[1]) in (int, float)):
            raise ValueError(f"all_to_all {row!r}: give a list of [ranks, bytes per second]")
    return tuple((size, float(speed)) for size, speed in rows)


_INTEGERS = ("tokens_per_rank", "layers", "dim", "item", "grad_item", "padding", "node", "query", "kv")


def _is_number(key: str, value: Any) -> bool:
    if key in _INTEGERS:
        return isinstance(value, int) or (key == "padding" and value is None)
    return isinstance(value, int | float)


def _checked(values: Any, kind: Any, name: str) -> dict[str, Any]:
    """Return a copy of an object after checking that its keys are fields of a class, with all that have no default."""
    own = {one.name: one for one in fields(kind) if one.init}
    if not isinstance(values, dict):
        raise ValueError(f"cost model {name}: give an object with {', '.join(own)}")
    needed = [key for key, one in own.items() if one.default is MISSING]
    unknown = [key for key in values if key not in own]
    missing = [key for key in needed if key not in values]
    if unknown or missing:
        raise ValueError(
            f"cost model {name}: unknown are {', '.join(unknown) or 'none'}, missing are "
            f"{', '.join(missing) or 'none'}; "
            f"the keys are {', '.join(own)}"
        )
    return dict(values)
