"""Pictures, traces and measured files contain the whole timeline, and errors name the file."""

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron.longseq.pipeline.plan.generators import make
from megatron.longseq.pipeline.plan.schedule import Action, ActionKind, Pipeline, ScheduleError
from megatron.longseq.pipeline.plan.simulate import ActionTime, Timeline, simulate, uniform_costs
from megatron.longseq.pipeline.runtime.step_timer import write_measured
from megatron.longseq.pipeline.tools.chrome_trace import read_measured, write_trace
from megatron.longseq.pipeline.tools.compare import replay
from megatron.longseq.pipeline.tools.figure import COLOURS, draw


def timeline(stages=2, microbatches=4, segments=2, virtual=1, **flags) -> Timeline:
    pipeline = Pipeline(stages, microbatches, segments, virtual)
    return simulate(make(pipeline, **flags), uniform_costs(pipeline, 1.0, 1.25, 0.75), latency=0.125)


CASES = [
    timeline(),
    timeline(segments=1),
    timeline(stages=4, slack=1),
    timeline(microbatches=4, virtual=2),
    timeline(zero_bubble=True),
]


def bars(file: Path) -> dict[str, tuple[float, float, float, float]]:
    """Return the box of each bar of an SVG: left, right, upper, lower."""
    boxes = {}
    for group in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}g"):
        name = group.get("id", "")
        if name.startswith("bar-"):
            assert name not in boxes
            path = group.find("{http://www.w3.org/2000/svg}path").get("d")
            points = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path)]
            xs, ys = [x for x, _ in points], [y for _, y in points]
            boxes[name] = min(xs), max(xs), min(ys), max(ys)
    return boxes


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.pipeline.virtual}")
def test_a_drawing_holds_one_bar_per_action_where_and_as_long_as_it_ran(case, tmp_path):
    draw([case], tmp_path / "a.svg")
    boxes = bars(tmp_path / "a.svg")
    assert len(boxes) == sum(map(len, case.spans))
    places = []
    for rank, spans in enumerate(case.spans):
        for span in spans:
            action = span.action
            name = f"bar-{rank}-{action.kind}-{action.microbatch}-{action.segment}-{action.vstage}"
            places.append((span, rank, boxes[name]))
    left = min(box[0] for _, _, box in places)
    scale = (max(box[1] for _, _, box in places) - left) / case.makespan
    for span, _, box in places:
        assert box[0] - left == pytest.approx(span.start * scale, abs=0.02)
        assert box[1] - box[0] == pytest.approx((span.end - span.start) * scale, abs=0.02)
    rows = [{box[2:] for _, rank, box in places if rank == r} for r in range(case.pipeline.stages)]
    assert all(len(row) == 1 for row in rows)  # one row per rank, rank 0 the uppermost
    tops = [min(row) for row in rows]
    assert tops == sorted(set(tops))


