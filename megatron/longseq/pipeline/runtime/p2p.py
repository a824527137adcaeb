"""Hidden states and their gradients between pipeline stages: static shapes, independent and non-blocking per direction.

Every shape is known from the plan, so nothing is negotiated and nothing synchronises the device. A receive is posted
before the action that needs it, while the actions before it compute. Forward and backward, and the wrap from the last
rank to the first that virtual stages need, each have a communicator of their own: within one communicator NCCL keeps
the order of posting, and a gradient must not wait behind a hidden state that is not due yet.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron.longseq.distributed import all_groups, same_backend_options
from megatron.longseq.pipeline.plan.receives import Posts
from megatron.longseq.pipeline.plan.schedule import Action, Kind, Schedule, source, target
from megatron.longseq.pipeline.runtime.hang_report import Wait, Watch
from megatron.longseq.pipeline.runtime.outbox import Outbox

TAKEN = "a receive of its output"
WHAT = {Kind.FORWARD: "its hidden states", Kind.BACKWARD: "its gradient"}
TIMED = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward"}


@dataclass(frozen=True)
class Lanes:
    """One communicator per direction over the ranks of a pipeline.

    Attributes:
        group: upstream's pipeline-parallel group; its ranks are the stages, in order.
        lanes: (kind, whether the message wraps around the ring) -> communicator over the same ranks.
        outbox: messages on their way out.
    """

    group: dist.ProcessGroup
    lanes: dict[tuple[Kind, bool], dist.ProcessGroup]
    outbox: Outbox

    def lane(self, kind: Kind, sender: int, receiver: int) -> dist.ProcessGroup:
        """Return the communicator for a message between two pipeline ranks."""
        return self.lanes[kind, abs(receiver - sender) != 1 or (receiver < sender) != (kind is Kind.BACKWARD)]


def open_lanes(group: dist.ProcessGroup, virtual: int, timeout: timedelta | None = None) -> Lanes:
    """Make the communicators of all pipelines; every rank of the job calls this at the same time.

    A first message goes over every edge, in an order that cannot wait in a circle: NCCL connects two ranks at their
    first message and blocks the process until both are there, which would deadlock later, when receives are posted
    early.

    Args:
        group: upstream's pipeline-parallel group.
        virtual: virtual stages per rank; only with more than one do messages wrap around.
        timeout: after which a message that does not come is an error; None: the backend's own.
    """
    mine, backend = dist.get_process_group_ranks(group), dist.get_backend(group)
    wraps = (False, True) if virtual > 1 else (False,)
    lanes = {}
    for ranks in all_groups(mine):  # torch wants every rank at the making of every group
        for kind in (Kind.FORWARD, Kind.BACKWARD):
            for wrap in wraps:
                lane = dist.new_group(list(ranks), timeout, backend, same_backend_options(group))
                if ranks == tuple(mine):
                    lanes[kind, wrap] = lane
    for (kind, wrap), lane in lanes.items():
        for sender, receiver in _edges(len(mine), kind, wrap):
            _greet(lane, mine, sender, receiver)
    return Lanes(group, lanes, Outbox(backend))


def _edges(size: int, kind: Kind, wrap: bool) -> list[tuple[int, int]]:
    forward = [(size - 1, 0)] if wrap else [(rank, rank + 1) for rank in range(size - 1)]
    return forward if kind is Kind.FORWARD else [(receiver, sender) for sender, receiver in reversed(forward)]


def _greet(lane: dist.ProcessGroup, ranks: Sequence[int], sender: int, receiver: int) -> None:
    me = dist.get_rank()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    word = torch.zeros(1, device=device)
    if me == ranks[sender]:
        dist.send(word, ranks[receiver], group=lane)
    elif me == ranks[receiver]:
        dist.recv(word, ranks[sender], group=lane)


@dataclass
class _Posted:
    """A receive on its way."""

    wait: Wait
    tensor: torch.Tensor
    works: tuple[Any, ...]
    starts: torch.Tensor | None = None


class Mailbox:
    """The messages of one rank during one step.

    Args:
        lanes: the communicators.
        schedule: what all ranks run.
        posts: when this one posts receives (`posts`).
        shape: segment -> shape of its hidden states on this rank.
        make: makes an empty tensor of a shape, with the type and device of the hidden states.
        watch: told of every wait.
        starts: shape [micro-batch, sequence] of the documents' starts, which go ahead of the hidden states of a
            micro-batch's first segment: upstream gives no batch to stages between the first and the last. None: no
            documents are sent.
        timers: upstream's, which get the time of the waits under upstream's names; None: nobody asks.
    """

    def __init__(
        self,
        lanes: Lanes,
        schedule: Schedule,
        posts: Posts,
        shape: Callable[[int], tuple[int, ...]],
        make: Callable[[tuple[int, ...]], torch.Tensor],
        watch: Watch,
        starts: tuple[int, int] | None = None,
        timers: Any = None,
    ) -> None:
        self.starts, self.timers = starts, timers
        self.lanes, self.pipeline, self.shape, self.make, self.watch = lanes, schedule.pipeline, shape, make, watch
        self.rank = dist.get_rank(lanes.group)
        self.ranks = dist.get_process_group_ranks(lanes.group)
        self.index = {action: index for index, action in enumerate(schedule.orders[self.rank])}
        self.last_sent: Wait | None = None
        self.device_waits = dist.get_backend(lanes.group) == "nccl"
        self.due = deque(posts)
        self.posted: dict[Action, _Posted] = {}

    def post(self) -> None:
        """Post the receives that are due; call it before each action."""
        for action in self.due.popleft():
            self._post(action)

    def _post(self, action: Action) -> None:
        sender = source(self.pipeline, self.rank, action)
        assert sender is not None, f"{action} receives nothing"
        tensor, peer = self.make(self.shape(action.segment)), sender[0]
        lane, wait = self.lanes.lane(action.kind, peer, self.rank), self._wait(action, peer, WHAT[action.kind])
        starts, works = None, []
        with self.watch.receive(wait):
            if self._tells_documents(action):
                starts = torch.empty(self.starts or (), dtype=torch.int32, device=tensor.device)
                works.append(dist.irecv(starts, self.ranks[peer], group=lane))
            works.append(dist.irecv(tensor, self.ranks[peer], group=lane))
        self.posted[action] = _Posted(wait, tensor, tuple(works), starts)

    def _wait(self, action: Action, peer: int, what: str) -> Wait:
        return Wait(dist.get_rank(), self.index[action], len(self.index), action, self.ranks[peer], what)

    def _tells_documents(self, action: Action) -> bool:
        return self.starts is not None and action.kind is Kind.FORWARD and action.segment == 0

    def take(self, action: Action) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Wait for what `action` receives and return it with the documents' starts; None where it receives nothing.

        Raises:
            BrokenReceive: the message did not come; names the action and the rank it was expected from.
        """
        posted = self.posted.pop(action, None)
        if posted is None:
            return None, None
        with self._timed(f"{TIMED[action.kind]}-recv"), self.watch.receive(posted.wait):
            for work in posted.works:
                work.wait()
        if self.device_waits:  # the host goes on; an event behind the receive tells when it is there
            event = torch.cuda.Event()
            event.record()
            self.watch.outstanding(posted.wait, event.query)
        return posted.tensor, posted.starts

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if self.timers is not None:
            self.timers(name, log_level=2).start()
        yield
        if self.timers is not None:
            self.timers(name).stop()

    def send(self, action: Action, tensor: torch.Tensor | None, starts: torch.Tensor | None = None) -> None:
        """Send the output of `action` (and the starts of its documents) to whom it concerns; returns at once.

        Raises:
            BrokenReceive: the receiver is gone; names the action and the rank.
        """
        goal = target(self.pipeline, self.rank, action)
        if goal is None or goal[0] == self.rank:
            return
        assert tensor is not None, f"{action} has no output to send"
        message = tensor.detach().contiguous()
        lane = self.lanes.lane(action.kind, self.rank, goal[0])
        self.last_sent = self._wait(action, goal[0], TAKEN)
        with self.watch.receive(self.last_sent):
            if self._tells_documents(action):
                if starts is None:  # no stage so far was handed a mask: every sequence is one document
                    starts = torch.zeros(self.starts or (), dtype=torch.int32, device=message.device)
                self.lanes.outbox.add(dist.isend(starts, self.ranks[goal[0]], group=lane), starts)
            self.lanes.outbox.add(dist.isend(message, self.ranks[goal[0]], group=lane), message)

    def close(self) -> None:
        """Wait until everything sent has left, and check that nothing is still expected.

        Raises:
            BrokenReceive: a message could not be delivered.
        """
        with self.watch.receive(self.last_sent) if self.last_sent is not None else nullcontext():
            self.lanes.outbox.close()
        left = [str(action) for action in (*self.posted, *(action for due in self.due for action in due))]
        if left:
            raise RuntimeError(f"pipeline rank {self.rank} ends its step without having received the {left[0]}")
