"""Attention over context-parallel ranks equals upstream's own run on one rank step for step, through `pretrain`.

The reference is arm U at C = 1: the wheel with the cpu and local patches alone.
"""

import pytest

from tests.distributed.flags import flags
from tests.distributed.test_seq1f1b import (
    Start,
    assert_equal,
    start,
    upstream,
)
from tests.pool import RankPool
from tests.regression.arm import run_arm

__all__ = ["start", "upstream"]  # fixtures

CP2, CP4 = "--context-parallel-size 2", "--context-parallel-size 4"
HYBRID = f"{CP4} --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2"
MHA, MQA = "--num-query-groups 4", "--num-query-groups 1"

CASES = {
    "1 x 2": (2, "", CP2),
    "2 x 1": (2, "", f"{CP2} --cp-comm-type a2a"),
    "1 x 4": (4, "", CP4),
    "4 x 1": (4, "", f"{CP4} --cp-comm-type a2a"),
    "2 x 2": (4, "", HYBRID),
}
SLOW: set[str] = set()


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_equals_upstream_in_float64(ranks: RankPool, start: Start, upstream, case: str, tell) -> None:
    world, model, own = CASES[case]
    run = run_arm(ranks, "O", world, start(model) + flags(own), float64=True, snapshots=(1, 4))
    assert_equal(run, upstream(model), case, tell)
