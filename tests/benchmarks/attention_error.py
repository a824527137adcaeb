"""Rounding errors of ring attention, for rings of 1 to 32 ranks, beside those of one flash call on the whole sequence.

    python -m tests.benchmarks.attention_error [--tokens N] [--rings R1,R2,...] [--output FILE]

The ranks of a ring are threads of one process: the real ring runs, its messages are copies. An error is the norm of the
difference from attention in float64, over the norm of that; inputs are the same rounded numbers in both. Every figure
is a ratio: the ring's error over that of one call of the same flash operator in the same type.

bf16 is measured twice. A *wide* kernel (PyTorch's on a CPU) gives the ring its blocks in float32. Others (every flash
kernel on a GPU) round each block's result to bf16, which no ring can take back; the same operator, used in that way,
shows what that costs. The last line is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import torch
from matplotlib import pyplot
from torch import Tensor

from megatron.longseq.attention.kernels.torch_cpu import CpuFlash
from megatron.longseq.attention.plan.layout import Mesh
from tests.unit.context_run import Problem, Ranks, alone

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "pictures" / "ring-error.svg"
RINGS = (1, 2, 4, 8, 16, 32)
RESULTS = ("out", "dq", "dk", "dv")
GOAL = 1.1
# Okabe and Ito's colours: told apart by every kind of colour vision, and in grey by their markers.
STYLES = {"out": ("#0072B2", "o"), "dq": ("#D55E00", "s"), "dk": ("#009E73", "^"), "dv": ("#CC79A7", "D")}


class Narrow(CpuFlash):
    """The same operator, given and giving bf16 alone, as a GPU's."""

    name = "torch CPU flash, bf16 alone"
    wide = False


KERNELS = {"float32": (torch.float32, CpuFlash), "bf16": (torch.bfloat16, CpuFlash)}
KERNELS["bf16, rounded blocks"] = (torch.bfloat16, Narrow)

Errors = dict[str, float]  # of out, dq, dk, dv


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and the JSON line, and write the picture."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.attention_error", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="of the sequence")
    parser.add_argument("--rings", default=",".join(map(str, RINGS)), metavar="R1,R2,...", help="ring sizes")
    parser.add_argument("--output", type=Path, default=PICTURE, help="picture (.svg, .png)")
    given = parser.parse_args(arguments)
    rings = [int(word) for word in given.rings.split(",")]
    calls, ratios = measure(given.tokens, rings)
    print(table(calls, ratios, rings))
    draw(ratios, rings, given.tokens, given.output)
    last = {kind: {name: round(ratios[kind][name][-1], 4) for name in RESULTS} for kind in ratios}
    worst = {kind: max(row.values()) for kind, row in last.items()}
    print(json.dumps({"tokens": given.tokens, "ring": rings[-1], "error_over_one_call": last, "worst": worst}))
    return 0


def measure(
    tokens: int, rings: Sequence[int], kinds: Sequence[str] = tuple(KERNELS)
) -> tuple[dict[str, Errors], dict[str, dict[str, list[float]]]]:
    """Return the errors of one call, and every ring's over them, by kind (of `KERNELS`) and result."""
    calls: dict[str, Errors] = {}
    ratios: dict[str, dict[str, list[float]]] = {}
    for kind in kinds:
        dtype, kernel = KERNELS[kind]
        torch.manual_seed(0)
        problem = Problem(Mesh(1, 1), (4, 2), (tokens,), batch=1, dim=64, dtype=dtype, kernel=kernel())
        inputs = problem.inputs()
        exact = problem.expected(inputs)
        calls[kind] = errors(alone(problem), inputs, exact)
        found = [errors(replace(problem, mesh=Mesh(1, ring)), inputs, exact) for ring in rings]
        ratios[kind] = {name: [one[name] / calls[kind][name] for one in found] for name in RESULTS}
    return calls, ratios


def errors(problem: Problem, inputs: Sequence[Tensor], exact: Sequence[Tensor]) -> Errors:
    """Return the relative errors of a problem's results."""
    results = Ranks(problem, inputs).forward().backward().results()
    pairs = zip(RESULTS, results, exact, strict=True)
    return {name: float((result.double() - right).norm() / right.norm()) for name, result, right in pairs}


def table(calls: dict[str, Errors], ratios: dict[str, dict[str, list[float]]], rings: Sequence[int]) -> str:
    """Return a markdown table."""
    lines = [
        f"| type | of | one flash call | {' | '.join(f'R = {ring}' for ring in rings)} |",
        f"|---|---|---|{'---|' * len(rings)}",
    ]
    for kind, row in ratios.items():
        for name, values in row.items():
            cells = " | ".join(f"{value:.3f}x" for value in values)
            lines.append(f"| {kind} | {name} | {calls[kind][name]:.2e} | {cells} |")
    return "\n".join(lines)


def draw(ratios: dict[str, dict[str, list[float]]], rings: Sequence[int], tokens: int, file: Path) -> None:
    """Write the picture: a panel for each kind."""
    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "longseq",
        "svg.fonttype": "none",
    }
    with pyplot.rc_context(style):
        figure, panels = pyplot.subplots(1, len(ratios), figsize=(9.6, 3.2), sharey=True, layout="constrained")
        for axes, (kind, row) in zip(panels, ratios.items(), strict=True):
            for name, values in row.items():
                colour, marker = STYLES[name]
                axes.plot(
                    range(len(rings)), values, color=colour, marker=marker, markersize=4, linewidth=1.2, label=name
                )
            axes.axhline(1, color="#999999", linewidth=0.8)
            axes.axhline(GOAL, color="#999999", linewidth=0.8, linestyle="--")
            axes.set_xticks(range(len(rings)), [str(ring) for ring in rings])
            axes.set_xlabel("ranks of the ring")
            axes.set_title(kind, fontweight="bold", fontsize=9.5)
        panels[0].set_ylabel("error over that of one flash call")
        panels[0].set_ylim(bottom=0)
        panels[0].legend(frameon=False, fontsize=8, ncols=2, title=f"{tokens} tokens; dashed: {GOAL}", title_fontsize=8)
        figure.savefig(file, dpi=140, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
