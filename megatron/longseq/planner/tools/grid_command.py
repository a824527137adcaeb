"""The command `grid`: the best plan of every model, sequence length and cluster, in a table and a picture."""

import argparse
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from megatron.longseq.command_line import markdown_table
from megatron.longseq.figures import BLUE, GREEN, LEGEND, ORANGE, RED, TITLE, check_output, figure_file
from megatron.longseq.planner.plan.bounds import PlanningProblem
from megatron.longseq.planner.plan.cluster import cluster
from megatron.longseq.planner.plan.launch import PlanChoice
from megatron.longseq.planner.plan.model import architecture
from megatron.longseq.planner.plan.search import branch_and_bound
from megatron.longseq.planner.plan.step import StepPrediction
from megatron.longseq.planner.plan.task import PlanningTask, parse_count, planning_task
from megatron.longseq.planner.tools.search_tables import plan_text

_COLOURS = (BLUE, ORANGE, GREEN, RED)
_MARKERS = "osD^"


class GridCell(NamedTuple):
    """The best plan of one model, length and cluster; None: no plan fits."""

    model: str
    length: str
    cluster: str
    gpus: int
    plan: PlanChoice | None
    prediction: StepPrediction | None


def add_grid_command(commands: Any) -> None:
    """Add the command to the planner's subparsers."""
    command = commands.add_parser("grid", help="the best plan of every model, sequence length and cluster")
    command.add_argument("--models", nargs="+", default=["llama-7b", "llama-13b", "llama-30b", "llama-65b"])
    command.add_argument("--clusters", nargs="+", default=["a100-64", "a800-64", "a100-1024", "a800-1024"])
    command.add_argument("--seq-lengths", nargs="+", default=["32K", "64K", "128K", "256K"])
    command.add_argument("--global-batch-tokens", default="4M", metavar="N", help="tokens of a step (default 4M)")
    command.add_argument("--output", type=Path, metavar="FILE", help="picture of the MFU (.svg, .png)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Search every cell, and return the table.

    Raises:
        ValueError: an argument is not understood.
    """
    if args.output is not None:
        check_output(args.output)
    tokens = parse_count(args.global_batch_tokens, "--global-batch-tokens")
    wanted = list(product(args.models, args.seq_lengths, args.clusters))
    tasks = [_task(*names, tokens) for names in wanted]  # a wrong name is known before the first search
    cells = [best_cell(*names, task) for names, task in zip(wanted, tasks, strict=True)]
    if args.output is not None:
        draw_grid(cells, args.output)
    return grid_table(cells)


def _task(model: str, length: str, machine: str, tokens: int) -> PlanningTask:
    """Return the search of a cell.

    Args:
        model: see `architecture`.
        length: tokens of a sequence, such as "128K".
        machine: cluster, such as "a800-64".
        tokens: tokens of a step.

    Raises:
        ValueError: the step is not a whole number of sequences, or a name is unknown.
    """
    seq_length = parse_count(length, "--seq-lengths")
    if tokens % seq_length:
        raise ValueError(f"--global-batch-tokens {tokens} is not a multiple of {seq_length} tokens")
    return planning_task(architecture(model, {}), cluster(machine), seq_length, tokens // seq_length)


def best_cell(model: str, length: str, machine: str, task: PlanningTask) -> GridCell:
    """Return the best plan of a model, a sequence length and a cluster.

    Args:
        model, length, machine: how they are named.
        task: their search.
    """
    gpus = task.cluster
    problem = PlanningProblem(task)
    ranked = branch_and_bound(problem, gpus.memory_bytes).ranked
    if not ranked:
        return GridCell(model, length, machine, gpus.gpus, None, None)
    return GridCell(model, length, machine, gpus.gpus, ranked[0][0], problem.prediction(ranked[0][0]))


def grid_table(cells: list[GridCell]) -> str:
    """Return the cells as a Markdown table: a row for a model, a length and a number of GPUs, families side by side."""
    families = list(dict.fromkeys(_family(one) for one in cells))
    rows: dict[tuple[str, str, str], dict[str, GridCell]] = {}
    for one in cells:
        rows.setdefault((one.model, one.length, str(one.gpus)), {})[_family(one)] = one
    lines = [(*key, *(text for name in families for text in _texts(found.get(name)))) for key, found in rows.items()]
    head = [text for name in families for text in (name, "step s", "MFU")]
    return markdown_table(("model", "tokens", "GPUs", *head), lines)


def _family(cell: GridCell) -> str:
    """Return the name of a cluster without its number of GPUs."""
    return cell.cluster.removesuffix(f"-{cell.gpus}")


def _texts(cell: GridCell | None) -> tuple[str, str, str]:
    """Return the plan, the seconds of a step and the causal MFU of a cell."""
    if cell is None or cell.plan is None or cell.prediction is None:
        return ("" if cell is None else "no plan fits"), "", ""
    return (
        plan_text(cell.plan, cell.gpus),
        f"{cell.prediction.step_seconds:.4g}",
        f"{100 * cell.prediction.mfu:.1f}%",
    )


def draw_grid(cells: list[GridCell], file: Path) -> None:
    """Draw the causal MFU against the sequence length: a panel for each model, a line for each cluster."""
    models, machines = (
        list(dict.fromkeys(one.model for one in cells)),
        list(dict.fromkeys(one.cluster for one in cells)),
    )
    with figure_file(file, 2.7 * len(models) + 0.6, 3.1) as figure:
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, model in zip(panels, models, strict=True):
            for number, machine in enumerate(machines):
                line = [one for one in cells if (one.model, one.cluster) == (model, machine)]
                values = [100 * one.prediction.mfu if one.prediction else float("nan") for one in line]
                colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
                axes.plot([one.length for one in line], values, f"{marker}-", color=colour, label=machine, markersize=4)
            axes.set_title(model, **TITLE)
            axes.set_xlabel("tokens of a sequence")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        panels[0].set_ylabel("MFU of the best plan, causal (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(machines), **LEGEND)
        figure.tight_layout(rect=(0, 0, 1, 0.93))
