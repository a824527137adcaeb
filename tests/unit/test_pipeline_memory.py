"""The formula of bytes kept for backward equals calculations by hand and the bytes counted in real steps."""

from collections.abc import Callable

import pytest

from megatron.longseq.pipeline.plan.generators import make
from megatron.longseq.pipeline.plan.memory import (
    Recompute,
    chunk_bytes,
    head_bytes,
    layer_elements,
    peak_bytes,
    stage_bytes,
)
from megatron.longseq.pipeline.plan.schedule import Pipeline
from megatron.longseq.pipeline.plan.segment_cost import ModelShape
from tests.benchmarks.alternate import Contestant, Job, run_on_this_rank
from tests.benchmarks.pipeline import MODEL, UPSTREAM
from tests.pool import RankPool

LAYERS, TOKENS, WIDTH, VOCABULARY = 8, 512, 64, 512
SIZES = (
    f"--num-layers {LAYERS} --hidden-size {WIDTH} --num-attention-heads 4 --kv-channels 16 --ffn-hidden-size 128 "
    f"--seq-length {TOKENS} --max-position-embeddings {TOKENS} --pipeline-model-parallel-size 2 --global-batch-size 8"
)
UNIFORM = "--recompute-granularity full --recompute-method uniform --recompute-num-layers"
RECOMPUTE = {
    "none": ("", Recompute()),
    "selective": ("--recompute-granularity selective --recompute-modules core_attn", Recompute("selective")),
    "full": (f"{UNIFORM} 1", Recompute("full")),
    "full, pairs": (f"{UNIFORM} 2", Recompute("full", "uniform", 2)),
    "block": (
        "--recompute-granularity full --recompute-method block --recompute-num-layers 3",
        Recompute("full", "block", 3),
    ),
}
QUICK = {("full", 4, 1)}
CASES = [
    *[(name, groups, 1) for name in RECOMPUTE for groups in (1, 4)],
    *[(name, 4, 2) for name in ("none", "full")],
]


@pytest.mark.parametrize(
    ("recompute", "groups", "virtual"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_counted_bytes_are_the_formulas(
    ranks: RankPool, recompute: str, groups: int, virtual: int, tell: Callable[[str], None]
) -> None:
    """Ratios to upstream are compared per stage for K 2 and 4, because norms differ by implementation."""
    own, chosen = RECOMPUTE[recompute]
    turns = tuple(Contestant(segments, 4) for segments in (UPSTREAM, 2, 4))
    stages = f"--num-layers-per-virtual-pipeline-stage {LAYERS // 2 // virtual}" if virtual > 1 else ""
    line = f"{MODEL} {SIZES} --num-query-groups {groups} {own} {stages} --train-iters {len(turns)}"
    counted = ranks.run(2, run_on_this_rank, Job(tuple(line.split()), turns, count_bytes=True))
    shape = ModelShape(
        LAYERS,
        WIDTH,
        4,
        TOKENS,
        padded_vocab_size=VOCABULARY,
        ffn_hidden_size=128,
        num_query_groups=groups,
        kv_channels=16,
        swiglu=True,
    )

    def formula(segments: int, lengths: tuple[int, ...]) -> list[float]:
        stage = stage_bytes(shape, LAYERS // 2 // virtual, chosen, in_segments=segments > 1, element=4)
        schedule = make(Pipeline(2, 4, segments, virtual))
        return peak_bytes(schedule, lengths, [stage] * (2 * virtual), head_bytes(shape, 4))

    upstream = formula(1, (TOKENS,))
    for index, segments in ((1, 2), (2, 4)):
        ours = formula(segments, counted[0][index].lengths)
        for rank, steps in enumerate(counted):
            found, expected = steps[index].peak_bytes / steps[0].peak_bytes, ours[rank] / upstream[rank]
            tell(
                f"bytes kept over upstream's, {recompute}, {groups} key heads of 4, V {virtual}, K {segments}, stage "
                f"{rank}: counted {found:.3f}, formula {expected:.3f}"
            )
            assert found == pytest.approx(expected, rel=0.05)
            assert steps[index].peak_bytes == pytest.approx(ours[rank], rel=0.1)


def test_by_hand() -> None:
    """Every term is computed by hand for two stages, segments and micro-batches with full recomputation."""
    shape = ModelShape(2, 8, 2, 10, num_query_groups=2, ffn_hidden_size=16)
    assert layer_elements(shape) == 4 * 8 + 2 * 8 + 2 * 16
    stage = stage_bytes(shape, 1, Recompute("full"), in_segments=True)
    assert (stage.activations, stage.kv_cache, stage.kv_grads, stage.recomputing) == (16, 32, 64, 160)
    last = peak_bytes(make(Pipeline(2, 2, 2)), (6, 4), [stage] * 2)[1]
    # When the backward of segment 0 begins: its inputs, keys and values, the gradients that segment 1 has left, what is
    # computed again, and inputs, keys and values of the second micro-batch's segment 0.
    assert last == 6 * (16 + 32) + 6 * 64 + 6 * 160 + 6 * (16 + 32)
    whole = stage_bytes(shape, 1, Recompute("full"), in_segments=False)
    assert (whole.activations, whole.kv_cache, whole.kv_grads) == (16, 0, 0)


def test_a_loss_in_chunks_by_hand() -> None:
    """Chunks keep numbers instead of a softmax, and need the logits of one chunk while the loss runs."""
    shape = ModelShape(2, 8, 2, 10, padded_vocab_size=100, num_query_groups=2, ffn_hidden_size=16)
    stage = stage_bytes(shape, 1, Recompute("full"), in_segments=False)
    one = make(Pipeline(2, 1))
    whole, chunked = head_bytes(shape), head_bytes(shape, chunked=True)
    assert (whole, chunked) == (2 * 8 * 2 + 4 * 100, 2 * 8 * 2 + 17)
    assert chunk_bytes(shape, 3) == 3 * 100 * (2 + 4) and chunk_bytes(shape, 3, 4) == 3 * 100 * 4
    # The loss of all tokens, then the recomputation of a layer without it.
    assert peak_bytes(one, (10,), [stage] * 2, chunked, 5000.0)[1] == 10 * (16 + chunked) + 5000
    assert peak_bytes(one, (10,), [stage] * 2, whole)[1] == 10 * (16 + whole)
    assert peak_bytes(one, (10,), [stage] * 2, whole)[0] == peak_bytes(one, (10,), [stage] * 2, chunked, 1e9)[0]


def test_other_recomputations_are_refused() -> None:
    for wrong in (("some",), ("full", "random"), ("full", "block", 0)):
        with pytest.raises(ValueError, match="must be selective or full"):
            Recompute(*wrong)
