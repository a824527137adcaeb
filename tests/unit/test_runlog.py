"""The record of a run: its lines, its folder while it grows, the screen of `watch`, and the report."""

import io
import json
import math
import os
import re
import subprocess
import sys
import time
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron.longseq.runlog import record, screen
from megatron.longseq.runlog.chart import curve, thin
from megatron.longseq.runlog.cli import fields_table, main
from megatron.longseq.runlog.folder import RunFolder
from tests.runlog_bed import run_record, step, write_run, write_start

ROOT = Path(__file__).resolve().parents[2]


def test_a_record_comes_back_from_its_line_and_has_documented_fields() -> None:
    values = step(7, grad_norm=math.nan)
    back = record.from_json(record.to_json(values))
    assert back == {**values, "grad_norm": None}
    for kind, made in ((record.STEP, values), (record.RUN, run_record(0))):
        assert set(made) <= {name for of, name, _, _ in record.FIELDS if of in ("all", kind)}
    with pytest.raises(ValueError, match="the record has version 2, but this program reads version 1"):
        record.from_json('{"version": 2, "kind": "step"}')


def test_the_line_shows_the_record_always_in_the_same_order() -> None:
    assert record.step_line(step(7, losses={"lm loss": 2.5}, grad_norm=1.25, seconds=2.0, bubble=0.081)) == (
        " iteration        7/     200 | lm loss: 2.500000E+00 | grad norm: 1.250 | lr: 1.050E-04 | step (ms): 2000.0 | "
        "tokens/s/GPU: 31725.8 | TFLOP/s/GPU: 398.9 | MFU (%): 41.7 | memory (GiB): 71.00 | bubble (%): 8.1 |"
    )
    plain = step(7, losses={}, grad_norm=None, mfu=None, bubble=None, skipped=1)
    assert "grad norm" not in record.step_line(plain) and record.step_line(plain).endswith("| skipped: 1 |")
    assert "grad norm: not finite" in record.step_line({**step(7), "grad_norm": None})


def test_the_page_lists_the_fields() -> None:
    page = (ROOT / "docs/logs.md").read_text()
    (table,) = re.findall(r"<!-- fields: begin[^>]*-->\n(.*?)\n<!-- fields: end -->", page, re.DOTALL)
    assert table == fields_table(), "update it: python -m megatron.longseq.runlog fields"


def test_a_later_start_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    run = RunFolder(write_run(tmp_path / "run"))
    run.refresh()
    steps = run.steps()
    assert [one["iteration"] for one in steps] == list(range(1, 201))
    assert steps[64]["losses"] == {"lm loss": 2.0}
    assert run.starts[0].state == "rank 2 (host n01, pid 4711) died of signal 9 (SIGKILL)"
    assert run.starts[1].state == "ended"
    # Upstream evaluates again at the end, on other batches: the first value is that of the curve.
    assert run.held_out() == {"validation set": [(69, 3.21), (200, 3.21)]}
    assert run.warnings(5) == [f"rank {rank}: WARNING: --onnx-safe: it has no effect" for rank in (0, 3)]


def test_a_growing_record_is_read_line_by_line(tmp_path: Path) -> None:
    folder = write_start(tmp_path / "start-0", [step(1)], None)
    run = RunFolder(tmp_path)
    run.refresh()
    line = record.to_json(step(2)) + "\n"
    with (folder / record.FILE).open("a") as stream:
        stream.write(line[:40])
        stream.flush()
        run.refresh()
        assert len(run.steps()) == 1 and run.starts[0].unreadable == 0
        stream.write(line[40:] + '{"half a line\n')
    run.refresh()
    assert [one["iteration"] for one in run.steps()] == [1, 2]
    assert run.starts[0].unreadable == 1
    assert run.starts[0].state == "running"
    silent = time.time() - 3600
    for log in folder.glob("ranks/*.log"):
        os.utime(log, (silent, silent))
    assert run.starts[0].state.startswith("silent for 60 min")


def printed(run: RunFolder) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=140, height=60)
    screen.show_once(run, console)
    return console.file.getvalue()


