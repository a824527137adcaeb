"""Flags of context parallelism, and the flags that our attention refuses."""

import importlib.util
from argparse import ArgumentParser, Namespace
from typing import get_args

from megatron.longseq.attention.plan.layout import Placement
from megatron.longseq.attention.plan.layout_choice import LayoutKind
from megatron.longseq.data.splits import reads_prepared
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
    "--mtp-num-layers": (lambda a: a.mtp_num_layers, "it is not tested with context parallelism"),
    "--hybrid-context-parallel": (lambda a: a.hybrid_context_parallel, "it changes the ranks from batch to batch"),
    "--cuda-graph-impl": (lambda a: a.cuda_graph_impl != "none", "messages between ranks cannot be captured"),
}


# What puts another core attention than ours into TransformerEngine's layers.
NOT_IN_TE_LAYERS: Refusals = {
    "--transformer-impl inference_optimized": (
        lambda a: a.transformer_impl == "inference_optimized",
        "its layers are for inference and keep TransformerEngine's attention",
    ),
    "--heterogeneous-layers-config-path": (
        lambda a: a.heterogeneous_layers_config_path is not None or a.heterogeneous_layers_config_encoded_json,
        "its layer specs name TransformerEngine's attention themselves",
    ),
    "--use-kitchen-attention": (lambda a: a.use_kitchen_attention, "the layers would hold Kitchen's attention"),
}


# Of the flags above, those that attention within packed documents does not serve on one rank either, and why.
_WHY_NOT_WITH_DOCUMENTS = {
    "--attention-dropout": "the flash kernels do not implement dropout; give 0",
    "--multi-latent-attention": "its keys and values have different sizes",
    "--is-hybrid-model": "recurrent layers would pass their state from document to document",
    "--experimental-attention-variant": "it has its own core attention",
    "--softmax-type": "the attention kernels implement the plain softmax only",
    "--qk-clip": "the attention kernels do not store the logits",
    "--window-size": "a window that includes later tokens is not causal; give RIGHT 0",
    "--mtp-num-layers": "its labels may belong to the next document",
    "--hybrid-context-parallel": "it changes the ranks from batch to batch",
    "--cuda-graph-impl": "documents differ from batch to batch, and a graph does not",
}
# flag: (whether the arguments use it, why attention within packed documents does not serve it)
NOT_WITH_DOCUMENTS: Refusals = {
    **{flag: (NOT_WITH_CONTEXT[flag][0], why) for flag, why in _WHY_NOT_WITH_DOCUMENTS.items()},
    "--position-embedding-type mrope": (
        lambda a: a.position_embedding_type == "mrope",
        "its positions are those of images, not of documents",
    ),
    "--allow-ambiguous-pad-tokens": (
        lambda a: a.reset_attention_mask and a.allow_ambiguous_pad_tokens,
        "where padding is the end-of-document token, samples do not tell where documents end",
    ),
}

# flag: (whether the arguments use it, why upstream's SFT data set does not serve it)
NOT_WITH_SFT: Refusals = {
    "--reset-attention-mask": (
        lambda a: a.reset_attention_mask,
        "each conversation is a document; leave it out",
    ),
    "--reset-position-ids": (lambda a: a.reset_position_ids, "positions restart in every conversation; leave it out"),
    "--mock-data": (lambda a: a.mock_data, "there are no mock conversations; give --data-path a jsonl file"),
    "--tokenizer-type": (
        lambda a: a.tokenizer_type != "SFTTokenizer" and not reads_prepared(a),
        "no other tokenizer knows the roles of a conversation; give --tokenizer-type SFTTokenizer",
    ),
    "the package datasets": (
        lambda a: importlib.util.find_spec("datasets") is None and not reads_prepared(a),
        "upstream reads conversations with it; pip install -e .[sft]",
    ),
    "the package transformers": (
        lambda a: importlib.util.find_spec("transformers") is None and not reads_prepared(a),
        "upstream's SFTTokenizer needs it; pip install -e .[sft]",
    ),
}

