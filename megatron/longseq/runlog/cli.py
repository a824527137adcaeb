"""Watch a run in the terminal, make a report of it, and print the fields of its record."""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.longseq.command_line import markdown_table, run_command
from megatron.longseq.runlog import record
from megatron.longseq.runlog.folder import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, or 1 after an error."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may not know the characters of a curve
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    return run_command(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron.longseq.runlog", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    watch = commands.add_parser("watch", help="show a run in the terminal while it goes on")
    watch.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="folder that scripts/launch.sh printed")
    watch.add_argument("--once", action="store_true", help="print once and end")
    watch.add_argument("--seconds", type=_positive, default=2.0, help="time between two looks (default 2)")
    watch.set_defaults(run=_watch)
    report = commands.add_parser("report", help="write one HTML file about a run, with pictures, for any browser")
    report.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="folder that scripts/launch.sh printed")
    report.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".html")
    report.set_defaults(run=_report)
    fields = commands.add_parser("fields", help=f"markdown: the fields of {record.FILE}")
    fields.set_defaults(run=lambda args: fields_table())
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError(f"{text} is not a number of seconds")
    return value


def _watch(args: argparse.Namespace) -> None:
    from rich.console import Console

    from megatron.longseq.runlog.screen import follow, show_once

    run = RunFolder(args.folder)
    if args.once:
        show_once(run, Console())
        return
    with contextlib.suppress(KeyboardInterrupt):
        follow(run, Console(), args.seconds)


def _report(args: argparse.Namespace) -> str:
    from megatron.longseq.runlog.report import write_report

    _check_output(args.output)
    run = RunFolder(args.folder)
    run.refresh()
    if problem := run.problem():
        raise ValueError(problem)
    write_report(run, args.output)
    return f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB"


def _check_output(file: Path) -> None:
    if file.suffix not in (".html", ".htm"):
        raise ValueError(f"--output {file}: give a name that ends in .html")
    if file.is_dir():
        raise ValueError(f"--output {file} is a folder; give the name of a file in it")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"--output {file}: there is no folder {file.absolute().parent}; create it first")


def fields_table() -> str:
    """Return a Markdown table of the fields of all records."""
    rows = [(kind, f"`{name}`", unit, text) for kind, name, unit, text in record.FIELDS]
    return markdown_table(("kind", "field", "unit", ""), rows, "|---|---|---|---|")
