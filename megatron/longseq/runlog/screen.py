"""Show a run in the terminal: its state, the last steps, curves, memory, restarts, ranks and warnings."""

import math
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron.longseq.runlog import record
from megatron.longseq.runlog.chart import curve
from megatron.longseq.runlog.folder import Record, RunFolder, Start

ROWS = 8
STARTS = 6
WARNINGS = 4
CHART_HEIGHT = 6
CENTURY_S = 100 * 365.25 * 86400

# heading, field, format, the unit that it is divided by
COLUMNS = (
    ("step", "iteration", "d", 1),
    ("grad norm", "grad_norm", ".3f", 1),
    ("lr", "learning_rate", ".2e", 1),
    ("s/step", "seconds", ".3g", 1),
    ("tokens/s/GPU", "tokens_per_second_per_gpu", ".1f", 1),
    ("TFLOP/s/GPU", "tflops_per_gpu", ".4g", 1),
    ("MFU %", "mfu", ".1f", 0.01),
    ("memory GiB", "memory_bytes", ".2f", record.GIB),
    ("bubble %", "bubble", ".1f", 0.01),
)
# Columns that a narrow terminal leaves out, in this order; the step stays.
LEAST_NEEDED = (
    *("mfu", "learning_rate", "tflops_per_gpu", "bubble", "grad_norm"),
    *("memory_bytes", "seconds", "tokens_per_second_per_gpu"),
)


def cell(step: Record, name: str, form: str, unit: float) -> str:
    """Return a figure of a record as text; empty if it is not known.

    Args:
        step: record of the step.
        name: name of the field.
        form: format specification.
        unit: what the value is divided by.
    """
    if name not in step:
        return ""
    value = step[name]
    return record.number_text(value if unit == 1 or value is None else value / unit, form)


def duration(seconds: float) -> str:
    """Return a time as days, hours, minutes and seconds."""
    if not seconds < CENTURY_S:
        return "more than 100 years"
    return str(timedelta(seconds=round(max(0.0, seconds))))


def first_loss(step: Record) -> float:
    """Return the first loss of a record, NaN if it has none that is finite."""
    values = list(step.get("losses", {}).values())
    return math.nan if not values or values[0] is None else float(values[0])


def number(step: Record, name: str) -> float:
    """Return a figure of a record, NaN if it is not known or not finite."""
    value = step.get(name)
    return math.nan if value is None else float(value)


def layout_text(run: Record) -> str:
    """Return the number of ranks and the sizes of parallelism that are above 1."""
    sizes = [f"{name} {size}" for name, size in run.get("layout", {}).items() if size > 1]
    ranks = run.get("world_size", 0)
    return f"{ranks} rank{'s' if ranks > 1 else ''}" + (f" ({', '.join(sizes)})" if sizes else "")


def render(run: RunFolder, width: int) -> RenderableType:
    """Return the screen of a run that has been read.

    Args:
        run: with at least one start.
        width: columns of the terminal.
    """
    steps = run.steps()
    parts: list[RenderableType] = [_header(run, steps)]
    if steps:
        parts += [_curves(steps, width), _table(steps[-ROWS:], width)]
    parts += [_memory(run.starts), _starts(run.starts), _ranks(run.starts[-1])]
    if damaged := run.damaged():
        parts.append(Text(damaged, style="red"))
    warnings = run.warnings(WARNINGS)
    parts.append(
        Text("\n".join(["last warnings", *(f"  {line[: width - 4]}" for line in warnings)]) if warnings else "")
    )
    return Group(*(part for part in parts if str(part)))


def _header(run: RunFolder, steps: Sequence[Record]) -> Text:
    start = run.starts[-1]
    text = Text(f"{run.folder}  ", style="bold")
    state = start.state
    good = state in ("running", "starting", "ended", "saved and stopped, as asked") or state.startswith("starting")
    text.append(state, style="green" if good else "bold red")
    if steps:
        last = steps[-1]
        text.append(f"\nstep {last['iteration']} of {last.get('iterations', '?')}", style="none")
        left = (last.get("iterations") or last["iteration"]) - last["iteration"]
        if left > 0 and not start.has_ended():
            text.append(f", {duration(left * last['seconds'])} left at this speed", style="none")
    if start.run is not None:
        text.append(f"   {layout_text(start.run)} on {start.run.get('device', '?')}", style="none")
    if start.revision:
        text.append(f"   revision {start.revision}", style="dim")
    return text


