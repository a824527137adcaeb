"""Jobs for ranks of the pool: losses and gradients of a small GPT of upstream's, whole and in chunks, in one process.

Every job returns figures, one per case; all cases of a job share the process groups.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit import weight_bed

SEQUENCE, BATCH, VOCABULARY, HIDDEN = 96, 2, 512, 16
CHUNKS = (1, 31, 50, 10_000)  # the least, a prime, one that divides neither the sequence nor a shard of it, the whole

type Tensor = torch.Tensor
type Found = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model and how it runs.

    Attributes:
        tied: whether the output layer has the embedding's weight.
        tail: a last pipeline stage (hidden states in, losses out), not a whole model.
        sequence_parallel: upstream's flag.
        dtype: of the parameters; the model runs in double precision if it is float32.
        fused: whether upstream's fused kernel adds weight gradients to the main gradients of upstream's data-parallel
            wrapper.
        main: whether the model is in upstream's data-parallel wrapper without that kernel.
        overlaps: whether that wrapper reduces gradients while backward runs, for which hooks need each gradient.
        frozen: name of parameters that are not trained.
        config: further fields of the configuration.
    """

    tied: bool = False
    tail: bool = False
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    fused: bool = False
    main: bool = False
    overlaps: bool = True
    frozen: str = "none"
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def is_wrapped(self) -> bool:
        return self.fused or self.main


@contextlib.contextmanager
def groups(tp: int, double: bool = True) -> Iterator[None]:
    """Open upstream's process groups of one CPU rank, in double precision if requested."""
    from tests.regression.float64 import double_precision

    with weight_bed.world(weight_bed.Case(tp=tp)), double_precision() if double else contextlib.nullcontext():
        yield


def model_of(case: Case) -> Any:
    """Build the model, with the same weights in every call."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": HIDDEN,
            "num_attention_heads": 2,
            "use_cpu_initialization": True,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "sequence_parallel": case.sequence_parallel,
            "gradient_accumulation_fusion": case.fused,
            "params_dtype": case.dtype,
            "bf16": case.dtype is torch.bfloat16,
            "init_method_std": 1.0,  # logits of some size
        }
        | case.config
    )
    torch.manual_seed(7)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=not case.tail,
        share_embeddings_and_output_weights=case.tied,
        position_embedding_type="rope",
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.frozen not in name)
    if not case.is_wrapped:
        return model
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(config, DistributedDataParallelConfig(overlap_grad_reduce=case.overlaps), model)


def run(case: Case, model: Any, chunk: int | None) -> Found:
    """Return the losses and all gradients of a forward and a backward; `chunk` None: upstream's own."""
    from megatron.core import parallel_state

    from megatron.longseq.cross_entropy.runtime.output_layer import ChunkedLoss

    data = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=data)
    weights = torch.rand(BATCH, SEQUENCE, generator=data) * (torch.rand(BATCH, SEQUENCE, generator=data) > 0.3)
    labels = tokens.roll(-1, dims=1)
    labels[0, :3] = torch.tensor([-100, VOCABULARY, 0])  # outside of the vocabulary on either side
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=data).to(torch.get_default_dtype()).to(case.dtype)
    if case.sequence_parallel:
        hidden = hidden.chunk(2)[parallel_state.get_tensor_model_parallel_rank()].clone()
    hidden.requires_grad_(case.frozen != "hidden")
    model.zero_grad_buffer() if case.is_wrapped else model.zero_grad()
    if case.tail:
        (model.module if case.is_wrapped else model).set_input_tensor(hidden)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    processor = {} if chunk is None else {"output_processor": ChunkedLoss(chunk, needs_gradient=case.overlaps)}
    losses = model(tokens, positions, mask, labels=labels, **processor)
    found = {"losses": losses.detach().clone()}
    if losses.requires_grad:
        (losses * weights).sum().backward()
    if case.tail and hidden.grad is not None:
        found["hidden"] = hidden.grad.clone()
    if case.is_wrapped:
        model.finish_grad_sync()
    for name, parameter in model.named_parameters():
        gradient = parameter.main_grad if case.is_wrapped else parameter.grad
        if gradient is not None:
            found[name] = gradient.clone()
    return found


def largest_difference(found: Found, expected: Found) -> float:
    """Return the largest difference of a tensor, relative to its norm; infinite if other tensors were found."""
    if found.keys() != expected.keys() or any(found[name].dtype != expected[name].dtype for name in found):
        return float("inf")
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


def differences(cases: Sequence[Case], tp: int, chunks: Sequence[int] = CHUNKS) -> list[float]:
    """Return for each case the largest difference from upstream's run, over all chunk sizes. Runs on a rank."""
    with groups(tp):
        return [_difference(case, chunks) for case in cases]


def fused_differences(cases: Sequence[Case]) -> list[float]:
    """Return the same in float32, with a stand-in for upstream's fused kernel. Runs on a rank."""
    with groups(1, double=False), weight_bed.kernel(weight_bed.Case(fused=True)):
        return [_difference(case, CHUNKS) for case in cases]


