"""Predicted seconds of collectives and of training steps.

All members of a group do the same at the same time, so the model times one of them. A ring message takes the link's
latency plus its bytes over the link's bandwidth, and a flat ring advances at the pace of its slowest hop.

Without overlap a step takes compute + A * (parameters + gradients) + the two finishing terms, as in PaRO (arXiv
2310.06003, section 3). With overlap, part of every pass hides the collectives that can run beside it: a forward hides
the gathers of its parameters (in the first micro-batch also those after the optimizer's step), a backward hides its
gathers and reductions (in the last micro-batch also the final ones).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from megatron.longseq.sharding.plan.collectives import (
    Collective,
    CollectiveKind,
    Collectives,
    CollectivesMode,
    Scope,
    always_flat,
    bucket_collectives,
    full_collective,
    never_flat,
)
from megatron.longseq.sharding.plan.memory import MEGATRON, Model, Widths, memory
from megatron.longseq.sharding.plan.overlap_order import ScheduledCollective, schedule
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import RUNNING, Strategy


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """The speed of one rank's link.

    Attributes:
        bandwidth: bytes per second.
        latency: seconds per message.

    Raises:
        ValueError: the bandwidth is not positive, or the latency is negative.
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and isfinite(self.latency) and self.latency >= 0):
            raise ValueError(f"bandwidth {self.bandwidth} bytes/s, latency {self.latency} s: they must be > 0 and >= 0")

    def seconds(self, size: float) -> float:
        """Return the seconds of a message of `size` bytes."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True, slots=True)
class LinkSpeeds:
    """The speeds of one rank's links.

    Attributes:
        inside: to ranks of its own group.
        between: to other groups; the rank's share, where the ranks of a node share one link.
        channels: over how many ranks' links a flat ring leaves a group. The group's size where all ranks share one link
            or where the library runs one ring per link; 1 where a single ring leaves over one rank's own link.

    Raises:
        ValueError: there is no channel.
    """

    inside: LinkSpeed
    between: LinkSpeed
    channels: int = 1

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"a flat ring has {self.channels} links between groups; give at least 1")

    def seconds(self, collective: Collective, groups: RankGroups, shard: float) -> float:
        """Return the seconds of a collective on a bucket.

        Args:
            collective: what runs.
            groups: the data-parallel ranks.
            shard: bytes of one of the bucket's n shards.
        """
        size = collective.shards_per_message(groups) * shard
        hops = []
        if collective.scope is Scope.INSIDE or (collective.scope is Scope.FLAT and groups.size > 1):
            hops.append(self.inside.seconds(size))
        if collective.scope is Scope.BETWEEN or (collective.scope is Scope.FLAT and groups.count > 1):
            channels = min(self.channels, groups.size) if collective.scope is Scope.FLAT else 1
            hops.append(self.between.seconds(size / channels))
        return collective.steps(groups) * max(hops, default=0.0)


class CollectiveTime(NamedTuple):
    """When a collective of a bucket runs, in seconds."""

    run: ScheduledCollective
    begin: float
    end: float


def time_collectives(
    collectives: Collectives,
    groups: RankGroups,
    links: LinkSpeeds,
    shards: Sequence[float],
    *,
    is_overlapped: bool,
) -> tuple[CollectiveTime, ...]:
    """Return when every collective of every bucket runs, in the order of `schedule`.

    A collective waits for its link and for its bucket, but not for the other collectives of its slot.

    Args:
        collectives: of every bucket.
        groups: the data-parallel ranks.
        links: their speeds.
        shards: bytes of one of the n shards of every bucket.
        is_overlapped: whether different links work at the same time; otherwise everything runs one after another.
    """
    free = dict.fromkeys(Scope, 0.0)
    reached = [0.0] * len(shards)
    times = []
    for run in schedule(collectives, len(shards), is_overlapped=is_overlapped):
        scope = run.collective.scope if is_overlapped else Scope.FLAT
        begin = max(free[scope], reached[run.bucket])
        end = begin + links.seconds(run.collective, groups, shards[run.bucket])
        free[scope] = reached[run.bucket] = end
        times.append(CollectiveTime(run, begin, end))
    return tuple(times)


def ring_seconds(
    kind: CollectiveKind,
    mode: CollectivesMode,
    groups: RankGroups,
    links: LinkSpeeds,
    shards: Sequence[float],
) -> float:
    """Return when the last bucket of a collective over all ranks is done, in seconds.

    Args:
        kind: all-gather, reduce-scatter or all-reduce.
        mode: whether and how it is split into collectives inside and between groups.
        groups, links, shards: see `time_collectives`.
    """
    return _last_end(full_collective(kind, groups, mode), mode, groups, links, shards)


def _last_end(
    collectives: Collectives, mode: CollectivesMode, groups: RankGroups, links: LinkSpeeds, shards: Sequence[float]
) -> float:
    is_overlapped = mode is CollectivesMode.OVERLAPPED
    times = time_collectives(collectives, groups, links, shards, is_overlapped=is_overlapped)
    return max((time.end for time in times), default=0.0)


@dataclass(frozen=True, slots=True)
class ComputeTime:
    """What a rank computes in a step.

    Attributes:
        microbatches: A, the number of micro-batches.
        forward, backward: seconds of one micro-batch.
        hidden: share of them that can hide communication, from 0 (no overlap) to 1.

    Raises:
        ValueError: there is no micro-batch, seconds are negative, or the share is outside 0 to 1.
    """

    microbatches: int
    forward: float = 0.0
    backward: float = 0.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        if self.microbatches < 1 or min(self.forward, self.backward) < 0 or not 0 <= self.hidden <= 1:
            raise ValueError(
                f"{self.microbatches} micro-batches of {self.forward} s and {self.backward} s, share {self.hidden} "
                "overlapped: give at least 1 micro-batch, seconds of at least 0 and a share from 0 to 1"
            )


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A model, the ranks that train it and the links between them.

    Attributes:
        groups: the data-parallel ranks.
        model: parameters of a tensor- and pipeline-parallel rank.
        work: compute of a step.
        links: speeds of a rank's links.
        widths: bytes of an element.
        mode: --paro-collectives.
        buckets: number of buckets of parameters, and of gradients.
        gathers: all-gathers of each bucket of parameters in a micro-batch, on average; with selective overlap fewer
            than 2 (`gather_window.gather_count`).

    Raises:
        ValueError: there is no bucket.
    """

    groups: RankGroups
    model: Model
    work: ComputeTime
    links: LinkSpeeds
    widths: Widths = MEGATRON
    mode: CollectivesMode = CollectivesMode.HIERARCHICAL
    buckets: int = 1
    gathers: float = 2.0

    def __post_init__(self) -> None:
        if self.buckets < 1:
            raise ValueError(f"{self.buckets} buckets of parameters: give at least 1")