def _curves(steps: Sequence[Record], width: int) -> Table:
    wide = max(20, (width - 30) // 2)
    grid = Table.grid(padding=(0, 2))
    loss = curve([first_loss(step) for step in steps], wide, CHART_HEIGHT)
    speed = curve([number(step, "tokens_per_second_per_gpu") for step in steps], wide, CHART_HEIGHT)
    span = f"steps {steps[0]['iteration']} to {steps[-1]['iteration']}"
    name = next(iter(steps[-1].get("losses", {})), "loss")
    grid.add_row(Text(f"{name}, {span}", style="bold"), Text("tokens/s/GPU", style="bold"))
    grid.add_row(Text("\n".join(loss), style="cyan"), Text("\n".join(speed), style="magenta"))
    return grid


def _table(steps: Sequence[Record], width: int) -> Table:
    shown = [column for column in COLUMNS if any(column[1] in step for step in steps)]
    while len(shown) > 1 and width < sum(len(column[0]) + 3 for column in shown) + 12:
        shown.remove(next(column for name in LEAST_NEEDED for column in shown if column[1] == name))
    losses = list(dict.fromkeys(name for step in steps for name in step.get("losses", {})))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in (shown[0][0], *losses, *(column[0] for column in shown[1:])):
        table.add_column(heading, justify="right")
    for step in steps:
        values = [step.get("losses", {}).get(name) for name in losses]
        texts = [record.number_text(value, ".4f") for value in values]
        cells = [cell(step, *column[1:]) for column in shown]
        style = "yellow" if step.get("skipped") else None
        table.add_row(cells[0], *texts, *cells[1:], style=style)
    return table


def _memory(starts: Sequence[Start]) -> Text:
    newest = next((start.memory for start in reversed(starts) if start.memory), None)
    if newest is None:
        return Text("")
    peaks = newest["peak_bytes"]
    highest, lowest = (pick(range(len(peaks)), key=peaks.__getitem__) for pick in (max, min))
    words = [f"rank {rank}: {peaks[rank] / record.GIB:.2f} GiB" for rank in dict.fromkeys((highest, lowest))]
    return Text(f"peak memory: {words[0]}" + (f" (the most), {words[1]} (the least)" if len(words) > 1 else ""))


def _starts(starts: Sequence[Start]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("start", "began", "steps", "state"):
        table.add_column(heading)
    for start in starts[-STARTS:]:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.began_at))
        table.add_row(str(start.number), began, steps_text(start), start.state)
    return table


def steps_text(start: Start) -> str:
    """Return the first and the last step of a start."""
    return f"{start.steps[0]['iteration']} to {start.steps[-1]['iteration']}" if start.steps else "none"


def _ranks(start: Start) -> Text:
    logs = start.logs
    if not logs:
        return Text("")
    failed = sorted({rank for end in start.ends for rank in end.ranks})
    if start.has_ended():
        text = f"ranks: {len(logs)} have written" + (f"; failed: {failed}" if failed else "")
        return Text(text, style="red" if failed else "none")
    newest = max(log.written_at for log in logs)
    world = (start.run or {}).get("world_size", len(logs))
    text = f"ranks: {len(logs)} of {world} have written, the last of them {max(0.0, time.time() - newest):.0f} s ago"
    missing = sorted(set(range(world)) - {log.rank for log in logs})
    if missing:
        text += f"; no log of {missing[:8]}{' ...' if len(missing) > 8 else ''}"
    return Text(text, style="red" if missing else "none")


def show_once(run: RunFolder, console: Console) -> None:
    """Print the screen of a run.

    Raises:
        ValueError: there is nothing to show; the message says why.
    """
    run.refresh()
    if problem := run.problem():
        raise ValueError(problem)
    console.print(render(run, console.width))


def follow(run: RunFolder, console: Console, seconds: float) -> None:
    """Show a run until it has ended. A folder that does not exist yet is waited for.

    Args:
        run: the run.
        console: where to draw.
        seconds: time between two looks.

    Raises:
        ValueError: there is nothing to wait for; the message says why.
    """
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            run.refresh()
            problem = run.problem()
            if problem and not run.may_begin():
                raise ValueError(problem)
            shown: Any = Text(f"waiting: {problem}") if problem else render(run, console.width)
            live.update(shown, refresh=True)
            if run.starts and run.starts[-1].is_last():
                return
            time.sleep(seconds)
