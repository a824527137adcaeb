"""Flags of PaRO, and the upstream flags that it cannot be combined with. Other data-parallel flags are upstream's."""

import math
from argparse import ArgumentParser, Namespace

from megatron.longseq.refusals import Refusals, refuse, refuse_without_effect
from megatron.longseq.sharding.plan.collectives import CollectivesMode
from megatron.longseq.sharding.plan.flat_or_hierarchical import DEFAULT_LINKS
from megatron.longseq.sharding.plan.strategy import RUNNING, Level, Strategy, check

DEFAULT_COLLECTIVES = CollectivesMode.OVERLAPPED
DEFAULT_PREFETCH_UNITS = 1

# Valid triplets that are not implemented, and what to give instead.
INSTEAD = {
    "INI": "--paro III uses less memory and sends the same between groups (or ING, if few parameters are trained)",
    "GNG": "--paro GGG uses less memory; if few parameters are trained, ING gathers parameters inside a group only",
    "GIG": "--paro IIG gathers parameters inside a group only, and GGG uses less memory",
}

# flag: (whether it is used, why it does not work with --paro)
NOT_WITH_PARO: Refusals = {
    "--num-distributed-optimizer-instances": (
        lambda a: a.num_distributed_optimizer_instances != 1,
        "the third letter of the triplet and --paro-group-size determine the number of instances; leave it out",
    ),
    "--use-megatron-fsdp": (
        lambda a: a.use_megatron_fsdp,
        "it has its own sharding; --paro GGG, IIG and III shard the same states",
    ),
    "--use-torch-fsdp2": (
        lambda a: a.use_torch_fsdp2,
        "it has its own sharding; --paro GGG and NGG shard the same states",
    ),
    "--optimizer": (
        lambda a: a.optimizer != "adam",
        "PaRO uses upstream's distributed optimizer, which shards the states of adam only",
    ),
    "--use-precision-aware-optimizer": (
        lambda a: a.use_precision_aware_optimizer,
        "it keeps gradients and main parameters outside upstream's buffers",
    ),
    "--optimizer-cpu-offload": (
        lambda a: a.optimizer_cpu_offload,
        "its copies to and from the CPU are not synchronized with our collectives",
    ),
    "--freeze-all-layers": (
        lambda a: a.freeze_all_layers,
        "upstream then creates no distributed optimizer; to freeze a part of the model, give --train-only",
    ),
    "--fp8-param-gather": (lambda a: a.fp8_param_gather, "quantized parameters are not sharded"),
    "--fp4-param-gather": (lambda a: a.fp4_param_gather, "quantized parameters are not sharded"),
    "--reuse-grad-buf-for-mxfp8-param-ag": (
        lambda a: a.reuse_grad_buf_for_mxfp8_param_ag,
        "parameters and gradients are sharded separately, so they cannot share a buffer",
    ),
    "--save-wgrads-interval": (
        lambda a: a.save_wgrads_interval is not None,
        "no rank has unsharded gradients at the end of a step",
    ),
    "--use-nccl-ub": (lambda a: a.nccl_ub, "its registered memory cannot be freed between uses"),
    "--use-sharp": (lambda a: a.use_sharp, "our collectives do not run in upstream's process groups"),
    "--create-all-gather-group": (
        lambda a: a.create_all_gather_group,
        "all-gathers have separate process groups anyway; leave it out",
    ),
    "--cuda-graph-impl": (
        lambda a: a.cuda_graph_impl != "none" or a.optimizer_cuda_graph,
        "collectives on several streams cannot be captured in a CUDA graph",
    ),
    "--grad-reduce-in-bf16": (
        lambda a: a.grad_reduce_in_bf16 and not a.bf16,
        "it has no effect without --bf16; give both",
    ),
    "--ddp-reduce-scatter-with-fp32-accumulation": (
        lambda a: a.ddp_reduce_scatter_with_fp32_accumulation,
        "it is one all-to-all over all ranks; --grad-reduce-in-bf16 sends bf16 and accumulates micro-batches in fp32",
    ),
    "--ddp-param-name-patterns-for-fp32-local-accumulation": (
        lambda a: a.ddp_param_name_patterns_for_fp32_local_accumulation,
        "it stores gradients twice; --accumulate-allreduce-grads-in-fp32, which --bf16 sets, keeps all in fp32",
    ),
    "--overlap-param-gather-with-optimizer-step": (
        lambda a: a.overlap_param_gather_with_optimizer_step,
        "it splits the optimizer in two; --overlap-param-gather gathers parameters during the next forward",
    ),
    "--tensor-parallel-num-weight-shards": (
        lambda a: getattr(a, "gtp_weight_remat_size", 1) > 1,
        "it has its own sharding of weights; give a triplet that starts with I or G",
    ),
    "--expert-tensor-parallel-num-weight-shards": (
        lambda a: getattr(a, "expert_gtp_weight_remat_size", 1) > 1,
        "it has its own sharding of weights; give a triplet that starts with I or G",
    ),
    "--expert-model-parallel-size": (
        lambda a: a.expert_model_parallel_size > 1,
        "experts would have different data-parallel groups from the other layers; give 1",
    ),
    "--expert-tensor-parallel-size": (
        lambda a: a.expert_tensor_parallel_size not in (None, a.tensor_model_parallel_size),
        "experts would have different data-parallel groups from the other layers; leave it out",
    ),
    "--init-model-with-meta-device": (
        lambda a: a.init_model_with_meta_device,
        "shards are copied from the initial values of the parameters",
    ),
    "--ckpt-format": (
        lambda a: a.ckpt_format != "torch_dist",
        "only torch_dist checkpoints can be loaded with another triplet, group size or number of ranks",
    ),
    "--ckpt-convert-format": (
        lambda a: a.ckpt_convert_format is not None,
        "only torch_dist checkpoints can be loaded with another triplet, group size or number of ranks",
    ),
    "--non-persistent-ckpt-type local": (
        lambda a: a.non_persistent_ckpt_type == "local",
        "the file of a rank would contain only the shards of that rank; give global",
    ),
    "--distrib-optim-fully-reshardable-mem-efficient": (
        lambda a: a.distrib_optim_fully_reshardable_mem_efficient,
        "it gathers shards in upstream's order of ranks, but ours have another order",
    ),
    "--perform-rl-step": (lambda a: a.perform_rl_step, "its inference reads parameters without gathering their shards"),
    "--fake-process-group": (
        lambda a: a.fake_process_group and getattr(a, "dry_run_world", None) is None,
        "nothing is sent, so gathered tensors would be wrong; for a dry run, give --dry-run-world",
    ),
}

