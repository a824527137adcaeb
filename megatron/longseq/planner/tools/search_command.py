"""The command `search`: finds the fastest plans of a model on a cluster, and explains the first one."""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from megatron.longseq.figures import complete_file
from megatron.longseq.flexsp.plan.cost_file import save_cost
from megatron.longseq.flexsp.tools.simulate import CORPORA
from megatron.longseq.planner.plan.bounds import PlanningProblem
from megatron.longseq.planner.plan.cluster import cluster
from megatron.longseq.planner.plan.explain import explain
from megatron.longseq.planner.plan.flexsp_search import DocumentTask, search_documents
from megatron.longseq.planner.plan.launch import launch_refusal
from megatron.longseq.planner.plan.model import architecture
from megatron.longseq.planner.plan.restrictions import unusable
from megatron.longseq.planner.plan.search import branch_and_bound
from megatron.longseq.planner.plan.space import Recomputation, SearchSpace
from megatron.longseq.planner.plan.task import PlanningTask, parse_count, planning_task
from megatron.longseq.planner.tools.document_lengths import steps_of
from megatron.longseq.planner.tools.flexsp_tables import (
    DocumentReport,
    document_launch_text,
    document_report_json,
    document_report_text,
)
from megatron.longseq.planner.tools.search_tables import SearchReport, launch_text, report_json, report_text
from megatron.longseq.planner.tools.training_flags import kernel_flags, training_words
from megatron.longseq.refusals import refuse_unwritable

# Flags that restrict the search to some values: the field of `SearchSpace`, and what the values are.
_RESTRICTIONS = {
    "tensor-model-parallel-size": ("tensor", "tensor-parallel sizes"),
    "pipeline-model-parallel-size": ("pipeline", "pipeline-parallel sizes"),
    "virtual-stages": ("virtual", "virtual stages of a pipeline rank"),
    "context-parallel-size": ("context", "context-parallel sizes"),
    "ulysses-degree": ("ulysses", "degrees of the all-to-all in context parallelism"),
    "micro-batch-size": ("micro_batch", "sequences of a micro-batch"),
    "seq1f1b-splits": ("segments", "segments of a sequence; 1: whole sequences"),
    "seq1f1b-slack": ("slacks", "extra segments of warm-up"),
    "paro-group-size": ("group_sizes", "ranks of a PaRO group"),
}

_TOP, _LENGTH_STEPS = 5, 2
_TOKENS = "--global-batch-tokens"
_NOT_WITH_LENGTHS = ("virtual", "micro_batch", "segments", "slacks")


def add_search_command(commands: Any) -> None:
    """Add the command to the planner's subparsers."""
    command = commands.add_parser("search", help="the fastest plans of a model on a cluster, with the launch command")
    command.add_argument("--model", required=True, help="a built-in name, a JSON file, or a Hugging Face config.json")
    command.add_argument("--cluster", required=True, help="FAMILY-GPUS such as a800-64, or a file of `calibrate`")
    command.add_argument("--gpus", type=int, help="number of GPUs, if the cluster does not name it")
    command.add_argument("--seq-length", required=True, metavar="N", help="tokens of a sequence, such as 128K")
    batch = command.add_mutually_exclusive_group(required=True)
    batch.add_argument("--global-batch-tokens", metavar="N", help="tokens of a step, such as 4M")
    batch.add_argument("--global-batch-size", metavar="N", help="sequences of a step; with --lengths its documents")
    _add_documents(command.add_argument_group("documents", "steps of whole documents instead of full sequences"))
    command.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="replace numbers of the model or the cluster, such as num_layers=40 node_bandwidth=50e9",
    )
    command.add_argument("--top", type=int, metavar="N", help=f"plans to print (default {_TOP})")
    _add_restrictions(command.add_argument_group("restrictions", "search only some values; default: all that fit"))
    printed = command.add_mutually_exclusive_group()
    printed.add_argument("--json", action="store_true", help="print JSON")
    printed.add_argument("--command-only", action="store_true", help="print the launch command of the best plan alone")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="write plans.json, plans.md and pictures here")
    command.add_argument(
        "--training-flags",
        metavar="FLAGS",
        help="flags of the run that the planner does not choose, as one text (default: Adam, mock data, 100 steps)",
    )
    command.add_argument("--site", metavar="FILE", help="file of scripts/sites for the launch command")
    command.set_defaults(run=run)


