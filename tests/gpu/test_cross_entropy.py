"""The chunked cross entropy on a GPU: upstream's losses, gradients against float64, and less memory."""

from collections.abc import Callable

import pytest
import torch

from tests.distributed.flags import TINY, flags
from tests.gpu.test_pipeline import GPU, worst
from tests.pool import RankPool
from tests.regression.arm import run_arm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("arithmetic", "bound"), [("", 1e-4), ("--bf16", 2**-7)])
def test_has_upstreams_losses(ranks: RankPool, arithmetic: str, bound: float, tell: Callable[[str], None]) -> None:
    base = flags(TINY, GPU, arithmetic)
    theirs = run_arm(ranks, "U", 1, base, timeout=300)
    ours = run_arm(ranks, "O", 1, base + flags("--cross-entropy-chunk-tokens 30"), timeout=300)
    apart = worst(ours, theirs)
    tell(f"{torch.cuda.get_device_name()}, {arithmetic or 'float32'}: chunked losses differ by {apart:.1e}")
    assert apart <= bound


def chunked_and_whole() -> dict[str, tuple[float, float]]:
    """Return upstream's and our errors of the gradients in bf16, peak bytes and seconds. Runs on a rank."""
    import time

    import torch.distributed as dist
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron.longseq.cross_entropy.runtime.function import ChunkedLossCall, chunked_cross_entropy

    dist.init_process_group("nccl")
    group, tokens, width, vocabulary = dist.group.WORLD, 8192, 1024, 32768
    torch.manual_seed(1)
    hidden = torch.randn(tokens, 1, width, device="cuda", dtype=torch.bfloat16)
    table = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    labels = torch.randint(vocabulary, (tokens, 1), device="cuda")

    def run(losses: Callable[..., torch.Tensor], dtype: torch.dtype) -> tuple[list[torch.Tensor], int, float]:
        inputs = [one.to(dtype, copy=True).requires_grad_() for one in (hidden, table)]
        losses(*inputs).sum().backward()  # the first call of every kernel
        for one in inputs:
            one.grad = None
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        losses(*inputs).sum().backward()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return [one.grad.double() for one in inputs], torch.cuda.max_memory_allocated() - before, seconds

    call = ChunkedLossCall(1024, group)
    exact, _, _ = run(
        lambda h, w: torch.nn.functional.cross_entropy((h @ w.t())[:, 0], labels[:, 0]) * tokens, torch.float64
    )
    found = {}
    arms = [
        run(lambda h, w: vocab_parallel_cross_entropy(h @ w.t(), labels, 0.0, group), torch.bfloat16),
        run(lambda h, w: chunked_cross_entropy(h, w, labels, call), torch.bfloat16),
    ]
    for at, name in enumerate(("hidden", "weight")):
        found[name] = tuple(float((arm[0][at] - exact[at]).norm() / exact[at].norm()) for arm in arms)
    return found | {"bytes": tuple(arm[1] for arm in arms), "seconds": tuple(arm[2] for arm in arms)}


def test_is_as_exact_as_upstreams_in_bf16_and_needs_less_memory(ranks: RankPool, tell: Callable[[str], None]) -> None:
    (found,) = ranks.run(1, chunked_and_whole)
    tell(f"{torch.cuda.get_device_name()}: upstream's cross entropy, and in chunks: {found}")
    assert all(found[name][1] <= 1.2 * found[name][0] for name in ("hidden", "weight"))
    assert found["bytes"][1] <= 0.5 * found["bytes"][0]
