"""What a rank holds while it attends: no step's own output, three buffers of keys however long the ring, and of an
exchange what leaves and what comes.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megatron.longseq.attention.kernels.torch_cpu import CpuFlash
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.runtime.ulysses import Ulysses
from tests.unit import context_bed
from tests.unit.context_run import Problem, Ranks

ROWS = 32  # of a rank, in every ring
KEY_HEADS = 2  # tell tensors of keys and of values from others


class LiveTensors(TorchDispatchMode):
    """Tensors that were made under it and are still there: all, and those of keys, values and their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int, bool]] = {}
        self.peak_bytes = self.peak_keys = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                keys = tensor.dim() == 4 and tensor.shape[2] == KEY_HEADS and tensor.dtype == torch.float32
                before = self.alive.get(storage._cdata)
                known = before is not None and before[2] and not before[0].expired()  # or another at its place
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), keys or known
        self.alive = {place: kept for place, kept in self.alive.items() if not kept[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size, _ in self.alive.values()))
        self.peak_keys = max(self.peak_keys, sum(keys for _, _, keys in self.alive.values()))
        return result


@dataclass
class OutputCountingKernel(CpuFlash):
    """A kernel that counts, on every rank, how many of its outputs are there when it is called again."""

    most: int = 0
    outs: dict[int, list[StorageWeakRef]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def forward(self, *args: Any) -> Any:
        mine = self.outs.setdefault(threading.get_ident(), [])
        mine[:] = [ref for ref in mine if not ref.expired()]
        self.most = max(self.most, len(mine))
        out, lse = super().forward(*args)
        mine.append(StorageWeakRef(out.untyped_storage()))
        return out, lse


@contextmanager
def unseen_messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Do not count copies that the emulated network makes."""
    put, wait = context_bed.Wire.put, context_bed.ThreadP2P.post

    def hidden(function: Any) -> Any:
        def call(*args: Any) -> Any:
            with _disable_current_modes():
                return function(*args)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(context_bed.Wire, "put", hidden(put))
        patched.setattr(context_bed.ThreadP2P, "post", hidden(wait))
        yield


def problem_of(ranks: int, **more: Any) -> Problem:
    return Problem(Mesh(1, ranks), (4, KEY_HEADS), (ROWS * ranks,), batch=1, dtype=torch.float32, **more)


def most_held(problem: Problem, backward: bool) -> tuple[int, int]:
    """Most bytes, and most buffers of keys, that any rank had made and held in one direction."""
    ranks = Ranks(problem, problem.inputs())

    def watched(job: Any) -> list[LiveTensors]:
        def run(rank: int) -> LiveTensors:
            with LiveTensors() as seen:
                job(rank)
            return seen

        return ranks.on_each(run)

    forward = watched(ranks.forward_of)
    seen = watched(ranks.backward_of) if backward else forward
    return max(one.peak_bytes for one in seen), max(one.peak_keys for one in seen)


@pytest.mark.parametrize("backward", [False, True])
def test_a_longer_ring_holds_no_more(monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    with unseen_messages(monkeypatch):
        short, longer = (most_held(problem_of(ranks), backward) for ranks in ((8, 16) if backward else (4, 16)))
    assert short == longer
    # Keys and values. Forward: its own, the step's, those on their way. Backward: gradients of its own, of the step, on
    # their way here, and on their way home, too.
    assert longer[1] == 2 * (8 if backward else 3)


@pytest.mark.parametrize("inner", [2, 4])
def test_a_double_ring_holds_two_buffers_more(monkeypatch: pytest.MonkeyPatch, inner: int) -> None:
    """The two buffers travel between windows, one out and one in."""
    with unseen_messages(monkeypatch):
        assert most_held(problem_of(16, inner=inner), backward=False)[1] == 2 * 5


@pytest.mark.parametrize("ranks", [2, 8])
def test_no_steps_own_output_is_kept(ranks: int) -> None:
    kernel = OutputCountingKernel()
    problem = replace(problem_of(ranks), kernel=kernel)
    Ranks(problem, problem.inputs()).forward()
    assert kernel.most == 1  # the first step's, into which the others are merged


class Echo:
    """An exchange that brings what was sent, and remembers where that lay."""

    place = 0

    def all_to_all(self, sent: Tensor) -> Tensor:
        self.place = sent.untyped_storage().data_ptr()
        return sent.clone()


@pytest.mark.parametrize("kv", [8, 4])
def test_what_came_is_unpacked_where_it_was_packed(kv: int) -> None:
    received_rows, echo = Layout(Mesh(4, 1), (4 * ROWS,)).received_rows(range(1)), Echo()
    exchange = Ulysses(4, Heads(8, kv), received_rows, echo)  # type: ignore[arg-type]
    q, k, v = (torch.randn(ROWS, 1, heads, 8) for heads in (8, kv, kv))

    def share_storage(*results: Tensor) -> bool:
        return all(result.untyped_storage().data_ptr() == echo.place for result in results)

    heads, keys = exchange.scatter_heads(q, k, v)
    assert share_storage(heads, *keys) and all(x.is_contiguous() for x in (heads, *keys))
    assert share_storage(exchange.gather_outputs(heads))
    assert share_storage(exchange.scatter_gradient(q))
    assert share_storage(*exchange.gather_gradients([heads, *keys]))


def test_a_segments_queries_keep_nothing_else_alive() -> None:
    """The segment's keys arrive in the same tensor and are copied into the KV cache."""
    problem = Problem(Mesh(2, 1), (4, KEY_HEADS), (32, 16, 16))
    for parts in Ranks(problem, problem.inputs()).forward().parts:
        for part in parts:
            assert part.out is not None
            q = part.out.grad_fn.saved_tensors[0]  # type: ignore[union-attr]
            assert q.untyped_storage().nbytes() == q.nbytes
