"""The benchmark of the chunked cross entropy: its count reaches the goal, and the page's table is its output."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.logits import TOKENS, count, header, peaks, row, setups
from tests.pool import RankPool

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cross-entropy.md").read_text()


@pytest.mark.slow  # the mechanism is below
def test_bytes_at_32k_tokens_are_the_pages(ranks: RankPool) -> None:
    (table,) = re.findall(r"bytes: begin -->\n(.*?)\n<!-- bytes: end", PAGE, re.DOTALL)
    assert table.startswith(header(TOKENS))
    for one in setups(4096, 128256)[:3]:
        ((theirs, ours),) = peaks(ranks, one, 1024, [32768])
        assert ours <= 0.1 * theirs
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {one.name} |"))
        assert line.split(" | ")[1 + TOKENS.index(32768)] == row(one, [(theirs, ours)]).strip("| ").split(" | ")[1]


def test_bytes_grow_by_what_a_token_keeps(ranks: RankPool) -> None:
    """Upstream keeps bf16 logits and a float32 copy. Chunks keep the hidden states' gradient and 29 bytes per token."""
    small = replace(setups(512, 4096)[0], fused=True)
    ((near, far),) = ranks.run(1, count, small, [4096, 8192])
    assert 6 * 4096 <= (far - near) / 4096 <= 6 * 4096 + 2 * 512 + 100
    ((near, far),) = ranks.run(1, count, replace(small, chunk=256), [4096, 8192])
    assert 2 * 512 <= (far - near) / 4096 <= 2 * 512 + 100
