"""The flags of the pipeline schedules, their checks, and the flags of upstream's that they refuse."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megatron.longseq.pipeline.plan.segment_cost import fit, read_samples
from megatron.longseq.refusals import Refusals, refuse, refuse_unwritable, refuse_without_effect

PARTITION = "balanced"  # default of --seq1f1b-partition
TRACED = 3  # default of --pipeline-trace-step
PATIENCE = 60.0  # default of --pipeline-patience, in seconds
LONGEST_PATIENCE = 1e8  # seconds; Python's threads cannot wait longer than about 9e9

# flag: (whether it is used, why it does not work with segments)
NOT_IN_SEGMENTS: Refusals = {
    "--multi-latent-attention": (
        lambda a: a.multi_latent_attention,
        "the KV cache of earlier segments holds keys per head, not latents",
    ),
    "--mtp-num-layers": (lambda a: a.mtp_num_layers, "it needs labels of the next segment"),
    "--is-hybrid-model": (
        lambda a: a.is_hybrid_model or a.hybrid_layer_pattern or a.linear_attention_freq,
        "recurrent layers would have to pass their state to the next segment",
    ),
    "--experimental-attention-variant": (
        lambda a: a.experimental_attention_variant is not None,
        "its core attention cannot use the keys of earlier segments",
    ),
    "--softmax-type": (lambda a: a.softmax_type != "vanilla", "the attention kernels implement the plain softmax only"),
    "--position-embedding-type mrope": (
        lambda a: a.position_embedding_type == "mrope",
        "its positions do not count the tokens of one sequence",
    ),
    "--qk-clip": (lambda a: a.qk_clip or a.log_max_attention_logit, "the attention kernels do not store the logits"),
    "--window-size": (
        lambda a: a.window_size is not None and a.window_size[1] not in (0, -1),
        "a window that includes later tokens needs keys of later segments; give RIGHT 0",
    ),
    "--attention-backend flash with --attention-dropout": (
        lambda a: a.attention_backend.name == "flash" and a.attention_dropout > 0,
        "the flash kernels do not implement dropout, and only the reference does; give --attention-dropout 0, or "
        "--attention-backend auto",
    ),
    "--fp8-format": (
        lambda a: a.fp8 or a.fp4,
        "scaling factors, which upstream updates per micro-batch, are not tested with segments",
    ),
    "--tp-comm-overlap": (lambda a: a.tp_comm_overlap, "its buffers have the size of a whole sequence"),
    "--moe-router-load-balancing-type": (
        lambda a: a.num_experts and _balances(a),
        "load balancing uses statistics of the whole micro-batch; give --moe-router-load-balancing-type none",
    ),
    "--moe-z-loss-coeff": (
        lambda a: a.num_experts and a.moe_z_loss_coeff,
        "this auxiliary loss is a mean over the whole micro-batch",
    ),
    "--moe-expert-capacity-factor": (
        lambda a: a.num_experts and (a.moe_expert_capacity_factor or a.moe_expert_rank_capacity_factor),
        "the capacity would apply to a segment, so different tokens would be dropped",
    ),
    "--logits-save-dir": (
        lambda a: a.logits_save_dir is not None,
        "it counts the micro-batches of a step by calls of the output layer, which are segments here",
    ),
    "--save-activations-interval": (
        lambda a: a.save_activations_interval is not None,
        "it keeps the last forward of a step, which would be that of one segment",
    ),
    "--save-dgrads-interval": (
        lambda a: a.save_dgrads_interval is not None,
        "it keeps the last backward of a step, which would be that of one segment",
    ),
    "--save-tokens-per-expert-interval": (
        lambda a: a.save_tokens_per_expert_interval is not None,
        "it writes the counts of every forward, which would be those of one segment",
    ),
    "--moe-routing-trace-path": (
        lambda a: a.moe_routing_trace_path is not None,
        "it records the routing of every forward, which would be that of one segment",
    ),
}

# flag: (whether it is used, why it does not work with any of our schedules)
NOT_IN_SCHEDULES: Refusals = {
    "--overlap-moe-expert-parallel-comm": (
        lambda a: a.overlap_moe_expert_parallel_comm,
        "it runs a forward and a backward as one action",
    ),
    "--defer-embedding-wgrad-compute": (
        lambda a: a.defer_embedding_wgrad_compute,
        "it pairs activations and gradients first in, first out, but segments run backward in reverse order",
    ),
    "--decoder-seq-length": (
        lambda a: a.decoder_seq_length not in (None, a.seq_length),
        "all stages exchange hidden states of one sequence length",
    ),
    "--full-validation with --eval-micro-batch-size": (
        lambda a: a.full_validation and (a.eval_micro_batch_size or 1) > 1 and a.pipeline_model_parallel_size > 1,
        "upstream reads a full validation set one sample at a time; give --eval-micro-batch-size 1",
    ),
    "--variable-seq-lengths": (lambda a: a.variable_seq_lengths, "the plan fixes the shapes of all messages"),
    "--moe-paged-stash": (lambda a: a.moe_paged_stash, "it follows the order of upstream's schedules"),
    "--hybrid-context-parallel": (lambda a: a.hybrid_context_parallel, "it uses its own schedule"),
    "--cuda-graph-impl": (
        lambda a: a.cuda_graph_impl != "none",
        "upstream's own schedules create the graphs, and a graph has one shape while segments have several",
    ),
    "--fine-grained-activation-offloading": (
        lambda a: a.fine_grained_activation_offloading or a.cpu_offloading_num_layers,
        "upstream's own schedules reload the activations, in the order of whole micro-batches",
    ),
    "--tensor-parallel-num-weight-shards": (
        lambda a: a.gtp_weight_remat_size > 1,
        "its all-gathers and reduce-scatters overlap the next action, which is not tested with our schedules",
    ),
    "--expert-tensor-parallel-num-weight-shards": (
        lambda a: a.expert_gtp_weight_remat_size > 1,
        "its all-gathers and reduce-scatters overlap the next action, which is not tested with our schedules",
    ),
    "--use-megatron-fsdp": (
        lambda a: a.use_megatron_fsdp or a.use_torch_fsdp2,
        "its all-gathers and reduce-scatters follow whole micro-batches",
    ),
}

# flag: (whether it is used, why it does not work with --zero-bubble)
NOT_WITH_ZERO_BUBBLE: Refusals = {
    "--num-layers-per-virtual-pipeline-stage": (lambda a: _virtual(a) > 1, "ZB-H1 is defined for one stage per rank"),
    "--transformer-impl": (
        lambda a: a.transformer_impl != "local",
        "only upstream's local linear layers can compute the two gradients separately; give --transformer-impl local",
    ),
    "--num-experts": (lambda a: a.num_experts, "expert layers compute both gradients together"),
    "--delay-wgrad-compute": (lambda a: a.delay_wgrad_compute, "both flags defer the same weight gradients"),
    "--num-distributed-optimizer-instances": (
        lambda a: a.num_distributed_optimizer_instances > 1,
        "upstream would reduce the gradients of the first step twice",
    ),
}


REFUSALS = {
    "`--seq1f1b-splits` above 1": NOT_IN_SEGMENTS,
    "`--zero-bubble`": NOT_WITH_ZERO_BUBBLE,
    "any of our schedules": NOT_IN_SCHEDULES,
}


def add_pipeline_arguments(parser: ArgumentParser) -> None:
    """Add the flags of the pipeline schedules; those of virtual stages are upstream's."""
    group = parser.add_argument_group(title="longseq: pipeline schedules (Seq1F1B)")
    group.add_argument(
        "--seq1f1b-splits",
        type=int,
        default=1,
        metavar="K",
        help="cut every sequence into K segments that pass the pipeline one after the other; 1: upstream's schedule",
    )
    group.add_argument(
        "--seq1f1b-partition",
        default=PARTITION,
        metavar="even|balanced|documents|N1,N2,...",
        help="tokens per segment: equal lengths, equal cost of forward plus backward, equal cost of each micro-batch's "
        "packed documents, or as listed",
    )
    group.add_argument(
        "--seq1f1b-layer-seconds",
        metavar="FILE",
        help="balance by the measured time of a layer (python -m megatron.longseq.pipeline fit), not by FLOPs",
    )
    group.add_argument(
        "--seq1f1b-slack",
        type=int,
        default=0,
        metavar="E",
        help="run E more segment forwards before the first backward for each later stage: less bubble, more memory",
    )
    group.add_argument(
        "--zero-bubble",
        action="store_true",
        help="compute weight gradients separately from input gradients, when the rank would otherwise be idle (ZB-H1)",
    )
    group.add_argument(
        "--pipeline-trace",
        metavar="FOLDER",
        help="write the start and end of each action of one training step to this folder, one file per rank",
    )
    group.add_argument(
        "--pipeline-trace-step",
        type=int,
        default=TRACED,
        metavar="N",
        help="the training step to write, counted from 1 at the start of this run",
    )
    group.add_argument(
        "--pipeline-patience",
        type=float,
        default=PATIENCE,
        metavar="SECONDS",
        help="report what a rank is waiting for after it has waited this long for another stage",
    )


