"""Write a report of a run as one HTML file, which needs no network and no other file."""

import json
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import median

from megatron.longseq.figures import complete_file
from megatron.longseq.runlog import pictures, record
from megatron.longseq.runlog.folder import Record, RunFolder, Start
from megatron.longseq.runlog.screen import duration, first_loss, layout_text, number, steps_text

WARNINGS = 30
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.sub { color: #555; margin-top: 0; } img { width: 100%; height: auto; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #bbb; } tr + tr td { border-top: 1px solid #eee; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; padding: 0; margin: 1.2rem 0; list-style: none; }
.tiles li { background: #f3f5f7; border-radius: 6px; padding: .6rem .9rem; min-width: 7.5rem; }
.tiles b { display: block; font-size: 1.25rem; } .tiles span { color: #555; font-size: .85rem; }
.bad { color: #a3210a; } .note { color: #555; font-size: .9rem; } summary { cursor: pointer; }
pre { background: #f6f6f6; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
.scroll { overflow-x: auto; } .scroll img { width: auto; max-width: none; }
"""


def write_report(run: RunFolder, file: Path) -> None:
    """Write the report of a run that has been read.

    Args:
        run: with at least one start.
        file: the HTML file; an older one is replaced when the new one is complete.
    """
    steps = run.steps()
    newest = run.starts[-1]
    name = run.folder.resolve().name
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="sub">{_line(run, newest)}</p>',
        _damaged(run),
        _tiles(run, steps),
        _training(run, steps),
        _speed(run, steps),
        _memory(run.starts),
        _timeline(run),
        _starts(run.starts),
        _warnings(run),
        _settings(newest),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(name)}</title>'
    page = f"<!doctype html>\n<html lang=en><head>{head}<style>{STYLE}</style></head><body>\n" + "\n".join(
        part for part in parts if part
    )
    with complete_file(file) as half:
        half.write_text(page + "\n</body></html>\n", encoding="utf-8", errors="replace")


def _line(run: RunFolder, newest: Start) -> str:
    words = [str(run.folder.resolve()), newest.state]
    if newest.run is not None:
        words.append(f"{layout_text(newest.run)} on {newest.run.get('device', '?')}")
    if newest.revision:
        words.append(f"revision {newest.revision}")
    words.append("report of " + time.strftime("%Y-%m-%d %H:%M:%S"))
    return " &middot; ".join(escape(word) for word in words)


def _damaged(run: RunFolder) -> str:
    return f'<p class="note bad">{escape(run.damaged())}</p>' if run.damaged() else ""


def _tiles(run: RunFolder, steps: Sequence[Record]) -> str:
    if not steps:
        return '<p class="note">No step has been logged yet.</p>'
    last = steps[-1]
    warm = steps[1:] or steps  # the first step also starts libraries
    tokens = sum(step["tokens"] * step["steps"] for step in steps)
    seconds = sum(step["seconds"] * step["steps"] for step in steps)
    figures = [
        ("step", f"{last['iteration']} of {last.get('iterations', '?')}"),
        (f"{next(iter(last['losses']), 'loss')}, last", record.number_text(first_loss(last), ".4f")),
        ("tokens", f"{tokens:,.0f}"),
        ("time in steps", duration(seconds)),
        ("tokens/s/GPU, median", f"{_median(warm, 'tokens_per_second_per_gpu'):,.1f}"),
        ("TFLOP/s/GPU, median", f"{_median(warm, 'tflops_per_gpu'):.4g}"),
    ]
    if any("mfu" in step for step in warm):
        figures.append(("MFU, median", f"{100 * _median(warm, 'mfu'):.3g}%"))
    if any("bubble" in step for step in warm):
        figures.append(("bubble, median", f"{100 * _median(warm, 'bubble'):.3g}%"))
    figures.append(("peak memory, most of all ranks", f"{number(last, 'memory_bytes') / record.GIB:.2f} GiB"))
    figures.append(("restarts", str(len(run.starts) - 1)))
    cells = "".join(f"<li><b>{escape(value)}</b><span>{escape(name)}</span></li>" for name, value in figures)
    return f'<ul class="tiles">{cells}</ul>'


def _median(steps: Sequence[Record], name: str) -> float:
    return median([number(step, name) for step in steps if step.get(name) is not None] or [float("nan")])


def _restarts(run: RunFolder) -> list[int]:
    """Return the steps at which further starts began."""
    begun = [start for start in run.starts[1:] if start.steps]
    return [start.steps[0]["iteration"] - start.steps[0]["steps"] for start in begun]


def _picture(source: str, what: str, title: str, note: str = "", is_wide: bool = False) -> str:
    image = f'<img src="{source}" alt="{escape(what)}">'
    body = f'<div class="scroll">{image}</div>' if is_wide else image
    return f"<h2>{escape(title)}</h2>" + (f'<p class="note">{escape(note)}</p>' if note else "") + body


def _training(run: RunFolder, steps: Sequence[Record]) -> str:
    if not steps:
        return ""
    restarts = _restarts(run)
    note = "Dashed: a restart. Steps that it repeated are drawn once." if restarts else ""
    draw = pictures.training_curves(steps, run.held_out(), restarts)
    return _picture(pictures.inline(draw), "loss, gradient norm and learning rate over the steps", "Training", note)


def _speed(run: RunFolder, steps: Sequence[Record]) -> str:
    if not steps:
        return ""
    draw = pictures.speed_curves(steps, _restarts(run))
    return _picture(pictures.inline(draw), "throughput over the steps", "Throughput", "Without evaluation and saving.")


def _memory(starts: Sequence[Start]) -> str:
    memory = next((start.memory for start in reversed(starts) if start.memory), None)
    if memory is None:
        return ""
    source = pictures.inline(pictures.memory_of_ranks(memory))
    note = f"At step {memory['iteration']}. No rank has grown by 1% since then."
    return _picture(source, "peak memory of each rank", "Memory of the ranks", note)


def _timeline(run: RunFolder) -> str:
    """Return the measured step of the pipeline above its simulation."""
    folder = run.timeline_folder()
    if folder is None:
        return ""
    from megatron.longseq.pipeline.plan.schedule import ScheduleError
    from megatron.longseq.pipeline.tools.chrome_trace import read_measured
    from megatron.longseq.pipeline.tools.compare import replay
    from megatron.longseq.pipeline.tools.figure import draw

    title = "Pipeline"
    try:
        measured = read_measured(folder)
        simulated = replay(measured)
    except (ValueError, ScheduleError) as error:
        return f'<h2>{title}</h2><p class="note bad">{escape(str(error))}</p>'
    step = folder.name.removeprefix("step-").lstrip("0") if folder.name.startswith("step-") else ""
    note = (
        f"One step{f' (step {step})' if step else ''}, measured, above the simulation of the same schedule at the "
        f"measured median of each action. Bubble: {measured.bubble:.1%} measured, {simulated.bubble:.1%} simulated."
    )
    source = pictures.inline(lambda file: draw([measured, simulated], file))
    wide = max(len(spans) for spans in measured.spans) > 160
    return _picture(source, "measured and simulated times of the pipeline's actions", title, note, is_wide=wide)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _starts(starts: Sequence[Start]) -> str:
    rows = []
    for before, start in zip([None, *starts[:-1]], starts, strict=True):
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.began_at))
        rows.append(
            (str(start.number), began, _duration(start), steps_text(start), _repeated(before, start), start.state)
        )
    head = ("start", "began", "duration", "steps", "repeated", "how it ended")
    return "<h2>Starts</h2>" + _table(head, rows)


def _duration(start: Start) -> str:
    ends = start.ends
    return duration(max(end.at for end in ends) - start.began_at) if ends else ""


def _repeated(before: Start | None, start: Start) -> str:
    """Return how many steps of the start before this one repeats."""
    if before is None or not before.steps or not start.steps:
        return ""
    first = start.steps[0]["iteration"] - start.steps[0]["steps"]
    return str(max(0, before.steps[-1]["iteration"] - first))


def _warnings(run: RunFolder) -> str:
    lines = run.warnings(WARNINGS)
    if not lines:
        return ""
    return "<h2>Warnings and errors</h2><pre>" + escape("\n".join(lines)) + "</pre>"


def _settings(start: Start) -> str:
    """Return the command, the flags and the patches of a start, folded."""
    parts = []
    for title, name in (("Flags of the script", "flags.txt"), ("Command", "command.sh")):
        file = start.folder / name
        if file.exists():
            parts.append((title, file.read_text(errors="replace")))
    arguments = start.arguments
    if arguments:
        patches = arguments.get("longseq_patches")
        patches = patches if isinstance(patches, list) else []
        parts.append((f"Patches ({len(patches)})", "\n".join(map(str, patches))))
        parts.append(("All arguments, as resolved", json.dumps(arguments, indent=1, sort_keys=True)))
    folded = "".join(
        f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>" for title, text in parts
    )
    return f"<h2>Settings</h2>{folded}" if folded else ""
