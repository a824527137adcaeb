"""Every sharding strategy equals upstream's own run on one rank step for step, through `pretrain`.

The reference is arm U on one rank: the wheel with the cpu and local patches alone.
"""

from collections.abc import Callable

import pytest

from tests.distributed.equality import Start, assert_equal
from tests.distributed.flags import FULL, MOE, PP2, SELECTIVE, TP2, VPP, flags
from tests.pool import RankPool
from tests.regression.arm import Run, run_arm

ASYNC = "--overlap-grad-reduce --overlap-param-gather"
RUNNING = ["NNN", "NNI", "NNG", "NII", "NIG", "III", "IIG", "IGG", "NGG", "GGG"]

CASES = {
    **{name: (4, "", f"--paro {name}") for name in RUNNING},
    **{f"{name}, overlap": (4, "", f"--paro {name} {ASYNC}") for name in RUNNING},
    **{f"{name}, flat": (4, "", f"--paro {name} --paro-collectives flat") for name in ("NNN", "NNG", "NGG", "GGG")},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_upstream_in_float64(
    ranks: RankPool, start: Start, upstream: Callable[..., Run], case: str, tell: Callable[[str], None]
) -> None:
    world, model, own = CASES[case]
    own += " --ddp-bucket-size 20000"
    own = own if "flat" in own and "I" not in own.split()[1] else f"{own} --paro-group-size 2"
    run = run_arm(ranks, "O", world, start(model) + flags(own), float64=True, snapshots=(1, 4))
    assert_equal(run, upstream(model), f"sharding, {case}", tell)