def _add_documents(group: Any) -> None:
    group.add_argument(
        "--lengths",
        metavar="FILE|NAME",
        help=f"lengths of documents, one a line, or a corpus ({', '.join(CORPORA)}): plan FlexSP, and compare it with "
        "packed sequences; --seq-length is the most tokens of a document",
    )
    group.add_argument("--length-steps", type=int, metavar="N", help=f"steps that are drawn (default {_LENGTH_STEPS})")


def _add_restrictions(group: Any) -> None:
    for flag, (field, what) in _RESTRICTIONS.items():
        group.add_argument(f"--{flag}", dest=field, nargs="+", type=int, metavar="N", help=what)
    group.add_argument("--strategies", nargs="+", metavar="PGO", help="triplets of --paro, upstream, upstream-zero1")
    group.add_argument("--no-zero-bubble", action="store_true", help="do not search zero-bubble schedules")
    group.add_argument("--no-recomputation", action="store_true", help="do not search recomputation")
    group.add_argument("--local-layers", action="store_true", help="train with --transformer-impl local")
    group.add_argument("--float32", action="store_true", help="train in float32 instead of bf16")


def run(args: argparse.Namespace) -> str:
    """Search, and return the text that the command prints.

    Raises:
        ValueError: an argument is not understood, or no plan fits.
    """
    _check_numbers(args)
    if args.lengths is not None:
        return _run_documents(args)
    task, training = _launchable(args)
    report = search(task, args.top or _TOP, training, args.site)
    if args.output is not None:
        _write(report, args.output)
    if args.command_only:
        return launch_text(report, report.ranked[0][0])
    return json.dumps(report_json(report), indent=1) if args.json else report_text(report)


def _launchable(args: argparse.Namespace) -> tuple[PlanningTask, tuple[str, ...]]:
    """Return the task that the arguments describe, and the words of --training-flags.

    Raises:
        ValueError: see `task_of` and `training_words`; nothing but a command is wanted, and there is none; or --output
            cannot be written.
    """
    task = task_of(args)
    refusal = launch_refusal(task.model)
    if args.command_only and refusal is not None:
        raise ValueError(refusal)
    words = training_words(args.training_flags, task.model)
    if args.output is not None:
        refuse_unwritable(f"--output {args.output}", args.output, "name a folder that is writable, or new")
    return replace(task, base={**task.base, **kernel_flags(words)}), words