def test_panels_share_their_time_axis_and_say_bubble_and_makespan(tmp_path):
    short, long = timeline(stages=2), timeline(stages=4)
    draw([short, long], tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for case in (short, long):
        assert f"bubble {case.bubble:.1%}" in text and f"step {case.makespan:.2f} s" in text
        assert case.name in text
    for kind, word in (("F", "forward"), ("B", "backward")):
        assert COLOURS[ActionKind(kind)].lower() in text and word in text
    assert "weight gradient" not in text
    draw([timeline(zero_bubble=True)], tmp_path / "b.svg")
    assert "weight gradient" in (tmp_path / "b.svg").read_text()


def test_a_drawing_is_the_same_bytes_every_time_and_png_is_one(tmp_path):
    for name in ("a.svg", "b.svg", "c.png"):
        draw([CASES[3]], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"suffix must be \.svg or \.png, but it is \.pdf"):
        draw(CASES, tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="no action to draw"):
        draw([Timeline("nothing", Pipeline(1, 1), ((),))], tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


def test_a_trace_holds_every_action_and_an_arrow_per_message(tmp_path):
    write_trace(CASES, tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    for pid, case in enumerate(CASES):
        own = [event for event in events if event["pid"] == pid]
        names = {event["tid"]: event["args"]["name"] for event in own if event["name"] == "thread_name"}
        assert names == {rank: f"rank {rank}" for rank in range(case.pipeline.stages)}
        timed = [event["ts"] for event in own if event["ph"] != "M"]
        assert timed == sorted(timed) and timed[0] == 0
        seen = {}
        for event in own:
            if event["ph"] == "X":
                sizes = event["args"]
                action = Action(
                    ActionKind[event["cat"].upper()], sizes["microbatch"], sizes["segment"], sizes["vstage"]
                )
                seen[event["tid"], action] = (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        assert len(seen) == sum(map(len, case.spans))
        for rank, spans in enumerate(case.spans):
            for span in spans:
                assert seen[rank, span.action] == pytest.approx((span.start, span.end))
        pipeline = case.pipeline
        starts = {event["id"]: event for event in own if event["ph"] == "s"}
        ends = {event["id"]: event for event in own if event["ph"] == "f"}
        assert starts.keys() == ends.keys()
        assert len(starts) == 2 * pipeline.units * (pipeline.depth - 1)
        for name, event in starts.items():
            assert event["ts"] < ends[name]["ts"]
            assert abs(event["tid"] - ends[name]["tid"]) in (1, pipeline.stages - 1)


def write(folder: Path, case: Timeline, shift: float = 0.0) -> None:
    for rank, spans in enumerate(case.spans):
        late = [ActionTime(span.action, span.start + shift, span.end + shift) for span in spans]
        write_measured(folder, rank, case.pipeline, "measured", late)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.pipeline.virtual}")
def test_measured_files_come_back_as_they_were_from_the_earliest_start_on(case, tmp_path):
    write(tmp_path / "made", case, shift=1024.0)  # a power of two: the sums are exact
    assert read_measured(tmp_path / "made") == replace(case, name="measured")
    assert sorted(f.name for f in (tmp_path / "made").iterdir()) == [
        f"rank-{rank:04d}.json" for rank in range(case.pipeline.stages)
    ]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write(tmp_path, CASES[0])
    before = (tmp_path / "rank-0000.json").read_text()
    broken = ActionTime(Action(ActionKind.FORWARD, 0), object(), 1.0)
    with pytest.raises(TypeError):
        write_measured(tmp_path, 0, CASES[0].pipeline, "measured", [broken])
    assert (tmp_path / "rank-0000.json").read_text() == before


def edit(file: Path, **change) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def spoil_sizes(folder):
    edit(folder / "rank-0001.json", pipeline={"stages": 2, "microbatches": 5, "segments": 2, "virtual": 1})


def spoil_span(file: Path, row: int, column: int, value) -> None:
    spans = json.loads(file.read_text())["spans"]
    spans[row][column] = value
    edit(file, spans=spans)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: [file.unlink() for file in f.iterdir()], "there is no rank-0000.json"),
        (lambda f: (f / "rank-0000.json").unlink(), r"files of ranks \[1\], but the pipeline has 2 stages"),
        (lambda f: (f / "rank-0001.json").unlink(), r"files of ranks \[0\], but the pipeline has 2 stages"),
        (lambda f: write_measured(f, 2, CASES[0].pipeline, "measured", []), r"files of ranks \[0, 1, 2\]"),
        (spoil_sizes, r"rank-0001.json: it records .* but rank-0000.json records .* several runs"),
        (lambda f: edit(f / "rank-0001.json", name="other"), "several runs"),
        (lambda f: edit(f / "rank-0001.json", rank=0), "it holds rank 0, whose file is rank-0000.json"),
        (lambda f: (f / "rank-0001.json").write_text("{"), "rank-0001.json: this is not a timeline"),
        (lambda f: (f / "rank-0001.json").write_text("[]"), "this is not a timeline"),
        (lambda f: spoil_span(f / "rank-0000.json", 0, 0, "X"), "'X' is not a valid ActionKind"),
        (lambda f: spoil_span(f / "rank-0000.json", 0, 1, 9), "forward of micro-batch 9, segment 0 does not belong to"),
        (lambda f: spoil_span(f / "rank-0000.json", 1, 2, 0), "forward of micro-batch 0, segment 0 occurs twice"),
        (lambda f: spoil_span(f / "rank-0000.json", 0, 5, -1), "ended at -1.0 s, before it began"),
        (lambda f: spoil_span(f / "rank-0000.json", 0, 5, float("nan")), "ended at nan s"),
        (lambda f: spoil_span(f / "rank-0000.json", 1, 4, -1), "began before the forward .* that precedes it"),
    ],
)
def test_spoilt_measurements_are_refused(spoil, message, tmp_path):
    write(tmp_path, CASES[0])
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_measured(tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.pipeline.virtual}")
def test_the_replay_of_a_simulated_step_is_that_step(case):
    pipeline = case.pipeline
    exact = simulate(make_again(case), uniform_costs(pipeline, 1.0, 1.25, 0.75))
    assert replay(exact).spans == exact.spans


def make_again(case):
    flags = {"zero_bubble": any(span.action.kind is ActionKind.WEIGHT for spans in case.spans for span in spans)}
    return make(case.pipeline, slack=int("slack" in case.name), **flags)


def test_a_replay_takes_medians_and_refuses_what_is_no_schedule():
    case = CASES[0]
    late = [list(spans) for spans in case.spans]
    last = late[0][-1]
    late[0][-1] = replace(last, end=last.end + 100)  # one stray action moves no median
    late = replace(case, spans=tuple(map(tuple, late)))
    assert late.makespan > 100 and replay(late).makespan == replay(case).makespan
    with pytest.raises(ScheduleError, match="deadlocks"):
        replay(replace(case, spans=(case.spans[0], tuple(reversed(case.spans[1])))))
