"""Rotary positions of a context-parallel rank, cut on the device where they lie."""

from typing import Any

import torch

from megatron.longseq.attention.layout import Layout, Mesh


def slice_for_this_rank(pos_emb: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
    """Return the positions of a rank: of the 2C chunks of a sequence the rank's and its mirror image.

    Args:
        pos_emb: of the whole sequence along `seq_dim`.
        seq_dim: dimension of the sequence.
        cp_group: context-parallel group.
    """
    layout = Layout(Mesh(cp_group.size(), 1), (pos_emb.shape[seq_dim],))
    spans = layout.positions(cp_group.rank(), 0)
    return torch.cat([pos_emb.narrow(seq_dim, span.begin, span.size) for span in spans], dim=seq_dim)