def _check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that are too small, and those that the other arguments do not use.

    Raises:
        ValueError: names the flag.
    """
    numbers: list[tuple[str, list[int], int]] = [
        (flag, getattr(args, field) or [], int(field != "slacks")) for flag, (field, _) in _RESTRICTIONS.items()
    ]
    single = {"top": args.top, "length-steps": args.length_steps, "gpus": args.gpus}
    numbers += [(flag, [] if value is None else [value], 1) for flag, value in single.items()]
    for flag, values, least in numbers:
        if values and min(values) < least:
            raise ValueError(f"--{flag} {min(values)}: give at least {least}")
    if args.length_steps is not None and args.lengths is None:
        raise ValueError(f"--length-steps {args.length_steps}: steps are drawn from --lengths, which is not given")
    if args.top is not None and args.lengths is not None:
        raise ValueError(f"--top {args.top} with --lengths: the table has the best plans of each kind; leave it out")


def _run_documents(args: argparse.Namespace) -> str:
    """Search for the documents of --lengths, and return the text that the command prints."""
    flags = [flag for flag, (field, _) in _RESTRICTIONS.items() if field in _NOT_WITH_LENGTHS and getattr(args, field)]
    if flags:
        raise ValueError(f"--{flags[0]} with --lengths: FlexSP has one micro-batch of packed documents and no segments")
    started = time.process_time()
    tokens = None if args.global_batch_tokens is None else parse_count(args.global_batch_tokens, _TOKENS)
    task, training = _launchable(args)
    if task.model.attention_dropout:
        raise ValueError(
            "--lengths: the model has attention_dropout above 0, which packed documents do not support; give --set "
            "attention_dropout=0"
        )
    documents = None if tokens else task.space.global_batch_size
    steps = steps_of(args.lengths, task.space.seq_length, documents, tokens, args.length_steps or _LENGTH_STEPS)
    found = DocumentTask(task, tuple(map(tuple, steps)), tokens)
    plans = search_documents(found)
    cost_file = None if args.output is None else str(args.output / "flexsp-cost.json")
    spent = time.process_time() - started
    report = DocumentReport(found, plans, spent, training, args.site, cost_file)
    if args.output is not None:
        _write_documents(report, args.output)
    if args.command_only:
        return document_launch_text(report, plans[0])
    return json.dumps(document_report_json(report), indent=1) if args.json else document_report_text(report)


def _write_documents(report: DocumentReport, folder: Path) -> None:
    """Write the files of `_write`, the cost model of the first plan, and a picture of its first step."""
    from megatron.longseq.flexsp.tools.figure import draw

    folder.mkdir(parents=True, exist_ok=True)
    texts = {"plans.json": json.dumps(document_report_json(report), indent=1), "plans.md": document_report_text(report)}
    if launch_refusal(report.search.task.model) is None:
        texts["launch.sh"] = document_launch_text(report, report.plans[0])
    _write_texts(folder, texts)
    save_cost(report.plans[0].one.cost, folder / "flexsp-cost.json")
    shown = {plan.name: plan.found.plans[0] for plan in reversed(report.plans) if plan.found.plans}
    draw(shown, report.search.steps[0], folder / "groups.svg")


def task_of(args: argparse.Namespace) -> PlanningTask:
    """Return the task that the arguments describe.

    Raises:
        ValueError: a number or a name is not understood, or the batch is not a whole number of sequences.
    """
    numbers = _numbers(args.set)
    machine = cluster(",".join([args.cluster, *(f"{name}={value}" for name, value in numbers[1].items())]), args.gpus)
    model = architecture(args.model, numbers[0])
    seq_length = parse_count(args.seq_length, "--seq-length")
    if args.global_batch_size is not None:
        sequences = parse_count(args.global_batch_size, "--global-batch-size")
    else:
        tokens = parse_count(args.global_batch_tokens, _TOKENS)
        sequences = max(1, tokens // seq_length) if args.lengths is not None else tokens // seq_length
        if args.lengths is None and tokens % seq_length:
            nearest = [count * seq_length for count in (sequences, sequences + 1) if count]
            raise ValueError(
                f"{_TOKENS} {args.global_batch_tokens}: not a multiple of --seq-length {args.seq_length}; give "
                f"{' or '.join(map(str, nearest))}"
            )
    restrictions: dict[str, Any] = {
        field: tuple(getattr(args, field)) for field, _ in _RESTRICTIONS.values() if getattr(args, field)
    }
    if args.strategies:
        restrictions["strategies"] = tuple(args.strategies)
    if args.no_zero_bubble:
        restrictions["zero_bubble"] = (False,)
    if args.no_recomputation:
        restrictions["recomputations"] = (Recomputation(),)
    restrictions["base"] = {} if args.float32 else {"bf16": True}
    if args.local_layers:
        restrictions["base"]["transformer_impl"] = "local"
    task = planning_task(model, machine, seq_length, sequences, **restrictions)
    _check_restrictions(task.space, [field for field, _ in _RESTRICTIONS.values() if field in restrictions])
    return task


def _check_restrictions(space: SearchSpace, restricted: list[str]) -> None:
    """Refuse values that no plan can have, unless no layout is left, of which the search says more.

    Raises:
        ValueError: names the flag and the values.
    """
    flags = {field: flag for flag, (field, _) in _RESTRICTIONS.items()}
    missing = unusable(space, restricted) if any(space.layouts()) else {}
    for name, values in missing.items():
        numbers = ", ".join(map(str, values))
        why = "no layout of the search has it, with this model, cluster and batch and the other restrictions"
        if name == "group_sizes":
            why = (
                "PaRO's groups divide the data- x context-parallel ranks into several ones of at least 2 ranks; no "
                f"layout of {space.gpus} GPUs has such groups, or no triplet of --strategies uses them"
            )
        raise ValueError(f"--{flags[name]} {numbers}: {why}; leave the value out")


def _numbers(pairs: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the numbers of --set for the model and for the cluster.

    Raises:
        ValueError: there is no such number.
    """
    from megatron.longseq.planner.plan.cluster import NUMBERS
    from megatron.longseq.planner.plan.model import FIELDS

    model: dict[str, Any] = {}
    machine: dict[str, str] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name in FIELDS and value:
            model[name] = _value(value)
        elif name in NUMBERS and value:
            machine[name] = value
        else:
            raise ValueError(
                f"--set {pair}: give NAME=VALUE with a number of the model ({', '.join(sorted(FIELDS))}) or of the "
                f"cluster ({', '.join(NUMBERS)})"
            )
    return model, machine