# flag: (whether it is used, why it does not work with sharded gradients)
NOT_WITH_SHARDED_GRADIENTS: Refusals = {
    "--delay-wgrad-compute": (
        lambda a: a.delay_wgrad_compute,
        "the weight gradients would be computed after the reduce-scatter of their micro-batch",
    ),
    "--defer-embedding-wgrad-compute": (
        lambda a: a.defer_embedding_wgrad_compute,
        "the gradient would be computed after the last reduce-scatter of the step",
    ),
    "--zero-bubble": (
        lambda a: a.zero_bubble,
        "weight gradients would be computed after their reduce-scatter; give a triplet with N in the middle",
    ),
}

# flag: (whether it is used, why it does not work with sharded parameters)
NOT_WITH_SHARDED_PARAMETERS: Refusals = {
    "--fp8-format": (
        lambda a: a.fp8 or a.fp4,
        "TransformerEngine keeps unsharded copies of the weights in 8 or 4 bits between steps",
    ),
    "--save-params-interval": (lambda a: a.save_params_interval is not None, "no rank has unsharded parameters"),
    "--log-params-norm": (lambda a: a.log_params_norm, "no rank has unsharded parameters"),
    "--check-weight-hash-across-dp-replicas-interval": (
        lambda a: a.check_weight_hash_across_dp_replicas_interval is not None,
        "the ranks have different shards of the parameters",
    ),
    "--load-main-params-from-ckpt": (
        lambda a: a.load_main_params_from_ckpt,
        "main parameters are copied from unsharded parameters, which no rank has",
    ),
}

# flag: (whether it is used, why it does not work with optimizer states that are not sharded over all ranks)
NOT_WITH_COPIES_OF_OPTIMIZER_STATES: Refusals = {
    "--ddp-average-in-collective": (
        lambda a: a.ddp_average_in_collective,
        "upstream then averages over the ranks that share the optimizer states only; leave it out, or end with G",
    ),
}


REFUSALS = {
    "any triplet": NOT_WITH_PARO,
    "gradients I or G": NOT_WITH_SHARDED_GRADIENTS,
    "parameters I or G": NOT_WITH_SHARDED_PARAMETERS,
    "optimizer states N or I": NOT_WITH_COPIES_OF_OPTIMIZER_STATES,
}


def add_sharding_arguments(parser: ArgumentParser) -> None:
    """Add PaRO's group of arguments."""
    group = parser.add_argument_group(title="longseq: sharding of parameters, gradients and optimizer states (PaRO)")
    group.add_argument(
        "--paro",
        metavar="PGO",
        help="how to shard parameters, gradients and optimizer states over data-parallel ranks, one letter each: N "
        "(not sharded), I (inside a group), G (globally); one of " + " ".join(map(str, RUNNING)),
    )
    group.add_argument(
        "--paro-group-size",
        type=int,
        metavar="M",
        help="data-parallel times context-parallel ranks in a group, such as those of a node, a rail or a leaf "
        "switch; default: those of a node",
    )
    group.add_argument(
        "--paro-collectives",
        choices=[mode.value for mode in CollectivesMode],
        help="flat: one collective over all ranks; hierarchical: one inside groups and one between groups; "
        f"overlapped: both at the same time, for different buckets; default {DEFAULT_COLLECTIVES}",
    )
    group.add_argument(
        "--paro-links",
        type=float,
        nargs=2,
        metavar=("INSIDE", "BETWEEN"),
        help="GB/s that a rank can send inside its group and to other groups; overlapped collectives run flat if that "
        "is as fast; `python -m megatron.longseq.sharding probe` measures both; default "
        + " ".join(f"{speed:g}" for speed in DEFAULT_LINKS),
    )
    group.add_argument(
        "--paro-selective-overlap",
        action="store_true",
        help="sharded parameters: gather units ahead, start gathers where they delay no communication of attention, "
        "and keep units that are used again next",
    )
    group.add_argument(
        "--paro-prefetch-units",
        type=int,
        metavar="D",
        help="with --paro-selective-overlap: units (layers) that are gathered besides the one that computes; "
        f"default {DEFAULT_PREFETCH_UNITS}",
    )


