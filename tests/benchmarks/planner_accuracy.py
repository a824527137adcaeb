"""Compare predictions with published measurements: errors by family, fits, regret, rank correlation."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron.longseq.planner.plan.flags import read
from megatron.longseq.planner.plan.step import StepPrediction, predict
from tests.benchmarks.planner_golden import GoldenRow


class Judged(NamedTuple):
    """A row and its prediction.

    Attributes:
        row: the measurement.
        prediction: what the planner says.
        seconds_error: relative error of the step's seconds; None: not measured.
        memory_error: relative error of the peak; None: not measured.
        memory_bytes: memory of a GPU.
    """

    row: GoldenRow
    prediction: StepPrediction
    seconds_error: float | None
    memory_error: float | None
    memory_bytes: float

    @property
    def ran(self) -> bool:
        """Whether the run is known to have run."""
        return not self.row.is_oom

    @property
    def fits_wrong(self) -> bool:
        """Whether the planner errs about fitting by more than the reserve that it prints."""
        needed = self.prediction.peak_bytes
        if self.ran:
            return needed > self.memory_bytes
        return needed + self.prediction.reserve_bytes <= self.memory_bytes


@dataclass(frozen=True)
class Accuracy:
    """Figures of all rows.

    Attributes:
        seconds: mean absolute relative error of seconds by family.
        bias: mean relative error of seconds by family.
        worst: rows with the largest error of seconds, by family.
        memory: mean and largest absolute relative error of bytes, by family, without rows that contradict others.
        rank: Spearman's correlation of predicted and measured seconds by family.
        fits_wrong: rows of which the planner errs about fitting.
        regret: by group of at least two runs, measured seconds of the run that the planner ranks first over the best.
        count: rows by family.
    """

    seconds: dict[str, float]
    bias: dict[str, float]
    worst: dict[str, list[Judged]]
    memory: dict[str, tuple[float, float]]
    rank: dict[str, float]
    fits_wrong: list[Judged]
    regret: dict[tuple[Any, ...], float]
    count: dict[str, int] = field(default_factory=dict)


def judge(row: GoldenRow) -> Judged:
    """Return a row with its prediction."""
    model, machine, run = read(row.values, row.name)
    prediction = predict(model, machine, run)
    seconds = memory = None
    if row.seconds:
        seconds = prediction.step_seconds / row.seconds - 1
    elif row.tflops_full:
        rate = prediction.mfu_full * machine.peak_tflops
        seconds = row.tflops_full / rate - 1
    if row.peak_bytes:
        size = sum(prediction.stages[-1].values()) if row.last_stage else prediction.peak_bytes
        memory = size / row.peak_bytes - 1
    return Judged(row, prediction, seconds, memory, machine.memory_bytes)


def assess(judged: Sequence[Judged]) -> Accuracy:
    """Return the figures of some rows."""
    families = sorted({one.row.family for one in judged})
    seconds, bias, worst, memory, rank, count = {}, {}, {}, {}, {}, {}
    for family in families:
        mine = [one for one in judged if one.row.family == family]
        count[family] = len(mine)
        timed = [one for one in mine if one.seconds_error is not None]
        if timed:
            errors = [one.seconds_error or 0.0 for one in timed]
            seconds[family] = statistics.mean(map(abs, errors))
            bias[family] = statistics.mean(errors)
            worst[family] = sorted(timed, key=lambda one: -abs(one.seconds_error or 0.0))[:5]
        pairs = [(one.prediction.step_seconds, one.row.seconds) for one in timed if one.row.seconds]
        if len(pairs) > 2:
            rank[family] = statistics.correlation(*zip(*pairs, strict=True), method="ranked")
        sized = [abs(one.memory_error) for one in mine if one.memory_error is not None and one.row.is_consistent]
        if sized:
            memory[family] = statistics.mean(sized), max(sized)
    wrong = [one for one in judged if one.fits_wrong]
    return Accuracy(seconds, bias, worst, memory, rank, wrong, regrets(judged), count)


Groups = dict[tuple[Any, ...], dict[tuple[Any, ...], list[Judged]]]


def groups_of(judged: Iterable[Judged]) -> Groups:
    """Return the groups of at least two timed runs: by run, its measurements."""
    groups: Groups = {}
    for one in judged:
        if one.row.seconds and one.row.group:
            key = tuple(sorted((name, str(value)) for name, value in one.row.values.items()))
            groups.setdefault(one.row.group, {}).setdefault(key, []).append(one)
    return {group: runs for group, runs in groups.items() if len(runs) > 1}


def describe_regrets(judged: Sequence[Judged], least: float) -> str:
    """Return the runs of every group with a regret above `least`, the fastest first.

    Args:
        judged: rows with their predictions.
        least: regret above which a group is listed, such as 0.03.
    """
    lines, groups = [], groups_of(judged)
    for group, regret in sorted(regrets(judged).items(), key=lambda one: -one[1]):
        if regret <= least:
            break
        lines.append(f"regret {100 * regret:.1f} %: {' '.join(map(str, group))}")
        runs = [one for same in groups[group].values() for one in same]
        for one in sorted(runs, key=lambda one: one.row.seconds or 0.0):
            seconds = one.prediction.step_seconds
            error = 100 * (one.seconds_error or 0.0)
            lines.append(f"  {one.row.name}: {one.row.seconds:.4g} s, predicted {seconds:.4g} s ({error:+.1f} %)")
    return "\n".join(lines)


def regrets(judged: Iterable[Judged]) -> dict[tuple[Any, ...], float]:
    """Return, by group, the measured seconds of the run that the planner ranks first, over the best, minus 1.

    A run measured several times counts once, with its mean.
    """
    found = {}
    for group, runs in groups_of(judged).items():
        means = {key: statistics.mean(one.row.seconds or 0.0 for one in same) for key, same in runs.items()}
        first = min(runs, key=lambda key: runs[key][0].prediction.step_seconds)
        found[group] = means[first] / min(means.values()) - 1
    return found


def report(accuracy: Accuracy, worst_rows: int = 3) -> str:
    """Return the figures as text.

    Args:
        accuracy: the figures.
        worst_rows: how many of the worst rows of every family are listed.
    """
    lines = []
    for family, count in accuracy.count.items():
        parts = [f"{family:14s} {count:4d} rows"]
        if family in accuracy.seconds:
            rank = f", rank {accuracy.rank[family]:.3f}" if family in accuracy.rank else ""
            parts.append(
                f"seconds {100 * accuracy.seconds[family]:5.1f} % (bias {100 * accuracy.bias[family]:+.1f} %{rank})"
            )
        if family in accuracy.memory:
            mean, most = accuracy.memory[family]
            parts.append(f"bytes {100 * mean:.2f} %, worst {100 * most:.2f} %")
        lines.append("  ".join(parts))
    for family, judged in accuracy.worst.items():
        for one in judged[:worst_rows]:
            lines.append(
                f"  {family}: {one.row.name}: {100 * (one.seconds_error or 0.0):+.1f} % "
                f"({one.prediction.step_seconds:.4g} s predicted)"
            )
    lines.append(f"fits wrong: {[one.row.name for one in accuracy.fits_wrong]}")
    for name in sorted({str(group[0]) for group in accuracy.regret}):
        mine = [value for group, value in accuracy.regret.items() if group[0] == name]
        lines.append(
            f"regret, {name}: {len(mine)} groups, mean {100 * statistics.mean(mine):.1f} %, "
            f"worst {100 * max(mine):.1f} %, {sum(value > 0.03 for value in mine)} above 3 %"
        )
    return "\n".join(lines)
