"""The Markdown tables of docs/paro.md, from the flags and the formulas."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron.longseq.command_line import markdown_table
from megatron.longseq.sharding.arguments import INSTEAD
from megatron.longseq.sharding.plan.collectives import CollectivesMode
from megatron.longseq.sharding.plan.comm_volume import CommVolume, comm_volume
from megatron.longseq.sharding.plan.memory import MEGATRON, Model
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import ALL, KNOWN_AS, RUNNING, VALID, Strategy
from megatron.longseq.sharding.plan.time_model import ComputeTime, LinkSpeed, LinkSpeeds, TrainingJob, fastest, rank

PARAMS = 6_740_000_000
SEVEN_B = TrainingJob(
    groups=RankGroups(64, 8),
    model=Model(PARAMS, PARAMS),
    work=ComputeTime(microbatches=8),
    links=LinkSpeeds(LinkSpeed(200e9), LinkSpeed(25e9), channels=8),
    widths=MEGATRON,
    mode=CollectivesMode.HIERARCHICAL,
)


class Training(NamedTuple):
    """A kind of training: its name and the share of parameters that is trained."""

    name: str
    share: float


TRAININGS = (Training("full", 1.0), Training("partial, 1 of 16", 1 / 16), Training("adapters, 3 of 1000", 3 / 1000))
MICROBATCHES = (1, 4, 16, 64)
LIMITS = (2e9, 5e9, 10e9, 20e9, 40e9, None)


def setting(job: TrainingJob) -> str:
    """Return one sentence that says which job a table's figures are for."""
    groups, links = job.groups, job.links
    return (
        f"{job.model.params / 1e9:.2f} billion parameters, {groups.ranks} data-parallel ranks in groups of "
        f"{groups.size}, {links.inside.bandwidth / 1e9:g} GB/s a rank inside groups and "
        f"{links.between.bandwidth / 1e9:g} between; {job.widths.param} bytes a parameter, {job.widths.grad} a "
        f"gradient ({job.widths.grad_wire} on the wire), {job.widths.optimizer} of optimizer states; {job.mode} "
        "collectives, none hidden behind compute."
    )


def strategies(job: TrainingJob = SEVEN_B) -> str:
    """Return every valid strategy, fastest first: its memory, communication and seconds."""
    head = ["strategy", "known as", "memory GB", "GB inside, a step", "between", "flat", "collectives", "seconds"]
    rows = []
    for prediction in rank(job, VALID):
        name = str(prediction.strategy)
        sent = _step(prediction.strategy, job)
        rows.append(
            [
                f"**{name}**" if prediction.strategy in RUNNING else name,
                KNOWN_AS.get(name, ""),
                f"{prediction.memory / 1e9:.1f}",
                f"{sent.inside / 1e9:.1f}",
                f"{sent.between / 1e9:.2f}",
                f"{sent.flat / 1e9:.1f}",
                f"{sent.collectives}",
                f"{prediction.seconds.communication:.2f}",
            ]
        )
    return markdown_table(head, rows)


def _step(strategy: Strategy, job: TrainingJob) -> CommVolume:
    terms = comm_volume(
        strategy, job.groups, job.model, job.widths, buckets=job.buckets, is_flat=job.mode is CollectivesMode.FLAT
    )
    return terms.step(job.work.microbatches)


def refused() -> str:
    """Return every strategy that is refused, and the one to give instead."""
    rows = [[str(one), str(one.better), (one.refusal() or "").split(": ", 1)[1]] for one in ALL if not one.is_valid]
    return markdown_table(["refused", "give", "why"], rows)


def not_run() -> str:
    """Return every valid strategy that is not implemented, and what to give instead."""
    return markdown_table(["not run", "instead"], INSTEAD.items())


def guideline(job: TrainingJob = SEVEN_B, limits: Sequence[float | None] = LIMITS) -> str:
    """Return the fastest running strategy for full, partial and adapter training, by memory limit and micro-batches.

    A cell has the strategy, its GB on a rank, and the seconds of communication in a step.

    Args:
        job: its trained share of parameters and its compute are replaced by those of the rows and columns.
        limits: bytes of a rank's model states; None: no limit.
    """
    head = ["trained", "limit GB", *(f"A = {count}" for count in MICROBATCHES)]
    rows = []
    for training in TRAININGS:
        model = Model(job.model.params, max(1, round(job.model.params * training.share)))
        for limit in limits:
            cells = [_cell(replace(job, model=model, work=ComputeTime(count)), limit) for count in MICROBATCHES]
            rows.append([training.name, "none" if limit is None else f"{limit / 1e9:g}", *cells])
    return markdown_table(head, rows)


def _cell(job: TrainingJob, limit: float | None) -> str:
    try:
        best = fastest(job, RUNNING, limit)
    except ValueError:
        return "none fits"
    return f"{best.strategy} ({best.memory / 1e9:.1f}, {best.seconds.communication:.2f})"


def ranked(job: TrainingJob, limit: float | None) -> str:
    """Return the running strategies that fit a job, fastest first.

    Args:
        job: the model, its ranks and their links.
        limit: bytes of a rank's model states; None: no limit.

    Raises:
        ValueError: no strategy fits.
    """
    first = fastest(job, RUNNING, limit)
    rows = [
        [
            f"--paro {one.strategy}",
            f"{one.memory / 1e9:.2f}",
            f"{one.seconds.step:.4g}",
            f"{one.seconds.communication:.4g}",
            f"{one.seconds.step / first.seconds.step:.2f}" if first.seconds.step else "",
        ]
        for one in rank(job, RUNNING, limit)
    ]
    return markdown_table(["flags", "memory GB", "step s", "communication s", "of the fastest"], rows)


def page() -> str:
    """Return all tables, with the job that they are for."""
    return "\n\n".join(
        [
            f"{setting(SEVEN_B)} {SEVEN_B.work.microbatches} micro-batches a step.",
            strategies(),
            "The fastest one: GB on a rank, and seconds of communication in a step of A micro-batches.",
            guideline(),
            "Refused:",
            refused(),
            not_run(),
        ]
    )
