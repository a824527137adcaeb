"""Many documents in a few launches: right, as few, and as cheap as they should be."""

import gc
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.longseq.attention.kernels import torch_cpu
from megatron.longseq.attention.kernels.base import BackwardInputs, Kernel, PackedLengths, Scores, copy_to
from megatron.longseq.attention.kernels.flash_cuda import FlashAttn, FlashAttn3
from megatron.longseq.attention.kernels.padded import padded_batches
from megatron.longseq.attention.kernels.reference import Reference
from megatron.longseq.attention.kernels.torch_cpu import CpuFlash
from megatron.longseq.attention.plan.launches import Launch
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.layout_choice import document_pieces
from megatron.longseq.attention.plan.ranges import (
    Documents,
    RowFinder,
    TokenRange,
    TokenRanges,
    difference,
    intersection,
    size,
    union,
)
from megatron.longseq.attention.plan.ring_schedule import Ring, plan_all_gather, plan_layout_ring
from megatron.longseq.attention.plan.tiles import Mask, plan_causal
from megatron.longseq.attention.runtime.packing import index_of
from tests.unit.attention_bed import assert_close, tensors
from tests.unit.context_run import Problem, run
from tests.unit.flash_bed import early_flash_attn_3, flash_attn_2, flash_attn_3, install
from tests.unit.test_attention_blocks import packed
from tests.unit.test_attention_layout import numbers

LENGTHS = [1, 2, 3, 5, 7, 11, 1, 13, 64, 2, 97, 1]
MASKS: dict[str, tuple[Scores, Callable[[int], int]]] = {  # scores, keys of a block of so many rows
    "causal squares": (Scores(0.3, True), lambda rows: rows),
    "all keys, twice as many as rows": (Scores(0.3), lambda rows: 2 * rows),
    "all keys, any number": (Scores(0.3), lambda rows: 1 + (5 * rows) % 23),
    "causal window": (Scores(0.3, True, 4), lambda rows: rows),
    "causal window with earlier keys": (Scores(0.3, True, 4), lambda rows: rows + 4),
    "window without a diagonal": (Scores(0.3, False, 9), lambda rows: rows + rows % 5),
}


