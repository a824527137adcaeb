"""Flags of FlexSP, and the flags that it cannot be combined with."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megatron.longseq.attention.arguments import NOT_WITH_DOCUMENTS
from megatron.longseq.flexsp.plan.cost import FAMILIES, KindFamily
from megatron.longseq.flexsp.plan.plan import PLANNERS
from megatron.longseq.pipeline.arguments import NOT_IN_SEGMENTS
from megatron.longseq.refusals import Refusals, refuse, refuse_unwritable, refuse_without_effect

OVERLONG = ("split", "drop")
AHEAD = 2  # steps that are planned ahead, at the least

# Of these conditions, segments and plans have the same: a token's experts must not depend on the tokens beside it.
_WHY_NOT_WITH_EXPERTS = {
    "--moe-router-load-balancing-type": "the balance would be that of the tokens of one rank in one micro-batch, which "
    "are others under another plan; give none",
    "--moe-z-loss-coeff": "this auxiliary loss is a mean over the tokens of a rank, however many a plan gives it",
    "--moe-expert-capacity-factor": "which tokens are dropped would depend on the plan",
}
_NOT_TESTED = "it is not tested with groups that change from micro-batch to micro-batch"

# flag: (whether it is used, why it does not work with --flexsp)
NOT_WITH_FLEXSP: Refusals = {
    **{flag: row for flag, row in NOT_WITH_DOCUMENTS.items() if flag != "--allow-ambiguous-pad-tokens"},
    "--context-parallel-size": (
        lambda a: a.context_parallel_size > 1,
        "each micro-batch chooses the degrees of its groups over all data-parallel ranks; leave it out",
    ),
    "--cp-comm-type": (
        lambda a: list(a.cp_comm_type or ["p2p"]) != ["p2p"],
        "each group chooses its own communication; give --flexsp-kinds",
    ),
    "--seq1f1b-splits": (
        lambda a: getattr(a, "seq1f1b_splits", 1) > 1 or getattr(a, "zero_bubble", False),
        "its segments have one length in all micro-batches; leave it out",
    ),
    "--dataloader-inter-document-masking": (
        lambda a: a.dataloader_inter_document_masking,
        "documents never see one another under --flexsp; leave it out",
    ),
    "--reset-attention-mask": (
        lambda a: a.reset_attention_mask or a.reset_position_ids,
        "documents are those of the data set, and positions restart in each; leave it and --reset-position-ids out",
    ),
    "--micro-batch-size": (
        lambda a: a.micro_batch_size != 1 or (a.eval_micro_batch_size or 1) != 1,
        "a micro-batch holds one pack of documents in each group; give 1",
    ),
    "--mock-data": (lambda a: a.mock_data, "mock data has no documents; give --data-path"),
    "--dataloader-type": (
        lambda a: a.dataloader_type not in (None, "single", "external"),
        "FlexSP draws its documents itself, every epoch in another order; leave it out",
    ),
    "--dataloader-defer-npy-index-mmap": (
        lambda a: a.dataloader_defer_npy_index_mmap,
        "plans need the lengths of a blend's documents before one of them is read; leave it out",
    ),
    "--full-validation": (lambda a: a.full_validation, "validation has steps of --eval-iters; give these"),
    "--step-batch-size-schedule": (
        lambda a: a.step_batch_size_schedule is not None,
        "the documents of a step are counted from --global-batch-size, which has to be the same in every step",
    ),
    "--phase-transition-iterations": (
        lambda a: a.phase_transition_iterations,
        "the documents of a step are counted from the first step",
    ),
    "--decrease-batch-size-if-needed": (
        lambda a: a.decrease_batch_size_if_needed,
        "steps would train fewer documents than --global-batch-size says; give a multiple of the data-parallel size",
    ),
    "--iterations-to-skip": (lambda a: a.iterations_to_skip, "upstream skips micro-batches, but a step is one item"),
    **{flag: (NOT_IN_SEGMENTS[flag][0], why) for flag, why in _WHY_NOT_WITH_EXPERTS.items()},
    "--moe-router-enable-expert-bias": (
        lambda a: a.num_experts and a.moe_router_enable_expert_bias,
        "the bias would also follow from padding, of which every plan has another amount",
    ),
    "--expert-model-parallel-size": (
        lambda a: a.num_experts and a.expert_model_parallel_size > 1,
        "it is not tested with ranks that hold unlike numbers of tokens",
    ),
    "--use-megatron-fsdp": (lambda a: a.use_megatron_fsdp or a.use_torch_fsdp2, f"{_NOT_TESTED}; --paro GGG shards"),
    "--tp-comm-overlap": (lambda a: a.tp_comm_overlap, "its buffers have one shape for all micro-batches"),
    "--fp8-format": (
        lambda a: a.fp8 or getattr(a, "fp4", None),
        "its matrix products need multiples of 16 tokens on every rank, which packs of documents are not",
    ),
    "--logits-save-dir": (
        lambda a: a.logits_save_dir is not None,
        "it saves a fixed number of micro-batches of one size, but plans have other ones in every step",
    ),
    "--perform-rl-step": (lambda a: a.perform_rl_step, "its rollouts are micro-batches of their own"),
    "--pipeline-model-parallel-size with --flexsp-refit": (
        lambda a: a.flexsp_refit and a.pipeline_model_parallel_size > 1,
        "the passes of micro-batches overlap between stages, so that single groups cannot be measured; fit without "
        "stages, and give --flexsp-cost",
    ),
    "--tensor-parallel-num-weight-shards": (lambda a: getattr(a, "gtp_weight_remat_size", 1) > 1, _NOT_TESTED),
}
REFUSALS = {"`--flexsp`": NOT_WITH_FLEXSP}


def add_flexsp_arguments(parser: ArgumentParser) -> None:
    """Add the flags of FlexSP."""
    group = parser.add_argument_group(title="longseq: flexible sequence parallelism (FlexSP)")
    group.add_argument(
        "--flexsp",
        action="store_true",
        help="plan every step from the lengths of its documents: micro-batches, and in each of them "
        "sequence-parallel groups of unlike degrees over all data-parallel ranks",
    )
    group.add_argument(
        "--flexsp-max-tokens-per-rank",
        type=int,
        metavar="T",
        help="most tokens of a micro-batch that fit on a rank; a group of degree d takes T * d (required)",
    )
    group.add_argument(
        "--flexsp-degrees",
        default="auto",
        metavar="auto|D,D,...",
        help="degrees of groups, such as 1,2,4,8; auto: all that the ranks allow. One degree is a static plan",
    )
    group.add_argument(
        "--flexsp-kinds",
        default="ulysses,ring,hybrid",
        metavar="KIND,...",
        help="how groups distribute attention: ulysses (where the heads allow it), ring, or both (hybrid)",
    )
    group.add_argument(
        "--flexsp-planner",
        choices=PLANNERS,
        default="heuristic",
        help="heuristic; exact: the fastest plan, for few documents; static: the best single degree for all "
        "micro-batches; sorted: the best single degree of every micro-batch of documents sorted by length",
    )
    group.add_argument(
        "--flexsp-cost",
        metavar="NAME|FILE",
        help="cost model: constants of the paper by name (7b-a100, 13b-a100, 30b-a100), or a JSON file; by default an "
        "estimate from the shape of the model",
    )
    group.add_argument(
        "--flexsp-refit",
        action="store_true",
        help="fit the cost model to measured times at every --log-interval; later steps are planned with it",
    )
    group.add_argument(
        "--flexsp-save-cost",
        metavar="FILE",
        help="write the cost model that --flexsp-refit has fitted to this file (JSON), for --flexsp-cost",
    )
    group.add_argument(
        "--flexsp-batch-tokens",
        type=int,
        metavar="N",
        help="global batch in tokens: a step takes documents until they hold N tokens, and --global-batch-size only "
        "counts the steps",
    )
    group.add_argument(
        "--flexsp-overlong",
        choices=OVERLONG,
        default="split",
        help="documents of more than --seq-length tokens are split into documents, or dropped; both are counted",
    )
    group.add_argument(
        "--flexsp-plan-ahead",
        type=int,
        default=AHEAD,
        metavar="N",
        help="steps that are planned in the background while one is trained",
    )


def wants_flexsp(args: Namespace) -> bool:
    """Return whether steps are planned by FlexSP."""
    return bool(getattr(args, "flexsp", False))


def parse_degrees(text: str) -> tuple[int, ...] | None:
    """Return the degrees that --flexsp-degrees lists, ascending; None for auto.

    Raises:
        ValueError: It is not a list of whole numbers above 0, or names one twice.
    """
    if text == "auto":
        return None
    words = text.split(",")
    degrees = sorted(int(word) for word in words if word.strip().isdecimal())
    if len(degrees) != len(words) or degrees[0] < 1 or len(set(degrees)) != len(degrees):
        raise ValueError(f"--flexsp-degrees {text}: give auto, or whole numbers above 0, each once, such as 1,2,4,8.")
    return tuple(degrees)


def parse_kinds(text: str) -> tuple[KindFamily, ...]:
    """Return the kinds of groups that --flexsp-kinds lists.

    Raises:
        ValueError: A kind is unknown or named twice.
    """
    words = text.split(",")
    if not set(words) <= set(FAMILIES) or len(set(words)) != len(words):
        raise ValueError(f"--flexsp-kinds {text}: give some of {', '.join(FAMILIES)}, each once.")
    return tuple(family for family in FAMILIES if family in words)


def check_flexsp_numbers(args: Namespace) -> None:
    """Refuse invalid values, right after parsing.

    Raises:
        ValueError: Names the flag and the values that it takes.
    """
    if not wants_flexsp(args):
        refuse_without_effect(
            args,
            "--flexsp is not given",
            flexsp_max_tokens_per_rank=None,
            flexsp_degrees="auto",
            flexsp_kinds="ulysses,ring,hybrid",
            flexsp_planner="heuristic",
            flexsp_cost=None,
            flexsp_refit=False,
            flexsp_save_cost=None,
            flexsp_batch_tokens=None,
            flexsp_overlong="split",
            flexsp_plan_ahead=AHEAD,
        )
        return
    if args.flexsp_save_cost is not None:
        if not args.flexsp_refit:
            refuse_without_effect(args, "--flexsp-refit is not given", flexsp_save_cost=None)
        folder = Path(args.flexsp_save_cost).absolute().parent
        refuse_unwritable(f"--flexsp-save-cost {args.flexsp_save_cost}", folder, "give a file in a writable folder")
    parse_degrees(args.flexsp_degrees)
    parse_kinds(args.flexsp_kinds)
    if args.flexsp_max_tokens_per_rank is None:
        raise ValueError(
            "--flexsp: give --flexsp-max-tokens-per-rank T, the most tokens of a micro-batch that fit on a rank; a "
            "document of --seq-length tokens then needs a group of at least that many ranks."
        )
    for name, least in (("flexsp_max_tokens_per_rank", 1), ("flexsp_batch_tokens", 1), ("flexsp_plan_ahead", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least {least}.")


def refuse_unserved_flexsp(args: Namespace) -> None:
    """Refuse flags that FlexSP does not support, in arguments that upstream has validated or is about to.

    Raises:
        ValueError: Lists every such flag with the reason.
    """
    refuse(args, [("--flexsp", NOT_WITH_FLEXSP)])
