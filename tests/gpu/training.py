"""Training steps of our systems on one device, beside upstream's own: losses and gradient norms.

    python -m tests.gpu.training {seq1f1b,paro,stages} [--device cpu] [--tiny] [--type float64 bf16]

In float64 they have to be upstream's to 1e-9. In bf16 they may differ from upstream's by three times what upstream's
differ by from its own in float32 from the same weights, measured here. `stages` trains two pipeline stages on one
device, where the communication library lets two ranks share it.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tests.gpu.arms import Bench, RunResult
from tests.gpu.figures import Report, skip
from tests.pool import RankFailure
from tests.regression.compare import LOSS_TOLERANCE
from tests.regression.noise import FACTOR

SYSTEMS = {
    "seq1f1b": {f"K {k}": f"--seq1f1b-splits {k}" for k in (1, 2, 4)}
    | {"K 4, zero bubble": "--seq1f1b-splits 4 --zero-bubble", "K 1, slack 1": "--seq1f1b-slack 1"},
    "paro": {
        "NNG": "--paro NNG --paro-group-size 1",
        "NIG, K 2": "--paro NIG --paro-group-size 1 --seq1f1b-splits 2",
        "IIG, selective": "--paro IIG --paro-group-size 1 --paro-selective-overlap --paro-prefetch-units 2",
    },
    "stages": {f"P 2, K {k}": f"--seq1f1b-splits {k}" for k in (1, 2, 4)},
}
BASE = {
    "seq1f1b": "",
    "paro": "--overlap-grad-reduce --overlap-param-gather",
    "stages": "--pipeline-model-parallel-size 2",
}
UPSTREAMS = {"paro": "--use-distributed-optimizer"}
SIZES = (
    "--num-layers 8 --hidden-size 512 --num-attention-heads 8 --num-query-groups 2 --ffn-hidden-size 1408 "
    "--seq-length 1024 --max-position-embeddings 1024 --vocab-size 4096 --global-batch-size 8"
)
TINY = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 128 "
    "--seq-length 64 --max-position-embeddings 64 --vocab-size 256 --global-batch-size 4"
)
STEPS = "--train-iters 5 --lr 1e-3 --min-lr 1e-4 --lr-decay-iters 20 --clip-grad 1.0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and compare."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.training", description=__doc__)
    parser.add_argument("system", choices=list(SYSTEMS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--type", nargs="+", choices=["float64", "bf16"], default=["float64", "bf16"])
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    bench, report = Bench(), Report()
    ranks = 2 if options.system == "stages" else 1
    if ranks == 2:
        why = cannot_share(bench, options.device)
        if why is not None:
            return skip(why)
    for kind in options.type:
        base = [TINY if options.tiny else SIZES, STEPS, BASE[options.system], "--bf16" * (kind == "bf16")]
        compare(report, bench, options.system, kind, base, ranks)
    return report.status()


def compare(report: Report, bench: Bench, system: str, kind: str, base: Sequence[str], ranks: int) -> None:
    """Train upstream's and ours in one arithmetic, and tell how far they are apart."""
    double, theirs = kind == "float64", UPSTREAMS.get(system, "")
    u = bench.train("U", *base, theirs, float64=double, ranks=ranks)
    tell(report, f"upstream, {kind}", u, right=_finite(u) and u.losses[-1] < u.losses[0])
    allowed = {"loss": LOSS_TOLERANCE, "norm": LOSS_TOLERANCE}
    if not double:  # the same seed draws the same weights, before they are rounded
        exact = bench.train("U", *(text for text in base if text != "--bf16"), theirs, ranks=ranks)
        allowed = {name: FACTOR * error for name, error in apart_from(exact, u).items()}
    for name, flags in SYSTEMS[system].items():
        try:
            ours = bench.train("O", *base, flags, float64=double, ranks=ranks)
        except RankFailure as error:
            report.tell(f"{name}, {kind}", error=str(error)[-600:], right=False)
            continue
        apart = apart_from(ours, u)
        right = _finite(ours) and all(apart[figure] <= allowed[figure] for figure in allowed)
        tell(report, f"{name}, {kind}", ours, apart=apart, allowed=allowed, right=right)


def tell(report: Report, name: str, trained: RunResult, **figures: object) -> None:
    """Print the losses and norms of one training, and conclusions."""
    report.tell(
        name,
        losses=[round(x, 6) for x in trained.losses],
        norms=[round(x, 6) for x in trained.norms],
        fastest_step=round(min(trained.seconds), 4),
        peak_mib=trained.peak_bytes >> 20,
        patches=[one for one in trained.patches if not one.startswith(("cpu.", "local.", "entry."))],
        **figures,
    )


def _finite(trained: RunResult) -> bool:
    return all(map(math.isfinite, (*trained.losses, *trained.norms)))


def apart_from(ours: RunResult, theirs: RunResult) -> dict[str, float]:
    """Return the largest relative differences of loss and of gradient norm over the steps."""
    pairs = {"loss": (ours.losses, theirs.losses), "norm": (ours.norms, theirs.norms)}
    return {name: max(abs(a / b - 1) for a, b in zip(*curves, strict=True)) for name, curves in pairs.items()}


def cannot_share(bench: Bench, device: str) -> str | None:
    """Return why two ranks cannot use one device, or None: they sent and summed something on it."""
    try:
        found = bench.pool.run(2, communicate_on_one_device, device, timeout=60)
    except RankFailure as error:
        lines = [line for line in str(error).splitlines() if "rror" in line or "uplicate" in line]
        return f"two ranks cannot share this device: {' / '.join(lines[-2:])[:300]}"
    return None if found == [3.0, 3.0] else f"two ranks share this device and sum wrongly: {found}"


def communicate_on_one_device(device: str) -> float:
    """Sum over two ranks and send to the next one. Runs on a rank."""
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    total, received = torch.full((4,), 1.0 + dist.get_rank(), device=device), torch.zeros(4, device=device)
    other = 1 - dist.get_rank()
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, total.clone(), other), dist.P2POp(dist.irecv, received, other)]
    )
    for work in works:
        work.wait()
    dist.all_reduce(total)
    result = float(total[0]) if float(received[0]) == 1.0 + other else float("nan")
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    sys.exit(main())
