"""Which strategy is predicted to be fastest: seconds of a step, from the same phases that memory and traffic count.

Without overlap a step takes compute + A * (parameters + gradients) + the two finishing terms, as in the paper. With
it, a share of each pass hides what may run beside it: of a forward its parameters' gathers, in the first micro-batch
those after the optimizer's step too; of a backward its gathers and reductions, in the last micro-batch the finish too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from megatron.longseq.sharding.plan.collectives import Phases, program
from megatron.longseq.sharding.plan.memory import MEGATRON, Model, Widths, memory
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.ring import Mode
from megatron.longseq.sharding.plan.strategy import RUNNING, Strategy
from megatron.longseq.sharding.plan.time_model import Links, simulate


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank computes in a step.

    Attributes:
        microbatches: A.
        forward, backward: seconds of one.
        hidden: share of them that communication can hide behind: 0, nothing overlaps; 1, all.

    Raises:
        ValueError: no micro-batch, negative seconds, or a share outside 0 to 1.
    """

    microbatches: int
    forward: float = 0.0
    backward: float = 0.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        if self.microbatches < 1 or min(self.forward, self.backward) < 0 or not 0 <= self.hidden <= 1:
            raise ValueError(
                f"{self.microbatches} micro-batches of {self.forward} s and {self.backward} s, {self.hidden} of it "
                "hiding communication: give at least 1, seconds from 0, and a share from 0 to 1"
            )


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained, on what.

    Attributes:
        groups: the ranks.
        model: parameters of a rank's model.
        work: what it computes.
        links: between ranks.
        widths: bytes of an element.
        mode: --paro-collectives.
        buckets: of parameters, and as many of gradients.

    Raises:
        ValueError: no bucket.
    """

    groups: Groups
    model: Model
    work: Work
    links: Links
    widths: Widths = MEGATRON
    mode: Mode = Mode.HIERARCHICAL
    buckets: int = 1

    def __post_init__(self) -> None:
        if self.buckets < 1:
            raise ValueError(f"parameters in {self.buckets} buckets: give at least 1")


class Seconds(NamedTuple):
    """Seconds of a step.

    Attributes:
        compute: of all micro-batches.
        params, grads: of every micro-batch's collectives, together.
        finish_grads, finish_params: once.
        hidden: of these four, behind compute.
    """

    compute: float
    params: float
    grads: float
    finish_grads: float
    finish_params: float
    hidden: float

    @property
    def communication(self) -> float:
        """All of it, hidden or not."""
        return self.params + self.grads + self.finish_grads + self.finish_params

    @property
    def step(self) -> float:
        """Of the step."""
        return self.compute + self.communication - self.hidden


class Prediction(NamedTuple):
    """Of one strategy: seconds of a step, and bytes of model states on a rank."""

    strategy: Strategy
    seconds: Seconds
    memory: int


def predict(strategy: Strategy, job: Job) -> Prediction:
    """Return what a strategy, valid or not, is predicted to take and to hold."""
    terms = program(strategy, job.groups, is_flat=job.mode is Mode.FLAT)
    params = job.model.shard(job.groups) * job.widths.param
    trained = job.model.trainable_shard(job.groups)
    gathered = _seconds(terms.params, job, params)
    reduced = _seconds(terms.grads, job, trained * job.widths.grad_wire)
    finish_grads = _seconds(terms.finish_grads, job, trained * job.widths.grad_wire)
    finish_params = _seconds(terms.finish_params, job, trained * job.widths.param)

    work, count = job.work, job.work.microbatches
    forward, backward = work.hidden * work.forward, work.hidden * work.backward
    hidden = (count - 1) * (min(gathered, forward) + min(gathered + reduced, backward))
    hidden += min(gathered + finish_params, forward) + min(gathered + reduced + finish_grads, backward)
    spent = Seconds(
        count * (work.forward + work.backward),
        2 * count * gathered,
        count * reduced,
        finish_grads,
        finish_params,
        hidden,
    )
    return Prediction(strategy, spent, memory(strategy, job.groups, job.model, job.widths).total)


def _seconds(phases: Phases, job: Job, shard: float) -> float:
    """Return the seconds of phases on even buckets; `shard`: bytes of one of n shards of all of them."""
    shards = [shard / job.buckets] * job.buckets
    spans = simulate(phases, job.groups, job.links, shards, is_overlapped=job.mode is Mode.OVERLAPPED)
    return max((span.end for span in spans), default=0.0)


def rank(job: Job, strategies: Iterable[Strategy] = RUNNING, limit: float | None = None) -> tuple[Prediction, ...]:
    """Return the strategies that fit, the fastest first; of equally fast ones, the one that holds least.

    Args:
        job: what is trained, on what.
        strategies: to choose from.
        limit: bytes of a rank's model states; None: none.
    """
    found = [predict(strategy, job) for strategy in strategies]
    fit = [prediction for prediction in found if limit is None or prediction.memory <= limit]
    return tuple(sorted(fit, key=lambda one: (float(f"{one.seconds.step:.9g}"), one.memory, one.strategy)))


def fastest(job: Job, strategies: Iterable[Strategy] = RUNNING, limit: float | None = None) -> Prediction:
    """Return the first of `rank`.

    Raises:
        ValueError: none fits; the message says what the smallest needs.
    """
    strategies = tuple(strategies)
    ranked = rank(job, strategies, limit)
    if not ranked:
        least = min(rank(job, strategies), key=lambda one: one.memory, default=None)
        needs = f"the smallest, {least.strategy}, needs {least.memory / 1e9:.1f} GB" if least else "there is none"
        raise ValueError(
            f"no sharding strategy fits model states of {job.model.params} parameters ({job.model.trainable} trained) "
            f"on each of {job.groups.ranks} data-parallel ranks into {(limit or 0) / 1e9:.1f} GB: {needs}. Give more "
            "ranks, or more tensor or pipeline parallelism"
        )
    return ranked[0]
