"""Attention over context-parallel ranks (threads) equals dense attention, is reproducible and needs little memory."""

import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.longseq.attention.kernels.reference import Reference
from megatron.longseq.attention.kernels.torch_cpu import CpuFlash
from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.attention.runtime.comm import Message
from megatron.longseq.attention.runtime.function import context_attention, make_call
from tests.unit.attention_bed import SCALE, assert_close
from tests.unit.context_run import Problem, run
from tests.unit.test_attention_blocks import packed
from tests.unit.test_attention_grouped import repeated

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (2, 4), (4, 2), (8, 1), (1, 8)]
HEADS = {"MHA": (8, 8), "GQA": (8, 4), "few": (8, 2), "MQA": (8, 1)}
DOCUMENTS = Documents((packed([10, 1, 53]), packed([33, 31])))
SEGMENTS = (32, 16, 16)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 13},
    "window of one key": {"window": 0},
    "documents": {"documents": DOCUMENTS},
    "documents and window": {"documents": DOCUMENTS, "window": 20},
    "segments": {"lengths": SEGMENTS},
    "segments, documents and window": {"lengths": (16, 32, 16), "documents": DOCUMENTS, "window": 20},
    "gathered": {"gathers": True},
    "gathered, everything": {"gathers": True, "lengths": SEGMENTS, "documents": DOCUMENTS, "window": 20},
    "double ring": {"inner": 2},
    "double ring, everything": {"inner": 2, "lengths": SEGMENTS, "documents": DOCUMENTS, "window": 20},
}


def fits(mesh: tuple[int, int], kind: dict[str, Any]) -> bool:
    return mesh[1] % kind.get("inner", 1) == 0 and (mesh[1] > 1 or not kind.get("gathers"))


def check(problem: Problem, **kwargs: Any) -> None:
    expected = problem.expected(problem.inputs())
    assert_close(run(problem, **kwargs), expected, sum(problem.lengths))


def grid(cases: Iterable[tuple[tuple[int, int], str]]) -> list[Any]:
    """Return parameters; by default one mesh alone has eight ranks."""
    few = [mesh for mesh in MESHES if mesh[0] * mesh[1] < 8 or mesh == (2, 4)]
    return [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] not in few)) for case in cases]


@pytest.mark.parametrize(("mesh", "heads"), grid(product(MESHES, HEADS)))
def test_equals_dense_attention(mesh: tuple[int, int], heads: str) -> None:
    check(Problem(Mesh(*mesh), HEADS[heads]))
    check(Problem(Mesh(*mesh), HEADS[heads], **KINDS["segments, documents and window"]))


@pytest.mark.parametrize(
    ("mesh", "kind"), grid((mesh, kind) for mesh, kind in product(MESHES, KINDS) if fits(mesh, KINDS[kind]))
)
def test_equals_dense_attention_under_any_mask(mesh: tuple[int, int], kind: str) -> None:
    check(Problem(Mesh(*mesh), (8, 2), **KINDS[kind]))


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("kind", ["segments, documents and window", "double ring", "gathered, everything"])
def test_equals_dense_attention_with_the_reference_kernel(mesh: tuple[int, int], kind: str) -> None:
    if fits(mesh, KINDS[kind]):
        check(Problem(Mesh(*mesh), (4, 2), kernel=Reference(), **KINDS[kind]))


@pytest.mark.parametrize(("mesh", "heads"), [((3, 1), (6, 3)), ((3, 2), (6, 1)), ((2, 3), (6, 2)), ((1, 6), (2, 1))])
def test_ranks_that_are_no_power_of_two(mesh: tuple[int, int], heads: tuple[int, int]) -> None:
    check(Problem(Mesh(*mesh), heads, lengths=(24, 36, 12), batch=3, window=30))
    check(Problem(Mesh(*mesh), heads, lengths=(36,), batch=1, inner=mesh[1] if mesh[1] != 6 else 3))


@pytest.mark.parametrize("mesh", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("lengths", [(64,), SEGMENTS], ids=str)
def test_slices_of_a_fused_projection(mesh: tuple[int, int], lengths: tuple[int, ...]) -> None:
    """Pass q, k and v as upstream does: strided slices of one tensor."""

    def fused(leaves: Sequence[Tensor]) -> list[Tensor]:
        sizes = [leaf.shape[2] for leaf in leaves]
        parts = list(torch.cat([*leaves, leaves[0]], dim=2).split([*sizes, sizes[0]], dim=2)[:3])
        assert not any(part.is_contiguous() for part in parts)
        return parts

    check(Problem(Mesh(*mesh), lengths=lengths), cut=fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mesh", [(1, 4), (4, 1), (2, 2)], ids=str)
def test_errors_are_those_of_one_call_of_pytorchs_on_the_whole_sequence(
    mesh: tuple[int, int], dtype: torch.dtype
) -> None:
    """Allow, beside one call on this processor, only further roundings as large as that of the exact result.

    One more of out and one more of a gradient's parts; and in float32 three of every merge in a ring, of blocks whose
    results are up to sqrt(R) times as large as the whole's. Independent errors add up by their squares.
    """
    problem = Problem(Mesh(*mesh), (4, 2), (256,), batch=1, dim=32, dtype=dtype)
    inputs = problem.inputs()
    expected = problem.expected(inputs)

    def errors(results: list[Tensor]) -> list[float]:
        assert all(result.dtype == dtype for result in results)
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True)]

    once, ours, least = (errors(x) for x in (repeated(inputs), run(problem), [x.to(dtype) for x in expected]))
    ring = problem.mesh.ring
    more = 2 + 3 * ring * (ring - 1) * (dtype == torch.float32)
    assert all(one < math.sqrt(256) * torch.finfo(dtype).eps for one in once), "a random sum of 256 roundings"
    rows = zip(ours, once, least, strict=True)
    assert all(our <= math.sqrt(one**2 + more * floor**2) for our, one, floor in rows), (ours, once, least)