def wants_our_schedule(args: Namespace) -> bool:
    """Return whether the flags select one of our schedules; otherwise upstream's function runs."""
    return bool(
        getattr(args, "seq1f1b_splits", 1) > 1
        or getattr(args, "seq1f1b_slack", 0)
        or getattr(args, "zero_bubble", False)
        or getattr(args, "pipeline_trace", None)
    )


def check_pipeline_numbers(args: Namespace) -> None:
    """Check the values of the flags, right after they are parsed.

    Raises:
        ValueError: names the flag and the values that it takes.
    """
    for flag, least in (("seq1f1b_splits", 1), ("seq1f1b_slack", 0), ("pipeline_trace_step", 1)):
        if getattr(args, flag, least) < least:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give at least {least}.")
    if getattr(args, "seq1f1b_splits", 1) == 1:
        refuse_without_effect(args, "--seq1f1b-splits is 1", seq1f1b_partition=PARTITION)
    if not 0 < getattr(args, "pipeline_patience", 1.0) <= LONGEST_PATIENCE:
        raise ValueError(
            f"--pipeline-patience {args.pipeline_patience}: give seconds above 0 and at most {LONGEST_PATIENCE:.0e}."
        )
    if not wants_our_schedule(args):
        refuse_without_effect(args, "no flag selects our schedules", pipeline_patience=PATIENCE)
    if getattr(args, "pipeline_trace", None) == "":
        raise ValueError("--pipeline-trace is empty; name a folder, or leave it out.")
    if getattr(args, "pipeline_trace", None) is None:
        refuse_without_effect(args, "--pipeline-trace is not given", pipeline_trace_step=TRACED)
    else:
        folder = Path(args.pipeline_trace)
        refuse_unwritable(f"--pipeline-trace {args.pipeline_trace}", folder, "name a folder that is writable, or new")
    _check_layer_seconds(args)


