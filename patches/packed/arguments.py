"""Callback at upstream's validation of flags: documents travel as cumulative lengths, and no mask is made."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.longseq.attention.arguments import NOT_WITH_DOCUMENTS, refuse_unserved_sft
from megatron.longseq.refusals import refuse, refused
from patches.packed.conditions import (
    ends_documents_at_eod,
    is_local,
    needs_our_attention,
    packs_documents,
    reads_documents,
)

_ASKING = ("--sft", "--dataloader-inter-document-masking", "--reset-attention-mask")


def with_packed_documents(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `validate_args`: let data sets return cu_seqlens, and refuse what attention within documents cannot serve.

    Raises:
        ValueError: Flags do not go together.
    """

    def validate_args(args: Namespace, defaults: dict[str, Any] | None = None) -> Any:
        if args.sft:
            refuse_unserved_sft(args)
            args.create_attention_mask_in_dataloader = False  # upstream's data set has none, and asserts this flag
        packs, at_eod = packs_documents(args), ends_documents_at_eod(args)
        _print_if_dense(args, at_eod=at_eod)
        if at_eod:
            # Scripts then read cu_seqlens from the samples, where the record `packed.samples` puts those of the tokens.
            args.dataloader_inter_document_masking = True
        result = original(args, defaults or {})
        if packs:
            flag = next(flag for flag in _ASKING if getattr(args, flag[2:].replace("-", "_")))
            refuse(args, [(flag, NOT_WITH_DOCUMENTS)])
            _separate_rotary_embeddings(args)
        return result

    return validate_args


def _print_if_dense(args: Namespace, *, at_eod: bool) -> None:
    """Print a line if --reset-attention-mask makes a dense mask."""
    if not args.reset_attention_mask or args.rank != 0 or not reads_documents(args) or needs_our_attention(args):
        return
    if not at_eod and is_local(args) and not args.dataloader_inter_document_masking:
        reasons = "\n".join(refused(args, NOT_WITH_DOCUMENTS))
        print(
            "> --reset-attention-mask: upstream's attention runs, with a dense mask that grows with the square of the "
            f"sequence, because attention within documents does not serve\n{reasons}",
            flush=True,
        )


def _separate_rotary_embeddings(args: Namespace) -> None:
    """Switch the fused rotary kernel off where sequences of a micro-batch have their documents at unlike positions."""
    several = max(args.micro_batch_size or 1, args.eval_micro_batch_size or 1) > 1
    if several and args.apply_rope_fusion and args.position_embedding_type == "rope" and not is_local(args):
        args.apply_rope_fusion = False
        if args.rank == 0:
            print(
                "> packed documents with --micro-batch-size above 1: rotary embeddings are not fused, because the "
                "fused kernel has one position for all sequences",
                flush=True,
            )
