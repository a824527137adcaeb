"""The pages have one order, their tables equal the code, and their links and files exist."""

import re
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from types import ModuleType

import pytest

from megatron.longseq.attention import arguments as attention
from megatron.longseq.checkpoints import arguments as checkpoints
from megatron.longseq.command_line import flags_table, refusals_table
from megatron.longseq.cross_entropy import arguments as cross_entropy
from megatron.longseq.flexsp import arguments as flexsp
from megatron.longseq.guards import arguments as guards
from megatron.longseq.pipeline import arguments as pipeline
from megatron.longseq.sharding import arguments as sharding
from tests.regression.mutants import MUTANTS
from tests.unit.pages import DOCS, between, cells

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {
    "usp.md": attention,
    "seq1f1b.md": pipeline,
    "paro.md": sharding,
    "flexsp.md": flexsp,
    "cross-entropy.md": cross_entropy,
    "guards.md": guards,
    "checkpoints.md": checkpoints,
}
ORDER = (
    *("What it does and when to use it", "A first command", "Flags", "How it works"),
    *("Limits", "Proof", "Measurements"),
)


@pytest.mark.parametrize(("page", "module"), PAGES.items(), ids=PAGES)
def test_flags_and_refusals_are_those_of_the_code(page: str, module: ModuleType) -> None:
    (add_arguments,) = (value for name, value in vars(module).items() if re.fullmatch(r"add_\w+_arguments", name))
    assert between(page, "flags") == flags_table(add_arguments)
    parser = ArgumentParser(add_help=False)
    add_arguments(parser)
    listed = [re.match(r"`(--[\w-]+)", row[0])[1] for row in cells(between(page, "flags"))]
    assert listed == [name for action in parser._actions for name in action.option_strings]
    tables = [value for name, value in vars(module).items() if name.startswith("NOT_")]
    refusals = getattr(module, "REFUSALS", {})
    if module is not flexsp:  # which imports tables of others
        assert sorted(map(id, tables)) == sorted(map(id, refusals.values())), "REFUSALS lacks a table"
    if refusals:
        assert between(page, "refusals") == refusals_table(refusals)
        rows = [(row[0].strip("`"), row[2]) for row in cells(between(page, "refusals"))]
        assert rows == [(flag, why) for table in refusals.values() for flag, (_, why) in table.items()]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_pages_have_one_order_and_short_lines(page: Path) -> None:
    text = re.sub(r"<!-- (\w+): begin.*?<!-- \1: end -->|```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"(?m)^## (.*)", text)
    known = [heading for heading in headings if heading in ORDER]
    assert known == sorted(known, key=ORDER.index)
    assert page.name == "architecture.md" or {ORDER[0], ORDER[1], "Proof"} <= {*known}
    is_free = re.compile(r"\||!|    ")  # tables, pictures and output
    assert [line for line in text.splitlines() if len(line) > 120 and not is_free.match(line)] == []


def test_table_of_patches_is_the_ledgers() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "patches", "list", "--markdown"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    page = (ROOT / "docs" / "patches.md").read_text()
    table = page.split("<!-- patches: begin -->\n")[1].split("<!-- patches: end -->")[0]
    assert table == listed.stdout, "update it: python -m patches list --markdown"


def test_every_planted_error_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)`: ", (DOCS / "regression.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(MUTANTS)


def test_every_link_and_every_named_file_exists() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    missing = []
    for page in pages:
        text = page.read_text()
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
        missing += [f"{page.name}: {link}" for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`((?:examples|megatron|patches|tests|scripts|docs)/[\w./-]+\.\w+)`", README)
    missing += [f"README.md: {name}" for name in named if not (ROOT / name).exists()]
    assert named and not missing


def test_the_readme_fits_on_two_screens() -> None:
    assert len(README.splitlines()) <= 100
