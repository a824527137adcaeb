"""Seq1F1B works with evaluation, checkpoints, dropout, half precision, measured timelines and collected logits.

The reference is upstream's own run (arm U) on the same stages, which starts from the same weights.
"""

import functools
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy
import pytest

from megatron.longseq.pipeline.plan.schedule import ActionKind, Pipeline
from megatron.longseq.pipeline.tools.chrome_trace import read_measured
from megatron.longseq.pipeline.tools.compare import replay
from tests.distributed.equality import RELATIVE, assert_steps_equal
from tests.distributed.flags import TINY, flags
from tests.distributed.probes import run_probed
from tests.pool import RankPool
from tests.regression.arm import Run, run_arm
from tests.regression.tensors import logical_tensors

PP2 = "--pipeline-model-parallel-size 2"
VPP = "--num-layers-per-virtual-pipeline-stage 1"
K3 = "--seq1f1b-splits 3"
PROBES = "tests.distributed.probes"


@pytest.fixture(scope="module")
def losses(ranks: RankPool) -> Callable[[str], list[float]]:
    """Return a function that gives upstream's validation losses: before, after each of 2 steps, twice at the end."""

    @functools.cache
    def run(layout: str) -> list[float]:
        return validation(ranks, "U", layout)

    return run


def validation(ranks: RankPool, arm: str, layout: str, own: str = "") -> list[float]:
    base = flags(TINY, "--eval-iters 2 --eval-interval 1 --train-iters 2", PP2, layout, own)
    first, last = run_probed(ranks, arm, 2, base, f"{PROBES}:evaluations")  # type: ignore[arg-type]
    assert not any(first)
    return [note["lm loss"] for note in last]


@pytest.mark.slow  # test_evaluation_sizes.py has one layout by default
@pytest.mark.parametrize(
    ("layout", "own"),
    [(VPP, K3), ("", K3), ("", f"{K3} --zero-bubble")],
)
def test_validation_losses_are_upstreams(
    ranks: RankPool, losses: Callable[[str], list[float]], layout: str, own: str
) -> None:
    ours, theirs = validation(ranks, "O", layout, own), losses(layout)
    assert len(ours) == len(theirs) == 5
    assert max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)) < RELATIVE
    assert theirs[2] < theirs[0] - 0.1


def test_evaluations_leave_memory_as_it_is(ranks: RankPool) -> None:
    """The KV cache holds one micro-batch at a time, five times in a row. Training's buffers are not needed."""
    base = flags(TINY, PP2, K3, "--eval-iters 5 --eval-interval 2 --train-iters 2 --global-batch-size 4")
    for notes in run_probed(ranks, "O", 2, base, f"{PROBES}:store_bytes"):
        trained = [totals for evaluates, totals in notes if not evaluates]
        evaluated = [totals for evaluates, totals in notes if evaluates]
        assert len(trained) == 2 and len(evaluated) == 15  # after step 2, and of validation and test at the end
        assert all(cached == 0 for cached, *_ in trained + evaluated)
        assert len(set(evaluated)) == 1 and evaluated[0] == trained[1]


@pytest.mark.parametrize("layout", ["", pytest.param(VPP, marks=pytest.mark.slow)])
def test_a_batch_is_read_and_cut_once_per_micro_batch(ranks: RankPool, layout: str) -> None:
    """A batch is read once, not per segment. Each of its 3 segments is sharded once for a context-parallel rank."""
    base = flags(TINY, PP2, K3, layout, "--context-parallel-size 2 --train-iters 2 --global-batch-size 4")
    virtual = 2 if layout else 1
    for rank, (counts,) in enumerate(run_probed(ranks, "O", 4, base, f"{PROBES}:batches")):
        assert counts == {"read": 2 * 4 * virtual, "cut": 2 * 4 * 3}, f"rank {rank}"


def test_checkpoints_go_both_ways(ranks: RankPool, tmp_path: Path) -> None:
    base = flags(TINY, PP2, "--save-interval 2 --global-batch-size 4")
    theirs = run_arm(ranks, "U", 2, base, tmp_path / "U", float64=True)
    ours = run_arm(ranks, "O", 2, [*base, *flags(K3)], tmp_path / "O", float64=True)
    from_theirs, from_ours = (["--load", str(tmp_path / arm), "--ckpt-step", "2"] for arm in "UO")
    resumed = run_arm(ranks, "O", 2, [*base, *flags(K3), *from_theirs], float64=True)
    returned = run_arm(ranks, "U", 2, [*base, *from_ours], float64=True)
    for run in (resumed, returned):
        assert_steps_equal(run.curve, theirs.curve[2:])
    one, other = (logical_tensors(run.checkpoint(2)) for run in (theirs, ours))
    assert (
        one.keys() == other.keys() and len(one) == 27
    )  # 9 weights, stacked over layers, and Adam's two moments of each
    assert all(one[name].shape == other[name].shape and one[name].dtype == other[name].dtype for name in one)
    norms = {name: float(tensor.double().norm()) for name, tensor in one.items()}
    assert max(float((one[n] - other[n]).double().norm()) / norms[n] for n in one if norms[n]) < 10 * RELATIVE


