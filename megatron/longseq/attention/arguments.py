"""Flags of context parallelism, and the flags that our attention refuses."""

from argparse import ArgumentParser, Namespace
from typing import get_args

from megatron.longseq.attention.plan.layout import Placement
from megatron.longseq.refusals import Refusals, refuse, refuse_without_effect

# flag: (whether the arguments use it, why our attention does not support it over context-parallel ranks)
NOT_WITH_CONTEXT: Refusals = {
    "--attention-dropout": (
        lambda a: a.attention_dropout > 0,
        "the flash kernels do not implement dropout, and each rank would draw a different mask; give 0",
    ),
    "--multi-latent-attention": (
        lambda a: a.multi_latent_attention,
        "its keys and values have different sizes, but our attention sends them as one tensor",
    ),
    "--is-hybrid-model": (
        lambda a: a.is_hybrid_model or a.hybrid_layer_pattern or a.linear_attention_freq,
        "recurrent layers are not distributed over context-parallel ranks",
    ),
    "--experimental-attention-variant": (
        lambda a: a.experimental_attention_variant is not None,
        "it has its own core attention, which is not distributed over ranks",
    ),
    "--softmax-type": (lambda a: a.softmax_type != "vanilla", "the attention kernels implement the plain softmax only"),
    "--qk-clip": (lambda a: a.qk_clip or a.log_max_attention_logit, "the attention kernels do not store the logits"),
    "--window-size": (
        lambda a: a.window_size is not None and a.window_size[1] not in (0, -1),
        "a window that includes later tokens is not causal; give RIGHT 0",
    ),
    "--reset-attention-mask": (
        lambda a: a.reset_attention_mask and not a.create_attention_mask_in_dataloader,
        "document boundaries are read from the attention mask; leave --no-create-attention-mask-in-dataloader out",
    ),
    "--reset-attention-mask with more than 2 pipeline stages": (
        lambda a: a.reset_attention_mask and a.seq1f1b_splits == 1 and _stages(a) > 2,
        "upstream passes no mask to the stages in the middle (virtual stages count); --seq1f1b-splits 2 or more does",
    ),
    "--sft": (lambda a: a.sft, "packed sequences (THD) are not supported yet; --reset-attention-mask packs documents"),
    "--dataloader-inter-document-masking": (
        lambda a: a.dataloader_inter_document_masking,
        "packed sequences (THD) are not supported yet; --reset-attention-mask packs documents",
    ),
    "--mtp-num-layers": (lambda a: a.mtp_num_layers, "it is not tested with context parallelism"),
    "--hybrid-context-parallel": (lambda a: a.hybrid_context_parallel, "it changes the ranks from batch to batch"),
    "--cuda-graph-impl": (lambda a: a.cuda_graph_impl != "none", "messages between ranks cannot be captured"),
}


REFUSALS = {"`--context-parallel-size` above 1": NOT_WITH_CONTEXT}


def _stages(args: Namespace) -> int:
    return args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)  # type: ignore[no-any-return]


def add_context_arguments(parser: ArgumentParser) -> None:
    """Add the flags of context parallelism; sizes and communication types are upstream's own flags."""
    group = parser.add_argument_group(title="longseq: context parallelism (Ulysses x ring)")
    group.add_argument(
        "--context-parallel-auto",
        action="store_true",
        help="choose --cp-comm-type: the largest all-to-all (Ulysses) that heads allow within a node, a ring across",
    )
    group.add_argument(
        "--context-parallel-placement",
        choices=get_args(Placement),
        default="head-first",
        help="neighbouring ranks with a2a+p2p: those of an all-to-all (head-first) or those of a ring (context-first)",
    )
    group.add_argument(
        "--ring-window",
        type=int,
        metavar="W",
        help="double ring: send keys and values around windows of W ranks and, at the same time, between windows",
    )


def wants_context(args: Namespace) -> bool:
    """Return whether attention is distributed over context-parallel ranks."""
    return getattr(args, "context_parallel_size", 1) > 1


def check_context_numbers(args: Namespace) -> None:
    """Refuse invalid values, right after parsing.

    Raises:
        ValueError: Names the flag and the values it takes.
    """
    window = getattr(args, "ring_window", None)
    if window is not None and window < 1:
        raise ValueError(f"--ring-window {window}: give at least 1.")
    if not wants_context(args):
        refuse_without_effect(
            args,
            "--context-parallel-size is 1",
            context_parallel_auto=False,
            ring_window=None,
            context_parallel_placement="head-first",
        )


def refuse_unserved_context(args: Namespace) -> None:
    """Refuse flags that our distributed attention does not support, after upstream has validated its arguments.

    Raises:
        ValueError: Lists every such flag with the reason.
    """
    refuse(args, [("--context-parallel-size", NOT_WITH_CONTEXT)])
