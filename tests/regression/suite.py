"""Train the runs of all cases and judge them. Equal runs of several cases are trained once."""

import functools
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tests.pool import RankFailure, RankPool
from tests.regression import oracle, scripts
from tests.regression.arm import Run, run_arm
from tests.regression.case import ARITHMETIC, FEWEST_STEPS, ArmPlan, Case, load_models
from tests.regression.compare import Check, Evidence, agrees_with_oracle, broken, learned
from tests.regression.corpus import Corpus, make_corpus
from tests.regression.judge import Trial, Verdict, judge, verdict
from tests.regression.mutants import MUTANTS
from tests.regression.record import RankDisagreement
from tests.regression.snapshot import Snapshot
from tests.regression.tensors import logical_tensors
from tests.regression.trainings import Trainings

MUTANT_STEPS = FEWEST_STEPS
EARLY = (1, 2)


@dataclass
class Outcome:
    """The result of a case: checks, runs, verdicts of planted errors, and seconds (shared runs count once)."""

    case: Case
    checks: list[Check] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    oracle: list[dict[str, Any]] = field(default_factory=list)
    headers: dict[str, Any] = field(default_factory=dict)
    mutants: dict[str, Verdict] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Return whether there are checks and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def worst(self) -> Check:
        """Return the check with the largest ratio of error to tolerance."""
        return max(self.checks, key=lambda check: check.ratio)


class Suite:
    """Train and judge cases.

    Args:
        pool: provides the ranks.
        folder: scratch folder for the corpus, seed checkpoints and checkpoints of resumed runs.
    """

    def __init__(self, pool: RankPool, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        self.models = load_models()
        self.corpora: dict[str, Corpus] = {}
        self.trainings = Trainings(pool, folder)

    def run_case(self, case: Case) -> Outcome:
        """Train the arms of a case and judge them. An exception becomes a failed check."""
        outcome, start = Outcome(case), time.monotonic()
        try:
            runs = [self._arms(case, seed) for seed in case.seeds]
            outcome.headers = {"U": runs[0][0].header, "O": runs[0][2].header}
            outcome.trials = [
                Trial(_evidence(u), [_evidence(run) for run in floor], _evidence(o)) for u, floor, o in runs
            ]
            outcome.checks = judge(case, outcome.trials, case.steps, (*EARLY, case.steps))
            for trial in outcome.trials:
                for arm, run in (("U", trial.u), ("O", trial.o)):
                    outcome.checks.append(learned(arm, run.curve, case.learns))
            if case.oracle:
                outcome.checks += self._oracle(case, runs[0][0], outcome)
        except Exception as error:
            outcome.checks.append(broken("the arms run", f"{type(error).__name__}: {error}"))
        outcome.seconds = time.monotonic() - start
        return outcome

    def run_mutant(self, outcome: Outcome, name: str) -> Verdict:
        """Train arm O of a passed case with a planted error, and return whether the case detects it."""
        case = outcome.case
        at = (*EARLY, MUTANT_STEPS)
        if not outcome.passed:
            return Verdict(False, "its case fails without the error, so this proves nothing", error=True)
        trials, planted = [], 0
        try:
            for seed, trial in zip(case.seeds, outcome.trials, strict=True):
                run = self._train(case, replace(case.o, resume_at=None), seed, mutant=name)
                planted += run.planted
                trials.append(replace(trial, o=_evidence(run)))
        except RankDisagreement as error:
            return Verdict(True, f"ranks agree ({error})")
        except RankFailure as error:
            return Verdict(False, f"its run crashed, which proves nothing: {error}", error=True)
        return verdict(case, trials, [trial.o for trial in outcome.trials], planted, at)

    def _arms(self, case: Case, seed: int) -> tuple[Run, list[Run], Run]:
        u = self._train(case, case.u, seed)
        floor = [self._train(case, plan, seed) for plan in case.floor]
        return u, floor, self._train(case, case.o, seed)

    def _oracle(self, case: Case, u: Run, outcome: Outcome) -> list[Check]:
        if case.u.world != 1:
            return [broken("oracle", "arm X trains on the batches of one process of U; give U world = 1")]
        seed = {
            name: tensor
            for name, tensor in logical_tensors(self._seed(case)).items()
            if not name.startswith("optimizer.")
        }
        settings = oracle.Settings.of([*self._flags(case, case.seeds[0]), *case.u.flags])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # its tensors are too small for two threads
        outcome.oracle, state = oracle.train(seed, u.batches, settings)
        torch.set_num_threads(threads)
        return agrees_with_oracle(
            outcome.oracle, Snapshot({name: t.numpy() for name, t in state.items()}), _evidence(u)
        )

    def _flags(self, case: Case, seed: int) -> list[str]:
        steps = str(case.steps)
        schedule = ("--train-iters", steps, "--lr-decay-iters", steps, "--seed", str(seed))
        return [*self._model(case), *case.flags, *ARITHMETIC[case.arithmetic], *schedule]

    def corpus(self, name: str) -> Corpus:
        """Return a corpus, which is made when it is first needed."""
        if name not in self.corpora:
            self.corpora[name] = make_corpus(self.folder / f"corpus-{name}", name)
        return self.corpora[name]

    def _model(self, case: Case) -> tuple[str, ...]:
        """Return upstream's flags of the model and the data."""
        return (*self.models[case.model], *self.corpus(case.corpus).flags)

    def _initial(self, case: Case) -> tuple[str, ...]:
        """Return upstream's flags of the model and of data on which its initial weights can be made."""
        corpus = self.corpus(case.corpus)
        return (*self.models[case.model], *(corpus.seed_flags or corpus.flags))

    def _seed(self, case: Case) -> Path:
        """Return the checkpoint with upstream's initial weights, from which every run of a model starts."""
        return self.trainings.seed(*self._initial(case))

    def _train(self, case: Case, plan: ArmPlan, seed: int, mutant: str | None = None) -> Run:
        load = self.trainings.load(*self._initial(case))
        flags = [*self._flags(case, seed), *plan.flags]
        named: dict[str, Any] = {
            "float64": case.arithmetic == "float64",
            "mutant": f"{MUTANTS[mutant].__module__}:{mutant}" if mutant else None,
            "keep_batches": plan.world == 1,
            "script": f"{scripts.__name__}:{plan.script}" if plan.script else None,
            "snapshots": tuple(sorted({*EARLY, MUTANT_STEPS, case.steps})),
        }
        if plan.resume_at is None:
            end = ("--exit-interval", str(MUTANT_STEPS)) if mutant else ()
            return self.trainings.once(plan.arm, plan.world, [*flags, *load, *end], plan.again, **named)
        folder = self.folder / f"resume-{case.name}-{seed}"
        train = functools.partial(run_arm, self.pool, plan.arm, plan.world, **named)
        first = train([*flags, *load, "--exit-interval", str(plan.resume_at)], folder)
        second = train([*flags, "--load", str(folder)])
        return _joined(first, second)


def _joined(first: Run, second: Run) -> Run:
    """Join the records of a run that stopped and of the run that resumed it."""
    return replace(
        second,
        curve=[*first.curve, *second.curve],
        batches=[*first.batches, *second.batches],
        snapshots=first.snapshots | second.snapshots,
        seconds=first.seconds + second.seconds,
    )


def _evidence(run: Run) -> Evidence:
    return Evidence(run.curve, run.snapshots)
