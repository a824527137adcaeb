"""Every layout that upstream offers on CPU equals the single-process run step for step.

In float64 the layouts differ by reassociation alone (1e-9 relative is asked, 1e-13 is seen). In float32 and bf16 the
bound is three times the single-process run's own rounding error, measured in the same session against float64 from the
same weights.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.distributed.equality import Equal, Start, worst
from tests.distributed.flags import TIED, flags
from tests.regression.trainings import Trainings

TP = "--tensor-model-parallel-size 2"
PP = "--pipeline-model-parallel-size 2"
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn mlp"

LAYOUTS = {
    "TP 2": (2, TP),
    "TP 2, sequence parallel": (2, f"{TP} --sequence-parallel"),
    "PP 2": (2, PP),
    "PP 4": (4, "--pipeline-model-parallel-size 4"),
    "PP 2, two virtual stages": (2, f"{PP} --num-layers-per-virtual-pipeline-stage 1"),
    "DP 2": (2, ""),
    "DP 2, overlapped gradients": (2, "--overlap-grad-reduce"),
    "DP 2, distributed optimizer": (2, DISTRIBUTED_OPTIMIZER),
    "DP 2, distributed optimizer, overlap": (2, f"{DISTRIBUTED_OPTIMIZER} {OVERLAP}"),
    "TP 2 x PP 2": (4, f"{TP} {PP}"),
    "TP 2 x PP 2, sequence parallel": (4, f"{TP} {PP} --sequence-parallel"),
    "PP 2 x DP 2": (4, PP),
    "PP 2 x DP 2, distributed optimizer, overlap": (4, f"{PP} {DISTRIBUTED_OPTIMIZER} {OVERLAP}"),
    "full recompute": (1, FULL),
    "full recompute, PP 2": (2, f"{FULL} {PP}"),
    "selective recompute": (1, SELECTIVE),
    "selective recompute, TP 2, sequence parallel": (2, f"{SELECTIVE} {TP} --sequence-parallel"),
}
# By default, regression cases (data-*.toml, pipeline.toml, recompute.toml, tensor-sequence.toml and
# tied-virtual-stages.toml) and test_seq1f1b.py prove the parts of these layouts.
NOISY = ["TP 2, sequence parallel", "PP 2", "DP 2, distributed optimizer, overlap", "TP 2 x PP 2"]
QUICK_NOISY = [("PP 2", "bf16")]  # float32: single-precision.toml


def in_float64() -> Iterator[Any]:
    """Return every layout with untied embeddings, and with tied ones unless it only recomputes."""
    for model in ("", TIED):
        for layout in LAYOUTS:
            name = f"{layout}-{'tied' if model else 'untied'}"
            if not (model and "recompute" in layout):
                yield pytest.param(layout, model, id=name)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "model"), list(in_float64()))
def test_layout_equals_one_process_in_float64(equal: Equal, layout: str, model: str) -> None:
    world, own = LAYOUTS[layout]
    equal(f"{layout} {model}".strip(), world, model, own)


@pytest.mark.parametrize(
    ("layout", "arithmetic"),
    [
        pytest.param(layout, arithmetic, marks=[pytest.mark.slow] * ((layout, arithmetic) not in QUICK_NOISY))
        for layout in NOISY
        for arithmetic in ("float32", "bf16")
    ],
)
def test_layout_stays_within_the_noise(
    trainings: Trainings, start: Start, layout: str, arithmetic: str, tell: Callable[[str], None]
) -> None:
    world, own = LAYOUTS[layout]
    precise, line = start(""), start("--bf16" if arithmetic == "bf16" else "")
    reference = trainings.once("O", 1, line)
    error = worst(trainings.once("O", 1, precise, float64=True).curve, reference.curve, "loss")
    difference = worst(trainings.once("O", world, line + flags(own)).curve, reference.curve, "loss")
    tell(f"{arithmetic:8} {layout}: largest relative difference of loss {difference:.1e}, rounding error {error:.1e}")
    assert error > 0 and difference <= 3 * error