def _value(text: str) -> Any:
    words: Mapping[str, bool] = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def search(task: PlanningTask, count: int = 5, training: tuple[str, ...] = (), site: str | None = None) -> SearchReport:
    """Search a task and explain its best plan.

    Args:
        task: the model, the cluster and the choices.
        count: number of plans to return.
        training: further flags of the training run, for launch commands.
        site: file of the machine's environment variables, of scripts/sites; None: none.

    Raises:
        ValueError: no plan is valid, or none fits; the message says what the smallest one needs.
    """
    started = time.process_time()
    problem = PlanningProblem(task)
    found = branch_and_bound(problem, task.cluster.memory_bytes, count)
    seconds = time.process_time() - started
    if not found.ranked:
        raise ValueError(_nothing(problem))
    explanation = explain(problem, found.ranked[0][0])
    return SearchReport(problem, found.ranked, found.count, seconds, explanation, training, site)


def _nothing(problem: PlanningProblem) -> str:
    """Return why a search found nothing."""
    task = problem.task
    space = task.space
    least = min((problem.node_bytes(node) for node in problem.roots()), default=inf)
    ranks = [space.gpus // (one.tensor * one.pipeline) for one in space.layouts()] if least == inf else []
    if ranks:
        return (
            f"no layout has ranks for --strategies {' '.join(space.strategies)}, which shard over groups of data- and "
            f"context-parallel ranks (at most {max(ranks)}); give other strategies, or smaller tensor- or "
            "pipeline-parallel sizes"
        )
    if least == inf:
        return (
            f"no layout divides {space.gpus} GPUs, {space.sizes.num_layers} layers, {space.sizes.num_attention_heads} "
            f"heads, {space.seq_length} tokens and {space.global_batch_size} sequences a step; give another batch, or "
            "fewer restrictions"
        )
    needs = (
        f"every layout needs at least {least / 1e9:.1f} GB"
        if least > task.cluster.memory_bytes
        else "every plan needs more"
    )
    return (
        f"no plan fits: a GPU has {task.cluster.memory_bytes / 1e9:.1f} GB, and {needs}; give more GPUs, shorter "
        "sequences, or fewer restrictions"
    )


def _write(report: SearchReport, folder: Path) -> None:
    """Write plans.json, plans.md, launch.sh and the pictures into a folder, which is created."""
    from megatron.longseq.planner.tools.search_figures import draw_all

    folder.mkdir(parents=True, exist_ok=True)
    texts = {"plans.json": json.dumps(report_json(report), indent=1), "plans.md": report_text(report)}
    if launch_refusal(report.problem.task.model) is None:
        texts["launch.sh"] = launch_text(report, report.ranked[0][0])
    _write_texts(folder, texts)
    draw_all(report, folder)


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    if "launch.sh" not in texts:
        (folder / "launch.sh").unlink(missing_ok=True)  # of an earlier search, for another model
    for name, text in texts.items():
        with complete_file(folder / name) as half:
            half.write_text(text + "\n")
