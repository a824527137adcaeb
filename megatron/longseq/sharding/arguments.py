"""Flags of PaRO, and the upstream flags that it cannot be combined with. Other data-parallel flags are upstream's."""

import math
from argparse import ArgumentParser, Namespace

from megatron.longseq.refusals import Refusals, refuse, refuse_without_effect
from megatron.longseq.sharding.plan.collectives import CollectivesMode
from megatron.longseq.sharding.plan.flat_or_hierarchical import DEFAULT_LINKS
from megatron.longseq.sharding.plan.strategy import RUNNING, Level, Strategy, check

DEFAULT_COLLECTIVES = CollectivesMode.OVERLAPPED

# Valid triplets that are not implemented: what to give instead, and why.
INSTEAD = {
    "INI": "--paro III holds less and sends the same between groups (ING, where few parameters are trained)",
    "GNG": "--paro GGG holds less, and ING gathers parameters inside a group alone (where few parameters are trained)",
    "GIG": "--paro IIG gathers parameters inside a group alone, and GGG holds less",
}

# flag: (is it asked for?, why no sharding of ours can serve it)
NOT_WITH_PARO: Refusals = {
    "--num-distributed-optimizer-instances": (
        lambda a: a.num_distributed_optimizer_instances != 1,
        "the triplet's last letter and --paro-group-size say how many there are; leave it out",
    ),
    "--use-megatron-fsdp": (
        lambda a: a.use_megatron_fsdp,
        "it shards by itself; --paro GGG, IIG and III shard the same on upstream's other buffers",
    ),
    "--use-torch-fsdp2": (
        lambda a: a.use_torch_fsdp2,
        "it shards by itself; --paro GGG and NGG shard the same on upstream's own buffers",
    ),
    "--optimizer": (
        lambda a: a.optimizer != "adam",
        "upstream's distributed optimizer, which carries every triplet, cuts the states of adam alone",
    ),
    "--use-precision-aware-optimizer": (
        lambda a: a.use_precision_aware_optimizer,
        "its gradients and main parameters are not those of upstream's buffers",
    ),
    "--optimizer-cpu-offload": (
        lambda a: a.optimizer_cpu_offload,
        "its copies to and from the CPU are not ordered with our collectives",
    ),
    "--freeze-all-layers": (
        lambda a: a.freeze_all_layers,
        "upstream then leaves its distributed optimizer out; --train-only freezes a part",
    ),
    "--fp8-param-gather": (lambda a: a.fp8_param_gather, "only parameters of one plain type are cut into shards"),
    "--fp4-param-gather": (lambda a: a.fp4_param_gather, "only parameters of one plain type are cut into shards"),
    "--reuse-grad-buf-for-mxfp8-param-ag": (
        lambda a: a.reuse_grad_buf_for_mxfp8_param_ag,
        "parameters and gradients are sharded apart, so neither has room for the other",
    ),
    "--save-wgrads-interval": (
        lambda a: a.save_wgrads_interval is not None,
        "no rank holds whole gradients at the end of a step",
    ),
    "--use-nccl-ub": (lambda a: a.nccl_ub, "its registered memory cannot be given back between uses"),
    "--use-sharp": (lambda a: a.use_sharp, "it serves upstream's own groups, and collectives run over ours"),
    "--create-all-gather-group": (
        lambda a: a.create_all_gather_group,
        "gathers have groups of their own anyway; leave it out",
    ),
    "--cuda-graph-impl": (
        lambda a: a.cuda_graph_impl != "none" or a.optimizer_cuda_graph,
        "collectives on several streams are no part of a graph",
    ),
    "--grad-reduce-in-bf16": (
        lambda a: a.grad_reduce_in_bf16 and not a.bf16,
        "it would change nothing without --bf16",
    ),
    "--ddp-reduce-scatter-with-fp32-accumulation": (
        lambda a: a.ddp_reduce_scatter_with_fp32_accumulation,
        "it is one all-to-all over all ranks; --grad-reduce-in-bf16 sends bf16 and adds micro-batches up in fp32",
    ),
    "--ddp-param-name-patterns-for-fp32-local-accumulation": (
        lambda a: a.ddp_param_name_patterns_for_fp32_local_accumulation,
        "it keeps gradients twice; --accumulate-allreduce-grads-in-fp32, which --bf16 brings, has all of them in fp32",
    ),
    "--overlap-param-gather-with-optimizer-step": (
        lambda a: a.overlap_param_gather_with_optimizer_step,
        "it makes two optimizers out of one; --overlap-param-gather gathers during the next forward",
    ),
    "--tensor-parallel-num-weight-shards": (
        lambda a: getattr(a, "gtp_weight_remat_size", 1) > 1,
        "it shards weights by itself; a triplet that starts with I or G shards them",
    ),
    "--expert-tensor-parallel-num-weight-shards": (
        lambda a: getattr(a, "expert_gtp_weight_remat_size", 1) > 1,
        "it shards weights by itself; a triplet that starts with I or G shards them",
    ),
    "--expert-model-parallel-size": (
        lambda a: a.expert_model_parallel_size > 1,
        "experts would have other data-parallel groups than the rest; give 1",
    ),
    "--expert-tensor-parallel-size": (
        lambda a: a.expert_tensor_parallel_size not in (None, a.tensor_model_parallel_size),
        "experts would have other data-parallel groups than the rest; leave it out",
    ),
    "--init-model-with-meta-device": (
        lambda a: a.init_model_with_meta_device,
        "parameters are cut into shards from their values",
    ),
    "--ckpt-format": (
        lambda a: a.ckpt_format != "torch_dist",
        "only torch_dist can be read under another triplet, group size or number of ranks",
    ),
    "--ckpt-convert-format": (
        lambda a: a.ckpt_convert_format is not None,
        "only torch_dist can be read under another triplet, group size or number of ranks",
    ),
    "--non-persistent-ckpt-type local": (
        lambda a: a.non_persistent_ckpt_type == "local",
        "a rank's own file holds its own shards alone; give global",
    ),
    "--distrib-optim-fully-reshardable-mem-efficient": (
        lambda a: a.distrib_optim_fully_reshardable_mem_efficient,
        "it gathers by upstream's order of ranks, where shards have another",
    ),
    "--perform-rl-step": (lambda a: a.perform_rl_step, "inference reads parameters behind our back"),
    "--fake-process-group": (lambda a: a.fake_process_group, "nothing is sent, so nothing would be whole"),
}

