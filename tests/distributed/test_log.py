"""The log line of a real run."""

import re
import resource
from pathlib import Path

from tests.distributed.flags import TINY, flags
from tests.pool import RankPool
from tests.regression.arm import run_arm


def _printed(pool: RankPool) -> str:
    return "\n".join(path.read_text() for path in sorted(Path(pool.logs).glob(f"job{pool.jobs:03d}-rank*.log")))


def test_log_line_tells_tokens_flops_and_memory(ranks: RankPool) -> None:
    run_arm(
        ranks, "O", 2, flags(TINY, "--pipeline-model-parallel-size 2 --log-throughput --log-interval 2 --train-iters 4")
    )
    found = re.findall(
        r"iteration +(\d+) \| tokens/s: ([\d.]+) \| tokens/s/rank: ([\d.]+) \| model TFLOP/s/rank: ([\d.e-]+) "
        r"\| peak memory \(MiB\): ([\d.]+)",
        _printed(ranks),
    )
    assert [int(row[0]) for row in found] == [2, 4]
    elapsed = [float(ms) for ms in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", _printed(ranks))[-2:]]
    for (_, per_second, per_rank, tflops, peak), milliseconds in zip(found, elapsed, strict=True):
        tokens_per_step = float(per_second) * milliseconds / 1e3
        # Global batch 8, sequence 64. Upstream reads the same clock later than we do: by how much, is the machine's.
        # Another number of steps or ranks would make it half or twice as many.
        assert 8 * 64 * (1 - 1e-3) <= tokens_per_step < 2 * 8 * 64
        assert abs(float(per_second) / float(per_rank) - 2) < 0.01
        assert float(tflops) > 0
        # About what this process has, which holds the same libraries; another unit would be a factor of 1024.
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        assert own / 32 < float(peak) < own * 32


def test_without_the_flag_upstreams_log_is_untouched(ranks: RankPool) -> None:
    run_arm(ranks, "O", 1, flags(TINY, "--log-interval 1 --train-iters 1"))
    assert "tokens/s" not in _printed(ranks)
    assert "log.throughput" not in _printed(ranks)
