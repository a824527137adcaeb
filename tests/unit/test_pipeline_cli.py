"""The command line makes pictures and tables from flags, and refuses bad input without a partial file."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.longseq.pipeline.plan.generators import make
from megatron.longseq.pipeline.plan.schedule import ActionKind, Pipeline
from megatron.longseq.pipeline.plan.segment_cost import (
    Coefficients,
    CostModel,
    Line,
    ModelShape,
    fit,
    flops,
    read_samples,
    segment_costs,
)
from megatron.longseq.pipeline.plan.simulate import simulate, uniform_costs
from megatron.longseq.pipeline.runtime.step_timer import write_measured
from megatron.longseq.pipeline.tools import paper
from megatron.longseq.pipeline.tools.cli import main
from megatron.longseq.pipeline.tools.compare import PipelineSetup, ScheduleChoice, run

SHAPE = ["--num-layers", "32", "--hidden-size", "4096", "--num-attention-heads", "32", "--padded-vocab-size", "51200"]
SIZES = ["--stages", "4", "--microbatches", "8", "--segments", "4"]


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of a markdown table by the first cell of each row."""
    split = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {cells[0]: cells[1:] for cells in split}


def test_planning_imports_neither_torch_nor_upstream():
    code = (
        "import sys; from megatron.longseq.pipeline.tools.cli import main; failed = main(['compare']); "
        "heavy = ('torch', 'megatron.core', 'megatron.training', 'matplotlib'); "
        "sys.exit(failed or any(name in sys.modules for name in heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("suffix", [".svg", ".png", ".json"])
def test_draw_writes_what_the_suffix_says(suffix, tmp_path, capsys):
    file = tmp_path / f"a{suffix}"
    assert main(["draw", *SIZES, *SHAPE, "--output", str(file)]) == 0
    first = {".svg": b"<?xml", ".png": b"\x89PNG", ".json": b"{"}[suffix]
    assert file.read_bytes().startswith(first)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    table = rows(capsys.readouterr().out)
    assert table["Seq1F1B, K=4 balanced"][4] == "11392, 8384, 6912, 6080"


def test_draw_needs_no_model(tmp_path):
    """The default is one layer per model stage and no head, so any number of stages works."""
    flags = ["--stages", "3", "--virtual", "5", "--microbatches", "6", "--segments", "2"]
    assert main(["draw", *flags, "--output", str(tmp_path / "a.json")]) == 0


def test_compare_lists_the_usual_schedules_and_the_users(tmp_path, capsys):
    file = tmp_path / "a.json"
    flags = ["--virtual", "2", "--slack", "1", "--partition", "20480,4096,4096,4096", "--output", str(file)]
    assert main(["compare", *SIZES, *SHAPE, *flags]) == 0
    text = capsys.readouterr().out
    table = rows(text)
    expected = ["1F1B", "Seq1F1B, K=4 even", "Seq1F1B, K=4 paper", "Seq1F1B, K=4 balanced"]
    expected += ["Seq1F1B, K=4 balanced, slack 1", "Seq1F1B, K=4 balanced, zero-bubble", "1F1B-I V=2"]
    expected += ["Seq1F1B-I V=2, K=4 balanced", "Seq1F1B-I V=2, K=4 20480,4096,4096,4096, slack 1"]
    assert set(expected) <= table.keys()
    assert table["1F1B"][0] == "29.7%" and table["1F1B"][3] == "4.00" and table["1F1B"][2] == "1.000x"
    assert float(table["Seq1F1B, K=4 balanced"][0].rstrip("%")) < float(table["Seq1F1B, K=4 even"][0].rstrip("%")) / 2
    events = json.loads(file.read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == table.keys() - {"schedule", "---"}
    assert "Of every bubble, 5.1% is there because the slowest rank has more to compute" in text


def test_compare_draws_the_chosen_rows_in_that_order(tmp_path):
    file = tmp_path / "a.json"
    assert main(["compare", *SIZES, *SHAPE, "--rows", "6,1", "--output", str(file)]) == 0
    events = json.loads(file.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert [names[pid] for pid in sorted(names)] == ["Seq1F1B, K=4 balanced, zero-bubble", "1F1B"]


@pytest.mark.parametrize("rows", ["0", "8", "1,", "first"])
def test_rows_that_are_not_there_are_refused(rows, tmp_path, capsys):
    assert main(["compare", *SIZES, *SHAPE, "--rows", rows, "--output", str(tmp_path / "a.json")]) == 1
    assert "from 1 to 7" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_impossible_schedule_is_listed_with_its_reason(capsys):
    assert main(["compare", *SIZES, *SHAPE, "--virtual", "3"]) == 0
    text = capsys.readouterr().out
    assert "Not possible: 1F1B-I V=3: 32 layers cannot be divided evenly among 12 stages" in text
    assert "1F1B-I V=3" not in rows(text)


def test_a_measured_folder_is_drawn_above_its_simulation(tmp_path):
    pipeline = Pipeline(2, 4, 2)
    timeline = simulate(make(pipeline), uniform_costs(pipeline))
    for rank, spans in enumerate(timeline.spans):
        write_measured(tmp_path / "run", rank, pipeline, "Seq1F1B, measured", spans)
    file = tmp_path / "a.json"
    assert main(["draw", "--measured", str(tmp_path / "run"), "--output", str(file)]) == 0
    events = json.loads(file.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "Seq1F1B, measured", 1: "Seq1F1B, measured, simulated at the measured medians"}
    for pid in names:
        assert sum(e["ph"] == "X" and e["pid"] == pid for e in events) == 32


def test_measured_layer_seconds_take_the_place_of_flops(tmp_path, capsys):
    """If seconds grow with tokens only, balanced lengths are even."""
    file = tmp_path / "layer.json"
    file.write_text(json.dumps([[0, n, 1e-6 * n, 2e-6 * n] for n in (1024, 4096, 16384)]))
    flags = ["--layer-seconds", str(file), "--output", str(tmp_path / "a.json")]
    assert main(["draw", *SIZES, *SHAPE[:6], *flags]) == 0
    cells = rows(capsys.readouterr().out)["Seq1F1B, K=4 balanced"]
    assert cells[4] == "8192, 8192, 8192, 8192"
    assert float(cells[1]) == pytest.approx(8 * (8 + 3 / 4) * 3e-6 * 32768, rel=1e-3)


@pytest.mark.parametrize("zero_bubble", [False, True])
def test_fit_reads_a_layer_out_of_a_measured_step(zero_bubble, tmp_path, capsys):
    """The fit returns the planted seconds per layer, with W actions too. It leaves the stage with the head out."""
    lengths, layers = (1024, 512, 512, 2048), 3
    pipeline = Pipeline(2, 3, 4)
    model = CostModel(
        ModelShape(6, 64, 4, 4096, padded_vocab_size=5000),
        Coefficients(Line(2e-9, 1e-6), Line(5e-9, 2e-6), Line(0, 1e-6)),
        Coefficients(Line(0, 3e-6), Line(0, 6e-6), Line(0, 3e-6)),
    )
    costs = segment_costs(model, lengths, 2)
    step = simulate(make(pipeline, zero_bubble=zero_bubble, costs=costs), costs)
    for rank, spans in enumerate(step.spans):
        write_measured(tmp_path / "step", rank, pipeline, "a", spans)
    file = tmp_path / "layer.json"
    flags = ["--measured", str(tmp_path / "step"), "--layers-per-stage", str(layers), "--output", str(file)]
    assert main(["fit", *flags, "--lengths", "1024,512,512,2048"]) == 0
    samples = read_samples(file)
    assert [(s.begin, s.end) for s in samples] == [(0, 1024), (1024, 1536), (1536, 2048), (2048, 4096)]
    found = fit(samples)
    assert (found.forward.cell, found.forward.token) == pytest.approx((2e-9, 1e-6), rel=1e-6)
    assert (found.backward.cell, found.backward.token) == pytest.approx((5e-9, 2e-6), rel=1e-6)
    assert main(["fit", *flags, "--lengths", "1024,3072"]) == 1
    assert "2 lengths" in capsys.readouterr().err


def test_speed_sequence_parallelism_and_windows_count(tmp_path, capsys):
    def step(*flags):
        assert main(["draw", *SIZES, *SHAPE, *flags, "--output", str(tmp_path / "a.json")]) == 0
        return rows(capsys.readouterr().out)["Seq1F1B, K=4 balanced"]

    plain, fast = step(), step("--device-tflops", "300")
    assert float(fast[1]) == pytest.approx(float(plain[1]) / 2, rel=1e-3)
    assert float(step("--tensor-model-parallel-size", "4")[1]) == pytest.approx(float(plain[1]) / 4, rel=1e-3)
    parallel = step("--tensor-model-parallel-size", "3", "--sequence-parallel", "--seq-length", "30720")
    assert all(int(length) % 3 == 0 for length in parallel[4].split(","))
    windowed, mixed = step("--window-size", "1023,0"), step("--window-size", "1023,0", "--window-attn-skip-freq", "4")
    assert windowed[4] != plain[4] and float(windowed[1]) < float(mixed[1]) < float(plain[1])
    listed = step("--window-size", "1023,0", "--window-attn-skip-freq", str([1, 1, 1, 0] * 8))
    assert listed == mixed
    assert float(step("--latency", "0.01")[1]) > float(plain[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "a.pdf"], "--output a.pdf: the suffix must be .svg, .png or .json, but it is .pdf"),
        (["--output", "nowhere/a.svg"], "there is no folder"),
        (["--output", "a.svg", "--partition", "thirds"], "'thirds': give even, balanced"),
        (["--output", "a.svg", "--num-layers", "30"], "30 layers cannot be divided evenly among 4 stages"),
        (["--output", "a.svg", "--slack", "-1"], "slack must be at least 0 segments, not -1"),
        (["--output", "a.svg", "--stages", "0"], "stages"),
        (["--output", "a.svg", "--device-tflops", "0"], "devices: too few"),
        (["--output", "a.svg", "--window-size", "7"], "give two numbers LEFT,0"),
        (["--output", "a.svg", "--window-size", "7,1"], "does not attend to later tokens; give 7,0"),
        (["--output", "a.svg", "--window-size", "7,0", "--window-attn-skip-freq", "x"], "written out"),
        (["--output", "a.svg", "--window-size", "7,0", "--window-attn-skip-freq", "[1]"], "a window and 4 layers"),
        (["--output", "a.svg", "--layer-seconds", "nothing.json"], "nothing.json"),
        (["--output", "a.svg", "--layer-seconds", "bad.json"], "bad.json: not a JSON list"),
        (["--output", "a.svg", "--measured", "nowhere"], "there is no rank-0000.json"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_leaves_no_file(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("[[1, 2]]")
    assert main(["draw", *SIZES, *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert [file.name for file in tmp_path.iterdir()] == ["bad.json"]


def test_a_failed_drawing_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text("old")

    def fail(timelines, half):
        half.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("megatron.longseq.pipeline.tools.cli.write_trace", fail)
    assert main(["draw", *SIZES, "--output", str(file)]) == 1
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# An independent simulation of the authors' partition and even lengths, attention's backward 2.5 times its forward.
KNOWN = [
    ("7B", 32768, 32, ScheduleChoice(4, "even"), 0.259, 1.75),
    ("7B", 32768, 32, ScheduleChoice(4, "even", slack=1), 0.030, 2.50),
    ("7B", 32768, 32, ScheduleChoice(4, "paper"), 0.053, 1.93),
    ("7B", 32768, 32, ScheduleChoice(4, "paper", slack=1), 0.024, None),
    ("30B", 65536, 32, ScheduleChoice(4, "even"), 0.309, 2.75),
    ("30B", 65536, 32, ScheduleChoice(4, "even", slack=1), 0.070, None),
    ("30B", 65536, 32, ScheduleChoice(), 7 / 39, 8.0),
]


@pytest.mark.parametrize(("model", "seq_length", "microbatches", "choice", "bubble", "sequences"), KNOWN)
def test_the_simulator_agrees_with_known_figures(model, seq_length, microbatches, choice, bubble, sequences):
    stages, tensor_parallel, shape = paper.MODELS[model]
    costs = replace(flops(replace(shape, seq_length=seq_length)), head=paper.FREE)  # the figures are without the head
    result = run(choice, costs, PipelineSetup(stages, microbatches, tensor_parallel))
    assert result.timeline.bubble == pytest.approx(bubble, abs=0.002)
    if sequences is not None:
        assert result.sequences == pytest.approx(sequences, abs=0.005)


@pytest.mark.slow  # a documentation table
def test_the_papers_table_shows_half_of_its_bubble_without_more_memory(capsys):
    assert main(["table"]) == 0
    text = capsys.readouterr().out
    halves = [rows(part) for part in text.split("The way to half")[1:]]
    assert len(halves) == 2
    for half in halves:
        theirs, ours = half["Seq1F1B, K=4 paper"], half["Seq1F1B-I V=4, K=4 balanced"]
        assert ours[1].startswith("**") and not theirs[1].startswith("*")
        assert float(ours[1].strip("*%")) <= float(theirs[1].strip("%")) / 2
        assert float(ours[2]) <= float(theirs[2])
    assert len(rows(text.split("\n\n")[1])) == len(paper.ROWS) + 2


def test_the_floor_is_the_heads_share_of_the_last_stage():
    shape = ModelShape(4, 64, 4, 4096, padded_vocab_size=50000)
    model = flops(shape)
    result = run(ScheduleChoice(2, "even"), model, PipelineSetup(2, 4))
    last, first = (
        sum(span.end - span.start for span in result.timeline.spans[rank] if span.action.kind is ActionKind.FORWARD)
        for rank in (1, 0)
    )
    assert last - first == pytest.approx(4 * 4096 * 2 * 64 * 50000)
    assert 0 < result.floor < result.timeline.bubble
    assert run(ScheduleChoice(2), flops(ModelShape(4, 64, 4, 4096)), PipelineSetup(2, 4)).floor == pytest.approx(
        0, abs=1e-12
    )
