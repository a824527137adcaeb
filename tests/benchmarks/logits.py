"""Peak bytes of the output layer and the loss: upstream's, and in chunks of tokens.

    python -m tests.benchmarks.logits [--chunk N] [--hidden H] [--vocabulary V]

The bytes are counted, not measured: upstream's own GPTModel computes its loss and backward on tensors without memory
(PyTorch's FakeTensorMode), and every storage that an operator makes is counted while it lives. So 128k tokens of a real
vocabulary are counted on any machine. Counted are all bytes above the model, the sums of its gradients (`main_grad`)
and its input: logits, the loss's copies, and the gradients of the hidden states and of the weight. `measured` holds the
same count against the resident memory of a real run that is small enough.

The last line is one JSON object. `logits_peak_ratio_32k` is chunked over upstream's bytes at 32k tokens with upstream's
defaults (bf16, gradient accumulation fusion) on one rank.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.peak import Peak
from tests.pool import RankPool

TOKENS = (8192, 16384, 32768, 65536, 131072)
GIB = 2**30


@dataclass(frozen=True)
class Setup:
    """What is counted.

    Attributes:
        name: of the row.
        hidden: hidden size.
        vocabulary: rows of the output layer.
        chunk: tokens per chunk; None: upstream's own loss.
        tensor_parallel: ranks that share the vocabulary, with sequence parallelism.
        dtype: of the model.
        fused: upstream's --gradient-accumulation-fusion.
        overlaps: upstream's --overlap-grad-reduce, whose hooks need a gradient from autograd.
    """

    name: str
    hidden: int
    vocabulary: int
    chunk: int | None = None
    tensor_parallel: int = 1
    dtype: torch.dtype = torch.bfloat16
    fused: bool = False
    overlaps: bool = False


def setups(hidden: int, vocabulary: int) -> list[Setup]:
    """Return what the table shows."""
    base = Setup("bf16, gradient accumulation fusion", hidden, vocabulary, fused=True)
    return [
        base,
        replace(base, name="bf16, no fusion", fused=False),
        replace(base, name="float32", dtype=torch.float32, fused=False),
        replace(base, name="float32, overlapped reduction", dtype=torch.float32, fused=False, overlaps=True),
        replace(base, name="bf16, fusion, TP 8 and sequence parallel", tensor_parallel=8),
    ]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, while they live."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.bytes = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known or key in self.live:
            return
        self.live[key] = storage.nbytes()
        self.bytes += self.live[key]
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.bytes -= self.live.pop(key)


class _Kernel:
    """Stands in for upstream's CUDA extension, which adds to the main gradient in place."""

    def wgrad_gemm_accum_fp32(self, total: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        assert main_grad.shape == (grad_output.shape[1], total.shape[1])


@contextlib.contextmanager
def _groups(setup: Setup) -> Iterator[None]:
    """Open upstream's process groups as the first rank. No other rank exists."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tests.regression.arm import patched

    layers._grad_accum_fusion_available = True
    layers.fused_weight_gradient_mlp_cuda = _Kernel()
    with patched("U"):
        dist.init_process_group("fake", rank=0, world_size=setup.tensor_parallel, store=FakeStore())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=setup.tensor_parallel, create_gloo_process_groups=False
        )
        yield


def _model(setup: Setup) -> Any:
    """Build the last pipeline stage; only its output layer is used."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=setup.hidden,
        num_attention_heads=8,
        ffn_hidden_size=64,
        use_cpu_initialization=True,
        perform_initialization=False,
        add_bias_linear=False,
        tensor_model_parallel_size=setup.tensor_parallel,
        sequence_parallel=setup.tensor_parallel > 1,
        gradient_accumulation_fusion=setup.fused,
        params_dtype=setup.dtype,
        bf16=setup.dtype is torch.bfloat16,
    )
    spec, sizes = get_gpt_layer_local_spec(), {"vocab_size": setup.vocabulary, "max_sequence_length": 64}
    model = GPTModel(config, spec, **sizes, pre_process=False, position_embedding_type="none")
    model.output_layer.weight.main_grad = torch.zeros_like(model.output_layer.weight, dtype=torch.float32)
    model.output_layer.weight.grad_added_to_main_grad = False
    return model


