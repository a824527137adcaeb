"""A stack of upstream's layers on one device, as a pipeline's middle stage: seconds and bytes of its segments."""

import gc
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron.longseq.pipeline.plan.schedule import Action, ActionKind
from megatron.longseq.pipeline.plan.segment_cost import ModelShape
from megatron.longseq.pipeline.plan.simulate import ActionTime
from megatron.longseq.pipeline.runtime.segmented_model import SegmentedModel
from megatron.longseq.pipeline.runtime.step_timer import DeviceClock, HostClock, StepTimer


@dataclass(frozen=True)
class Sizes:
    """The stack's sizes, by upstream's names; `dtype` is the name of torch's."""

    layers: int
    hidden: int
    heads: int
    groups: int
    ffn: int
    dtype: str

    def shape(self, tokens: int, layers: int | None = None, vocabulary: int = 0) -> ModelShape:
        """Return what the cost formulas want: of the stack, or of a model with other layers and a head."""
        return ModelShape(
            num_layers=layers or self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            seq_length=tokens,
            padded_vocab_size=vocabulary,
            ffn_hidden_size=self.ffn,
            num_query_groups=self.groups,
            swiglu=True,
        )


@dataclass(frozen=True)
class Measured:
    """One stack, sequence length and cut.

    Attributes:
        groups: key-value heads.
        layers: of the stack.
        lengths: tokens per segment.
        forward: median seconds of every segment's forward.
        backward: of its backward.
        seconds: median of the whole: from the first forward's start to the last backward's end.
        peak_bytes: most device memory at once; 0 on a CPU.
        kernels: attention kernels that ran.
    """

    groups: int
    layers: int
    lengths: tuple[int, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    seconds: float
    peak_bytes: int
    kernels: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Return the tokens of the sequence."""
        return sum(self.lengths)

    @property
    def name(self) -> str:
        """Return the key in the JSON line."""
        return f"G{self.groups}N{self.tokens}K{len(self.lengths)}"


@contextmanager
def one_rank() -> Iterator[None]:
    """Start our patches and upstream's process groups for this process alone."""
    import patches

    patches.start()
    from megatron.core import mpu, tensor_parallel

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mpu.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
    finally:
        mpu.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build(sizes: Sizes, tokens: int) -> torch.nn.Module:
    """Return the stack, on the GPU where there is one; to be called in `one_rank`."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = getattr(torch, sizes.dtype)
    config = TransformerConfig(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        num_query_groups=sizes.groups,
        ffn_hidden_size=sizes.ffn,
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


def measure(
    model: torch.nn.Module, sizes: Sizes, lengths: Sequence[int], repeats: int
) -> tuple[Measured, torch.Tensor]:
    """Run `repeats` steps after one that does not count: forward through all segments, backward through all.

    Returns:
        What was measured, and the gradient of the first layer's query-key-value weight: float32, on the host. It is of
        the same numbers whatever the cut.
    """
    lengths, on_gpu = tuple(lengths), torch.cuda.is_available()
    generator = torch.Generator().manual_seed(sum(lengths))
    shape, dtype = (sum(lengths), 1, sizes.hidden), getattr(torch, sizes.dtype)
    given, pull = (torch.randn(shape, generator=generator).to(dtype).cuda() for _ in range(2))
    chunk, timer = SegmentedModel(model, lengths), StepTimer(DeviceClock() if on_gpu else HostClock())
    steps: list[tuple[ActionTime, ...]] = []
    chunk.attach()
    try:
        for number in range(repeats + 1):
            model.zero_grad(set_to_none=True)
            if number == 1 and on_gpu:
                torch.cuda.reset_peak_memory_stats()
            timer.start_step()
            _step(chunk, timer, given, pull)
            steps.append(timer.finish())
        gradient = _first_qkv(model).grad.float().cpu()
    finally:
        chunk.detach()
        model.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    kernels = tuple(sorted({kernel.name for kernel in chunk.kernels.kernels.values()}))
    forward, backward, seconds = _medians(steps[1:], len(lengths))
    return Measured(sizes.groups, sizes.layers, lengths, forward, backward, seconds, peak, kernels), gradient


def _first_qkv(model: Any) -> torch.nn.Parameter:
    weight: torch.nn.Parameter = model.decoder.layers[0].self_attention.linear_qkv.weight
    return weight


def forget() -> None:
    """Give the device's memory back, also what an error's traceback held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _medians(
    steps: Sequence[Sequence[ActionTime]], segments: int
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Return the median seconds per segment, forward and backward, and of the whole step."""

    def median(kind: ActionKind, segment: int) -> float:
        wanted = Action(kind, 0, segment)
        return statistics.median(span.end - span.start for spans in steps for span in spans if span.action == wanted)

    forward, backward = (
        tuple(median(kind, k) for k in range(segments)) for kind in (ActionKind.FORWARD, ActionKind.BACKWARD)
    )
    return forward, backward, statistics.median(spans[-1].end - spans[0].start for spans in steps)


def _step(chunk: SegmentedModel, timer: StepTimer, given: torch.Tensor, pull: torch.Tensor) -> None:
    """Run forward through all segments, then backward."""
    alive: list[torch.Tensor] = []
    lengths = list(chunk.lengths)
    pulls = pull.split(lengths)
    for segment, part in enumerate(given.split(lengths)):
        chunk.enter(0, segment, forward_only=False)
        with timer.action(Action(ActionKind.FORWARD, 0, segment)):
            chunk.module.set_input_tensor(part.detach().requires_grad_())  # type: ignore[operator]
            alive.append(chunk.module(None, None, None))
    for segment in reversed(range(len(lengths))):
        chunk.enter(0, segment, forward_only=False)
        with timer.action(Action(ActionKind.BACKWARD, 0, segment)):
            torch.autograd.backward(alive.pop(), pulls[segment])
    chunk.leave(0)
    chunk.assert_empty()
