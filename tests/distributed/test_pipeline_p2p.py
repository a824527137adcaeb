"""Messages between stages have the number, sizes and order of the plan, and long waits are reported."""

import re
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from megatron.longseq.pipeline.plan.schedule import Action, ActionKind, Pipeline, target
from megatron.longseq.pipeline.runtime.p2p import StageChannels
from tests.distributed import p2p_bed
from tests.distributed.flags import TINY, flags
from tests.distributed.probes import run_probed
from tests.pool import RankFailure, RankPool
from tests.regression.arm import Job, run_arm

PP2 = "--pipeline-model-parallel-size 2"
MICROBATCHES, TOKENS, HIDDEN, DOUBLE, INT32 = 8, 64, 64, 8, 4


@pytest.mark.parametrize(
    ("stages", "virtual", "own", "lengths"),
    [
        (4, 1, "--seq1f1b-splits 3 --seq1f1b-partition 37,26,1", (37, 26, 1)),
        (2, 2, "--seq1f1b-splits 2 --seq1f1b-partition 41,23", (41, 23)),
        pytest.param(
            *(2, 1, "--seq1f1b-splits 2 --seq1f1b-partition even --no-create-attention-mask-in-dataloader", (32, 32)),
            marks=pytest.mark.slow,
        ),
        pytest.param(2, 1, "--seq1f1b-slack 1", (64,), marks=pytest.mark.slow),
    ],
)
def test_messages_and_bytes_are_the_plans(
    ranks: RankPool, stages: int, virtual: int, own: str, lengths: tuple[int, ...]
) -> None:
    """Each stage boundary has 2 * M * K messages per step: the hidden states of every segment and their gradients.

    With segments and masks from the loader, every micro-batch's documents go ahead: an int32 per token.
    """
    tells = len(lengths) > 1 and "no-create-attention-mask" not in own
    layout = f"--pipeline-model-parallel-size {stages} --train-iters 2 --distributed-timeout-minutes 3"
    layout += " --num-layers-per-virtual-pipeline-stage 1" if virtual > 1 else ""
    steps = run_probed(ranks, "O", stages, flags(TINY, layout, own), "tests.distributed.p2p_bed:traffic")
    for step in range(2):
        for rank, mine in enumerate(steps):
            sent, received = mine[step]["isend"], mine[step]["irecv"]
            wanted: Counter[tuple[int, int]] = Counter()
            documents = {"isend": Counter[tuple[int, int]](), "irecv": Counter[tuple[int, int]]()}
            for boundary in range(stages * virtual - 1):
                ends = boundary % stages, (boundary + 1) % stages
                for end, peer in (ends, ends[::-1]):
                    if end == rank:
                        for tokens in lengths:
                            wanted[peer, tokens * HIDDEN * DOUBLE] += MICROBATCHES
                        way = "isend" if end == ends[0] else "irecv"
                        documents[way][peer, TOKENS * INT32] += MICROBATCHES * tells
            # A rank sends forward what its peer sends back: both directions have the same messages.
            assert Counter(sent) == wanted + documents["isend"]
            assert Counter(received) == wanted + documents["irecv"]
            assert mine[step]["timeout"] == timedelta(minutes=3)
            assert not mine[step]["_communicate_shapes"] and not mine[step]["synchronize"] and not mine[step]["barrier"]
    messages = sum(len(mine[0]["isend"]) for mine in steps)
    assert messages == (2 * len(lengths) + tells) * MICROBATCHES * (stages * virtual - 1)
    total = sum(size for mine in steps for _, size in mine[0]["isend"])
    assert total == (2 * HIDDEN * DOUBLE + INT32 * tells) * MICROBATCHES * TOKENS * (stages * virtual - 1)


