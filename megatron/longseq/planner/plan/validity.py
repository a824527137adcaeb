"""Why training would refuse a run: upstream's rules about the flags that the planner models, and this project's tables.

The tables of refused flags are those that training itself reads, so a new refusal is a reason here without a change.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from types import SimpleNamespace

from megatron.longseq.attention.arguments import NOT_WITH_CONTEXT, serves_core_attention
from megatron.longseq.cross_entropy.arguments import NOT_IN_CHUNKS
from megatron.longseq.pipeline.arguments import NOT_IN_SCHEDULES, NOT_IN_SEGMENTS, NOT_WITH_ZERO_BUBBLE
from megatron.longseq.planner.plan.configuration import FIELDS, Configuration
from megatron.longseq.planner.plan.flags import canonical
from megatron.longseq.planner.plan.model import FIELDS as MODEL_FIELDS
from megatron.longseq.planner.plan.model import Architecture
from megatron.longseq.refusals import Refusals, refused
from megatron.longseq.sharding.arguments import (
    NOT_WITH_PARO,
    NOT_WITH_SHARDED_GRADIENTS,
    NOT_WITH_SHARDED_PARAMETERS,
)
from megatron.longseq.sharding.plan.strategy import Level

Rule = tuple[Callable[[Architecture, Configuration], bool], str]

# `configuration.reasons` says these itself, with the sizes of the run.
_SAID = ("--transformer-impl", "--num-experts", "--num-layers-per-virtual-pipeline-stage")
_PLAIN_OPTIMIZER = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def _has_distributed_optimizer(run: Configuration) -> bool:
    return run.use_distributed_optimizer or run.use_megatron_fsdp or bool(run.paro)


def _expert_ranks(run: Configuration) -> int:
    """Return the ranks of one replica of the experts."""
    tensor = run.expert_tensor_parallel_size or run.tensor_model_parallel_size
    return tensor * run.expert_model_parallel_size * run.pipeline_model_parallel_size


# Of a model alone; a search refuses it at once.
_OF_MODELS: tuple[tuple[Callable[[Architecture], bool], str], ...] = (
    (lambda m: m.swiglu and m.squared_relu, "swiglu and squared_relu are two activations; leave one out"),
    (
        lambda m: bool(m.num_experts) and not 1 <= m.moe_router_topk <= m.num_experts,
        "moe_router_topk must be at least 1 and at most num_experts",
    ),
    (lambda m: 0 < m.padded_vocab_size < m.vocab_size, "padded_vocab_size is below vocab_size"),
)

# What `validate_args` and the configurations of upstream refuse.
_UPSTREAM: tuple[Rule, ...] = (
    (
        lambda m, r: m.padded_vocab_size % r.tensor_model_parallel_size > 0,
        "padded_vocab_size is not a multiple of tensor_model_parallel_size",
    ),
    (
        lambda m, r: m.position_embedding_type == "learned_absolute" and 0 < m.max_position_embeddings < r.seq_length,
        "max_position_embeddings is below seq_length",
    ),
    (
        lambda m, r: r.overlap_param_gather and not _has_distributed_optimizer(r),
        "overlap_param_gather needs use_distributed_optimizer",
    ),
    (
        lambda m, r: r.overlap_param_gather and not r.overlap_grad_reduce,
        "overlap_param_gather needs overlap_grad_reduce",
    ),
    (lambda m, r: r.tp_comm_overlap and not r.sequence_parallel, "tp_comm_overlap needs sequence_parallel"),
    (
        lambda m, r: bool(m.num_experts) and r.tensor_model_parallel_size > 1 and not r.sequence_parallel,
        "experts with tensor_model_parallel_size above 1 need sequence_parallel",
    ),
    (
        lambda m, r: r.use_torch_fsdp2 and r.pipeline_model_parallel_size > 1,
        "use_torch_fsdp2 does not work with pipeline_model_parallel_size above 1",
    ),
    (
        lambda m, r: r.use_torch_fsdp2 and r.expert_model_parallel_size > 1,
        "use_torch_fsdp2 does not work with expert_model_parallel_size above 1",
    ),
    (
        lambda m, r: r.use_torch_fsdp2 and r.use_distributed_optimizer,
        "use_torch_fsdp2 does not work with use_distributed_optimizer",
    ),
    (
        lambda m, r: r.use_torch_fsdp2 and r.gradient_accumulation_fusion,
        "use_torch_fsdp2 needs no_gradient_accumulation_fusion",
    ),
    (
        lambda m, r: r.use_torch_fsdp2 and not m.untie_embeddings_and_output_weights,
        "use_torch_fsdp2 needs untie_embeddings_and_output_weights",
    ),
    (lambda m, r: r.use_torch_fsdp2 and r.fp16, "use_torch_fsdp2 does not work with fp16"),
    (
        lambda m, r: r.fp8_param_gather and not r.fp8,
        "fp8_param_gather needs fp8_format",
    ),
    (
        lambda m, r: r.fp8_param_gather and not (_has_distributed_optimizer(r) or r.use_torch_fsdp2),
        "fp8_param_gather needs use_distributed_optimizer",
    ),
    (
        lambda m, r: r.use_precision_aware_optimizer and not _has_distributed_optimizer(r),
        "use_precision_aware_optimizer needs use_distributed_optimizer",
    ),
    (
        lambda m, r: (
            not r.use_precision_aware_optimizer and any(getattr(r, name) != "fp32" for name in _PLAIN_OPTIMIZER)
        ),
        f"{', '.join(_PLAIN_OPTIMIZER)} other than fp32 need use_precision_aware_optimizer",
    ),
    (
        lambda m, r: r.optimizer_cpu_offload and not r.use_precision_aware_optimizer,
        "optimizer_cpu_offload needs use_precision_aware_optimizer",
    ),
    (lambda m, r: r.bf16 and r.fp16, "give bf16 or fp16, not both"),
    (
        lambda m, r: r.recompute_granularity == "selective" and bool(r.recompute_method or r.recompute_num_layers),
        "selective recomputation has neither recompute_method nor recompute_num_layers",
    ),
    (
        lambda m, r: r.moe_pad_expert_input_to_capacity and not r.moe_expert_capacity_factor,
        "moe_pad_expert_input_to_capacity needs moe_expert_capacity_factor",
    ),
    (
        lambda m, r: r.distribute_saved_activations and r.tensor_model_parallel_size == 1,
        "distribute_saved_activations needs tensor_model_parallel_size above 1",
    ),
    (
        lambda m, r: r.distribute_saved_activations and r.recompute_granularity != "full",
        "distribute_saved_activations needs recompute_granularity full",
    ),
    (
        lambda m, r: r.distribute_saved_activations and r.sequence_parallel,
        "distribute_saved_activations does not work with sequence_parallel",
    ),
    (
        lambda m, r: (
            r.num_distributed_optimizer_instances > 0
            and r.data_parallel_size * r.context_parallel_size % r.num_distributed_optimizer_instances > 0
        ),
        "num_distributed_optimizer_instances does not divide the data- x context-parallel ranks",
    ),
    (
        lambda m, r: (
            bool(m.num_experts)
            and r.num_distributed_optimizer_instances > 0
            and r.gpus // _expert_ranks(r) % r.num_distributed_optimizer_instances > 0
        ),
        "num_distributed_optimizer_instances does not divide the expert-data-parallel ranks",
    ),
    (
        lambda m, r: r.virtual_stages > 1 and not r.overlap_p2p_comm and r.pipeline_model_parallel_size == 2,
        "virtual stages on 2 pipeline ranks need overlapped messages; leave out no_overlap_p2p_communication",
    ),
    (
        lambda m, r: (
            (r.decoder_first_pipeline_num_layers is not None or r.decoder_last_pipeline_num_layers is not None)
            and (r.account_for_embedding_in_pipeline_split or r.account_for_loss_in_pipeline_split)
        ),
        "decoder_first_ and decoder_last_pipeline_num_layers do not work with account_for_..._in_pipeline_split",
    ),
    (
        lambda m, r: r.cross_entropy_loss_fusion and r.cross_entropy_fusion_impl == "te",
        "cross_entropy_fusion_impl te: upstream has disabled it; give native",
    ),
    (
        lambda m, r: m.position_embedding_type == "relative" and r.is_local,
        "position_embedding_type relative needs transformer_impl transformer_engine",
    ),
)


def reasons_of_model(model: Architecture) -> list[str]:
    """Return why no run can train a model; an empty list if some can."""
    found = [text for is_wrong, text in _OF_MODELS if is_wrong(model)]
    if model.query_size % model.num_attention_heads or (
        not model.kv_channels and not model.multi_latent_attention and model.hidden_size % model.num_attention_heads
    ):
        found.append(f"hidden_size {model.hidden_size} is not a multiple of {model.num_attention_heads} heads")
    return found


def further_reasons(model: Architecture, run: Configuration) -> list[str]:
    """Return why training refuses a run whose sizes divide each other; an empty list if it does not.

    Args:
        model: its architecture.
        run: its flags, of which every size is at least 1.
    """
    found = [*reasons_of_model(model), *_expert_reasons(model, run)]
    found += [text for is_wrong, text in _UPSTREAM if is_wrong(model, run)]
    arguments = _arguments(model, run)
    for beside, table in _tables(arguments, run):
        modelled = {flag: rule for flag, rule in table.items() if flag not in _SAID and _is_modelled(flag)}
        found += [line.strip() for line in refused(arguments, modelled, beside)]
    return found


def _expert_reasons(model: Architecture, run: Configuration) -> list[str]:
    found = []
    if run.expert_model_parallel_size > 1 and not model.num_experts:
        found.append("expert_model_parallel_size needs a model with experts")
    elif model.num_experts and model.num_experts % run.expert_model_parallel_size:
        found.append(f"{model.num_experts} experts cannot be divided by {run.expert_model_parallel_size}")
    tensor = run.expert_tensor_parallel_size or run.tensor_model_parallel_size
    if run.gpus % _expert_ranks(run):
        found.append(
            f"{run.gpus} GPUs cannot be divided into replicas of {tensor} x {run.expert_model_parallel_size} x "
            f"{run.pipeline_model_parallel_size} (expert tensor, expert, pipeline)"
        )
    if model.num_experts and model.expert_ffn % tensor:
        found.append(f"expert_tensor_parallel_size {tensor} does not divide the width {model.expert_ffn} of an expert")
    return found


def _is_modelled(flag: str) -> bool:
    name, _ = canonical(flag.split(maxsplit=1)[0])
    return name in FIELDS or name in MODEL_FIELDS


def _arguments(model: Architecture, run: Configuration) -> Namespace:
    """Return a run as training's arguments: those that the planner models, and the others that its tables read."""
    values = {name: getattr(run, name) for name in FIELDS} | {name: getattr(model, name) for name in MODEL_FIELDS}
    values |= {"fp4": None, "moe_expert_rank_capacity_factor": None}
    values["expert_tensor_parallel_size"] = run.expert_tensor_parallel_size or None
    values["window_size"] = (model.window_size, 0) if model.window_size else None
    values["attention_backend"] = SimpleNamespace(name=run.attention_backend)
    values["virtual_pipeline_model_parallel_size"] = run.virtual_stages
    return Namespace(**values)


def _tables(arguments: Namespace, run: Configuration) -> Iterator[tuple[str, Refusals]]:
    """Yield the tables of what the flags of a run refuse, each with the flag."""
    if run.paro:
        strategy, flag = run.strategy, f"--paro {run.paro}"
        yield flag, NOT_WITH_PARO
        if strategy.grads > Level.NONE:
            yield flag, NOT_WITH_SHARDED_GRADIENTS
        if strategy.params > Level.NONE:
            yield flag, NOT_WITH_SHARDED_PARAMETERS
    if run.seq1f1b_splits > 1 or run.seq1f1b_slack or run.zero_bubble:
        yield "our pipeline schedules", NOT_IN_SCHEDULES
    if run.seq1f1b_splits > 1:
        yield "--seq1f1b-splits", NOT_IN_SEGMENTS
    if run.zero_bubble:
        yield "--zero-bubble", NOT_WITH_ZERO_BUBBLE
    if run.context_parallel_size > 1 and serves_core_attention(arguments, is_local=run.is_local):
        yield "--context-parallel-size", NOT_WITH_CONTEXT
    if run.cross_entropy_chunk_tokens:
        yield "--cross-entropy-chunk-tokens", NOT_IN_CHUNKS
