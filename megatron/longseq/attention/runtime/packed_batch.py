"""Packed documents of a micro-batch, read once from the `PackedSeqParams` that a script hands to the model.

Upstream calls this the THD format: documents follow one another without padding between sequences, and cumulative
lengths say where each begins. Layers here keep the layout [tokens, sequences, ...]. The model passes them a
`PackedDocuments` in the place of the script's `PackedSeqParams`: it has the documents for the attention planner, and
the rotary frequencies are those of each token's position in its document.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron.longseq.attention.kernels.base import copy_to
from megatron.longseq.attention.plan.layout import Pieces
from megatron.longseq.attention.plan.packing import documents_of, has_borders, positions_in_documents
from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.attention.runtime.comm import GroupCollectives
from megatron.longseq.attention.runtime.document_layouts import DocumentLayouts
from megatron.longseq.attention.runtime.strategies import CPStrategy

DIGEST_BASE = 1_000_003  # an odd factor, so that the order of lengths changes the digest


@dataclass
class PackedDocuments(PackedSeqParams):
    """Documents of a micro-batch, as layers get them. It is no THD batch: tensors keep their batch dimension.

    Attributes:
        documents: documents of the whole sequences; None: each sequence is one document.
        pieces: pieces by which the tokens are distributed over context-parallel ranks, see `Layout`.
        positions: position in its document of each token of this rank, int64 [tokens] or [tokens, sequences].
        length: tokens of a whole sequence.
        strategy: communicators of the micro-batch's own group (--flexsp); None: those that the layer was built with.
    """

    documents: Documents | None = None
    pieces: Pieces | None = None
    positions: Tensor | None = None
    length: int = 0
    strategy: CPStrategy | None = None

    def rotary(self, whole: Tensor) -> Tensor:
        """Return the rotary frequencies of this rank's tokens, [tokens, 1 or sequences, 1, d].

        Args:
            whole: frequencies of the positions from 0 on, [at least `length`, 1, 1, d].

        Raises:
            RuntimeError: There are no positions.
        """
        if self.positions is None:
            raise RuntimeError("packed documents without positions: only the model's own layers may read them")
        if self.positions.dim() == 1:
            return whole[self.positions]
        return whole[:, 0][self.positions]


@dataclass
class PackedReader:
    """Reads the documents of every micro-batch on one rank, and checks that ranks agree on them.

    Attributes:
        ranks: number of context-parallel ranks.
        rank: this context-parallel rank.
        agreement: collectives of all ranks that read the same micro-batch on this stage; None: there is no other one.
        layouts: layouts of the micro-batches over context-parallel ranks, and segments.
        always: whether every micro-batch has documents, so that a rank without them is an error on all ranks.
        digests: for every model chunk, a digest of each micro-batch since `take_digests`.
    """

    ranks: int
    rank: int
    agreement: GroupCollectives | None = None
    layouts: DocumentLayouts = field(default_factory=DocumentLayouts)
    always: bool = False
    digests: dict[int, list[int]] = field(default_factory=dict)

    def documents(self, params: PackedSeqParams | None, sequences: int, length: int, chunk: int = 0) -> Documents:
        """Return the documents of a micro-batch. All ranks of `agreement` call this. Synchronizes with the device.

        Args:
            params: what the script hands to the model.
            sequences: number of sequences.
            length: tokens of a whole sequence.
            chunk: identifies the model chunk.

        Raises:
            ValueError: The script hands none, they are malformed, or ranks disagree.
        """
        borders, problem = _borders_of(params)
        digest, values = self._agreed(borders, problem)
        if problem is not None:
            raise ValueError(f"{self._where()}: {problem}")
        self.digests.setdefault(chunk, []).append(digest)
        try:
            return documents_of(values, sequences, length)
        except ValueError as error:
            raise ValueError(f"{self._where()}: {error}") from error

    def packed(self, documents: Documents, length: int, segment: int, device: torch.device) -> PackedDocuments:
        """Return what layers get for one segment (0 without segments).

        Args:
            documents: documents of the micro-batch.
            length: tokens of a whole sequence.
            segment: index of the segment.
            device: device of the positions.
        """
        layout = self.layouts.layout(documents, length)
        ranges = layout.positions(self.rank, segment)
        rows = [
            torch.cat([torch.arange(*one) for one in positions_in_documents(documents, sequence, ranges)])
            for sequence in range(len(documents.spans))
        ]
        positions = rows[0] if all(torch.equal(rows[0], row) for row in rows[1:]) else torch.stack(rows, dim=1)
        return PackedDocuments(
            qkv_format="sbhd",
            documents=documents if has_borders(documents) else None,
            pieces=layout.pieces,
            positions=copy_to(positions, device),
            length=length,
        )

    def check_cut(self, documents: Documents, length: int, arguments: Mapping[str, Any]) -> None:
        """Check that a batch that the model is called with was cut in the layout of its documents.

        Args:
            documents: documents of the micro-batch.
            length: tokens of a whole sequence.
            arguments: the arguments of the model's forward by their names.

        Raises:
            ValueError: The batch was cut otherwise.
        """
        if self.ranks > 1 and any(arguments.get(name) is not None for name in ("input_ids", "labels")):
            self.layouts.check_cut(documents, length, self._where())

    def take_digests(self) -> list[int]:
        """Return a digest of all micro-batches since the last call, for each model chunk; [0] if there is none."""
        chunks = self.digests.values()
        totals = [sum(digest * (index + 1) for index, digest in enumerate(chunk)) % 2**62 for chunk in chunks]
        self.digests.clear()
        return totals or [0]

    def _agreed(self, borders: Tensor | None, problem: str | None) -> tuple[int, list[int]]:
        """Compare the borders with those of the other ranks; return their digest and their values on the host."""
        own = _digest(borders, problem).to(_device())  # a script's borders may still be on the host
        values = borders.to(own) if borders is not None else own[:0]
        if self.agreement is None:
            digest, *host = torch.cat((own, values)).tolist()
            return digest, host
        everyone = self.agreement.all_gather(own).flatten()
        host = torch.cat((everyone, values)).tolist()
        digests, host = host[: everyone.numel()], host[everyone.numel() :]
        if len(set(digests)) > 1:
            groups = [[rank for rank, digest in enumerate(digests) if digest == one] for one in dict.fromkeys(digests)]
            own_problem = f" On this rank: {problem}." if problem is not None else ""
            raise ValueError(
                f"{self._where()}: ranks that share a micro-batch have different cu_seqlens; ranks of the tensor- and "
                f"context-parallel group that agree: {groups}.{own_problem} Hand every rank the documents of the whole "
                "sequence, before it is cut over context-parallel ranks."
            )
        return digests[0], host

    def _where(self) -> str:
        return f"packed documents, context-parallel rank {self.rank} of {self.ranks}"


def _borders_of(params: PackedSeqParams | None) -> tuple[Tensor | None, str | None]:
    """Return the cumulative lengths of the documents with their padding, and what is wrong with them, if anything.

    Padding behind a document is part of it: its tokens follow the document's own, which therefore do not see them.
    """
    if params is None:
        return None, "documents are packed, but the script hands the model no packed_seq_params; hand it the batch's"
    if params.qkv_format != "thd":
        return None, f"packed_seq_params have the format {params.qkv_format!r}; give 'thd'"
    pairs = {
        "cu_seqlens_q_padded": (params.cu_seqlens_q_padded, params.cu_seqlens_kv_padded),
        "cu_seqlens_q": (params.cu_seqlens_q, params.cu_seqlens_kv),
    }
    given = {name: [one for one in pair if one is not None] for name, pair in pairs.items()}
    problem = next(filter(None, (_fault(name, pair) for name, pair in given.items())), None)
    if problem is not None:
        return None, problem
    padded, own = (pair[0].flatten() if pair else None for pair in given.values())
    if padded is not None and own is not None and not _fit(own, padded):
        return None, (
            "cu_seqlens_q and cu_seqlens_q_padded do not belong together; both have one number per document, and no "
            "document is longer than with its padding"
        )
    found = own if padded is None else padded
    return found, None if found is not None else "packed_seq_params have no cu_seqlens_q"


def _fault(name: str, given: list[Any]) -> str | None:
    """Return what is wrong with the cumulative lengths of queries and keys, if anything."""
    for one in given:
        if not isinstance(one, Tensor):
            return f"{name} is a {type(one).__name__}; give a tensor of int32 or int64"
        if one.numel() == 0 or one.dtype not in (torch.int32, torch.int64):
            return f"{name} is {one.dtype} {tuple(one.shape)}; give whole numbers, at least 2"
    first, last = (given[0], given[-1]) if given else (None, None)
    if first is not last and not _equal(first, last):
        return f"{name} and {name.replace('_q', '_kv')} differ; self-attention has one set of documents"
    return None


def _equal(one: Any, other: Any) -> bool:
    """Return whether two tensors have the same elements, whatever their types and devices are."""
    one, other = one.flatten(), other.flatten()
    return one.numel() == other.numel() and bool((one.to(other.device) == other).all())


def _fit(borders: Tensor, padded: Tensor) -> bool:
    """Return whether each document is at most as long as it is with its padding."""
    if borders.data_ptr() == padded.data_ptr():
        return True
    return borders.numel() == padded.numel() and bool((borders.to(padded.device).diff() <= padded.diff()).all())


def _digest(borders: Tensor | None, problem: str | None) -> Tensor:
    """Return a digest of cumulative lengths, int64 [1], on their device; -1 where something is wrong."""
    if borders is None:
        return torch.full((1,), -1 if problem else 0, dtype=torch.int64, device=_device())
    wide = borders.to(torch.int64)
    factors = torch.arange(1, wide.numel() + 1, device=wide.device) * DIGEST_BASE
    # A repeated end of the last document is no document, but ranks must also gather tensors of one size.
    return ((wide * factors % 2**31).sum() + wide.numel() * 2**40).view(1)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def micro_batch_shape(
    arguments: Mapping[str, Any], received: Tensor | None, ranks: int, tensor: int = 1
) -> tuple[int, int]:
    """Return (sequences, tokens of a whole sequence) of the micro-batch that a model is called with.

    Args:
        arguments: the arguments of the model's forward by their names.
        received: hidden states from the previous pipeline stage, [tokens, sequences, hidden]; None on the first.
        ranks: context-parallel ranks over which a batch is distributed.
        tensor: tensor-parallel ranks over which hidden states are distributed as well (--sequence-parallel), else 1.

    Raises:
        ValueError: There is nothing to tell it from.
    """
    for name in ("input_ids", "labels"):
        if arguments.get(name) is not None:
            sequences, tokens = arguments[name].shape[:2]
            return sequences, tokens * ranks
    if received is None:
        raise ValueError("packed documents: the model is given neither tokens nor labels nor hidden states")
    return received.shape[1], received.shape[0] * ranks * tensor


def refuse_unserved_model(model: Any, packed: PackedDocuments | None = None) -> None:
    """Refuse a model whose layers cannot read packed documents, before it runs.

    Args:
        model: upstream's GPTModel.
        packed: documents that it is about to get.

    Raises:
        ValueError: Names the setting and what to do.
    """
    config = model.config
    unlike = packed is not None and packed.positions is not None and packed.positions.dim() > 1
    reasons = {
        "multi-latent attention": config.multi_latent_attention,
        "multi-token prediction": getattr(model, "mtp_process", False),
        "--position-embedding-type mrope": getattr(model, "position_embedding_type", None) == "mrope",
        "--fused-single-qkv-rope": config.fused_single_qkv_rope,
        "fused rotary embeddings for sequences of unlike documents (give --no-rope-fusion)": (
            config.apply_rope_fusion and unlike
        ),
    }
    unserved = [name for name, is_used in reasons.items() if is_used]
    if unserved:
        raise ValueError(f"packed documents are not served with {', '.join(unserved)}")
