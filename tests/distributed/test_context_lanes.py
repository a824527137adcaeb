"""Attention over real process groups is correct and sends the bytes and messages of the formulas."""

from megatron.longseq.attention.plan.comm_volume import Volume, all_to_all, ring
from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.distributed import SentCounter
from tests.distributed.context_bed import attend
from tests.pool import RankPool
from tests.unit.context_run import Problem, all_gather

SEGMENTS = (32, 16, 16)


def whole(volume: Volume) -> SentCounter:
    return SentCounter(volume.bytes, volume.forward_messages + volume.backward_messages)


def test_bytes_and_messages_given_to_torch_are_the_formulas(ranks: RankPool) -> None:
    problems = [
        Problem(Mesh(1, 4)),
        Problem(Mesh(4, 1)),
        Problem(Mesh(2, 2), (4, 1)),
        Problem(Mesh(2, 2), lengths=SEGMENTS, window=20),
        Problem(Mesh(2, 2), lengths=SEGMENTS),
        Problem(Mesh(1, 4), inner=2),
        Problem(Mesh(1, 4), gathers=True),
        Problem(Mesh(1, 4), lengths=SEGMENTS, gathers=True),
    ]
    results = ranks.run(4, attend, problems)
    for index, problem in enumerate(problems):
        of_ranks = [result[index] for result in results]
        given, counted = (
            {
                name: SentCounter(sum(x[name].bytes for x in all_), sum(x[name].messages for x in all_))
                for name in all_[0]
            }
            for all_ in zip(*of_ranks, strict=True)
        )
        setup = problem.setup
        if problem.gathers:
            formula = all_gather(setup, kept=len(problem.lengths) > 1)
            assert counted["gather"] == whole(formula) and counted["ring"] == given["ring"] == SentCounter()
            grads = given["all-to-all"]  # gradients are scattered by an all-to-all, and added in the order of ranks
            assert SentCounter(given["gather"].bytes + grads.bytes, given["gather"].messages + grads.messages) == whole(
                formula
            )
            continue
        assert counted == given
        assert given["all-to-all"] == whole(all_to_all(setup))
        if problem.window is None:
            assert given["ring"] == whole(ring(setup, problem.inner))