@pytest.mark.slow
def test_dropout_differs_no_more_than_other_masks_do(ranks: RankPool, tell: Callable[[str], None]) -> None:
    """Dropout masks of segments differ from those of whole sequences, as those of two stages differ from one."""
    base = flags(TINY, "--hidden-dropout 0.1 --attention-dropout 0.1 --train-iters 8")
    one = run_arm(ranks, "U", 1, base, float64=True)
    two = run_arm(ranks, "U", 2, base + flags(PP2), float64=True)
    ours = run_arm(ranks, "O", 2, base + flags(PP2, K3), float64=True)
    log = (ranks.logs / f"job{ranks.jobs:03d}-rank0.log").read_text()
    noise, apart = gap(one, two), gap(ours, two)
    tell(f"dropout 0.1: loss of segments is {apart:.3f} off upstream's, upstream's own masks make {noise:.3f}")
    assert 0 < apart < 3 * noise
    assert ours.curve[-1]["loss"] < ours.curve[0]["loss"] - 0.5
    assert "WARNING:megatron.longseq.attention.kernels.select:segments: attention kernel reference (" in log


def gap(one: Run, other: Run) -> float:
    """Return the root mean square difference of the losses."""
    apart = [a["loss"] - b["loss"] for a, b in zip(one.curve, other.curve, strict=True)]
    return float(numpy.sqrt(numpy.mean(numpy.square(apart))))


@pytest.mark.slow  # as seq1f1b-bf16.toml, on one seed
def test_half_precision_stays_near_upstreams(ranks: RankPool, tmp_path: Path, tell: Callable[[str], None]) -> None:
    base = flags(TINY, PP2, "--bf16")
    start = flags(f"--load {tmp_path} --finetune --no-load-optim --no-load-rng")
    run_arm(ranks, "U", 2, base + flags("--train-iters 1 --lr 0 --min-lr 0 --weight-decay 0"), tmp_path)
    theirs = run_arm(ranks, "U", 2, base + start)
    ours = run_arm(ranks, "O", 2, base + flags(K3) + start)
    exact = run_arm(ranks, "U", 2, [*(flag for flag in base if flag != "--bf16"), *start], float64=True)
    apart, error = (
        max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(run.curve, theirs.curve, strict=True))
        for run in (ours, exact)
    )
    tell(f"bf16: losses of 3 segments are {apart:.1e} off upstream's, and those {error:.1e} off float64's, relatively")
    assert 0 < apart <= 3 * error  # as in test_layouts
    assert theirs.curve[-1]["loss"] < theirs.curve[0]["loss"] - 0.1


@pytest.mark.parametrize(
    ("own", "pipeline"),
    [
        pytest.param(K3, Pipeline(2, 8, 3), marks=pytest.mark.slow),
        (f"{VPP} --seq1f1b-splits 2", Pipeline(2, 8, 2, 2)),
        ("--seq1f1b-splits 2 --zero-bubble", Pipeline(2, 8, 2)),
        pytest.param("", Pipeline(2, 8), marks=pytest.mark.slow),
    ],
)
def test_every_rank_writes_its_measured_timeline(ranks: RankPool, tmp_path: Path, own: str, pipeline: Pipeline) -> None:
    trace = ["--pipeline-trace", str(tmp_path / "trace"), *flags("--pipeline-trace-step 2 --train-iters 3")]
    run = run_arm(ranks, "O", 2, [*flags(TINY, PP2, own), *trace], float64=True)
    assert sorted(file.name for file in (tmp_path / "trace").iterdir()) == ["rank-0000.json", "rank-0001.json"]
    measured = read_measured(tmp_path / "trace")
    assert measured.pipeline == pipeline and measured.name.endswith(", measured")
    assert 0 < measured.makespan < run.seconds and 0 <= measured.bubble < 1
    kinds = 3 if "zero" in own else 2
    ends: dict[tuple[ActionKind, int, int, int], float] = {}
    for rank, spans in enumerate(measured.spans):
        assert len(spans) == kinds * pipeline.units * pipeline.virtual
        assert all(before.end <= after.start for before, after in pairwise(spans))
        for span in spans:
            action = span.action
            ends[action.kind, action.microbatch, action.segment, pipeline.stage(rank, action.vstage)] = span.end
    for (kind, microbatch, segment, stage), end in ends.items():
        if kind is not ActionKind.FORWARD:
            assert end > ends[ActionKind.FORWARD, microbatch, segment, stage]
        if kind is ActionKind.BACKWARD and stage < pipeline.depth - 1:  # the ranks' clocks agree
            assert end > ends[kind, microbatch, segment, stage + 1]
        if kind is ActionKind.FORWARD and stage > 0:
            assert end > ends[kind, microbatch, segment, stage - 1]
    order = [[span.action for span in spans] for spans in measured.spans]
    assert [[span.action for span in spans] for spans in replay(measured).spans] == order


@pytest.mark.parametrize(
    ("layout", "own"),
    [
        (VPP, "--seq1f1b-splits 2 --seq1f1b-partition 41,23"),
        pytest.param("", K3, marks=pytest.mark.slow),
    ],
)
def test_whole_logits_are_collected(ranks: RankPool, layout: str, own: str) -> None:
    base = flags(TINY, PP2, layout, "--train-iters 1")
    theirs, ours = (
        run_probed(ranks, arm, 2, base + flags(more), f"{PROBES}:collected_logits")  # type: ignore[arg-type]
        for arm, more in (("U", ""), ("O", own))
    )
    assert theirs[0] == ours[0] == []
    assert len(theirs[1]) == len(ours[1]) == 4
    for mine, yours in zip(ours[1], theirs[1], strict=True):
        assert mine.shape == yours.shape == (1, 64, 256)
        assert numpy.abs(mine - yours).max() < RELATIVE * numpy.abs(yours).max()
