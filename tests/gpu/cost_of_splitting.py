"""What it costs to cut a sequence: forward and backward of a stack of layers, whole and in segments, on one device.

    python -m tests.gpu.cost_of_splitting [--out FILE]                    # a GPU: 32k and 64k tokens, K 1, 2, 4, 8

The stack is a pipeline stage of upstream's own layers (of a 7B-like model, as many as fit into the device's memory).
Its attention runs on the keys of earlier segments as in training, with the same kernel for every K. The measured
seconds of the segments then go into the simulator: as they are, for stages without a head, and fitted to a layer, with
the head on the last stage. It says what throughput a pipeline has, beside 1F1B with the same layers on whole sequences;
messages are free. The last line is one JSON object. Status 1: segments gave other gradients than the whole sequence.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megatron.longseq.pipeline.plan.generators import one_f_one_b
from megatron.longseq.pipeline.plan.partition import parse
from megatron.longseq.pipeline.plan.schedule import Pipeline
from megatron.longseq.pipeline.plan.segment_cost import Coefficients, Sample, fit, flops, seconds, segment_costs
from megatron.longseq.pipeline.plan.simulate import Costs, simulate
from tests.gpu.stack import Measured, Sizes, build, forget, measure, one_rank

Measurements = dict[str, Measured]
ROUNDING = {"bfloat16": 0.05, "float32": 1e-4}  # by how much, relatively, a gradient may differ
USABLE = 0.9  # of the free memory: the rest is lost to fragments


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, predict, and print the result."""
    options = _options(arguments)
    with one_rank():
        layers = options.layers or _layers(options)
        known, apart, missing = _measure_all(options, layers)
    rows = [_row(m, known, apart, options) for m in known.values()]
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "layers": layers,
        "tokens_per_second": {name: round(m.tokens / m.seconds, 1) for name, m in known.items()},
        "peak_gib": {name: round(m.peak_bytes / 2**30, 3) for name, m in known.items()},
        "gradient_difference": apart,
        "did_not_fit": missing,
        "predicted_ratio": {row["name"]: row["ratio"] for row in rows},
        "predicted_ratio_with_head": {row["name"]: row["with_head"] for row in rows},
        "predicted_tokens_per_second": {row["name"]: row["pipeline"] for row in rows},
        "measured": [asdict(m) for m in known.values()],
    }
    print(_table(rows, missing, options, f"{result['device']}, {layers} layers"))
    print(json.dumps(result))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [name for name, difference in apart.items() if not difference <= ROUNDING[options.dtype]]  # NaN, too
    if wrong:
        print(f"error: {', '.join(wrong)}: the gradient is not that of the whole sequence", file=sys.stderr)
    return 1 if wrong else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.cost_of_splitting", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the JSON object to this file, too")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: give --layers and small sizes")
    parser.add_argument("--layers", type=int, help="of the stack (default: as many as fit)")
    parser.add_argument("--model-layers", type=int, default=32, help="of the model that the pipeline holds")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 8], help="key-value heads")
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--sequences", type=int, nargs="+", default=[32768, 65536])
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--partition", default="balanced", help="as --seq1f1b-partition: even or balanced")
    parser.add_argument("--stages", type=int, default=8, help="of the simulated pipeline")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=5, help="measured steps, after one that is not")
    parser.add_argument("--dtype", choices=list(ROUNDING), default="bfloat16")
    options = parser.parse_args(arguments)
    options.splits = sorted({1, *options.splits})  # the whole sequence is what the others are compared with
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks
    elif not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; --device cpu --layers 2 tries it at small sizes")
    if options.layers is None and options.device == "cpu":
        parser.error("--device cpu: give --layers; as many as fit are found on a GPU alone")
    if options.model_layers % options.stages:
        parser.error(f"--model-layers {options.model_layers} cannot be dealt to --stages {options.stages}")
    return options


def _sizes(options: argparse.Namespace, layers: int, groups: int) -> Sizes:
    return Sizes(layers, options.hidden, options.heads, groups, options.ffn, options.dtype)


def _lengths(options: argparse.Namespace, sizes: Sizes, tokens: int, splits: int) -> tuple[int, ...]:
    return (tokens,) if splits == 1 else parse(options.partition, flops(sizes.shape(tokens)), splits).lengths


def _layers(options: argparse.Namespace) -> int:
    """Return how many layers fit into the GPU, from stacks of one and two layers at the longest sequence."""
    tokens, room = max(options.sequences), torch.cuda.mem_get_info()[0]
    peaks = []
    for layers in (1, 2):
        sizes = _sizes(options, layers, max(options.groups))
        model = build(sizes, tokens)
        cuts = [_lengths(options, sizes, tokens, splits) for splits in options.splits]
        peaks.append(max(measure(model, sizes, lengths, 1)[0].peak_bytes for lengths in cuts))
        del model
        forget()
    return layers_that_fit(peaks[0], peaks[1], room, options.model_layers)


