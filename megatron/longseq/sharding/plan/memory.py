"""Memory of model states on a rank: bytes of parameters, gradients and optimizer states under every strategy."""

from dataclasses import dataclass
from typing import NamedTuple

from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Level, Strategy


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes of an element.

    Attributes:
        param: of a parameter, in compute and in communication.
        grad: of a gradient as it accumulates.
        optimizer: of the optimizer states of one parameter: its main copy and Adam's two moments.
        grad_wire: of a gradient in communication.
    """

    param: int = 2
    grad: int = 4
    optimizer: int = 12
    grad_wire: int = 2


MEGATRON = Widths()


@dataclass(frozen=True, slots=True)
class Model:
    """Parameters of one tensor- and pipeline-parallel rank.

    Attributes:
        params: number of parameters.
        trainable: how many of them are trained.

    Raises:
        ValueError: no parameter is trained, or more than there are.
    """

    params: int
    trainable: int

    def __post_init__(self) -> None:
        if not 0 < self.trainable <= self.params:
            raise ValueError(f"{self.trainable} of {self.params} parameters cannot be trained; give 1 to {self.params}")

    def shard(self, groups: RankGroups) -> int:
        """Return the elements of one of n shards of the parameters; buffers are padded to full shards."""
        return -(-self.params // groups.ranks)

    def trainable_shard(self, groups: RankGroups) -> int:
        """Return the elements of one of n shards of the trained parameters."""
        return -(-self.trainable // groups.ranks)


class Memory(NamedTuple):
    """Bytes on a rank.

    Attributes:
        params, grads, optimizer: of the shards that a rank keeps between collectives.
    """

    params: int
    grads: int
    optimizer: int

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self)


def memory(strategy: Strategy, groups: RankGroups, model: Model, widths: Widths = MEGATRON) -> Memory:
    """Return the memory of model states on a rank (PaRO, arXiv 2310.06003, section 3).

    As in the paper, full buckets of sharded states, allocated while layers use them, are left out.

    Args:
        strategy: the triplet, valid or not.
        groups: the data-parallel ranks.
        model: its parameters.
        widths: bytes of an element.
    """
    shard, trainable = model.shard(groups), model.trainable_shard(groups)
    shards = {level: groups.ranks // groups.shards(level) for level in Level}
    return Memory(
        params=shards[strategy.params] * shard * widths.param,
        grads=shards[strategy.grads] * trainable * widths.grad,
        optimizer=shards[strategy.optimizer] * trainable * widths.optimizer,
    )