# flag: (is it asked for?, why sharded gradients cannot serve it)
NOT_WITH_SHARDED_GRADIENTS: Refusals = {
    "--delay-wgrad-compute": (
        lambda a: a.delay_wgrad_compute,
        "weight gradients that come late would miss their micro-batch's reduction",
    ),
    "--defer-embedding-wgrad-compute": (
        lambda a: a.defer_embedding_wgrad_compute,
        "a gradient that comes after the last micro-batch would miss its reductions",
    ),
    "--zero-bubble": (
        lambda a: a.zero_bubble,
        "weight gradients that come late would miss their micro-batch's reduction; give a triplet with N in the middle",
    ),
}

# flag: (is it asked for?, why sharded parameters cannot serve it)
NOT_WITH_SHARDED_PARAMETERS: Refusals = {
    "--fp8-format": (
        lambda a: a.fp8 or a.fp4,
        "TransformerEngine keeps whole copies of the weights in 8 or 4 bits from step to step",
    ),
    "--save-params-interval": (lambda a: a.save_params_interval is not None, "no rank holds whole parameters"),
    "--log-params-norm": (lambda a: a.log_params_norm, "no rank holds whole parameters"),
    "--check-weight-hash-across-dp-replicas-interval": (
        lambda a: a.check_weight_hash_across_dp_replicas_interval is not None,
        "ranks hold different parts of the parameters",
    ),
    "--async-save": (
        lambda a: a.async_save,
        "its writer is handed memory of whole parameters while training goes on, and that memory is given back between "
        "uses",
    ),
    "--load-main-params-from-ckpt": (
        lambda a: a.load_main_params_from_ckpt,
        "main parameters are cut from whole parameters, which no rank holds",
    ),
}

