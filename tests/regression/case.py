"""Read case files. A case says what arm U and arm O train, and how equal they have to be."""

import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.regression.corpus import NAMES
from tests.regression.mutants import MUTANTS
from tests.regression.scripts import SCRIPTS

FOLDER = Path(__file__).parent
ARITHMETIC = {"float64": (), "float32": (), "bf16": ("--bf16",)}
CLASSES = {"E0": ("float64", "float32", "bf16"), "E1": ("float64", "float32"), "E2": ("bf16",)}
KEYS = {"proves", "model", "corpus", "flags", "steps", "arithmetic", "class"}
KEYS |= {"oracle", "learns", "mutants", "seeds", "floor"}
REQUIRED = {"proves", "model", "arithmetic", "class", "learns", "U", "O"}
FEWEST_FLOORS = {"E1": 3, "E2": 2}  # per seed; one other order of summation is too small a sample of the noise
FEWEST_STEPS = 6  # number of steps of a run with a planted error
ARM_KEYS = {"arm", "world", "flags", "resume_at", "again", "script"}


class CaseError(ValueError):
    """A case file is malformed. The message names the file and the key."""


@dataclass(frozen=True)
class ArmPlan:
    """How one arm runs.

    Attributes:
        arm: U for upstream, O for this project.
        world: number of ranks.
        flags: flags after those of the model and the case.
        resume_at: step after which the run saves, stops and is resumed.
        again: run again even if an equal run exists.
        script: name of what the script does otherwise (`scripts.py`); None: nothing.
    """

    arm: Literal["U", "O"]
    world: int
    flags: tuple[str, ...] = ()
    resume_at: int | None = None
    again: bool = False
    script: str | None = None


@dataclass(frozen=True)
class Case:
    """One case. docs/regression.md describes the keys of a case file."""

    name: str
    proves: str
    model: str
    corpus: str
    flags: tuple[str, ...]
    steps: int
    arithmetic: str
    klass: str
    oracle: bool
    learns: float
    mutants: tuple[str, ...]
    seeds: tuple[int, ...]
    floor: tuple[ArmPlan, ...]
    u: ArmPlan
    o: ArmPlan


def load_cases(folder: Path = FOLDER / "cases") -> list[Case]:
    """Read every case file, sorted by name.

    Raises:
        CaseError: a file is malformed.
    """
    models = load_models()
    return [read_case(path, models) for path in sorted(folder.glob("*.toml"))]


def load_models(path: Path = FOLDER / "models.toml") -> dict[str, tuple[str, ...]]:
    """Read upstream's flags of each model that cases train, common ones included."""
    table = tomllib.loads(path.read_text("utf-8"))
    common = shlex.split(table.pop("common"))
    return {name: (*common, *shlex.split(flags)) for name, flags in table.items()}


def read_case(path: Path, models: Mapping[str, Any]) -> Case:
    """Read one case file.

    Raises:
        CaseError: the file is not TOML, a key is unknown or missing, or a value is not allowed.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise CaseError(f"{path}: not TOML: {error}") from error
    _check(path, table, models)
    return Case(
        name=path.stem,
        proves=table["proves"],
        model=table["model"],
        corpus=table.get("corpus", NAMES[0]),
        flags=tuple(shlex.split(table.get("flags", ""))),
        steps=table.get("steps", 20),
        arithmetic=table["arithmetic"],
        klass=table["class"],
        oracle=table.get("oracle", False),
        learns=float(table["learns"]),
        mutants=tuple(table.get("mutants", ())),
        seeds=tuple(table.get("seeds", (1,))),
        floor=tuple(_plan(path, "U", plan) for plan in table.get("floor", ())),
        u=_plan(path, "U", table["U"]),
        o=_plan(path, "O", table["O"]),
    )


def _check(path: Path, table: Mapping[str, Any], models: Mapping[str, Any]) -> None:
    allowed = KEYS | {"U", "O"}
    for wrong, what in ((set(table) - allowed, "unknown"), (REQUIRED - set(table), "missing")):
        if wrong:
            raise CaseError(f"{path}: {what} key {', '.join(sorted(wrong))}; keys are {', '.join(sorted(allowed))}")
    choices: dict[str, Any] = {"model": models, "arithmetic": ARITHMETIC, "class": CLASSES, "corpus": NAMES}
    for key, known in choices.items():
        if key in table and table[key] not in known:
            raise CaseError(f"{path}: {key} is {table[key]!r}; choose one of {', '.join(known)}")
    strange = set(table.get("mutants", ())) - set(MUTANTS)
    if strange:
        raise CaseError(
            f"{path}: there is no planted error {', '.join(sorted(strange))}; known are {', '.join(MUTANTS)}"
        )
    if table["arithmetic"] not in CLASSES[table["class"]]:
        raise CaseError(
            f"{path}: class {table['class']} requires the arithmetic {' or '.join(CLASSES[table['class']])}"
        )
    noisy = table["class"] != "E0" and table["arithmetic"] != "float64"
    floors, fewest = len(table.get("floor", ())), FEWEST_FLOORS[table["class"]] if noisy else 0
    if floors < fewest or (floors and not noisy):
        raise CaseError(
            f"{path}: {floors} times [[floor]] (U in another order of summation): E1 float32 needs at least "
            f"{FEWEST_FLOORS['E1']}, E2 {FEWEST_FLOORS['E2']}, and other cases have none"
        )
    if table.get("oracle") and table["arithmetic"] != "float64":
        raise CaseError(f"{path}: the oracle computes in float64; this case is {table['arithmetic']}")
    steps = table.get("steps", 20)
    if not isinstance(steps, int) or steps <= FEWEST_STEPS:
        raise CaseError(f"{path}: steps is {steps!r}; give a whole number above {FEWEST_STEPS}")
    if not table["learns"] > 0:
        raise CaseError(f"{path}: learns is {table['learns']}; give the amount by which the loss must fall, above 0")


def _plan(path: Path, name: Literal["U", "O"], table: Mapping[str, Any]) -> ArmPlan:
    unknown = set(table) - ARM_KEYS
    if unknown:
        raise CaseError(f"{path}: unknown key {', '.join(sorted(unknown))} in [{name}]")
    arm, world = table.get("arm", name), table.get("world", 1)
    if arm not in ("U", "O"):
        raise CaseError(f"{path}: arm is {arm!r} in [{name}]; choose U or O")
    if table.get("script") not in (None, *SCRIPTS):
        raise CaseError(f"{path}: script is {table['script']!r} in [{name}]; choose one of {', '.join(SCRIPTS)}")
    if not isinstance(world, int) or world < 1:
        raise CaseError(f"{path}: world is {world!r} in [{name}]; give a number of ranks")
    return ArmPlan(
        arm=arm,
        world=world,
        flags=tuple(shlex.split(table.get("flags", ""))),
        resume_at=table.get("resume_at"),
        again=table.get("again", False),
        script=table.get("script"),
    )
