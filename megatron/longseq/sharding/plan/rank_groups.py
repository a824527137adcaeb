"""Data-parallel ranks in groups of m: who shares which group, and which part of a buffer a rank owns.

A *member* is a data-parallel rank as upstream numbers it: member k * m + i is number i of group k. Its *logical* rank
is i * G + k. A buffer of n shards is cut by logical rank, so number i's slice (1/m of the buffer) holds, one after
another, the shards of all groups' number i: a reduce-scatter inside groups and one between them, each in place on
contiguous memory, leave exactly what the flat one leaves; and gathers go back the same way. Nothing is permuted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron.longseq.sharding.plan.strategy import Level


def legal_sizes(ranks: int) -> tuple[int, ...]:
    """Return every legal group size: the divisors of the number of ranks."""
    return tuple(size for size in range(1, ranks + 1) if ranks % size == 0)


@dataclass(frozen=True, slots=True)
class Groups:
    """n data-parallel ranks (with context parallelism: both together) in G groups of m neighbours.

    Attributes:
        ranks: n.
        size: m. 1: a level I state is not sharded; n: it is sharded globally.

    Raises:
        ValueError: a size that does not divide the ranks.
    """

    ranks: int
    size: int

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.size < 1 or self.ranks % self.size:
            raise ValueError(
                f"{self.ranks} data-parallel ranks in groups of {self.size}: groups must have one size, so give "
                f"--paro-group-size one of {list(legal_sizes(self.ranks))}"
            )

    @property
    def count(self) -> int:
        """Groups G."""
        return self.ranks // self.size

    def shards(self, level: Level) -> int:
        """Return into how many parts a state is cut."""
        return (1, self.size, self.ranks)[level]

    def logical(self, member: int) -> int:
        """Return a member's logical rank: which of n shards it owns.

        Raises:
            ValueError: no such member.
        """
        if not 0 <= member < self.ranks:
            raise ValueError(f"member {member} of {self.ranks} data-parallel ranks")
        return member % self.size * self.count + member // self.size

    def member(self, logical: int) -> int:
        """Return the member of a logical rank.

        Raises:
            ValueError: no such rank.
        """
        if not 0 <= logical < self.ranks:
            raise ValueError(f"logical rank {logical} of {self.ranks} data-parallel ranks")
        return logical % self.count * self.size + logical // self.count

    def owned(self, level: Level, member: int) -> range:
        """Return which of a buffer's n shards a member holds of a state."""
        parts = self.shards(level)
        width = self.ranks // parts
        part = self.logical(member) // width
        return range(part * width, (part + 1) * width)

    def ordered(self, members: Sequence[int]) -> tuple[int, ...]:
        """Return global ranks by logical rank: for `new_group(..., sort_ranks=False)`.

        Args:
            members: global ranks of the data-parallel group, in its order.

        Raises:
            ValueError: not n of them, or one twice.
        """
        if len(members) != self.ranks or len(set(members)) != len(members):
            raise ValueError(f"{list(members)} are not {self.ranks} different data-parallel ranks")
        return tuple(members[self.member(logical)] for logical in range(self.ranks))

    def inside(self, members: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the global ranks of every group, by number."""
        ranks = self.ordered(members)
        return tuple(ranks[group :: self.count] for group in range(self.count))

    def between(self, members: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the global ranks that share a number, by group, for every number."""
        ranks = self.ordered(members)
        return tuple(ranks[number * self.count : (number + 1) * self.count] for number in range(self.size))


def node_size(members: Sequence[int], node_ranks: int) -> int:
    """Return the default group size: how many neighbours of the data-parallel group share a node.

    Args:
        members: global ranks of the data-parallel group, in its order.
        node_ranks: ranks of a node.

    Raises:
        ValueError: nodes hold different numbers of them, or one node's are not neighbours.
    """
    if node_ranks < 1 or not members:
        raise ValueError(f"{len(members)} data-parallel ranks on nodes of {node_ranks} ranks: each needs at least 1")
    runs = [(node, len(list(run))) for node, run in groupby(members, key=lambda rank: rank // node_ranks)]
    sizes = {size for _, size in runs}
    if len(sizes) > 1 or len({node for node, _ in runs}) < len(runs):
        raise ValueError(
            f"data-parallel ranks {list(members)} lie unevenly on nodes of {node_ranks} ranks, so a node is no group: "
            f"give --paro-group-size one of {list(legal_sizes(len(members)))}"
        )
    return sizes.pop()
