"""Who takes part in the attention benchmark, at which sizes, and what is measured of them: data alone."""

from dataclasses import dataclass

from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.ranges import TokenRange

OURS, ONE_PROCESS = "ours", "one process"
HALVES = "two processes, half the heads each"  # no exchange at all: what two ranks could reach here
YUNCHANG, RING_FLASH_ATTN, TORCH = "yunchang", "ring-flash-attn", "torch"
PEERS = (YUNCHANG, RING_FLASH_ATTN, TORCH)
QUANTITIES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Size:
    """One attention call.

    Attributes:
        length: tokens of the whole sequence.
        heads: of queries, and of keys and values.
        dim: of a head.
    """

    length: int
    heads: Heads
    dim: int = 64

    def __str__(self) -> str:
        kind = "MHA" if self.heads.kv == self.heads.query else f"GQA {self.heads.query}/{self.heads.kv}"
        return f"{self.length} {kind}"


@dataclass(frozen=True)
class Contestant:
    """An implementation in one configuration.

    Attributes:
        who: ours, one of `PEERS`, one process with the whole sequence, or `HALVES`.
        mesh: Ulysses x ring.
        variant: of the peer's ring, in its own words.
        copies_self: gets the messages of a ring of one rank to itself copied, which gloo has not.
    """

    who: str
    mesh: Mesh
    variant: str = ""
    copies_self: bool = False

    @property
    def ranks(self) -> int:
        """Return the number of ranks that take part."""
        return self.mesh.size

    def __str__(self) -> str:
        if self.who in (ONE_PROCESS, HALVES):
            return self.who
        return " ".join(filter(None, (self.who, self.variant, f"U{self.mesh.ulysses} R{self.mesh.ring}")))


@dataclass
class Measured:
    """What one rank measured of one call, forward and backward.

    Attributes:
        contestant: who.
        size: of what.
        cpu_seconds: of this process, the threads of its communication included.
        seconds: by the clock, from a common start.
        peak_bytes: most resident memory beyond that before the call.
        errors: largest differences of `QUANTITIES` from the reference, each over its largest value; None: not compared.
    """

    contestant: Contestant
    size: Size
    cpu_seconds: float
    seconds: float
    peak_bytes: int
    errors: tuple[float, ...] | None = None


@dataclass
class TrialRun:
    """What one rank found in a short first call.

    Attributes:
        contestant: who.
        size: of what.
        sent_bytes: what left the rank, counted at the communication calls.
        failure: why the contestant cannot take part; None: it can.
    """

    contestant: Contestant
    size: Size
    sent_bytes: int = 0
    failure: str | None = None


def contestants(who: tuple[str, ...], ranks: int) -> list[Contestant]:
    """Return every configuration of some implementations on some ranks (1: one process, and two without exchange)."""
    if ranks == 1:
        return [Contestant(ONE_PROCESS, Mesh(1, 1)), Contestant(HALVES, Mesh(2, 1))] if ONE_PROCESS in who else []
    meshes = [Mesh(degree, ranks // degree) for degree in range(1, ranks + 1) if ranks % degree == 0]
    ring = Mesh(1, ranks)
    found = [Contestant(OURS, mesh) for mesh in meshes]
    found += [Contestant(YUNCHANG, mesh, "zigzag", mesh.ring == 1) for mesh in meshes]
    found.append(Contestant(RING_FLASH_ATTN, ring, "zigzag"))
    found += [Contestant(TORCH, ring, rotation) for rotation in ("allgather", "alltoall")]
    return [one for one in found if one.who in who]


def held_positions(contestant: Contestant, length: int, rank: int) -> list[TokenRange]:
    """Return the positions that a rank holds, in its order, in the contestant's own layout.

    yunchang cuts the sequence into the ring's zigzag first and each of its shards into U in a row; all others take
    2 C chunks, of which rank c holds c and 2 C - 1 - c.
    """
    mesh = contestant.mesh
    if mesh.size == 1 or contestant.who == HALVES:
        return [TokenRange(0, length)]
    layout = Layout(mesh, (length,))
    if contestant.who != YUNCHANG:
        return list(layout.positions(rank, 0))
    place = mesh.place(rank)
    return _rows(layout.ring_positions(place.ring, 0), place.ulysses, length // mesh.size)


def _rows(spans: tuple[TokenRange, ...], part: int, rows: int) -> list[TokenRange]:
    """Return part `part`, of `rows` rows, of some spans one after another."""
    found, offset = [], 0
    for span in spans:
        begin, end = max(offset, part * rows), min(offset + span.size, (part + 1) * rows)
        if begin < end:
            found.append(TokenRange(span.begin + begin - offset, span.begin + end - offset))
        offset += span.size
    return found
