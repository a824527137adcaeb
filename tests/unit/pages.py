"""Read tables out of the documentation's pages."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def between(page: str, name: str) -> str:
    """Return the text between a pair of a page's markers, such as `<!-- flags: begin -->`."""
    text = (DOCS / page).read_text()
    (table,) = re.findall(rf"<!-- {name}: begin[^>]*-->\n(.*?)\n<!-- {name}: end -->", text, re.DOTALL)
    return table


def cells(table: str) -> list[list[str]]:
    """Return the cells of the rows of a Markdown table, without its head."""
    return [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in table.splitlines()[2:]]
