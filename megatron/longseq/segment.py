"""Segments of a sequence, the unit that Seq1F1B schedules."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment of the sequences of one micro-batch.

    Attributes:
        microbatch: index of the micro-batch within the step, from 0.
        index: index of the segment within its sequence, from 0.
        lengths: tokens of every segment of the sequence, first to last.
        forward_only: no backward follows (evaluation).

    Raises:
        ValueError: There is no such segment, or a segment has no tokens.
    """

    microbatch: int
    index: int
    lengths: tuple[int, ...]
    forward_only: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.index < len(self.lengths):
            raise ValueError(f"there is no segment {self.index}; give 0 to {len(self.lengths) - 1}")
        if min(self.lengths) < 1:
            raise ValueError(f"segments of {self.lengths} tokens: each needs at least one token; use fewer segments")

    @property
    def begin(self) -> int:
        """Position of the segment's first token."""
        return sum(self.lengths[: self.index])

    @property
    def end(self) -> int:
        """Position after the segment's last token."""
        return sum(self.lengths[: self.index + 1])

    @property
    def tokens(self) -> int:
        """Number of tokens of the segment."""
        return self.lengths[self.index]

    @property
    def total(self) -> int:
        """Number of tokens of the sequence."""
        return sum(self.lengths)

    @property
    def count(self) -> int:
        """Number of segments of the sequence."""
        return len(self.lengths)

    @property
    def is_last(self) -> bool:
        """Whether the segment is the last one of the sequence."""
        return self.index == len(self.lengths) - 1

    def per_rank(self, ranks: int) -> "Segment":
        """Return the segment with the tokens of one of several ranks that share every segment evenly."""
        return replace(self, lengths=tuple(length // ranks for length in self.lengths))

    def __str__(self) -> str:
        return f"micro-batch {self.microbatch}, segment {self.index} of {len(self.lengths)}"
