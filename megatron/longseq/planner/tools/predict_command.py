"""The command `predict`: prices one run that is given by flags, or a table of runs."""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.longseq.command_line import markdown_table
from megatron.longseq.planner.plan.cluster import Cluster
from megatron.longseq.planner.plan.configuration import reasons
from megatron.longseq.planner.plan.flags import Reading, check_names, read_fully
from megatron.longseq.planner.plan.step import StepPrediction, predict
from megatron.longseq.planner.plan.values import is_empty
from megatron.longseq.planner.tools.flexsp_predict import LENGTHS, describe_plans, predict_documents, wants_documents

_GB = 1e9
_COLUMNS = (
    "step_seconds",
    "tokens_per_second_per_gpu",
    "tflops_per_gpu",
    "tflops_per_gpu_full",
    "peak_gb",
    "last_stage_gb",
    "reserve_gb",
    "fits",
    "mfu",
)
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def add_predict_command(commands: Any) -> None:
    """Add the command to the planner's subparsers."""
    command = commands.add_parser(
        "predict",
        help="seconds and memory of one run (flags of the training script), or of a table of runs (--rows)",
        usage="python -m megatron.longseq.planner predict --model M --cluster C [--gpus N] FLAGS... | --rows FILE.csv",
    )
    command.add_argument("--rows", metavar="FILE.csv", help="a table: columns are flags in snake case, gpus, cluster")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("flags", nargs="*", metavar="FLAGS")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Return the text that the command prints.

    Raises:
        ValueError: a flag or a column is not understood, or no row can be priced.
    """
    tokens = list(args.flags)
    if args.rows:
        results = price_rows(read_rows(Path(args.rows), flags_of(tokens)))
        return json.dumps(results, indent=1) if args.json else rows_table(results)
    if not tokens:
        raise ValueError("give the flags of a run, such as --model llama-7b --cluster a800-64, or --rows FILE.csv")
    values = flags_of(tokens)
    if wants_documents(values):
        found, machine = predict_documents(values)
        if args.json:
            result = full_result(found.prediction, machine) | {"microbatches": found.microbatches}
            return json.dumps(result, indent=1)
        return f"{describe(found.prediction, machine)}\n\n{describe_plans(found)}"
    reading = read_fully(values)
    prediction = _predict(reading)
    if args.json:
        return json.dumps(full_result(prediction, reading.cluster) | {"assumed": list(reading.assumed)}, indent=1)
    return describe(prediction, reading.cluster, reading.assumed)


def _predict(reading: Reading) -> StepPrediction:
    """Return the prediction of a run, with the contradictions of its flags among the reasons.

    Raises:
        ValueError: there is no price; says why the run is not valid, if it is not.
    """
    model, machine, run = reading[:3]
    try:
        prediction = predict(model, machine, run)
    except (ValueError, ArithmeticError) as error:
        why = dict.fromkeys([*reading.contradictions, *reasons(model, run)])
        raise ValueError("; ".join(why) or f"these sizes allow no prediction: {error}") from error
    return replace(prediction, reasons=tuple(dict.fromkeys([*reading.contradictions, *prediction.reasons])))


def price_rows(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the figures of every row. A row that cannot be priced has `error` instead, which is also printed.

    Args:
        rows: pairs of a name for messages and flags in snake case.

    Raises:
        ValueError: no row can be priced.
    """
    results: list[dict[str, Any]] = []
    for where, values in rows:
        try:
            results.append(row_result(values, where))
        except ValueError as error:
            results.append({**dict.fromkeys(_COLUMNS), "reasons": [str(error)], "error": str(error)})
    errors = [one["error"] for one in results if "error" in one]
    if errors and len(errors) == len(results):
        raise ValueError("\n".join(errors))
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    return results


def separate_flags(argv: Sequence[str]) -> list[str]:
    """Return a command line of `predict` in which the flags of the run follow `--`, so that argparse passes them on."""
    own: list[str] = []
    rest: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token in ("--json", "-h", "--help") or token.startswith("--rows="):
            own.append(token)
        elif token == "--rows":
            own += [token, *tokens[:1]]
            tokens = tokens[1:]
        elif token != "--":
            rest.append(token)
    return [*own, "--", *rest]


def flags_of(tokens: Sequence[str]) -> dict[str, Any]:
    """Return the flags of a command line. A flag without a value is True; several values stay one text.

    Raises:
        ValueError: a value stands before the first flag.
    """
    found: dict[str, Any] = {}
    name = None
    for token in tokens:
        if token.startswith("--") and not token.removeprefix("--")[:1].isdigit():
            name, _, value = token.partition("=")
            found[name] = value or True
        elif name is None:
            raise ValueError(f"{token!r} is no flag; flags begin with --")
        else:
            found[name] = token if found[name] is True else f"{found[name]} {token}"
    return found


