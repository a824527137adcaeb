"""Flags in snake case, as text or as values, to an architecture, a cluster and a configuration.

Every flag of upstream's parser has a place: the planner models it, it changes neither time nor memory (neutral), or the
planner refuses it unless it holds upstream's default. A test compares the lists with upstream's parser.
"""

import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import Field, replace
from importlib import resources
from typing import Any

from megatron.longseq.planner.plan import configuration
from megatron.longseq.planner.plan.cluster import Cluster, cluster
from megatron.longseq.planner.plan.configuration import Configuration, settle
from megatron.longseq.planner.plan.model import FIELDS as MODEL_FIELDS
from megatron.longseq.planner.plan.model import Architecture, architecture

OWN = ("model", "cluster")
# The planner reads these flags besides the fields of the two data classes.
FURTHER = (
    "group_query_attention",
    "use_flash_attn",
    "rope_type",
    "use_rotary_position_embeddings",
    "data_parallel_size",
)
NEUTRAL_HERE = (
    "arguments_file",
    "ckpt_non_finite",
    "ckpt_verify",
    "context_parallel_layout",
    "dry_run_rank",
    "dry_run_world",
    "flexsp_batch_tokens",
    "flexsp_cost",
    "flexsp_degrees",
    "flexsp_kinds",
    "flexsp_max_tokens_per_rank",
    "flexsp_overlong",
    "flexsp_plan_ahead",
    "flexsp_planner",
    "flexsp_refit",
    "flexsp_save_cost",
    "first_step_timeout_minutes",
    "locate_nonfinite_gradients",
    "log_memory_fragmentation",
    "loss_spike_policy",
    "loss_spike_threshold",
    "loss_spike_window",
    "peak_tflops_per_gpu",
    "paro_links",
    "pipeline_patience",
    "pipeline_trace",
    "pipeline_trace_step",
    "seq1f1b_layer_seconds",
    "stall_timeout_minutes",
    "start_folder",
)
REFUSED_HERE = {"flexsp": False}  # its steps depend on the lengths of documents: see tools/flexsp_predict.py
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "none")
_INTEGER_SUFFIXES = {"k": 1 << 10, "m": 1 << 20}


@functools.lru_cache(maxsize=1)
def upstream_flags() -> dict[str, Any]:
    """Return the lists of upstream's flags: neutral, refused (with defaults), spelled differently, and negated."""
    file = resources.files("megatron.longseq.planner").joinpath("data/flags.json")
    return dict(json.loads(file.read_text()))


def read(values: Mapping[str, Any], where: str = "") -> tuple[Architecture, Cluster, Configuration]:
    """Return what a mapping of flags describes.

    Args:
        values: flags in snake case (a leading `--` and dashes are accepted), `model`, `cluster` and `gpus`. Empty
            values are upstream's defaults.
        where: names the row or the command in messages.

    Raises:
        ValueError: a flag is unknown, not modelled, or does not fit the others. The message names it.
    """
    try:
        found = _known(values)
        machine = _cluster(found)
        found = {**dict(machine.defaults), **found}
        model = _model(found)
        run = settle(model, {**_run(found), "gpus": machine.gpus})
        _check_data_parallel_size(found, run)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error
    if run.gpus < machine.gpus_per_node:
        machine = replace(machine, gpus_per_node=run.gpus)
    return model, machine, run


def _check_data_parallel_size(values: Mapping[str, Any], run: Configuration) -> None:
    """Refuse a data-parallel size, which tables of runs often list, if it is not what the other sizes leave."""
    if "data_parallel_size" in values:
        size = _integer("data_parallel_size", values["data_parallel_size"])
        if size != run.data_parallel_size:
            raise ValueError(
                f"data_parallel_size is {size}, but {run.gpus} GPUs in replicas of {run.model_parallel_size} are "
                f"{run.data_parallel_size}"
            )


def check_names(names: Mapping[str, Any] | list[str]) -> None:
    """Refuse names that are no flag.

    Raises:
        ValueError: lists the unknown names, with the most similar known ones.
    """
    unknown = [name for name in names if _canonical(str(name))[0] is None]
    if unknown:
        hints = [f"{name!r}{_hint(_clean(str(name)))}" for name in unknown]
        raise ValueError(
            f"unknown columns or flags: {', '.join(hints)}; give upstream's flags or this project's in snake case, "
            "gpus, cluster, or model"
        )


def _hint(name: str) -> str:
    known = [*configuration.FIELDS, *MODEL_FIELDS, *OWN, *upstream_flags()["neutral"]]
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _clean(name: str) -> str:
    return name.strip().lstrip("-").replace("-", "_")


