"""Plans against an exhaustive search, against other planners, and against the memory and the links of the paper."""

import json
from dataclasses import asdict, replace
from itertools import chain
from math import inf, nan
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.longseq.flexsp.plan.assign import WorkGroup
from megatron.longseq.flexsp.plan.baselines import total
from megatron.longseq.flexsp.plan.bound import microbatch_bound
from megatron.longseq.flexsp.plan.cost import FAMILIES
from megatron.longseq.flexsp.plan.cost_file import load_cost, save_cost
from megatron.longseq.flexsp.plan.degree_sets import candidates, lower_estimate
from megatron.longseq.flexsp.plan.exact import EXACT_GAP, solve_by_program
from megatron.longseq.flexsp.plan.paper import paper_cost
from megatron.longseq.flexsp.plan.placement import Placement
from megatron.longseq.flexsp.plan.plan import Kind, PlannerName
from megatron.longseq.flexsp.plan.planner import automatic_degrees, plan_step
from megatron.longseq.flexsp.plan.problem import PlanError, StepProblem
from megatron.longseq.flexsp.plan.step_bound import step_bound
from megatron.longseq.flexsp.plan.subsets import solve_by_subsets
from megatron.longseq.flexsp.tools.cli import main
from megatron.longseq.flexsp.tools.simulate import draw_lengths
from tests.unit.flexsp_bed import COST, check, exhaustive

LENGTHS = st.lists(st.integers(16, 8 * COST.tokens_per_rank), min_size=1, max_size=7)
POWERS = (1, 2, 4, 8)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(lengths=LENGTHS, families=st.sampled_from([FAMILIES, ("ulysses",)]))
def test_plans_are_within_a_percent_of_the_best_and_bounds_below_it(lengths, families):
    problem = StepProblem(lengths, 8, COST, POWERS, families)
    best, alone = exhaustive(problem)
    plan = plan_step(lengths, 8, COST, POWERS, families)
    check(plan, lengths, 8)
    assert best * (1 - 1e-9) <= plan.seconds <= 1.01 * best
    assert plan.bound <= best * (1 + 1e-9)
    assert step_bound(problem) <= best * (1 + 1e-9)
    assert step_bound(problem, known=1.5 * best) <= best * (1 + 1e-9)
    if alone < inf:
        assert microbatch_bound(problem, range(len(lengths)), 1.5 * alone) <= alone * (1 + 1e-9)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(16, 8 * COST.tokens_per_rank), min_size=8, max_size=10),
    where=st.sampled_from([(8, POWERS), (6, (1, 2, 3, 6))]),
    tokens=st.sampled_from([COST.tokens_per_rank, 20_000]),
)
def test_ten_sequences_are_planned_within_a_percent_of_the_best(lengths, where, tokens):
    ranks, degrees = where
    lengths, cost = [min(length, ranks * tokens) for length in lengths], replace(COST, tokens_per_rank=tokens)
    best, _ = exhaustive(StepProblem(lengths, ranks, cost, degrees))
    plan = plan_step(lengths, ranks, cost, degrees)
    check(plan, lengths, ranks, tokens)
    assert best * (1 - 1e-9) <= plan.seconds <= 1.01 * best
    assert plan.bound <= best * (1 + 1e-9)


EXACT = [[30_000, 9_000, 8_000, 700], [51_592], [4_000] * 6, [20_000, 15_000, 900, 64, 48], [9_000, 5_000, 5_000] * 2]
EXACT += [[40_000, 30_000, 9_000]]  # more than a micro-batch holds


@pytest.mark.parametrize("lengths", EXACT)
def test_exact_plans_agree_with_the_exhaustive_search(lengths):
    problem = StepProblem(lengths, 8, COST, POWERS)
    best, _ = exhaustive(problem)
    assert total(solve_by_subsets(problem, lambda number: 0.0) or []) == pytest.approx(best, rel=1e-9)
    divided = solve_by_subsets(problem, lambda number: 100.0 * max(0, 3 - number))  # three of them are cheaper
    assert divided is not None and len(divided) >= min(3, len(lengths))
    plan = plan_step(lengths, 8, COST, POWERS, planner="exact")
    check(plan, lengths, 8)
    assert plan.seconds == pytest.approx(best, rel=1e-9)
    assert plan.bound <= plan.seconds * (1 + 1e-12)