class Counting(CpuFlash):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = self.backwards = 0

    def forward(self, *args: Any) -> Any:
        self.forwards += 1
        return super().forward(*args)

    def backward(self, *args: Any) -> Any:
        self.backwards += 1
        return super().backward(*args)

    def forward_packed(self, *args: Any) -> Any:
        self.forwards += 1
        return super().forward_packed(*args)

    def backward_packed(self, *args: Any) -> Any:
        self.backwards += 1
        return super().backward_packed(*args)


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [
        ((1, 1), "documents"),
        ((2, 2), "plain"),
        ((2, 2), "segments"),
        ((1, 4), "double ring"),
        ((1, 2), "gathered"),
        ((1, 2), "gathered, everything"),
        ((4, 1), "segments, documents and window"),
    ],
    ids=str,
)
def test_a_forward_that_is_repeated_runs_attention_once(mesh: tuple[int, int], kind: str) -> None:
    kernels = Counting(), Counting()
    problem = Problem(Mesh(*mesh), dtype=torch.bfloat16, **KINDS[kind])
    plain, repeated = (replace(problem, kernel=kernel) for kernel in kernels)
    once, twice = run(plain), run(repeated, repeats=True)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert kernels[0].forwards == kernels[1].forwards > 0
    assert kernels[0].backwards == kernels[1].backwards > 0


class Late:
    """A lane whose messages arrive when they like."""

    def __init__(self, lane: Any, dice: random.Random) -> None:
        self.lane, self.dice, self.sent = lane, dice, lane.sent

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        time.sleep(self.dice.random() * 2e-3)
        return LateArrival(self.lane.post(sends, receives), self.dice)


class LateArrival:
    def __init__(self, pending: Any, dice: random.Random) -> None:
        self.pending, self.dice = pending, dice

    def wait(self) -> None:
        time.sleep(self.dice.random() * 2e-3)
        self.pending.wait()


@pytest.mark.parametrize("kind", ["plain", "double ring, everything", "gathered"])
def test_runs_are_bitwise_equal_whenever_messages_arrive(kind: str) -> None:
    problem = Problem(Mesh(2, 4), (8, 2), dtype=torch.bfloat16, **KINDS[kind])
    expected = run(problem)
    for seed in range(2):
        dice = random.Random(seed)
        late = []
        for strategy in problem.strategies():
            assert strategy.ring is not None
            ring = replace(
                strategy.ring, **{name: Late(getattr(strategy.ring, name), dice) for name in vars(strategy.ring)}
            )
            late.append(replace(strategy, ring=ring))
        assert all(torch.equal(a, b) for a, b in zip(run(problem, joined=late), expected, strict=True))


def test_what_does_not_fit_is_refused_before_anything_is_sent() -> None:
    problem = Problem(Mesh(2, 2), (4, 2))
    strategy = problem.strategies()[0]
    q, k, v, _ = (x[:16] for x in problem.inputs())

    def refused(words: str, kernel: Any = problem.kernel, **changed: Any) -> None:
        with pytest.raises(ValueError, match=words):
            make_call(changed.get("q", q), changed.get("k", k), strategy, kernel, SCALE, **changed.get("more", {}))

    refused("layer 0: attention over context-parallel ranks does not support dropout", Reference(0.1))
    refused(r"queries have shape \(16, 2, 4, 8\) and keys \(12, 2, 2, 8\), which does not fit 64 tokens on 4", k=k[:12])
    refused("keys .* does not fit", k=k[..., :4])
    refused("segment 0 of 1 has 60 tokens", q=q[:15], k=k[:15])
    refused("Ulysses over 2 of 4 context-parallel ranks, with 3 query heads and 3", q=q[:, :, :3], k=q[:, :, :3])
    refused("1 lists of documents for a batch of 2", more={"documents": Documents((packed([64]),))})
    with pytest.raises(ValueError, match=r"layer 0: values have shape \(16, 2, 2, 4\) and keys"):
        context_attention(q, k, v[..., :4], make_call(q, k, strategy, problem.kernel, SCALE))
    assert strategy.ulysses is not None and strategy.ring is not None
    assert strategy.ulysses.sent.messages == strategy.ring.kv.sent.messages == 0  # type: ignore[attr-defined]
