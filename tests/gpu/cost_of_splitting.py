"""What it costs to cut a sequence: forward and backward of a stack of layers, whole and in segments, on one device.

    python -m tests.gpu.cost_of_splitting --out FILE

The stack is a middle pipeline stage of upstream's own layers (a 7B-like model's by default), its attention runs on the
keys of earlier segments as in training, and one micro-batch goes forward through all segments and backward through all.
The seconds of each segment then go into the simulator, as those of every stage of a pipeline: what throughput has it,
beside 1F1B with the same layers, whole? (Embedding, head and messages are left out.) The last line is one JSON object.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.longseq.pipeline.action import Action, Kind, Pipeline
from megatron.longseq.pipeline.chunk import Chunk
from megatron.longseq.pipeline.cost import ModelShape, flops
from megatron.longseq.pipeline.orders import one_f_one_b
from megatron.longseq.pipeline.partition import parse
from megatron.longseq.pipeline.recorder import DeviceClock, HostClock, Recorder
from megatron.longseq.pipeline.simulate import Costs, simulate


@dataclass(frozen=True)
class Measured:
    """One stack, sequence length and number of segments.

    Attributes:
        groups: key-value heads.
        tokens: of the sequence.
        lengths: tokens per segment.
        forward: median seconds of every segment's forward.
        backward: of its backward.
        seconds: median of the whole: from the first forward's start to the last backward's end.
        peak_bytes: most device memory at once; 0 without CUDA.
        gradient: difference of the input's gradient from that of the whole sequence, relative.
    """

    groups: int
    tokens: int
    lengths: tuple[int, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    seconds: float
    peak_bytes: int
    gradient: float

    @property
    def name(self) -> str:
        """As in the JSON line."""
        return f"G{self.groups}N{self.tokens}K{len(self.lengths)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, predict, print."""
    options = _parser().parse_args(arguments)
    import patches

    patches.start()
    _initialise()
    measured: list[Measured] = []
    lines = ["G: key-value heads, N: tokens, K: segments"]
    for groups in options.groups:
        for tokens in options.sequences:
            stack = _stack(options, groups, tokens)
            whole: torch.Tensor | None = None
            for splits in options.splits:
                try:
                    result, gradient = _measure(stack, options, groups, tokens, splits, whole)
                except torch.OutOfMemoryError:
                    lines.append(f"  G{groups}N{tokens}K{splits}: the device's memory does not suffice")
                    continue
                whole = gradient if splits == 1 else whole
                measured.append(result)
                lines.append(_line(result))
            del stack, whole
    predicted = {m.name: _predicted(m, measured, options) for m in measured if len(m.lengths) > 1}
    for name, ratios in predicted.items():
        text = ", ".join(f"{ratio:.3f}x at {key}" for key, ratio in ratios.items())
        lines.append(f"  {name}: throughput of {options.stages} stages over 1F1B's, simulated: {text}")
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "tokens_per_second": {m.name: round(m.tokens / m.seconds, 1) for m in measured},
        "peak_gib": {m.name: round(m.peak_bytes / 2**30, 3) for m in measured},
        "gradient_difference": {m.name: m.gradient for m in measured},
        "predicted_ratio": predicted,
        "measured": [asdict(m) for m in measured],
    }
    print("\n".join(lines))
    print(json.dumps(result))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.cost_of_splitting", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the JSON object to this file, too")
    parser.add_argument("--layers", type=int, default=2, help="of the stack")
    parser.add_argument("--model-layers", type=int, default=32, help="of the model that the pipeline holds")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 32], help="key-value heads")
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--sequences", type=int, nargs="+", default=[32768, 65536])
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--partition", default="balanced", help="as --seq1f1b-partition")
    parser.add_argument("--stages", type=int, default=8, help="of the simulated pipeline")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--repeats", type=int, default=5, help="measured steps, after one that is not")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    return parser