class StepSeconds(NamedTuple):
    """Predicted seconds of a step.

    Attributes:
        compute: of all micro-batches.
        params, grads: of the collectives of all micro-batches.
        finish_grads, finish_params: of the collectives at the end of the step.
        hidden: the part of these four terms that runs beside compute.
    """

    compute: float
    params: float
    grads: float
    finish_grads: float
    finish_params: float
    hidden: float

    @property
    def communication(self) -> float:
        """Seconds of all collectives, hidden or not."""
        return self.params + self.grads + self.finish_grads + self.finish_params

    @property
    def step(self) -> float:
        """Seconds of the step."""
        return self.compute + self.communication - self.hidden


class Prediction(NamedTuple):
    """Seconds of a step and bytes of model states on a rank, under one strategy."""

    strategy: Strategy
    seconds: StepSeconds
    memory: int


def predict(strategy: Strategy, job: TrainingJob) -> Prediction:
    """Return the predicted step time and memory of a strategy, which may be one that cannot run.

    Args:
        strategy: levels of the model states.
        job: the model, its ranks, their links and the compute of a step.

    Returns:
        Seconds of the step by part, and bytes of a rank's model states.
    """
    is_flat = always_flat if job.mode is CollectivesMode.FLAT else never_flat
    terms = bucket_collectives(strategy, job.groups, is_flat=is_flat)
    params = job.model.shard(job.groups) * job.widths.param
    trained = job.model.trainable_shard(job.groups)
    gathered = _term_seconds(terms.params, job, params) * job.gathers / 2  # in one pass
    reduced = _term_seconds(terms.grads, job, trained * job.widths.grad_wire)
    finish_grads = _term_seconds(terms.finish_grads, job, trained * job.widths.grad_wire)
    finish_params = _term_seconds(terms.finish_params, job, trained * job.widths.param)

    work, count = job.work, job.work.microbatches
    forward, backward = work.hidden * work.forward, work.hidden * work.backward
    hidden = (count - 1) * (min(gathered, forward) + min(gathered + reduced, backward))
    hidden += min(gathered + finish_params, forward) + min(gathered + reduced + finish_grads, backward)
    spent = StepSeconds(
        count * (work.forward + work.backward),
        2 * count * gathered,
        count * reduced,
        finish_grads,
        finish_params,
        hidden,
    )
    return Prediction(strategy, spent, memory(strategy, job.groups, job.model, job.widths).total)


def _term_seconds(collectives: Collectives, job: TrainingJob, shard: float) -> float:
    """Return the seconds of collectives on equal buckets; `shard`: bytes of one of the n shards of all of them."""
    return _last_end(collectives, job.mode, job.groups, job.links, [shard / job.buckets] * job.buckets)


def rank(
    job: TrainingJob, strategies: Iterable[Strategy] = RUNNING, limit: float | None = None
) -> tuple[Prediction, ...]:
    """Return the strategies that fit, fastest first; of equally fast ones the one with the least memory first.

    Args:
        job: the model, its ranks and their links.
        strategies: to choose from.
        limit: bytes of a rank's model states; None: no limit.
    """
    predictions = [predict(strategy, job) for strategy in strategies]
    fitting = [one for one in predictions if limit is None or one.memory <= limit]
    return tuple(sorted(fitting, key=lambda one: (float(f"{one.seconds.step:.9g}"), one.memory, one.strategy)))


def fastest(job: TrainingJob, strategies: Iterable[Strategy] = RUNNING, limit: float | None = None) -> Prediction:
    """Return the first prediction of `rank`.

    Args:
        job, strategies, limit: see `rank`.

    Raises:
        ValueError: no strategy fits; the message says how much memory the smallest one needs.
    """
    strategies = tuple(strategies)
    ranked = rank(job, strategies, limit)
    if not ranked:
        least = min(rank(job, strategies), key=lambda one: one.memory, default=None)
        needs = f"the smallest, {least.strategy}, needs {least.memory / 1e9:.1f} GB" if least else "there is none"
        raise ValueError(
            f"no sharding strategy fits the model states of {job.model.params} parameters ({job.model.trainable} "
            f"trained) into {(limit or 0) / 1e9:.1f} GB on each of {job.groups.ranks} data-parallel ranks: {needs}. "
            "Give more ranks, or more tensor or pipeline parallelism"
        )
    return ranked[0]
