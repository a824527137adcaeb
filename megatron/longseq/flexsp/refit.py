"""Fit a cost model to measured groups.

Each part of the model's time (attention, linear layers, start-up, messages of all-to-alls and of rings) gets a factor.
Factors solve a least-squares problem of relative errors, none of them negative, with a weak pull towards 1: a part
that no sample tells about stays as it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls  # type: ignore[import-untyped]

from megatron.longseq.flexsp.plan.cost import GroupCostModel
from megatron.longseq.flexsp.plan.plan import Kind

PULL = 1e-2  # weight of a factor's distance from 1 beside a relative error
LEAST = 1e-4  # a factor of 0 would make a part free


class GroupSample(NamedTuple):
    """A measured group.

    Attributes:
        kind: how it computed attention.
        lengths: tokens of its documents.
        seconds: time of its micro-batch, on its slowest rank.
    """

    kind: Kind
    lengths: tuple[int, ...]
    seconds: float


def relative_error(cost: GroupCostModel, samples: Sequence[GroupSample]) -> float:
    """Return the mean relative error of predicted times; 0 without samples.

    Args:
        cost: cost model.
        samples: measured groups.
    """
    errors = [abs(cost.seconds(one.kind, one.lengths) - one.seconds) / one.seconds for one in samples]
    return sum(errors) / len(errors) if errors else 0.0


def refit(cost: GroupCostModel, samples: Sequence[GroupSample]) -> GroupCostModel:
    """Return the model with its seconds and speeds fitted to samples.

    Args:
        cost: model to start from; its memory limit, heads and shape stay.
        samples: measured groups.
    """
    if not samples:
        return cost
    rows = np.array([time_parts(cost, one) for one in samples]) / np.array([[one.seconds] for one in samples])
    pull = PULL * np.sqrt(len(samples)) * np.eye(rows.shape[1])
    factors: NDArray[np.float64] = nnls(
        np.vstack([rows, pull]), np.concatenate([np.ones(len(rows)), pull.sum(axis=1)])
    )[0]
    square, linear, fixed, exchange, ring = (max(LEAST, float(factor)) for factor in factors)
    links = replace(
        cost.links,
        all_to_all=tuple((size, speed / exchange) for size, speed in cost.links.all_to_all),
        all_to_all_latency=cost.links.all_to_all_latency * exchange,
        ring_inside=cost.links.ring_inside / ring,
        ring_between=cost.links.ring_between / ring,
        ring_latency=cost.links.ring_latency * ring,
    )
    return replace(
        cost,
        name="fit",
        square=cost.square * square,
        linear=cost.linear * linear,
        fixed=cost.fixed * fixed,
        links=links,
    )


def time_parts(cost: GroupCostModel, sample: GroupSample) -> list[float]:
    """Return the model's seconds of attention, linear layers, start-up, all-to-alls and rings of a group.

    The messages of a group with both are shared out by the times that each would take alone.

    Args:
        cost: cost model.
        sample: the group; its measured time is not read.
    """
    kind, degree = sample.kind, sample.kind.degree
    tokens = [cost.tokens(degree, length) for length in sample.lengths]
    attention = cost.square / degree * sum(one * one for one in tokens)
    linear = cost.linear / degree * sum(tokens)
    messages = max(0.0, cost.seconds(kind, sample.lengths) - attention - linear - cost.fixed)
    if kind.ring == 1 or kind.ulysses == 1:
        share = float(kind.ring == 1)
    else:
        exchanges = cost.of_kind(Kind(kind.ulysses, 1)).token * kind.ulysses - cost.linear
        share = min(1.0, max(0.0, exchanges / degree * sum(tokens) / messages)) if messages else 0.0
    return [attention, linear, cost.fixed, share * messages, (1 - share) * messages]
