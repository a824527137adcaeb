"""The picture shows complete shards and links that do one thing at a time, and equals the documentation's."""

import itertools
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron.longseq.sharding.plan.collectives import CollectivesMode, Scope
from megatron.longseq.sharding.plan.comm_volume import comm_volume
from megatron.longseq.sharding.plan.memory import memory
from megatron.longseq.sharding.plan.strategy import RUNNING, Level
from megatron.longseq.sharding.plan.time_model import ring_seconds
from megatron.longseq.sharding.tools.cli import main
from megatron.longseq.sharding.tools.figure import BUCKETS, LINKS, NODES, STATES, scene
from megatron.longseq.sharding.tools.tables import SEVEN_B

ROOT = Path(__file__).resolve().parents[2]


def test_the_picture_shows_parts_that_make_whole_states() -> None:
    shown = scene()
    for holding in shown.holdings:
        levels = (holding.strategy.params, holding.strategy.grads, holding.strategy.optimizer)
        for level, ranks in zip(levels, holding.states, strict=True):
            width = {Level.NONE: 4, Level.GROUP: 2, Level.GLOBAL: 1}[level]
            assert {len(shard) for shard in ranks} == {width}
            together = ranks if level is Level.GLOBAL else ranks[: 4 // width]  # a group, or a rank, has all
            assert sorted(number for shard in together for number in shard) == [0, 1, 2, 3]


def test_links_do_one_thing_at_a_time_and_the_ends_are_the_clocks() -> None:
    shown = scene()
    assert [timeline.mode for timeline in shown.timelines] == list(CollectivesMode)
    for timeline in shown.timelines:
        for scope in Scope:
            spans = sorted((span.begin, span.end) for span in timeline.spans if span.run.collective.scope is scope)
            assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))
        shards = [size / NODES.ranks for size in BUCKETS]
        assert timeline.end == ring_seconds(shown.kind, timeline.mode, NODES, LINKS, shards)
    flat, serial, overlapped = (timeline.end for timeline in shown.timelines)
    assert overlapped < 0.7 * flat < 0.7 * serial


def test_costs_are_the_formulas() -> None:
    costs = scene().costs
    assert {cost.strategy for cost in costs} == set(RUNNING)
    for cost in costs:
        arguments = (cost.strategy, SEVEN_B.groups, SEVEN_B.model, SEVEN_B.widths)
        assert cost.held == memory(*arguments) and cost.sent == comm_volume(*arguments).step(8)
    assert [one.sent.between for one in costs] == sorted(one.sent.between for one in costs)


def drawn(file: Path) -> tuple[set[str], list[str]]:
    """Return the names of a picture's parts, and its words and numbers."""
    parts = list(ElementTree.parse(file).iter())
    names = {str(part.get("id")) for part in parts if part.get("id")}
    return names, [part.text or "" for part in parts if part.tag.endswith("}text")]


def test_draw_writes_every_part_the_same_each_time(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for file in (first, second):
        assert main(["draw", "--output", str(file)]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.svg", "b.svg"]
    shown, (names, words) = scene(), drawn(first)
    states = [state.split()[0] for state in STATES]
    wanted = {
        f"held-{holding.strategy}-{state}-{rank}-{shard.start}-{shard.stop}"
        for holding in shown.holdings
        for state, ranks in zip(states, holding.states, strict=True)
        for rank, shard in enumerate(ranks)
    }
    for timeline in shown.timelines:
        runs = [span.run for span in timeline.spans]
        wanted |= {f"time-{timeline.mode}-{run.bucket}-{run.turn}-{run.collective.scope}" for run in runs}
        assert f"{timeline.mode}: {timeline.end * 1e3:.2f} ms" in words
    for cost in shown.costs:
        wanted |= {f"cost-{cost.strategy}-{what}" for what in (*states, "inside", "between")}
        assert f"{cost.held.total / 1e9:.3g}" in words and f"{cost.sent.between / 1e9:.3g}" in words
    assert wanted == {name for name in names if name.split("-")[0] in ("held", "time", "cost")}

    kept = ROOT / "docs" / "pictures" / "paro.svg"
    assert drawn(kept) == (names, words), f"draw it again: python -m megatron.longseq.sharding draw --output {kept}"


@pytest.mark.parametrize(
    ("file", "words"),
    [("a.pdf", "the suffix must be .svg or .png, but it is .pdf"), ("missing/a.svg", "there is no folder")],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(
    file: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["draw", "--output", file]) == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
