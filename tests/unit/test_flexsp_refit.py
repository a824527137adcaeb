"""A cost model is found again from the times that it predicts, whatever the fit starts from."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.flexsp.plan.cost import GroupCostModel, GroupLinks
from megatron.longseq.flexsp.plan.cost_file import load_cost, save_cost
from megatron.longseq.flexsp.plan.plan import Kind
from megatron.longseq.flexsp.refit import GroupSample, refit, relative_error

TRUTH = GroupCostModel(
    name="truth",
    square=2e-8,
    linear=3e-5,
    fixed=0.02,
    tokens_per_rank=4096,
    layers=4,
    heads=Heads(8, 8),
    dim=64,
    links=GroupLinks(8, ((2, 4e8), (4, 3e8)), 5e8, 5e8, 1e-4, 2e-4),
    overlap=0.0,
)
KINDS = (Kind(1, 1), Kind(2, 1), Kind(1, 2), Kind(4, 1), Kind(1, 4))


def samples(cost: GroupCostModel, noise: float = 0.0) -> list[GroupSample]:
    """Return groups of random documents with the model's own times."""
    draw = random.Random(1)
    groups = [(kind, tuple(draw.randint(16, 2048) for _ in range(draw.randint(1, 6)))) for kind in KINDS * 12]
    return [
        GroupSample(k, lengths, cost.seconds(k, lengths) * draw.uniform(1 - noise, 1 + noise)) for k, lengths in groups
    ]


def wrong() -> GroupCostModel:
    """Return a start whose parts are all wrong, by different factors."""
    links = replace(TRUTH.links, all_to_all=((2, 8e8), (4, 6e8)), all_to_all_latency=5e-5, ring_inside=1e8)
    return replace(
        TRUTH, square=1e-8, linear=9e-5, fixed=0.001, links=replace(links, ring_between=1e8, ring_latency=1e-3)
    )


def test_exact_times_are_found_again() -> None:
    given, cost = samples(TRUTH), wrong()
    assert relative_error(cost, given) > 0.3
    for _ in range(8):  # as online, from fit to fit
        cost = refit(cost, given)
    assert relative_error(cost, given) < 0.01
    assert cost.square == pytest.approx(TRUTH.square, rel=0.05)
    assert cost.linear == pytest.approx(TRUTH.linear, rel=0.05)
    assert cost.tokens_per_rank == TRUTH.tokens_per_rank and cost.heads == TRUTH.heads


def test_noise_leaves_an_error_of_its_own_size() -> None:
    given, cost = samples(TRUTH, noise=0.1), wrong()
    for _ in range(8):
        cost = refit(cost, given)
    fresh = samples(TRUTH)
    assert relative_error(cost, fresh) < 0.1 / 2  # the mean of what the noise adds to a time


def test_a_fitted_model_is_written_and_read(tmp_path: Path) -> None:
    cost = refit(wrong(), samples(TRUTH))
    assert relative_error(cost, samples(TRUTH)) > 0  # fills the cache of kinds
    save_cost(cost, tmp_path / "cost.json")
    assert load_cost(str(tmp_path / "cost.json")) == cost


def test_parts_without_samples_stay() -> None:
    alone = [one for one in samples(TRUTH) if one.kind.degree == 1]
    cost = refit(wrong(), alone)
    assert cost.links == wrong().links
    assert refit(TRUTH, []) is TRUTH
