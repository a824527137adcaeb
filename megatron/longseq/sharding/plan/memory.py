"""What model states take on a rank: bytes of parameters, gradients and optimizer states, for every strategy."""

from dataclasses import dataclass
from typing import NamedTuple

from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.strategy import Level, Strategy


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes of an element.

    Attributes:
        param: of a parameter that layers compute with, and on the wire.
        grad: of a gradient as it accumulates.
        optimizer: of an element's optimizer states: main parameter and Adam's two moments.
        grad_wire: of a gradient on the wire.
    """

    param: int = 2
    grad: int = 4
    optimizer: int = 12
    grad_wire: int = 2


MEGATRON = Widths()
PAPER = Widths(grad=2)


@dataclass(frozen=True, slots=True)
class Model:
    """Parameters of one tensor- and pipeline-parallel rank.

    Attributes:
        params: all of them.
        trainable: those that are trained.

    Raises:
        ValueError: no parameter is trained, or more than there are.
    """

    params: int
    trainable: int

    def __post_init__(self) -> None:
        if not 0 < self.trainable <= self.params:
            raise ValueError(f"{self.trainable} of {self.params} parameters are trained: give 1 to {self.params}")

    def shard(self, groups: Groups) -> int:
        """Return elements of one of n shards of the parameters; buffers are padded to whole shards."""
        return -(-self.params // groups.ranks)

    def trainable_shard(self, groups: Groups) -> int:
        """Return elements of one of n shards of what is trained."""
        return -(-self.trainable // groups.ranks)


class Memory(NamedTuple):
    """Bytes on a rank.

    Attributes:
        params, grads, optimizer: what is held between collectives.
        buckets: whole buckets of states that are held in parts, while layers use them.
    """

    params: int
    grads: int
    optimizer: int
    buckets: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def memory(
    strategy: Strategy, groups: Groups, model: Model, widths: Widths = MEGATRON, bucket: int = 0, in_flight: int = 2
) -> Memory:
    """Return what a strategy holds on a rank.

    Args:
        strategy: the triplet, valid or not.
        groups: the ranks.
        model: its parameters.
        widths: bytes of an element.
        bucket: elements of the largest bucket; 0: leave whole buckets out, as the paper does.
        in_flight: buckets at a time: of parameters, the one in use and the one that comes; of gradients, those on the
            wire, in the type that they are sent in, beside the one that fills.
    """
    shard, trainable = model.shard(groups), model.trainable_shard(groups)
    parts = {level: groups.ranks // groups.shards(level) for level in Level}
    whole = in_flight * widths.param if strategy.params > Level.NONE else 0
    whole += widths.grad + in_flight * widths.grad_wire if strategy.grads > Level.NONE else 0
    return Memory(
        params=parts[strategy.params] * shard * widths.param,
        grads=parts[strategy.grads] * trainable * widths.grad,
        optimizer=parts[strategy.optimizer] * trainable * widths.optimizer,
        buckets=bucket * whole,
    )
