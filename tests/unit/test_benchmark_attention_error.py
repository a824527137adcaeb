"""The benchmark of rounding errors runs to its JSON line and its picture, which repeats to the byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.kernels.reference import Reference
from megatron.longseq.attention.kernels.torch_cpu import CpuFlash
from tests.benchmarks.attention_error import GOAL, KERNELS, RESULTS, Narrow, draw, main, measure
from tests.unit.test_attention_cli import drawn


@pytest.mark.slow
def test_last_line_holds_every_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.svg"
    assert main(["--tokens", "512", "--rings", "1,32", "--output", str(file)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert (found["tokens"], found["ring"]) == (512, 32)
    for kind, row in found["error_over_one_call"].items():
        assert row.keys() == set(RESULTS) and found["worst"][kind] == max(row.values())
    # A ring of a wide kernel adds up in float32 and rounds to bf16 once. One call rounds at least once, too: on no
    # processor is the ring's error larger, but for chance.
    assert found["worst"]["bf16"] <= GOAL
    # Rounding every block adds independent errors: of blocks of equal weight as much again as the last rounding.
    narrow, wide = (found["error_over_one_call"][kind]["out"] for kind in ("bf16, rounded blocks", "bf16"))
    assert narrow > wide, "what the narrow kernel stands for"
    assert not Narrow.wide and all("| 1.000x |" in line for line in table[2:]), "a ring of one is the one call"
    assert sum("| bf16 |" in line for line in table) == 4 and len(drawn(file)) > 0


class Precise(Reference):
    """A float32 kernel of another processor: every result is rounded once."""

    def __init__(self) -> None:
        super().__init__(compute=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [CpuFlash, Precise])
def test_log_sum_exps_in_float32_cost_accuracy(kernel: type[Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the same ring that merges log-sum-exps in float32.

    The same ring with log-sum-exps in float32 is the reference: their rounding goes into every weight, on top of all
    errors that both rings share.
    """
    monkeypatch.setitem(KERNELS, "float32", (torch.float32, kernel))
    fine = measure(512, [32], kinds=["float32"])[1]["float32"]
    add = torch.logaddexp

    def rounded(lse: Tensor, other: Tensor, out: Tensor, **kwargs: Any) -> Tensor:
        return out.copy_(add(lse, other, **kwargs).float())

    monkeypatch.setattr(torch, "logaddexp", rounded)
    coarse = measure(512, [32], kinds=["float32"])[1]["float32"]
    assert all(fine[name][0] < coarse[name][0] for name in RESULTS), (fine, coarse)


def test_the_picture_repeats(tmp_path: Path) -> None:
    ratios = {kind: {name: [1.0, 1.05] for name in RESULTS} for kind in ("float32", "bf16")}
    for name in ("a.svg", "b.svg"):
        draw(ratios, [1, 2], 64, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
