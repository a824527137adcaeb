"""A unit's parameters are gathered in its forward and backward and one unit ahead, and at no other time."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.longseq.sharding.runtime.unit_hooks import GatherHooks, Unit


class FakeStore:
    """Says which units hold it, and writes down gathers."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.users, self.is_whole = name, log, set(), False

    def finish_sync(self) -> None:
        """Send nothing."""

    def gather(self, user: str, *, is_pooled: bool = True) -> None:
        """Record what a real gather would send."""
        self.users.add(user)
        if not self.is_whole:
            self.is_whole = True
            self.log.append(f"+{self.name}")

    def wait(self) -> None:
        """Return at once."""

    def release(self, user: str) -> None:
        """Record the release of the last gather."""
        self.users.discard(user)
        if self.is_whole and not self.users:
            self.is_whole = False
            self.log.append(f"-{self.name}")


class Layer(torch.nn.Linear):
    """A layer that can be used only while its store is whole, forward and backward."""

    def __init__(self, store: FakeStore, is_read_backward: bool) -> None:
        super().__init__(4, 4)
        self.store, self.is_read_backward = store, is_read_backward

    def forward(self, x: Tensor) -> Tensor:
        assert self.store.is_whole
        y = super().forward(x)
        if y.requires_grad:
            assert y.grad_fn is not None
            y.grad_fn.register_prehook(self._check)
        return y

    def _check(self, *unused: object) -> None:
        assert self.store.is_whole or not self.is_read_backward


class Model:
    """Layers a, b, c as units."""

    def __init__(self, names: str = "abc", without_backward: Sequence[str] = ()) -> None:
        self.log: list[str] = []
        self.stores = [FakeStore(name, self.log) for name in names]
        self.layers = [Layer(store, store.name not in without_backward) for store in self.stores]
        units = [
            Unit(store.name, layer, [store], store.name not in without_backward)  # type: ignore[list-item]
            for store, layer in zip(self.stores, self.layers, strict=True)
        ]
        self.uses = GatherHooks(units)
        self.step()  # forward tells in which order units follow
        self.log.clear()

    def step(self, recompute: int = 0) -> None:
        """Run forward and backward."""
        x = torch.ones(2, 4, requires_grad=True)
        for at in range(0, len(self.layers), recompute or 1):
            part = self.layers[at : at + (recompute or 1)]
            run = torch.nn.Sequential(*part)
            x = checkpoint(run, x, use_reentrant=True) if recompute else run(x)
        x.sum().backward()

    def take(self) -> list[str]:
        """Return and forget what was gathered (+) and released (-)."""
        taken, self.log[:] = list(self.log), []
        return taken


FORWARD = ["+a", "+b", "-a", "+c", "-b", "-c"]
BACKWARD = ["+c", "+b", "-c", "+a", "-b", "-a"]


def test_the_next_unit_comes_while_one_computes() -> None:
    model = Model()
    model.step()
    assert model.take() == FORWARD + BACKWARD
    model.step()
    assert model.take() == FORWARD + BACKWARD


@pytest.mark.parametrize("layers", [1, 3])
def test_recomputation_gathers_no_more_often(layers: int) -> None:
    model = Model()
    model.step(recompute=layers)
    taken = model.take()
    assert [taken.count(f"+{name}") for name in "abc"] == [2, 2, 2]
    assert not any(store.is_whole for store in model.stores)


def test_a_unit_without_backward_is_gathered_once() -> None:
    model = Model(without_backward=["a"])
    model.step()
    taken = model.take()
    assert taken.count("+a") == 1 and taken.count("+b") == 2


def test_a_unit_that_no_backward_reaches_is_gathered_once() -> None:
    model = Model()
    model.layers[0].requires_grad_(False)
    model.uses.units[0].is_reached = False  # as at the start
    for _ in range(2):
        x = model.layers[0](torch.ones(2, 4)).detach()
        model.layers[2](model.layers[1](x)).sum().backward()
    assert model.take().count("+a") == 2


def test_evaluation_gathers_once() -> None:
    model = Model()
    with torch.no_grad():
        torch.nn.Sequential(*model.layers)(torch.ones(2, 4))
    assert model.take() == FORWARD


def test_two_forwards_before_their_backwards() -> None:
    model = Model()
    outputs = [torch.nn.Sequential(*model.layers)(torch.ones(2, 4, requires_grad=True)) for _ in range(2)]
    assert model.take() == FORWARD * 2
    for output in outputs:
        output.sum().backward()
    assert model.take() == BACKWARD * 2


def test_all_are_whole_until_the_first_use() -> None:
    model = Model()
    model.uses.gather_all()
    assert model.take() == ["+a", "+b", "+c"]
    model.step()
    assert model.take() == ["-a", "-b", "-c", *FORWARD, *BACKWARD]
    model.step()
    assert model.take() == [*FORWARD, *BACKWARD]
    model.uses.gather_all()
    model.uses.release_all()
    assert model.take() == ["+a", "+b", "+c", "-a", "-b", "-c"]
