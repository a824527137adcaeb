"""Write a plan as flags, and as the command that launches it."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from megatron.longseq.attention.plan.heads import mesh_flags
from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.planner.plan.model import Architecture
from megatron.longseq.planner.plan.space import Execution, ParallelLayout, SearchSpace, StateSharding

# The value of a flag: True for one without a value, False or None for one that is not given.
FlagValue = bool | int | float | str | Sequence[str] | Sequence[int] | None
Flags = Mapping[str, FlagValue]


class PlanChoice(NamedTuple):
    """One leaf of the search: everything that the planner chooses."""

    layout: ParallelLayout
    execution: Execution
    sharding: StateSharding


def launch_refusal(model: Architecture) -> str | None:
    """Return why no flags of the GPT script describe an architecture; None if some do."""
    name = f"model {model.name or 'given by flags'}"
    if model.multi_latent_attention or model.num_experts:
        return (
            f"{name}: the planner searches dense models with grouped-query attention, not experts or latent attention; "
            "price one configuration with `predict`"
        )
    if model.not_in_flags:
        return (
            f"{name}: it has {model.not_in_flags}, for which the GPT script has no flag; price it with `predict`, or "
            "write its flags into a JSON file"
        )
    return None


def model_flags(model: Architecture, seq_length: int) -> dict[str, FlagValue]:
    """Return upstream's flags of an architecture, by their names in snake case.

    Args:
        model: its architecture.
        seq_length: tokens of a sequence.

    Raises:
        ValueError: no flags of the GPT script describe the architecture; see `launch_refusal`.
    """
    refusal = launch_refusal(model)
    if refusal is not None:
        raise ValueError(refusal)
    is_learned = model.position_embedding_type == "learned_absolute"
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": model.groups != model.num_attention_heads,
        "num_query_groups": model.groups if model.groups != model.num_attention_heads else None,
        "kv_channels": model.kv_channels or None,
        "max_position_embeddings": max(seq_length, model.max_position_embeddings if is_learned else 0),
        "position_embedding_type": model.position_embedding_type,
        **_rotary_flags(model),
        "normalization": model.normalization,
        "norm_epsilon": _changed(model, "layernorm_epsilon"),
        "swiglu": model.swiglu,
        "squared_relu": model.squared_relu,
        "disable_bias_linear": not model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "window_size": f"{model.window_size},0" if model.window_size else None,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "padded_vocab_size": model.padded_vocab_size or None,
    }


def _changed(model: Architecture, name: str) -> FlagValue:
    """Return a number of the model if it differs from upstream's default."""
    value: FlagValue = getattr(model, name)
    return None if value == Architecture.__dataclass_fields__[name].default else value


def _rotary_flags(model: Architecture) -> dict[str, FlagValue]:
    if model.position_embedding_type != "rope":
        return {}
    names = ("rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor", "use_rope_scaling")
    factor = model.rope_scaling_factor if model.use_rope_scaling else None
    return {**{name: _changed(model, name) for name in names}, "rope_scaling_factor": factor}


def default_training_words(model: Architecture) -> list[str]:
    """Return the flags of a run that the planner does not choose: optimizer, mock data, no evaluation."""
    vocabulary = model.vocab_size or model.padded_vocab_size
    return [
        *("--lr", "3e-4", "--min-lr", "3e-5", "--lr-decay-style", "cosine", "--weight-decay", "0.1"),
        *(
            "--clip-grad",
            "1.0",
            "--train-iters",
            "100",
            "--eval-iters",
            "0",
            "--eval-interval",
            "1000",
            "--log-interval",
            "1",
            "--log-throughput",
        ),
        *("--mock-data", "--split", "1,0,0", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocabulary)),
    ]


def plan_flags(space: SearchSpace, choice: PlanChoice) -> dict[str, FlagValue]:
    """Return the flags of a choice, by their names in snake case.

    Args:
        space: the space that was searched.
        choice: a plan of it.
    """
    layout, execution, sharding = choice
    return {
        "seq_length": space.seq_length,
        "micro_batch_size": layout.micro_batch,
        "global_batch_size": space.global_batch_size,
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.tensor > 1,
        "pipeline_model_parallel_size": layout.pipeline,
        **_virtual_flags(space, layout),
        **_context_flags(layout),
        **_schedule_flags(execution),
        **_recompute_flags(execution),
        "cross_entropy_chunk_tokens": execution.chunk_tokens,
        **_sharding_flags(space, layout, sharding),
    }


