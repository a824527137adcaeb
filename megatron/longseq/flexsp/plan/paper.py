"""Constants of FlexSP's evaluation (arXiv 2412.01523, section 6.1) on 64 A100 of 40 GB, from its authors' code.

Eight GPUs of a node are joined by NVLink, nodes by InfiniBand of 400 Gb/s. The authors measured the bandwidth of
all-to-alls in units of 2^20 bytes per millisecond, and counted 16 bytes per layer, hidden unit and token of a group of
d ranks, of which a rank sends 1/d; (d - 1)/d of that leave the rank. Rings were not measured. Here a hop inside a node
is as fast as the all-to-all of its 8 ranks, and the rings that leave a node share what its all-to-all of 64 ranks sent.
"""

from dataclasses import dataclass
from typing import Literal

from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.flexsp.plan.cost import GroupCostModel, GroupLinks

Context = Literal["192k", "384k"]

NODE, RANKS, HEADS, MEMORY_GIB = 8, 64, 64, 30
_UNIT = 1000 * 2**20  # bytes per second
_ALL_TO_ALL = {2: 119.5, 4: 104.1, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}


@dataclass(frozen=True, slots=True)
class PaperModel:
    """A model of the paper.

    Attributes:
        layers, hidden: shape.
        square, linear, fixed: milliseconds per squared token, per token and per micro-batch.
        token_mib: MiB of activations per token.
        params: 10^9 parameters with the position embeddings of a context of 192k and of 384k tokens.
    """

    layers: int
    hidden: int
    square: float
    linear: float
    fixed: float
    token_mib: float
    params: tuple[float, float]


PAPER_MODELS = {
    "7b": PaperModel(32, 4096, 5.128e-6, 0.1839576, 629.3563, 4.480441895, (7.1174468994, 7.850)),
    "13b": PaperModel(40, 5120, 9.2852e-6, 0.3060189, 1132.5632, 4.220439453, (13.116, 14.032)),
    "30b": PaperModel(60, 6656, 15.4262e-6, 0.8035742, 2789.3644, 3.417381836, (31.525, 32.715)),
}
BUILT_IN = tuple(f"{name}-a100" for name in PAPER_MODELS)


def paper_links() -> GroupLinks:
    """Return the links of the paper's cluster."""
    speeds = {size: speed * _UNIT * (size - 1) / size for size, speed in _ALL_TO_ALL.items()}
    between = speeds[64] * (64 - NODE) / (64 - 1) * NODE  # of the 63 peers of a rank, 56 are on other nodes
    return GroupLinks(NODE, tuple(speeds.items()), ring_inside=speeds[NODE], ring_between=between)


def paper_cost(name: str, context: Context = "192k") -> GroupCostModel:
    """Return the cost model of one of the paper's models on its cluster.

    The memory limit is that of 64 GPUs, over which the 16 bytes of every parameter's states are sharded.

    Args:
        name: "7b", "13b" or "30b".
        context: most tokens of a sequence; it changes the number of position embeddings.
    """
    model = PAPER_MODELS[name]
    states = model.params[context == "384k"] * 16 / RANKS * 1024  # MiB, of 10^9 parameters as the authors count them
    return GroupCostModel(
        name=f"{name}-a100",
        square=model.square * 1e-3,
        linear=model.linear * 1e-3,
        fixed=model.fixed * 1e-3,
        tokens_per_rank=int((MEMORY_GIB * 1024 - states) / model.token_mib),
        layers=model.layers,
        heads=Heads(HEADS, HEADS),
        dim=model.hidden // HEADS,
        links=paper_links(),
    )
