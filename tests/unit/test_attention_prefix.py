"""Attention by segments equals unsplit attention in results, order, memory, recomputation and dropout."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import patches
from megatron.longseq.attention.kernels.reference import Reference
from megatron.longseq.attention.kernels.torch_cpu import CpuFlash
from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.attention.runtime import kv_cache as store_module
from megatron.longseq.attention.runtime.kv_cache import SegmentKVCache, SegmentOrderError
from megatron.longseq.attention.runtime.segment_attention import segment_attention
from megatron.longseq.segment import Segment
from tests.kv_bytes import held_bytes, peaks
from tests.unit.attention_bed import SCALE, Split, assert_close, oracle, plain, qkv, seen, segments
from tests.unit.test_attention_blocks import dense, packed

HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
LENGTHS = [[12], [6, 6], [5, 4, 3], [7, 3, 1, 1], [1, 1, 10], [3, 2, 1, 1, 1, 2, 1, 1]]
KERNELS = {"cpu": CpuFlash(), "reference": Reference()}
CPU = ("cpu.device",)


def upstream_checkpoint(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Call upstream's own recomputation."""
    from megatron.core.tensor_parallel.random import checkpoint as recompute

    return recompute(function, False, *args)


RECOMPUTE: dict[str, Callable[..., Tensor]] = {
    "none": lambda function, *args: function(*args),
    "reentrant": lambda function, *args: checkpoint(function, *args, use_reentrant=True),
    "not reentrant": lambda function, *args: checkpoint(function, *args, use_reentrant=False),
    "upstream": upstream_checkpoint,
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", HEADS)
def test_equals_unsplit_attention(kernel: str, heads: str) -> None:
    for lengths, window in product(LENGTHS, (None, 0, 2, 5, 11)):
        inputs, cache = qkv(12, 2, HEADS[heads]), SegmentKVCache()
        split = Split(inputs, lengths, cache, KERNELS[kernel], window=window).run()
        assert_close(split.results(), oracle(inputs, seen(12, window)), 12)
        cache.assert_empty()


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], Documents, int | None]:
    """Return segments, documents of two sequences, and a window."""
    size = draw(st.integers(2, 24))

    def parts() -> list[int]:
        cuts = sorted(draw(st.sets(st.integers(1, size), max_size=7)) | {size})
        return [b - a for a, b in zip([0, *cuts], cuts, strict=False)]

    documents = Documents((packed(parts()), packed(parts())))
    return parts(), documents, draw(st.none() | st.integers(0, size))


