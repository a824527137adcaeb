"""The tables of the page about Seq1F1B equal those of the code."""

import re
from argparse import ArgumentParser
from pathlib import Path

import pytest

from megatron.longseq.command_line import flags_table, refusals_table
from megatron.longseq.pipeline import arguments as flags
from megatron.longseq.pipeline.tools import paper

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "seq1f1b.md").read_text()
COMMAND = "update it: python -m megatron.longseq.pipeline flags"
REFUSALS = {**flags.NOT_IN_SEGMENTS, **flags.NOT_WITH_ZERO_BUBBLE, **flags.NOT_IN_SCHEDULES}


def between(name: str) -> str:
    """Return the text between a pair of the page's markers."""
    (text,) = re.findall(rf"<!-- {name}: begin[^>]*-->\n(.*?)\n<!-- {name}: end -->", PAGE, re.DOTALL)
    return text


def cells(table: str) -> list[list[str]]:
    return [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in table.splitlines()[2:]]


@pytest.mark.slow
def test_the_simulated_tables_are_the_simulators() -> None:
    assert between("table") == paper.markdown(), "update them: python -m megatron.longseq.pipeline table"


def test_the_flags_are_those_of_the_parser() -> None:
    assert between("flags") == flags_table(flags.add_pipeline_arguments), COMMAND
    parser = ArgumentParser(add_help=False)
    flags.add_pipeline_arguments(parser)
    listed = [re.match(r"`(--[\w-]+)", row[0])[1] for row in cells(between("flags"))]
    assert listed == [name for action in parser._actions for name in action.option_strings]


def test_the_refusals_are_those_of_the_code() -> None:
    assert between("refusals") == refusals_table(flags.REFUSALS), COMMAND
    rows = cells(between("refusals"))
    tables = (flags.NOT_IN_SEGMENTS, flags.NOT_WITH_ZERO_BUBBLE, flags.NOT_IN_SCHEDULES)
    assert [row[0].strip("`") for row in rows] == [flag for table in tables for flag in table]
    assert all(len(row) == 3 and row[2] == REFUSALS[row[0].strip("`")][1] for row in rows)


def test_every_refusals_table_is_in_the_page() -> None:
    """A new table in arguments.py must be added to the page."""
    tables = [value for name, value in vars(flags).items() if name.startswith("NOT_")]
    assert sorted(map(id, tables)) == sorted(map(id, flags.REFUSALS.values()))
