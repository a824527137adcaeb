"""The picture shows the layout and each score once, the table contains the formulas, and bad input is refused."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron.longseq.attention.plan.comm_volume import LayerShape, all_to_all, peer_all_to_all, peer_ring, ring
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.tools.cli import main
from megatron.longseq.attention.tools.figure import scene

ROOT = Path(__file__).resolve().parents[2]
MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4), (4, 2), (1, 8), (3, 2)]


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of a markdown table by the first cell of each row."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {cells[0]: cells[1:] for cells in split}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_picture_shows_each_score_once_and_ranks_with_the_same_work(mesh: tuple[int, int]) -> None:
    shown, (ulysses, size) = scene(Mesh(*mesh)), mesh
    chunks = 2 * ulysses * size
    assert shown.before == tuple((rank, chunks - 1 - rank) for rank in range(chunks // 2))
    for rank, rank_chunks in enumerate(shown.after):
        group = range(rank // ulysses * ulysses, (rank // ulysses + 1) * ulysses)
        assert sorted(rank_chunks) == sorted(chunk for one in group for chunk in shown.before[one]) == list(rank_chunks)
    cells = [cell for step, _ in shown.steps for cell in step]
    assert sorted((cell.query, cell.key) for cell in cells) == [(q, k) for q in range(chunks) for k in range(q + 1)]
    assert all(cell.query in shown.after[cell.ring * ulysses] for cell in cells)
    for step, _ in shown.steps:
        assert len({sum(cell.ring == index for cell in step) for index in range(size)}) == 1
    parts = [one.part for _, sendings in shown.steps for one in sendings]
    assert sum(parts) == 0.75 * size * (size - 1)


def drawn(file: Path) -> set[str]:
    return {str(part.get("id")) for part in ElementTree.parse(file).iter() if part.get("id")}


def test_draw_writes_every_chunk_and_block_the_same_each_time(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for file in (first, second):
        assert main(["draw", "--output", str(file)]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.svg", "b.svg"]
    shown, names = scene(Mesh(2, 4)), drawn(first)
    wanted = {f"before-{rank}-{chunk}" for rank, rank_chunks in enumerate(shown.before) for chunk in rank_chunks}
    wanted |= {f"after-{rank}-{chunk}" for rank, rank_chunks in enumerate(shown.after) for chunk in rank_chunks}
    for index, (cells, _) in enumerate(shown.steps):
        wanted |= {f"step-{index}-{cell.ring}-{cell.query}-{cell.key}" for cell in cells}
    assert wanted == {name for name in names if name.split("-")[0] in ("before", "after", "step")}
    words = first.read_text()
    assert "keys sent: 0→3 half, 1→0 all, 2→1 all, 3→2 all" in words and "nothing is sent" in words


def test_the_documentations_picture_is_the_codes(tmp_path: Path) -> None:
    file = tmp_path / "a.svg"
    assert main(["draw", "--output", str(file)]) == 0
    kept = ROOT / "docs" / "pictures" / "usp.svg"
    assert drawn(kept) == drawn(file), "draw it again: python -m megatron.longseq.attention draw --output " + str(kept)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "a.pdf"], "the suffix must be .svg or .png, but it is .pdf"),
        (["--output", "missing/a.svg"], "there is no folder"),
        (
            ["--output", "a.svg", "--hierarchical-context-parallel-sizes", "1", "9"],
            "a ring of 9 ranks: a figure can show 8",
        ),
        (["--output", "a.svg", "--hierarchical-context-parallel-sizes", "0", "2"], "mesh of 0 x 2"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["draw", *flags]) == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("groups", "repeated"), [(4, 0.625), (32, 1.0)])
def test_the_table_is_the_formulas(groups: int, repeated: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "--num-query-groups", str(groups)]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["1 x 8", "2 x 4", "4 x 2", "8 x 1"]
    for name, cells in table.items():
        setup = LayerShape(Layout(Mesh(*map(int, name.split(" x "))), (32768,)), Heads(32, groups))
        volumes = (all_to_all(setup), peer_all_to_all(setup, repeated=True), ring(setup), peer_ring(setup))
        for volume, cell in zip(volumes, (cells[0], cells[1], cells[3], cells[4]), strict=True):
            messages = volume.forward_messages + volume.backward_messages
            mib = f"{volume.forward_bytes >> 20} + {volume.backward_bytes >> 20} MiB"
            assert cell == (f"{mib}, {messages} messages" if messages else "nothing")
    assert float(table["8 x 1"][2]) == repeated
    assert [table[name][5] for name in list(table)[:3]] == ["0.750"] * 3
    assert [table[name][6] for name in list(table)[:3]] == ["0.700", "0.643", "0.500"]
    assert table["1 x 8"][7] == f"0 + {4 * 32768 * groups * 128 * 2 * 8 >> 20}"


def test_the_tables_defaults_are_those_of_the_issue(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--context-parallel-size 8 --num-attention-heads 32 --num-query-groups 4 --seq-length 32768 --kv-channels 128"
    )
    outputs = []
    for given in ([], flags.split()):
        assert main(["table", *given]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_length_that_does_not_divide_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "--seq-length", "1000"]) == 1
    assert "give a multiple of 16" in capsys.readouterr().err


def test_tables_import_neither_torch_nor_upstream() -> None:
    code = (
        "import sys; from megatron.longseq.attention.tools.cli import main; failed = main(['table']); "
        "heavy = ('torch', 'megatron.core', 'megatron.training', 'matplotlib'); "
        "sys.exit(failed or any(name in sys.modules for name in heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0