@given(packings(), st.sampled_from(sorted(KERNELS)))
def test_equals_unsplit_attention_inside_documents(
    packing: tuple[list[int], Documents, int | None], kernel: str
) -> None:
    lengths, documents, window = packing
    inputs, cache = qkv(sum(lengths), 2, (2, 1), 4), SegmentKVCache()
    split = Split(inputs, lengths, cache, KERNELS[kernel], window=window, documents=documents).run()
    assert_close(split.results(), oracle(inputs, dense(documents, window)), sum(lengths))
    cache.assert_empty()


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("lengths", [pytest.param([12], marks=pytest.mark.slow), [7, 3, 1, 1]], ids=str)
def test_micro_batches_in_flight_and_recomputation(recompute: str, lengths: list[int]) -> None:
    """The forwards of a second micro-batch run before and between the backwards of the first, in two layers."""
    cache, last = SegmentKVCache(), len(lengths) - 1
    runs = [
        Split(qkv(12, 2, (4, 2), seed=10 * mb + layer), lengths, cache, CpuFlash(), wrap=RECOMPUTE[recompute], **names)
        for mb in range(2)
        for layer in range(2)
        for names in [{"microbatch": mb, "layer": layer}]
    ]
    first, second = runs[:2], runs[2:]
    with patches.applied(CPU):
        for index in range(len(lengths)):
            for split in first:
                split.forward(index)
        for index in range(len(lengths)):  # forward of one micro-batch, backward of the other
            for split in second:
                split.forward(index)
            for split in reversed(first):
                split.backward(last - index)
        for index in reversed(range(len(lengths))):
            for split in reversed(second):
                split.backward(index)
    cache.assert_empty()
    for number, split in enumerate(runs):
        inputs = qkv(12, 2, (4, 2), seed=10 * (number // 2) + number % 2)
        assert_close(split.results(), oracle(inputs, seen(12)), 12)


@pytest.mark.parametrize("recompute", ["none", "reentrant", "not reentrant", "upstream"])
def test_whole_layers_recomputed(recompute: str) -> None:
    """One recomputed function contains two layers with attention between projections. All gradients are compared."""
    tokens, lengths, width = 12, [5, 4, 3], 16
    torch.manual_seed(0)
    layers = [torch.nn.ModuleList([torch.nn.Linear(width, 32), torch.nn.Linear(16, width)]).double() for _ in range(2)]
    parameters = [p for layer in layers for p in layer.parameters()]
    x, grad = (torch.randn(tokens, 2, width, dtype=torch.float64) for _ in range(2))

    def stack(x: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        for number, (project, back) in enumerate(layers):
            q, k, v = (y.unflatten(-1, (-1, 4)) for y in project(x).split([16, 8, 8], -1))
            x = x + back(attend(number, q, k, v))
        return x

    leaf = x.clone().requires_grad_()
    whole = stack(leaf, lambda _, q, k, v: plain(q, k, v, seen(tokens)))
    expected = [whole.detach(), *torch.autograd.grad(whole, [leaf, *parameters], grad)]

    cache, kernel = SegmentKVCache(), CpuFlash()
    leaves = [x[s.begin : s.end].clone().requires_grad_() for s in segments(0, lengths)]
    outs = []
    with patches.applied(CPU):
        for segment, part in zip(segments(0, lengths), leaves, strict=True):
            cache.current = segment
            outs.append(
                RECOMPUTE[recompute](
                    lambda y: stack(y, lambda n, q, k, v: segment_attention(q, k, v, cache, n, kernel, SCALE)), part
                )
            )
        for segment in reversed(segments(0, lengths)):
            cache.current = segment
            outs[segment.index].backward(grad[segment.begin : segment.end])
    cache.assert_empty()
    got = [torch.cat([o.detach() for o in outs]), torch.cat([p.grad for p in leaves]), *(p.grad for p in parameters)]
    assert_close(got, expected, 2 * 3 * 16)  # type: ignore[arg-type]  # two layers of three products 16 wide or longer


def test_forward_only_frees_at_the_last_segment() -> None:
    inputs, cache = qkv(12, 2, (4, 2)), SegmentKVCache()
    for microbatch in range(3):
        split = Split(inputs, [5, 4, 3], cache, CpuFlash(), forward_only=True, microbatch=microbatch)
        with torch.no_grad(), peaks() as found:
            for index in range(3):
                assert bool(held_bytes(cache)) == bool(index)
                split.forward(index)
        cache.assert_empty()
        outs = torch.cat([out for out in split.outs if out is not None])
        assert_close([outs], oracle(inputs, seen(12))[:1], 12)
        assert held_bytes(cache) == 0 and found[cache] == 2 * 12 * 2 * 2 * 8 * 8


def _kept_weights(lengths: list[int], state: Tensor, p: float) -> Tensor:
    """Return the dropout factors [b, h, N, N] that segments draw in turn from a generator's state."""
    full = torch.zeros(2, 4, sum(lengths), sum(lengths), dtype=torch.float64)
    before = torch.get_rng_state()
    torch.set_rng_state(state)
    for s in segments(0, lengths):
        ones = torch.ones(2, 2, 2, s.tokens, s.end, dtype=torch.float64)
        full[:, :, s.begin : s.end, : s.end] = torch.nn.functional.dropout(ones, p).flatten(1, 2)
    torch.set_rng_state(before)
    return full


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("lengths", [pytest.param([12], marks=pytest.mark.slow), [7, 3, 1, 1]], ids=str)
def test_dropout_draws_the_same_mask_in_backward(recompute: str, lengths: list[int]) -> None:
    inputs, cache = qkv(12, 2, (4, 2)), SegmentKVCache()
    own = torch.Generator().manual_seed(5).get_state()
    kept = _kept_weights(lengths, own, 0.4)
    dropped = (kept[..., 0] == 0).double()  # four standard deviations around what was asked for
    assert abs(dropped.mean() - 0.4) < 4 * math.sqrt(0.4 * 0.6 / dropped.numel())
    tracker = [own]

    @contextmanager
    def fork() -> Any:  # as upstream's tracker: another generator state, which moves on
        outside = torch.get_rng_state()
        torch.set_rng_state(tracker[0])
        yield
        tracker[0] = torch.get_rng_state()
        torch.set_rng_state(outside)

    def wrap(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """Recompute with the tracker's state restored, as upstream does."""
        state = tracker[0]
        calls = []

        def inner(*args: Tensor) -> Tensor:
            moved, tracker[0] = tracker[0], state
            result = function(*args)
            if calls:
                tracker[0] = moved
            calls.append(1)
            return result

        return RECOMPUTE[recompute](inner, *args)

    with patches.applied(CPU):
        torch.manual_seed(3)
        outside = torch.get_rng_state()
        split = Split(inputs, lengths, cache, Reference(dropout=0.4), fork=fork, wrap=wrap).run()
        assert torch.equal(torch.get_rng_state(), outside), "dropout moved the generator outside"
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = plain(*leaves, seen(12), kept=kept)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]
    assert_close(split.results(), expected, 12)
    cache.assert_empty()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("f1", "segment 1 of 3: forward, but segment 0 of this micro-batch has not run"),
        ("f0 f2", "layer 7, micro-batch 4, segment 2 of 3: forward out of order; forward of 1 of 3 segments ran"),
        ("f0 f1 f1", "segment 1 of 3: forward out of order; forward of 2 of 3 segments ran, segment 2"),
        ("f0 f1 f2 f0", "segment 0 of 3: forward out of order; all 3 forwards and 0 backwards ran"),
        ("f0 f1 b1", "segment 1 of 3: backward out of order; forward of 2 of 3 segments ran"),
        ("f0 f1 f2 b1", "segment 1 of 3: backward out of order; all 3 forwards and 0 backwards ran, the backward of"),
        ("f0 f1 f2 b2 b0", "segment 0 of 3: backward out of order; all 3 forwards and 1 backwards ran"),
        ("f0 f1 f2 r2 f0 b2", "segment 2 of 3: backward out of order; forward of 1 of 3 segments ran"),
        ("f0 f1 f2 b2 b1 b0 b0", "segment 0 of 3: backward, but the cache is empty for this micro-batch"),
    ],
)
def test_wrong_order_is_refused_by_name(steps: str, message: str) -> None:
    cache = SegmentKVCache()
    split = Split(qkv(12, 1, (2, 1)), [5, 4, 3], cache, CpuFlash(), microbatch=4, layer=7)
    with pytest.raises(SegmentOrderError, match=message):
        for step in steps.split():
            if step[0] == "f":
                split.forward(int(step[1]))
            elif step[0] == "r":
                cache.reset()
            else:
                cache.current = split.units[int(step[1])]
                out = split.outs[int(step[1])]
                assert out is not None
                out.backward(split.grads[int(step[1])], retain_graph=True)


def test_what_was_not_announced_is_refused() -> None:
    cache = SegmentKVCache()
    inputs = qkv(12, 1, (2, 1))
    split = Split(inputs, [8, 4], cache, CpuFlash())
    with pytest.raises(SegmentOrderError, match=r"without a current segment; set cache\.current"):
        split.attend(*split.leaves[0])
    cache.current = split.units[0]
    with pytest.raises(ValueError, match=r"4 queries, but 8 tokens"):
        split.attend(*split.leaves[1])
    with pytest.raises(ValueError, match=r"keys or values are torch\.float64 "):
        split.attend(split.leaves[0][0], *split.leaves[1][1:])
    cache.reset()
    split.forward(0)
    split.forward(1)
    assert split.outs[1] is not None
    cache.current = Segment(1, 1, (8, 4))
    with pytest.raises(SegmentOrderError, match="backward, but the current segment is micro-batch 1, segment 1 of 2"):
        split.outs[1].backward(split.grads[1])
    for bad in ((2, (8, 4)), (0, (8, 0)), (-1, (8, 4))):
        with pytest.raises(ValueError, match="segment"):
            Segment(0, *bad)


def test_what_is_left_is_named_and_forgotten() -> None:
    cache = SegmentKVCache()
    splits = [Split(qkv(12, 1, (2, 1)), [8, 4], cache, CpuFlash(), layer=layer, microbatch=3) for layer in range(10)]
    for split in splits:
        split.forward(0)
    splits[0].forward(1)
    splits[0].backward(1)
    with pytest.raises(SegmentOrderError, match=r"layer 0, micro-batch 3: all 2 forwards and 1 backwards.*and 2 more"):
        cache.assert_empty()
    cache.reset()
    cache.assert_empty()
    assert held_bytes(cache) == 0 and cache.current is None
    inputs = qkv(12, 1, (2, 1))
    assert_close(Split(inputs, [8, 4], cache, CpuFlash()).run().results(), oracle(inputs, seen(12)), 12)


def test_bytes_are_those_of_the_formula_and_steady() -> None:
    """The bytes are K and V of segments in flight, and float32 accumulators that a later backward has reached."""
    cache, lengths = SegmentKVCache(), [5, 4, 3]
    token = 2 * 2 * 8  # batch, key heads, head size
    keys, accumulators = 2 * token * 2, 2 * token * 4  # a token's
    inputs = [qkv(12, 2, (4, 2), seed=s, dtype=torch.bfloat16) for s in range(2)]
    for _ in range(3):
        a, b = (Split(inputs[mb], lengths, cache, CpuFlash(), microbatch=mb) for mb in range(2))
        with peaks() as found:
            for index, tokens in enumerate((5, 9, 12)):
                a.forward(index)
                assert held_bytes(cache) == tokens * keys
            for index, tokens in enumerate((5, 9, 12)):
                b.forward(index)
                assert held_bytes(cache) == (12 + tokens) * keys
            for split, further in ((a, 12), (b, 0)):
                for index, tokens in ((2, 9), (1, 5), (0, 0)):
                    split.backward(index)
                    assert held_bytes(cache) == (tokens + further) * keys + tokens * accumulators
        assert held_bytes(cache) == 0
        assert found[cache] == 24 * keys + 9 * accumulators


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("window", [None, 3])
def test_autograd_keeps_q_out_and_lse_alone(batch: int, window: int | None) -> None:
    """Storages are counted, so that a view cannot keep a larger tensor alive: q is a slice of a fused projection."""
    cache, lengths, kept = SegmentKVCache(), [8, 4], []
    fused = torch.randn(12, batch, 8 * 16, requires_grad=True)
    for segment in segments(0, lengths):
        cache.current = segment
        q, k, v = (
            x.unflatten(-1, (-1, 16)) for x in (fused * 1.0)[segment.begin : segment.end].split([64, 32, 32], -1)
        )
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            out = segment_attention(q, k, v, cache, 0, CpuFlash(), SCALE, window=window)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
        tokens = segment.tokens * batch
        assert sum(storages.values()) == 4 * tokens * (64 + 64 + 4)  # q, out: 4 heads of 16; lse: 4 heads
        assert out.untyped_storage().data_ptr() in storages, "out is kept once, with whoever else keeps it"
        assert out.is_contiguous()
        kept.append(out)
    assert held_bytes(cache) == 2 * 4 * 12 * batch * 32
    for segment in reversed(segments(0, lengths)):
        cache.current = segment
        grads = torch.autograd.grad(kept[segment.index].sum(), fused)
        assert torch.isfinite(grads[0]).all()
    cache.assert_empty()


def test_gradients_returned_are_nobody_elses() -> None:
    """Gradients that autograd received must not change when later segments or micro-batches are computed."""
    cache, inputs = SegmentKVCache(), qkv(12, 1, (2, 2))
    seen_grads: list[tuple[Tensor, Tensor]] = []

    def wrap(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        args = tuple(x * 1.0 for x in args)
        for x in args:
            x.register_hook(lambda grad: seen_grads.append((grad, grad.clone())) and None)
        return function(*args)

    documents = Documents((packed([3, 3, 6]),))
    for kwargs in ({}, {"window": 2}, {"documents": documents}):
        Split(inputs, [4, 4, 4], cache, CpuFlash(), wrap=wrap, **kwargs).run()
    assert len(seen_grads) == 27 and all(torch.equal(a, b) for a, b in seen_grads)


def _relative(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]


def test_bfloat16_error_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], None]) -> None:
    """Errors against float64 are compared with those of one unsplit bfloat16 call on this processor.

    Segments round more often: out once more and every part of a gradient once, and together the parts of a sum are
    no larger than it. Each is as large as rounding the exact result, and independent errors add up by their squares.
    """
    tokens = 2048
    inputs = qkv(tokens, 1, (2, 1), 64, dtype=torch.bfloat16)
    exact = oracle(inputs, seen(tokens))

    def errors(count: int) -> list[float]:
        lengths = [tokens // count] * count
        return _relative(Split(inputs, lengths, SegmentKVCache(), CpuFlash()).run().results(), exact)

    one, least = errors(1), _relative([x.bfloat16() for x in exact], exact)
    assert all(floor <= x for x, floor in zip(one, least, strict=True)), "nothing in bfloat16 is nearer"
    most = [math.sqrt(1 + 2 * (floor / x) ** 2) for x, floor in zip(one, least, strict=True)]
    split = {count: [a / b for a, b in zip(errors(count), one, strict=True)] for count in (4, 8)}
    monkeypatch.setattr(store_module, "accumulation_dtype", lambda dtype: dtype)
    coarse = [a / b for a, b in zip(errors(8), one, strict=True)]
    for count, ratios in [*split.items(), ("8 and bfloat16 accumulators", coarse)]:
        figures = " ".join(f"{x:.3f}" for x in ratios)
        tell(f"bfloat16 error over one call's, segments {count}, of out, dq, dk, dv: {figures}")
    assert all(x < limit for ratios in split.values() for x, limit in zip(ratios, most, strict=True)), (split, most)
    assert coarse[2] > split[8][2] and coarse[3] > split[8][3]
