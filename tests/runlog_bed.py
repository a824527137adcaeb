"""A run folder as scripts/launch.sh and the ranks write it: two starts, the second after a failure."""

import json
import math
from pathlib import Path
from typing import Any

from megatron.longseq.pipeline.plan.generators import make
from megatron.longseq.pipeline.plan.schedule import Pipeline
from megatron.longseq.pipeline.plan.simulate import ActionTime, simulate, uniform_costs
from megatron.longseq.pipeline.runtime.step_timer import write_measured
from megatron.longseq.runlog import record

RANKS = 4


def step(iteration: int, **changes: Any) -> dict[str, Any]:
    """Return the record of a step, which learns slowly."""
    values = {
        "iteration": iteration,
        "iterations": 200,
        "steps": 1,
        "samples": 8 * iteration,
        "losses": {"lm loss": 3 + 8 * math.exp(-iteration / 40) + 0.1 * math.sin(7 * iteration)},
        "grad_norm": 1.5 + math.sin(iteration),
        "learning_rate": 3e-4 * min(1.0, iteration / 20),
        "loss_scale": 1.0,
        "skipped": 0,
        "seconds": 9.0 if iteration in (1, 61) else 2.0 + 0.1 * math.sin(iteration),
        "tokens": 8 * 32768.0,
        "tokens_per_second_per_gpu": 32768.0 / (1 + 0.05 * math.sin(iteration)),
        "tflops_per_gpu": 412.0 / (1 + 0.05 * math.sin(iteration)),
        "mfu": 0.417,
        "mfu_full": 0.52,
        "memory_bytes": 71 * 2**30,
        "reserved_beyond_bytes": 2**30,
        "bubble": 0.08 + 0.01 * math.sin(iteration),
    }
    return record.record(record.STEP, **{**values, **changes})


def run_record(first: int) -> dict[str, Any]:
    layout = {"data": 1, "tensor": 1, "pipeline": RANKS, "context": 1, "expert": 1}
    return record.record(
        record.RUN,
        world_size=RANKS,
        layout=layout,
        first_iteration=first,
        log_interval=1,
        device="NVIDIA H100 80GB HBM3",
    )


def write_start(folder: Path, steps: list[dict[str, Any]], end: dict[str, Any] | None) -> Path:
    """Write one start.

    Args:
        folder: `start-N`.
        steps: records of kind `step`.
        end: of the node, as the launcher writes it; None while the start goes on.
    """
    for name in ("ranks", "nodes"):
        (folder / name).mkdir(parents=True)
    (folder / "revision.txt").write_text("started: 2026-03-01T08:00:00Z on n01\nrevision: 0123456789abcdef\n")
    (folder / "flags.txt").write_text("'examples/pretrain_gpt.py'\n'--num-layers'\n'32'\n")
    (folder / "arguments.json").write_text(json.dumps({"num_layers": 32, "longseq_patches": ["log.throughput"]}))
    peaks = record.record(record.MEMORY, iteration=2, peak_bytes=[(71 - 3 * rank) * 2**30 for rank in range(RANKS)])
    records = [run_record(steps[0]["iteration"] - 1), *steps[:2], peaks, *steps[2:]]
    (folder / record.FILE).write_text("".join(record.to_json(values) + "\n" for values in records))
    for rank in range(RANKS):
        lines = ["> WARNING: --onnx-safe: it has no effect", "WARNING:megatron.core.rerun_state_machine:usual"]
        if rank == RANKS - 1:
            last = steps[-1]["iteration"]
            held_out = f" validation loss at iteration {last} | lm loss value: 3.210000E+00 | lm loss PPL: 2.4E+01 |"
            again = (
                f" validation loss at iteration {last} on validation set | lm loss value: 3.3E+00 | lm loss PPL: 2 |"
            )
            lines += [held_out, again]
        (folder / f"ranks/rank-{rank:05d}-n01.log").write_text("\n".join(lines) + "\n")
    if end is not None:
        values = {
            "host": "n01",
            "status": 0,
            "stopped_by": 0,
            "stopped_at": 0.0,
            "ended_at": 1772353800.0,
            "message": "",
        }
        (folder / "nodes/n01.json").write_text(json.dumps({**values, "failures": [], **end}))
    return folder


def write_timeline(folder: Path) -> None:
    """Write a pipeline's step that was not measured but simulated, as the ranks write measured ones."""
    pipeline = Pipeline(RANKS, 4, 2)
    schedule = make(pipeline)
    timeline = simulate(schedule, uniform_costs(pipeline))
    for rank, spans in enumerate(timeline.spans):
        shifted = [ActionTime(span.action, 1e9 + 0.1 * span.start, 1e9 + 0.1 * span.end) for span in spans]
        write_measured(folder, rank, pipeline, "Seq1F1B, measured", shifted)


def write_run(folder: Path, is_over: bool = True) -> Path:
    """Write a run of two starts. The first one failed after step 69; the second one repeated steps 61 to 69."""
    failure = {"rank": 2, "stopped": False}
    end = {"status": 1, "message": "rank 2 (host n01, pid 4711) died of signal 9 (SIGKILL)", "failures": [failure]}
    write_start(folder / "start-0", [step(at) for at in range(1, 70)], end)
    later = [step(at, losses={"lm loss": 2.0}) if at == 65 else step(at) for at in range(61, 201 if is_over else 91)]
    start = write_start(folder / "start-1", later, {} if is_over else None)
    write_timeline(start / "timeline/step-00000062")
    return folder