def _canonical(name: str) -> tuple[str | None, bool]:
    """Return a flag's name in upstream's namespace, None if there is no such flag, and whether it is negated."""
    flags, text = upstream_flags(), _clean(name)
    if text in flags["negated"]:
        return flags["negated"][text], True
    text = flags["spelled"].get(text, text)
    known = text in configuration.FIELDS or text in MODEL_FIELDS or text in OWN or text in FURTHER
    known = known or text in flags["neutral"] or text in flags["refused"] or text in (*NEUTRAL_HERE, *REFUSED_HERE)
    return (text if known else None), False


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that the planner models, with upstream's names. Refuse the others."""
    check_names(values)
    flags, found = upstream_flags(), {}
    refused = {**flags["refused"], **REFUSED_HERE}
    for name, value in values.items():
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        key, negated = _canonical(name)
        assert key is not None
        plain = not _boolean(name, value) if negated else value
        if key in refused:
            _refuse(key, plain, refused[key])
        elif key not in (*flags["neutral"], *NEUTRAL_HERE) or key in FURTHER:
            found[key] = plain
    return found


def _refuse(name: str, value: Any, default: Any) -> None:
    text = str(value).strip().lower()
    if text not in (str(default).lower(), "" if default is None else str(default).lower(), "none"[: 4 * (not default)]):
        raise ValueError(f"{name} {value!r}: the planner does not model it; leave it at upstream's default {default!r}")


def _boolean(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    text = text.removesuffix(".0")
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError(f"{name} is {value!r}; give true or false")


def _integer(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip().lower().replace("_", "")
    scale = 1
    if text and text[-1] in _INTEGER_SUFFIXES:
        scale, text = _INTEGER_SUFFIXES[text[-1]], text[:-1]
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{name} is {value!r}, not a whole number") from None
    if number != int(number):
        raise ValueError(f"{name} is {value!r}, not a whole number")
    return int(number) * scale


def _list(value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [str(one) for one in value]
    text = str(value).strip().strip("[]()").replace(",", " ").replace(";", " ")
    return [part.strip("'\"") for part in text.split()]


def _convert(name: str, value: Any, field: Field[Any]) -> Any:
    """Return a value with the type of its field."""
    kind, default = str(field.type).removeprefix("<class '").removesuffix("'>"), field.default
    if kind.startswith("tuple"):
        parts = _list(value)
        return tuple(_integer(name, part) for part in parts) if "int" in str(field.type) else tuple(parts)
    if kind.startswith("bool"):
        return _boolean(name, value)
    if kind.startswith("int"):
        return _integer(name, value)
    if kind.startswith("float"):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{name} is {value!r}, not a number") from None
    return str(value).strip() if default is not None else str(value)


def _cluster(values: Mapping[str, Any]) -> Cluster:
    if not values.get("cluster"):
        raise ValueError("cluster is missing; give FAMILY-GPUS, such as a100-64")
    gpus = _integer("gpus", values["gpus"]) if "gpus" in values else None
    return cluster(str(values["cluster"]).strip(), gpus)


def _model(values: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a model's name and of flags."""
    given: dict[str, Any] = {}
    fields = Architecture.__dataclass_fields__
    for name in MODEL_FIELDS & set(values):
        if name == "moe_layer_freq":
            parts = [_integer(name, part) for part in _layer_list(str(values[name]))]
            given[name] = parts[0] if len(parts) == 1 else tuple(parts)
        elif name == "window_size":
            given[name] = max(0, _integer(name, _list(values[name])[0]))
        elif name != "name":
            given[name] = _convert(name, values[name], fields[name])
    if "group_query_attention" in values and not _boolean("group_query_attention", values["group_query_attention"]):
        given.pop("num_query_groups", None)
    if values.get("rope_type") or _boolean("rotary", values.get("use_rotary_position_embeddings", False)):
        given.setdefault("position_embedding_type", "rope")
    return architecture(str(values["model"]).strip() if values.get("model") else None, given)


def _layer_list(text: str) -> list[str]:
    """Return the numbers of an expression such as ([0]*1+[1]*3), which upstream evaluates too."""
    if "*" not in text:
        return _list(text)
    found: list[str] = []
    for part in text.strip().strip("()").split("+"):
        body, _, count = part.partition("*")
        found += _list(body) * int(count or 1)
    return found


def _run(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration."""
    given: dict[str, Any] = {}
    for name in set(configuration.FIELDS) & set(values):
        given[name] = _convert(name, values[name], configuration.FIELDS[name])
    if "cp_comm_type" in given:
        given["cp_comm_type"] = _list(given["cp_comm_type"])[0]
    if "use_flash_attn" in values:
        given["use_flash_attn"] = _boolean("use_flash_attn", values["use_flash_attn"])
    return given
