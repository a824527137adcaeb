"""Apply the rules of a case's class, and judge planted errors. All functions are pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.regression.case import Case
from tests.regression.compare import NUMBERS, Bitwise, Check, Evidence, Reassociated, Rules, compare
from tests.regression.noise import Floor, Noisy, Paired, unbiased


@dataclass(frozen=True)
class Trial:
    """The runs of one seed: U, U in other orders of summation (the floor), and O with or without a planted error."""

    u: Evidence
    floor: Sequence[Evidence]
    o: Evidence

    def cut(self, steps: int) -> "Trial":
        """Return the same runs, truncated after `steps`."""
        return Trial(*(_cut(self.u, steps), [_cut(run, steps) for run in self.floor], _cut(self.o, steps)))


def _cut(run: Evidence, steps: int) -> Evidence:
    return Evidence(run.curve[:steps], {at: snapshot for at, snapshot in run.snapshots.items() if at <= steps})


def rules_of(case: Case, trial: Trial) -> Rules:
    """Return the rules of a case's class and arithmetic."""
    if case.klass == "E0":
        return Bitwise()
    if case.arithmetic == "float64":
        return Reassociated()
    kind = Paired if case.klass == "E2" else Noisy
    return kind(trial.floor)


def judge(case: Case, trials: Sequence[Trial], steps: int, at: Sequence[int]) -> list[Check]:
    """Compare O with U in every trial.

    Args:
        case: gives the class of equality.
        trials: one per seed.
        steps: number of steps that every run must have made.
        at: iterations whose tensors are compared.
    """
    checks: list[Check] = []
    for seed, trial in zip(case.seeds, trials, strict=True):
        rules = rules_of(case, trial)
        for index, other in enumerate(trial.floor):
            checks += [replace(c, name=f"floor {index}: {c.name}") for c in _fit(other, trial.u, steps, at)]
        found = compare(trial.u, trial.o, steps, at, rules)
        checks += found if len(trials) == 1 else [replace(c, name=f"seed {seed}: {c.name}") for c in found]
    if case.klass == "E2" and all(check.passed for check in checks if check.ratio > 1e9):
        for name in NUMBERS:
            curves = [[[s[name] for s in run.curve] for run in (t.u, *t.floor)] for t in trials]
            floors = [Floor(curve[0], curve[1:]) for curve in curves]
            checks += unbiased(name, floors, [[s[name] for s in trial.o.curve] for trial in trials])
    return checks


def _fit(other: Evidence, u: Evidence, steps: int, at: Sequence[int]) -> list[Check]:
    """Return the faults of a floor run: it must be complete, and use the samples and learning rates of U."""
    return [check for check in compare(u, other, steps, at, AcceptAll()) if not check.passed]


class AcceptAll:
    """Rules that accept any numbers and tensors, because floor runs measure how much they may differ."""

    def numbers(self, *args: object) -> list[Check]:
        """See compare.Rules."""
        return []

    def tensors(self, *args: object) -> list[Check]:
        """See compare.Rules."""
        return []


@dataclass(frozen=True)
class Verdict:
    """The result of a planted error.

    Attributes:
        red: whether the case detected it.
        by: the check that detected it, or the reason of an error.
        error: whether the run proves nothing.
    """

    red: bool
    by: str
    error: bool = False


def verdict(case: Case, trials: Sequence[Trial], sound: Sequence[Evidence], planted: int, at: Sequence[int]) -> Verdict:
    """Judge a planted error.

    Args:
        case: the case that must detect it.
        trials: the runs, with the error in O.
        sound: O without the error, per seed.
        planted: how often the error acted, over all runs and ranks.
        at: iterations of the snapshots that are compared. The run ends with the last of them.
    """
    steps = at[-1]
    if planted == 0:
        return Verdict(False, "it never acted, so this proves nothing", error=True)
    for trial, run in zip(trials, sound, strict=True):
        if all(check.passed for check in compare(_cut(run, steps), trial.o, steps, at, Bitwise())):
            return Verdict(False, "it acted but changed no bit of the run, so this proves nothing", error=True)
    failed = [check for check in judge(case, [t.cut(steps) for t in trials], steps, at) if not check.passed]
    if not failed:
        return Verdict(False, "no check detected it")
    return Verdict(True, "; ".join(f"{check.name} ({check.detail})" for check in failed[:2]))
