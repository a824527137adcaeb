"""Conditions under which our attention runs over context-parallel ranks, by the layers that hold it."""

from argparse import Namespace
from importlib.util import find_spec

from megatron.longseq.attention.arguments import serves_core_attention, wants_context
from megatron.longseq.flexsp.arguments import wants_flexsp
from patches.conditions import has_local_layers, no_cuda
from patches.recompute.frozen import recomputes


def spreads_attention(args: Namespace) -> bool:
    """Return whether attention over context-parallel ranks is ours, in any layers."""
    return wants_context(args) and serves_core_attention(args, is_local=has_local_layers(args))


def replaces_local_attention(args: Namespace) -> bool:
    """Return whether the core attention of local layers is replaced: over context-parallel ranks, or under --flexsp."""
    return (wants_context(args) or wants_flexsp(args)) and has_local_layers(args)


def replaces_te_attention(args: Namespace) -> bool:
    """Return whether ours replaces TransformerEngine's core attention in its own layers."""
    return (spreads_attention(args) or wants_flexsp(args)) and not has_local_layers(args)


def spreads_segments(args: Namespace) -> bool:
    """Return whether segments are sharded over ranks; their attention is ours under any layer spec."""
    return wants_context(args) and args.seq1f1b_splits > 1


def spreads_whole_sequences(args: Namespace) -> bool:
    """Return whether attention is ours without segments, which take the place of any core attention later."""
    return (spreads_attention(args) and not spreads_segments(args)) or wants_flexsp(args)


def has_transformer_engine() -> bool:
    """Return whether TransformerEngine is installed, and there is a GPU to run it on."""
    return find_spec("transformer_engine") is not None and not no_cuda(None)


def recomputes_spread_attention(args: Namespace) -> bool:
    """Return whether upstream recomputes layers with our attention over ranks."""
    return (spreads_attention(args) or wants_flexsp(args)) and recomputes(args)
