"""Our attention in TransformerEngine's layers beside TransformerEngine's own: losses and gradient norms.

    python -m tests.gpu.te_layers [--device cpu] [--tiny]

On one device ours runs in segments, and over two context-parallel ranks where two devices are visible or the
communication library lets two ranks share one; there also with linear layers in FP8, from compute capability 8.9 on.
The reference is TransformerEngine's attention on one rank. A run in bf16 may differ from it by three times what it
differs by from its own in float32, and one in FP8 by three times what it differs by from its own in bf16. On a CPU a
stand-in takes TransformerEngine's place (`tests/standin`).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from tests.gpu.arms import Bench, RunResult, train_on_this_rank
from tests.gpu.figures import Report, skip
from tests.gpu.training import SIZES, STEPS, TINY, apart_from, cannot_share, tell
from tests.pool import RankFailure
from tests.regression.arm import Arm
from tests.regression.noise import FACTOR
from tests.standin.runs import HERE, keep_te_layers

LAYERS = "--transformer-impl transformer_engine"
CP2 = "--context-parallel-size 2"
FP8 = "--fp8-format hybrid --fp8-recipe tensorwise"
ONE = {"ours, K 2": "--seq1f1b-splits 2", "ours, K 4": "--seq1f1b-splits 4"}
TWO = {
    "theirs, C 2": CP2,
    "ours, C 2, ring": f"{CP2} --context-parallel-attention longseq",
    "ours, C 2, Ulysses": f"{CP2} --context-parallel-attention longseq --cp-comm-type a2a",
    "ours, C 2, K 2": f"{CP2} --seq1f1b-splits 2",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and compare."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.te_layers", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    options = parser.parse_args(arguments)
    on_cpu = options.device == "cpu"
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        paths = (str(HERE), os.environ.get("PYTHONPATH", ""))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # of the process that ranks are forked from
    elif find_spec("transformer_engine") is None:
        return skip("TransformerEngine is not installed")
    bench, report = Bench(train_with_standin if on_cpu else None), Report()
    base = [TINY if options.tiny else SIZES, STEPS, LAYERS]
    theirs = bench.train("U", *base, "--bf16")
    exact = bench.train("U", *base)
    tell(report, "theirs, bf16", theirs, right=theirs.losses[-1] < theirs.losses[0])
    compare(report, bench, [*base, "--bf16"], ONE, theirs, exact, ranks=1)
    why = None if torch.cuda.device_count() > 1 else cannot_share(bench, options.device)
    if why is not None:
        report.tell("C 2", not_run=why)
        return report.status()
    compare(report, bench, [*base, "--bf16"], TWO, theirs, exact, ranks=2)
    if not on_cpu and torch.cuda.get_device_capability() >= (8, 9):
        in_fp8 = bench.train("U", *base, "--bf16", FP8)
        tell(report, "theirs, FP8", in_fp8)
        cases = {f"{name}, FP8": TWO[name] for name in ("ours, C 2, ring", "ours, C 2, Ulysses")}
        compare(report, bench, [*base, "--bf16", FP8], cases, in_fp8, theirs, ranks=2)
    return report.status()


def compare(
    report: Report,
    bench: Bench,
    base: Sequence[str],
    cases: dict[str, str],
    theirs: RunResult,
    exact: RunResult,
    ranks: int,
) -> None:
    """Compare every case with the reference, within the reference's own distance from more exact arithmetic."""
    allowed = {name: FACTOR * error for name, error in apart_from(exact, theirs).items()}
    for name, flags in cases.items():
        try:
            ours = bench.train("O", *base, flags, ranks=ranks)
        except RankFailure as error:
            report.tell(name, error=str(error)[-600:], right=False)
            continue
        apart = apart_from(ours, theirs)
        tell(report, name, ours, apart=apart, allowed=allowed, right=all(apart[one] <= allowed[one] for one in allowed))


def train_with_standin(arm: Arm, flags: list[str], float64: bool) -> RunResult:
    """Train on a rank without a GPU."""
    keep_te_layers()
    return train_on_this_rank(arm, flags, float64)


if __name__ == "__main__":
    sys.exit(main())
