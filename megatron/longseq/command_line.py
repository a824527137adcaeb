"""What the command lines of all systems share: one runner, the command `flags`, and Markdown tables."""

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron.longseq.refusals import Refusals


def run_command(parser: ArgumentParser, argv: Sequence[str] | None) -> int:
    """Run the command that was given, and print the text that it returns, if any.

    Args:
        parser: a parser whose commands set `run`, a function of the parsed arguments.
        argv: the command line; None: that of the process.

    Returns:
        The exit status: 0, or 1 after an error, which is printed.
    """
    args = parser.parse_args(argv)
    try:
        text = args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {_reason(error)}", file=sys.stderr)
        return 1
    if text is not None:
        print(text)
    return 0


def _reason(error: ValueError | OSError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"an input file is not UTF-8 text: {error.reason} at byte {error.start}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def add_flags_command(
    commands: Any, add_arguments: Callable[[ArgumentParser], Any], refusals: Mapping[str, Refusals]
) -> None:
    """Add the command that prints the flags of a training run, and the flags that they refuse, as Markdown.

    Args:
        commands: subparsers of the command line.
        add_arguments: adds the flags of a training run to a parser.
        refusals: tables of refused flags, by what refuses them.
    """
    flags = commands.add_parser("flags", help="markdown: the flags of a training run, and what they refuse")
    flags.set_defaults(run=lambda args: f"{flags_table(add_arguments)}\n\n{refusals_table(refusals)}")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "") -> str:
    """Return a Markdown table.

    Args:
        head: names of the columns.
        rows: cells of the rows.
        rule: the line below the head; by default all columns are aligned to the left.
    """
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    lines[1] = rule or lines[1]
    return "\n".join(lines)


def flags_table(add_arguments: Callable[[ArgumentParser], Any]) -> str:
    """Return a Markdown table of the flags that a function adds to a parser, with their defaults and help texts."""
    parser = ArgumentParser(add_help=False)
    add_arguments(parser)
    rows = []
    for action in parser._actions:
        takes = action.metavar or "|".join(action.choices or ())
        takes = takes if isinstance(takes, str) else " ".join(takes)
        flag = f"{action.option_strings[0]} {takes}".rstrip().replace("|", r"\|")  # a bar would end the cell
        default = "off" if action.nargs == 0 or action.default is None else str(action.default)
        text, _, note = (action.help or "").partition(" (default: ")
        rows.append((f"`{flag}`", default if note in ("", "%(default)s)") else note[:-1], text))
    return markdown_table(("flag", "default", ""), rows, "|---|---|---|")


def refusals_table(tables: Mapping[str, Refusals]) -> str:
    """Return a Markdown table of every refused flag, which flag of ours refuses it, and why.

    Args:
        tables: by the flag of ours, as it stands in the documentation.
    """
    rows = [(f"`{flag}`", ours, why) for ours, table in tables.items() for flag, (_, why) in table.items()]
    return markdown_table(("refused", "with", "why"), rows, "|---|---|---|")
