"""The chunked cross entropy equals upstream's GPTModel and PyTorch's cross entropy, and never holds whole logits."""

import pytest
import torch

from megatron.longseq.cross_entropy.runtime.function import ChunkedLossCall, _WeightGrad
from tests.pool import RankPool
from tests.unit.chunked_loss_bed import (
    BATCH,
    HIDDEN,
    SEQUENCE,
    VOCABULARY,
    Case,
    differences,
    fused_differences,
    largest_tensors,
    products,
    pytorch_difference,
    rounding,
)

# Sums of 512 logits, 192 tokens or 16 channels in another order: n eps is 1e-13.
REASSOCIATION = 1e-12

ONE_RANK = {
    "whole model": Case(),
    "tied": Case(tied=True),
    "last stage": Case(tail=True),
    "last stage, tied": Case(tail=True, tied=True),
    "muP": Case(tail=True, config={"use_mup": True, "mup_base_hidden_size": 4, "mup_output_mult": 0.25}),
    "main gradients": Case(main=True, overlaps=False),
    "main gradients, tied, overlapped reduction": Case(main=True, tied=True),
    "main gradients, last stage, overlapped reduction": Case(main=True, tail=True),
    "frozen output layer": Case(tail=True, frozen="output_layer"),
    "frozen below the output layer": Case(tail=True, frozen="decoder"),
    "nothing trained": Case(tail=True, frozen=""),
}
TWO_RANKS = {
    "tensor parallel": Case(),
    "tensor parallel, last stage": Case(tail=True),
    "sequence parallel": Case(sequence_parallel=True),
    "sequence parallel, tied": Case(sequence_parallel=True, tied=True),
    "sequence parallel, last stage": Case(sequence_parallel=True, tail=True),
    "sequence parallel, frozen output layer": Case(sequence_parallel=True, tail=True, frozen="output_layer"),
}


@pytest.mark.parametrize(("tp", "cases"), [(1, ONE_RANK), (2, TWO_RANKS)], ids=["1", "2"])
def test_equals_upstreams_model_in_float64(ranks: RankPool, tp: int, cases: dict[str, Case]) -> None:
    """Losses and gradients of all parameters and hidden states agree for all chunk sizes and a random mask."""
    for found in ranks.run(tp, differences, list(cases.values()), tp):
        assert {name: apart for name, apart in zip(cases, found, strict=True) if not apart <= REASSOCIATION} == {}


@pytest.mark.parametrize(("tp", "gathers"), [(1, False), (2, False), (2, True)])
def test_equals_pytorchs_cross_entropy(ranks: RankPool, tp: int, gathers: bool) -> None:
    assert max(ranks.run(tp, pytorch_difference, tp, gathers)) <= REASSOCIATION


def test_weight_gradients_are_added_to_main_gradients_by_upstreams_kernel(ranks: RankPool) -> None:
    """Upstream's data-parallel wrapper reduces main gradients while backward runs.

    The stand-in for the kernel adds in float32, so the sums over tokens are equal within float32's rounding.
    """
    (found,) = ranks.run(1, fused_differences, [Case(fused=True, tail=True), Case(fused=True, tied=True)])
    assert max(found) <= 1e-5


@pytest.mark.parametrize(("tp", "case"), [(1, Case()), (2, Case(sequence_parallel=True))], ids=["1", "2"])
def test_no_tensor_has_the_size_of_whole_logits(ranks: RankPool, tp: int, case: Case) -> None:
    logits = BATCH * SEQUENCE * VOCABULARY // tp
    scores = BATCH * 2 // tp * SEQUENCE**2  # of the two attention heads: what is left
    for whole, chunked, as_whole in ranks.run(tp, largest_tensors, case, tp, [None, 16, 10_000]):
        assert whole >= logits and as_whole >= logits
        assert chunked <= max(scores, VOCABULARY * HIDDEN) < logits


def test_bf16_is_as_exact_as_upstreams(ranks: RankPool) -> None:
    (found,) = ranks.run(1, rounding, 1)
    assert all(0 < ours <= 1.5 * theirs for theirs, ours in found), found


def test_the_weights_gradient_is_added_up_in_float32() -> None:
    """In bf16 a sum of ones stops at 256."""
    total = _WeightGrad(torch.zeros(3, 2, dtype=torch.bfloat16), ChunkedLossCall(1, group=None))
    for _ in range(1000):
        total.add(torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16))
    gradient = total.finish()
    assert gradient is not None and gradient.dtype is torch.bfloat16 and gradient.eq(1000).all()


def test_main_gradients_of_16_bits_get_one_rounded_sum() -> None:
    """Wider ones are added to directly, and nothing of the weight's size is made."""
    for dtype, expected in ((torch.bfloat16, None), (torch.float32, 1000)):
        weight = torch.zeros(3, 2, dtype=torch.bfloat16)
        weight.main_grad = torch.zeros(3, 2, dtype=dtype)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        total = _WeightGrad(weight, ChunkedLossCall(1, group=None, needs_gradient=False))
        for _ in range(1000):
            total.add(torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16))
        gradient = total.finish()
        assert (gradient is None) == (expected is not None)
        assert (weight.main_grad if gradient is None else gradient).eq(1000).all()  # type: ignore[attr-defined]


def test_backward_computes_the_logits_once_more(ranks: RankPool) -> None:
    """A token costs four products, where upstream computes three."""
    one = 2 * BATCH * SEQUENCE * VOCABULARY // 2 * HIDDEN
    for whole, chunked in ranks.run(2, products, Case(sequence_parallel=True), 2, 31):
        assert chunked - whole == one
