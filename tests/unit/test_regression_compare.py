"""The comparison accepts equal runs and detects every planted difference."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.regression.case import Case, CaseError, load_cases, load_models, read_case
from tests.regression.compare import (
    BROKEN,
    Bitwise,
    Check,
    Evidence,
    Kind,
    Reassociated,
    Rules,
    agrees_with_oracle,
    compare,
    learned,
    relative,
)
from tests.regression.judge import Trial, judge, verdict
from tests.regression.noise import Floor, Noisy, line, student, tensors_within_noise, unbiased
from tests.regression.record import RankDisagreement, merge
from tests.regression.snapshot import Part, Snapshot, assemble

STEPS, AT = 6, (1, 2, 6)


def run(noise: float = 0.0, seed: int = 0) -> Evidence:
    """Return a run of STEPS steps, with relative noise on every number."""
    draw = numpy.random.default_rng(seed)
    curve = [
        {
            "iteration": step,
            "loss": (6.0 - 0.5 * step) * (1 + noise * draw.standard_normal()),
            "grad_norm": 2.0 * (1 + noise * draw.standard_normal()),
            "learning_rate": 0.001 * step,
            "skipped": 0,
            "tokens": 512,
            "samples": f"hash{step}",
        }
        for step in range(1, STEPS + 1)
    ]
    return Evidence(curve, {at: snapshot(noise, draw) for at in AT})


def snapshot(noise: float, draw: Any) -> Snapshot:
    base = numpy.random.default_rng(7).standard_normal((2, 3))
    names = ("a", "b", "optimizer.state.exp_avg.a", "optimizer.state.exp_avg.b")
    return Snapshot({name: base * (1 + noise * draw.standard_normal((2, 3))) for name in names})


def red(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("rules", [Bitwise(), Reassociated(), Noisy([run(1e-7, 1)])])
def test_equal_runs_are_green_in_every_class(rules: Rules) -> None:
    checks = compare(run(), run(), STEPS, AT, rules)
    assert checks and not red(checks)


@pytest.mark.parametrize("where", ["U", "O", "both"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rules", [Bitwise(), Reassociated(), Noisy([run(1e-7, 1)])])
def test_nan_is_red_in_any_arm_and_also_against_nan(where: str, bad: float, rules: Rules) -> None:
    u, o = run(), run()
    for evidence in {"U": (u,), "O": (o,), "both": (u, o)}[where]:
        evidence.curve[3]["loss"] = bad
    assert red(compare(u, o, STEPS, AT, rules))


def test_nan_in_a_tensor_is_red_also_against_nan() -> None:
    u, o = run(), run()
    for evidence in (u, o):
        evidence.snapshots[2].tensors["optimizer.state.exp_avg.a"][0, 0] = math.nan
    assert "arm O is finite" in red(compare(u, o, STEPS, AT, Bitwise()))


def edit_step(name: str, value: Any) -> Callable[[Evidence], Evidence]:
    def edit(evidence: Evidence) -> Evidence:
        evidence.curve[2][name] = value
        return evidence

    return edit


def edit_tensor(at: int, name: str, change: float) -> Callable[[Evidence], Evidence]:
    def edit(evidence: Evidence) -> Evidence:
        evidence.snapshots[at].tensors[name][1, 1] += change
        return evidence

    return edit


def differing_copies(evidence: Evidence) -> Evidence:
    evidence.snapshots[2].differing_copies.append("a")
    return evidence


FLAWS = {
    "missing step": (lambda e: replace(e, curve=[*e.curve[:2], *e.curve[3:]]), "arm O is whole"),
    "short": (lambda e: replace(e, curve=e.curve[:-1]), "arm O is whole"),
    "long": (lambda e: replace(e, curve=[*e.curve, e.curve[-1]]), "arm O is whole"),
    "no steps": (lambda e: replace(e, curve=[]), "arm O is whole"),
    "no snapshot": (lambda e: replace(e, snapshots={1: e.snapshots[1]}), "arm O is whole"),
    "empty snapshot": (lambda e: replace(e, snapshots={at: Snapshot() for at in AT}), "arm O is whole"),
    "learning rate": (edit_step("learning_rate", 0.0030000001), "learning_rate"),
    "tokens": (edit_step("tokens", 511), "tokens"),
    "samples": (edit_step("samples", "other"), "samples"),
    "skipped": (edit_step("skipped", 1), "arm O skips nothing"),
    "loss": (edit_step("loss", 4.5 * (1 + 2e-9)), "loss"),
    "gradient norm": (edit_step("grad_norm", 2.0 * (1 + 2e-9)), "grad_norm"),
    "moment": (edit_tensor(2, "optimizer.state.exp_avg.b", 1e-7), "first_moments at 2"),
    "weight": (edit_tensor(6, "a", 1e-7), "weights at 6"),
    "replicas": (differing_copies, "replicas at 2"),
}


@pytest.mark.parametrize("rules", [Bitwise(), Reassociated()])
@pytest.mark.parametrize("flaw", FLAWS)
def test_each_flaw_is_red_and_named(flaw: str, rules: Rules) -> None:
    edit, name = FLAWS[flaw]
    assert red(compare(run(), edit(run()), STEPS, AT, rules)) == {name}


def test_one_bit_is_red_in_e0_and_green_in_e1() -> None:
    u, o = run(), run()
    o.curve[4]["loss"] = math.nextafter(o.curve[4]["loss"], 10)
    o.snapshots[6].tensors["b"][0, 0] = numpy.nextafter(o.snapshots[6].tensors["b"][0, 0], 10)
    assert red(compare(u, o, STEPS, AT, Bitwise())) == {"loss", "weights at 6"}
    assert not red(compare(u, o, STEPS, AT, Reassociated()))


def test_minus_zero_is_another_bit_pattern() -> None:
    u, o = run(), run()
    u.curve[0]["grad_norm"], o.curve[0]["grad_norm"] = 0.0, -0.0
    assert red(compare(u, o, STEPS, AT, Bitwise())) == {"grad_norm"}


@pytest.mark.parametrize("change", ["gone", "more", "shape"])
def test_other_tensors_are_red(change: str) -> None:
    o = run()
    tensors = o.snapshots[6].tensors
    if change == "gone":
        del tensors["a"]
    elif change == "more":
        tensors["c"] = tensors["a"]
    else:
        tensors["a"] = tensors["a"].reshape(3, 2)
    for rules in (Bitwise(), Reassociated()):
        assert red(compare(run(), o, STEPS, AT, rules)) == {"weights at 6"}


def test_an_error_against_nothing_is_never_small() -> None:
    assert relative(0.0, 0.0) == 0.0
    assert relative(1e-300, 0.0) == BROKEN


def test_a_nan_ratio_is_a_broken_check() -> None:
    assert Check("x", math.nan, "").ratio == BROKEN and not Check("x", math.nan, "").passed
    assert Check("x", math.inf, "").ratio == BROKEN and Check("x", 1.0, "").passed


def test_learning_is_required() -> None:
    assert learned("U", run().curve, 1.0).passed
    assert not learned("U", run().curve, 3.0).passed
    flat = [{"loss": 5.0}] * 6
    assert not learned("U", flat, 0.1).passed
    assert not learned("U", [{"loss": math.nan}] * 6, 0.1).passed
    assert not learned("U", [], 0.1).passed


def test_noise_of_the_floor_is_green_and_four_times_as_much_is_red() -> None:
    u, others = run(), [run(1e-6, seed) for seed in (1, 2, 3)]
    assert not red(compare(u, run(1e-6, 4), STEPS, AT, Noisy(others)))
    far = run(2e-5, 4)
    assert {"loss", "grad_norm", "weights at 6"} <= red(compare(u, far, STEPS, AT, Noisy(others)))


def test_a_drift_inside_the_band_is_red_by_its_trend() -> None:
    draw = numpy.random.default_rng(3)
    reference = [5.0] * 200
    others = [(5.0 + 1e-5 * draw.standard_normal(200)).tolist() for _ in range(2)]
    drift = (5.0 + numpy.linspace(0, 4e-5, 200)).tolist()
    drift[0] = 5.0
    checks = Noisy([Evidence([{"loss": x} for x in other]) for other in others]).numbers("loss", reference, drift)
    assert red(checks) == {"loss, trend"}


def test_a_floor_needs_another_run() -> None:
    with pytest.raises(ValueError, match="at least one more run"):
        Floor([1.0], [])


def test_slope_and_its_error() -> None:
    slope, error = line([1.0, 3.0, 5.0, 7.0])
    assert (slope, error) == pytest.approx((2.0, 0.0))


def test_tensors_of_another_name_are_red_in_noise_too() -> None:
    one = {"a": numpy.ones(3)}
    assert not tensors_within_noise("weights", one, [one], {"b": numpy.ones(3)}).passed
    assert not tensors_within_noise("weights", one, [one], {"a": numpy.ones(3) + 1e-3}).passed


@pytest.mark.parametrize(
    ("kind", "wrong", "value", "is_green"),
    [
        ("weights", 1, 1.1, True),  # Adam divided rounding by rounding
        ("weights", 2, 1.1, False),
        ("weights", 1, numpy.nan, False),
        ("weights", 1, numpy.inf, False),
        ("first_moments", 1, 1.1, False),
    ],
)
def test_one_of_a_thousand_weights_may_differ_beyond_the_floor(
    kind: Kind, wrong: int, value: float, is_green: bool
) -> None:
    exact, wrong_one = numpy.ones(1000), numpy.ones(1000)
    wrong_one[:wrong] = value
    key = "optimizer.state.exp_avg.a" if kind == "first_moments" else "a"
    other = Evidence([], {20: Snapshot({key: exact})})
    (check,) = Noisy([other]).tensors(kind, 20, {key: exact}, {key: wrong_one})
    assert check.passed is is_green


def floors(seeds: int, noise: float) -> list[Floor]:
    draw = numpy.random.default_rng(0)
    return [Floor([5.0] * 20, [(5.0 + noise * draw.standard_normal(20)).tolist()]) for _ in range(seeds)]


def test_paired_differences() -> None:
    draw = numpy.random.default_rng(1)
    noise = [(5.0 + 1e-3 * draw.standard_normal(20)).tolist() for _ in range(3)]
    biased = [[x + 3e-3 for x in curve] for curve in noise]
    spike = deepcopy(noise)
    spike[1][7] += 2e-2
    assert not red(unbiased("loss", floors(3, 1e-3), noise))
    assert "loss, mean" in red(unbiased("loss", floors(3, 1e-3), biased))
    assert "loss, size" in red(unbiased("loss", floors(3, 1e-3), spike))
    assert red(unbiased("loss", floors(2, 1e-3), noise[:2])) == {"loss"}


def test_few_samples_widen_the_quantile() -> None:
    assert student(1) > student(3) > student(12) == student(100)


def test_oracle_disagreement_is_red() -> None:
    u = run()
    curve = [{key: step[key] for key in ("loss", "grad_norm", "learning_rate", "tokens")} for step in u.curve]
    last = u.snapshots[6]
    assert not red(agrees_with_oracle(curve, last, u))
    assert red(agrees_with_oracle(curve[:-1], last, u))
    curve[1]["tokens"] = 511
    curve[2]["loss"] *= 1 + 1e-8
    assert red(agrees_with_oracle(curve, last, u)) == {"oracle: tokens", "oracle: loss"}


def case(name: str) -> Case:
    found = next(case for case in load_cases() if case.name == name)
    return replace(found, seeds=(1,), steps=STEPS)


def test_verdicts_on_mutants() -> None:
    sound, broken = run(), FLAWS["loss"][0](run())
    pipeline = case("pipeline")

    def judged(o: Evidence, planted: int) -> Any:
        return verdict(pipeline, [Trial(run(), [], o)], [sound], planted, AT)

    assert judged(broken, 1).red and "loss" in judged(broken, 1).by
    assert judged(broken, 0).error and not judged(broken, 0).red
    assert judged(run(), 1).error, "a mutant that changes no bit is an error"
    tiny = run()
    tiny.curve[0]["loss"] = math.nextafter(tiny.curve[0]["loss"], 10)
    assert not judged(tiny, 1).red and not judged(tiny, 1).error, "a survivor"


def test_a_floor_fed_otherwise_is_red() -> None:
    single = case("single-precision")
    other = FLAWS["samples"][0](run(1e-7, 1))
    checks = judge(single, [Trial(run(), [other, run(1e-7, 2)], run())], STEPS, AT)
    assert "floor 0: samples" in red(checks)


def test_ranks_that_disagree_are_refused() -> None:
    step = {
        "iteration": 1,
        "loss": 1.0,
        "grad_norm": 1.0,
        "learning_rate": 0.1,
        "skipped": 0,
        "tokens": 4,
        "samples": ["x"],
    }
    assert merge([[step], [step | {"loss": None}]])[0]["loss"] == 1.0
    with pytest.raises(RankDisagreement, match="loss"):
        merge([[step], [step | {"loss": 2.0}]])
    with pytest.raises(RankDisagreement, match="numbers of steps"):
        merge([[step], []])


def test_assemble_finds_missing_parts_and_differing_copies() -> None:
    left = Part("a", (4,), (0,), numpy.arange(2.0))
    right = Part("a", (4,), (2,), numpy.arange(2.0))
    made = assemble([[left], [right], [right]])
    assert made.tensors["a"].tolist() == [0, 1, 0, 1] and not made.differing_copies
    assert assemble([[left], [right], [replace(right, data=numpy.ones(2))]]).differing_copies == ["a"]
    with pytest.raises(ValueError, match="no rank holds all of a"):
        assemble([[left]])


GOOD = """proves = "x"\nmodel = "tied"\narithmetic = "float64"\nclass = "E1"\nlearns = 1.0\n[U]\n[O]\nworld = 2\n"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learns = 1.0", "learns = 1.0\nlerns = 2", "unknown key lerns"),
        ('model = "tied"\n', "", "missing key model"),
        ('"tied"', '"llama"', "choose one of"),
        ("learns = 1.0", "learns = 0.0", "above 0"),
        ("learns = 1.0", 'learns = 1.0\nmutants = ["typo"]', "there is no planted error typo"),
        ('"E1"', '"E2"', "class E2 requires the arithmetic bf16"),
        ('"float64"', '"float32"', "floor"),
        ("world = 2", "wrld = 2", "unknown key wrld in .O."),
        ("world = 2", 'arm = "V"', "choose U or O"),
        ("world = 2", 'world = "2"', "number of ranks"),
        ("learns = 1.0", "learns = 1.0\nsteps = 5", "above 6"),
        ("[U]", "[U", "not TOML"),
    ],
)
def test_malformed_case_files_are_refused_by_key(old: str, new: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "case.toml"
    file.write_text(GOOD)
    assert read_case(file, load_models()).o.world == 2
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(CaseError, match=message):
        read_case(file, load_models())
