"""Peak memory of training steps, ours beside upstream's own, with each recomputation: counted by PyTorch's allocator.

    python -m tests.gpu.memory [--device cpu] [--tiny] [--recompute none selective full]

One stage of a 7B-like model on one device, one process a run. Upstream's local attention holds the scores of a whole
sequence where nothing is recomputed; ours never does. On a CPU the figures are of the whole process.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from tests.gpu.arms import RECOMPUTE, Bench, OutOfMemory, RunResult
from tests.gpu.figures import Report
from tests.pool import RankFailure

SPLITS = (1, 2, 4, 8)
SIZES = (
    "--num-layers 4 --hidden-size 4096 --num-attention-heads 32 --num-query-groups 8 --ffn-hidden-size 11008 "
    "--seq-length 4096 --max-position-embeddings 4096 --vocab-size 32000 --global-batch-size 2 --bf16"
)
TINY = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 128 "
    "--seq-length 128 --max-position-embeddings 128 --vocab-size 256 --global-batch-size 2 --bf16"
)
STEPS = "--train-iters 3 --lr 1e-4"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train each configuration and print its peak."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.memory", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--recompute", nargs="+", choices=list(RECOMPUTE), default=list(RECOMPUTE))
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    bench, report = Bench(), Report()
    for recompute in options.recompute:
        base = [TINY if options.tiny else SIZES, STEPS, RECOMPUTE[recompute]]
        theirs = _train(report, f"{recompute}, upstream", bench, "U", base, None)
        for splits in SPLITS:
            flags = [*base, f"--seq1f1b-splits {splits}"]
            _train(report, f"{recompute}, K {splits}", bench, "O", flags, theirs)
    return report.status()


def _train(
    report: Report, name: str, bench: Bench, arm: str, flags: Sequence[str], theirs: RunResult | None
) -> RunResult | None:
    """Train and print the result; return None if it did not fit."""
    try:
        found = bench.train(arm, *flags)  # type: ignore[arg-type]
    except OutOfMemory:
        report.tell(name, did_not_fit=True)
        return None
    except RankFailure as error:
        report.tell(name, error=str(error)[-600:], right=False)
        return None
    figures = {"peak_mib": round(found.peak_bytes / 2**20, 1), "held_mib": round(found.floor_bytes / 2**20, 1)}
    ratio = {} if theirs is None else {"over_upstream": round(found.peak_bytes / theirs.peak_bytes, 4)}
    report.tell(name, **figures, **ratio, fastest_step=round(min(found.seconds), 4), loss=found.losses[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
