"""Segments of every micro-batch of a step by its documents, known on all ranks before the step begins.

The shapes of all messages between stages must be known before the first one is posted. So the samples of a step are
drawn from the data iterator ahead, and the documents of all its micro-batches are read from their `cu_seqlens`, which
data loaders leave on the host. The samples then go to the script's forward step, one for each micro-batch.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.utils import log_single_rank

from megatron.longseq.attention.plan.packing import documents_of
from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.attention.runtime.comm import GroupCollectives
from megatron.longseq.pipeline.plan.document_partition import DocumentCut, describe_cuts

logger = logging.getLogger(__name__)

Lengths = tuple[int, ...]
_MALFORMED = -1  # in the place of a length


@dataclass
class DocumentCuts:
    """Cuts the micro-batches of a step on one rank; all ranks that share a micro-batch cut it alike.

    Attributes:
        cut: function from the documents of a micro-batch to its segments.
        segments: segments per sequence, K.
        length: tokens of a sequence.
        groups: collectives of the ranks that share micro-batches: of a stage, then of the pipeline.
        say: prints the first report; later ones go to the log when another cut is taken.
    """

    cut: Callable[[Documents], DocumentCut]
    segments: int
    length: int
    groups: Sequence[GroupCollectives] = ()
    say: Callable[[str], None] = field(default=lambda line: None)
    _last: frozenset[str] = field(default=frozenset(), init=False)

    def of_step(
        self, data: Sequence[Iterator[Any] | None], microbatches: int
    ) -> tuple[list[Iterator[Any] | None], tuple[Lengths, ...]]:
        """Return iterators for the step, and the tokens per segment of each of its micro-batches. All ranks call this.

        Args:
            data: the script's data iterator of each virtual stage; None on ranks that read no data.
            microbatches: micro-batches of the step.

        Raises:
            ValueError: Samples have no or malformed `cu_seqlens`, or ranks have read those of other micro-batches.
        """
        first, problem, cuts = data[0] if data else None, None, []
        samples = [] if first is None else [next(first) for _ in range(microbatches)]
        try:
            cuts = [self.cut(_documents(sample, self.length)) for sample in samples]
        except ValueError as error:
            problem = str(error)
        own = torch.zeros(microbatches, self.segments, dtype=torch.int64)
        if problem is not None:
            own.fill_(_MALFORMED)
        elif cuts:
            own = torch.tensor([cut.lengths for cut in cuts], dtype=torch.int64)
            self._report(cuts)
        lengths = tuple(tuple(row) for row in self._agreed(own, problem).tolist())
        drawn = [first if first is None else _Drawn(samples, first), *data[1:]]
        return drawn if data else [], lengths

    def _agreed(self, own: torch.Tensor, problem: str | None) -> torch.Tensor:
        """Return the lengths on which all ranks agree; ranks that have read no data take those of the others."""
        for group in self.groups:
            everyone = [*group.all_gather(own.to(_device())).cpu()]
            known = [one for one in everyone if one.any()]
            malformed = next((one for one in known if (one == _MALFORMED).any()), None)
            own = malformed if malformed is not None else known[0] if known else own
            if any(not torch.equal(one, own) for one in known):
                own = torch.full_like(own, _MALFORMED)
        if (own <= 0).any():
            reason = problem or (
                "another rank that shares this rank's micro-batches has read no documents, malformed ones, or those of "
                "other micro-batches"
                if (own < 0).any()
                else "no rank has read a sample"
            )
            raise ValueError(
                f"--seq1f1b-partition documents, rank {_rank()}: {reason}. Every rank that reads data must draw the "
                "same samples, one for each micro-batch, with the cu_seqlens of upstream's data sets; otherwise give "
                "--seq1f1b-partition balanced."
            )
        return own

    def _report(self, cuts: Sequence[DocumentCut]) -> None:
        kinds = frozenset(cut.kind for cut in cuts)
        if not self._last:
            self.say(describe_cuts(cuts))
        elif kinds != self._last:
            log_single_rank(logger, logging.INFO, describe_cuts(cuts))
        self._last = kinds


class _Drawn:
    """A data iterator some of whose samples have been drawn already.

    Args:
        samples: the samples that were drawn, in order.
        rest: the script's iterator.
    """

    def __init__(self, samples: Sequence[Any], rest: Iterator[Any]) -> None:
        self._samples, self._rest = deque(samples), rest

    def __iter__(self) -> "_Drawn":
        return self

    def __next__(self) -> Any:
        return self._samples.popleft() if self._samples else next(self._rest)


def _documents(sample: Any, length: int) -> Documents:
    """Return the documents of a micro-batch's samples.

    Raises:
        ValueError: The samples have no `cu_seqlens`, or malformed ones.
    """
    found = sample if isinstance(sample, dict) else {}
    borders = found.get("cu_seqlens_padded")
    borders = found.get("cu_seqlens") if borders is None else borders
    if not isinstance(borders, torch.Tensor) or borders.numel() == 0:
        raise ValueError("samples of the data iterator have no cu_seqlens")
    rows = borders.reshape(-1, borders.shape[-1]).to(torch.int64)
    rows = rows + torch.arange(len(rows), device=rows.device)[:, None] * length
    joined = torch.unique_consecutive(rows.flatten()).tolist()
    return documents_of(joined, joined[-1] // length, length)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