def _difference(case: Case, chunks: Sequence[int]) -> float:
    model = model_of(case)
    expected = run(case, model, None)
    assert all(bool(value.any()) for value in expected.values())
    return max(largest_difference(run(case, model, chunk), expected) for chunk in chunks)


def pytorch_difference(tp: int, gathers: bool) -> float:
    """Return the largest difference from PyTorch's own cross entropy on whole logits, in float64. Runs on a rank."""
    from megatron.core import parallel_state

    from megatron.longseq.cross_entropy.runtime.function import ChunkedLossCall, chunked_cross_entropy

    with groups(tp, double=False):
        group = parallel_state.get_tensor_model_parallel_group()
        data = torch.Generator().manual_seed(5)
        whole = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=data, dtype=torch.float64).requires_grad_()
        table = torch.randn(VOCABULARY, HIDDEN, generator=data, dtype=torch.float64).requires_grad_()
        labels = torch.randint(VOCABULARY, (SEQUENCE, BATCH), generator=data)
        weights = torch.randn(SEQUENCE, BATCH, generator=data, dtype=torch.float64)
        logits = (whole @ table.t()).flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels)
        (losses * weights).sum().backward()
        assert whole.grad is not None and table.grad is not None

        rank = group.rank()
        hidden = (whole.chunk(tp)[rank] if gathers else whole).detach().clone().requires_grad_()
        weight = table.detach().chunk(tp)[rank].clone().requires_grad_()
        call = ChunkedLossCall(29, group, gathers=gathers, reduces=tp > 1 and not gathers)
        found = chunked_cross_entropy(hidden, weight, labels, call)
        found *= 1  # a script's loss function may write into the losses
        (found * weights).sum().backward()
        pairs = [
            (found, losses),
            (hidden.grad, whole.grad.chunk(tp)[rank] if gathers else whole.grad),
            (weight.grad, table.grad.chunk(tp)[rank]),
        ]
        return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


class _LargestResult(TorchDispatchMode):
    """Notes the most elements that the storage of one operator's result holds."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def largest_tensors(case: Case, tp: int, chunks: Sequence[int | None]) -> list[int]:
    """Return, for each chunk size, the elements of the largest tensor of a forward and a backward. Runs on a rank."""
    with groups(tp):
        model, found = model_of(case), []
        for chunk in chunks:
            with _LargestResult() as largest:
                run(case, model, chunk)
            found.append(largest.elements)
        return found


def products(case: Case, tp: int, chunk: int) -> tuple[int, int]:
    """Return the operations of matrix products, upstream's and in chunks. Runs on a rank."""
    from torch.utils.flop_counter import FlopCounterMode, mm_flop

    def addmm(_: Any, first: Any, second: Any, *, out_shape: Any = None, **__: Any) -> int:
        return mm_flop(first, second)  # type: ignore[no-any-return]

    further = {torch.ops.aten.addmm_: addmm}
    with groups(tp):
        model, found = model_of(case), []
        for size in (None, chunk):
            with FlopCounterMode(display=False, custom_mapping=further) as counted:
                run(case, model, size)
            found.append(counted.get_total_flops())
        return found[0], found[1]


def rounding(chunk: int) -> list[tuple[float, float]]:
    """Return how far upstream's results in bf16 and ours are from float64's. Runs on a rank.

    One pair for the losses, one for the gradient of the hidden states and one for that of the weight.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron.longseq.cross_entropy.runtime.function import ChunkedLossCall, chunked_cross_entropy

    with groups(1, double=False):
        group = parallel_state.get_tensor_model_parallel_group()
        data = torch.Generator().manual_seed(5)
        hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=data).bfloat16()
        table = torch.randn(VOCABULARY, HIDDEN, generator=data).bfloat16()
        labels = torch.randint(VOCABULARY, (SEQUENCE, BATCH), generator=data)
        weights = torch.rand(SEQUENCE, BATCH, generator=data)

        def gradients(losses: Any, dtype: torch.dtype) -> list[Tensor]:
            inputs = [one.to(dtype, copy=True).requires_grad_() for one in (hidden, table)]
            found = losses(*inputs)
            (found * weights).sum().backward()
            return [value.double() for value in (found.detach(), *(one.grad for one in inputs))]

        call = ChunkedLossCall(chunk, group)
        theirs = gradients(lambda h, w: vocab_parallel_cross_entropy(h @ w.t(), labels, 0.0, group), torch.bfloat16)
        ours = gradients(lambda h, w: chunked_cross_entropy(h, w, labels, call), torch.bfloat16)
        pick = labels.unsqueeze(-1)
        exact = gradients(lambda h, w: -(h @ w.t()).log_softmax(-1).gather(-1, pick).squeeze(-1), torch.float64)
        apart = [[float((a - b).norm() / b.norm()) for a, b in zip(one, exact, strict=True)] for one in (theirs, ours)]
        return list(zip(*apart, strict=True))
