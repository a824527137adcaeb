"""Over NCCL, context parallelism makes and connects the communicators that a run uses, and no others."""

from collections.abc import Sequence
from typing import Any

import pytest

from megatron.longseq.attention.plan.comm_type import CommType
from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.attention.runtime import process_groups

RANKS = 4


class Group:
    """A process group of some ranks, seen by rank 0."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = ranks

    def size(self) -> int:
        return len(self.ranks)

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("mesh", "window", "sizes", "connected"),
    [
        (Mesh(1, 4), None, [1, 4, 4, 4], 3),  # kv, grads, far_grads
        (Mesh(1, 4), 2, [1, 4, 4, 4, 4], 4),
        (Mesh(2, 2), None, [2, 2, 2, 2], 4),
        (Mesh(4, 1), None, [4, 1], 1),
    ],
)
def test_only_what_is_used_takes_memory(
    mesh: Mesh, window: int | None, sizes: list[int], connected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Group] = []
    reduced: list[Group] = []

    def new_groups(groups: Sequence[Sequence[int]], *_: Any) -> Group:
        made.append(Group(next(ranks for ranks in groups if 0 in ranks)))
        return made[-1]

    monkeypatch.setattr(process_groups, "new_groups", new_groups)
    monkeypatch.setattr(process_groups, "all_groups", lambda own: [own])
    monkeypatch.setattr(process_groups.dist, "get_process_group_ranks", lambda group: group.ranks)
    monkeypatch.setattr(process_groups.dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(process_groups.dist, "all_reduce", lambda tensor, group: reduced.append(group))
    monkeypatch.setattr(process_groups.torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(process_groups.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(process_groups, "P2PChannel", lambda group: group)
    monkeypatch.setattr(process_groups, "GroupCollectives", lambda group: group)
    world: Any = Group(range(RANKS))
    strategy = process_groups.open_strategies(world, {"way": CommType(mesh)}, window)["way"]
    assert [group.size() for group in made] == sizes
    assert len(reduced) == connected and all(group.size() > 1 for group in reduced)
    channels: list[Any] = [getattr(strategy.ring, name) for name in process_groups.CHANNELS]
    assert len({id(channel) for channel in channels}) == len(sizes) - 1
    assert channels[0] is not channels[1] or mesh.ring == 1
