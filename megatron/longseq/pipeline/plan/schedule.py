"""A schedule is data: for each rank, the list of its actions in the order in which it runs them.

The same lists are validated, simulated, drawn, executed, and named in a hang report.
"""

from dataclasses import dataclass
from enum import StrEnum


class ScheduleError(ValueError):
    """There is no schedule for these sizes, or a schedule is incorrect or deadlocks."""


class ActionKind(StrEnum):
    """What an action computes."""

    FORWARD = "F"
    BACKWARD = "B"  # gradients of inputs, and of weights unless the schedule has WEIGHT actions
    WEIGHT = "W"


_WORDS = {ActionKind.FORWARD: "forward", ActionKind.BACKWARD: "backward", ActionKind.WEIGHT: "weight gradient"}


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One computation on one rank.

    Attributes:
        kind: forward, backward or weight gradient.
        microbatch: index of the micro-batch, from 0.
        segment: index of the segment of the sequence, from 0; segment s attends to the keys of segments 0..s.
        vstage: index of the virtual stage (upstream's model chunk) on this rank, from 0.
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
    """The sizes of a pipeline.

    Attributes:
        stages: pipeline-parallel size P.
        microbatches: micro-batches per step, M.
        segments: segments per sequence, K.
        virtual: virtual stages per rank, V.

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
        """Forwards of a virtual stage per step: M * K."""
        return self.microbatches * self.segments

    @property
    def depth(self) -> int:
        """Model stages: P * V."""
        return self.stages * self.virtual

    def stage(self, rank: int, vstage: int) -> int:
        """Return the model stage (0 to P * V - 1) of a rank's virtual stage, in upstream's interleaving.

        Args:
            rank: pipeline rank, from 0.
            vstage: virtual stage of that rank, from 0.
        """
        return vstage * self.stages + rank

    def place(self, stage: int) -> tuple[int, int]:
        """Return the rank and the virtual stage of a model stage.

        Args:
            stage: model stage, 0 to P * V - 1.
        """
        return stage % self.stages, stage // self.stages


@dataclass(frozen=True, slots=True)
class Schedule:
    """The actions of all ranks in one step.

    Attributes:
        name: shown to the user, for instance "Seq1F1B".
        pipeline: sizes of the pipeline.
        orders: the actions of each rank, in order.
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
        """Whether there are only forwards (evaluation)."""
        return all(action.kind is ActionKind.FORWARD for order in self.orders for action in order)


def source(pipeline: Pipeline, rank: int, action: Action) -> tuple[int, Action] | None:
    """Return the rank and the action whose output `action` receives, or None.

    A forward receives hidden states from the previous model stage, a backward their gradient from the next one.

    Args:
        pipeline: sizes of the pipeline.
        rank: pipeline rank that runs `action`.
        action: the receiving action.
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
    """Return the rank and the action that receive the output of `action`, or None.

    Args:
        pipeline: sizes of the pipeline.
        rank: pipeline rank that runs `action`.
        action: the sending action.
    """
    stage = pipeline.stage(rank, action.vstage)
    if action.kind is ActionKind.FORWARD and stage < pipeline.depth - 1:
        peer, vstage = pipeline.place(stage + 1)
    elif action.kind is ActionKind.BACKWARD and stage > 0:
        peer, vstage = pipeline.place(stage - 1)
    else:
        return None
    return peer, Action(action.kind, action.microbatch, action.segment, vstage)
