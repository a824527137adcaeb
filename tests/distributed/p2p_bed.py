"""Jobs that check the messages between stages: contents, order, and the report of a rank that waits."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.probes import Notes
from tests.regression.arm import Job, train_on_this_rank
from tests.regression.planted import Planted, wrapped


@contextmanager
def traffic(notes: Notes) -> Iterator[None]:
    """Record what each training step sends and receives, as (peer, bytes), and calls that must not happen."""
    from megatron.core import mpu
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from megatron.longseq.pipeline.forward_backward import ForwardBackward

    step: dict[str, list[Any]] = {}

    def noted(name: str, original: Any, tensor: Any = None, peer: Any = None, *args: Any, **named: Any) -> Any:
        if step:
            step[name].append((peer, tensor.nbytes) if name in ("isend", "irecv") else name)
        return original(*(a for a in (tensor, peer) if a is not None), *args, **named)

    def call(original: Any, runner: Any, **named: Any) -> Any:
        nonlocal step
        # The channels' first messages do not count.
        runner._prepare(named["model"], mpu.get_pipeline_model_parallel_group())
        step = {"isend": [], "irecv": [], "synchronize": [], "_communicate_shapes": [], "barrier": []}
        try:
            return original(runner, **named)
        finally:
            notes.append(step | {"timeout": runner.timeout})
            step = {}

    def reporter(owner: Any, name: str) -> Any:
        return wrapped(owner, name, lambda original, *args, **named: noted(name, original, *args, **named))

    with (
        reporter(dist, "isend"),
        reporter(dist, "irecv"),
        reporter(dist, "barrier"),
        reporter(torch.cuda, "synchronize"),
        reporter(P2PCommunicator, "_communicate_shapes"),
        wrapped(ForwardBackward, "__call__", call),
    ):
        yield


def exchange(stages: int, virtual: int, lengths: tuple[int, ...], microbatches: int, options: dict[str, Any]) -> int:
    """Send a number that identifies its message along every message of each schedule. Return how many arrived.

    Every rank dawdles differently, so that messages wait for receives and receives for messages. With more ranks than
    stages there are several pipelines, whose ranks take turns as upstream's do.
    """
    from megatron.longseq.pipeline.plan.generators import forward_only, make
    from megatron.longseq.pipeline.plan.receives import AHEAD, plan_receives
    from megatron.longseq.pipeline.plan.schedule import Action, ActionKind, Pipeline
    from megatron.longseq.pipeline.runtime.hang_report import HangReporter
    from megatron.longseq.pipeline.runtime.p2p import Mailbox, open_channels

    dist.init_process_group("gloo")
    pipelines = dist.get_world_size() // stages
    mine = dist.get_rank() % pipelines
    groups = [dist.new_group([place * pipelines + which for place in range(stages)]) for which in range(pipelines)]
    channels = open_channels(groups[mine], virtual)
    rank = dist.get_rank(groups[mine])
    pipeline = Pipeline(stages, microbatches, len(lengths), virtual)
    early, reporter = 0, HangReporter(0)

    def word(action: Action, place: int) -> torch.Tensor:
        code = (
            (place * 100 + action.microbatch) * 100
            + action.segment
            + (0.5 if action.kind is ActionKind.BACKWARD else 0.0)
        )
        return torch.full((lengths[action.segment], 1, 2), float(code + 1e6 * mine))

    for schedule in (make(pipeline, **options), forward_only(pipeline), make(pipeline, **options)):
        order, posts = schedule.orders[rank], plan_receives(schedule)[rank]
        mail = Mailbox(channels, schedule, posts, lambda action: (lengths[action.segment], 1, 2), torch.empty, reporter)
        for index, action in enumerate(order):
            mail.post()
            ahead = list(mail.posted)
            for kind in (ActionKind.FORWARD, ActionKind.BACKWARD):
                assert sum(a.kind is kind for a in ahead) <= AHEAD * (2 if virtual > 1 else 1)
            received, starts = mail.take(action)
            assert starts is None
            stage = pipeline.stage(rank, action.vstage)
            if received is not None:
                early += 1
                assert torch.equal(received, word(action, stage + (-1 if action.kind is ActionKind.FORWARD else 1)))
            time.sleep(0.002 * ((index * 7 + rank * 3) % 4))
            mail.send(action, word(action, stage))
        mail.close()
        assert not mail.posted
    return early


@contextmanager
def stalled_stage() -> Iterator[Planted]:
    """Delay the first segment of the last stage by 2.6 seconds."""
    with _at_forward(1, lambda: time.sleep(2.6)) as planted:
        yield planted


@contextmanager
def dying_stage() -> Iterator[Planted]:
    """Kill the last stage in its fifth forward."""
    with _at_forward(5, lambda: os.kill(os.getpid(), 9)) as planted:
        yield planted


@contextmanager
def _at_forward(number: int, act: Any) -> Iterator[Planted]:
    from megatron.longseq import pretrain_gpt

    planted, calls = Planted(), 0

    def forward_step(original: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and os.environ["RANK"] == "1":
            planted.times += 1
            act()
        return original(*args)

    with wrapped(pretrain_gpt, "forward_step", forward_step):
        yield planted


def train_with_rank_1_in_a_child(job: Job) -> None:
    """Train; on rank 1 in a child, so that its death leaves somebody who waits for what rank 0 says."""
    if os.environ["RANK"] == "0":
        train_on_this_rank(job)
        return
    child = os.fork()
    if child == 0:
        try:
            train_on_this_rank(job)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    time.sleep(40)


def communicate_with_dead_peer(first: str) -> str:
    """Kill rank 1 once the channels are open, then send or receive on rank 0. Return the error message of rank 0."""
    from megatron.longseq.pipeline.plan.generators import make
    from megatron.longseq.pipeline.plan.receives import plan_receives
    from megatron.longseq.pipeline.plan.schedule import Pipeline
    from megatron.longseq.pipeline.runtime.hang_report import HangReporter
    from megatron.longseq.pipeline.runtime.p2p import Mailbox, open_channels

    if os.environ["RANK"] == "1":
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return ""
    dist.init_process_group("gloo")
    channels = open_channels(dist.group.WORLD, 1)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    time.sleep(1.0)
    pipeline = Pipeline(2, 1, 2)
    schedule = make(pipeline)
    order, posts = schedule.orders[0], plan_receives(schedule)[0]
    mail = Mailbox(channels, schedule, posts, lambda _: (2, 1, 2), torch.empty, HangReporter(0))
    try:
        if first == "send":
            mail.send(order[1], torch.zeros(2, 1, 2))
            mail.close()
        else:
            for _ in order[:3]:
                mail.post()
            mail.take(order[2])
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def finish_before_the_peer_begins() -> None:
    """Run an evaluation in which rank 0 only sends and rank 1 receives 1.7 seconds late."""
    from megatron.longseq.pipeline.plan.generators import forward_only
    from megatron.longseq.pipeline.plan.receives import plan_receives
    from megatron.longseq.pipeline.plan.schedule import Pipeline
    from megatron.longseq.pipeline.runtime.hang_report import HangReporter
    from megatron.longseq.pipeline.runtime.p2p import Mailbox, open_channels

    dist.init_process_group("gloo")
    channels, rank, pipeline = open_channels(dist.group.WORLD, 1), dist.get_rank(), Pipeline(2, 1, 2)
    schedule = forward_only(pipeline)
    order, posts = schedule.orders[rank], plan_receives(schedule)[rank]
    with HangReporter(1.0) as reporter:
        time.sleep(1.7 * rank)
        mail = Mailbox(channels, schedule, posts, lambda _: (2, 1, 2), torch.empty, reporter)
        for action in order:
            mail.post()
            mail.take(action)
            mail.send(action, torch.zeros(2, 1, 2))
        mail.close()


def wait_beyond_the_limit() -> str:
    """Let rank 1 send nothing until rank 0's messages time out. Return the error message of rank 0."""
    from megatron.longseq.pipeline.plan.generators import make
    from megatron.longseq.pipeline.plan.receives import plan_receives
    from megatron.longseq.pipeline.plan.schedule import Pipeline
    from megatron.longseq.pipeline.runtime.hang_report import HangReporter
    from megatron.longseq.pipeline.runtime.p2p import Mailbox, open_channels

    dist.init_process_group("gloo")
    channels, pipeline = open_channels(dist.group.WORLD, 1, timedelta(seconds=1)), Pipeline(2, 1, 2)
    if dist.get_rank() == 1:
        time.sleep(3)
        return ""
    schedule = make(pipeline)
    order, posts = schedule.orders[0], plan_receives(schedule)[0]
    mail = Mailbox(channels, schedule, posts, lambda _: (2, 1, 2), torch.empty, HangReporter(0))
    for _ in order[:3]:
        mail.post()
    try:
        mail.take(next(iter(mail.posted)))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
