"""Conditions under which our attention runs over context-parallel ranks."""

from argparse import Namespace

from megatron.longseq.attention.arguments import wants_context
from patches.conditions import no_cuda
from patches.recompute.frozen import recomputes


def spreads_local_attention(args: Namespace) -> bool:
    """Return whether ours replaces upstream's local core attention, which runs on any machine without CUDA."""
    return wants_context(args) and (args.transformer_impl == "local" or no_cuda(args))


def spreads_segments(args: Namespace) -> bool:
    """Return whether segments are sharded over ranks; their attention is ours under any layer spec."""
    return wants_context(args) and args.seq1f1b_splits > 1


def spreads_attention(args: Namespace) -> bool:
    """Return whether any attention over context-parallel ranks is ours."""
    return spreads_local_attention(args) or spreads_segments(args)


def recomputes_spread_attention(args: Namespace) -> bool:
    """Return whether upstream recomputes layers with our attention over context-parallel ranks."""
    return spreads_attention(args) and recomputes(args)