@pytest.mark.parametrize(
    ("world", "stages", "virtual", "lengths", "options"),
    [
        pytest.param(3, 3, 1, (5, 3, 1), {}, marks=pytest.mark.slow),
        (3, 3, 1, (5, 3), {"slack": 2}),
        (3, 3, 1, (2, 4), {"zero_bubble": True}),
        pytest.param(2, 2, 2, (5, 3, 1), {}, marks=pytest.mark.slow),
        (3, 3, 2, (4, 2), {"slack": 1}),
        pytest.param(4, 2, 1, (3, 5, 1), {}, marks=pytest.mark.slow),
        (4, 2, 2, (3, 1), {}),
    ],
)
def test_every_message_reaches_the_action_it_is_for(
    ranks: RankPool, world: int, stages: int, virtual: int, lengths: tuple[int, ...], options: dict[str, Any]
) -> None:
    """Run two training steps with an evaluation between them. The last two cases have two pipelines."""
    results = ranks.run(world, p2p_bed.exchange, stages, virtual, lengths, 6, options)
    per_pipeline = 5 * 6 * len(lengths) * (stages * virtual - 1)  # two steps there and back, one evaluation there
    assert sum(results) == per_pipeline * (world // stages)


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("virtual", [1, 2])
def test_between_two_ranks_a_lane_goes_one_way(stages: int, virtual: int) -> None:
    """NCCL keeps the order of posting per communicator, so a receive that is posted early must not delay a send."""
    pipeline = Pipeline(stages, 1, 1, virtual)
    names = {
        (kind, wraps): f"{kind} {wraps}"
        for kind in (ActionKind.FORWARD, ActionKind.BACKWARD)
        for wraps in (False, True)
    }
    channels = StageChannels(None, names, None)  # type: ignore[arg-type]
    ways: dict[tuple[str, frozenset[int]], set[tuple[int, int]]] = {}
    for rank in range(stages):
        for kind in (ActionKind.FORWARD, ActionKind.BACKWARD):
            for vstage in range(virtual):
                goal = target(pipeline, rank, Action(kind, 0, 0, vstage))
                if goal is not None:
                    channel = str(channels.channel(kind, rank, goal[0]))
                    ways.setdefault((channel, frozenset((rank, goal[0]))), set()).add((rank, goal[0]))
    assert all(len(way) == 1 for way in ways.values())
    assert len({channel for channel, _ in ways}) == (4 if virtual > 1 else 2)


def test_a_message_that_does_not_come_in_time_is_an_error(ranks: RankPool) -> None:
    message, _ = ranks.run(2, p2p_bed.wait_beyond_the_limit)
    where = "action 3 of 4 (backward of micro-batch 0, segment 1) for its gradient from rank 1"
    assert re.match(
        rf"BrokenMessage: rank 0 has waited \d+ s in {re.escape(where)}, and got an error instead: ", message
    )


def log(ranks: RankPool, rank: int) -> str:
    """Return what a rank of the last job printed."""
    return (ranks.logs / f"job{ranks.jobs:03d}-rank{rank}.log").read_text()


def test_a_waiting_rank_says_for_what(ranks: RankPool) -> None:
    """Rank 0 can run 4 segments ahead. Its fifth action is the first backward, while rank 1 sleeps in its forward."""
    own = flags(TINY, PP2, "--seq1f1b-splits 3 --pipeline-patience 1 --train-iters 1")
    run = run_arm(ranks, "O", 2, own, mutant="tests.distributed.p2p_bed:stalled_stage")
    assert run.planted == 1 and len(run.curve) == 1
    where = (
        r"in action 5 of 48 \(backward of micro-batch 0, segment 2\) for its gradient from rank 1\. Look at the end of"
    )
    assert re.search(rf"rank 0 has waited \d+ s {where}", log(ranks, 0))


def test_a_rank_that_only_sends_says_who_does_not_take_it(ranks: RankPool) -> None:
    ranks.run(2, p2p_bed.finish_before_the_peer_begins)
    where = "in action 2 of 2 (forward of micro-batch 0, segment 1) for a receive of its output from rank 1. Look"
    assert re.search(rf"rank 0 has waited \d+ s {re.escape(where)}", log(ranks, 0))
    assert "has waited" not in log(ranks, 1)


def test_a_killed_peer_is_named_in_the_error(ranks: RankPool) -> None:
    own = flags(TINY, PP2, "--seq1f1b-splits 3 --train-iters 1")
    job = Job("O", tuple(own), mutant="tests.distributed.p2p_bed:dying_stage")
    with pytest.raises(RankFailure) as failure:
        ranks.run(2, p2p_bed.train_with_rank_1_in_a_child, job)
    message = str(failure.value)
    assert "rank 0 raised" in message
    sentence = (
        r"BrokenMessage: rank 0 has waited \d+ s in action \d+ of 48 \((.*)\) for (.*) from rank 1, and got an error"
    )
    found = re.search(sentence, message)
    assert found and "micro-batch" in found[1] and found[2] in ("its gradient", "a receive of its output")
    assert "Look at the end of the log of rank 1: it died" in message


@pytest.mark.parametrize(
    ("first", "where"),
    [
        ("send", "action 2 of 4 (forward of micro-batch 0, segment 1) for a receive of its output from rank 1"),
        ("receive", "action 3 of 4 (backward of micro-batch 0, segment 1) for its gradient from rank 1"),
    ],
)
def test_a_peer_that_is_gone_already_is_named_too(ranks: RankPool, first: str, where: str) -> None:
    """The backend then fails in the call that starts the message."""
    message, _ = ranks.run(2, p2p_bed.communicate_with_dead_peer, first)
    assert re.match(
        rf"BrokenMessage: rank 0 has waited \d+ s in {re.escape(where)}, and got an error instead: ", message
    )
