"""Check the attention benchmark: its layouts, ratios of given measurements, its counters, and one short run."""

import ast
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Mesh
from tests.benchmarks import peers
from tests.benchmarks.attention import main
from tests.benchmarks.attention_contest import (
    ONE_PROCESS,
    OURS,
    PEERS,
    RING_FLASH_ATTN,
    TORCH,
    YUNCHANG,
    Contestant,
    Measured,
    Size,
    TrialRun,
    contestants,
    held_positions,
)
from tests.benchmarks.attention_report import Row, ring_bytes, rows, sent_bytes, summary, text
from tests.benchmarks.attention_truth import errors, one_head, whole
from tests.benchmarks.peak import Peak
from tests.benchmarks.wire import _to_others
from tests.unit.attention_bed import assert_close

EVERYONE = (OURS, *PEERS)
SIZE = Size(64, Heads(8, 2))
RING, ULYSSES = Contestant(OURS, Mesh(1, 4)), Contestant(OURS, Mesh(4, 1))
PAIR, ALONE = Contestant(OURS, Mesh(2, 1)), Contestant(ONE_PROCESS, Mesh(1, 1))
PEER = Contestant(RING_FLASH_ATTN, Mesh(1, 4), "zigzag")
OTHER = Contestant(TORCH, Mesh(1, 4), "alltoall")


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_everyone_holds_every_position_once(ranks):
    for one in contestants(EVERYONE, ranks):
        spans = [held_positions(one, 64, rank) for rank in range(ranks)]
        positions = [p for of_rank in spans for span in of_rank for p in range(span.begin, span.end)]
        assert sorted(positions) == list(range(64)), one
        assert all(sum(span.size for span in of_rank) == 64 // ranks for of_rank in spans), one


def test_yunchang_cuts_the_zigzag_shard_of_its_ring():
    shards = [torch.cat([torch.arange(64).chunk(4)[r], torch.arange(64).chunk(4)[3 - r]]) for r in (0, 1)]
    for rank in range(4):
        spans = held_positions(Contestant(YUNCHANG, Mesh(2, 2), "zigzag"), 64, rank)
        mine = [p for span in spans for p in range(span.begin, span.end)]
        assert mine == shards[rank // 2].chunk(2)[rank % 2].tolist()


def test_who_takes_part():
    assert [str(one) for one in contestants((OURS,), 4)] == ["ours U1 R4", "ours U2 R2", "ours U4 R1"]
    assert {one.who for one in contestants(EVERYONE, 2)} == set(EVERYONE)
    assert [str(one) for one in contestants((YUNCHANG,), 2) if one.copies_self] == ["yunchang zigzag U2 R1"]
    assert contestants(EVERYONE, 1) == []
    alone = contestants((ONE_PROCESS,), 1)
    assert [(str(one), one.ranks) for one in alone] == [
        ("one process", 1),
        ("two processes, half the heads each", 2),
    ]


def canned(contestant, cpu, seconds=(1.0, 1.0), peak=100, error=1e-6, size=SIZE):
    return Row(contestant, size, list(cpu), list(seconds), [peak] * len(cpu), (error,) * 4)


TABLE = [
    canned(RING, (2.0, 2.2), peak=60),
    canned(ULYSSES, (1.8, 1.6), peak=90),
    canned(PEER, (2.0, 2.0), peak=200, error=0.5),
    canned(OTHER, (3.0, 3.0), peak=120),
    canned(PAIR, (3.0, 3.0), seconds=(5.0, 4.0)),
    canned(ALONE, (8.0, 8.0), seconds=(9.0, 8.0)),
]


def test_rows_take_the_slowest_and_the_fullest_rank():
    def measured(cpu, peak, error):
        return Measured(PAIR, SIZE, cpu, cpu + 1, peak, None if error is None else (error,) * 4)

    table = rows([[measured(1.0, 5, 0.25), measured(4.0, 6, None)], [measured(3.0, 4, 0.125), measured(2.0, 9, None)]])
    assert table == [Row(PAIR, SIZE, [3.0, 4.0], [4.0, 5.0], [5, 9], (0.25,) * 4)]


def test_ratios_compare_our_best_with_the_best_peer_right_or_wrong():
    found = summary(TABLE, {}, "float32", 4)
    assert found["time_over_best_peer"] == 0.85  # the median of 1.8 / 2 and 1.6 / 2
    assert found["peak_bytes_over_best_peer"] == 0.5  # of the ring against PyTorch's
    assert found["time_over_best_right_peer"] == pytest.approx(0.85 * 2 / 3, abs=1e-4)
    assert found["u4_over_r4"] == pytest.approx((1.8 / 2.0 + 1.6 / 2.2) / 2, abs=1e-4)
    assert found["speedup_2_ranks"] == 1.9
    time = found["measured_at"]["time_over_best_peer"]["4 ranks, 64 GQA 8/2"]
    assert time["spread"] == [0.8, 0.9]
    assert (time["of"], time["over"]) == ("ours U4 R1", "ring-flash-attn zigzag U1 R4")
    assert time["note"] == "the peer's out, dq, dk, dv is wrong"
    assert "note" not in found["measured_at"]["peak_bytes_over_best_peer"]["4 ranks, 64 GQA 8/2"]
    assert json.loads(json.dumps(found)) == found


def test_a_wrong_peer_can_be_the_best_but_not_the_best_right_one():
    found = summary([*TABLE[:2], canned(PEER, (2.0, 2.0), peak=80, error=0.5), TABLE[3]], {}, "float32", 4)
    assert found["peak_bytes_over_best_peer"] == 0.75
    assert found["peak_bytes_over_best_right_peer"] == 0.5
    assert summary([*TABLE[:2], TABLE[2]], {}, "float32", 4)["time_over_best_right_peer"] is None


def test_a_figure_is_the_geometric_mean_over_settings():
    twice = Size(128, SIZE.heads)
    more = [canned(RING, (1.0, 1.0), size=twice), canned(PEER, (4.0, 4.0), size=twice)]
    found = summary([*TABLE, *more], {}, "float32", 4)
    assert found["time_over_best_peer"] == pytest.approx((0.85 * 0.25) ** 0.5, abs=1e-4)
    assert len(found["measured_at"]["time_over_best_peer"]) == 2


def test_without_rivals_there_is_no_ratio():
    found = summary([canned(RING, (1.0,), (1.0,))], {}, "float32", 4)
    assert {key: found[key] for key in ("time_over_best_peer", "speedup_2_ranks", "u4_over_r4")} == dict.fromkeys(
        ("time_over_best_peer", "speedup_2_ranks", "u4_over_r4")
    )


def test_ring_bytes_are_those_counted_over_the_least_of_a_peer():
    size = Size(64, Heads(8, 8))
    one, two = (
        {(RING, size): 600, (ULYSSES, size): 1} | more for more in ({}, {(PEER, size): 900, (OTHER, size): 800})
    )
    (counted,) = ring_bytes(two, item=4)
    assert (counted.value, counted.between) == (0.75, ("ours U1 R4", str(OTHER)))
    (formula,) = ring_bytes(one, item=4)
    assert formula.between == ("ours U1 R4", "formula")
    # R = 4, keys of 4 bytes: a peer sends 3 shards twice and 4 of gradients, ours 3/4 of 3 three times
    shards = 64 * 2 * 8 * 64 * 4
    assert formula.value == 600 / (10 * shards)
    assert formula.note == f"counted 600 over {10 * shards}; formulas {27 * shards // 4} over {10 * shards}"


def test_the_tables_say_what_is_wrong_and_who_cannot_run():
    failed = TrialRun(Contestant(YUNCHANG, Mesh(4, 1), "zigzag", True), SIZE, failure="RuntimeError: shape")
    sent = sent_bytes([[TrialRun(RING, SIZE, 64 * 10), failed], [TrialRun(RING, SIZE, 64 * 20), failed]])
    tables = text([*TABLE, canned(OTHER, (1.0,), (1.0,), error=float("nan"))], [failed], sent, "float32").splitlines()
    (wrong,) = (line for line in tables if "ring-flash-attn" in line)
    assert wrong.endswith("WRONG: out, dq, dk, dv")
    assert [line.split("  ")[-1] for line in tables if "torch" in line] == ["right", "WRONG: out, dq, dk, dv"]
    assert sum(line.endswith("30.0") for line in tables) == 1
    assert "  yunchang zigzag U4 R1, 64 GQA 8/2: RuntimeError: shape" in tables


def test_the_truth_is_attention():
    q, k, v, grad = (x.double() for x in whole(Size(200, Heads(4, 1), 16), torch.float32))
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    logits = torch.einsum("ibhd,jbgd->bhij", *given[:2]) / 4
    logits = logits.masked_fill(torch.ones(200, 200, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.einsum("bhij,jbgd->ibhd", logits.softmax(-1), given[2])
    right = [expected.detach(), *torch.autograd.grad(expected, given, grad)]
    results = [torch.zeros_like(x) for x in (q, q, k, v)]
    one_head(q, k, v, grad, *results)
    assert_close(results, right, 200)
    exact = 4 * 200 * 2**-52  # errors() are relative: four sums of 200 terms, see assert_close
    assert max(errors(results, right, held_positions(ALONE, 200, 0))) < exact
    spans = held_positions(RING, 200, 1)
    mine = [torch.cat([x[span.slice()] for span in spans]) for x in results]
    mine[2][30] += right[2].abs().max()
    assert errors(mine, right, spans) == pytest.approx((0, 0, 1, 0), abs=exact)


def test_peak_sees_memory_that_is_gone_again():
    def parts():
        return [torch.ones(2**21, dtype=torch.uint8) for _ in range(12)]

    for _ in range(3):  # the allocator learns to keep what it is given back, holes between what is in use, too
        before = parts()
        last, high = before[-1], torch.ones(2**28, dtype=torch.uint8)
        del before, high
        peak = Peak()
        found = parts()
        del found
        # To one part: pages at ends are shared, and each CPU counts some on its own (twice the number of CPUs, at least
        # 32) before the kernel's counter has them.
        assert 11 * 2**21 < peak.bytes() < 13 * 2**21
        del last


def test_what_stays_on_the_rank_is_not_sent():
    class Group:
        def size(self):
            return 4

        def rank(self):
            return 1

    tensor = torch.zeros(8, 3)
    assert _to_others(tensor, [], Group()) == 6 * 3 * 4
    assert _to_others(tensor, [0, 0, 8, 0], Group()) == 8 * 3 * 4
    assert _to_others(tensor, [1, 5, 1, 1], Group()) == 3 * 3 * 4


def test_stand_ins_are_the_operator_and_go_away():
    before = set(sys.modules)
    with peers._stand_ins():
        from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
    assert set(sys.modules) == before
    q, k, v, grad = (torch.randn(2, 24, 4, 16, dtype=torch.float64, requires_grad=True) for _ in range(4))
    out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    grads = [torch.empty_like(x) for x in (q, k, v)]
    with torch.no_grad():
        _flash_attn_backward(grad, q, k, v, out, lse, *grads, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    for found, expect in zip(grads, torch.autograd.grad(expected, (q, k, v), grad.transpose(1, 2)), strict=True):
        torch.testing.assert_close(found, expect)
    with pytest.raises(NotImplementedError, match="top-left"):
        _flash_attn_forward(q, k[:, :12], v[:, :12], 0.0, 0.25, True, -1, -1, 0.0, None, False)


def test_self_sends_are_copied(monkeypatch):
    class Operation:
        def __init__(self, op, tensor, peer):
            self.op, self.tensor, self.peer = op, tensor, peer

    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: ["sent", *operations])
    original, arrived, far = dist.batch_isend_irecv, torch.zeros(3), Operation(dist.isend, torch.ones(1), 0)
    one = contestants((YUNCHANG,), 2)[1]
    with peers.self_sends_copied(one):
        own = [Operation(dist.isend, torch.arange(3.0), 1), Operation(dist.irecv, arrived, 1)]
        assert dist.batch_isend_irecv([*own, far]) == ["sent", far]
        assert dist.batch_isend_irecv(own) == []
    assert arrived.tolist() == [0, 1, 2]
    assert dist.batch_isend_irecv is original


def test_the_measured_versions_are_those_of_the_extra():
    tree = ast.parse(Path("setup.py").read_text())
    (extras,) = (
        node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "extras_require"
    )
    assert ast.literal_eval(extras)["bench"] == [f"{name}=={version}" for name, version in peers.VERSIONS.items()]


def test_a_missing_or_another_peer_is_said(monkeypatch):
    def version(name):
        if name == YUNCHANG:
            raise importlib.metadata.PackageNotFoundError
        return "9.9"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "not installed" in peers.obstacle(YUNCHANG)
    assert "9.9" in peers.obstacle(RING_FLASH_ATTN)
    assert peers.obstacle(TORCH) is None


@pytest.mark.parametrize("ranks", [["3", "4"], ["1"]])
def test_ranks_that_do_not_fit_are_refused(ranks):
    with pytest.raises(SystemExit, match="--ranks"):
        main(["--ranks", *ranks])


@pytest.mark.slow  # a run of the benchmark
def test_a_short_run_ends_in_the_json_line(capsys):
    arguments = "--ranks 2 --lengths 512 --kv-heads 2 --rounds 1 --who ours torch"
    assert main(arguments.split()) == 0
    tables = capsys.readouterr().out
    found = json.loads(tables.splitlines()[-1])
    assert "WRONG" not in tables
    assert "cannot run" not in tables
    assert found["u4_over_r4"] is None
    for key in ("time_over_best_peer", "peak_bytes_over_best_peer", "speedup_2_ranks"):
        assert found[key] > 0
        assert list(found["measured_at"][key]) == ["2 ranks, 512 GQA 8/2"]
    # counted at the calls: PyTorch's ring as the formula of a peer's has it, ours as our own
    assert found["ring_bytes_over_peers"] == 0.5625