def _virtual_flags(space: SearchSpace, layout: ParallelLayout) -> dict[str, FlagValue]:
    if layout.virtual == 1:
        return {}
    return {"num_layers_per_virtual_pipeline_stage": space.sizes.num_layers // (layout.pipeline * layout.virtual)}


def _context_flags(layout: ParallelLayout) -> dict[str, FlagValue]:
    if layout.context == 1:
        return {}
    words = mesh_flags(Mesh(layout.ulysses, layout.ring)).split()
    values: dict[str, FlagValue] = {"context_parallel_size": layout.context, "context_parallel_attention": "longseq"}
    values["cp_comm_type"] = [words[words.index("--cp-comm-type") + 1]]
    if "--hierarchical-context-parallel-sizes" in words:
        values["hierarchical_context_parallel_sizes"] = [layout.ulysses, layout.ring]
    return values


def _schedule_flags(execution: Execution) -> dict[str, FlagValue]:
    values: dict[str, FlagValue] = {}
    if execution.segments > 1:
        values |= {"seq1f1b_splits": execution.segments, "seq1f1b_partition": execution.partition}
    if execution.slack:
        values["seq1f1b_slack"] = execution.slack
    if execution.zero_bubble:
        values |= {"zero_bubble": True, "transformer_impl": "local"}
    return values


def _recompute_flags(execution: Execution) -> dict[str, FlagValue]:
    recomputation = execution.recomputation
    return {
        "recompute_granularity": recomputation.granularity,
        "recompute_modules": list(recomputation.modules) or None,
        "recompute_method": recomputation.method,
        "recompute_num_layers": recomputation.num_layers,
    }


def _sharding_flags(space: SearchSpace, layout: ParallelLayout, sharding: StateSharding) -> dict[str, FlagValue]:
    if space.gpus == layout.tensor * layout.pipeline:
        return {}
    values: dict[str, FlagValue] = {"overlap_grad_reduce": True}
    if sharding.strategy is not None:
        values |= {"paro": sharding.strategy, "paro_group_size": sharding.group_size}
        if sharding.group_size is None:
            values["paro_collectives"] = "flat"
    values["use_distributed_optimizer"] = sharding.strategy is None and sharding.distributed_optimizer
    values["overlap_param_gather"] = sharding.levels.optimizer > sharding.levels.params
    return values


def flag_words(flags: Flags) -> list[str]:
    """Return the words of a command line."""
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, (list, tuple)):
            words += map(str, value)
        elif value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return words


def launch_words(space: SearchSpace, words: Iterable[str], site: str | None = None) -> list[str]:
    """Return the words of the command that launches a training run on all ranks of a space; see scripts/launch.sh.

    Args:
        space: the space that was searched.
        words: the flags of the run.
        site: file of the machine's environment variables, of scripts/sites.

    Raises:
        ValueError: the nodes have different numbers of ranks, with which the command cannot start them.
    """
    nodes, rest = divmod(space.gpus, space.gpus_per_node)
    if rest:
        raise ValueError(f"{space.gpus} GPUs are not a whole number of nodes of {space.gpus_per_node}")
    options = ["--nodes", str(nodes)] if nodes > 1 else []
    options += ["--gpus-per-node", str(space.gpus_per_node)]
    options += ["--site", site] if site is not None else []
    return ["bash", "scripts/launch.sh", *options, "--", "examples/pretrain_gpt.py", *words]


def command_text(words: Sequence[str], width: int = 116) -> str:
    """Return a command for a shell, in lines of at most `width` columns that end before a flag.

    Args:
        words: the program and its arguments, not quoted.
        width: columns of a line.
    """
    lines, line = [], ""
    for part in _arguments(words):
        if line and len(line) + 1 + len(part) > width:
            lines.append(line)
            line = "  " + part
        else:
            line = f"{line} {part}" if line else part
    return " \\\n".join([*lines, line])


def _arguments(words: Sequence[str]) -> list[str]:
    """Return the words with the values of every flag beside it."""
    parts: list[str] = []
    for word in words:
        if parts and not word.startswith("--") and parts[-1].startswith("--") and parts[-1] != "--":
            parts[-1] += f" {shlex.quote(word)}"
        else:
            parts.append(shlex.quote(word))
    return parts
