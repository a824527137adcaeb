"""What training under sharding strategies came to: seconds and bytes of a step beside what formulas say, ratios."""

import statistics
from collections.abc import Sequence
from typing import Any

from megatron.longseq.sharding.plan.collectives import CollectivesMode
from megatron.longseq.sharding.plan.memory import Model
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Strategy
from megatron.longseq.sharding.plan.time_model import ComputeTime, LinkSpeeds, TrainingJob, predict
from tests.benchmarks.calls import SentMessages
from tests.benchmarks.sharding_arms import WIDTHS, Result
from tests.bucket_volume import bucket_volume

RATIOS = {
    "iig_over_ggg": ("IIG overlapped", "GGG flat"),
    "iig_over_ggg_overlapped": ("IIG overlapped", "GGG overlapped"),
    "nig_over_flat_ngg": ("NIG overlapped", "NGG flat"),
    "nng_over_upstream": ("NNG overlapped", "upstream ZeRO-1"),
}


def sent_and_formula(result: Result, groups: RankGroups, microbatches: int) -> tuple[dict[str, float], dict[str, int]]:
    """Return bytes of a rank in a step, counted at the calls and by the formula: by which ranks took part.

    Args:
        result: an arm's runs.
        groups: the ranks, by node.
        microbatches: A.

    Raises:
        ValueError: ranks differ in what they send.
    """
    strategy, is_flat = Strategy.parse(result.arm.strategy), result.arm.mode is CollectivesMode.FLAT
    buckets = result.ranks[0].buckets
    step = bucket_volume(strategy, groups, buckets, WIDTHS, microbatches, is_flat=lambda collectives, size: is_flat)
    formula = {"inside": step.inside, "between": step.between, "all": step.flat}
    counted = [by_scope(rank.sent(), groups) for rank in result.ranks]
    if any(one != counted[0] for one in counted):
        raise ValueError(f"{result.arm.name}: ranks differ in the bytes they send: {counted}")
    steps = len(result.ranks[0].seconds())
    return {scope: sent / steps for scope, sent in counted[0].items()}, formula


def by_scope(seen: SentMessages, groups: RankGroups) -> dict[str, int]:
    """Return bytes inside nodes, between them, and over all ranks.

    Raises:
        ValueError: ranks that are none of these.
    """
    sent = {"inside": 0, "between": 0, "all": 0}
    for members, count in seen.bytes.items():
        nodes = {member // groups.size for member in members}
        if len(members) == groups.ranks:
            sent["all"] += count
        elif len(nodes) == 1:
            sent["inside"] += count
        elif len(nodes) == len(members):
            sent["between"] += count
        else:
            raise ValueError(f"{count} bytes were sent among ranks {members}, no scope of nodes of {groups.size} ranks")
    return sent


def predicted(results: Sequence[Result], links: LinkSpeeds, groups: RankGroups, microbatches: int) -> dict[str, float]:
    """Return the formula's seconds of a step of every arm, none of them hidden behind compute.

    What a step takes beside communication is alike for all arms: what the first one's measured step leaves over.
    """

    def communication(result: Result) -> float:
        numel, buckets = result.ranks[0].numel, len(result.ranks[0].buckets)
        job = TrainingJob(
            groups, Model(numel, numel), ComputeTime(microbatches), links, WIDTHS, result.arm.mode, buckets
        )
        return predict(Strategy.parse(result.arm.strategy), job).seconds.communication

    rest = max(0.0, statistics.median(results[0].rounds) - communication(results[0]))
    return {result.arm.name: rest + communication(result) for result in results}


def ratio(results: Sequence[Result], over: str, under: str) -> list[float]:
    """Return how many times faster one arm's steps are than another's, round by round."""
    rounds = {result.arm.name: result.rounds for result in results}
    return [slow / fast for fast, slow in zip(rounds[over], rounds[under], strict=True)]


def disagreement(results: Sequence[Result]) -> float:
    """Return by which share of upstream's loss an arm's differs at most, of any step: all train the same model."""
    upstream = results[0].ranks[-1].losses
    return max(
        abs(mine / theirs - 1)
        for result in results
        for mine, theirs in zip(result.ranks[-1].losses, upstream, strict=True)
    )


def text(results: Sequence[Result], links: LinkSpeeds, groups: RankGroups, microbatches: int) -> str:
    """Return the tables."""
    clock = predicted(results, links, groups, microbatches)
    numel = results[0].ranks[0].numel
    lines = [
        f"{numel / 1e6:.2f} million parameters, float32, {microbatches} micro-batches a step: median seconds of a step",
        "(least to most of rounds; predicted: communication by formula, none hidden, and what the first arm has more)",
    ]
    for result in results:
        counted, formula = sent_and_formula(result, groups, microbatches)
        lines.append(
            f"  {result.arm.name:16} {_spread(result.rounds)} ({clock[result.arm.name]:.3f})  MB sent by a rank: "
            + ", ".join(f"{scope} {sent / 1e6:.3f} ({formula[scope] / 1e6:.3f})" for scope, sent in counted.items())
        )
    lines.append("step throughput over: median of rounds (least to most; predicted)")
    for over, under in _given(results).values():
        found = _spread(ratio(results, over, under))
        lines.append(f"  {over} / {under}: {found} ({clock[under] / clock[over]:.2f})")
    lines.append(f"losses differ from upstream's by at most {disagreement(results):.1e} of them")
    return "\n".join(lines)


def summary(results: Sequence[Result], links: LinkSpeeds, groups: RankGroups, microbatches: int) -> dict[str, Any]:
    """Return the figures of the JSON line."""
    clock = predicted(results, links, groups, microbatches)
    pairs = [sent_and_formula(result, groups, microbatches) for result in results]
    ratios = {name: statistics.median(ratio(results, *pair)) for name, pair in _given(results).items()}
    return ratios | {
        "bytes_equal_formula": all(counted == formula for counted, formula in pairs),
        "predicted": {name: clock[under] / clock[over] for name, (over, under) in _given(results).items()},
        "step_seconds": {result.arm.name: statistics.median(result.rounds) for result in results},
        "losses_differ": disagreement(results),
        "microbatches": microbatches,
    }


def _given(results: Sequence[Result]) -> dict[str, tuple[str, str]]:
    """Return the ratios whose arms have run."""
    names = {result.arm.name for result in results}
    return {name: pair for name, pair in RATIOS.items() if names.issuperset(pair)}


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}..{max(values):.3f}]"
