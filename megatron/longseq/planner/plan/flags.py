"""Flags in snake case, as text or as values, to an architecture, a cluster and a configuration.

Every flag of upstream's parser has a place: the planner models it, it changes neither time nor memory (neutral), or the
planner refuses it unless it holds upstream's default. A test compares the lists with upstream's parser.
"""

import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, replace
from importlib import resources
from typing import Any, NamedTuple

from megatron.longseq.planner.plan import configuration
from megatron.longseq.planner.plan.cluster import Cluster, cluster, with_even_nodes
from megatron.longseq.planner.plan.configuration import Configuration, settle
from megatron.longseq.planner.plan.contradictions import contradictions
from megatron.longseq.planner.plan.model import FIELDS as MODEL_FIELDS
from megatron.longseq.planner.plan.model import Architecture, architecture, read_model
from megatron.longseq.planner.plan.values import boolean, convert, is_empty, layer_list, whole_number, words

OWN = ("model", "cluster")
# The planner reads these flags besides the fields of the two data classes.
FURTHER = (
    "add_position_embedding",
    "group_query_attention",
    "use_flash_attn",
    "rope_type",
    "use_rotary_position_embeddings",
    "data_parallel_size",
    "virtual_pipeline_model_parallel_size",
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
# Names of the texts that a flag may hold, where no parser of upstream lists them.
_CHOICES = {
    "context_parallel_attention": ("auto", "longseq", "transformer_engine"),
    "context_parallel_placement": ("head-first", "context-first"),
    "cp_comm_type": ("p2p", "a2a", "allgather", "a2a+p2p"),
    "paro_collectives": ("flat", "hierarchical", "overlapped"),
    "recompute_modules": ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"),
    "seq1f1b_partition": ("balanced", "even"),
}
# Runs in fp16 on GPUs whose software had no fused attention at first; see `_early_software`.
_EARLY_FLAGS = {"transformer_impl": "local", "attention_backend": "unfused", "gradient_accumulation_fusion": False}
_STATES_SOFTWARE = ("transformer_impl", "attention_backend", "use_flash_attn")
_GPT2_VOCABULARY = 50257
_SHARES = ("optimizer_offload_fraction",)
_MAY_BE_NEGATIVE = ("moe_expert_capacity_factor",)  # upstream: no limit


@functools.lru_cache(maxsize=1)
def upstream_flags() -> dict[str, Any]:
    """Return the lists of upstream's flags: neutral, refused (with defaults), spelled differently, and negated."""
    file = resources.files("megatron.longseq.planner").joinpath("data/flags.json")
    return dict(json.loads(file.read_text()))


class Reading(NamedTuple):
    """What a mapping of flags describes.

    Attributes:
        model, cluster, run: for `predict`.
        assumed: what no flag says, and the planner takes for granted beside upstream's defaults.
        contradictions: what is wrong with the flags; see `contradictions.contradictions`.
    """

    model: Architecture
    cluster: Cluster
    run: Configuration
    assumed: tuple[str, ...]
    contradictions: tuple[str, ...]


def read(values: Mapping[str, Any], where: str = "") -> tuple[Architecture, Cluster, Configuration]:
    """Return the model, the cluster and the configuration that flags describe; see `read_fully`.

    Args:
        values: flags in snake case, as text or as values.
        where: names the row or the command in messages.

    Raises:
        ValueError: see `read_fully`.
    """
    return read_fully(values, where)[:3]


def read_fully(values: Mapping[str, Any], where: str = "") -> Reading:
    """Return what a mapping of flags describes.

    Args:
        values: flags in snake case (a leading `--` and dashes are accepted), `model`, `cluster` and `gpus`. Empty
            values are upstream's defaults.
        where: names the row or the command in messages.

    Raises:
        ValueError: a flag is unknown, not modelled, or does not fit the others. The message names it.
    """
    try:
        found = known_flags(values)
        machine = _cluster(found)
        assumed = []
        is_early = _early_software(machine, found)
        if is_early:
            found = {**_EARLY_FLAGS, **found}
            machine = replace(machine, splits_messages=True, overlaps_input_gradients=False)
            assumed.append(
                "fp16 on a GPU of 2020: Megatron of 2021, with local layers, unfused attention and no overlap of "
                "tensor parallelism; give transformer_impl transformer_engine or attention_backend for another one"
            )
        found = {**dict(machine.defaults), **found}
        model = _model(found)
        if not (model.vocab_size or model.padded_vocab_size):
            model = replace(model, vocab_size=_GPT2_VOCABULARY)
            assumed.append(f"vocab_size is not given: {_GPT2_VOCABULARY}, as GPT-2's tokenizer has")
        given = _run(found)
        run = settle(model, {**given, "gpus": machine.gpus})
        assumed += _assumptions(found, model, run)
        wrong = contradictions(found, given, model, machine, run)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error
    machine = with_even_nodes(machine)
    return Reading(model, machine, run, tuple(assumed), tuple(wrong))


def _assumptions(values: Mapping[str, Any], model: Architecture, run: Configuration) -> list[str]:
    """Return what flags that are missing stand for, where upstream ignores or refuses a flag beside them."""
    found = []
    groups = whole_number("", values.get("num_query_groups", 0))
    if groups and groups != model.num_query_groups:
        found.append(
            f"num_query_groups {groups} has no effect without group_query_attention, so attention is as without it"
        )
    if run.recompute_granularity == "full" and run.recompute_method == "uniform":
        missing = [name for name in ("recompute_method", "recompute_num_layers") if name not in values]
        if missing:
            found.append(f"{' and '.join(missing)} not given: uniform, 1 layer; upstream needs them")
    return found


def _early_software(machine: Cluster, values: Mapping[str, Any]) -> bool:
    """Return whether a run is taken for one of Megatron as it was before it had fused attention (January 2023).

    Published runs in fp16 on A100 are of 2021 and 2022; later ones are in bf16. An installation says what its software
    was, and flags of the run come before both.
    """
    if not machine.predates_fused_attention or machine.defaults:
        return False
    if not boolean("fp16", values.get("fp16", False)) or boolean("bf16", values.get("bf16", False)):
        return False
    stated = {name: str(values[name]).lower() for name in _STATES_SOFTWARE if name in values}
    return all(value in ("local", "unfused") for value in stated.values())


def check_names(names: Mapping[str, Any] | list[str]) -> None:
    """Refuse names that are no flag.

    Raises:
        ValueError: lists the unknown names, with the most similar known ones.
    """
    unknown = [name for name in names if canonical(str(name))[0] is None]
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


def canonical(name: str) -> tuple[str | None, bool]:
    """Return a flag's name in upstream's namespace, None if there is no such flag, and whether it is negated.

    Args:
        name: the flag, as it is typed or as a column.
    """
    flags, text = upstream_flags(), _clean(name)
    if text in flags["negated"]:
        return flags["negated"][text], True
    text = flags["spelled"].get(text, text)
    known = text in configuration.FIELDS or text in MODEL_FIELDS or text in OWN or text in FURTHER
    known = known or text in flags["neutral"] or text in flags["refused"] or text in (*NEUTRAL_HERE, *REFUSED_HERE)
    return (text if known else None), False


def known_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that the planner models, with upstream's names, without those that change nothing.

    Args:
        values: flags in any spelling.

    Raises:
        ValueError: a flag is unknown, or not modelled.
    """
    check_names(values)
    flags = upstream_flags()
    found: dict[str, Any] = {}
    refused = {**flags["refused"], **REFUSED_HERE}
    for name, value in values.items():
        key, negated = canonical(name)
        assert key is not None
        if is_empty(key, value):
            continue
        plain = not boolean(name, value) if negated else value
        if key in found and str(found[key]).strip().lower() != str(plain).strip().lower():
            raise ValueError(f"{name} {value!r}: another flag says {key} {found[key]!r}")
        if key in refused:
            _refuse(key, plain, refused[key])
        elif key not in (*flags["neutral"], *NEUTRAL_HERE) or key in FURTHER:
            found[key] = plain
    return found


def _refuse(name: str, value: Any, default: Any) -> None:
    text = str(value).strip().lower()
    if text not in (str(default).lower(), "" if default is None else str(default).lower(), "none"[: 4 * (not default)]):
        instead = upstream_flags()["instead"].get(name)
        if instead:
            raise ValueError(f"{name} {value!r}: upstream no longer takes it; give {instead}")
        raise ValueError(f"{name} {value!r}: the planner does not model it; leave it at upstream's default {default!r}")


def _cluster(values: Mapping[str, Any]) -> Cluster:
    if not values.get("cluster"):
        raise ValueError("cluster is missing; give FAMILY-GPUS, such as a100-64")
    gpus = whole_number("gpus", values["gpus"]) if "gpus" in values else None
    return cluster(str(values["cluster"]).strip(), gpus)


def _model(values: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a model's name and of flags."""
    given: dict[str, Any] = {}
    fields = Architecture.__dataclass_fields__
    for name in MODEL_FIELDS & set(values):
        if name == "moe_layer_freq":
            given[name] = layer_list(name, values[name])
        elif name == "window_size":
            given[name] = max(0, whole_number(name, (words(values[name]) or [""])[0]))
        elif name != "name":
            given[name] = _value(name, values[name], fields[name])
    source = str(values["model"]).strip() if values.get("model") else None
    own_groups = bool(source and read_model(source).get("num_query_groups"))
    if not boolean("group_query_attention", values.get("group_query_attention", own_groups)):
        given.pop("num_query_groups", None)  # upstream then has keys and values for every head
    elif not own_groups and not values.get("multi_latent_attention"):
        given.setdefault("num_query_groups", 1)
    if values.get("rope_type") or boolean("rotary", values.get("use_rotary_position_embeddings", False)):
        given.setdefault("position_embedding_type", "rope")
    return architecture(source, given)


def _value(name: str, value: Any, field: Field[Any]) -> Any:
    """Return a value of a flag, checked.

    Raises:
        ValueError: it is no value of the flag.
    """
    found = convert(name, value, field, _CHOICES.get(name, upstream_flags()["choices"].get(name, ())))
    if isinstance(found, tuple) and any(isinstance(one, int) and one < 1 for one in found):
        raise ValueError(f"{name} is {value!r}; give at least 1 each")
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        is_size = field.default == 1 or field.default is MISSING or name == "global_batch_size"
        least = int(isinstance(found, int) and is_size)
        if found < least and name not in _MAY_BE_NEGATIVE:
            raise ValueError(f"{name} is {value!r}; give {'at least 1' if least else '0 or more'}")
        if name in _SHARES and found > 1:
            raise ValueError(f"{name} is {value!r}; give 0 to 1")
    return found


def _run(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration."""
    given: dict[str, Any] = {}
    for name in set(configuration.FIELDS) & set(values):
        value = values[name]
        if name == "cp_comm_type":
            kinds = set(words(value))
            if len(kinds) != 1:
                raise ValueError(f"{name} is {value!r}; the planner prices one type for all layers")
            (value,) = kinds
        given[name] = _value(name, value, configuration.FIELDS[name])
    virtual = values.get("virtual_pipeline_model_parallel_size")
    if virtual is not None:
        given.setdefault(
            "num_virtual_stages_per_pipeline_rank", whole_number("virtual_pipeline_model_parallel_size", virtual)
        )
    if "use_flash_attn" in values:
        given["use_flash_attn"] = boolean("use_flash_attn", values["use_flash_attn"])
    return given
