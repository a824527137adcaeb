"""The generated parts of the documentation's page: the flags, and what they refuse."""

from argparse import ArgumentParser

from megatron.longseq.pipeline.arguments import (
    NOT_IN_SCHEDULES,
    NOT_IN_SEGMENTS,
    NOT_WITH_ZERO_BUBBLE,
    add_pipeline_arguments,
)

REFUSALS = {
    "`--seq1f1b-splits` above 1": NOT_IN_SEGMENTS,
    "`--zero-bubble`": NOT_WITH_ZERO_BUBBLE,
    "any of our schedules": NOT_IN_SCHEDULES,
}


def flags() -> str:
    """Return a markdown table of the flags, their defaults and their help."""
    parser = ArgumentParser(add_help=False)
    add_pipeline_arguments(parser)
    lines = ["| flag | default | |", "|---|---|---|"]
    for action in parser._actions:
        takes = f" {action.metavar}".replace("|", r"\|") if action.metavar else ""  # a bar would end the cell
        default = "off" if action.default is None or action.default is False else str(action.default)
        lines.append(f"| `{action.option_strings[0]}{takes}` | {default} | {action.help} |")
    return "\n".join(lines)


def refusals() -> str:
    """Return a markdown table of every flag that is refused, beside which of ours, and why."""
    lines = ["| refused | with | why |", "|---|---|---|"]
    lines += [f"| `{flag}` | {ours} | {why} |" for ours, table in REFUSALS.items() for flag, (_, why) in table.items()]
    return "\n".join(lines)
