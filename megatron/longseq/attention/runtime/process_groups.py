"""Process groups of context parallelism. All ranks of the job make them at the same time and in the same order."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.longseq.attention.plan.comm_type import CommType
from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.attention.runtime.comm import GroupCollectives, P2PChannel
from megatron.longseq.attention.runtime.ring import RingChannels
from megatron.longseq.attention.runtime.strategies import CPStrategy
from megatron.longseq.distributed import all_groups, new_groups

CHANNELS = ("kv", "grads", "far_kv", "far_grads")  # fields of `RingChannels`


def reorder_context_group(group: dist.ProcessGroup, mesh: Mesh, timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Make the context-parallel group again, with its ranks in the order of `Mesh.ordered`.

    All ranks of the job call this at the same time. Data and rotary positions are cut by the rank in the new group.

    Args:
        group: upstream's context-parallel group.
        mesh: degrees and placement of Ulysses and rings.
        timeout: time after which a message that does not arrive is an error; None: the backend's own.
    """
    lists = all_groups(dist.get_process_group_ranks(group))
    return new_groups([mesh.ordered(ranks) for ranks in lists], group, timeout, sort_ranks=False)


def open_strategies(
    group: dist.ProcessGroup, types: Mapping[str, CommType], window: int | None, timeout: timedelta | None = None
) -> dict[str, CPStrategy]:
    """Make the communicators of all context-parallel groups. All ranks of the job call this at the same time.

    Args:
        group: upstream's context-parallel group, whose ranks are the context-parallel ranks, in order.
        types: communication types by their names in --cp-comm-type.
        window: --ring-window.
        timeout: time after which a message that does not arrive is an error; None: the backend's own.

    Returns:
        A strategy for each name.
    """
    own, is_gloo = dist.get_process_group_ranks(group), dist.get_backend(group) == "gloo"
    rank, groups = group.rank(), all_groups(own)
    strategies: dict[str, CPStrategy] = {}
    made: dict[tuple[int, int], CPStrategy] = {}
    for name, (mesh, gathers) in types.items():
        key = (mesh.ulysses, mesh.ring)
        if key not in made:
            ulysses_groups = [one for ranks in groups for one in mesh.ulysses_groups(ranks)]
            ulysses = _make(ulysses_groups, ("all",), group, timeout)["all"]
            # A communicator keeps the order of posting. On a GPU, keys would wait for gradients if they shared one.
            # NCCL's take memory each, so what this run does not use is not made: a channel that is missing is that of
            # keys.
            rings = [one for ranks in groups for one in mesh.ring_groups(ranks)]
            names = [name for name in CHANNELS if name == "kv" or not (is_gloo or mesh.ring == 1)]
            channels = _make(rings, [name for name in names if window or name != "far_kv"], group, timeout)
            made[key] = CPStrategy(
                mesh,
                rank,
                GroupCollectives(ulysses) if mesh.ulysses > 1 else None,
                RingChannels(*(P2PChannel(channels.get(channel, channels["kv"])) for channel in CHANNELS)),
                GroupCollectives(channels["kv"]),
            )
        base = made[key]
        strategies[name] = CPStrategy(mesh, rank, base.ulysses, base.ring, base.gather if gathers else None, window)
    return strategies


def _make(
    groups: Sequence[tuple[int, ...]], names: Sequence[str], like: dist.ProcessGroup, timeout: timedelta | None
) -> dict[str, dist.ProcessGroup]:
    """Make a process group of every name for every group of ranks, with another's backend; return this rank's."""
    own = {name: new_groups(groups, like, timeout) for name in names}
    for group in own.values():
        _connect(group)
    return own


def _connect(group: dist.ProcessGroup) -> None:
    """Run a first collective: NCCL connects the ranks there, and needs all of them at the same time."""
    if dist.get_backend(group) == "nccl" and group.size() > 1:
        dist.all_reduce(torch.zeros(1, device=torch.device("cuda", torch.cuda.current_device())), group=group)
