"""Run attention over real process groups, and compare the calls of torch.distributed with our counters."""

from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from megatron.longseq.attention.plan.comm_type import CommType
from megatron.longseq.attention.runtime.process_groups import open_strategies
from megatron.longseq.attention.runtime.strategies import CPStrategy
from megatron.longseq.distributed import SentCounter
from tests.regression.planted import wrapped
from tests.unit.attention_bed import assert_close
from tests.unit.context_run import Problem, Ranks

CHANNELS = ("kv", "grads", "far_kv", "far_grads")


def given_to_torch(stack: ExitStack) -> dict[str, SentCounter]:
    """Count calls of torch.distributed: what leaves this rank."""
    sent = {"ring": SentCounter(), "all-to-all": SentCounter(), "gather": SentCounter()}

    def batch(original: Any, operations: Any) -> Any:
        for operation in operations:
            if operation.op is dist.isend:
                sent["ring"].count(operation.tensor.nbytes)
        return original(operations)

    def all_to_all(original: Any, output: Any, given: Any, **named: Any) -> Any:
        sent["all-to-all"].count(given.nbytes - given.nbytes // named["group"].size())
        return original(output, given, **named)

    def all_gather(original: Any, output: Any, given: Any, **named: Any) -> Any:
        sent["gather"].count(given.nbytes * (named["group"].size() - 1))
        return original(output, given, **named)

    for name, function in (
        ("batch_isend_irecv", batch),
        ("all_to_all_single", all_to_all),
        ("all_gather_into_tensor", all_gather),
    ):
        stack.enter_context(wrapped(dist, name, function))
    return sent


def counters(strategy: CPStrategy) -> dict[str, SentCounter]:
    """Return our counters in the same form."""
    around = [getattr(strategy.ring, name).sent for name in CHANNELS]
    ring = SentCounter(sum(one.bytes for one in around), sum(one.messages for one in around))
    exchanged = strategy.ulysses.sent if strategy.ulysses else SentCounter()  # type: ignore[attr-defined]
    gathered = strategy.gather.sent if strategy.gather else SentCounter()  # type: ignore[attr-defined]
    return {"ring": ring, "all-to-all": exchanged, "gather": gathered}


def attend(problems: list[Problem]) -> list[Any]:
    """Run each problem on this rank, and compare its results; return (what torch was given, what lanes said)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), []
    for problem in problems:
        comm_types = {"way": CommType(problem.mesh, problem.gathers)}
        strategy = open_strategies(dist.group.WORLD, comm_types, problem.inner)["way"]
        inputs = problem.inputs()
        ranks = Ranks(problem, inputs, [strategy] * problem.mesh.size)
        with ExitStack() as stack:
            given = given_to_torch(stack)
            ranks.forward_of(rank)
            ranks.backward_of(rank)
        expected = problem.expected(inputs)
        for part in ranks.parts[rank]:
            assert part.out is not None
            results = [part.out.detach(), *(leaf.grad for leaf in part.leaves)]
            assert_close(results, [right[part.at] for right in expected], sum(problem.lengths))
        found.append((given, counters(strategy)))
    dist.destroy_process_group()
    return found