@pytest.mark.parametrize("lengths", EXACT[:4])
def test_the_integer_program_agrees_with_the_exhaustive_search(lengths):
    problem = StepProblem(lengths, 8, COST, POWERS)
    slow = [[group] for index in range(len(lengths)) if (group := WorkGroup(8)).add(problem, index) is None]
    found = solve_by_program(problem, slow, lambda number: 0.0)
    assert total(found) == pytest.approx(exhaustive(problem)[0], rel=EXACT_GAP)


@pytest.mark.parametrize(("ranks", "degrees"), [(8, (1, 2, 3, 4, 6, 8)), (7, (1, 2, 3, 4, 6)), (12, (3, 6))])
def test_exact_plans_have_places_and_know_idle_micro_batches(ranks, degrees):
    """Where degrees do not divide one another, sets of them have to be placed; a micro-batch without work has seconds.

    Of 12 ranks in nodes of 8, three groups of degree 3 have a place, and groups of 4 and 3 have none on 7 ranks.
    """
    lengths = [14_000, 9_000, 9_000, 8_500, 7_000]
    plan = plan_step(lengths, ranks, COST, degrees, planner="exact")
    check(plan, lengths, ranks)
    assert plan.seconds <= plan_step(lengths, ranks, COST, degrees).seconds
    if ranks == 8:
        assert plan.seconds == pytest.approx(exhaustive(StepProblem(lengths, ranks, COST, degrees))[0])
    for least in (2, len(lengths)):  # more micro-batches cost their start-up, with or without work
        more = plan_step(lengths, ranks, COST, degrees, planner="exact", least=least)
        assert len(more.microbatches) >= least and more.seconds <= plan.seconds + COST.fixed * max(
            0, least - len(plan.microbatches)
        )


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    ranks=st.integers(1, 27),
    lengths=st.lists(st.integers(1, 6_000), min_size=1, max_size=60),
    degrees=st.sampled_from([None, (1, 2, 3, 4, 6, 8, 12), (1, 3), (1, 2, 4, 8, 16)]),
    tokens=st.sampled_from([6_000, 6_449, 20_000]),
)
def test_plans_of_all_planners_are_valid_and_the_heuristic_is_the_fastest(ranks, lengths, degrees, tokens):
    cost = replace(COST, tokens_per_rank=tokens)
    seconds = {}
    planners: tuple[PlannerName, ...] = ("heuristic", "static", "sorted")
    for planner in planners:
        plan = plan_step(lengths, ranks, cost, degrees, planner=planner)
        check(plan, lengths, ranks, tokens)
        seconds[planner] = plan.seconds
    assert seconds["heuristic"] <= min(seconds.values()) * (1 + 1e-12)


@pytest.mark.slow
def test_a_batch_of_the_paper_is_planned_well_and_always_alike():
    lengths = draw_lengths("commoncrawl", 512, 1)
    one, two = (plan_step(lengths, 64, COST, kinds=("ulysses",), degrees=(1, 2, 4, 8, 16, 32, 64)) for _ in range(2))
    check(one, lengths, 64)
    assert one.microbatches == two.microbatches
    static = plan_step(lengths, 64, COST, (32,), ("ulysses",), "static")
    assert static.seconds / one.seconds > 1.3  # published: 1.50
    wide = plan_step(lengths, 64, COST)
    check(wide, lengths, 64)
    assert wide.seconds < one.seconds
    assert any(group.kind.ring > 1 for each in wide.microbatches for group in each.groups)


