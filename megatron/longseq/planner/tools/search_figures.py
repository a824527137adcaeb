"""Pictures of a search: memory by stage, seconds by kind, time against memory, and the pipeline's timeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.longseq.figures import BLUE, EMPTY, GREEN, LEGEND, ORANGE, PURPLE, RED, SKY, TITLE, figure_file
from megatron.longseq.pipeline.plan.simulate import simulate
from megatron.longseq.pipeline.tools.figure import draw
from megatron.longseq.planner.plan.bounds import PlanningProblem
from megatron.longseq.planner.plan.launch import PlanChoice
from megatron.longseq.planner.plan.memory import schedule_of
from megatron.longseq.planner.plan.search import branch_and_bound
from megatron.longseq.planner.plan.step import stage_costs
from megatron.longseq.planner.tools.search_tables import SearchReport, plan_text

COLOURS = (BLUE, ORANGE, GREEN, SKY, PURPLE, RED, "#F0E442", "#999999", "#444444", "#8C6D31", "#BBBBBB")
_GB = 1e9
_SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)  # of a GPU's memory, for the curve of time against memory
_LARGEST_TIMELINE = 1500  # actions of a rank that a picture can show


def draw_all(report: SearchReport, folder: Path) -> list[Path]:
    """Draw every picture of a search into a folder, and return the files."""
    best = report.ranked[0][0]
    files = [folder / "memory.svg", folder / "seconds.svg", folder / "front.svg"]
    draw_memory(report, files[0])
    draw_seconds(report, files[1])
    draw_front(report.problem, files[2])
    if best.layout.pipeline > 1:
        files.append(folder / "timeline.svg")
        draw_timeline(report.problem, best, files[-1])
    return files


def draw_memory(report: SearchReport, file: Path) -> None:
    """Draw the memory of every stage of the first plan at its peak, stacked by kind."""
    task = report.problem.task
    stages = report.problem.prediction(report.ranked[0][0]).stages
    totals = [sum(stage.values()) for stage in stages]
    kinds = [kind for kind in stages[0] if any(stage[kind] for stage in stages)]
    rows = {kind: [stage[kind] / _GB for stage in stages] for kind in kinds}
    rows["reserve"] = [task.cluster.reserve_bytes(total) / _GB for total in totals]
    with figure_file(file, max(5.0, 2.5 + 0.45 * len(stages)), 3.6) as figure:
        axes = _axes(figure, right=0.70)
        _stack(axes, [str(number) for number in range(len(stages))], rows)
        axes.axhline(task.cluster.memory_bytes / _GB, color="#222222", linewidth=1, linestyle="--")
        axes.set_xlabel("pipeline stage")
        axes.set_ylabel("GB at the peak")
        axes.set_title(f"memory; dashed: {task.cluster.memory_bytes / _GB:.0f} GB of a GPU", **TITLE)


def draw_seconds(report: SearchReport, file: Path) -> None:
    """Draw what the seconds of the best plans consist of."""
    found = [report.problem.prediction(choice).breakdown for choice, _ in report.ranked]
    kinds = [kind for kind in found[0] if any(one[kind] for one in found)]
    with figure_file(file, 6.4, 3.6) as figure:
        axes = _axes(figure, right=0.72)
        names = [str(number) for number in range(1, len(found) + 1)]
        _stack(axes, names, {kind: [one[kind] for one in found] for kind in kinds})
        axes.set_xlim(-0.6, max(len(names), 4) - 0.4)
        axes.set_xlabel("plan")
        axes.set_ylabel("seconds of a step")
        axes.set_title("what a step consists of", **TITLE)


def front(problem: PlanningProblem, shares: Sequence[float] = _SHARES) -> list[tuple[float, PlanChoice, float]]:
    """Return the bytes, plan and seconds of the fastest plan for several limits of memory, by rising limit.

    Args:
        problem: the search.
        shares: limits as shares of a GPU's memory.
    """
    limit = problem.task.cluster.memory_bytes
    points: list[tuple[float, PlanChoice, float]] = []
    for share in shares:
        ranked = branch_and_bound(problem, share * limit).ranked
        if ranked and (not points or ranked[0][0] != points[-1][1]):
            choice, price = ranked[0]
            points.append((price.memory, choice, price.seconds))
    return points


def draw_front(problem: PlanningProblem, file: Path) -> None:
    """Draw the Pareto front of the seconds of a step against the memory of a GPU."""
    points = front(problem)
    with figure_file(file, 7.2, 3.8) as figure:
        axes = _axes(figure, right=0.97)
        axes.plot([size / _GB for size, _, _ in points], [seconds for _, _, seconds in points], "o-", color=BLUE)
        for number, (size, _, seconds) in enumerate(points, start=1):
            axes.annotate(str(number), (size / _GB, seconds), textcoords="offset points", xytext=(5, 4))
        text = "\n".join(
            f"{number}: {plan_text(choice, problem.task.space.gpus)}"
            for number, (_, choice, _) in enumerate(points, start=1)
        )
        axes.text(0.98, 0.97, text, transform=axes.transAxes, ha="right", va="top", fontsize=6.5)
        axes.margins(x=0.08, y=0.35)
        axes.set_xlabel("GB of the fullest rank, with the reserve")
        axes.set_ylabel("seconds of a step")
        axes.set_title("the fastest plan for a limit of memory", **TITLE)


def draw_timeline(problem: PlanningProblem, choice: PlanChoice, file: Path) -> None:
    """Draw the simulated timeline of a plan's pipeline: its first micro-batches, if there are many."""
    layout, execution = choice.layout, choice.execution
    run = problem.task.configuration(choice)
    key = (layout.pipeline, run.microbatches, execution.segments, layout.virtual, execution.slack)
    schedule = schedule_of(*key, execution.zero_bubble)
    if max(map(len, schedule.orders)) <= _LARGEST_TIMELINE:
        draw([simulate(schedule, stage_costs(problem.task.model, problem.task.cluster, run))], file)


def _axes(figure: Any, right: float) -> Any:
    axes = figure.add_axes((0.11, 0.15, right - 0.11, 0.74))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def _stack(axes: Any, names: Sequence[str], rows: dict[str, list[float]]) -> None:
    """Draw stacked bars with a legend at the right."""
    below = [0.0] * len(names)
    for colour, (kind, heights) in zip(COLOURS, rows.items(), strict=False):
        axes.bar(names, heights, bottom=below, color=colour, edgecolor="white", linewidth=0.4, label=kind, width=0.7)
        below = [one + height for one, height in zip(below, heights, strict=True)]
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), **LEGEND)
    axes.set_facecolor(EMPTY)
