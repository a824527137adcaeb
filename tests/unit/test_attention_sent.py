"""The bytes and messages that emulated ranks send equal the formulas."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.longseq.attention.plan.comm_volume import (
    LayerShape,
    Volume,
    all_to_all,
    peer_all_to_all,
    peer_ring,
    ring,
)
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.ranges import size
from megatron.longseq.attention.plan.ring_schedule import Ring, plan_transfers
from megatron.longseq.attention.plan.tiles import Mask
from megatron.longseq.attention.runtime.strategies import CPStrategy
from megatron.longseq.distributed import SentCounter
from tests.unit.context_run import Problem, Ranks, all_gather
from tests.unit.test_attention_context import DOCUMENTS, MESHES

NOTHING = Volume(0, 0, 0, 0)
CHANNELS = ("kv", "grads", "far_kv", "far_grads")


def of_ring(strategy: CPStrategy) -> list[Any]:
    return [getattr(strategy.ring, name) for name in CHANNELS]


def of_exchange(strategy: CPStrategy) -> list[Any]:
    return [strategy.ulysses] if strategy.ulysses else []


def of_gather(strategy: CPStrategy) -> list[Any]:
    return [strategy.gather] if strategy.gather else []


def total(strategies: Sequence[CPStrategy], of: Callable[[CPStrategy], list[Any]]) -> SentCounter:
    """Return the sum over ranks."""
    sent = [channel.sent for strategy in strategies for channel in of(strategy)]
    return SentCounter(sum(one.bytes for one in sent), sum(one.messages for one in sent))


def counted(problem: Problem, **kwargs: Any) -> list[Volume]:
    """Return what a forward and a backward sent: by all-to-all, around the ring, in gathers."""
    joined = problem.strategies()
    kinds = (of_exchange, of_ring, of_gather)
    ranks = Ranks(problem, problem.inputs(), joined, **kwargs).forward()
    forward = [total(joined, of) for of in kinds]
    ranks.backward()
    both = [total(joined, of) for of in kinds]
    return [
        Volume(first.bytes, end.bytes - first.bytes, first.messages, end.messages - first.messages)
        for first, end in zip(forward, both, strict=True)
    ]


@pytest.mark.parametrize("lengths", [(64,), (32, 16, 16)], ids=str)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_bytes_and_messages_are_the_formulas(mesh: tuple[int, int], lengths: tuple[int, ...]) -> None:
    for heads in ((8, 8), (8, 2), (8, 1)):
        problem = Problem(Mesh(*mesh), heads, lengths, dim=4, dtype=torch.bfloat16)
        strategy, around, _ = counted(problem)
        assert strategy == all_to_all(problem.setup)
        assert around == ring(problem.setup)
        assert (strategy == NOTHING) == (mesh[0] == 1) and (around == NOTHING) == (mesh[1] == 1)


@pytest.mark.parametrize(("mesh", "inner"), [((1, 4), 1), ((1, 4), 2), ((2, 4), 2), ((1, 8), 2), ((1, 8), 4)])
@pytest.mark.parametrize("lengths", [(64,), (32, 16, 16)], ids=str)
def test_windows_of_a_double_ring_send_as_much(mesh: tuple[int, int], inner: int, lengths: tuple[int, ...]) -> None:
    problem = Problem(Mesh(*mesh), (8, 2), lengths, dim=4, inner=inner, dtype=torch.bfloat16)
    plain = replace(problem, inner=None)
    _, around, _ = counted(problem)
    assert around == ring(problem.setup, inner) and around.bytes == ring(plain.setup).bytes


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("repeats", [False, True])
def test_gathered_keys_are_gathered_again_where_nothing_kept_them(mesh: tuple[int, int], repeats: bool) -> None:
    """With segments the KV cache holds them, also for a recomputed forward."""
    problem = Problem(Mesh(*mesh), (8, 2), dim=4, gathers=True, dtype=torch.bfloat16)
    strategy, around, gather = counted(problem, repeats=repeats)
    assert around == NOTHING and gather == all_gather(problem.setup, kept=False)
    once = all_to_all(problem.setup)
    again = once.forward_bytes if repeats else 0  # the heads of a repeated forward, and its outputs
    assert (strategy.forward_bytes, strategy.backward_bytes) == (once.forward_bytes, once.backward_bytes + again)
    split = replace(problem, lengths=(32, 16, 16))
    _, _, gather = counted(split, repeats=repeats)
    assert gather == all_gather(split.setup, kept=True)


@pytest.mark.parametrize("masked", [{"window": 5}, {"documents": DOCUMENTS}, {"documents": DOCUMENTS, "window": 9}])
@pytest.mark.parametrize(("ranks", "inner"), [(4, 4), (8, 2)])
def test_rows_that_nobody_sees_stay_behind(ranks: int, inner: int, masked: dict[str, Any]) -> None:
    problem = Problem(Mesh(1, ranks), lengths=(48, 16), dim=4, inner=inner, dtype=torch.bfloat16, **masked)
    _, around, _ = counted(problem)
    mask, layout = Mask(problem.batch, problem.window, problem.documents), problem.layout
    rows, messages = [0, 0], [0, 0]
    for segment in range(len(problem.lengths)):
        shards = layout.shards(range(segment, segment + 1)), layout.shards(range(segment + 1))
        for kind, moves in enumerate(plan_transfers(Ring(ranks, inner), *shards, mask)):
            rows[kind] += sum(size(move.rows) for move in moves)
            messages[kind] += 2 * len(moves)  # keys and values
    keys, grads = problem.setup.key_elements(rows[0]) * 2, problem.setup.key_elements(rows[1]) * 4
    assert around == Volume(keys, keys + grads, messages[0], sum(messages))
    assert around.bytes < ring(problem.setup, inner).bytes


def test_a_repeated_forward_sends_no_keys_round_again() -> None:
    problem = Problem(Mesh(1, 4), dim=4, dtype=torch.bfloat16)
    _, around, _ = counted(problem, repeats=True)
    assert around == ring(problem.setup)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_goal_ring_bytes_beside_the_peers(ranks: int) -> None:
    """Keys and values send 0.75 of the peers' bytes for every R; with gradients 0.5 (R = 2) up to 0.75 (large R)."""
    problem = Problem(Mesh(1, ranks), dim=4, dtype=torch.bfloat16)
    _, ours, _ = counted(problem)
    theirs = peer_ring(problem.setup)
    assert ours.forward_bytes == 0.75 * theirs.forward_bytes
    keys, grads = 2 * (ranks - 1), 2 * ranks  # volumes of a rank's keys in the inputs' type; gradients are float32
    assert ours.bytes / theirs.bytes == pytest.approx(0.75 * (keys + ranks - 1 + ranks - 1) / (keys + grads))
    assert ours.bytes <= 0.75 * theirs.bytes


def test_goal_all_to_all_bytes_beside_repeated_heads() -> None:
    """At Hq 32, Hk 4, U 8 a token sends 80 heads instead of 128."""
    problem = Problem(Mesh(8, 1), (32, 4), (16,), batch=1, dim=2, dtype=torch.bfloat16)
    ours, _, _ = counted(problem)
    theirs = peer_all_to_all(problem.setup, repeated=True)
    assert ours.bytes / theirs.bytes == 80 / 128 <= 0.65
    assert (ours.forward_messages, theirs.forward_messages) == (2 * 8, 4 * 8)
    setup = LayerShape(Layout(Mesh(8, 1), (1 << 15,)), Heads(32, 4))
    assert all_to_all(setup).bytes / peer_all_to_all(setup, repeated=True).bytes == 80 / 128
