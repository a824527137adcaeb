"""Where a bucket's gradients and parameters lie: whole while layers use them, this rank's part in between.

Layers, fused kernels and upstream's hooks hold views of the whole bucket for good. Its memory comes and goes under
them: the storage is resized, no view is bound anew.
"""

import torch
from torch import Tensor

from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.collectives import Region
from megatron.longseq.sharding.runtime.comm_queue import After, Handle
from megatron.longseq.sharding.runtime.comm_streams import in_main_stream
from megatron.longseq.sharding.runtime.state import Sharding, cut

IN_FLIGHT = 2  # buckets of gradients on the wire, beside the one that fills: one inside groups, one between them


class Whole:
    """The memory of a whole bucket, which comes and goes under its views.

    On a GPU it is the main stream's, in which layers compute and most of it is asked for and given back. Upstream makes
    its wrapper in another one, and autograd then runs the hooks of parameters in that.
    """

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device | str) -> None:
        with in_main_stream(torch.device(device)):
            self.flat = torch.empty(numel, dtype=dtype, device=device)
        self.flat.zero_()
        self.is_there = True

    def take(self) -> None:
        """Give the bucket memory, if it has none; its content then is anything."""
        if not self.is_there and self._memory().resizable():
            with in_main_stream(self.flat.device):
                self._memory().resize_(self.flat.numel() * self.flat.element_size())
        self.is_there = True

    def free(self) -> None:
        """Give its memory back: nothing may be queued any more that reads it, but on the current and the main stream.

        Memory that something else was given a share of, as a checkpoint's writer may be on a CPU, stays where it is.
        """
        if self._memory().resizable():
            with in_main_stream(self.flat.device):
                self._memory().resize_(0)
        self.is_there = False

    def _memory(self) -> torch.UntypedStorage:
        return self.flat.untyped_storage()