def layers_that_fit(one: int, two: int, room: int, most: int) -> int:
    """Return how many layers fit into `room` bytes, given the peaks of stacks of one and of two; 1 to `most`."""
    return max(1, min(most, 1 + int((USABLE * room - one) // (two - one))))


def _measure_all(options: argparse.Namespace, layers: int) -> tuple[Measurements, dict[str, float], list[str]]:
    """Measure every stack, length and cut; returns also the gradients' differences, and what did not fit."""
    known: Measurements = {}
    apart: dict[str, float] = {}
    missing: list[str] = []
    for groups in options.groups:
        sizes = _sizes(options, layers, groups)
        for tokens in options.sequences:
            model, whole = build(sizes, tokens), None
            for splits in options.splits:
                try:
                    found, gradient = measure(model, sizes, _lengths(options, sizes, tokens, splits), options.repeats)
                except torch.OutOfMemoryError:
                    missing.append(f"G{groups}N{tokens}K{splits}")
                else:
                    known[found.name] = found
                    if splits == 1:
                        whole = gradient
                    elif whole is not None:
                        apart[found.name] = float((gradient - whole).norm() / whole.norm())
                forget()
            del model
            forget()
    return known, apart, missing


def _row(m: Measured, known: Measurements, apart: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """Return one line of the table."""
    whole = known.get(replace(m, lengths=(m.tokens,)).name)
    layer = _layer([one for one in known.values() if (one.groups, one.tokens) == (m.groups, m.tokens)])
    row: dict[str, Any] = {"name": m.name, "measured": m, "whole": whole, "gradient": apart.get(m.name)}
    row |= {"ratio": {}, "with_head": {}, "pipeline": {}}
    for microbatches in options.microbatches:
        key = f"P{options.stages}M{microbatches}"
        own = step_seconds(measured_costs(m, options), microbatches)
        row["pipeline"][key] = round(microbatches * m.tokens / own, 1)
        if whole is not None:
            row["ratio"][key] = round(step_seconds(measured_costs(whole, options), microbatches) / own, 4)
        if layer is not None:
            theirs, ours = (fitted_costs(layer, m, cut, options) for cut in ((m.tokens,), m.lengths))
            row["with_head"][key] = round(step_seconds(theirs, microbatches) / step_seconds(ours, microbatches), 4)
    return row


def step_seconds(costs: Costs, microbatches: int) -> float:
    """Return the simulated seconds of a training step, by 1F1B over the segments that the costs are for."""
    pipeline = Pipeline(len(costs.forward), microbatches, len(costs.forward[0]))
    return simulate(one_f_one_b(pipeline), costs).makespan


def measured_costs(m: Measured, options: argparse.Namespace) -> Costs:
    """Return the costs of stages with equal shares of the layers, at the measured seconds, without a head."""
    share = options.model_layers / (options.stages * m.layers)
    forward, backward = ((tuple(share * one for one in row),) * options.stages for row in (m.forward, m.backward))
    return Costs(forward, backward, ((0.0,) * len(m.lengths),) * options.stages)


def _layer(measured: Sequence[Measured]) -> Coefficients | None:
    """Return a layer's coefficients, fitted to all segments of one sequence length, or None if there are too few."""
    samples = []
    for m in measured:
        rows = zip(accumulate(m.lengths), m.lengths, m.forward, m.backward, strict=True)
        samples += [Sample(end - length, end, f / m.layers, b / m.layers) for end, length, f, b in rows]
    return fit(samples) if len({(s.begin, s.end) for s in samples}) >= 3 else None


def fitted_costs(layer: Coefficients, m: Measured, lengths: Sequence[int], options: argparse.Namespace) -> Costs:
    """Return the costs from the fitted layer. The last stage has the head, at the speed of the layer's products."""
    shape = _sizes(options, m.layers, m.groups).shape(m.tokens, options.model_layers, options.vocabulary)
    return segment_costs(seconds(shape, layer), lengths, options.stages)


def _table(rows: Sequence[dict[str, Any]], missing: Sequence[str], options: argparse.Namespace, what: str) -> str:
    """Return the table: measured on the left, predicted on the right."""
    keys = [f"P{options.stages}M{microbatches}" for microbatches in options.microbatches]
    head = f"{'groups':>6} {'tokens':>7} {'K':>2} {'tokens/s':>9} {'of K=1':>6} {'GiB':>6} {'gradient':>8}"
    lines = [
        f"{what}, {options.dtype}; gradient: of the first QKV weight, its distance from the whole sequence's.",
        f"P and M: simulated pipeline, tokens/s and x 1F1B (in brackets: with a head of {options.vocabulary}).",
        head + "".join(f"   {key:>22}" for key in keys),
    ]
    for row in rows:
        m, whole = row["measured"], row["whole"]
        speed = f"{whole.seconds / m.seconds:6.3f}" if whole else f"{'':>6}"
        distance = f"{row['gradient']:8.1e}" if row["gradient"] is not None else f"{'':>8}"
        line = f"{m.groups:6d} {m.tokens:7d} {len(m.lengths):2d} {m.tokens / m.seconds:9.0f} {speed} "
        line += f"{m.peak_bytes / 2**30:6.2f} {distance}"
        for key in keys:
            ratio = f"{row['ratio'][key]:.3f}" if key in row["ratio"] else ""
            head_too = f"({row['with_head'][key]:.3f})" if key in row["with_head"] else ""
            line += f"   {row['pipeline'][key]:8.0f} {ratio:>6}{head_too:>7}"
        lines.append(line)
    lines += [f"{name}: the device's memory does not suffice" for name in missing]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
