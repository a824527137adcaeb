"""Segments on a GPU: the same losses as whole sequences, in float32 and in half precision."""

from collections.abc import Callable

import pytest
import torch

from tests.distributed.flags import TINY, flags
from tests.pool import RankPool
from tests.regression.arm import Run, run_arm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Without TransformerEngine and apex; the cpu system, which sets the same on a CPU, stays out here.
GPU = "--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion"
GPU += " --no-persist-layer-norm --no-bias-swiglu-fusion --no-bias-dropout-fusion --seq-length 256"
GPU += " --max-position-embeddings 256"


def worst(run: Run, reference: Run) -> float:
    """Return the largest relative difference of the losses."""
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(run.curve, reference.curve, strict=True))


@pytest.mark.parametrize(("arithmetic", "bound"), [("", 1e-4), ("--bf16", 2**-7)])
@pytest.mark.parametrize("own", ["--seq1f1b-splits 4", "--seq1f1b-splits 4 --zero-bubble", "--seq1f1b-slack 1"])
def test_one_stage_has_upstreams_losses(
    ranks: RankPool, arithmetic: str, bound: float, own: str, tell: Callable[[str], None]
) -> None:
    base = flags(TINY, GPU, arithmetic)
    theirs = run_arm(ranks, "U", 1, base, timeout=300)
    ours = run_arm(ranks, "O", 1, base + flags(own), timeout=300)
    assert theirs.header["device"] == ours.header["device"] == "cuda"
    apart = worst(ours, theirs)
    tell(f"{torch.cuda.get_device_name()}, {arithmetic or 'float32'}: {own} differs by {apart:.1e} from upstream")
    assert apart <= bound
    assert theirs.curve[-1]["loss"] < theirs.curve[0]["loss"] - 0.1


def test_a_vote_is_read_without_waiting_for_later_segments() -> None:
    from megatron.longseq.pipeline.runtime.forward_step import _read_later

    for value in (0, 1):
        read = _read_later(torch.full((1,), value, dtype=torch.int32, device="cuda"))
        torch.cuda._sleep(2_000_000_000)  # cycles: about a second
        end = torch.cuda.Event()
        end.record()
        assert read() is bool(value)
        assert not end.query()
        torch.cuda.synchronize()


def test_full_recompute_changes_nothing(ranks: RankPool) -> None:
    base = flags(TINY, GPU, "--bf16 --seq1f1b-splits 4")
    full = flags("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    plain, again = (run_arm(ranks, "O", 1, base + more, timeout=300) for more in ([], full))
    assert worst(again, plain) <= 1e-3


def test_a_measured_timeline_of_the_device(ranks: RankPool, tmp_path) -> None:
    from megatron.longseq.pipeline.tools.chrome_trace import read_measured

    trace = ["--pipeline-trace", str(tmp_path), *flags("--seq1f1b-splits 4 --pipeline-trace-step 2 --bf16")]
    run = run_arm(ranks, "O", 1, [*flags(TINY, GPU), *trace], timeout=300)
    measured = read_measured(tmp_path)
    assert len(measured.spans[0]) == 2 * 8 * 4
    assert all(span.end > span.start for span in measured.spans[0])
    assert 0 < measured.makespan < run.seconds
