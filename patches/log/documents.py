"""Sums over the documents of a step, from which upstream counts the FLOPs of the model.

Upstream adds up the lengths of packed documents, and their squares, in every call of its function. It divides by the
number of ranks that share a micro-batch, which is wrong if a micro-batch is reported several times (by each virtual
stage) or by some of the ranks only; then it also hangs. It adds the documents of an evaluation to the next step, and
counts whole documents where layers see a sliding window.
"""

from argparse import Namespace
from dataclasses import dataclass

import torch

from patches.engine import session

ID = "log.documents"


@dataclass
class DocumentSums:
    """What this rank has reported in the current step.

    Attributes:
        reports: number of calls.
        sums: float64 [3] on the device: tokens, squares of document lengths, and squares of what is longer than the
            window.
    """

    reports: int = 0
    sums: torch.Tensor | None = None

    def add(self, lengths: torch.Tensor, window: int | None) -> None:
        """Add the documents of a micro-batch.

        Args:
            lengths: tokens of each document, [documents].
            window: tokens that a token of a windowed layer sees, with itself; None without windows.
        """
        lengths = lengths.to(torch.float64)
        beyond = torch.zeros_like(lengths) if window is None else (lengths - window).clamp(min=0)
        sums = torch.stack([lengths.sum(), lengths.square().sum(), beyond.square().sum()])
        sums = sums.to(device="cuda", non_blocking=True)  # a copy that waits would wait for the step's passes
        self.sums = sums if self.sums is None else self.sums + sums
        self.reports += 1


def add_documents(cu_seqlens: torch.Tensor | None) -> None:
    """Add the documents of a micro-batch to those of the step. Takes the place of upstream's function.

    A micro-batch may be reported several times, and by some of its ranks only. An evaluation is not counted.

    Args:
        cu_seqlens: ends of the documents without padding, from 0 on, int32 [documents + 1]; None if there are none.
    """
    if cu_seqlens is None or cu_seqlens.numel() < 2 or not torch.is_grad_enabled():
        return
    from megatron.training import get_args

    sums: DocumentSums = session.SESSION.state.setdefault(ID, DocumentSums())
    sums.add(cu_seqlens[1:] - cu_seqlens[:-1], _window(get_args()))


def add_step(lengths: list[int]) -> None:
    """Add all documents of a step (--flexsp), which every rank reports once.

    Args:
        lengths: tokens of each document of the global batch.
    """
    from megatron.core import mpu
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    sums: DocumentSums = session.SESSION.state.setdefault(ID, DocumentSums())
    sums.add(torch.tensor(lengths), _window(get_args()))
    assert sums.sums is not None, "they were just added"
    sums.sums /= mpu.get_data_parallel_world_size() * get_num_microbatches()  # `take_sums` multiplies by both


def take_sums() -> tuple[float | None, float | None]:
    """Return tokens and squares of the step, over all ranks, and forget them. Takes the place of upstream's function.

    All ranks call this. In a layer with a sliding window of w tokens, a document of L tokens counts as
    L^2 - max(L - w, 0)^2, twice the area of the visible scores; the returned squares are the mean over the layers.

    Returns:
        Two times None if documents are not packed and no layer has a window: then upstream counts whole sequences.
    """
    from megatron.core import mpu
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    args = get_args()
    own: DocumentSums = session.SESSION.state.pop(ID, DocumentSums())
    reduced = [0.0] * 4
    if own.reports or may_pack(args):
        reduced = _reduce(own, get_num_microbatches())
    replicas = mpu.get_data_parallel_world_size()
    share = _windowed_share(args)
    if reduced[-1]:
        tokens, squares, beyond = (value * replicas / reduced[-1] for value in reduced[:-1])
        return tokens, squares - share * beyond
    if not share:
        return None, None
    length, window = args.seq_length, _window(args)
    samples = replicas * args.micro_batch_size * get_num_microbatches()
    return float(samples * length), samples * (length**2 - share * max(length - (window or length), 0) ** 2)


def may_pack(args: Namespace) -> bool:
    """Return whether documents may be reported, so that all ranks have to add up what they have.

    It depends on flags alone, which are equal on all ranks. A script that packs documents without any of these flags
    has to report them on every rank, as upstream requires.
    """
    names = ("flexsp", "log_throughput", "sft", "dataloader_inter_document_masking", "reset_attention_mask")
    return any(getattr(args, name, False) for name in names)


def _reduce(own: DocumentSums, micro_batches: int) -> list[float]:
    """Add up the sums of the ranks that have reported, each as if it had reported every micro-batch once."""
    vector = torch.zeros(4, dtype=torch.float64, device="cuda")
    if own.sums is not None:
        vector[:3] = own.sums * micro_batches / own.reports
        vector[3] = 1
    torch.distributed.all_reduce(vector)
    return list(vector.tolist())


def _window(args: Namespace) -> int | None:
    """Return the number of tokens that a token of a windowed layer sees, with itself."""
    window = getattr(args, "window_size", None)
    return None if window is None or window[0] < 0 else int(window[0]) + 1


def _windowed_share(args: Namespace) -> float:
    """Return the share of the layers that have a window."""
    if _window(args) is None or getattr(args, "hybrid_layer_pattern", None) is not None:
        return 0.0  # upstream counts the attention layers of hybrid models apart
    from megatron.core.transformer.utils import is_layer_window_attention

    layers = range(1, args.num_layers + (args.mtp_num_layers or 0) + 1)
    windowed = [is_layer_window_attention(args.window_size, args.window_attn_skip_freq, layer) for layer in layers]
    return sum(windowed) / len(windowed)