def test_the_papers_constants_and_formula():
    bandwidth = {2: 119.5, 4: 104.1, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}  # MiB per ms
    assert [COST.tokens_per_rank, paper_cost("13b").tokens_per_rank] == [6449, 6483]
    for degree, speed in bandwidth.items():
        lengths = [50_000, 3_000]
        compute = 629.3563 + sum(5.128e-6 * s * s + 0.1839576 * s for s in lengths) / degree
        exchange = sum(lengths) * 16 * 32 * 4096 / 2**20 / degree / speed
        assert COST.seconds(Kind(degree, 1), lengths) == pytest.approx((compute + exchange) / 1e3)
    long = [190_000]  # rings of long sequences hide behind attention; those of short ones do not
    assert COST.seconds(Kind(8, 4), [1_000] * 100) > COST.seconds(Kind(32, 1), [1_000] * 100)
    assert COST.seconds(Kind(16, 2), long) < COST.seconds(Kind(32, 1), long)
    assert COST.kinds(6) == (Kind(1, 6), Kind(2, 3))
    assert COST.kinds(3, ("ulysses", "hybrid")) == ()


def test_pipelines_get_the_micro_batches_that_they_need():
    for least, multiple in ((4, 1), (1, 4), (3, 2)):
        plan = plan_step([3_000] * 5, 4, COST, least=least, multiple=multiple)
        check(plan, [3_000] * 5, 4)
        assert len(plan.microbatches) >= least and len(plan.microbatches) % multiple == 0


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(PlanError, match=r"sequence 1 has 60000 tokens.*largest group, of 8 of 8 ranks, holds 51592"):
        plan_step([100, 60_000], 8, COST)
    with pytest.raises(ValueError, match="none of them can be used on 4 ranks"):
        plan_step([100], 4, COST, (3, 8), ("ulysses",))
    with pytest.raises(ValueError, match="exact plan of 60 sequences"):
        plan_step(range(20_000, 50_000, 500), 8, COST, planner="exact")
    assert automatic_degrees(13) == (1, 2, 3, 4, 6, 8, 12)


def test_idle_ranks_have_groups_of_allowed_degrees_or_wait_alone(tmp_path: Path, capsys):
    file = tmp_path / "lengths.txt"
    file.write_text("3000\n9000\n")
    for degrees, waiting in (("3,6", [6, 7]), ("2", []), ("1,6", [])):
        flags = ["--lengths", str(file), "--ranks", "8", "--cost", "7b-a100", "--degrees", degrees]
        assert main(["plan", *flags, "--json", "--microbatch-bound"]) == 0
        plan = json.loads(capsys.readouterr().out)
        for one in plan["microbatches"]:
            assert {group["degree"] for group in one["groups"]} <= {int(degree) for degree in degrees.split(",")}
            ranks = [rank for group in one["groups"] for rank in group["ranks"]]
            assert sorted([*ranks, *waiting]) == list(range(8))
        assert plan["bound"] <= plan["microbatch_bound"] * (1 + 1e-3) <= plan["seconds"] * (1 + 1e-3)