def wants_sharding(args: Namespace) -> bool:
    """Return whether --paro is given; otherwise upstream's own data parallelism runs."""
    return getattr(args, "paro", None) is not None


def shards_parameters(args: Namespace) -> bool:
    """Return whether ranks gather parameters for every use, in validated arguments."""
    return wants_sharding(args) and Strategy.parse(args.paro).params is not Level.NONE


def check_sharding_numbers(args: Namespace) -> None:
    """Refuse invalid triplets and numbers, right after parsing.

    Raises:
        ValueError: names the flag and the values that it takes.
    """
    size, collectives = getattr(args, "paro_group_size", None), getattr(args, "paro_collectives", None)
    if not wants_sharding(args):
        refuse_without_effect(
            args,
            "--paro is not given",
            paro_group_size=None,
            paro_collectives=None,
            paro_links=None,
            paro_selective_overlap=False,
            paro_prefetch_units=None,
        )
        return
    strategy = check(Strategy.parse(args.paro))
    if strategy not in RUNNING:
        raise ValueError(f"--paro {strategy} does not run: {INSTEAD[str(strategy)]}.")
    if size is not None and size < 1:
        raise ValueError(f"--paro-group-size {size}: give at least 1.")
    mode = CollectivesMode(collectives or DEFAULT_COLLECTIVES)
    if size is not None and not needs_groups(strategy, mode):
        raise ValueError(
            f"--paro-group-size {size}: --paro {strategy} with --paro-collectives flat uses no groups, so the flag "
            "would have no effect; leave it out."
        )
    links = getattr(args, "paro_links", None)
    if links is not None and mode is not CollectivesMode.OVERLAPPED:
        raise ValueError(f"--paro-links {links}: --paro-collectives {mode} does not use them; leave it out.")
    if links is not None and not all(0 < link < math.inf for link in links):
        raise ValueError(f"--paro-links {links}: give positive, finite bandwidths in GB/s.")
    _check_selective_overlap(args, strategy)
    if getattr(args, "yaml_cfg", None) is not None:
        raise ValueError("--paro with --yaml-cfg: upstream does not validate flags from a YAML file; give them here.")


def prefetch_units(args: Namespace) -> int:
    """Return how many units are gathered besides the one that computes; 0 without --paro-selective-overlap."""
    if not getattr(args, "paro_selective_overlap", False):
        return 0
    return getattr(args, "paro_prefetch_units", None) or DEFAULT_PREFETCH_UNITS


def _check_selective_overlap(args: Namespace, strategy: Strategy) -> None:
    if not getattr(args, "paro_selective_overlap", False):
        refuse_without_effect(args, "--paro-selective-overlap is not given", paro_prefetch_units=None)
        return
    if strategy.params is Level.NONE:
        raise ValueError(
            f"--paro-selective-overlap: --paro {strategy} does not shard parameters, so no layer gathers any; leave it "
            "out, or give a triplet that starts with I or G."
        )
    units = getattr(args, "paro_prefetch_units", None)
    if units is not None and units < 1:
        raise ValueError(f"--paro-prefetch-units {units}: give at least 1.")


def needs_groups(strategy: Strategy, mode: CollectivesMode) -> bool:
    """Return whether the group size matters: a state is sharded inside groups, or collectives are hierarchical.

    Args:
        strategy: levels of the model states.
        mode: --paro-collectives.
    """
    return mode is not CollectivesMode.FLAT or Level.GROUP in (strategy.params, strategy.grads, strategy.optimizer)


def refuse_unserved_sharding(args: Namespace) -> None:
    """Refuse flags that --paro cannot be combined with; called before and after upstream's validation.

    Raises:
        ValueError: lists every such flag with the reason.
    """
    strategy = Strategy.parse(args.paro)
    tables = [NOT_WITH_PARO]
    if strategy.grads > Level.NONE:
        tables.append(NOT_WITH_SHARDED_GRADIENTS)
    if strategy.params > Level.NONE:
        tables.append(NOT_WITH_SHARDED_PARAMETERS)
    if strategy.optimizer is not Level.GLOBAL:
        tables.append(NOT_WITH_COPIES_OF_OPTIMIZER_STATES)
    refuse(args, [(f"--paro {strategy}", table) for table in tables])
