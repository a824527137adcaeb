"""Tables and JSON of a search for documents: FlexSP beside one degree and packed sequences."""

from typing import Any, NamedTuple

from megatron.longseq.command_line import markdown_table
from megatron.longseq.flexsp.tools.cli import plan_table
from megatron.longseq.planner.plan.flexsp_search import DocumentPlan, DocumentTask, flexsp_flags
from megatron.longseq.planner.plan.launch import (
    command_text,
    default_training_words,
    flag_words,
    launch_refusal,
    launch_words,
    model_flags,
)
from megatron.longseq.planner.tools.predict_command import full_result
from megatron.longseq.planner.tools.search_tables import (
    base_flags,
    execution_text,
    layout_text,
    seconds_table,
    sharding_text,
    stages_table,
)

_GB = 1e9


class DocumentReport(NamedTuple):
    """A finished search for documents.

    Attributes:
        search: what was searched.
        plans: the plans: FlexSP's, fastest first, then those that it is compared with.
        seconds: processor time of the search.
        training: flags that the planner does not choose; empty: the default ones.
        site: file for `scripts/launch.sh --site`.
        cost_file: file with FlexSP's cost model; None: it is not written.
    """

    search: DocumentTask
    plans: list[DocumentPlan]
    seconds: float
    training: tuple[str, ...] = ()
    site: str | None = None
    cost_file: str | None = None


def document_training_words(report: DocumentReport, plan: DocumentPlan) -> list[str]:
    """Return all flags of the training run of a plan.

    Args:
        report: the search and its results.
        plan: one of its plans.
    """
    task = report.search.task
    flags = {**model_flags(task.model, task.space.seq_length), **flexsp_flags(report.search, plan)}
    flags |= base_flags(task, report.training)
    if report.cost_file is not None and plan.found.context is None:
        flags["flexsp_cost"] = report.cost_file
    words = list(report.training)
    if not words:
        words = default_training_words(task.model)
        at = words.index("--mock-data")
        words[at : at + 1] = ["--data-path", "DATA"]
    return [*flag_words(flags), *words]


def document_launch_text(report: DocumentReport, plan: DocumentPlan) -> str:
    """Return the command that launches a plan.

    Raises:
        ValueError: there is none; see `launch_refusal`.
    """
    words = document_training_words(report, plan)
    return command_text(launch_words(report.search.task.space, words, report.site))


def _plans_table(report: DocumentReport) -> str:
    rows = []
    for plan in report.plans:
        one, gpus = plan.found.prediction, report.search.task.space.gpus
        rows.append(
            (
                plan.name,
                layout_text(plan.choice.layout, gpus),
                execution_text(plan.choice.execution),
                sharding_text(plan.choice.sharding),
                str(plan.one.tokens),
                f"{one.step_seconds:.4g}",
                f"{one.tokens_per_second_per_gpu:.0f}",
                f"{one.mfu:.1%}",
                f"{(one.peak_bytes + one.reserve_bytes) / _GB:.1f}",
                f"{plan.found.microbatches:g}",
                f"{one.breakdown['context'] / one.step_seconds:.1%}",
                f"{one.breakdown['waiting'] / one.step_seconds:.1%}",
            )
        )
    head = ("plan", "layout", "run", "model states", "tokens/GPU", "step s", "tokens/s/GPU", "MFU", "GB")
    return markdown_table((*head, "micro-batches", "groups' messages", "waiting"), rows)


def _comparison(report: DocumentReport) -> str:
    first = report.plans[0]
    texts = [
        f"{plan.seconds / first.seconds:.2f} times as long with {plan.name}"
        + (", which cut documents at the ends of sequences" if plan.found.context is not None else "")
        for plan in report.plans
        if plan.name != first.name
    ]
    return f"A step takes {' and '.join(texts)}." if texts else "No other way to train these documents fits."


def document_report_text(report: DocumentReport) -> str:
    """Return everything that `search --lengths` prints."""
    search, first = report.search, report.plans[0]
    task, lengths = search.task, search.steps[0]
    title = (
        f"{task.model.name or 'model'} ({task.model.parameters / 1e9:.3g} billion parameters) on {task.cluster.name}, "
        f"steps of documents of up to {task.space.seq_length} tokens; the first of {len(search.steps)} steps has "
        f"{len(lengths)} documents, {sum(lengths)} tokens, the longest {max(lengths)}"
    )
    parts = [title, _plans_table(report), _comparison(report)]
    parts += [f"{report.seconds:.1f} s of processor time", "The first plan:", seconds_table(first.found.prediction)]
    parts += [stages_table(first.found.prediction, task.cluster), "Groups of the first step:"]
    parts += [plan_table(first.found.plans[0], lengths)]
    return "\n\n".join([*parts, *_launch_parts(report)])


def _launch_parts(report: DocumentReport) -> list[str]:
    """Return how to launch the first plan of each name."""
    refusal = launch_refusal(report.search.task.model)
    if refusal is not None:
        return [f"No command launches them. {refusal}"]
    first = {plan.name: plan for plan in reversed(report.plans)}
    parts = []
    for name in dict.fromkeys(plan.name for plan in report.plans):
        parts += [f"Launch {name} with:", f"```\n{document_launch_text(report, first[name])}\n```"]
    if not report.training:
        parts.append("Replace DATA by the prefix of the tokenized data, and the tokenizer by its own.")
    return parts


def document_report_json(report: DocumentReport) -> dict[str, Any]:
    """Return everything about a search for documents as JSON values."""
    search, task = report.search, report.search.task
    refusal = launch_refusal(task.model)
    plans = []
    for plan in report.plans:
        flags = {name: value for name, value in flexsp_flags(search, plan).items() if value not in (None, False)}
        result = full_result(plan.found.prediction, task.cluster)
        command = document_launch_text(report, plan) if refusal is None else None
        extra = {"microbatches": plan.found.microbatches, "command": command}
        plans.append({"plan": plan.name, "flags": flags, **result, **extra})
    return {
        "model": task.model.name,
        "cluster": task.cluster.name,
        "seq_length": task.space.seq_length,
        "documents": [len(lengths) for lengths in search.steps],
        "tokens": [sum(lengths) for lengths in search.steps],
        "plans": plans,
        "not_launched": refusal,
        "search": {"seconds": report.seconds},
    }
