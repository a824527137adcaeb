"""A schedule is data: per rank the list of its actions, in the order in which it runs them.

The same lists are proven (`proof`), simulated (`simulate`), drawn (`draw`), executed (`executor`) and named when a rank
waits too long (`watch`).
"""

from dataclasses import dataclass
from enum import StrEnum


class ScheduleError(ValueError):
    """A schedule that cannot be made for these sizes, or that would compute wrongly or never end."""


class ActionKind(StrEnum):
    """What an action computes."""

    FORWARD = "F"
    BACKWARD = "B"  # of inputs and weights, or of inputs alone where the schedule has WEIGHT actions
    WEIGHT = "W"


_WORDS = {ActionKind.FORWARD: "forward", ActionKind.BACKWARD: "backward", ActionKind.WEIGHT: "weight gradient"}


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One computation of one rank.

    Attributes:
        kind: forward, backward or weight gradient.
        microbatch: index of the micro-batch, from 0.
        segment: index of the segment of the sequence, from 0; segment s attends to the keys of segments 0..s.
        vstage: virtual stage (upstream's model chunk) on this rank, from 0.
    """

    kind: ActionKind
    microbatch: int
    segment: int = 0
    vstage: int = 0

    def __str__(self) -> str:
        place = f"micro-batch {self.microbatch}, segment {self.segment}"
        return f"{_WORDS[self.kind]} of {place}" + (f", virtual stage {self.vstage}" if self.vstage else "")


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The sizes that a schedule is made for.

    Attributes:
        stages: pipeline-parallel size P, in ranks.
        microbatches: micro-batches per step M.
        segments: segments per sequence K.
        virtual: virtual stages per rank V.

    Raises:
        ValueError: a size below 1.
    """

    stages: int
    microbatches: int
    segments: int = 1
    virtual: int = 1

    def __post_init__(self) -> None:
        for name in ("stages", "microbatches", "segments", "virtual"):
            if getattr(self, name) < 1:
                raise ValueError(f"a pipeline needs at least 1 of {name}, not {getattr(self, name)}")

    @property
    def units(self) -> int:
        """Segments that a virtual stage runs forward per step: M * K."""
        return self.microbatches * self.segments

    @property
    def depth(self) -> int:
        """Stages that a segment passes through: P * V."""
        return self.stages * self.virtual

    def stage(self, rank: int, vstage: int) -> int:
        """Position in the model of a rank's virtual stage, from 0 to P * V - 1 (upstream's interleaving)."""
        return vstage * self.stages + rank

    def place(self, stage: int) -> tuple[int, int]:
        """Rank and virtual stage that hold a position in the model."""
        return stage % self.stages, stage // self.stages


@dataclass(frozen=True, slots=True)
class Schedule:
    """What every rank does in one step.

    Attributes:
        name: for people, for instance "Seq1F1B".
        pipeline: the sizes.
        orders: per rank its actions, in order.
    """

    name: str
    pipeline: Pipeline
    orders: tuple[tuple[Action, ...], ...]

    @property
    def splits_weights(self) -> bool:
        """Whether weight gradients are actions of their own (zero-bubble)."""
        return any(action.kind is ActionKind.WEIGHT for order in self.orders for action in order)

    @property
    def is_forward_only(self) -> bool:
        """Whether it has no backward actions (evaluation)."""
        return all(action.kind is ActionKind.FORWARD for order in self.orders for action in order)


def source(pipeline: Pipeline, rank: int, action: Action) -> tuple[int, Action] | None:
    """Return the rank and action whose output `action` receives, None where it receives nothing.

    A forward receives hidden states from the stage before, a backward their gradient from the stage after.
    """
    stage = pipeline.stage(rank, action.vstage)
    if action.kind is ActionKind.FORWARD and stage > 0:
        peer, vstage = pipeline.place(stage - 1)
    elif action.kind is ActionKind.BACKWARD and stage < pipeline.depth - 1:
        peer, vstage = pipeline.place(stage + 1)
    else:
        return None
    return peer, Action(action.kind, action.microbatch, action.segment, vstage)


def target(pipeline: Pipeline, rank: int, action: Action) -> tuple[int, Action] | None:
    """Return the rank and action that receive the output of `action`, None where nobody does."""
    stage = pipeline.stage(rank, action.vstage)
    if action.kind is ActionKind.FORWARD and stage < pipeline.depth - 1:
        peer, vstage = pipeline.place(stage + 1)
    elif action.kind is ActionKind.BACKWARD and stage > 0:
        peer, vstage = pipeline.place(stage - 1)
    else:
        return None
    return peer, Action(action.kind, action.microbatch, action.segment, vstage)