def test_watch_shows_a_run_that_goes_on_and_one_that_has_ended(tmp_path: Path) -> None:
    text = printed(RunFolder(write_run(tmp_path / "goes-on", is_over=False)))
    assert "running" in text and "step 90 of 200" in text and "left at this speed" in text
    for part in ("4 ranks (pipeline 4)", "61 to 90", "rank 0: 71.00 GiB (the most), rank 3: 62.00 GiB", "bubble %"):
        assert part in text, part
    assert "rank 2 (host n01, pid 4711) died of signal 9" in text and "--onnx-safe" in text
    over = printed(RunFolder(write_run(tmp_path / "over")))
    assert "ended" in over and "step 200 of 200" in over and "left at" not in over


def test_watch_says_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--once", str(tmp_path / "absent")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["watch", "--once", str(tmp_path)]) == 1
    assert "holds no start of scripts/launch.sh" in capsys.readouterr().err
    (tmp_path / "start-0").mkdir()
    assert main(["watch", "--once", str(tmp_path)]) == 0
    assert "starting: no rank has written yet" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "report.txt")]) == 1
    assert "ends in .html" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"iteration": "7"}, "field iteration of a record has an unexpected value: 7"),
        ({"losses": ["lm loss"]}, "field losses of a record"),
        ({"losses": {"lm loss": "low"}}, "field losses of a record"),
        ({"seconds": None}, "a record of kind step has no seconds"),
        ({"tokens": "all"}, "field tokens of a record"),
        ({"mfu": [1]}, "field mfu of a record"),
        ({"kind": record.MEMORY, "peak_bytes": []}, "field peak_bytes of a record"),
        ({"kind": record.RUN, "world_size": True}, "field world_size of a record"),
        ({"kind": record.RUN, "world_size": 2, "layout": 4}, "field layout of a record"),
        ({"kind": record.RUN, "world_size": 2, "layout": {"data": None}}, "field layout of a record"),
        ({"kind": record.RUN, "world_size": 10**9}, "field world_size of a record"),
        ({"iteration": 10**400}, "field iteration of a record"),
        ({"seconds": math.nan}, "field seconds of a record"),
        ({"losses": {"lm loss": 1e308}}, "field losses of a record"),
        ("[" * 100000, "it is nested too deeply"),
    ],
)
def test_damaged_records_are_named_and_the_others_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str | dict[str, object], message: str
) -> None:
    folder = write_run(tmp_path / "run")
    text = line if isinstance(line, str) else json.dumps({**step(201), **line})
    with (folder / "start-1" / record.FILE).open("a") as stream:
        stream.write(text + "\n")
    for name, content in (("arguments.json", '{"longseq_patches": 3, "pipeline_trace": 5}'), ("nodes/x.json", "[]")):
        (folder / "start-1" / name).write_text(content)
    assert main(["watch", "--once", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert message in " ".join(shown.split()) and "step 200 of 200" in shown, shown
    assert main(["report", str(folder), "-o", str(tmp_path / "report.html")]) == 0
    assert message in (tmp_path / "report.html").read_text(), "the report says it, too"


def test_a_run_that_diverges_is_shown_in_any_terminal(tmp_path: Path) -> None:
    slow = [step(i, losses={"lm loss": 3e38}, grad_norm=2e37, seconds=1e6, iterations=10**7) for i in (1, 2)]
    folder = tmp_path / "run-\udcff"  # a name that is not UTF-8
    write_start(folder / "start-0", slow, None)
    log = folder / "start-0/ranks/rank-00000-n01.log"
    log.write_bytes(b"\x1b[33mWARNING: in colour\x1b[0m\n\x1b[2J\x1b[HWARNING: \xff\n")
    command = [sys.executable, "-m", "megatron.longseq.runlog", "watch", "--once", folder]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "TERM": "dumb", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, env=environment, check=False)
    shown = ran.stdout.decode("ascii")
    assert ran.returncode == 0, ran.stderr
    for words in ("3.000E+38", "2.000E+37", "more than 100 years left", "WARNING: in colour", "rank 0: WARNING: ?"):
        assert words in shown, shown
    assert "\x1b" not in shown
    assert main(["report", str(folder), "-o", str(tmp_path / "report.html")]) == 0
    assert "3.000E+38" in (tmp_path / "report.html").read_text()


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, who may read everything."""
    folder = write_run(tmp_path / "run")
    (folder / f"start-1/{record.FILE}").unlink()
    (folder / f"start-1/{record.FILE}").mkdir()  # opening it fails
    run = RunFolder(folder)
    run.refresh()
    run.refresh()
    assert run.damaged() == f"1 line of {record.FILE} cannot be read: {folder}/start-1/{record.FILE}: Is a directory"
    monkeypatch.setattr(os, "access", lambda *_: False)
    (tmp_path / "other").mkdir()
    assert RunFolder(tmp_path / "other").problem().endswith("this user may not read the folder")


def test_watch_does_not_wait_for_what_never_comes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    for wrong, message in (
        (folder / "start-0", "give the run folder that holds it"),
        (tmp_path / "file", "is not a folder"),
    ):
        assert main(["watch", str(wrong)]) == 1
        assert message in capsys.readouterr().err
    assert main(["report", str(folder), "-o", str(tmp_path)]) == 1
    (tmp_path / "x.html").mkdir()
    assert main(["report", str(folder), "-o", str(tmp_path / "x.html")]) == 1
    assert "is a folder; give the name of a file in it" in capsys.readouterr().err


def test_watch_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(write_run(tmp_path / "run")), "--seconds", "0.01"]) == 0
    assert "step 200 of 200" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("outcome", "ended_s_ago", "is_last"),
    [
        (None, 0, True),  # without slurm nothing is requeued, whoever asked it to stop
        (None, None, False),
        ("running", 0, False),  # the job has not decided yet
        ("running", 600, True),  # it was killed before it could
        ("requeued", 600, False),
        ("ended", 0, True),
        ("ended", None, True),  # no node could say how it ended
    ],
)
def test_watch_waits_for_a_job_that_is_requeued(
    tmp_path: Path, outcome: str | None, ended_s_ago: float | None, is_last: bool
) -> None:
    end = None if ended_s_ago is None else {"ended_at": time.time() - ended_s_ago}
    folder = write_start(tmp_path / "start-0", [step(1)], end)
    if outcome != "requeued":  # a preempted job is requeued without a request to stop
        (folder / "stop").touch()
    if outcome is not None:
        (folder / "job.json").write_text(json.dumps({"job": "7", "outcome": outcome}))
    run = RunFolder(tmp_path)
    run.refresh()
    assert run.starts[0].is_last() is is_last


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]
        if tag == "img":
            self.images.append(found["src"] or "")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_file_with_its_pictures(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    assert main(["report", str(write_run(tmp_path / "run")), "-o", str(file)]) == 0
    text = file.read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert len(page.images) == 4  # training, throughput, memory, pipeline
    prefix = "data:image/svg+xml;base64,"
    assert all(link.startswith(prefix) for link in page.links)
    pictures = [b64decode(image.removeprefix(prefix)).decode() for image in page.images]
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert not re.search(r"(href|src)=\"http", picture)
    assert "lm loss, last" in text and "restarts" in text and "SIGKILL" in text
    assert "lm loss" in pictures[0] and "held out" in pictures[0]
    assert "simulated at the measured medians" in pictures[3]
    # The times are the simulator's own, so both bubbles are the same.
    found = re.search(r"Bubble: ([\d.]+%) measured, ([\d.]+%) simulated", text)
    assert found is not None and found[1] == found[2] != "0.0%"
    (row,) = re.findall(r"<tr><td>1</td>.*?</tr>", text)
    assert "<td>61 to 200</td><td>9</td>" in row
    assert json.dumps({"num_layers": 32})[1:-1].replace('"', "&quot;") in text


def test_a_report_of_a_run_without_steps(tmp_path: Path) -> None:
    (tmp_path / "start-0/ranks").mkdir(parents=True)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "report.html")]) == 0
    assert "No step has been logged yet" in (tmp_path / "report.html").read_text()


def test_curves_of_many_points_are_means_of_equal_pieces() -> None:
    assert thin([(at, float(at % 2)) for at in range(10_000)], 100) == [(100 * i + 99, 0.5) for i in range(100)]
    assert thin([(1, math.nan), (2, 5.0)], 100) == [(2, 5.0)]
    assert curve([3.0, 2.0, 1.0, 1.0], 2, 2) == ["⢱⠀ 3", "⠈⣆ 1"]
    assert curve([math.nan], 10, 3) == []
