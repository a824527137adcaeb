"""Peaks of GPUs by their names, and the flag that gives one."""

from argparse import Namespace

import pytest

from megatron.longseq.arguments import validate_longseq_arguments
from megatron.longseq.throughput import Throughput, peak_tflops

# Names as torch.cuda.get_device_name returns them. Data sheets: dense bf16, which is half of the rate with sparsity.
NAMES = {
    "NVIDIA A100-SXM4-80GB": 624 / 2,
    "NVIDIA A100 80GB PCIe": 624 / 2,
    "NVIDIA A800-SXM4-80GB": 624 / 2,
    "NVIDIA H100 80GB HBM3": 1979 / 2,
    "NVIDIA H100 PCIe": 1513 / 2,
    "NVIDIA H100 NVL": 1671 / 2,
    "NVIDIA H800": 1979 / 2,
    "NVIDIA H200": 1979 / 2,
    "NVIDIA H200 NVL": 1671 / 2,
    "NVIDIA GH200 480GB": 1979 / 2,
    "NVIDIA H20": 296 / 2,
    "NVIDIA B200": 4500 / 2,
}


def test_peaks_are_those_of_the_data_sheets() -> None:
    for name, peak in NAMES.items():
        assert peak_tflops(name) == pytest.approx(peak, rel=1e-3), name
    for name in ("cpu", "Tesla T4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA B2000"):
        assert peak_tflops(name) is None, name


def test_mfu_is_left_out_where_the_peak_is_unknown() -> None:
    figures = {"seconds": 2.0, "tokens": 100, "flops": 8e12, "attention_flops": 2e12, "ranks": 4, "peak_bytes": 2**30}
    known = Throughput(**figures, unused_bytes=2**20, peak_tflops=40.0)
    assert (known.mfu_causal, known.mfu_full, known.tflops_per_rank) == (0.1, 0.125, 1.0)
    assert "| MFU, causal (%): 10 | MFU, full (%): 12.5 | peak memory (MiB): 1024.0 |" in known.line(3)
    unknown = Throughput(**figures, unused_bytes=2**20)
    assert "MFU" not in unknown.line(3) and not any("mfu" in name for name in unknown.scalars())


@pytest.mark.parametrize("peak", [0.0, -1.0, float("nan"), float("inf")])
def test_a_peak_that_is_none_is_refused(peak: float) -> None:
    with pytest.raises(ValueError, match="the peak of a GPU in TFLOP/s is a number above 0"):
        validate_longseq_arguments(Namespace(peak_tflops_per_gpu=peak, log_throughput=True))


def test_a_peak_without_the_line_is_refused() -> None:
    validate_longseq_arguments(Namespace(peak_tflops_per_gpu=312.0, log_throughput=True))
    with pytest.raises(ValueError, match=r"--peak-tflops-per-gpu 312\.0: --log-throughput is not given"):
        validate_longseq_arguments(Namespace(peak_tflops_per_gpu=312.0, log_throughput=False))
