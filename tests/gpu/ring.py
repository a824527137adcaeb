"""USP on one device against float64: every rank is a thread of this process, its messages are copies.

    python -m tests.gpu.ring [--device cpu] [--tiny]

The rings, the all-to-alls and the kernels are those of training; the wire alone is missing. In float32 (the reference
kernel on a GPU) and in bf16 (the flash kernel), an error may exceed that of one call on the whole sequence by what
further roundings explain.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.select import select_kernel
from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.attention.plan.ranges import Documents, DocumentSpan
from tests.gpu.figures import Report
from tests.gpu.kernels import relative
from tests.unit.context_run import Problem, Ranks, alone

MESHES = [(1, 2), (1, 4), (2, 1), (4, 1), (2, 2), (2, 4)]  # Ulysses x ring
MERGED = 3 + 4**2  # roundings of one merge, in squares: three of the result, one of a log-sum-exp up to 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare all problems."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.ring", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*stores the whole score matrix")
    device, report = torch.device(options.device), Report()
    tokens, dim = (64, 16) if options.tiny else (2048, 64)
    for dtype in (torch.float32, torch.bfloat16):
        kernel = select_kernel(device, dtype, dim).kernel
        problem = Problem(Mesh(1, 1), (8, 4), (tokens,), batch=2, dim=dim, dtype=dtype, kernel=kernel)
        inputs = [x.to(device) for x in problem.inputs()]
        for mask, kwargs in masks(tokens).items():
            compare(report, replace(problem, **kwargs), inputs, mask)  # type: ignore[arg-type]
    return report.status()


def masks(tokens: int) -> dict[str, dict[str, object]]:
    """Return what is asked of a problem, by name."""
    third, half = tokens // 3, tokens // 2
    documents = Documents((_runs(0, third, half + 1, tokens), _runs(0, 1, third, tokens)))
    return {
        "causal": {},
        "window": {"window": tokens // 5},
        "documents": {"documents": documents},
        "segments": {"lengths": (half, half // 2, half // 2)},
    }


def compare(report: Report, problem: Problem, inputs: Sequence[Tensor], mask: str) -> None:
    """Compare every mesh with attention in float64, beside one call on the whole sequence."""
    exact = problem.expected([x.cpu() for x in inputs])
    floor = relative([x.to(problem.dtype) for x in exact], exact)
    once = relative(run(alone(problem), inputs), exact)
    for mesh in MESHES:
        one = replace(problem, mesh=Mesh(*mesh))
        found = relative(run(one, inputs), exact)
        parts = mesh[1] * len(problem.lengths)
        more = 2 + (MERGED * parts**2 if problem.dtype == torch.float32 else 2 * parts * (not problem.kernel.wide))
        limits = [math.sqrt(a**2 + more * b**2) for a, b in zip(once, floor, strict=True)]
        worst = max(a / b for a, b in zip(found, limits, strict=True))
        name = f"U {mesh[0]} R {mesh[1]}, {mask}, {str(problem.dtype).removeprefix('torch.')}, {problem.kernel.name}"
        report.tell(name, errors=[float(f"{x:.3g}") for x in found], of_allowed=round(worst, 3), right=worst <= 1)


def run(problem: Problem, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return out, dq, dk and dv of all ranks, on the host."""
    return [x.cpu() for x in OneDevice(problem, inputs).forward().backward().results()]


class OneDevice(Ranks):
    """Ranks that share a GPU: each runs its backward in its own thread.

    Autograd would run all of them one after another in the device's thread, where the first waits for messages of the
    others for ever.
    """

    def backward_of(self, rank: int) -> None:
        """Run the backwards of one rank."""
        with torch.autograd.set_multithreading_enabled(False):
            super().backward_of(rank)


def _runs(*ends: int) -> tuple[DocumentSpan, ...]:
    return tuple(DocumentSpan(begin, end, begin) for begin, end in pairwise(ends))


if __name__ == "__main__":
    sys.exit(main())