REFUSALS = {
    "`--context-parallel-size` above 1": NOT_WITH_CONTEXT,
    "`--context-parallel-attention longseq` in TransformerEngine's layers": NOT_IN_TE_LAYERS,
    "packed documents": NOT_WITH_DOCUMENTS,
    "`--sft`": NOT_WITH_SFT,
}


def add_context_arguments(parser: ArgumentParser) -> None:
    """Add the flags of context parallelism; sizes and communication types are upstream's own flags."""
    group = parser.add_argument_group(title="longseq: context parallelism (Ulysses x ring)")
    group.add_argument(
        "--context-parallel-auto",
        action="store_true",
        help="choose --cp-comm-type: the largest all-to-all (Ulysses) that heads allow within a node, a ring across",
    )
    group.add_argument(
        "--context-parallel-attention",
        choices=("auto", "longseq", "transformer_engine"),
        default="auto",
        help="core attention over the ranks, in layers of either kind: ours (longseq), TransformerEngine's, or (auto) "
        "TransformerEngine's in its own layers without segments, and ours otherwise",
    )
    group.add_argument(
        "--context-parallel-placement",
        choices=get_args(Placement),
        default="head-first",
        help="neighbouring ranks with a2a+p2p: those of an all-to-all (head-first) or those of a ring (context-first)",
    )
    group.add_argument(
        "--context-parallel-layout",
        choices=get_args(LayoutKind),
        default="auto",
        help="packed documents on a ring: a zigzag of the sequence, one of each document, or the faster of the two",
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


def serves_core_attention(args: Namespace, *, is_local: bool) -> bool:
    """Return whether core attention over context-parallel ranks is ours, not TransformerEngine's.

    Args:
        args: parsed arguments.
        is_local: whether the layers are upstream's local ones, not TransformerEngine's.
    """
    choice = getattr(args, "context_parallel_attention", "auto")
    return choice == "longseq" or (choice == "auto" and (is_local or getattr(args, "seq1f1b_splits", 1) > 1))


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
            context_parallel_attention="auto",
            ring_window=None,
            context_parallel_layout="auto",
            context_parallel_placement="head-first",
        )


def refuse_unserved_context(args: Namespace, *, is_local: bool = True) -> None:
    """Refuse flags that our distributed attention does not support, after upstream has validated its arguments.

    Args:
        args: upstream's arguments.
        is_local: whether the layers are upstream's local ones, not TransformerEngine's.

    Raises:
        ValueError: Lists every such flag with the reason.
    """
    in_te_layers = [] if is_local else [("--context-parallel-attention longseq", NOT_IN_TE_LAYERS)]
    refuse(args, [("--context-parallel-size", NOT_WITH_CONTEXT), *in_te_layers])


def refuse_unserved_te_attention(args: Namespace, *, is_installed: bool) -> None:
    """Refuse TransformerEngine's core attention where there is none, and in segments.

    Args:
        args: parsed arguments.
        is_installed: whether TransformerEngine is installed, and a GPU is there.

    Raises:
        ValueError: Says why, and what to give instead.
    """
    if getattr(args, "context_parallel_attention", "auto") != "transformer_engine":
        return
    flag = "--context-parallel-attention transformer_engine"
    if getattr(args, "seq1f1b_splits", 1) > 1:
        raise ValueError(
            f"{flag}: it does not see the keys of earlier segments; leave the flag out, or give --seq1f1b-splits 1."
        )
    if not is_installed:
        raise ValueError(
            f"{flag}: TransformerEngine is not installed here, or there is no GPU to run it on; leave the flag out for "
            "attention of this project."
        )


def refuse_unserved_sft(args: Namespace) -> None:
    """Refuse flags that upstream's data set of conversations does not serve, and packages that it needs.

    Raises:
        ValueError: Lists every such flag or package with the reason.
    """
    refuse(args, [("--sft", NOT_WITH_SFT)])
