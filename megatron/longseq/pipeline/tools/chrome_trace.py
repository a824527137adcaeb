"""Timelines as files: what the ranks measured, and traces for Chrome's and Perfetto's viewers.

Each rank writes its own file, `rank-0000.json` and so on, on a clock that all ranks share; `read_measured` joins them.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron.longseq.pipeline.plan.schedule import Action, Kind, Pipeline, source
from megatron.longseq.pipeline.plan.timeline import Span, Timeline

_COLOURS = {Kind.FORWARD: "rail_response", Kind.BACKWARD: "rail_animation", Kind.WEIGHT: "rail_idle"}
_MICRO = 1e6  # trace files count in microseconds


def write_measured(folder: Path, rank: int, pipeline: Pipeline, name: str, spans: Sequence[Span]) -> Path:
    """Write what one pipeline rank measured in one step; readers never see half a file.

    Args:
        folder: made where it is missing; one step of one run.
        rank: pipeline rank, from 0.
        pipeline: the sizes.
        name: of the schedule, the same on all ranks.
        spans: in the order in which they ran, in seconds on a clock that all ranks share.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [[s.action.kind, s.action.microbatch, s.action.segment, s.action.vstage, s.start, s.end] for s in spans]
    file = folder / f"rank-{rank:04d}.json"
    half = file.with_suffix(f".{os.getpid()}.half")
    half.write_text(json.dumps({"name": name, "pipeline": asdict(pipeline), "rank": rank, "spans": rows}) + "\n")
    half.replace(file)
    return file


def read_measured(folder: Path) -> Timeline:
    """Return the step that all ranks' files in a folder tell of; its earliest start is 0.

    Raises:
        ValueError: no files, a rank's file missing or one too many, a file that is no record of a rank, files of
            different runs, an action that the sizes do not know or that ran twice, or spans out of order.
    """
    files = sorted(folder.glob("rank-*.json"))
    if not files:
        raise ValueError(f"{folder}: no rank-0000.json here; give the folder that a run wrote its measured timeline to")
    records = [_record(file) for file in files]
    name, pipeline, _, _ = records[0]
    for file, record in zip(files, records, strict=True):
        if record[:2] != (name, pipeline):
            raise ValueError(
                f"{file}: is of {record[0]!r} with {record[1]}, but {files[0].name} is of {name!r} with {pipeline}; "
                "the folder holds files of different runs: remove the old ones"
            )
    ranks = [record[2] for record in records]
    if ranks != list(range(pipeline.stages)):
        raise ValueError(
            f"{folder}: files of ranks {ranks} for a pipeline of {pipeline.stages} stages; "
            "each pipeline rank must have written exactly one, into this folder"
        )
    first = min((span.start for record in records for span in record[3]), default=0.0)
    spans = tuple(
        tuple(Span(span.action, span.start - first, span.end - first) for span in record[3]) for record in records
    )
    return Timeline(name, pipeline, spans)


def _record(file: Path) -> tuple[str, Pipeline, int, list[Span]]:
    try:
        record = json.loads(file.read_text())
        name, rank = str(record["name"]), int(record["rank"])
        pipeline = Pipeline(**{size: int(number) for size, number in record["pipeline"].items()})
        spans = [
            Span(Action(Kind(kind), int(microbatch), int(segment), int(vstage)), float(start), float(end))
            for kind, microbatch, segment, vstage, start, end in record["spans"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: no record of a measured rank ({type(error).__name__}: {error}); write it again"
        ) from error
    if file.name != f"rank-{rank:04d}.json":
        raise ValueError(f"{file}: tells of rank {rank}, whose file is rank-{rank:04d}.json; it was renamed or copied")
    _check(file, pipeline, spans)
    return name, pipeline, rank, spans


def _check(file: Path, pipeline: Pipeline, spans: list[Span]) -> None:
    seen = set()
    for span in spans:
        action = span.action
        sizes = (pipeline.microbatches, pipeline.segments, pipeline.virtual)
        if not all(0 <= i < n for i, n in zip((action.microbatch, action.segment, action.vstage), sizes, strict=True)):
            raise ValueError(f"{file}: the {action} is outside {pipeline}")
        if action in seen:
            raise ValueError(f"{file}: the {action} ran twice; a file holds one step")
        if not span.start <= span.end:
            raise ValueError(f"{file}: the {action} ended at {span.end} s, before it began at {span.start} s")
        seen.add(action)
    for before, after in pairwise(spans):
        if after.start < before.start:
            raise ValueError(f"{file}: the {after.action} began before the {before.action} that precedes it")


def write_trace(timelines: Sequence[Timeline], file: Path) -> None:
    """Write timelines as one trace: a process per timeline, a thread per rank, an arrow per message between ranks."""
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


def _complete(pid: int, rank: int, span: Span) -> dict[str, Any]:
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


def _arrow(pid: int, sender: tuple[int, Span], receiver: tuple[int, Span], name: str) -> list[dict[str, Any]]:
    """Two events; viewers bind them to the spans around them, so they lie inside: shortly before an end, at a start."""
    leaves = sender[1].start + 0.99 * (sender[1].end - sender[1].start)
    common = {"name": "message", "cat": "message", "pid": pid, "id": name}
    return [
        common | {"ph": "s", "tid": sender[0], "ts": leaves * _MICRO},
        common | {"ph": "f", "bp": "e", "tid": receiver[0], "ts": receiver[1].start * _MICRO},
    ]
