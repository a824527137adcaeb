"""When each action of a step began and ended: simulated by `simulate` or measured by `recorder`, drawn by `draw`."""

from dataclasses import dataclass

from megatron.longseq.pipeline.plan.schedule import Action, Pipeline


@dataclass(frozen=True, slots=True)
class Span:
    """One action and its time.

    Attributes:
        action: what ran.
        start: seconds since the step began.
        end: seconds since the step began.
    """

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The spans of one step.

    Attributes:
        name: for people, for instance "Seq1F1B, simulated".
        pipeline: the sizes.
        spans: per rank its spans, in order.
    """

    name: str
    pipeline: Pipeline
    spans: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end over all ranks."""
        spans = [span for rank in self.spans for span in rank]
        return max(span.end for span in spans) - min(span.start for span in spans)

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they computed nothing: 1 - busy / (ranks * makespan)."""
        busy = sum(span.end - span.start for rank in self.spans for span in rank)
        return 1.0 - busy / (len(self.spans) * self.makespan)
