"""Memory, bytes and seconds of every strategy equal published closed forms and independent counts."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.sharding.plan.collectives import (
    CollectiveKind,
    CollectivesMode,
    Scope,
    always_flat,
    bucket_collectives,
    never_flat,
)
from megatron.longseq.sharding.plan.comm_volume import CommVolume, comm_volume
from megatron.longseq.sharding.plan.memory import MEGATRON, Model, Widths, memory
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import ALL, RUNNING, VALID, Level, Strategy
from megatron.longseq.sharding.plan.time_model import (
    ComputeTime,
    LinkSpeed,
    LinkSpeeds,
    TrainingJob,
    fastest,
    predict,
    rank,
)
from megatron.longseq.sharding.tools.tables import PARAMS, SEVEN_B
from tests.bucket_volume import Bucket, bucket_volume

# 7B, m = 8, n = 64, A = 8, bytes 2/2/12, 200 and 25 GB/s: memory GB, GB inside, GB between, seconds of a step.
TABLE = """
NNN 107.8 23.6 2.95 .24   NNI 37.1 23.6 2.95 .24    NNG 28.2 23.6 2.95 .24    NII 25.3 106.2 2.95 .65
NIG 16.4 106.2 2.95 .65   NGG 15.0 106.2 13.27 1.06 INI 25.3 200.5 2.95 1.12  ING 16.4 200.5 2.95 1.12
III 13.5 283.1 2.95 1.53  IIG 4.6 283.1 2.95 1.53   IGG 3.2 283.1 13.27 1.95  GNG 15.0 200.5 25.06 2.01
GIG 3.2 283.1 25.06 2.42  GGG 1.7 283.1 35.38 2.83
"""
GOLDEN = [tuple(row) for row in zip(*[iter(TABLE.split())] * 5, strict=True)]
PAPER = Widths(grad=2)
PUBLISHED = replace(SEVEN_B, widths=PAPER)
SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (2, 4), (3, 2), (8, 8)]


def near(value: float, text: str) -> bool:
    """Return whether a value rounds to a figure: half a unit of its last digit."""
    return abs(value - float(text)) <= 0.5 * 10 ** -len(text.split(".")[1]) * (1 + 1e-9)


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row[0])
def test_the_published_table(row: tuple[str, ...]) -> None:
    name, stored, inside, between, seconds = row
    strategy = Strategy.parse(name)
    step = comm_volume(strategy, PUBLISHED.groups, PUBLISHED.model, PAPER).step(8)
    assert near(memory(strategy, PUBLISHED.groups, PUBLISHED.model, PAPER).total / 1e9, stored)
    assert near(step.inside / 1e9, inside) and near(step.between / 1e9, between) and step.flat == 0
    assert near(predict(strategy, PUBLISHED).seconds.step, seconds)
    assert near(predict(strategy, PUBLISHED).seconds.communication, seconds)


def test_the_published_table_has_every_valid_strategy() -> None:
    assert {row[0] for row in GOLDEN} == {str(one) for one in VALID} and len(GOLDEN) == 14


def test_upstreams_documented_bytes() -> None:
    """Upstream's page gives 18 bytes per parameter with float32 gradients, 6 + 12/d with the distributed optimizer."""
    groups, model = RankGroups(64, 8), Model(6400, 6400)
    assert memory(Strategy.parse("NNN"), groups, model).total == 18 * 6400
    assert memory(Strategy.parse("NNG"), groups, model).total == (6 + 12 / 64) * 6400
    assert memory(Strategy.parse("NNI"), groups, model).total == (6 + 12 / 8) * 6400


def terms(strategy: Strategy, m: int, G: int, params: int, grads: int, A: int) -> tuple[float, float]:
    """Return the closed forms of a step, inside and between groups, for valid strategies."""
    p, g, o = str(strategy)
    f = lambda k: (k - 1) / k  # noqa: E731
    gather = {"N": (0, 0), "I": (f(m), 0), "G": (f(m), f(G) / m)}
    finish = {
        "NN": (2 * f(m), 2 * f(G) / m),
        "NI": (f(m), 2 * f(G) / m),
        "NG": (f(m), f(G) / m),
        "II": (0, 2 * f(G) / m),
        "IG": (0, f(G) / m),
        "GG": (0, 0),
    }[g + o]
    after = {"NN": (0, 0), "IN": (f(m), 0), "GN": gather["G"], "II": (0, 0), "GI": (0, f(G) / m), "GG": (0, 0)}[o + p]
    return tuple(
        A * (2 * gather[p][at] * params + gather[g][at] * grads) + finish[at] * grads + after[at] * grads
        for at in (0, 1)
    )