def _initialise() -> None:
    from megatron.core import mpu, tensor_parallel

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def _stack(options: argparse.Namespace, groups: int, tokens: int) -> torch.nn.Module:
    """Return upstream's layers as a stage between the first and the last."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = getattr(torch, options.dtype)
    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        num_query_groups=groups,
        ffn_hidden_size=options.ffn,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=128,
        max_sequence_length=tokens,
        pre_process=False,
        post_process=False,
        position_embedding_type="rope",
    )
    return model.to(device="cuda", dtype=dtype)  # without one the cpu patch makes it stay


def _shape(options: argparse.Namespace, groups: int, tokens: int) -> ModelShape:
    return ModelShape(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        seq_length=tokens,
        ffn_hidden_size=options.ffn,
        num_query_groups=groups,
        swiglu=True,
    )


def _measure(
    stack: torch.nn.Module,
    options: argparse.Namespace,
    groups: int,
    tokens: int,
    splits: int,
    whole: torch.Tensor | None,
) -> tuple[Measured, torch.Tensor]:
    """Run the steps; returns what was measured and the input's gradient [tokens, 1, hidden]."""
    lengths = (
        (tokens,) if splits == 1 else parse(options.partition, flops(_shape(options, groups, tokens)), splits).lengths
    )
    generator = torch.Generator().manual_seed(tokens)
    shape, dtype = (tokens, 1, options.hidden), getattr(torch, options.dtype)
    given, pull = (torch.randn(shape, generator=generator).to(dtype).cuda() for _ in range(2))
    chunk = Chunk(stack, lengths)
    recorder = Recorder(DeviceClock() if torch.cuda.is_available() else HostClock())
    chunk.attach()
    try:
        steps = []
        for number in range(options.repeats + 1):
            stack.zero_grad(set_to_none=True)
            gc.collect()
            if number == 1 and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            recorder.start_step()
            gradient = _step(chunk, recorder, given, pull)
            steps.append(recorder.finish())
    finally:
        chunk.detach()
        stack.zero_grad(set_to_none=True)
    seconds: dict[tuple[Kind, int], list[float]] = {}
    for spans in steps[1:]:
        for span in spans:
            seconds.setdefault((span.action.kind, span.action.segment), []).append(span.end - span.start)
    return Measured(
        groups,
        tokens,
        lengths,
        forward=tuple(statistics.median(seconds[Kind.FORWARD, segment]) for segment in range(splits)),
        backward=tuple(statistics.median(seconds[Kind.BACKWARD, segment]) for segment in range(splits)),
        seconds=statistics.median(spans[-1].end - spans[0].start for spans in steps[1:]),
        peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        gradient=0.0 if whole is None else float((gradient - whole).norm() / whole.norm()),
    ), gradient


def _step(chunk: Chunk, recorder: Recorder, given: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
    """Forward through all segments, backward through all; returns the input's gradient."""
    alive: list[tuple[torch.Tensor, torch.Tensor]] = []
    parts = list(zip(given.split(list(chunk.lengths)), pull.split(list(chunk.lengths)), strict=True))
    for segment, (part, _) in enumerate(parts):
        chunk.enter(0, segment, forward_only=False)
        entered = part.detach().requires_grad_()
        with recorder.action(Action(Kind.FORWARD, 0, segment)):
            chunk.module.set_input_tensor(entered)  # type: ignore[operator]
            alive.append((entered, chunk.module(None, None, None)))
    gradients: list[Any] = [None] * len(parts)
    for segment in reversed(range(len(parts))):
        chunk.enter(0, segment, forward_only=False)
        entered, left = alive.pop()
        with recorder.action(Action(Kind.BACKWARD, 0, segment)):
            torch.autograd.backward(left, parts[segment][1])
        gradients[segment] = entered.grad
    chunk.leave(0)
    chunk.assert_empty()
    return torch.cat(gradients)


def _line(m: Measured) -> str:
    memory = f", at most {m.peak_bytes / 2**30:.1f} GiB" if m.peak_bytes else ""
    parts = ", ".join(
        f"{length}: {1e3 * f:.1f} + {1e3 * b:.1f}"
        for length, f, b in zip(m.lengths, m.forward, m.backward, strict=True)
    )
    return (
        f"  {m.name}: {m.tokens / m.seconds:.0f} tokens/s{memory} (tokens of a segment: ms forward + backward; {parts})"
    )


def _predicted(m: Measured, measured: Sequence[Measured], options: argparse.Namespace) -> dict[str, float]:
    """Throughput of a pipeline in segments over that of 1F1B with whole sequences; empty where these did not fit."""
    alike = [one for one in measured if (one.groups, one.tokens, len(one.lengths)) == (m.groups, m.tokens, 1)]
    if not alike:
        return {}
    return {
        f"P{options.stages}M{microbatches}": round(
            _step_seconds(alike[0], microbatches, options) / _step_seconds(m, microbatches, options), 4
        )
        for microbatches in options.microbatches
    }


def _step_seconds(m: Measured, microbatches: int, options: argparse.Namespace) -> float:
    """Simulated seconds of a training step, every stage with its share of the model's layers."""
    share = options.model_layers / (options.stages * options.layers)
    forward, backward = (
        (tuple(share * seconds for seconds in row),) * options.stages for row in (m.forward, m.backward)
    )
    nothing = ((0.0,) * len(m.lengths),) * options.stages
    schedule = one_f_one_b(Pipeline(options.stages, microbatches, len(m.lengths)))
    return simulate(schedule, Costs(forward, backward, nothing)).makespan


if __name__ == "__main__":
    sys.exit(main())
