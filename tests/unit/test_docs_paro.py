"""The tables of the page about PaRO equal those of the code."""

from functools import partial

import pytest

from megatron.longseq.command_line import flags_table, refusals_table
from megatron.longseq.sharding import arguments as flags
from megatron.longseq.sharding.plan.strategy import ALL, RUNNING
from megatron.longseq.sharding.tools import tables as page
from megatron.longseq.sharding.tools.cli import main
from tests.unit import pages
from tests.unit.pages import cells

COMMAND = "update it: python -m megatron.longseq.sharding"
between = partial(pages.between, "paro.md")


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
