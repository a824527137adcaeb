"""Flags under which upstream's attention and ours compute different models; a run warns of them at its start."""

from argparse import Namespace

FUSED_SOFTMAX_LIMIT = 4096  # longest row of upstream's fused softmax, in keys
# Arguments that `model_difference` reads.
READS = (
    "window_size",
    "reset_attention_mask",
    "dataloader_inter_document_masking",
    "transformer_impl",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "masked_softmax_fusion",
    "seq_length",
    "bf16",
    "fp16",
)


def model_difference(
    args: Namespace, *, is_ours: bool, is_local: bool, on_gpu: bool, is_dense: bool = True
) -> str | None:
    """Return a warning if upstream's attention and ours compute different models under these flags, else None.

    Ours (`--seq1f1b-splits` above 1, `--context-parallel-size` above 1 unless core attention is TransformerEngine's, or
    packed documents without a mask) keeps documents apart in every layer, inside any window.

    Args:
        args: upstream's parsed arguments, not yet validated.
        is_ours: whether this run uses our attention.
        is_local: whether upstream's attention would be its local one, and not TransformerEngine's.
        on_gpu: whether the run is on a GPU.
        is_dense: whether --reset-attention-mask makes a dense mask for upstream's local attention on one rank.
    """
    reasons = [*_window(args, is_local), *_documents(args, is_local, on_gpu, is_dense)]
    if not reasons:
        return None
    listed = "".join(f"\n>   - {reason}" for reason in reasons)
    if is_ours:
        return (
            "> WARNING: with --seq1f1b-splits 1 and --context-parallel-size 1 these flags would train another model, "
            f"so losses of such a run are not comparable with this one's. Upstream's attention runs there:{listed}"
        )
    return (
        "> WARNING: with --seq1f1b-splits or --context-parallel-size above 1 these flags would train another model, so "
        f"losses of such a run are not comparable with this one's. Upstream's attention runs here:{listed}"
    )


def _window(args: Namespace, is_local: bool) -> list[str]:
    window = args.window_size
    if not is_local or window is None or min(window) >= 0:
        return []
    return [
        f"--window-size {window[0]},{window[1]}: its local attention takes -1 as a number of keys, where ours and "
        "TransformerEngine take a left -1 as no limit and a right -1 as 0"
    ]


def _documents(args: Namespace, is_local: bool, on_gpu: bool, is_dense: bool) -> list[str]:
    """Return the cases in which tokens see other documents in upstream's attention. In ours they never do."""
    if not args.reset_attention_mask or args.dataloader_inter_document_masking or (is_local and not is_dense):
        return []
    flag = "--reset-attention-mask"
    if not is_local:
        return [f"{flag}: TransformerEngine's causal attention reads no mask, so tokens see other documents"]
    reasons = []
    if args.window_size is not None:
        reasons.append(
            f"{flag} with --window-size: in layers with a window (all, or as --window-attn-skip-freq says) tokens see "
            "other documents inside the window; ours keeps both the window and the documents"
        )
    if _between_stages(args):
        reasons.append(
            f"{flag} with more than 2 pipeline stages, virtual ones included: those between the first and the last get "
            "no mask, so tokens see other documents there"
        )
    is_half = args.bf16 or args.fp16
    if on_gpu and is_half and args.masked_softmax_fusion and args.seq_length <= FUSED_SOFTMAX_LIMIT:
        reasons.append(
            f"{flag} with the fused softmax: it is causal and reads no mask, so tokens see other documents; "
            "--no-masked-softmax-fusion reads it"
        )
    return reasons


def _between_stages(args: Namespace) -> bool:
    stages = args.pipeline_model_parallel_size
    names = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
    virtual = any(getattr(args, name, None) is not None for name in names)
    return stages > 2 or (
        stages == 2 and (virtual or getattr(args, "pipeline_model_parallel_layout", None) is not None)
    )
