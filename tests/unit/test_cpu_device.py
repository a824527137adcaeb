"""The cpu system replaces torch.cuda by CPU functions, restores it exactly, and does nothing if CUDA is available."""

from types import SimpleNamespace

import pytest
import torch

import patches
from patches import conditions
from patches.cpu import device
from patches.cpu.arguments import for_cpu  # noqa: F401  (the ledger imports it lazily; a broken import shows here)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the cpu system never acts where CUDA is available")


def test_upstream_style_tensor_lands_on_cpu() -> None:
    with pytest.raises((RuntimeError, AssertionError)):  # red without the record
        torch.zeros(2, device="cuda")
    with patches.applied("cpu.device"):
        made = [
            torch.zeros(2, device="cuda"),
            torch.tensor([1.0], device=torch.cuda.current_device()),
            torch.ones(2).cuda(),
            torch.ones(2).cuda(non_blocking=True),
            torch.ones(2).to("cuda:0"),
            torch.ones(2).to(device=torch.device("cuda", 0)),
            torch.empty(2, device=torch.device("cuda"), dtype=torch.bfloat16),
            torch.ones(2).pin_memory(),
            torch.zeros(2, pin_memory=True),
            torch.ones(2).new_zeros(2, device="cuda"),
            torch.normal(0.0, 1.0, (2,), device="cuda"),
            torch.hann_window(2, device=0),
            torch.nn.Parameter(torch.ones(2)).to("cuda", torch.float64),
            torch.randint(3, (2,), device="cuda:0", pin_memory=True),
            torch.zeros_like(torch.ones(2), device="cuda"),
        ]
        module = torch.nn.Linear(2, 2).cuda(torch.cuda.current_device())
        assert {tensor.device.type for tensor in made} == {"cpu"}
        assert module.weight.device.type == "cpu"
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.float64).dtype is torch.float64
        assert torch.ones(1).to("cpu").device.type == "cpu"


def test_streams_events_and_memory_answer() -> None:
    with patches.applied("cpu.device"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        on_stream = torch.cuda.stream(stream)
        with on_stream:
            pass
        with on_stream:  # upstream enters one context for several buckets
            first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            second.record(stream)
        assert first.elapsed_time(second) >= 0
        assert 0 < torch.cuda.memory_allocated() <= torch.cuda.max_memory_allocated() * 1.01
        assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] > 0


class _MakesCudaTensorInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad + torch.zeros(1, device="cuda")


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        ctx.x = x.detach().requires_grad_()  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        with torch.enable_grad():
            again = _MakesCudaTensorInBackward.apply(ctx.x)  # type: ignore[attr-defined]
        torch.autograd.backward(again, grad)
        return ctx.x.grad  # type: ignore[attr-defined]


def test_backward_of_custom_functions_is_covered_at_any_depth() -> None:
    with patches.applied("cpu.device"):
        x = torch.ones(1, requires_grad=True)
        _Recomputed.apply(x).sum().backward()
        assert x.grad is not None and x.grad.item() == 1


def test_undo_is_exact() -> None:
    owners = (torch, torch.Tensor, torch.cuda, torch.cuda.random)
    before = [dict(vars(owner)) for owner in owners]
    with patches.applied("cpu.device"):
        assert torch.cuda.current_device() == 0
        assert all(vars(owner) != names for owner, names in zip(owners, before, strict=True))
    assert all(vars(owner) == names for owner, names in zip(owners, before, strict=True))
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1).cuda()


def test_a_torch_without_a_name_of_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "memory_reserved")
    before = dict(vars(torch.cuda))
    with pytest.raises(RuntimeError, match="memory_reserved"), device.cpu_stands_in_for_cuda():
        pass
    assert vars(torch.cuda) == before


def test_never_acts_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not conditions.no_cuda(None)
    with pytest.raises(RuntimeError, match="must not be applied"), device.cpu_stands_in_for_cuda():
        pass


def test_rng_tracker_forks_and_restores() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def drawn() -> tuple[list[float], list[float]]:
        torch.manual_seed(1)
        tracker = CudaRNGStatesTracker()
        tracker.add("other", 5)
        inside = []
        for _ in range(2):
            with tracker.fork("other"):
                inside.append(torch.rand(1).item())
        return inside, [torch.rand(1).item()]

    torch.manual_seed(5)
    expected_inside = [torch.rand(1).item(), torch.rand(1).item()]
    torch.manual_seed(1)
    expected_outside = [torch.rand(1).item()]
    with patches.applied("cpu.device"):
        assert drawn() == (expected_inside, expected_outside)


def test_initialize_is_told_that_no_cuda_is_fine() -> None:
    from megatron.training import training

    with pytest.raises(AssertionError, match="Megatron requires CUDA"):
        training.initialize_megatron()
    with patches.applied("cpu.initialize"), pytest.raises(AssertionError, match="args is not initialized"):
        training.initialize_megatron()  # past the CUDA check: now it misses the parsed arguments


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_rotary_positions_are_cut_as_upstream_cuts_batches(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's index of positions is in page-locked memory and is moved to CUDA."""
    from megatron.core.models.common.embeddings import rotary_pos_embedding, yarn_rotary_pos_embedding
    from megatron.core.utils import get_batch_on_this_cp_rank

    from megatron.longseq.attention.plan.layout import Layout, Mesh

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group.size())
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group.rank())
    layout, positions = Layout(Mesh(ranks, 1), (12 * ranks,)), torch.arange(12 * ranks)
    with patches.applied("cpu.device"):
        for rank in range(ranks):
            group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
            batch = get_batch_on_this_cp_rank({"tokens": positions[None]}, is_hybrid_cp=False, cp_group=group)
            own = [position for span in layout.positions(rank, 0) for position in range(*span)]
            assert batch["tokens"][0].tolist() == own
            for module in (rotary_pos_embedding, yarn_rotary_pos_embedding):
                assert module.get_pos_emb_on_this_cp_rank(positions[:, None], 0, group)[:, 0].tolist() == own