def _check_layer_seconds(args: Namespace) -> None:
    """Check that the file of measurements can be read and would be used."""
    file = getattr(args, "seq1f1b_layer_seconds", None)
    if file is None:
        return
    if not args.zero_bubble and (args.seq1f1b_splits == 1 or args.seq1f1b_partition not in (PARTITION, "documents")):
        raise ValueError(
            f"--seq1f1b-layer-seconds {file}: the file balances segments, but neither --seq1f1b-splits above 1 with "
            "--seq1f1b-partition balanced or documents nor --zero-bubble is given; leave it out."
        )
    try:
        fit(read_samples(Path(file)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--seq1f1b-layer-seconds {file}: {getattr(error, 'strerror', None) or error}; give a JSON list of "
            "[begin, end, forward seconds, backward seconds], as python -m megatron.longseq.pipeline fit reads it."
        ) from error


def check_trace_step(args: Namespace) -> None:
    """Check, in validated arguments, that the run reaches the step of --pipeline-trace-step.

    Raises:
        ValueError: names the flag and the number of steps.
    """
    if args.pipeline_trace is None:
        return
    if args.skip_train:
        raise ValueError("--pipeline-trace: it records a training step, but --skip-train runs none; leave one out.")
    samples = None if args.train_samples is None or args.step_batch_size_schedule else args.train_samples
    steps = {
        "--train-iters": args.train_iters,
        "--train-samples": samples and samples // args.global_batch_size,
        "--exit-interval": args.exit_interval,
    }
    for flag, most in steps.items():
        if most and args.pipeline_trace_step > most:
            raise ValueError(
                f"--pipeline-trace-step {args.pipeline_trace_step}: {flag} ends this run after {most} steps at most, "
                f"so nothing would be written; give {most} or less."
            )


def refuse_unserved(args: Namespace) -> None:
    """Refuse flags that do not work with our schedules, in validated arguments.

    Raises:
        ValueError: lists every flag with the reason.
    """
    tables = [("our pipeline schedules", NOT_IN_SCHEDULES)]
    if args.seq1f1b_splits > 1:
        tables.append(("--seq1f1b-splits", NOT_IN_SEGMENTS))
    if args.zero_bubble:
        tables.append(("--zero-bubble", NOT_WITH_ZERO_BUBBLE))
    refuse(args, tables)


def _virtual(args: Namespace) -> int:
    return args.virtual_pipeline_model_parallel_size or 1


def _balances(args: Namespace) -> bool:
    """Return whether the router uses all tokens of a micro-batch, for an auxiliary loss or for routing."""
    kinds, losses = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    kinds = kinds if isinstance(kinds, list) else [kinds]
    losses = losses if isinstance(losses, list) else [losses] * len(kinds)
    routes = any(kind in ("sinkhorn", "quantile_balancing") for kind in kinds)
    return routes or any(kind != "none" and loss for kind, loss in zip(kinds, losses, strict=False))
