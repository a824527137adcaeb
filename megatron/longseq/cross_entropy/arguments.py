"""The flag of the chunked cross entropy, and the flags of upstream's that it refuses."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megatron.longseq.refusals import Refusals, refuse

# flag: (whether the arguments use it, why it does not work with chunks)
NOT_IN_CHUNKS: Refusals = {
    "--cross-entropy-loss-fusion": (
        lambda a: a.cross_entropy_loss_fusion,
        "it is another implementation of the same loss, on whole logits; leave one of the two out",
    ),
    "--fp16-lm-cross-entropy": (
        lambda a: a.fp16_lm_cross_entropy,
        "the loss is computed in float32; upstream's GPTModel does not read this flag either",
    ),
    "--defer-embedding-wgrad-compute": (
        lambda a: a.defer_embedding_wgrad_compute,
        "it keeps the gradients of whole logits until the pipeline is flushed",
    ),
    "--mtp-num-layers": (lambda a: a.mtp_num_layers, "upstream computes the logits of its further predictions whole"),
    "--is-hybrid-model": (
        lambda a: a.is_hybrid_model or a.hybrid_layer_pattern,
        "HybridModel computes its loss from whole logits; only GPTModel is supported",
    ),
    "--fp8-output-proj": (lambda a: a.fp8_output_proj, "the output layer is then TransformerEngine's"),
    "--tensor-parallel-num-weight-shards": (
        lambda a: a.gtp_weight_remat_size > 1,
        "the output layer's weight would be gathered for every chunk",
    ),
    "--use-megatron-fsdp": (
        lambda a: a.use_megatron_fsdp or a.use_torch_fsdp2,
        "its gathers of the output layer's weight are not tested with chunks; --paro GGG shards parameters, too",
    ),
    "--config-logger-dir": (lambda a: a.config_logger_dir, "it writes the whole logits of every forward"),
    "--logits-save-dir": (
        lambda a: a.logits_save_dir is not None,
        "it saves the largest of a token's logits from the whole output of the output layer",
    ),
    "--logits-load-dir": (
        lambda a: a.logits_load_dir is not None,
        "its loss is computed from the whole output of the output layer",
    ),
    "--save-activations-interval": (
        lambda a: a.save_activations_interval is not None,
        "it would save losses as the output of the output layer; leave one of the two out",
    ),
    "--save-dgrads-interval": (
        lambda a: a.save_dgrads_interval is not None,
        "it would save gradients of losses as those of the output layer; leave one of the two out",
    ),
    "--cuda-graph-impl full_iteration": (
        lambda a: a.cuda_graph_impl == "full_iteration",
        "chunks are not tested inside a CUDA graph; local and transformer_engine capture layers only",
    ),
    "--overlap-moe-expert-parallel-comm": (
        lambda a: a.overlap_moe_expert_parallel_comm,
        "its schedule of parts of layers is not tested with chunks",
    ),
}

REFUSALS = {"`--cross-entropy-chunk-tokens`": NOT_IN_CHUNKS}


def add_cross_entropy_arguments(parser: ArgumentParser) -> None:
    """Add the flag of the chunked cross entropy."""
    group = parser.add_argument_group(title="longseq: chunked cross entropy")
    group.add_argument(
        "--cross-entropy-chunk-tokens",
        type=int,
        metavar="N",
        help="compute the output layer and the loss for N tokens at a time, forward and backward, so that whole logits "
        "are never held; backward computes the logits of each chunk again",
    )


def wants_chunks(args: Namespace) -> bool:
    """Return whether the loss is computed in chunks; otherwise upstream's own code runs."""
    return getattr(args, "cross_entropy_chunk_tokens", None) is not None


def check_cross_entropy_numbers(args: Namespace) -> None:
    """Check the value of the flag, right after it is parsed.

    Raises:
        ValueError: names the flag and the values that it takes.
    """
    if wants_chunks(args) and args.cross_entropy_chunk_tokens < 1:
        raise ValueError(f"--cross-entropy-chunk-tokens {args.cross_entropy_chunk_tokens}: give at least 1.")


def refuse_unserved_cross_entropy(args: Namespace) -> None:
    """Refuse flags that do not work with chunks, in validated arguments.

    Raises:
        ValueError: lists every flag with the reason.
    """
    refuse(args, [("--cross-entropy-chunk-tokens", NOT_IN_CHUNKS)])


def describe_chunks(args: Namespace, lengths: Sequence[int]) -> str:
    """Return a line about the chunks of this run, with a warning if one chunk holds all tokens of a forward.

    Args:
        args: validated arguments.
        lengths: tokens of each part of a sequence that passes the model at once (segments, or the whole sequence).
    """
    chunk, sequences = args.cross_entropy_chunk_tokens, max(args.micro_batch_size, args.eval_micro_batch_size or 0)
    tokens = sequences * max(lengths) // args.context_parallel_size
    text = f"cross entropy in chunks of {chunk} tokens"
    if chunk < tokens:
        return text
    return f"WARNING: {text}: a forward has at most {tokens} tokens on a rank, so its logits are held whole"
