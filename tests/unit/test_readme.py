"""The table of patches equals the ledger, and links and files of the pages exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_table_of_patches_is_the_ledgers() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "patches", "list", "--markdown"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    page = (ROOT / "docs" / "patches.md").read_text()
    table = page.split("<!-- patches: begin -->\n")[1].split("<!-- patches: end -->")[0]
    assert table == listed.stdout, "update it: python -m patches list --markdown"


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
