"""When attention is spread over context-parallel ranks by us."""

from argparse import Namespace

from megatron.longseq.attention.arguments import wants_context
from patches.conditions import no_cuda
from patches.recompute.frozen import recomputes


def context_parallel(args: Namespace) -> bool:
    """Whether there are context-parallel ranks: our flags choose among upstream's for TransformerEngine, too."""
    return wants_context(args)


def spreads_local_attention(args: Namespace) -> bool:
    """Whether core attention is upstream's local one, which a machine without CUDA always takes."""
    return context_parallel(args) and (args.transformer_impl == "local" or no_cuda(args))


def spreads_segments(args: Namespace) -> bool:
    """Whether segments of a sequence are spread: their attention is ours whatever the layer spec."""
    return context_parallel(args) and args.seq1f1b_splits > 1


def spreads_attention(args: Namespace) -> bool:
    """Whether any attention over context-parallel ranks is ours."""
    return spreads_local_attention(args) or spreads_segments(args)


def recomputes_spread_attention(args: Namespace) -> bool:
    """Whether our attention over context-parallel ranks runs in layers that upstream computes again in backward."""
    return spreads_attention(args) and recomputes(args)
