"""Conditions under which our attention reads packed documents."""

from argparse import Namespace

from megatron.longseq.attention.arguments import NOT_WITH_DOCUMENTS, serves_core_attention, wants_context
from megatron.longseq.flexsp.arguments import wants_flexsp
from megatron.longseq.refusals import refused
from patches.conditions import has_local_layers, no_cuda


def is_local(args: Namespace) -> bool:
    """Return whether upstream's layers are its local ones, which they are on any machine without CUDA."""
    return has_local_layers(args) if hasattr(args, "transformer_impl") else no_cuda(args)


def reads_documents(args: Namespace) -> bool:
    """Return whether packed documents of a model reach our attention, whoever packs them."""
    if wants_flexsp(args):
        return True
    if not wants_context(args):
        return is_local(args) or getattr(args, "seq1f1b_splits", 1) > 1
    return serves_core_attention(args, is_local=is_local(args))


def reads_documents_on_one_rank(args: Namespace) -> bool:
    """Return whether our attention takes the place of upstream's local one for packed documents on one rank."""
    return is_local(args) and not wants_context(args)


def needs_our_attention(args: Namespace) -> bool:
    """Return whether no attention of upstream's could take the place of ours."""
    return wants_context(args) or getattr(args, "seq1f1b_splits", 1) > 1


def serves_documents(args: Namespace) -> bool:
    """Return whether attention within documents serves all flags. A YAML file that leaves flags out says too little."""
    try:
        return not refused(args, NOT_WITH_DOCUMENTS)
    except AttributeError:
        return False


def ends_documents_at_eod(args: Namespace) -> bool:
    """Return whether documents end after end-of-document tokens and travel as cu_seqlens (--reset-attention-mask).

    Without context parallelism and segments, upstream's own attention reads a dense mask where ours does not serve the
    flags. With --dataloader-inter-document-masking the data set knows where documents end.
    """
    if not getattr(args, "reset_attention_mask", False) or _has_cu_seqlens(args):
        return False
    return reads_documents(args) and (needs_our_attention(args) or serves_documents(args))


def packs_documents(args: Namespace) -> bool:
    """Return whether every micro-batch has cu_seqlens that our attention reads."""
    return reads_documents(args) and (_has_cu_seqlens(args) or ends_documents_at_eod(args))


def packs_conversations(args: Namespace) -> bool:
    """Return whether samples of conversations (--sft) reach our attention."""
    return bool(getattr(args, "sft", False)) and reads_documents(args)


def reads_documents_everywhere(args: Namespace) -> bool:
    """Return whether every pipeline stage has to build the data set, because it reads cu_seqlens from it."""
    stored = getattr(args, "dataloader_inter_document_masking", False) and not getattr(args, "sft", False)
    return bool(stored) or ends_documents_at_eod(args)


def _has_cu_seqlens(args: Namespace) -> bool:
    """Return whether upstream's data set returns cu_seqlens itself."""
    return bool(getattr(args, "sft", False) or getattr(args, "dataloader_inter_document_masking", False))
