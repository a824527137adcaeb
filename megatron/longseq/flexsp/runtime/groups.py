"""Process groups of all degrees and kinds. All ranks of the job make them once, in the same order.

A rank is in dozens of them, of which a step uses a few. NCCL allocates the buffers of a communicator with its first
messages, so the ranks of a group are connected when a plan first uses it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.attention.runtime.comm import GroupCollectives, P2PChannel
from megatron.longseq.attention.runtime.document_attention import single_rank_strategy
from megatron.longseq.attention.runtime.process_groups import CHANNELS
from megatron.longseq.attention.runtime.ring import RingChannels
from megatron.longseq.attention.runtime.strategies import CPStrategy
from megatron.longseq.distributed import all_groups, same_backend_options

Place = tuple[Mesh, tuple[int, ...]]  # a group's mesh, and its ranks inside the domain


@dataclass(frozen=True)
class FlexibleGroups:
    """The sequence-parallel groups that this rank can be in.

    Attributes:
        domain: data- and context-parallel ranks that share the documents of a step, in order.
        strategies: communicators of each group that this rank is in.
        connected: process groups over which messages have been sent.
    """

    domain: dist.ProcessGroup
    strategies: dict[Place, CPStrategy]
    connected: set[dist.ProcessGroup] = field(default_factory=set)

    @property
    def rank(self) -> int:
        """Rank inside the domain."""
        return self.domain.rank()

    def strategy(self, mesh: Mesh, ranks: tuple[int, ...]) -> CPStrategy:
        """Return the communicators of a group of this rank.

        Args:
            mesh: Ulysses and ring degrees of the group.
            ranks: ranks of the group in the domain, ascending.

        Raises:
            ValueError: No such group was made.
        """
        if (mesh, ranks) not in self.strategies:
            raise ValueError(
                f"FlexSP, rank {self.rank} of {self.domain.size()}: a plan has a group of {mesh.ulysses} x "
                f"{mesh.ring} (Ulysses x ring) ranks {list(ranks)}, for which there is no process group. Groups are "
                "made for --flexsp-degrees and --flexsp-kinds when the run starts."
            )
        return self.strategies[mesh, ranks]

    def connect(self, strategy: CPStrategy) -> None:
        """Send the first messages of a group, unless it has sent some. Its ranks call this at the same time.

        NCCL needs all ranks of a communicator for the first messages, but a plan may let some ranks of a ring send
        nothing. The messages are of the kind that attention sends, because NCCL allocates buffers for each kind.
        """
        if strategy.ulysses is not None and self._is_new(strategy.ulysses.group):
            size = strategy.ulysses.group.size()
            GroupCollectives(strategy.ulysses.group).all_to_all(torch.zeros(size, device=_device(self.domain)))
        if strategy.mesh.ring == 1 or strategy.ring is None:
            return
        for name in CHANNELS:
            group = getattr(strategy.ring, name).group
            if self._is_new(group):
                rank, size = group.rank(), group.size()
                sent, received = torch.zeros(2, 1, device=_device(self.domain))
                P2PChannel(group).post([((rank + 1) % size, sent)], [((rank - 1) % size, received)]).wait()

    def _is_new(self, group: dist.ProcessGroup) -> bool:
        is_new = group not in self.connected
        self.connected.add(group)
        return is_new


def open_groups(domain: dist.ProcessGroup, places: Sequence[Place], timeout: timedelta | None = None) -> FlexibleGroups:
    """Make the communicators of all groups that plans may use. All ranks of the job call this at the same time.

    Groups of the same ranks are shared: the pairs of an all-to-all of two ranks are also those of a mesh of 2 x 2.
    Nothing is sent yet, see `FlexibleGroups.connect`.

    Args:
        domain: the ranks that share the documents of a step.
        places: meshes and ranks of the groups, the same on every rank.
        timeout: time after which a message that does not arrive is an error; None: the backend's own.
    """
    maker = _GroupMaker(domain, timeout)
    domains, rank = all_groups(dist.get_process_group_ranks(domain)), domain.rank()
    is_gloo = dist.get_backend(domain) == "gloo"
    channels = [name for name in CHANNELS if name == "kv" or not (is_gloo or name == "far_kv")]  # no double rings here
    strategies: dict[Place, CPStrategy] = {}
    for mesh, ranks in dict.fromkeys(places):
        if mesh.size == 1:
            if rank in ranks:
                strategies[mesh, ranks] = single_rank_strategy()
            continue
        exchange = maker.make("all", domains, ranks, mesh.ulysses_groups) if mesh.ulysses > 1 else None
        rings = {name: maker.make(name, domains, ranks, mesh.ring_groups) for name in channels if mesh.ring > 1}
        if rank in ranks:
            strategies[mesh, ranks] = CPStrategy(
                mesh,
                rank - ranks[0],
                None if exchange is None else GroupCollectives(exchange),
                _channels(rings) if mesh.ring > 1 else single_rank_strategy().ring,
            )
    return FlexibleGroups(domain, strategies)


def _channels(rings: dict[str, dist.ProcessGroup | None]) -> RingChannels:
    """Return the channels of a ring, which share one process group where no other was made."""
    groups = [rings.get(name) or rings["kv"] for name in CHANNELS]
    assert None not in groups, "this rank is in one of the rings of its group"
    return RingChannels(*(P2PChannel(group) for group in groups if group is not None))


def _device(group: dist.ProcessGroup) -> torch.device:
    is_nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


class _GroupMaker:
    """Makes process groups of ranks of every domain, each of them once.

    Args:
        like: a group with the backend and the options of the new ones.
        timeout: see `open_groups`.
    """

    def __init__(self, like: dist.ProcessGroup, timeout: timedelta | None) -> None:
        self.like, self.timeout = like, timeout
        self._own: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
        self._made: set[tuple[str, tuple[int, ...]]] = set()

    def make(
        self,
        name: str,
        domains: Iterable[tuple[int, ...]],
        ranks: Sequence[int],
        cut: Callable[[Sequence[int]], list[tuple[int, ...]]],
    ) -> dist.ProcessGroup | None:
        """Make the parts of a group in every domain; return this rank's part, or None if it is in none."""
        own = None
        for domain in domains:
            for part in cut([domain[rank] for rank in ranks]):
                key = (name, part)
                if key not in self._made:
                    self._made.add(key)
                    self._add(key)
                own = self._own.get(key, own)
        return own

    def _add(self, key: tuple[str, tuple[int, ...]]) -> None:
        _, ranks = key
        options = same_backend_options(self.like)
        group = dist.new_group(list(ranks), self.timeout, dist.get_backend(self.like), options)
        if dist.get_rank() in ranks:
            self._own[key] = group
