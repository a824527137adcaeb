"""What the attention benchmark's measurements say: a table, and the ratios of its JSON line. Pure."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from megatron.longseq.attention.plan.comm_volume import LayerShape, peer_ring, ring
from megatron.longseq.attention.plan.layout import Layout
from tests.benchmarks.attention_contest import (
    HALVES,
    ONE_PROCESS,
    OURS,
    PEERS,
    QUANTITIES,
    Contestant,
    Measured,
    Size,
    TrialRun,
)

TOLERANCES = {"float32": 1e-4, "bfloat16": 4e-2}
MIB = 2**20


@dataclass
class Row:
    """A contestant at a size, over rounds; of several ranks the slowest, the fullest, the most wrong.

    Attributes:
        contestant: who.
        size: of what.
        cpu_seconds, seconds, peak_bytes: round by round.
        errors: of `QUANTITIES`, in the first round.
    """

    contestant: Contestant
    size: Size
    cpu_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[float] = field(default_factory=list)
    errors: tuple[float, ...] = ()

    def wrong(self, tolerance: float) -> list[str]:
        """Return which results are not those of the whole sequence."""
        return [name for name, error in zip(QUANTITIES, self.errors, strict=True) if not error <= tolerance]


def rows(ranks: Sequence[Sequence[Measured]]) -> list[Row]:
    """Join what each rank measured, in the order of its calls."""
    calls: dict[tuple[Contestant, Size], list[list[Measured]]] = defaultdict(list)  # by rank, by round
    for of_rank in ranks:
        mine: dict[tuple[Contestant, Size], list[Measured]] = defaultdict(list)
        for one in of_rank:
            mine[one.contestant, one.size].append(one)
        for key, found in mine.items():
            calls[key].append(found)
    joined = []
    for (contestant, size), found in calls.items():
        row = Row(contestant, size)
        for at_once in zip(*found, strict=True):
            row.cpu_seconds.append(max(one.cpu_seconds for one in at_once))
            row.seconds.append(max(one.seconds for one in at_once))
            row.peak_bytes.append(max(one.peak_bytes for one in at_once))
        compared = [one.errors for one in (by_round[0] for by_round in found) if one.errors is not None]
        row.errors = tuple(max(values) for values in zip(*compared, strict=True))
        joined.append(row)
    return joined


@dataclass(frozen=True)
class Ratio:
    """One figure at one setting.

    Attributes:
        setting: ranks and size, in words.
        value: the median over rounds.
        least, most: of the rounds.
        between: the two that are compared.
        note: what else is to be said.
    """

    setting: str
    value: float
    least: float
    most: float
    between: tuple[str, str]
    note: str = ""

    def data(self) -> dict[str, object]:
        """Return it for the JSON line."""
        found: dict[str, object] = {"ratio": round(self.value, 4)}
        if (self.least, self.most) != (self.value, self.value):
            found["spread"] = [round(self.least, 4), round(self.most, 4)]
        found |= {"of": self.between[0], "over": self.between[1]}
        return found | ({"note": self.note} if self.note else {})


def ratio(over: Row, under: Row, values: Callable[[Row], list[float]], note: str = "") -> Ratio:
    """Return the ratio of two rows of one size, round by round."""
    each = [a / b for a, b in zip(values(over), values(under), strict=True)]
    setting = f"{max(over.contestant.ranks, under.contestant.ranks)} ranks, {over.size}"
    pair = (str(over.contestant), str(under.contestant))
    return Ratio(setting, statistics.median(each), min(each), max(each), pair, note)


def best(candidates: Iterable[Row], values: Callable[[Row], list[float]]) -> Row | None:
    """Return the row with the smallest median."""
    return min(candidates, key=lambda row: statistics.median(values(row)), default=None)


def over_best_peer(
    table: Sequence[Row], values: Callable[[Row], list[float]], tolerance: float, *, right: bool = False
) -> list[Ratio]:
    """Return our best over the best peer for every setting.

    Args:
        table: of all contestants.
        values: smaller is better.
        tolerance: errors up to it are right.
        right: among the peers whose results are right; else wrong ones, too.
    """
    found = []
    for ranks, size in dict.fromkeys((row.contestant.ranks, row.size) for row in table):
        here = [row for row in table if (row.contestant.ranks, row.size) == (ranks, size)]
        mine = best((row for row in here if row.contestant.who == OURS), values)
        peers = [row for row in here if row.contestant.who in PEERS]
        theirs = best((row for row in peers if not (right and row.wrong(tolerance))), values)
        if mine and theirs:
            wrong = theirs.wrong(tolerance)
            found.append(ratio(mine, theirs, values, f"the peer's {', '.join(wrong)} is wrong" if wrong else ""))
    return found


def speedups(table: Sequence[Row], who: str = OURS) -> list[Ratio]:
    """Return one process's seconds over those of our best on 2 ranks (or another's), for every size that it ran at."""
    found = []
    for alone in (row for row in table if row.contestant.who == ONE_PROCESS):
        pairs = [row for row in table if row.size == alone.size and row.contestant.ranks == 2]
        mine = best((row for row in pairs if row.contestant.who == who), lambda row: row.seconds)
        if mine:
            found.append(ratio(alone, mine, lambda row: row.seconds))
    return found


def ulysses_over_ring(table: Sequence[Row], ranks: int = 4) -> list[Ratio]:
    """Return CPU seconds of our Ulysses over all ranks over those of our ring, for every size."""
    mine = {(row.contestant.mesh.ulysses, row.size): row for row in table if _is_ours(row, ranks)}
    sizes = [size for degree, size in mine if degree == 1 and (ranks, size) in mine]
    return [ratio(mine[ranks, size], mine[1, size], _cpu_seconds) for size in sizes]


def _cpu_seconds(row: Row) -> list[float]:
    return row.cpu_seconds


def _peak_bytes(row: Row) -> list[float]:
    return row.peak_bytes


def _is_ours(row: Row, ranks: int) -> bool:
    return row.contestant.who == OURS and row.contestant.ranks == ranks


def sent_bytes(ranks: Sequence[Sequence[TrialRun]]) -> dict[tuple[Contestant, Size], int]:
    """Return what all ranks together sent in the short first call; those that failed are left out."""
    total: dict[tuple[Contestant, Size], int] = defaultdict(int)
    for one in (tried for of_rank in ranks for tried in of_rank if tried.failure is None):
        total[one.contestant, one.size] += one.sent_bytes
    return dict(total)


def ring_bytes(sent: dict[tuple[Contestant, Size], int], item: int) -> list[Ratio]:
    """Return the bytes of our ring over the least of a peer's, counted; without peers over those of the formula.

    Args:
        sent: see `sent_bytes`.
        item: bytes of an element of the keys.
    """
    found = []
    for (one, size), mine in sent.items():
        if one.who != OURS or one.mesh.ulysses > 1:
            continue
        setup = LayerShape(Layout(one.mesh, (size.length,)), size.heads, dim=size.dim, item=item)
        formula = ring(setup).bytes, peer_ring(setup).bytes
        rings = {str(other): count for (other, its), count in sent.items() if _is_rival(other, its, one, size)}
        name = min(rings, key=lambda key: rings[key], default="formula")
        value = mine / rings.get(name, formula[1])
        note = f"counted {mine} over {rings.get(name, formula[1])}; formulas {formula[0]} over {formula[1]}"
        setting = f"{one.ranks} ranks, {size}"
        found.append(Ratio(setting, value, value, value, (str(one), name), note))
    return found


def _is_rival(other: Contestant, its: Size, one: Contestant, size: Size) -> bool:
    return other.who in PEERS and (other.mesh, its) == (one.mesh, size)


def mean(ratios: Sequence[Ratio]) -> float | None:
    """Return the geometric mean; None of none."""
    return round(statistics.geometric_mean(one.value for one in ratios), 4) if ratios else None


def summary(table: Sequence[Row], sent: dict[tuple[Contestant, Size], int], dtype: str, item: int) -> dict[str, object]:
    """Return the JSON line: every figure's geometric mean over the settings, and what it was measured at."""
    tolerance = TOLERANCES[dtype]
    figures = {
        "time_over_best_peer": over_best_peer(table, _cpu_seconds, tolerance),
        "peak_bytes_over_best_peer": over_best_peer(table, _peak_bytes, tolerance),
        "time_over_best_right_peer": over_best_peer(table, _cpu_seconds, tolerance, right=True),
        "peak_bytes_over_best_right_peer": over_best_peer(table, _peak_bytes, tolerance, right=True),
        "ring_bytes_over_peers": ring_bytes(sent, item),
        "speedup_2_ranks": speedups(table),
        "speedup_without_exchange": speedups(table, HALVES),
        "u4_over_r4": ulysses_over_ring(table),
    }
    measured_at = {key: {one.setting: one.data() for one in found} for key, found in figures.items()}
    return {key: mean(found) for key, found in figures.items()} | {"dtype": dtype, "measured_at": measured_at}