@pytest.fixture(params=["cpu", "reference", "flash_attn 2", "flash_attn 3", "early flash_attn 3"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Return each kernel that runs here. Those of flash-attn are stand-ins that compute by the reference."""
    if request.param in ("cpu", "reference"):
        return CpuFlash() if request.param == "cpu" else Reference()
    made = {"flash_attn 2": flash_attn_2, "flash_attn 3": flash_attn_3, "early flash_attn 3": early_flash_attn_3}
    install(monkeypatch, made[request.param]())
    return FlashAttn() if request.param == "flash_attn 2" else FlashAttn3()


def one_by_one(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scores: Scores, lengths: PackedLengths) -> list[Tensor]:
    """Return out, lse, dq, dk, dv of packed blocks by autograd, block by block."""
    parts = []
    by_rows = [x.split(list(lengths.rows)) for x in (q, grad)]
    by_keys = [x.split(list(lengths.keys)) for x in (k, v)]
    for block_q, block_grad, block_k, block_v in zip(*by_rows, *by_keys, strict=True):
        leaves = [x.detach().requires_grad_() for x in (block_q, block_k, block_v)]
        keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in leaves[1:])
        row, key = torch.arange(len(block_q))[:, None] + len(block_k) - len(block_q), torch.arange(len(block_k))
        hidden = (scores.causal & (key > row)) | (key < row - (scores.window if scores.window is not None else 10**6))
        logits = (torch.einsum("sbhd,tbhd->bhst", leaves[0], keys) * scores.scale).masked_fill(hidden, -torch.inf)
        out = torch.einsum("bhst,tbhd->sbhd", logits.softmax(-1), values)
        parts.append([out.detach(), logits.logsumexp(-1).detach().mT, *torch.autograd.grad(out, leaves, block_grad)])
    out, lse, *grads = (torch.cat(x, 1 if x[0].dim() == 3 else 0) for x in zip(*parts, strict=True))
    return [out, lse.mT, *grads]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
def test_packed_blocks_are_blocks_one_by_one(kernel: Kernel, mask: str, heads: tuple[int, int]) -> None:
    scores, keys_of = MASKS[mask]
    lengths = PackedLengths(tuple(LENGTHS), tuple(keys_of(rows) for rows in LENGTHS))
    t, s = sum(lengths.rows), sum(lengths.keys)
    q, k, v, grad = tensors([(t, 1, heads[0], 8), (s, 1, heads[1], 8), (s, 1, heads[1], 8), (t, 1, heads[0], 8)])
    if scores.window is not None and not scores.causal and isinstance(kernel, FlashAttn | FlashAttn3):
        wide = PackedLengths((*lengths.rows[:-1], 9), (*lengths.keys[:-1], 1))
        with pytest.raises(ValueError, match="sliding window with 1 keys and 9 queries"):
            kernel.forward_packed(q, k, v, scores, wide)
    out, lse = kernel.forward_packed(q, k, v, scores, lengths)
    grads = kernel.backward_packed(BackwardInputs(grad, q, k, v, out, lse), scores, lengths)
    assert_close([out, lse, *grads], one_by_one(q, k, v, grad, scores, lengths), 200)


def test_copies_to_a_gpu_do_not_make_the_host_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[object] = []

    def to(x: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        copies.append((device.type, non_blocking))
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: copies.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", to)
    device = torch.device("cuda")
    PackedLengths((1, 2), (3, 4)).offsets(device)
    index_of([TokenRange(0, 2), TokenRange(5, 9)], device)
    assert copies == ["pinned", ("cuda", True)] * 3
    copies.clear()
    there: Any = SimpleNamespace(device=device)  # a script may have put its tensor there, which cannot be pinned
    there.to = lambda *given, **named: to(there, *given, **named)
    assert copy_to(there, device) is there and copies == [("cuda", False)]


@st.composite
def documents(draw: st.DrawFn, tokens: int, batch: int, border: int) -> Documents:
    """Return documents of random lengths, some of which end where chunks end."""
    sequences = []
    for _ in range(batch):
        ends = draw(st.sets(st.integers(1, tokens - 1), max_size=tokens // 2))
        ends |= {border * end for end in draw(st.sets(st.integers(1, tokens // border - 1), max_size=3))}
        cuts = [0, *sorted(ends), tokens]
        sequences.append(packed([b - a for a, b in pairwise(cuts)]))
    return Documents(tuple(sequences))


WAYS: list[dict[str, Any]] = [
    {"mesh": Mesh(1, 1)},
    {"mesh": Mesh(1, 1), "lengths": (40, 20, 36)},
    {"mesh": Mesh(1, 2)},
    {"mesh": Mesh(2, 2), "lengths": (32, 48, 16)},
    {"mesh": Mesh(1, 4), "inner": 2},
    {"mesh": Mesh(1, 6), "inner": 3},
    {"mesh": Mesh(1, 4), "gathers": True, "lengths": (64, 32)},
]


@settings(max_examples=60)
@given(st.data())
def test_random_documents_equal_dense_attention(data: st.DataObject) -> None:
    way = data.draw(st.sampled_from(WAYS))
    problem = Problem(
        **{"lengths": (96,), **way},
        heads=data.draw(st.sampled_from([(4, 2), (2, 2)])) if way["mesh"].ulysses == 1 else (4, 2),
        batch=data.draw(st.sampled_from([1, 1, 3])),
        window=data.draw(st.sampled_from([None, None, 0, 7, 40])),
        kernel=data.draw(st.sampled_from([CpuFlash(), Reference()])),
    )
    found = data.draw(documents(96, problem.batch, 96 // (2 * problem.mesh.size)))
    pieces = None
    if data.draw(st.booleans()):
        pieces = document_pieces(Documents(found.spans[:1]), problem.lengths, problem.mesh.size)
    problem = Problem(**{**vars(problem), "documents": found, "pieces": pieces})
    assert_close(run(problem), problem.expected(problem.inputs()), 96)


def test_a_block_as_long_as_the_rows_that_a_rank_sums() -> None:
    """In this double ring a block has as many keys as the rank sums gradients of, but not the same ones."""
    found = Documents((packed([1, 1, 23, 26, 14, 31]),))
    pieces = document_pieces(found, (96,), 4)
    problem = Problem(mesh=Mesh(1, 4), inner=2, lengths=(96,), heads=(4, 2), batch=1, documents=found, pieces=pieces)
    assert_close(run(problem), problem.expected(problem.inputs()), 96)


class Launches:
    """Counts calls of the CPU operators, and the scores that they compute."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.scores: Counter[str] = Counter()
        for name in ("_forward", "_backward"):
            monkeypatch.setattr(torch_cpu, name, self._counting(name, getattr(torch_cpu, name)))

    def _counting(self, name: str, operator: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            q, k = given[-5:-3] if name == "_forward" else given[1:3]
            self.calls[name] += 1
            self.scores[name] += q.shape[0] * q.shape[2] * k.shape[2]
            return operator(*given, **named)

        return call


def random_lengths(count: int, tokens: int, seed: int = 0) -> list[int]:
    """Return lengths of documents that sum to the given tokens."""
    cuts = sorted(random.Random(seed).sample(range(1, tokens), count - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]


MIXED = [1] * 500 + [2, 3] * 50 + [4096, 1000, 1024, 17, 640, 500, 1531, 130]


@pytest.mark.parametrize(
    "lengths",
    [random_lengths(3000, 8192), random_lengths(30, 8192), [2] * 4096, MIXED, [8000, *[1] * 192]],
    ids=["3000", "30", "pairs", "mixed", "one long"],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_launches_are_few_and_cost_what_the_tokens_cost(
    lengths: list[int], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = -(-sum(lengths) // 4) * 4
    documents = Documents((packed([*lengths, tokens - sum(lengths)][: len(lengths) + (tokens > sum(lengths))]),))
    launches = Launches(monkeypatch)
    problem = Problem(Mesh(1, ranks), (1, 1), (tokens,), batch=1, dtype=torch.float32, documents=documents)
    torch.manual_seed(0)
    run(problem)
    assert max(launches.calls.values()) <= 16 * ranks
    visible = sum(length * length for length in lengths)  # a causal square is computed whole, at most
    for computed in launches.scores.values():
        assert computed <= 1.25 * visible + 16 * ranks * 2 * (1 << 13), f"{computed} scores for {visible}"


def test_flash_attn_is_called_once_for_all_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = flash_attn_2(), Counter[str]()
    for name in [name for name in vars(module) if name.startswith("_flash_attn")]:
        original = getattr(module, name)

        def counted(*given: Any, name: str = name, original: Any = original, **named: Any) -> Any:
            calls[name] += 1
            return original(*given, **named)

        counted._init_fn = original  # type: ignore[attr-defined]
        setattr(module, name, counted)
    install(monkeypatch, module)
    documents = Documents((packed(random_lengths(300, 1024)),))
    problem = Problem(Mesh(1, 1), (2, 1), (1024,), batch=1, documents=documents, kernel=FlashAttn())
    assert_close(run(problem), problem.expected(problem.inputs()), 1024)
    assert calls == {"_flash_attn_varlen_forward": 1, "_flash_attn_varlen_backward": 1}


def plans(documents: Documents, tokens: int) -> list[Launch]:
    """Plan attention on a ring, gathered, and in segments; return the launches."""
    mask, layout = Mask(1, None, documents), Layout(Mesh(1, 4), (tokens // 2, tokens // 2))
    tiles = [plan_causal(TokenRange(tokens // 2, tokens), mask, rectangular=False)]
    tiles.append(plan_all_gather(layout, 1, range(1, 2), mask, rectangular=False))
    tiles += [step.tiles for step in plan_layout_ring(Ring(4, 2), layout, 1, mask, 2, rectangular=False)]
    return [launch for each in tiles for launch in each.launches]


def calls_of(function: Callable[[], Any]) -> int:
    """Count all calls of functions, built-in ones too."""
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_planning_grows_with_the_documents_and_not_with_the_tokens() -> None:
    tokens = 1 << 17
    few, many, longer = (
        calls_of(lambda count=count, all_=all_: plans(Documents((packed(random_lengths(count, all_)),)), all_))
        for count, all_ in ((2500, tokens), (10_000, tokens), (2500, 8 * tokens))
    )
    assert many < 4.6 * few and longer < 1.1 * few
    tracemalloc.start()
    planned = plans(Documents((packed(random_lengths(10_000, tokens)),)), tokens)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(planned) < 40 and peak < 10_000 * 8000


def test_plans_are_freed_with_their_documents() -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, Launch) for one in gc.get_objects())

    before = alive()
    for seed in range(3):
        assert plans(Documents((packed(random_lengths(200, 4096, seed)),)), 4096)
    assert alive() == before


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12).map(
    lambda pairs: union(TokenRange(begin, begin + length) for begin, length in pairs)
)


@given(spans, spans, st.integers(0, 70), st.integers(0, 70))
def test_sets_of_ranges(left: TokenRanges, right: TokenRanges, begin: int, end: int) -> None:
    a, b = set(numbers(left)), set(numbers(right))
    assert numbers(intersection(left, right)) == sorted(a & b)
    assert numbers(difference(left, right)) == sorted(a - b)
    finder = RowFinder(left)
    assert finder.before(begin) == len([one for one in a if one < begin])
    assert numbers(finder.clip(begin, end)) == sorted(one for one in a if begin <= one < end)
    rows = TokenRange(min(begin, size(left)), min(max(begin, end), size(left)))
    assert numbers(finder.positions(rows)) == numbers(left)[rows.slice()]


def test_a_batch_of_padded_blocks_is_bounded() -> None:
    """Many rows are copied in several parts, and masks that differ between blocks are small."""
    cpu, blocks = torch.device("cpu"), PackedLengths((64,) * 4096, (64,) * 4096)
    batches = padded_batches(blocks, Scores(1.0, True), cpu, 1 << 62)
    assert [batch.count for batch in batches] == [512] * 8
    assert all(batch.hidden is None for batch in batches)
    windowed = PackedLengths((500,) * 100, tuple(500 + number for number in range(100)))
    masked = padded_batches(windowed, Scores(1.0, False, 600), cpu, 1 << 62)
    assert max(batch.hidden.numel() for batch in masked if batch.hidden is not None) <= 1 << 24
    assert sum(batch.count for batch in masked) == 100
