"""Simulate pipeline schedules: draw one, compare several, fit a layer's cost, print the tables of the documentation."""

import argparse
import ast
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron.longseq.command_line import add_flags_command, run_command
from megatron.longseq.figures import check_output, complete_file
from megatron.longseq.pipeline.arguments import REFUSALS, add_pipeline_arguments
from megatron.longseq.pipeline.plan.memory import METHODS, Recompute
from megatron.longseq.pipeline.plan.segment_cost import CostModel, ModelShape, fit, flops, read_samples, seconds
from megatron.longseq.pipeline.plan.simulate import Timeline
from megatron.longseq.pipeline.tools.chrome_trace import read_measured, write_trace
from megatron.longseq.pipeline.tools.compare import (
    PipelineSetup,
    Result,
    ScheduleChoice,
    attempt,
    layer_samples,
    replay,
    run,
    table,
    usual,
    write_samples,
)
from megatron.longseq.pipeline.tools.paper import markdown

SUFFIXES = (".svg", ".png", ".json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, or 1 after an error."""
    return run_command(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron.longseq.pipeline", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    draw = commands.add_parser("draw", help="draw a simulated timeline, or a measured one above its simulation")
    draw.add_argument(
        "--measured", type=Path, metavar="FOLDER", help="folder of --pipeline-trace; it determines the sizes"
    )
    draw.set_defaults(run=_draw)
    compare = commands.add_parser(
        "compare", help="compare the usual schedules and yours for one model, in a table and a picture"
    )
    compare.add_argument("--rows", metavar="N1,N2,...", help="rows of the table to draw, from 1 (default: all of them)")
    compare.set_defaults(run=_compare)
    for command, needed in ((draw, True), (compare, False)):
        command.add_argument(
            "--output", type=Path, required=needed, metavar="FILE", help="picture (.svg, .png) or trace (.json)"
        )
        _add_schedule_arguments(command)
        _add_model_arguments(command)
    profile = commands.add_parser(
        "fit", help="extract the time of a layer from a measured step, for --seq1f1b-layer-seconds"
    )
    profile.add_argument("--measured", type=Path, required=True, metavar="FOLDER", help="folder of --pipeline-trace")
    profile.add_argument("--lengths", required=True, metavar="N1,N2,...", help="tokens per segment of that run")
    profile.add_argument("--layers-per-stage", type=int, required=True, help="layers of a virtual stage")
    profile.add_argument("--window-size", metavar="LEFT,0", help="keys before its own that a query attends to")
    profile.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON")
    profile.set_defaults(run=_fit)
    paper = commands.add_parser(
        "table", help="print Markdown tables of the paper's configurations, simulated and published"
    )
    paper.set_defaults(run=lambda args: markdown())
    add_flags_command(commands, add_pipeline_arguments, REFUSALS)
    return parser


def _add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("schedule")
    group.add_argument("--stages", type=int, default=4, help="pipeline-parallel size (default 4)")
    group.add_argument("--microbatches", type=int, default=8, help="micro-batches per step (default 8)")
    group.add_argument("--segments", type=int, default=1, help="segments per sequence (default 1: upstream's 1F1B)")
    group.add_argument("--virtual", type=int, default=1, help="virtual stages per rank (default 1)")
    group.add_argument(
        "--slack", type=int, default=0, help="extra segments of warm-up per downstream stage (default 0)"
    )
    group.add_argument("--zero-bubble", action="store_true", help="compute weight gradients in separate actions")
    group.add_argument("--partition", default="balanced", help="even, balanced (default), paper, or lengths N1,N2,...")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1)
    group.add_argument("--sequence-parallel", action="store_true", help="align lengths to that size")
    group.add_argument("--latency", type=float, default=0.0, help="seconds per message between stages (default 0)")
    group.add_argument(
        "--recompute-granularity",
        choices=("full", "selective"),
        help="upstream's flag; it affects only the column of bytes kept, not the time",
    )
    group.add_argument("--recompute-method", choices=METHODS, default="uniform", help="upstream's, with full")
    group.add_argument("--recompute-num-layers", type=int, default=1, help="upstream's, with full (default 1)")
    group.add_argument(
        "--cross-entropy-chunk-tokens",
        type=_positive,
        metavar="N",
        help="the loss in chunks of N tokens; it affects only the column of bytes kept",
    )
    group.add_argument("--device-tflops", type=float, default=150.0, help="assumed speed of a device (default 150)")
    group.add_argument(
        "--layer-seconds",
        type=Path,
        metavar="FILE",
        help="use a layer's measured times instead of FLOPs: JSON, [[begin, end, forward seconds, backward seconds], "
        "...]",
    )


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model", "upstream's flags; without them: a layer per stage and no head")
    group.add_argument("--num-layers", type=int, help="default: one per stage and virtual stage")
    group.add_argument("--hidden-size", type=int, default=4096)
    group.add_argument("--num-attention-heads", type=int, default=32)
    group.add_argument("--seq-length", type=int, default=32768)
    for flag in ("--padded-vocab-size", "--ffn-hidden-size", "--num-query-groups", "--kv-channels"):
        group.add_argument(flag, type=int, default=0)
    group.add_argument("--swiglu", action="store_true")
    group.add_argument("--moe-router-topk", type=int, default=1, help="experts per token (default 1)")
    group.add_argument("--window-size", metavar="LEFT,0", help="keys before its own that a query attends to")
    group.add_argument("--window-attn-skip-freq", help="every Nth layer has no window, or a list [1,1,0,...]: 1 has it")


def _draw(args: argparse.Namespace) -> str | None:
    check_output(args.output, SUFFIXES)
    if args.measured is not None:
        measured = read_measured(args.measured)
        _write([measured, replay(measured)], args.output)
        return None
    result = run(_choice(args), _model(args), _cluster(args))
    _write([result.timeline], args.output)
    return table([result])


def _compare(args: argparse.Namespace) -> None:
    if args.output is not None:
        check_output(args.output, SUFFIXES)
    results = attempt(usual(_choice(args)), _model(args), _cluster(args))
    timelines = _chosen([result.timeline for result in results if isinstance(result, Result)], args.rows)
    print(table(results))
    if args.output is not None:
        _write(timelines, args.output)


def _chosen(timelines: list[Timeline], rows: str | None) -> list[Timeline]:
    if rows is None:
        return timelines
    try:
        numbers = [int(word) for word in rows.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(1 <= number <= len(timelines) for number in numbers):
        raise ValueError(f"--rows {rows}: give row numbers of the table, from 1 to {len(timelines)}, such as 1,4")
    return [timelines[number - 1] for number in numbers]


def _write(timelines: Sequence[Timeline], file: Path) -> None:
    if file.suffix == ".json":
        with complete_file(file) as half:
            write_trace(timelines, half)
    else:
        from megatron.longseq.pipeline.tools.figure import draw  # imports matplotlib, which the tables do not need

        draw(timelines, file)


def _choice(args: argparse.Namespace) -> ScheduleChoice:
    partition = args.partition if args.segments > 1 else "even"
    return ScheduleChoice(args.segments, partition, args.virtual, args.slack, args.zero_bubble)


def _cluster(args: argparse.Namespace) -> PipelineSetup:
    multiple = args.tensor_model_parallel_size if args.sequence_parallel else 1
    recompute = Recompute(args.recompute_granularity, args.recompute_method, args.recompute_num_layers)
    chunk = args.cross_entropy_chunk_tokens
    return PipelineSetup(args.stages, args.microbatches, multiple, args.latency, recompute, chunk)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(f"{text} is not at least 1")
    return int(text)


def _model(args: argparse.Namespace) -> CostModel:
    layers = max(args.stages * args.virtual, 1) if args.num_layers is None else args.num_layers
    left = _window(args.window_size)
    values = {field.name: getattr(args, field.name) for field in fields(ModelShape) if hasattr(args, field.name)}
    windowed = _pattern(args.window_attn_skip_freq, layers)
    shape = ModelShape(**{**values, "num_layers": layers, "window": left, "windowed": windowed})
    if args.layer_seconds is not None:
        return seconds(shape, fit(read_samples(args.layer_seconds), left))
    speed = args.device_tflops * 1e12 * args.tensor_model_parallel_size
    if not speed > 0:
        raise ValueError(f"--device-tflops {args.device_tflops} on {args.tensor_model_parallel_size} devices: too few")
    return flops(shape, speed)


def _window(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        left, right = (int(word) for word in text.strip("()").split(","))
    except ValueError:
        raise ValueError(f"--window-size {text}: give two numbers LEFT,0") from None
    if right != 0:
        raise ValueError(f"--window-size {text}: a causal model does not attend to later tokens; give {left},0")
    return None if left == -1 else left


def _pattern(text: str | None, layers: int) -> tuple[bool, ...]:
    """Return whether each layer has the window: all but every Nth, or as a list of 1 and 0 says, as upstream."""
    if text is None:
        return ()
    try:
        value = ast.literal_eval(text)
        if isinstance(value, int) and value > 0:
            return tuple(layer % value != 0 for layer in range(1, layers + 1))
        return tuple(bool(int(flag)) for flag in value)
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(
            f"--window-attn-skip-freq {text}: give a number from 1, or the list of all {layers} layers written out"
        ) from None


def _fit(args: argparse.Namespace) -> str:
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no folder {args.output.absolute().parent}; create it first")
    lengths = [int(word) for word in args.lengths.split(",")]
    samples = layer_samples(read_measured(args.measured), lengths, args.layers_per_stage)
    layer = fit(samples, _window(args.window_size))
    write_samples(args.output, samples)
    return str(layer)
