"""This rank's part of a planned micro-batch: the documents of its own group, packed and cut over the group's ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import copy_to
from megatron.longseq.attention.plan.comm_type import CommType
from megatron.longseq.attention.plan.layout import Layout, Mesh, length_multiple
from megatron.longseq.attention.plan.layout_choice import choose_layout
from megatron.longseq.attention.plan.packing import documents_of, has_borders, positions_in_documents
from megatron.longseq.attention.runtime.packed_batch import PackedDocuments
from megatron.longseq.attention.runtime.strategies import CPStrategy
from megatron.longseq.flexsp.runtime.documents import Document


@dataclass(frozen=True)
class GroupBatch:
    """What one rank trains in one micro-batch.

    Attributes:
        tokens, labels, position_ids: int64 [1, tokens of the rank].
        loss_mask: float32 [1, tokens of the rank].
        packed: documents and positions of the pack, and the communicators of its group.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    packed: PackedDocuments


def pack_documents(
    documents: Sequence[Document], strategy: CPStrategy, pad: int, tensor: int, device: torch.device
) -> GroupBatch:
    """Pack documents one after the other and return this rank's part.

    The pack is padded at its end, to the multiple that its own group needs; the padding is a document of its own and
    has no loss. Without documents, the rank computes such padding alone, so that every rank takes part in the
    collectives of a micro-batch.

    Args:
        documents: documents of the group.
        strategy: communicators of the group.
        pad: id of padding.
        tensor: tensor-parallel ranks that share a rank's tokens under --sequence-parallel, else 1.
        device: where the tensors are needed.
    """
    mesh = strategy.mesh
    sizes = [len(one.tokens) for one in documents]
    multiple = length_multiple(mesh.size, tensor)
    total = max(1, -(-sum(sizes) // multiple)) * multiple
    borders = list(accumulate(sizes, initial=0))
    found = documents_of([*borders, total], 1, total)
    pieces = choose_layout(found, (CommType(mesh),), (total,)).pieces if mesh.size > 1 else None
    ranges = Layout(Mesh(mesh.size, 1), (total,), pieces=pieces).positions(strategy.rank, 0)
    rows = torch.cat([torch.arange(*one) for one in ranges])
    positions = torch.cat([torch.arange(*one) for one in positions_in_documents(found, 0, ranges)])
    filler = total - sum(sizes)
    tokens, labels, mask = (
        copy_to(
            torch.from_numpy(
                np.concatenate([*(getattr(one, name) for one in documents), np.full(filler, fill, dtype)])
            )[rows],
            device,
        )[None]
        for name, fill, dtype in (
            ("tokens", pad, np.int64),
            ("labels", pad, np.int64),
            ("loss_mask", 0, np.float32),
        )
    )
    positions = copy_to(positions, device)
    packed = PackedDocuments(
        qkv_format="sbhd",
        documents=found if has_borders(found) else None,
        pieces=pieces,
        positions=positions,
        length=total,
        strategy=strategy,
    )
    return GroupBatch(tokens, labels, mask, positions[None], packed)