def text(table: Sequence[Row], tried: Sequence[TrialRun], sent: dict[tuple[Contestant, Size], int], dtype: str) -> str:
    """Return the tables."""
    lines = []
    for size, ranks in dict.fromkeys((row.size, row.contestant.ranks) for row in table):
        here = [row for row in table if (row.size, row.contestant.ranks) == (size, ranks)]
        lines += ["", f"{size}, {ranks} rank{'s' * (ranks > 1)}, {dtype}", _HEAD]
        lines += [_line(row, TOLERANCES[dtype]) for row in here]
    lines += ["", "bytes sent a token, all ranks, forward and backward, counted at the calls"]
    lines += [f"  {one!s:32} {size!s:16} {count / size.length:10.1f}" for (one, size), count in sent.items() if count]
    failures = [f"  {one.contestant}, {one.size}: {one.failure}" for one in tried if one.failure]
    return "\n".join([*lines, *(["", "cannot run:", *failures] if failures else [])])


_HEAD = f"  {'':32} {'CPU s':>8} {'spread':>15} {'wall s':>8} {'peak MiB':>9}  largest error of {' '.join(QUANTITIES)}"


def _line(row: Row, tolerance: float) -> str:
    wrong = row.wrong(tolerance)
    verdict = f"WRONG: {', '.join(wrong)}" if wrong else "right"
    spread = f"{min(row.cpu_seconds):.3f} to {max(row.cpu_seconds):.3f}"
    return (
        f"  {row.contestant!s:32} {statistics.median(row.cpu_seconds):8.3f} {spread:>15} "
        f"{statistics.median(row.seconds):8.3f} {statistics.median(row.peak_bytes) / MIB:9.1f}  "
        f"{' '.join(f'{error:.1e}' for error in row.errors)}  {verdict}"
    )
