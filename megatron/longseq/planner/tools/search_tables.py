"""Tables and JSON of a search: the best plans, and what the first one consists of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron.longseq.command_line import markdown_table
from megatron.longseq.planner.plan.bounds import PlanningProblem
from megatron.longseq.planner.plan.cluster import Cluster
from megatron.longseq.planner.plan.explain import Explanation, differences
from megatron.longseq.planner.plan.launch import (
    PlanChoice,
    command_text,
    default_training_words,
    flag_words,
    launch_refusal,
    launch_words,
    model_flags,
    plan_flags,
)
from megatron.longseq.planner.plan.search import LeafPrice, SearchCount
from megatron.longseq.planner.plan.space import Execution, ParallelLayout, StateSharding
from megatron.longseq.planner.plan.step import StepPrediction
from megatron.longseq.planner.plan.task import PlanningTask
from megatron.longseq.planner.tools.predict_command import full_result

_GB = 1e9


class SearchReport(NamedTuple):
    """A finished search.

    Attributes:
        problem: what was searched.
        ranked: the best plans with their prices, best first.
        work: nodes and plans visited.
        seconds: processor time of the search.
        explanation: of the first plan.
        training: flags that the planner does not choose; empty: the default ones.
        site: file for `scripts/launch.sh --site`.
    """

    problem: PlanningProblem
    ranked: tuple[tuple[PlanChoice, LeafPrice], ...]
    work: SearchCount
    seconds: float
    explanation: Explanation
    training: tuple[str, ...] = ()
    site: str | None = None


def layout_text(layout: ParallelLayout, gpus: int) -> str:
    """Return a layout as a short text, such as `TP 8, PP 4 x 2, CP 2 x 4 (Ulysses x ring), DP 2, micro-batch 1`.

    Args:
        layout: the layout.
        gpus: all ranks.
    """
    parts = [f"TP {layout.tensor}"] if layout.tensor > 1 else []
    if layout.pipeline > 1:
        parts.append(f"PP {layout.pipeline}" + (f" x {layout.virtual} virtual" if layout.virtual > 1 else ""))
    if layout.context > 1:
        parts.append(f"CP {layout.ulysses} x {layout.ring}")
    parts.append(f"DP {gpus // (layout.tensor * layout.pipeline * layout.context)}")
    return ", ".join([*parts, f"micro-batch {layout.micro_batch}"])


def execution_text(execution: Execution) -> str:
    """Return how a layout runs as a short text."""
    parts = []
    if execution.segments > 1:
        parts.append(f"{execution.segments} segments" + (" (even)" if execution.partition == "even" else ""))
    if execution.slack:
        parts.append(f"slack {execution.slack}")
    if execution.zero_bubble:
        parts.append("zero bubble")
    recomputation = execution.recomputation
    if recomputation.granularity == "selective":
        parts.append(f"recompute {' + '.join(recomputation.modules)}")
    elif recomputation.granularity == "full":
        number = recomputation.num_layers
        some = f"{number} layer{'s' if number != 1 else ''} a stage"
        layers = "every layer" if recomputation.method == "uniform" else some
        parts.append(f"recompute {layers}")
    if execution.chunk_tokens:
        parts.append(f"loss in chunks of {execution.chunk_tokens}")
    return ", ".join(parts) or "-"


def sharding_text(sharding: StateSharding) -> str:
    """Return a sharding as a short text."""
    if sharding.strategy is None:
        return "distributed optimizer" if sharding.distributed_optimizer else "none"
    return f"PaRO {sharding.strategy}" + (f", groups of {sharding.group_size}" if sharding.group_size else "")


def plan_text(choice: PlanChoice, gpus: int) -> str:
    """Return a plan as a short text, such as `TP 2, CP 1 x 8, DP 4, micro-batch 1; 4 segments; PaRO NIG`.

    Args:
        choice: the plan.
        gpus: all ranks.
    """
    layout, execution, sharding = choice
    parts = (layout_text(layout, gpus), execution_text(execution), sharding_text(sharding))
    return "; ".join(part for part in parts if part not in ("-", "none"))


def base_flags(task: PlanningTask, training: Sequence[str]) -> dict[str, Any]:
    """Return the flags that all plans share, without those that --training-flags states itself.

    Args:
        task: the model, the cluster and the choices.
        training: words of --training-flags.
    """
    return {name: value for name, value in task.base.items() if f"--{name.replace('_', '-')}" not in training}


def training_words(task: PlanningTask, choice: PlanChoice, training: tuple[str, ...] = ()) -> list[str]:
    """Return all flags of the training run of a plan.

    Args:
        task: the model, the cluster and the choices.
        choice: a plan of it.
        training: further flags of the training run; empty: the default ones.
    """
    flags = {**model_flags(task.model, task.space.seq_length), **plan_flags(task.space, choice)}
    flags |= base_flags(task, training)
    return [*flag_words(flags), *(training or default_training_words(task.model))]


def launch_text(report: SearchReport, choice: PlanChoice) -> str:
    """Return the command that launches a plan.

    Raises:
        ValueError: there is none; see `launch_refusal`.
    """
    task = report.problem.task
    return command_text(launch_words(task.space, training_words(task, choice, report.training), report.site))


def plans_table(report: SearchReport) -> str:
    """Return the best plans as a Markdown table."""
    head = (
        "",
        "layout",
        "run",
        "model states",
        "step s",
        "tokens/s/GPU",
        "MFU causal, full",
        "GB",
        "bubble",
        "exposed",
    )
    rows = []
    for number, (choice, _) in enumerate(report.ranked, start=1):
        one = report.problem.prediction(choice)
        rows.append(
            (
                str(number),
                layout_text(choice.layout, report.problem.task.space.gpus),
                execution_text(choice.execution),
                sharding_text(choice.sharding),
                f"{one.step_seconds:.4g}",
                f"{one.tokens_per_second_per_gpu:.0f}",
                f"{one.mfu:.1%}, {one.mfu_full:.1%}",
                f"{(one.peak_bytes + one.reserve_bytes) / _GB:.1f}",
                f"{one.bubble_seconds / one.step_seconds:.1%}",
                f"{sum(one.exposed.values()) / one.step_seconds:.1%}",
            )
        )
    return markdown_table(head, rows)


def seconds_table(one: StepPrediction) -> str:
    """Return the seconds of a plan by kind, with the communication that compute hides."""
    rows = [
        (kind, f"{seconds:.4g}", f"{seconds / one.step_seconds:.1%}", f"{one.hidden.get(kind, 0.0):.4g}")
        for kind, seconds in one.breakdown.items()
        if seconds or one.hidden.get(kind)
    ]
    return markdown_table(("part of the step", "seconds", "share", "hidden behind compute, s"), rows)


def stages_table(one: StepPrediction, machine: Cluster) -> str:
    """Return the memory of every stage of a plan at its peak, by kind."""
    kinds = [kind for kind in one.stages[0] if any(stage[kind] for stage in one.stages)]
    rows = []
    for number, stage in enumerate(one.stages):
        total = sum(stage.values())
        reserve = machine.reserve_bytes(total)
        cells = [f"{stage[kind] / _GB:.2f}" for kind in kinds]
        rows.append((str(number), *cells, f"{reserve / _GB:.2f}", f"{(total + reserve) / _GB:.2f}"))
    return markdown_table(("stage", *kinds, "reserve", "GB"), rows)


def explanation_text(report: SearchReport) -> str:
    """Return the binding constraint, the sensitivities and the rejected neighbours of the first plan."""
    explanation, best = report.explanation, report.ranked[0][0]
    gains = [
        (
            one.resource,
            f"{one.seconds:.4g}",
            f"{one.gain:.2%}",
            "; ".join(differences(best, one.plan)) if one.plan is not None else "the same plan",
        )
        for one in explanation.reliefs
    ]
    rejected = [
        (
            one.change,
            "" if one.seconds is None else f"{one.seconds:.4g}",
            "" if one.memory is None else f"{one.memory / _GB:.1f}",
            one.reason,
        )
        for one in explanation.neighbours
    ]
    return "\n\n".join(
        [
            f"Binding constraint: {explanation.binding}.",
            markdown_table(("10% more", "step s", "saves", "with"), gains),
            markdown_table(("rejected neighbour", "step s", "GB", "why"), rejected),
        ]
    )


def assumptions(task: PlanningTask) -> list[str]:
    """Return what the search takes for granted beside its arguments, one text each."""
    past = " ".join(f"{name}={value}" for name, value in task.cluster.defaults)
    if not past:
        return []
    return [
        f"plans are priced with current software. Past runs on {task.cluster.name} had {past}, which `predict` assumes "
        "where no flag says otherwise"
    ]


def report_text(report: SearchReport) -> str:
    """Return everything that the command `search` prints."""
    task, work = report.problem.task, report.work
    space = task.space
    title = (
        f"{task.model.name or 'model'} ({task.model.parameters / 1e9:.3g} billion parameters) on {task.cluster.name}, "
        f"{space.global_batch_size} sequences of {space.seq_length} tokens a step"
    )
    effort = (
        f"{work.nodes} nodes and {work.leaves} plans visited, {work.priced} plans priced in {report.seconds:.1f} s "
        "of processor time"
    )
    best = report.ranked[0][0]
    first = report.problem.prediction(best)
    parts = [title, plans_table(report), effort, "The first plan:", seconds_table(first)]
    parts.append(stages_table(first, task.cluster))
    refusal = launch_refusal(task.model)
    launch = [f"No command launches it. {refusal}"]
    if refusal is None:
        launch = ["Launch it with:", f"```\n{launch_text(report, best)}\n```"]
    assumed = [f"assumed: {one}" for one in assumptions(task)]
    return "\n\n".join([*parts, explanation_text(report), *assumed, *launch])


def report_json(report: SearchReport) -> dict[str, Any]:
    """Return everything about a search as JSON values."""
    task = report.problem.task
    refusal = launch_refusal(task.model)
    plans = []
    for choice, _ in report.ranked:
        flags = {name: value for name, value in plan_flags(task.space, choice).items() if value not in (None, False)}
        prediction = full_result(report.problem.prediction(choice), task.cluster)
        command = launch_text(report, choice) if refusal is None else None
        plans.append({"flags": flags, **prediction, "command": command})
    explanation = report.explanation
    return {
        "model": task.model.name,
        "cluster": task.cluster.name,
        "gpus": task.space.gpus,
        "seq_length": task.space.seq_length,
        "global_batch_size": task.space.global_batch_size,
        "plans": plans,
        "not_launched": refusal,
        "assumed": assumptions(task),
        "binding": explanation.binding,
        "reliefs": [
            {"resource": one.resource, "seconds": one.seconds, "gain": one.gain} for one in explanation.reliefs
        ],
        "neighbours": [
            {"change": one.change, "seconds": one.seconds, "bytes": one.memory, "reason": one.reason}
            for one in explanation.neighbours
        ],
        "search": {
            "seconds": report.seconds,
            "nodes": report.work.nodes,
            "leaves": report.work.leaves,
            "priced": report.work.priced,
        },
    }
