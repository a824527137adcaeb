"""What a picture of the method shows: who holds what, two links over time, and what every strategy costs."""

from typing import NamedTuple

from megatron.longseq.sharding.plan.collectives import Kind
from megatron.longseq.sharding.plan.comm_volume import Traffic, traffic
from megatron.longseq.sharding.plan.cost import Job
from megatron.longseq.sharding.plan.memory import Memory, memory
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.ring import Mode, whole
from megatron.longseq.sharding.plan.strategy import RUNNING, Strategy
from megatron.longseq.sharding.plan.time_model import Link, Links, Span, simulate
from megatron.longseq.sharding.tools.tables import SEVEN_B

STATES = ("parameters", "gradients", "optimizer states")
SHOWN = tuple(map(Strategy.parse, ["NNG", "NIG", "IIG", "GGG"]))
FOUR = Groups(4, 2)

NODES = Groups(32, 8)
LINKS = Links(Link(200e9, 3e-6), Link(25e9, 15e-6), channels=8)
BUCKETS = (128e6,) * 4  # bytes


class Holding(NamedTuple):
    """What ranks hold under a strategy: of every state, and every rank, which of n shards."""

    strategy: Strategy
    states: tuple[tuple[range, ...], ...]


class Timeline(NamedTuple):
    """When phases of buckets run in a mode."""

    mode: Mode
    spans: tuple[Span, ...]

    @property
    def end(self) -> float:
        """Seconds at which the last one is done."""
        return max((span.end for span in self.spans), default=0.0)


class Cost(NamedTuple):
    """Of a strategy: bytes that a rank holds, and sends in a step."""

    strategy: Strategy
    held: Memory
    sent: Traffic


class Scene(NamedTuple):
    """What is to be seen.

    Attributes:
        groups: of `holdings`.
        holdings: who holds what.
        kind: of `timelines`: what the collective does to every bucket.
        timelines: a collective over all ranks, of a few buckets, in every mode.
        job: of `costs`.
        costs: of every running strategy, those that send least between groups first, of equals those that hold most.
    """

    groups: Groups
    holdings: tuple[Holding, ...]
    kind: Kind
    timelines: tuple[Timeline, ...]
    job: Job
    costs: tuple[Cost, ...]


def scene(job: Job = SEVEN_B) -> Scene:
    """Return what is to be seen; `job` is that of the costs."""
    kind = Kind.REDUCE_SCATTER
    return Scene(
        FOUR,
        tuple(_holding(strategy) for strategy in SHOWN),
        kind,
        tuple(_timeline(kind, mode) for mode in Mode),
        job,
        tuple(
            sorted((_cost(strategy, job) for strategy in RUNNING), key=lambda one: (one.sent.between, -one.held.total))
        ),
    )


def _holding(strategy: Strategy) -> Holding:
    levels = (strategy.params, strategy.grads, strategy.optimizer)
    return Holding(
        strategy, tuple(tuple(FOUR.owned(level, member) for member in range(FOUR.ranks)) for level in levels)
    )


def _timeline(kind: Kind, mode: Mode) -> Timeline:
    shards = [size / NODES.ranks for size in BUCKETS]
    phases = whole(kind, NODES, mode)
    return Timeline(mode, simulate(phases, NODES, LINKS, shards, is_overlapped=mode is Mode.OVERLAPPED))


def _cost(strategy: Strategy, job: Job) -> Cost:
    sent = traffic(strategy, job.groups, job.model, job.widths).step(job.work.microbatches)
    return Cost(strategy, memory(strategy, job.groups, job.model, job.widths), sent)
