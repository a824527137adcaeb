"""The tables of flags in the page about FlexSP equal those of the code."""

import re
from pathlib import Path

from megatron.longseq.command_line import flags_table, refusals_table
from megatron.longseq.flexsp import arguments as flags

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "flexsp.md").read_text()


def between(name: str) -> str:
    """Return what stands between a pair of the page's markers."""
    (text,) = re.findall(rf"<!-- {name}: begin -->\n(.*?)\n<!-- {name}: end -->", PAGE, re.DOTALL)
    return text


def test_the_flags_are_those_of_the_parser() -> None:
    assert between("flags") == flags_table(flags.add_flexsp_arguments)


def test_the_refusals_are_those_of_the_code() -> None:
    assert between("refusals") == refusals_table(flags.REFUSALS)
