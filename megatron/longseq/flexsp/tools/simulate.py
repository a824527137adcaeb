"""Simulated steps of the paper's configurations: FlexSP beside named baselines, under the paper's cost model.

Lengths are drawn from log-normal distributions fitted to what the paper says about its corpora: Wikipedia from the
authors' table of lengths, the others from the numbers of sequences on each degree in its figures. They are rounded up
to 128 tokens, and those above the context are dropped, as in the paper's runs. Nothing outside the micro-batches
(optimizer, data) is counted.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron.longseq.command_line import markdown_table
from megatron.longseq.flexsp.plan.baselines import sorted_homogeneous, static, total
from megatron.longseq.flexsp.plan.paper import PAPER_MODELS, RANKS, Context, paper_cost
from megatron.longseq.flexsp.plan.planner import automatic_degrees, contiguous_plans, search
from megatron.longseq.flexsp.plan.problem import StepProblem
from megatron.longseq.flexsp.tools import rivals

CORPORA = {"github": (7.05, 1.75), "commoncrawl": (7.00, 1.70), "wikipedia": (5.85, 1.464)}
CONTEXTS: dict[Context, int] = {"192k": 192_000, "384k": 384_000}
POWERS = (1, 2, 4, 8, 16, 32, 64)
BATCH, PADDED, SHORTEST = 512, 128, 16
# Speed-up over DeepSpeed-Ulysses with one degree, read off the paper's figure 4: GitHub, CommonCrawl, Wikipedia.
PUBLISHED = {
    ("7b", "192k"): (1.45, 1.50, 1.72),
    ("7b", "384k"): (1.26, 1.42, 1.46),
    ("13b", "192k"): (1.40, 1.35, 1.59),
    ("13b", "384k"): (1.29, 1.37, 1.43),
    ("30b", "192k"): (1.44, 1.54, 1.64),
    ("30b", "384k"): (1.22, 1.33, 1.53),
}


def draw_lengths(corpus: str, count: int, seed: int, context: int = 192_000) -> list[int]:
    """Return lengths of a step.

    Args:
        corpus: one of `CORPORA`.
        count: number of sequences.
        seed: of the generator.
        context: most tokens of a sequence.
    """
    mean, deviation = CORPORA[corpus]
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    while len(lengths) < count:
        drawn = np.maximum(np.exp(generator.normal(mean, deviation, count)).astype(int), SHORTEST)
        rounded = -(-drawn // PADDED) * PADDED
        lengths += [int(length) for length in rounded[rounded <= context - PADDED]]
    return lengths[:count]


@dataclass(frozen=True, slots=True)
class Simulated:
    """Mean seconds per step of a configuration.

    Attributes:
        static: one degree for all steps, the best of those that hold the context.
        adaptive: the best degree of every step.
        upstream, development: Megatron-Core's scheduler and the rule of its development branch.
        balanced: one degree, documents balanced over groups (as WLB-LLM), the best degree that holds the context.
        balanced_mesh: documents balanced over a static division of the ranks into groups of up to two degrees, the best
            of those with a degree that holds the context.
        sorted_static: sorted micro-batches with the static degree.
        homogeneous: sorted micro-batches, the best degree for each.
        groups: groups of several degrees in a micro-batch, Ulysses, powers of two: the paper's planner.
        filled: the same with hole filling.
        ours: all kinds and all degrees.
    """

    static: float
    adaptive: float
    upstream: float
    development: float
    balanced: float
    balanced_mesh: float
    sorted_static: float
    homogeneous: float
    groups: float
    filled: float
    ours: float

    @property
    def best_balanced(self) -> float:
        """Seconds of the faster balanced split."""
        return min(self.balanced, self.balanced_mesh)


@functools.cache
def simulate(model: str, context: Context, corpus: str, batches: int) -> Simulated:
    """Return the mean seconds of `batches` steps of 512 sequences on 64 GPUs.

    Args:
        model: name of the paper's model, such as "7b".
        context: longest sequence, such as "192k".
        corpus: name of the distribution of lengths, such as "commoncrawl".
        batches: number of steps.
    """
    cost, limit = paper_cost(model, context), CONTEXTS[context]
    steps = [draw_lengths(corpus, BATCH, 1000 + number, limit) for number in range(batches)]
    problems = [StepProblem(lengths, RANKS, cost, POWERS, ("ulysses",)) for lengths in steps]
    wide = [StepProblem(lengths, RANKS, cost, automatic_degrees(RANKS)) for lengths in steps]
    degrees = rivals.holding_degrees(problems[0], limit - PADDED)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    fixed = {degree: mean([rivals.static_seconds(one, degree) for one in problems]) for degree in degrees}
    degree = min(fixed, key=lambda one: fixed[one])
    contiguous = [contiguous_plans(one) for one in problems]
    filled = [total(search(one, known=plans)) for one, plans in zip(problems, contiguous, strict=True)]
    return Simulated(
        static=fixed[degree],
        adaptive=mean([total(static(one) or []) for one in problems]),
        upstream=mean([rivals.upstream_seconds(one) for one in problems]),
        development=mean([rivals.development_seconds(one) for one in problems]),
        balanced=min(mean([rivals.balanced_seconds(one, each) for one in problems]) for each in degrees),
        balanced_mesh=min(
            mean([rivals.balanced_mesh_seconds(one, mesh) for one in problems])
            for mesh in rivals.meshes(problems[0], limit - PADDED)
        ),
        sorted_static=mean([rivals.sorted_static_seconds(one, degree) for one in problems]),
        homogeneous=mean([total(sorted_homogeneous(one) or []) for one in problems]),
        groups=mean([min(map(total, plans)) for plans in contiguous]),
        filled=mean(filled),
        # A plan of Ulysses alone is a plan of all kinds, too.
        ours=mean([min(total(search(one)), narrow) for one, narrow in zip(wide, filled, strict=True)]),
    )


def key(model: str, context: Context, corpus: str) -> str:
    """Return the name of a configuration, such as 7b-192k-commoncrawl."""
    return f"{model}-{context}-{corpus}"


def configurations() -> list[tuple[str, Context, str]]:
    """Return model, context and corpus of every row."""
    return [(model, context, corpus) for model in PAPER_MODELS for context in CONTEXTS for corpus in CORPORA]


def markdown(batches: int, rows: Sequence[tuple[str, Context, str]] | None = None) -> str:
    """Return the tables: seconds and speed-ups of every configuration, and the sources of the gain.

    Args:
        batches: steps of every configuration.
        rows: model, context and corpus of every row; None: all.
    """
    speeds, sources = [], []
    for model, context, corpus in configurations() if rows is None else rows:
        one = simulate(model, context, corpus, batches)
        published = PUBLISHED[model, context][list(CORPORA).index(corpus)]
        name = f"{model.upper()} {context} {corpus}"
        speeds.append(
            [
                name,
                *(f"{seconds:.2f}" for seconds in (one.static, one.adaptive, one.homogeneous, one.upstream)),
                *(f"{seconds:.2f}" for seconds in (one.development, one.balanced, one.balanced_mesh)),
                *(f"{seconds:.2f}" for seconds in (one.filled, one.ours)),
                f"{published:.2f}",
                f"{one.static / one.filled:.2f}",
                *(f"{other / one.ours:.2f}" for other in (one.static, one.development, one.best_balanced)),
            ]
        )
        stages = [one.static, one.sorted_static, one.homogeneous, one.groups, one.filled, one.ours]
        gains = [before - after for before, after in pairwise(stages)]
        whole = one.static - one.ours
        sources.append([name, *(f"{gain / whole:.0%}" if whole else "none" for gain in gains)])
    head = ["64 A100, s per step", "static", "batch-adaptive", "sorted", "upstream", "dev rule", "balanced"]
    head += ["balanced, 2 degrees", "FlexSP", "all kinds", "published / static", "FlexSP / static"]
    head += ["all kinds / static", "/ dev rule", "/ balanced"]
    shares = ["share of the gain", "sorting and blaster", "degree per micro-batch", "several degrees", "hole filling"]
    shares += ["kinds and degrees of 3"]
    return "\n\n".join(
        markdown_table(names, rows, "|---|" + "--:|" * (len(names) - 1))
        for names, rows in ((head, speeds), (shares, sources))
    )
