"""Process groups of context parallelism: made once, by every rank of the job, in the same order."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.longseq.attention.plan.comm_type import Way
from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.attention.runtime.comm import GroupExchange, GroupLane
from megatron.longseq.attention.runtime.ring import RingLanes
from megatron.longseq.attention.runtime.strategies import Spread
from megatron.longseq.distributed import all_groups, same_backend_options

LANES = ("keys", "grads", "far_keys", "far_grads")


def reordered(group: dist.ProcessGroup, mesh: Mesh, timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Return the context-parallel group once more, its ranks in the mesh's order (`Mesh.ordered`).

    Every rank of the job calls this at the same time. Data and rotary positions are cut by the rank in this group.
    """
    mine = dist.get_process_group_ranks(group)
    made = None
    for ranks in all_groups(mine):
        ordered = list(mesh.ordered(ranks))
        new = dist.new_group(ordered, timeout, dist.get_backend(group), same_backend_options(group), sort_ranks=False)
        if ranks == tuple(mine):
            made = new
    assert made is not None, "this rank's own group is among everyone's"
    return made


def open_spreads(
    group: dist.ProcessGroup, ways: Mapping[str, Way], window: int | None, timeout: timedelta | None = None
) -> dict[str, Spread]:
    """Make the communicators of all context-parallel groups; every rank of the job calls this at the same time.

    Args:
        group: upstream's context-parallel group; its ranks are the context-parallel ranks, in order.
        ways: how layers are spread, by the name in --cp-comm-type.
        window: --ring-window.
        timeout: after which a message that does not come is an error; None: the backend's own.

    Returns:
        A spread for each name.
    """
    mine, is_gloo = tuple(dist.get_process_group_ranks(group)), dist.get_backend(group) == "gloo"
    rank, lists = group.rank(), all_groups(mine)
    spreads: dict[str, Spread] = {}
    made: dict[tuple[int, int], Spread] = {}
    for name, way in ways.items():
        mesh = way.mesh
        key = (mesh.ulysses, mesh.ring)
        if key not in made:
            place = mesh.place(rank)
            exchanges = _make([g for ranks in lists for g in _ulysses(mesh, ranks)], ("all",), group, timeout)
            rings = [g for ranks in lists for g in _rings(mesh, ranks)]
            # One communicator keeps the order of posting. On a GPU that would make keys wait for gradients.
            lanes = _make(rings, ("keys",) if is_gloo else LANES, group, timeout)
            assert mine[rank] == dist.get_rank(), place
            ring = RingLanes(*(GroupLane(lanes.get(lane, lanes["keys"])) for lane in LANES))
            ulysses = GroupExchange(exchanges["all"]) if mesh.ulysses > 1 else None
            made[key] = Spread(mesh, rank, ulysses, ring, GroupExchange(lanes["keys"]))
        plain = made[key]
        spreads[name] = Spread(mesh, rank, plain.ulysses, plain.ring, plain.gather if way.gathers else None, window)
    return spreads


def _ulysses(mesh: Mesh, ranks: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(ranks[at : at + mesh.ulysses]) for at in range(0, mesh.size, mesh.ulysses)]


def _rings(mesh: Mesh, ranks: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(ranks[at :: mesh.ulysses]) for at in range(mesh.ulysses)]


def _make(
    groups: Sequence[tuple[int, ...]], names: Sequence[str], like: dist.ProcessGroup, timeout: timedelta | None
) -> dict[str, dist.ProcessGroup]:
    """Make groups, one for each name, of the kind of another; return this rank's."""
    mine = {}
    for ranks in groups:
        for name in names:
            group = dist.new_group(list(ranks), timeout, dist.get_backend(like), same_backend_options(like))
            if dist.get_rank() in ranks:
                mine[name] = group
                _greet(group)
    return mine


def _greet(group: dist.ProcessGroup) -> None:
    """Connect the ranks: NCCL does so at a first collective, and wants all of them there."""
    if dist.get_backend(group) == "nccl":
        dist.all_reduce(torch.zeros(1, device=torch.device("cuda", torch.cuda.current_device())), group=group)
