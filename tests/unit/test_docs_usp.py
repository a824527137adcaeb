"""The tables of bytes in the page about USP equal those of the code."""

import pytest

from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.tools import tables as page
from megatron.longseq.attention.tools.cli import main
from tests.unit.pages import between, cells

COMMAND = "update it: python -m megatron.longseq.attention"
LLAMA3 = "--context-parallel-size 16 --num-attention-heads 32 --num-query-groups 8 --seq-length 65536"
FEW = "--context-parallel-size 8 --num-attention-heads 32 --num-query-groups 4 --seq-length 65536"


@pytest.mark.parametrize(("name", "command"), [("meshes", LLAMA3), ("few", FEW)])
def test_the_bytes_are_the_formulas(name: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["meshes", *command.split()]) == 0
    assert between("usp.md", name) == capsys.readouterr().out.strip(), f"{COMMAND} meshes {command}"


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