def read_rows(path: Path, common: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a CSV file, each with its place for messages.

    Args:
        path: the file.
        common: flags that every row gets where its own cell is empty.

    Raises:
        ValueError: the file has no rows, or a column is no flag.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        reader = csv.DictReader(file)
        columns = [column for column in reader.fieldnames or () if column.strip()]
        if not columns:
            raise ValueError(f"{path}: no columns")
        twice = sorted({column for column in columns if columns.count(column) > 1})
        if twice:
            raise ValueError(f"{path}: more than one column {', '.join(twice)}; give one of each")
        separator = next((name for mark, name in _SEPARATORS.items() if mark in columns[0]), None)
        if len(columns) == 1 and separator:
            raise ValueError(f"{path}: the columns are separated by {separator}; separate them by commas")
        try:
            check_names([column for column in columns if column != LENGTHS])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        rows = []
        for number, row in enumerate(reader, start=2):
            if None in row:
                raise ValueError(f"{path}, line {number}: more cells than columns")
            given = {key: value for key, value in row.items() if not is_empty(key, value)}
            if "" in given:
                raise ValueError(f"{path}, line {number}: {given['']!r} is in a column without a name")
            if given:  # not a line of commas
                rows.append((f"{path}, line {number}", {**common, **given}))
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def row_result(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return the figures of one row.

    Args:
        values: flags in snake case.
        where: names the row in messages.

    Raises:
        ValueError: a value is not understood; the message names the row.
    """
    try:
        if wants_documents(values):
            return short_result(predict_documents(values)[0].prediction)
        reading = read_fully(values)
        return short_result(_predict(reading)) | {"assumed": list(reading.assumed)}
    except (ValueError, OSError) as error:  # of a file that the row names
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def short_result(prediction: StepPrediction) -> dict[str, Any]:
    """Return the figures of a prediction that a table has. GB are 1e9 bytes."""
    figures = (
        prediction.step_seconds,
        prediction.tokens_per_second_per_gpu,
        prediction.tflops_per_gpu,
        prediction.tflops_per_gpu * prediction.mfu_full / prediction.mfu,
        prediction.peak_bytes / _GB,
        sum(prediction.stages[-1].values()) / _GB,
        prediction.reserve_bytes / _GB,
        prediction.fits,
        prediction.mfu,
    )
    return {**dict(zip(_COLUMNS, figures, strict=True)), "reasons": list(prediction.reasons)}


def full_result(prediction: StepPrediction, machine: Cluster) -> dict[str, Any]:
    """Return all figures of a prediction."""
    return {
        **short_result(prediction),
        "mfu_full": prediction.mfu_full,
        "memory_gb": machine.memory_bytes / _GB,
        "bubble_seconds": prediction.bubble_seconds,
        "breakdown": prediction.breakdown,
        "exposed": prediction.exposed,
        "hidden": prediction.hidden,
        "stages": [dict(kinds) for kinds in prediction.stages],
    }


def describe(prediction: StepPrediction, machine: Cluster, assumed: Sequence[str] = ()) -> str:
    """Return a prediction as text, with what the planner assumed.

    Args:
        prediction: the prediction.
        machine: the cluster, for its memory.
        assumed: what the planner assumed, one text each.
    """
    fit = "fits" if prediction.fits else "does not fit"
    lines = [
        f"step: {prediction.step_seconds:.4g} s, {prediction.tokens_per_second_per_gpu:.1f} tokens/s/GPU, "
        f"{prediction.tflops_per_gpu:.1f} model TFLOP/s/GPU, MFU {100 * prediction.mfu:.1f} % (causal), "
        f"{100 * prediction.mfu_full:.1f} % (full)",
        f"memory: {prediction.peak_bytes / _GB:.2f} GB allocated on the fullest rank, "
        f"{prediction.reserve_bytes / _GB:.2f} GB in reserve, {machine.memory_bytes / _GB:.1f} GB on a GPU: {fit}",
    ]
    lines += [f"not valid: {reason}" for reason in prediction.reasons]
    lines += [f"assumed: {one}" for one in assumed]
    shown = [(kind, seconds) for kind, seconds in prediction.breakdown.items() if seconds]
    rows = [(kind, f"{seconds:.4g}", f"{100 * seconds / prediction.step_seconds:.1f} %") for kind, seconds in shown]
    lines += ["", markdown_table(("part", "seconds", "of the step"), rows), ""]
    kinds = [kind for kind in prediction.stages[0] if any(stage[kind] for stage in prediction.stages)]
    stages = [
        (str(number), *(f"{stage[kind] / _GB:.2f}" for kind in kinds), f"{sum(stage.values()) / _GB:.2f}")
        for number, stage in enumerate(prediction.stages)
    ]
    return "\n".join([*lines, markdown_table(("stage", *kinds, "GB at the peak"), stages)])


def rows_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of rows."""
    head = ("row", "step s", "tokens/s/GPU", "TFLOP/s/GPU", "peak GB", "reserve GB", "fits", "not valid")
    rows = []
    for number, one in enumerate(results, start=1):
        reasons = "; ".join(one["reasons"])
        if "error" in one:
            rows.append((str(number), *("" for _ in head[2:]), reasons))
            continue
        rows.append(
            (
                str(number),
                f"{one['step_seconds']:.4g}",
                f"{one['tokens_per_second_per_gpu']:.1f}",
                f"{one['tflops_per_gpu']:.1f}",
                f"{one['peak_gb']:.2f}",
                f"{one['reserve_gb']:.2f}",
                "yes" if one["fits"] else "no",
                reasons,
            )
        )
    assumed = {one: None for result in results for one in result.get("assumed", ())}
    return "\n".join([markdown_table(head, rows), *(f"\nassumed: {one}" for one in assumed)])
