"""Read the timelines that ranks have measured, and write traces for the viewers of Chrome and Perfetto."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron.longseq.pipeline.plan.schedule import Action, ActionKind, Pipeline, source
from megatron.longseq.pipeline.plan.simulate import ActionTime, Timeline

_COLOURS = {ActionKind.FORWARD: "rail_response", ActionKind.BACKWARD: "rail_animation", ActionKind.WEIGHT: "rail_idle"}
_MICRO = 1e6  # trace files use microseconds


def read_measured(folder: Path) -> Timeline:
    """Join the files that the ranks of one run have written (`runtime.step_timer.write_measured`).

    Returns:
        The timeline of all ranks; its earliest start is 0.

    Raises:
        ValueError: a file is missing, superfluous, malformed or of another run; or an action is outside of the
            pipeline's sizes, ran twice, or is out of order.
    """
    files = sorted(folder.glob("rank-*.json"))
    if not files:
        raise ValueError(f"{folder}: there is no rank-0000.json; give the folder of a run's --pipeline-trace")
    records = [_record(file) for file in files]
    name, pipeline, _, _ = records[0]
    for file, record in zip(files, records, strict=True):
        if record[:2] != (name, pipeline):
            raise ValueError(
                f"{file}: it records {record[0]!r} with {record[1]}, but {files[0].name} records {name!r} with "
                f"{pipeline}; the folder holds files of several runs, so remove the old ones"
            )
    ranks = [record[2] for record in records]
    if ranks != list(range(pipeline.stages)):
        raise ValueError(
            f"{folder}: there are files of ranks {ranks}, but the pipeline has {pipeline.stages} stages; collect one "
            "file per pipeline rank in this folder"
        )
    first = min((span.start for record in records for span in record[3]), default=0.0)
    spans = tuple(
        tuple(ActionTime(span.action, span.start - first, span.end - first) for span in record[3]) for record in records
    )
    return Timeline(name, pipeline, spans)


def _record(file: Path) -> tuple[str, Pipeline, int, list[ActionTime]]:
    try:
        record = json.loads(file.read_text())
        name, rank = str(record["name"]), int(record["rank"])
        pipeline = Pipeline(**{size: int(number) for size, number in record["pipeline"].items()})
        spans = [
            ActionTime(Action(ActionKind(kind), int(microbatch), int(segment), int(vstage)), float(start), float(end))
            for kind, microbatch, segment, vstage, start, end in record["spans"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: this is not a timeline of --pipeline-trace ({type(error).__name__}: {error}); record it again"
        ) from error
    if file.name != f"rank-{rank:04d}.json":
        raise ValueError(f"{file}: it holds rank {rank}, whose file is rank-{rank:04d}.json; it was renamed or copied")
    _check(file, pipeline, spans)
    return name, pipeline, rank, spans


def _check(file: Path, pipeline: Pipeline, spans: list[ActionTime]) -> None:
    seen = set()
    for span in spans:
        action = span.action
        sizes = (pipeline.microbatches, pipeline.segments, pipeline.virtual)
        if not all(0 <= i < n for i, n in zip((action.microbatch, action.segment, action.vstage), sizes, strict=True)):
            raise ValueError(f"{file}: the {action} does not belong to {pipeline}")
        if action in seen:
            raise ValueError(f"{file}: the {action} occurs twice, but a file holds one step")
        if not span.start <= span.end:
            raise ValueError(f"{file}: the {action} ended at {span.end} s, before it began at {span.start} s")
        seen.add(action)
    for before, after in pairwise(spans):
        if after.start < before.start:
            raise ValueError(f"{file}: the {after.action} began before the {before.action} that precedes it")


def write_trace(timelines: Sequence[Timeline], file: Path) -> None:
    """Write timelines as one trace, with a process per timeline, a thread per rank and an arrow per message."""
    events = [event for pid, timeline in enumerate(timelines) for event in _events(pid, timeline)]
    file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def _events(pid: int, timeline: Timeline) -> list[dict[str, Any]]:
    pipeline = timeline.pipeline
    names = [{"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": timeline.name}}]
    for rank in range(pipeline.stages):
        names.append({"name": "thread_name", "ph": "M", "pid": pid, "tid": rank, "args": {"name": f"rank {rank}"}})
    where = {(rank, span.action): span for rank, spans in enumerate(timeline.spans) for span in spans}
    events = [_complete(pid, rank, span) for (rank, _), span in where.items()]
    for (rank, action), span in where.items():
        peer = source(pipeline, rank, action)
        if peer is not None and peer in where and peer[0] != rank:
            events += _arrow(pid, (peer[0], where[peer]), (rank, span), f"{pid}.{len(events)}")
    return names + sorted(events, key=lambda event: event["ts"])


def _complete(pid: int, rank: int, span: ActionTime) -> dict[str, Any]:
    action = span.action
    label = f"{action.kind} {action.microbatch}.{action.segment}" + (f" v{action.vstage}" if action.vstage else "")
    return {
        "name": label,
        "cat": action.kind.name.lower(),
        "cname": _COLOURS[action.kind],
        "ph": "X",
        "pid": pid,
        "tid": rank,
        "ts": span.start * _MICRO,
        "dur": (span.end - span.start) * _MICRO,
        "args": {"microbatch": action.microbatch, "segment": action.segment, "vstage": action.vstage},
    }


def _arrow(
    pid: int, sender: tuple[int, ActionTime], receiver: tuple[int, ActionTime], name: str
) -> list[dict[str, Any]]:
    """Return the two events of an arrow. Viewers bind an event to the action around it, so both lie inside actions."""
    leaves = sender[1].start + 0.99 * (sender[1].end - sender[1].start)
    common = {"name": "message", "cat": "message", "pid": pid, "id": name}
    return [
        common | {"ph": "s", "tid": sender[0], "ts": leaves * _MICRO},
        common | {"ph": "f", "bp": "e", "tid": receiver[0], "ts": receiver[1].start * _MICRO},
    ]