def test_the_command_prints_a_plan(tmp_path: Path, capsys):
    file = tmp_path / "lengths.txt"
    file.write_text("5000\n\n300\n  700 \n20000\n")
    flags = ["--lengths", str(file), "--ranks", "6", "--degrees", "1,2,3,6", "--cost"]
    assert main(["plan", *flags, "7b-a100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    groups = list(chain.from_iterable(one["groups"] for one in plan["microbatches"]))
    assert sorted(chain.from_iterable(group["sequences"] for group in groups)) == [0, 1, 2, 3]
    assert set(plan) == {"microbatches", "seconds", "bound", "gap", "planner_seconds"}
    assert all(set(one) == {"seconds", "groups"} for one in plan["microbatches"])
    assert all(set(group) == {"degree", "kind", "ranks", "sequences"} for group in groups)
    assert plan["gap"] == pytest.approx((plan["seconds"] - plan["bound"]) / plan["bound"])
    for one in plan["microbatches"]:
        for group in (group for group in one["groups"] if group["sequences"]):
            assert group["kind"] in ("ulysses", "ring", "2x3") and len(group["ranks"]) == group["degree"]
    assert main(["plan", *flags, "7b-a100", "--max-tokens-per-rank", "1000"]) == 1
    assert "sequence 3 has 20000 tokens" in capsys.readouterr().err
    assert main(["plan", *flags, "8b-a100"]) == 1
    assert "neither a file nor one of 7b-a100" in capsys.readouterr().err
    file.write_text("12\nmany\n")
    assert main(["plan", *flags, "7b-a100"]) == 1
    assert "line 2: 'many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "0"], "--ranks 0: give 1 to"),
        (["--ranks", "1000000000"], "--ranks 1000000000: give 1 to"),
        (["--ranks", "4", "--microbatches", "1000000000"], "--microbatches 1000000000: give 1 to"),
        (["--ranks", "4", "--max-tokens-per-rank", "0"], "0 tokens per rank; give at least 1"),
        (["--ranks", "13", "--kinds", "ulysses", "--degrees", "5"], "none of them can be used on 13 ranks"),
    ],
)
def test_impossible_flags_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text("5\n6000\n")
    assert main(["plan", "--lengths", str(file), "--cost", "7b-a100", *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_hundred_thousand_ranks_have_no_more_groups_than_sequences() -> None:
    problem = StepProblem([20_000, 9_000, 300], 100_000, COST, automatic_degrees(100_000))
    for counts in candidates(problem, range(3), lower_estimate(problem, range(3))):
        assert all(count <= 3 for _, count in counts) and problem.placement.fits(counts)


@given(data=st.data(), ranks=st.integers(1, 40), node=st.sampled_from([4, 8, 16]))
def test_groups_are_placed_at_the_first_or_last_free_slot(data, ranks, node):
    """Slots without a free rank are left out at once, which must not leave out others."""
    placement = Placement(ranks, node)
    used: set[int] = set()
    degrees = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), max_size=8).map(lambda x: sorted(x)[::-1]))
    last = [degree % 3 == 0 for degree in degrees]
    starts: list[int] | None = []
    for degree, reverse in zip(degrees, last, strict=True):
        slots = [one for one in placement.slots(degree) if used.isdisjoint(range(one, one + degree))]
        if not slots:
            starts = None
            break
        starts.append(slots[-1 if reverse else 0])
        used.update(range(starts[-1], starts[-1] + degree))
    assert placement._first_fit(degrees, last) == (None if starts is None else tuple(starts))


def test_cost_models_are_saved_and_read(tmp_path: Path):
    file = tmp_path / "cost.json"
    save_cost(COST, file)
    assert load_cost(str(file)) == COST
    values = json.loads(file.read_text())
    del values["layers"]
    file.write_text(json.dumps({**values, "depth": 3}))
    with pytest.raises(ValueError, match="unknown are depth, missing are layers"):
        load_cost(str(file))
    file.write_text(json.dumps({**values, "layers": "many"}))
    with pytest.raises(ValueError, match="give numbers"):
        load_cost(str(file))
    values = asdict(replace(COST))
    del values["_cache"]
    for key, value, message in (
        ("ring_latency", nan, "latencies at least 0 s and finite"),
        ("all_to_all", [[2.5, 1e9]], r"\[2.5, 1000000000.0\]: give a list of \[ranks, bytes per second\]"),
        ("all_to_all", [[2]], "give a list of"),
    ):
        file.write_text(json.dumps({**values, "links": {**values["links"], key: value}}))
        with pytest.raises(ValueError, match=message):
            load_cost(str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "lengths: No such file or directory"),
        (b"\xff\xfe\x00", "an input file is not UTF-8 text"),
        (b"", "it has no lengths"),
        (b"7\n0\n", "line 2: length 0; give at least 1"),
        (b"12.5\n", "line 1: '12.5' is no length"),
        (b"1" + b"0" * 400, "tokens, but the largest group, of 4 of 4 ranks, holds 25796"),  # more than a float holds
    ],
)
def test_unusable_lengths_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    file = tmp_path / "lengths"
    if content is not None:
        file.write_bytes(content)
    assert main(["plan", "--lengths", str(file), "--ranks", "4", "--cost", "7b-a100"]) == 1
    assert message in capsys.readouterr().err
