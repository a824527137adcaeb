"""The tables of the page about USP equal those of the code."""

import re
from argparse import ArgumentParser
from pathlib import Path

import pytest

from megatron.longseq.attention import arguments as flags
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.tools import tables as page
from megatron.longseq.attention.tools.cli import main
from megatron.longseq.command_line import flags_table, refusals_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "usp.md").read_text()
COMMAND = "update it: python -m megatron.longseq.attention"
LLAMA3 = "--context-parallel-size 16 --num-attention-heads 32 --num-query-groups 8 --seq-length 65536"
FEW = "--context-parallel-size 8 --num-attention-heads 32 --num-query-groups 4 --seq-length 65536"


def between(name: str) -> str:
    """Return the text between a pair of the page's markers."""
    (text,) = re.findall(rf"<!-- {name}: begin -->\n(.*?)\n<!-- {name}: end -->", PAGE, re.DOTALL)
    return text


def cells(table: str) -> list[list[str]]:
    return [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in table.splitlines()[2:]]


def test_the_flags_are_those_of_the_parser() -> None:
    assert between("flags") == flags_table(flags.add_context_arguments), f"{COMMAND} flags"
    parser = ArgumentParser(add_help=False)
    flags.add_context_arguments(parser)
    listed = [re.match(r"`(--[\w-]+)", row[0])[1] for row in cells(between("flags"))]
    assert listed == [name for action in parser._actions for name in action.option_strings]


def test_the_refusals_are_those_of_the_code() -> None:
    assert between("refusals") == refusals_table(flags.REFUSALS), f"{COMMAND} flags"
    rows = [(row[0].strip("`"), row[2]) for row in cells(between("refusals"))]
    assert rows == [(flag, why) for table in flags.REFUSALS.values() for flag, (_, why) in table.items()]


def test_every_refusals_table_is_in_the_page() -> None:
    """A new table in arguments.py must be added to the page."""
    tables = [value for name, value in vars(flags).items() if name.startswith("NOT_")]
    assert tables == list(flags.REFUSALS.values())


@pytest.mark.parametrize(("name", "command"), [("meshes", LLAMA3), ("few", FEW)])
def test_the_bytes_are_the_formulas(name: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["meshes", *command.split()]) == 0
    assert between(name) == capsys.readouterr().out.strip(), f"{COMMAND} meshes {command}"


def test_what_is_sent_is_less_than_the_others_send() -> None:
    """At 32, 4, 8 at most 0.75 of a ring's bytes are sent, and 0.65 of an all-to-all with repeated key heads."""
    sent = {row[0]: (float(row[4]), float(row[5])) for row in cells(page.meshes(8, Heads(32, 4), 65536))}
    assert list(sent) == ["1 x 8", "2 x 4", "4 x 2", "8 x 1"]
    assert all(ours < others for ours, others in sent.values())
    assert sent["1 x 8"][0] <= 0.75 * sent["1 x 8"][1] and sent["8 x 1"][0] <= 0.65 * sent["8 x 1"][1]


def test_impossible_heads_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    heads = ["--num-attention-heads", "7", "--num-query-groups", "2"]
    assert main(["meshes", "--context-parallel-size", "4", *heads, "--seq-length", "64"]) == 1
    assert "7 query heads are not a multiple of 2 key-value heads" in capsys.readouterr().err