@pytest.mark.parametrize("strategy", VALID, ids=str)
def test_closed_forms(strategy: Strategy) -> None:
    for (m, count), microbatches, share in product(SHAPES, (1, 4), (1, 16)):
        groups = RankGroups(m * count, m)
        model = Model(64 * 48, 64 * 48 // share)
        step = comm_volume(strategy, groups, model, PAPER).step(microbatches)
        inside, between = terms(strategy, m, count, 2 * model.params, 2 * model.trainable, microbatches)
        assert (step.inside, step.between) == (pytest.approx(inside), pytest.approx(between)), groups
        stored = memory(strategy, groups, model, PAPER)
        cut = {"N": 1, "I": m, "G": m * count}
        p, g, o = str(strategy)
        assert stored.total == pytest.approx(
            2 * model.params / cut[p] + 2 * model.trainable / cut[g] + 12 * model.trainable / cut[o]
        ), groups


@pytest.mark.parametrize("strategy", ALL, ids=str)
@pytest.mark.parametrize("is_flat", [False, True])
def test_phases_make_the_levels_that_they_promise(strategy: Strategy, is_flat: bool) -> None:
    """Follow what every rank holds: gathers end with whole parameters, reductions with sums over all ranks."""
    groups = RankGroups(8, 2)
    program_ = bucket_collectives(strategy, groups, is_flat=always_flat if is_flat else never_flat)
    cut = dict(zip(Level, (1, 2, 8), strict=True))

    def run(collectives: tuple, parts: int, summed: int) -> tuple[int, int]:
        for kind, scope in collectives:
            size = {Scope.INSIDE: 2, Scope.BETWEEN: 4, Scope.FLAT: 8}[scope]
            if kind is CollectiveKind.ALL_GATHER:
                assert parts % size == 0
                parts //= size
            else:
                assert summed * size <= 8
                summed *= size
                parts *= size if kind is CollectiveKind.REDUCE_SCATTER else 1
        return parts, summed

    assert run(program_.params, cut[strategy.params], 1) == (1, 1)
    parts, summed = run(program_.grads, 1, 1)
    assert parts == cut[strategy.grads]
    assert run(program_.finish_grads, parts, summed) == (cut[strategy.optimizer], 8)
    updated, _ = run(program_.finish_params, cut[strategy.optimizer], 1)
    assert updated == min(cut[strategy.params], cut[strategy.optimizer]) or strategy.params > strategy.optimizer


@pytest.mark.parametrize("strategy", VALID, ids=str)
def test_flat_collectives_send_one_ring_and_replace_only_whole_ones(strategy: Strategy) -> None:
    groups, model = RankGroups(8, 2), Model(8 * 30, 8 * 30)
    flat, ours = (comm_volume(strategy, groups, model, PAPER, is_flat=is_flat).step(3) for is_flat in (True, False))
    assert flat.collectives <= ours.collectives
    if str(strategy) == "GGG":
        assert flat == CommVolume(0, 0, 3 * 3 * 7 * 60, 9)
    if str(strategy) == "NNN":
        assert flat == CommVolume(0, 0, 2 * 7 * 60, 1)
    if str(strategy) in ("NNI", "NII", "III", "IIG", "INI"):
        assert flat == ours, "nothing of it goes over all ranks at once"
    if str(strategy) == "NIG":
        assert flat == CommVolume(3 * 4 * 60, 3 * 60, 7 * 60, 3 + 1 + 1)
    assert flat.flat + groups.size * flat.between >= ours.flat + groups.size * ours.between, "bytes that leave a group"


@pytest.mark.parametrize("strategy", ALL, ids=str)
@pytest.mark.parametrize("size", [1, 6])
def test_groups_of_one_or_of_all_leave_flat_collectives(strategy: Strategy, size: int) -> None:
    """With m = 1 level I is not sharded, with m = n it is global. One level sends a flat ring's bytes."""
    groups, model = RankGroups(6, size), Model(600, 600)
    level = Level.NONE if size == 1 else Level.GLOBAL
    same = Strategy(*(level if each is Level.GROUP else each for each in vars_of(strategy)))
    ours = comm_volume(strategy, groups, model).step(2)
    plain = comm_volume(same, groups, model, is_flat=True).step(2)
    assert ours.inside * ours.between == 0 and ours.inside + ours.between + ours.flat == plain.flat + plain.between + (
        plain.inside
    )
    assert memory(strategy, groups, model) == memory(same, groups, model) or not strategy.is_valid


def vars_of(strategy: Strategy) -> tuple[Level, Level, Level]:
    return strategy.params, strategy.grads, strategy.optimizer


@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_one_rank_sends_nothing(strategy: Strategy) -> None:
    assert comm_volume(strategy, RankGroups(1, 1), Model(10, 10), buckets=5).step(3) == CommVolume()


def test_what_follows_from_the_formulas() -> None:
    def between(name: str, microbatches: int = 8) -> int:
        return comm_volume(Strategy.parse(name), PUBLISHED.groups, PUBLISHED.model).step(microbatches).between

    for coarse, fine in (("NNI", "NNG"), ("NII", "NIG"), ("III", "IIG"), ("INI", "ING")):
        assert between(coarse) == between(fine), "globally sharded optimizer states cost no bytes between groups"
    assert between("NIG", 1) == between("NNG", 1), "with one micro-batch there is nothing to amortise"
    assert between("GGG") == 12 * between("IIG"), "3A / 2"
    extra = [
        comm_volume(Strategy.parse("NIG"), PUBLISHED.groups, PUBLISHED.model).step(count).inside for count in (1, 2, 3)
    ]
    assert extra[1] - extra[0] == extra[2] - extra[1] > 0


@pytest.mark.parametrize(
    ("share", "limit", "microbatches", "names"),
    [
        (1, None, 8, {"NNG"}),
        (1, 25e9, 8, {"NIG"}),
        (1, 5e9, 8, {"IIG"}),
        (1, 4e9, 8, {"IGG"}),
        (1, 2e9, 8, {"GGG"}),
        (1 / 16, 4e9, 8, {"ING"}),
        (3 / 1000, 4e9, 8, {"ING"}),
        (1, None, 1, {"NGG"}),
    ],
)
def test_the_fastest_that_fits(share: float, limit: float | None, microbatches: int, names: set[str]) -> None:
    model = Model(PARAMS, round(PARAMS * share))
    job = replace(PUBLISHED, model=model, work=ComputeTime(microbatches))
    assert str(fastest(job, RUNNING, limit).strategy) in names


def test_nothing_that_fits_is_an_error_that_says_what_the_smallest_needs() -> None:
    with pytest.raises(
        ValueError,
        match=r"into 1\.0 GB on each of 64 data-parallel ranks: the smallest, GGG, needs 1\.7 GB\. Give more",
    ):
        fastest(PUBLISHED, RUNNING, 1e9)
    with pytest.raises(ValueError, match="there is none"):
        fastest(PUBLISHED, ())


@given(
    st.sampled_from([(2, 2), (4, 2), (2, 4), (8, 8)]),
    st.integers(1, 20),
    st.floats(1, 300),
    st.floats(1, 300),
    st.floats(0, 1),
    st.sampled_from(list(CollectivesMode)),
)
def test_more_of_anything_never_makes_the_best_slower(
    shape: tuple[int, int], count: int, inside: float, between: float, hidden: float, mode: CollectivesMode
) -> None:
    groups = RankGroups(shape[0] * shape[1], shape[0])
    links = LinkSpeeds(LinkSpeed(inside * 1e9, 1e-6), LinkSpeed(between * 1e9, 1e-5), shape[0])
    job = TrainingJob(groups, Model(10**9, 10**8), ComputeTime(count, 0.01, 0.02, hidden), links, mode=mode, buckets=3)
    limits = [memory(one, groups, job.model).total for one in sorted(VALID)]
    steps = [fastest(job, VALID, limit).seconds.step for limit in sorted([*limits, 10**12]) if limit >= min(limits)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(steps))
    quick = replace(job, links=LinkSpeeds(LinkSpeed(inside * 2e9, 1e-6), LinkSpeed(between * 2e9, 1e-5), shape[0]))
    for one in ALL:
        before, after = predict(one, job), predict(one, quick)
        assert after.seconds.step <= before.seconds.step * (1 + 1e-9)
        assert before.seconds.hidden <= before.seconds.communication * (1 + 1e-9)
        assert before.seconds.step >= before.seconds.compute * (1 - 1e-9)
        assert before.memory == after.memory
    assert [one.seconds.step for one in rank(job, ALL)] == pytest.approx(
        sorted(predict(one, job).seconds.step for one in ALL)
    )


def test_what_hides_behind_compute() -> None:
    """Times are computed by hand for one group of 2 ranks. A gather or scatter of GGG takes 1 s at 10 bytes/s."""
    links = LinkSpeeds(LinkSpeed(10.0), LinkSpeed(10.0))
    job = TrainingJob(RankGroups(2, 2), Model(10, 10), ComputeTime(3, 2.0, 2.5, 1.0), links)
    spent = predict(Strategy.parse("GGG"), job).seconds
    assert (spent.compute, spent.params, spent.grads) == (13.5, 6.0, 3.0)
    assert spent.hidden == pytest.approx(9.0) and spent.step == pytest.approx(13.5)
    half = predict(Strategy.parse("GGG"), replace(job, work=ComputeTime(3, 2.0, 2.5, 0.2))).seconds
    assert half.hidden == pytest.approx(3 * (0.4 + 0.5))
    ends = predict(Strategy.parse("NNG"), replace(job, work=ComputeTime(3, 0.25, 0.5, 1.0))).seconds
    assert (ends.finish_grads, ends.finish_params) == (1.0, 1.0) and ends.hidden == pytest.approx(0.75)


def test_buckets_count_collectives() -> None:
    groups, model = RankGroups(4, 2), Model(400, 400)
    for one, is_flat in product(ALL, (False, True)):
        single, many = (comm_volume(one, groups, model, buckets=count, is_flat=is_flat).step(2) for count in (1, 5))
        assert many.collectives == 5 * single.collectives and replace(many, collectives=0) == replace(
            single, collectives=0
        )


@pytest.mark.parametrize("strategy", ALL, ids=str)
@pytest.mark.parametrize("is_flat", [False, True])
def test_buckets_send_what_the_model_does_that_they_make(strategy: Strategy, is_flat: bool) -> None:
    groups, sizes = RankGroups(6, 2), (60, 120, 6)
    made = comm_volume(strategy, groups, Model(186, 186), buckets=3, is_flat=is_flat).step(5)
    buckets = [Bucket(size) for size in sizes]
    assert bucket_volume(strategy, groups, buckets, MEGATRON, 5, is_flat=lambda collectives, size: is_flat) == made


def test_a_bucket_sends_by_how_it_is_used() -> None:
    """For GGG on 4 ranks in pairs and 8 elements of 2 bytes, a gather or scatter sends 4 bytes between and 8 inside."""
    groups, strategy = RankGroups(4, 2), Strategy.parse("GGG")

    def sent(bucket: Bucket, **named: int) -> CommVolume:
        return bucket_volume(strategy, groups, [bucket], MEGATRON, 3, **named)

    assert sent(Bucket(8)) == CommVolume(8, 4, 0, 2) * (3 * 2 + 3)
    assert sent(Bucket(8, gathers=1)) == CommVolume(8, 4, 0, 2) * (3 + 3)
    assert sent(Bucket(8, is_trained=False)) == CommVolume(8, 4, 0, 2) * (3 * 2)
    assert sent(Bucket(8), passes=2) == CommVolume(8, 4, 0, 2) * (3 * 2 * 2 + 3)


def test_each_bucket_is_flat_or_not_by_its_own_bytes() -> None:
    """For NNG with bf16 parameters and fp32 gradients, each term is chosen by its own bytes."""
    asked = []

    def is_flat(collectives: tuple, size: int) -> bool:
        asked.append((collectives[0].kind, size))
        return size >= 200

    sent = bucket_volume(
        Strategy.parse("NNG"),
        RankGroups(4, 2),
        [Bucket(40), Bucket(64)],
        replace(MEGATRON, grad_wire=4),
        2,
        is_flat=is_flat,
    )
    scatter, gather = CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_GATHER
    assert {(scatter, 160), (gather, 80), (scatter, 256), (gather, 128)} <= set(asked)
    assert sent == CommVolume(80 + 40 + 64, 40 + 20 + 32, 3 * 64, 2 + 2 + 1 + 2)


def test_uneven_parameters_are_padded_to_whole_shards() -> None:
    groups, model = RankGroups(4, 2), Model(10, 5)
    stored = memory(Strategy.parse("IIG"), groups, model, MEGATRON)
    assert (stored.params, stored.grads, stored.optimizer) == (2 * 3 * 2, 2 * 2 * 4, 2 * 12)
    assert comm_volume(Strategy.parse("GGG"), groups, model, is_flat=True).params.flat == 3 * 3 * 2


@pytest.mark.parametrize(("params", "trainable"), [(10, 0), (10, 11), (0, 0), (10, -1)])
def test_models_that_are_none_are_refused(params: int, trainable: int) -> None:
    with pytest.raises(ValueError, match="parameters cannot be trained; give 1 to"):
        Model(params, trainable)


@pytest.mark.parametrize("values", [(0,), (1, -1.0), (1, 1.0, -1.0), (1, 1.0, 1.0, 1.5), (1, 1.0, 1.0, -0.1)])
def test_work_that_is_none_is_refused(values: tuple) -> None:
    with pytest.raises(ValueError, match="give at least 1 micro-batch, seconds of at least 0 and a share"):
        ComputeTime(*values)
