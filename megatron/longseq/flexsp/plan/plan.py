"""A step's plan: which ranks work together on which sequences, micro-batch by micro-batch.

Ranks are numbered from 0 inside the domain of data- and context-parallel ranks that share a tensor- and
pipeline-parallel coordinate. In every micro-batch each rank is in exactly one group. A group of degree d holds d
consecutive ranks, the first of which is a multiple of d.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal, get_args

PlannerName = Literal["heuristic", "exact", "static", "sorted"]
PLANNERS: tuple[PlannerName, ...] = get_args(PlannerName)


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """How a group computes attention: Ulysses groups of `ulysses` neighbouring ranks, joined by rings of `ring` ranks.

    Attributes:
        ulysses: ranks that share the heads, U.
        ring: ranks that share the sequence, R.

    Raises:
        ValueError: A size is below 1.
    """

    ulysses: int
    ring: int

    def __post_init__(self) -> None:
        if self.ulysses < 1 or self.ring < 1:
            raise ValueError(f"kind of {self.ulysses} x {self.ring} (Ulysses x ring) ranks: both must be at least 1")

    @property
    def degree(self) -> int:
        """Number of ranks of the group, U * R."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        """Return "ulysses", "ring" or "UxR"; one rank alone is "ulysses"."""
        if self.ring == 1:
            return "ulysses"
        return "ring" if self.ulysses == 1 else f"{self.ulysses}x{self.ring}"


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """Ranks that work together on some sequences of a micro-batch.

    Attributes:
        kind: how they compute attention.
        ranks: consecutive ranks, the first of which is a multiple of the degree.
        sequences: indices into the step's lengths, ascending; empty: the ranks have no work in this micro-batch.
        seconds: predicted seconds; 0 without sequences.
    """

    kind: Kind
    ranks: tuple[int, ...]
    sequences: tuple[int, ...]
    seconds: float

    @property
    def degree(self) -> int:
        """Number of ranks."""
        return self.kind.degree


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Groups that work at the same time.

    Attributes:
        groups: by ascending ranks; they hold every rank once.
        seconds: those of the slowest group.
    """

    groups: tuple[SequenceGroup, ...]
    seconds: float

    def idle_ranks(self, degrees: Collection[int]) -> tuple[int, ...]:
        """Return the ranks that wait alone, because no group of the given degrees has a place on them.

        Args:
            degrees: degrees that a group may have.
        """
        return tuple(rank for group in self.groups if group.degree not in degrees for rank in group.ranks)

    @property
    def idle_share(self) -> float:
        """Share of the ranks' time that is spent waiting for the slowest group."""
        ranks = sum(group.degree for group in self.groups)
        busy = sum(group.degree * group.seconds for group in self.groups)
        return 1 - busy / (ranks * self.seconds) if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Plan of one training step.

    Attributes:
        microbatches: in the order in which they run.
        seconds: sum of the micro-batches' predicted seconds.
        bound: lower bound on the seconds of any plan of these sequences, under the same cost model.
        planner_seconds: CPU seconds of planning.
    """

    microbatches: tuple[Microbatch, ...]
    seconds: float
    bound: float
    planner_seconds: float

    @property
    def gap(self) -> float:
        """Distance from the bound, as a fraction of the bound."""
        return (self.seconds - self.bound) / self.bound if self.bound else 0.0

    @property
    def idle_share(self) -> float:
        """Share of the ranks' time that is spent waiting for slower groups."""
        idle = sum(one.idle_share * one.seconds for one in self.microbatches)
        return idle / self.seconds if self.seconds else 0.0

    def degrees(self) -> tuple[tuple[int, ...], ...]:
        """Return the degrees of the groups with work in every micro-batch, descending."""
        return tuple(
            tuple(sorted((group.degree for group in one.groups if group.sequences), reverse=True))
            for one in self.microbatches
        )


def validate_plan(plan: StepPlan, lengths: Sequence[int], ranks: int) -> None:
    """Check a plan's structure.

    Args:
        plan: the plan.
        lengths: the step's lengths in tokens.
        ranks: number of data- and context-parallel ranks.

    Raises:
        ValueError: A sequence is missing or planned twice, groups overlap or leave out a rank, or are not aligned.
    """
    planned = sorted(chain.from_iterable(group.sequences for one in plan.microbatches for group in one.groups))
    if planned != list(range(len(lengths))):
        twice = sorted({a for a, b in pairwise(planned) if a == b})
        missing = sorted(set(range(len(lengths))) - set(planned))
        raise ValueError(f"plan of {len(lengths)} sequences: {twice[:8]} are planned twice, {missing[:8]} not at all")
    for number, one in enumerate(plan.microbatches):
        if list(chain.from_iterable(group.ranks for group in one.groups)) != list(range(ranks)):
            raise ValueError(f"micro-batch {number}: its groups do not hold each of {ranks} ranks once, in order")
        for group in one.groups:
            if len(group.ranks) != group.degree or group.ranks[0] % group.degree:
                raise ValueError(
                    f"micro-batch {number}: ranks {group.ranks[0]} to {group.ranks[-1]} are no group of degree "
                    f"{group.degree}, which begins at a multiple of it"
                )
