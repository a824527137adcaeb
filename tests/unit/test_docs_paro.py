"""The tables of the page about PaRO equal those of the code."""

import re
from argparse import ArgumentParser
from pathlib import Path

import pytest

from megatron.longseq.command_line import flags_table, refusals_table
from megatron.longseq.sharding import arguments as flags
from megatron.longseq.sharding.plan.strategy import ALL, RUNNING
from megatron.longseq.sharding.tools import tables as page
from megatron.longseq.sharding.tools.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "paro.md").read_text()
COMMAND = "update it: python -m megatron.longseq.sharding"


def between(name: str) -> str:
    """Return the text between a pair of the page's markers."""
    (text,) = re.findall(rf"<!-- {name}: begin -->\n(.*?)\n<!-- {name}: end -->", PAGE, re.DOTALL)
    return text


def cells(table: str) -> list[list[str]]:
    return [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in table.splitlines()[2:]]


def test_the_flags_are_those_of_the_parser() -> None:
    assert between("flags") == flags_table(flags.add_sharding_arguments), f"{COMMAND} flags"
    parser = ArgumentParser(add_help=False)
    flags.add_sharding_arguments(parser)
    listed = [re.match(r"`(--[\w-]+)[ `]", row[0])[1] for row in cells(between("flags"))]
    assert listed == [name for action in parser._actions for name in action.option_strings]


def test_the_refusals_are_those_of_the_code() -> None:
    assert between("refusals") == refusals_table(flags.REFUSALS), f"{COMMAND} flags"
    rows = [(row[0].strip("`"), row[2]) for row in cells(between("refusals"))]
    assert rows == [(flag, why) for table in flags.REFUSALS.values() for flag, (_, why) in table.items()]


def test_every_refusals_table_is_in_the_page() -> None:
    """A new table in arguments.py must be added to the page."""
    tables = [value for name, value in vars(flags).items() if name.startswith("NOT_")]
    assert sorted(map(id, tables)) == sorted(map(id, flags.REFUSALS.values()))


def test_the_flags_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flags"]) == 0
    tables = flags_table(flags.add_sharding_arguments), refusals_table(flags.REFUSALS)
    assert capsys.readouterr().out == "\n\n".join(tables) + "\n"


def test_the_guideline_and_its_figures_are_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table"]) == 0
    printed = capsys.readouterr().out
    for name in ("setting", "strategies", "guideline", "triplets", "instead"):
        assert between(name) in printed, f"{COMMAND} table"
    head, *rows = between("guideline").splitlines()
    assert head == page.guideline().splitlines()[0] and "\n".join([head, *rows]) == page.guideline()


def test_every_triplet_is_in_the_page_once() -> None:
    valid = [row[0] for row in cells(between("strategies"))]
    refused = [row[0] for row in cells(between("triplets"))]
    assert sorted([name.strip("*") for name in valid] + refused) == sorted(map(str, ALL))
    assert {name.strip("*") for name in valid if "*" not in name} == {row[0] for row in cells(between("instead"))}
    assert {name.strip("*") for name in valid if "*" in name} == set(map(str, RUNNING))
