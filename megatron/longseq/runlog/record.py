"""The records of `steps.jsonl`, one JSON object per line, and the log line of a step, which shows the same record.

Every record has `version`, `kind` and `time`. A field that is not known is left out; a value that is not finite is
null. A new field does not change the version; a field with another meaning does.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

VERSION = 1
FILE = "steps.jsonl"
RUN, STEP, MEMORY = "run", "step", "memory"

# kind, field, unit, meaning
FIELDS: tuple[tuple[str, str, str, str], ...] = (
    ("all", "version", "", f"version of this schema, {VERSION}"),
    ("all", "kind", "", f"`{RUN}`: the start; `{STEP}`: a line of the log; `{MEMORY}`: the memory of each rank"),
    ("all", "time", "s", "Unix time"),
    (RUN, "world_size", "", "number of ranks"),
    (RUN, "layout", "", "sizes of data, tensor, pipeline, context and expert parallelism by name"),
    (RUN, "first_iteration", "", "the step after which this start begins; 0 without a checkpoint"),
    (RUN, "log_interval", "", "steps between two lines"),
    (RUN, "device", "", "name of the last rank's device"),
    (STEP, "iteration", "", "number of the step"),
    (STEP, "iterations", "", "steps of the whole training (`--train-iters`)"),
    (STEP, "steps", "", "steps since the record before; means below are over these"),
    (STEP, "samples", "", "sequences that the training has consumed so far"),
    (STEP, "losses", "", "mean of each loss by name, over steps that were not skipped"),
    (STEP, "grad_norm", "", "norm of the gradient of this step, before clipping"),
    (STEP, "learning_rate", "", "of this step"),
    (STEP, "loss_scale", "", "of this step"),
    (STEP, "params_norm", "", "with `--log-params-norm`"),
    (STEP, "zeros", "", "with `--log-num-zeros-in-grad`: elements of the gradient that are 0"),
    (STEP, "skipped", "", "of `steps`: how many were skipped because of a gradient that is not finite"),
    (STEP, "seconds", "s", "mean time of a step, without evaluation and saving"),
    (STEP, "tokens", "", "mean number of tokens of all ranks' documents in a step"),
    (STEP, "tokens_per_second_per_gpu", "1/s", "of a rank"),
    (STEP, "tflops_per_gpu", "TFLOP/s", "model FLOPs of a rank, causal attention counted once"),
    (STEP, "mfu", "", "model FLOPs utilization, causal attention counted once, 0 to 1; needs a known peak"),
    (STEP, "mfu_full", "", "the same with attention counted twice"),
    (STEP, "memory_bytes", "B", "peak of allocated memory so far, of the rank with the highest one"),
    (STEP, "reserved_beyond_bytes", "B", "peak of reserved memory beyond that of allocated, the most of all ranks"),
    (STEP, "bubble", "", "measured share of the ranks' time in which they compute nothing, 0 to 1, in this step; "
     "mean over all pipelines; with this project's pipeline schedules and more than one stage"),
    (MEMORY, "iteration", "", "number of the step"),
    (MEMORY, "peak_bytes", "B", "peak of allocated memory so far by global rank; written when one has grown by 1%"),
)  # fmt: skip

GIB = 2**30
# What a damaged line may hold beyond these would end in errors of the arithmetic behind it.
MOST_RANKS, MOST_BYTES, LARGEST = 2**20, 2**62, 1e300
FIXED_UP_TO = 1e6  # larger values are written with an exponent


def record(kind: str, **fields: Any) -> dict[str, Any]:
    """Return a record of this kind, at the present time. Fields that are None are left out."""
    known = {name: value for name, value in fields.items() if value is not None}
    return {"version": VERSION, "kind": kind, "time": round(time.time(), 3), **known}


def to_json(values: Mapping[str, Any]) -> str:
    """Return one line of `steps.jsonl`, without its end."""
    return json.dumps(_finite(dict(values)), allow_nan=False)


def from_json(line: str) -> dict[str, Any]:
    """Return the record of a line.

    Raises:
        ValueError: the line is no record, its version is newer than this program knows, or a field is missing or has
            another type.
    """
    try:
        values = json.loads(line)
    except RecursionError:
        raise ValueError("this is not a record of a run: it is nested too deeply") from None
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise ValueError("this is not a record of a run: it has no kind")
    if values.get("version") != VERSION:
        raise ValueError(f"the record has version {values.get('version')}, but this program reads version {VERSION}")
    for name in _NEEDED.get(values["kind"], ()):
        if values.get(name) is None:
            raise ValueError(f"a record of kind {values['kind']} has no {name}")
    for name in values.keys() & _TYPES.keys():
        if not _TYPES[name](values[name]):
            raise ValueError(f"field {name} of a record has an unexpected value: {str(values[name])[:60]}")
    return values


def _is_whole(value: object, most: int = MOST_BYTES) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_count_of_ranks(value: object) -> bool:
    return _is_whole(value, MOST_RANKS) and value != 0


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and abs(value) <= LARGEST)  # type: ignore[arg-type]  # false for NaN


def _are_numbers_by_name(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _are_counts_by_name(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_count_of_ranks, value.values()))


_NEEDED = {
    RUN: ("world_size",),
    STEP: ("iteration", "steps", "losses", "seconds", "tokens"),
    MEMORY: ("iteration", "peak_bytes"),
}
_TYPES: dict[str, Callable[[object], bool]] = {
    **{name: _is_number for kind, name, *_ in FIELDS if kind == STEP},
    **{name: _is_whole for name in ("iteration", "iterations", "steps")},
    "world_size": _is_count_of_ranks,
    "layout": _are_counts_by_name,
    "losses": _are_numbers_by_name,
    "peak_bytes": lambda value: isinstance(value, list) and bool(value) and all(map(_is_whole, value)),
}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def step_line(step: Mapping[str, Any]) -> str:
    """Return the line of the log for a record of kind `step`: always in this order, unknown figures left out."""
    total = f"/{step['iterations']:8d}" if step.get("iterations") else "/       ?"
    parts = [f"iteration {step['iteration']:8d}{total}"]
    parts += [f"{name}: {number_text(value, '.6E')}" for name, value in step.get("losses", {}).items()]
    for name, title, form, unit in _SHOWN:
        if name in step:
            value = step[name]
            parts.append(f"{title}: {number_text(None if value is None else value / unit, form)}")
    if step.get("skipped"):
        parts.append(f"skipped: {step['skipped']}")
    return " " + " | ".join(parts) + " |"


# field, its name in the line, its format, the unit that it is divided by
_SHOWN = (
    ("grad_norm", "grad norm", ".3f", 1),
    ("learning_rate", "lr", ".3E", 1),
    ("seconds", "step (ms)", ".1f", 1e-3),
    ("tokens_per_second_per_gpu", "tokens/s/GPU", ".1f", 1),
    ("tflops_per_gpu", "TFLOP/s/GPU", ".4g", 1),
    ("mfu", "MFU (%)", ".4g", 0.01),
    ("memory_bytes", "memory (GiB)", ".2f", GIB),
    ("bubble", "bubble (%)", ".1f", 0.01),
)


def number_text(value: float | None, form: str) -> str:
    """Return a figure as text: by a format specification, or with an exponent if it has too many digits for that."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return format(value, ".3E" if form.endswith("f") and abs(value) >= FIXED_UP_TO else form)
