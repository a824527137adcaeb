"""With recomputation attention runs once, and its kept results are freed."""

import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import patches
from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.attention.runtime.function import AttentionCall, RecomputeCache, attend_once, make_call
from patches.usp import runtime
from tests.unit.attention_bed import SCALE
from tests.unit.context_bed import strategies
from tests.unit.test_attention_context import Counting

RECORDS = ("cpu.device", "recompute.checkpoint", "usp.recompute-cache")
TOKENS, WIDTH = 37, 16  # a number of tokens that nothing else has


class Layers:
    """Two attention layers in one recomputed function, with a projection each."""

    def __init__(self, kept: RecomputeCache) -> None:
        torch.manual_seed(0)
        self.kernel, self.kept, self.strategy = Counting(), kept, strategies(Mesh(1, 1))[0]
        self.weights = [torch.randn(WIDTH, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def __call__(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            q = (x @ weight).unflatten(2, (2, -1))

            def call_for(_: Any, q: Tensor = q) -> AttentionCall:
                return make_call(q, q, self.strategy, self.kernel, SCALE)

            x = x + attend_once(q, q, q, self.kept, call_for)
        return x


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Layers]:
    kept = RecomputeCache()
    monkeypatch.setattr(runtime, "current_context", lambda: SimpleNamespace(recompute_cache=kept))
    with patches.applied(RECORDS):
        yield Layers(kept)


def given(seed: int, wants_gradient: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, 1, WIDTH, generator=generator, dtype=torch.float64).requires_grad_(wants_gradient)


def recomputed(layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    from megatron.core import tensor_parallel

    return tensor_parallel.checkpoint(layers, False, x)


def gradients(layers: Layers, out: Tensor, *further: Tensor) -> list[Tensor]:
    for weight in layers.weights:
        weight.grad = None
    out.square().sum().backward()
    return [x.grad.clone() for x in (*layers.weights, *further) if x.grad is not None]


def alive() -> int:
    """Return tensors with a row or a column for each token."""
    gc.collect()
    return sum(1 for x in gc.get_objects() if type(x) is Tensor and TOKENS in x.shape)


def test_attention_of_a_recomputed_layer_runs_once(layers: Layers) -> None:
    one, other = given(1), given(1)
    expected = gradients(layers, layers(other), other)
    assert layers.kernel.forwards == 2
    out = recomputed(layers, one)
    assert layers.kernel.forwards == 4
    assert all(torch.equal(a, b) for a, b in zip(gradients(layers, out, one), expected, strict=True))
    assert layers.kernel.forwards == 4, "the repetition took what the first forward had kept"


def test_where_the_input_is_frozen_the_weights_get_their_gradients(layers: Layers) -> None:
    """Upstream's own recomputation gives them none."""
    expected = gradients(layers, layers(given(1, False)))
    assert len(expected) == 2
    out = recomputed(layers, given(1, False))
    assert all(torch.equal(a, b) for a, b in zip(gradients(layers, out), expected, strict=True))


@pytest.mark.slow  # upstream compiles an extension for it, for half a minute
def test_recomputed_outputs_that_are_thrown_away(layers: Layers) -> None:
    """In upstream's other kind of recomputation, only the linear layer after it uses the output."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    scale = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)
    weight = layers.weights[0]

    def run(x: Tensor) -> list[Tensor]:
        scale.grad = None
        recompute = CheckpointWithoutOutput()
        recompute.fp8 = False  # upstream's switch is never off, and asks for TransformerEngine
        out = recompute.checkpoint(lambda y: y.tanh() * scale, x) @ weight
        recompute.discard_output_and_register_recompute(out)
        return gradients(layers, out, scale, x)

    def plainly(x: Tensor) -> list[Tensor]:
        scale.grad = None
        return gradients(layers, (x.tanh() * scale) @ weight, scale, x)

    with patches.applied(("recompute.without-output",)):
        for wants_gradient in (True, False):
            found, expected = run(given(1, wants_gradient)), plainly(given(1, wants_gradient))
            assert len(found) == len(expected) == 2 + wants_gradient
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def lost_forward(layers: Layers) -> None:
    recomputed(layers, given(2))


def frozen_forward(layers: Layers) -> None:
    recomputed(layers, given(2, False))


def evaluation(layers: Layers) -> None:
    with torch.no_grad():
        recomputed(layers, given(2))


def raised_in_the_layer(layers: Layers) -> None:
    def broken(x: Tensor) -> Tensor:
        layers(x)
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        recomputed(broken, given(2))


def raised_in_backward(layers: Layers) -> None:
    def spoil(grad: Tensor) -> None:
        raise FloatingPointError

    out = recomputed(layers, given(2))
    out.register_hook(spoil)
    with pytest.raises(FloatingPointError):
        out.sum().backward()


def recomputed_twice(layers: Layers) -> None:
    out = recomputed(layers, given(2))
    out.sum().backward(retain_graph=True)
    out.sum().backward()


@pytest.mark.parametrize(
    "event",
    [
        lost_forward,
        *(
            pytest.param(event, marks=pytest.mark.slow)
            for event in (frozen_forward, evaluation, raised_in_the_layer, raised_in_backward, recomputed_twice)
        ),
    ],
)
def test_nothing_is_left_and_nobody_takes_anothers(layers: Layers, event: Callable[[Layers], None]) -> None:
    one, other = given(3), given(3)
    expected = gradients(layers, layers(other), other)
    before = alive()
    for _ in range(3):
        event(layers)
        assert layers.kept.active is None
    assert alive() == before
    found = gradients(layers, recomputed(layers, one), one)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