class GradStore:
    """Gradients of a bucket.

    At level N they accumulate in the whole bucket. Else they do so in this rank's part, and the whole is scratch that
    holds one micro-batch's.

    Args:
        sharding: how.
        numel: elements of the bucket.
        dtype: in which gradients accumulate.
        device: where.
    """

    def __init__(self, sharding: Sharding, numel: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.sharding, self.level, self.numel = sharding, sharding.strategy.grads, numel
        self.whole = Whole(numel, dtype, device)
        self.held = sharding.span(self.level, numel)
        self.part = self.whole.flat
        if self.level is not Level.NONE:
            self.part = torch.empty(len(self.held), dtype=dtype, device=device).zero_()
        self._reducing: Handle | None = None

    @property
    def owned(self) -> Tensor:
        """A view of the sums that this rank's optimizer reads; right after `finish`."""
        return cut(self.part, self._owned_span, self.held.start)

    @property
    def _owned_span(self) -> range:
        return self.sharding.span(self.sharding.strategy.optimizer, self.numel)

    def close(self) -> None:
        """Free the scratch: nothing has been added to it."""
        if self.level is not Level.NONE:
            self.whole.free()

    def open(self) -> None:
        """Have the whole bucket there, zero if it was not: a gradient is about to be added."""
        if self._reducing is not None:
            self.settle()
        if not self.whole.is_there:
            self.whole.take()
            self.whole.flat.zero_()

    def reduce(self, label: str, factor: float = 1.0) -> None:
        """Start adding a micro-batch's gradients, which are all in the whole bucket, to the parts of all ranks.

        Args:
            label: of the bucket.
            factor: that their sum over ranks is multiplied with.
        """
        waiting = self.sharding.in_flight
        while len(waiting) >= IN_FLIGHT:
            waiting[0].settle()
        wire = self._on_wire(self.whole.flat)
        if wire is not self.whole.flat:
            self.whole.free()  # the copy was made in the current stream

        def add() -> None:
            self.part.add_(cut(wire, self.held), alpha=factor)

        self._reducing = self._submit("grads", self.sharding.region(wire), add, label, None)
        waiting.append(self)

    def settle(self) -> None:
        """Wait for the micro-batch on the wire, and free the scratch."""
        if self._reducing is not None:
            self._reducing.wait()
            self._reducing = None
            self.sharding.in_flight.remove(self)
            self.whole.free()

    def finish(self, label: str) -> Handle:
        """Start making the sums of all ranks of what has accumulated; it is in `owned` when the handle is done."""
        if self.sharding.wire is not None:
            self.settle()  # what is copied for the wire has to hold the last micro-batch
        copies = self.sharding.copies
        while len(copies) >= IN_FLIGHT:
            copies.popleft().wait()
        wire = self._on_wire(self.part)
        region = self.sharding.region(wire) if self.level is Level.NONE else Region(None, wire)
        owned = self.owned

        def back() -> None:
            owned.copy_(cut(wire, self._owned_span, self.held.start))

        if wire is self.part:
            return self._submit("finish_grads", region, None, label, self._reducing)
        copies.append(self._submit("finish_grads", region, back, label, self._reducing))
        return copies[-1]

    def scale(self, factor: float | Tensor) -> None:
        """Multiply what has accumulated."""
        self.part.mul_(factor)

    def zero(self) -> None:
        """Forget what has accumulated."""
        self.settle()
        self.part.zero_()

    def _on_wire(self, flat: Tensor) -> Tensor:
        return flat if self.sharding.wire is None else flat.to(self.sharding.wire)

    def _submit(self, term: str, region: Region, after: After | None, label: str, behind: Handle | None) -> Handle:
        phases = self.sharding.phases(term, self.numel * region.part.element_size())
        return self.sharding.lanes.submit(phases, region, f"gradients of {label}", after, behind)


class ParamStore:
    """Parameters of a bucket, trained or frozen.

    At level N they are whole at all times. Else this rank keeps its part, and the whole is gathered for every use.

    Args:
        sharding: how.
        numel: elements of the bucket.
        dtype: of the parameters.
        device: where.
    """

    def __init__(self, sharding: Sharding, numel: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.sharding, self.level, self.numel = sharding, sharding.strategy.params, numel
        self.whole = Whole(numel, dtype, device)
        self.held = sharding.span(self.level, numel)
        self.part = self.whole.flat
        if self.level is not Level.NONE:
            self.part = torch.empty(len(self.held), dtype=dtype, device=device).zero_()
        self.syncing: Handle | None = None
        self._gathering: Handle | None = None
        self._users: set[str] = set()

    def take_part(self) -> None:
        """Keep this rank's part of the whole, which somebody else has written."""
        if self.level is not Level.NONE:
            self.part.copy_(cut(self.whole.flat, self.held))

    def sync(self, label: str) -> None:
        """Start sending what the optimizer has written into the part, as far as ranks keep more than they trained."""
        size = self.numel * self.part.element_size()
        region = Region(None, self.part) if self.level is not Level.NONE else self.sharding.region(self.part)
        phases = self.sharding.phases("finish_params", size)
        if phases:
            self.syncing = self.sharding.lanes.submit(phases, region, f"parameters of {label}")

    def finish_sync(self) -> None:
        """Wait for `sync`, if it has begun."""
        if self.syncing is not None:
            self.syncing.wait()
            self.syncing = None

    def gather(self, user: str) -> None:
        """Start making the bucket whole for a user, if it is not."""
        if self.level is Level.NONE:
            return
        self._users.add(user)
        if self.whole.is_there:
            return
        self.whole.take()
        cut(self.whole.flat, self.held).copy_(self.part)
        phases = self.sharding.phases("params", self.whole.flat.nbytes)
        region = self.sharding.region(self.whole.flat)
        self._gathering = self.sharding.lanes.submit(phases, region, f"parameters for {user}")

    def wait(self) -> None:
        """Have the bucket whole."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def release(self, user: str) -> None:
        """Give the whole bucket back, once the last user has."""
        self._users.discard(user)
        if self.level is not Level.NONE and not self._users:
            self.wait()
            self.whole.free()