def _known(model: Any) -> list[torch.Tensor]:
    """Return what exists with or without the loss: parameters, and the sum of their gradients over micro-batches."""
    return [*model.parameters(), model.output_layer.weight.main_grad]


def _inputs(setup: Setup, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.empty(tokens // setup.tensor_parallel, 1, setup.hidden, dtype=setup.dtype).normal_()
    return hidden.requires_grad_(), torch.zeros(1, tokens, dtype=torch.int64)


def _train(setup: Setup, model: Any, hidden: torch.Tensor, labels: torch.Tensor) -> None:
    """Run upstream's `_postprocess` and its backward."""
    from megatron.longseq.cross_entropy.runtime.output_layer import ChunkedLoss

    nothing = dict.fromkeys(("input_ids", "position_ids", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin"))
    processor = (
        {} if setup.chunk is None else {"output_processor": ChunkedLoss(setup.chunk, needs_gradient=setup.overlaps)}
    )
    losses = model._postprocess(hidden_states=hidden, labels=labels, **nothing, **processor)
    losses.mean().backward()


def count(setup: Setup, tokens: Sequence[int]) -> list[int]:
    """Return the counted peak bytes for each number of tokens. Runs on a rank of the pool."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    peaks = []
    with _groups(setup), FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(setup)
        for number in tokens:
            hidden, labels = _inputs(setup, number)
            model.zero_grad()
            counted = _LiveBytes([*_known(model), hidden, labels])
            with counted:
                _train(setup, model, hidden, labels)
            peaks.append(counted.peak)
    return peaks


def measure(setup: Setup, tokens: int) -> tuple[int, int]:
    """Return the counted and the resident peak bytes of a real run. Runs on a rank of the pool."""
    with _groups(setup):
        model = _model(setup)
        _train(setup, model, *_inputs(setup, 64))  # what the first call of an operator allocates
        model.zero_grad()
        hidden, labels = _inputs(setup, tokens)
        counted = _LiveBytes([*_known(model), hidden, labels])
        peak = Peak()
        with counted:
            _train(setup, model, hidden, labels)
        return counted.peak, peak.bytes()


def main(arguments: Sequence[str] | None = None) -> int:
    """Count bytes, and print the table and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.logits", description=__doc__)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens per chunk")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size")
    parser.add_argument("--vocabulary", type=int, default=128256, help="rows of the output layer")
    given = parser.parse_args(arguments)
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as logs:
        pool = RankPool(Path(logs))
        for setup in setups(given.hidden, given.vocabulary):
            found = peaks(pool, setup, given.chunk, TOKENS)
            rows.append(row(setup, found))
            ratios[setup.name] = [round(ours / theirs, 4) for theirs, ours in found]
        small = Setup("measured", 256, 16384, dtype=torch.float32)
        apart = {}
        for name, one in (("upstream", small), ("chunked", replace(small, chunk=given.chunk))):
            counted, resident = pool.run(1, measure, one, 8192)[0]
            apart[name] = round(resident / counted, 3)
    print(
        f"GiB, upstream's / in chunks of {given.chunk} tokens (ratio), hidden {given.hidden}, vocabulary "
        f"{given.vocabulary}; resident over counted bytes of a real run: {apart}"
    )
    print("\n".join([header(TOKENS), *rows]))
    at_32k = next(iter(ratios.values()))[TOKENS.index(32768)]
    print(json.dumps({"logits_peak_ratio_32k": at_32k, "ratios": ratios, "measured": apart}))
    return 0


def peaks(pool: RankPool, setup: Setup, chunk: int, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Return upstream's peak bytes and those in chunks, for each number of tokens."""
    (theirs,) = pool.run(1, count, setup, tokens)
    (ours,) = pool.run(1, count, replace(setup, chunk=chunk), tokens)
    return list(zip(theirs, ours, strict=True))


def header(tokens: Sequence[int]) -> str:
    """Return the first two lines of a Markdown table with one column for each number of tokens."""
    return "\n".join([f"| | {' | '.join(f'{n // 1024}k' for n in tokens)} |", f"|---|{'--:|' * len(tokens)}"])


def row(setup: Setup, found: Sequence[tuple[int, int]]) -> str:
    """Return a line of the Markdown table."""
    cells = [f"{theirs / GIB:.2f} / {ours / GIB:.2f} ({ours / theirs:.3f})" for theirs, ours in found]
    return f"| {setup.name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
