"""Send hidden states and their gradients between pipeline stages.

All shapes follow from the plan, so nothing is negotiated and the device is never synchronised. A receive is posted
before the action that needs it, while earlier actions compute. Forward and backward messages have a process group each,
and so has the way from the last rank to the first that virtual stages need. NCCL keeps the order of posting within one
group, and a gradient must not wait behind hidden states that are due later.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron.longseq.distributed import all_groups, new_groups
from megatron.longseq.pipeline.plan.receives import ReceiveOrder
from megatron.longseq.pipeline.plan.schedule import Action, ActionKind, Schedule, source, target
from megatron.longseq.pipeline.runtime.hang_report import HangReporter, Wait

CONTENT = {ActionKind.FORWARD: "its hidden states", ActionKind.BACKWARD: "its gradient"}
TIMER_NAMES = {ActionKind.FORWARD: "forward-recv", ActionKind.BACKWARD: "backward-recv"}  # upstream's


class Outbox:
    """Keep each sent tensor alive until its message has left. Only `close` waits.

    NCCL reports whether a send has completed. Gloo reports it only to a thread that waits, so with gloo a thread waits
    for one send after the other.

    Args:
        backend: backend of the process groups.
    """

    def __init__(self, backend: str) -> None:
        self.sent: deque[tuple[Any, torch.Tensor]] = deque()
        self.queue: queue.Queue[tuple[Any, torch.Tensor]] | None = None
        self.failure: BaseException | None = None
        if backend == "gloo":
            self.queue = queue.Queue()
            threading.Thread(target=self._wait_in_turn, name="longseq-outbox", daemon=True).start()

    def add(self, work: Any, tensor: torch.Tensor) -> None:
        """Keep `tensor` until the send `work` has completed.

        Args:
            work: handle of the send, from torch.distributed.
            tensor: tensor that is sent.
        """
        if self.queue is not None:
            self.queue.put((work, tensor))
            return
        self.sent.append((work, tensor))
        while self.sent and self.sent[0][0].is_completed():
            self.sent.popleft()

    def close(self) -> None:
        """Wait until every message has left.

        Raises:
            RuntimeError: a message could not be delivered.
        """
        while self.sent:
            self.sent.popleft()[0].wait()
        if self.queue is not None:
            self.queue.join()
        if self.failure is not None:
            raise RuntimeError(f"a message could not be sent or received: {self.failure}") from self.failure

    def _wait_in_turn(self) -> None:
        assert self.queue is not None
        while True:
            work, tensor = self.queue.get()
            try:
                work.wait()
            except BaseException as error:
                self.failure = self.failure or error
            del work, tensor  # before get(), which may block for long
            self.queue.task_done()


@dataclass(frozen=True)
class StageChannels:
    """The process groups over the ranks of a pipeline, one per direction.

    Attributes:
        group: upstream's pipeline-parallel group; its ranks are the stages, in order.
        channels: (kind, whether the message goes from the last rank to the first or back) -> process group.
        outbox: messages that have not left yet.
        is_serial: whether messages of a rank in one process group wait for one another, whoever their peers are.
    """

    group: dist.ProcessGroup
    channels: dict[tuple[ActionKind, bool], dist.ProcessGroup]
    outbox: Outbox
    is_serial: bool = False

    def channel(self, kind: ActionKind, sender: int, receiver: int) -> dist.ProcessGroup:
        """Return the process group for messages of a kind between two pipeline ranks.

        Args:
            kind: FORWARD for hidden states, BACKWARD for their gradients.
            sender, receiver: pipeline ranks.
        """
        wraps = abs(receiver - sender) != 1 or (receiver < sender) != (kind is ActionKind.BACKWARD)
        return self.channels[kind, wraps]


def open_channels(group: dist.ProcessGroup, virtual: int, timeout: timedelta | None = None) -> StageChannels:
    """Create the process groups of all pipelines. Every rank of the job must call this at the same time.

    One message is sent over every edge right away, in an order that cannot deadlock. NCCL connects two ranks at their
    first message and blocks the process until both are there. Later, when receives are posted early, that would
    deadlock.

    Args:
        group: upstream's pipeline-parallel group.
        virtual: virtual stages per rank; messages wrap around only if there is more than one.
        timeout: time after which a missing message is an error; None: the backend's own.
    """
    mine = dist.get_process_group_ranks(group)
    pipelines = all_groups(mine)
    channels = {
        (kind, wrap): new_groups(pipelines, group, timeout)
        for kind in (ActionKind.FORWARD, ActionKind.BACKWARD)
        for wrap in ((False, True) if virtual > 1 else (False,))
    }
    for (kind, wrap), channel in channels.items():
        for sender, receiver in _edges(len(mine), kind, wrap):
            _connect(channel, mine, sender, receiver)
    return StageChannels(group, channels, Outbox(dist.get_backend(group)), is_serial=_is_serial(group))


def _is_serial(group: dist.ProcessGroup) -> bool:
    """Return whether NCCL has one stream per process group, not one per pair of ranks.

    So it is if the script calls `init_process_group` with a `device_id`, which upstream does not.
    """
    return dist.get_backend(group) == "nccl" and dist.group.WORLD.bound_device_id is not None


def _edges(size: int, kind: ActionKind, wrap: bool) -> list[tuple[int, int]]:
    forward = [(size - 1, 0)] if wrap else [(rank, rank + 1) for rank in range(size - 1)]
    return forward if kind is ActionKind.FORWARD else [(receiver, sender) for sender, receiver in reversed(forward)]


def _connect(channel: dist.ProcessGroup, ranks: Sequence[int], sender: int, receiver: int) -> None:
    me = dist.get_rank()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    tensor = torch.zeros(1, device=device)
    if me == ranks[sender]:
        dist.send(tensor, ranks[receiver], group=channel)
    elif me == ranks[receiver]:
        dist.recv(tensor, ranks[sender], group=channel)


@dataclass
class _PostedReceive:
    """A receive that is posted and not taken."""

    wait: Wait
    tensor: torch.Tensor
    works: tuple[Any, ...]
    starts: torch.Tensor | None = None


class Mailbox:
    """The messages of one rank during one step.

    Args:
        channels, schedule, receive_order, shape, reporter: see `Executor`.
        make: creates an empty tensor of a shape, with the dtype and device of the hidden states.
        starts: shape [micro-batch, sequence] of the document starts, or None to send none. They are sent ahead of the
            hidden states of a micro-batch's first segment, since upstream gives no batch to the stages between the
            first and the last.
        timers: upstream's timers, which then measure the waits under upstream's names; or None.
    """

    def __init__(
        self,
        channels: StageChannels,
        schedule: Schedule,
        receive_order: ReceiveOrder,
        shape: Callable[[Action], tuple[int, ...]],
        make: Callable[[tuple[int, ...]], torch.Tensor],
        reporter: HangReporter,
        starts: tuple[int, int] | None = None,
        timers: Any = None,
    ) -> None:
        self.channels, self.pipeline, self.shape, self.make = channels, schedule.pipeline, shape, make
        self.reporter, self.starts, self.timers = reporter, starts, timers
        self.rank = dist.get_rank(channels.group)
        self.ranks = dist.get_process_group_ranks(channels.group)
        self.index = {action: index for index, action in enumerate(schedule.orders[self.rank])}
        self.last_send: Wait | None = None
        self.device_waits = dist.get_backend(channels.group) == "nccl"
        self.due = deque(receive_order)
        self.posted: dict[Action, _PostedReceive] = {}

    def post(self) -> None:
        """Post the receives that are due; call this before each action."""
        for action in self.due.popleft():
            self._post(action)

    def _post(self, action: Action) -> None:
        sender = source(self.pipeline, self.rank, action)
        assert sender is not None, f"{action} receives nothing"
        tensor, peer = self.make(self.shape(action)), sender[0]
        channel = self.channels.channel(action.kind, peer, self.rank)
        wait = self._wait(action, peer, CONTENT[action.kind])
        starts, works = None, []
        with self.reporter.blocking(wait):
            if self._has_starts(action):
                starts = torch.empty(self.starts or (), dtype=torch.int32, device=tensor.device)
                works.append(dist.irecv(starts, self.ranks[peer], group=channel))
            works.append(dist.irecv(tensor, self.ranks[peer], group=channel))
        self.posted[action] = _PostedReceive(wait, tensor, tuple(works), starts)

    def _wait(self, action: Action, peer: int, content: str) -> Wait:
        return Wait(dist.get_rank(), self.index[action], len(self.index), action, self.ranks[peer], content)

    def _has_starts(self, action: Action) -> bool:
        return self.starts is not None and action.kind is ActionKind.FORWARD and action.segment == 0

    def take(self, action: Action) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Wait for the message of `action`; return its tensor and its document starts, each None if not sent.

        Returns:
            The hidden states or their gradient, and int32 document starts [micro-batch, sequence]; each None if not
            sent.

        Raises:
            BrokenMessage: the message did not arrive; names the action and the sending rank.
        """
        posted = self.posted.pop(action, None)
        if posted is None:
            return None, None
        with self._timed(TIMER_NAMES[action.kind]), self.reporter.blocking(posted.wait):
            for work in posted.works:
                work.wait()
        if self.device_waits:  # the host runs ahead; an event behind the receive tells when it is complete
            event = torch.cuda.Event()
            event.record()
            self.reporter.outstanding(posted.wait, event.query)
        return posted.tensor, posted.starts

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if self.timers is not None:
            self.timers(name, log_level=2).start()
        yield
        if self.timers is not None:
            self.timers(name).stop()

    def send(self, action: Action, tensor: torch.Tensor | None, starts: torch.Tensor | None = None) -> None:
        """Send the output of `action`, and its document starts, to the rank that needs it; return at once.

        Args:
            action: the action whose output is sent.
            tensor: its output; None is allowed only if no other rank needs it.
            starts: document starts, int32 [micro-batch, sequence]; None: every sequence is one document.

        Raises:
            BrokenMessage: the receiver is gone; names the action and the rank.
        """
        receiver = target(self.pipeline, self.rank, action)
        if receiver is None or receiver[0] == self.rank:
            return
        assert tensor is not None, f"{action} has no output to send"
        peer, message = receiver[0], tensor.detach().contiguous()
        channel = self.channels.channel(action.kind, self.rank, peer)
        self.last_send = self._wait(action, peer, "a receive of its output")
        with self.reporter.blocking(self.last_send):
            if self._has_starts(action):
                if starts is None:  # no stage so far was given a mask: every sequence is one document
                    starts = torch.zeros(self.starts or (), dtype=torch.int32, device=message.device)
                self.channels.outbox.add(dist.isend(starts, self.ranks[peer], group=channel), starts)
            self.channels.outbox.add(dist.isend(message, self.ranks[peer], group=channel), message)

    def close(self) -> None:
        """Wait until all messages have left, and check that none is still expected.

        Raises:
            BrokenMessage: a message could not be delivered.
            RuntimeError: a receive was not taken.
        """
        with self.reporter.blocking(self.last_send) if self.last_send is not None else nullcontext():
            self.channels.outbox.close()
        left = [str(action) for action in (*self.posted, *(action for due in self.due for action in due))]
        if left:
            raise RuntimeError(f"pipeline rank {self.rank} ended its step before it received the {left[0]}")