# flag: (is it asked for?, why optimizer states that are not sharded over all ranks cannot serve it)
NOT_WITH_COPIES_OF_OPTIMIZER_STATES: Refusals = {
    "--ddp-average-in-collective": (
        lambda a: a.ddp_average_in_collective,
        "upstream then averages over the ranks that optimizer states are sharded over; leave it out, or end with G",
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
        help="how parameters, gradients and optimizer states are sharded over data-parallel ranks, one letter each: "
        "N not, I inside a group, G globally; one of " + " ".join(map(str, RUNNING)),
    )
    group.add_argument(
        "--paro-group-size",
        type=int,
        metavar="M",
        help="data-parallel ranks (times context-parallel ones) in a group: a node, a rail, a leaf switch; default: "
        "those of a node",
    )
    group.add_argument(
        "--paro-collectives",
        choices=[mode.value for mode in CollectivesMode],
        help="flat: one collective over all ranks; hierarchical: one inside groups and one between them; overlapped: "
        f"these two at the same time, on different buckets; default {DEFAULT_COLLECTIVES}",
    )
    group.add_argument(
        "--paro-links",
        type=float,
        nargs=2,
        metavar=("INSIDE", "BETWEEN"),
        help="GB/s that a rank sends inside its group and to other groups; overlapped collectives run flat where these "
        "speeds make that as fast; `python -m megatron.longseq.sharding probe` measures them; default "
        + " ".join(f"{speed:g}" for speed in DEFAULT_LINKS),
    )


def wants_sharding(args: Namespace) -> bool:
    """Return whether --paro is given; otherwise upstream's own data parallelism runs."""
    return getattr(args, "paro", None) is not None


def check_sharding_numbers(args: Namespace) -> None:
    """Refuse invalid triplets and numbers, right after parsing.

    Raises:
        ValueError: names the flag and the values that it takes.
    """
    size, collectives = getattr(args, "paro_group_size", None), getattr(args, "paro_collectives", None)
    if not wants_sharding(args):
        refuse_without_effect(args, "--paro is not given", paro_group_size=None, paro_collectives=None, paro_links=None)
        return
    strategy = check(Strategy.parse(args.paro))
    if strategy not in RUNNING:
        raise ValueError(f"--paro {strategy} does not run: {INSTEAD[str(strategy)]}.")
    if size is not None and size < 1:
        raise ValueError(f"--paro-group-size {size}: give at least 1.")
    mode = CollectivesMode(collectives or DEFAULT_COLLECTIVES)
    if size is not None and not needs_groups(strategy, mode):
        raise ValueError(
            f"--paro-group-size {size}: --paro {strategy} with --paro-collectives flat has no groups, so it would "
            "change nothing; leave it out."
        )
    links = getattr(args, "paro_links", None)
    if links is not None and mode is not CollectivesMode.OVERLAPPED:
        raise ValueError(f"--paro-links {links}: --paro-collectives {mode} does not use them; leave it out.")
    if links is not None and not all(0 < link < math.inf for link in links):
        raise ValueError(f"--paro-links {links}: give positive, finite speeds, in GB/s.")
    if getattr(args, "yaml_cfg", None) is not None:
        raise ValueError("--paro with --yaml-cfg: upstream does not validate flags from a YAML file; give them here.")


def needs_groups(strategy: Strategy, mode: CollectivesMode) -> bool:
    """Return whether the group size matters: a state is sharded inside groups, or collectives are hierarchical."""
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
