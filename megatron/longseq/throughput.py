"""Throughput of a run and its MFU (model FLOPs utilization): the figures of a log line, and the peak rates of GPUs."""

from dataclasses import dataclass

_MIB = 2**20

# Words of a device's name, and its peak in TFLOP/s for dense bf16 matrix products. The first entry matches whose words
# are all in the name. The values are those of NVIDIA's data sheets; where a sheet gives the rate with sparsity, half.
PEAK_TFLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("H100", "PCIe"), 756.0),
    (("H100", "NVL"), 835.0),
    (("H100",), 989.0),
    (("H800", "PCIe"), 756.0),
    (("H800",), 989.0),
    (("H200", "NVL"), 835.0),
    (("H200",), 989.0),
    (("GH200",), 989.0),
    (("H20",), 148.0),
    (("B200",), 2250.0),
)


def peak_tflops(device: str) -> float | None:
    """Return the peak of a GPU in TFLOP/s (dense bf16), or None if it is unknown.

    Args:
        device: name of the device, as `torch.cuda.get_device_name` returns it. A MIG slice is unknown, because it has
            a part of the GPU's peak.
    """
    words = set(device.replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((peak for name, peak in PEAK_TFLOPS if words.issuperset(name)), None)


@dataclass(frozen=True)
class Throughput:
    """Figures of an interval of the log, per step.

    Attributes:
        seconds: time of a step.
        tokens: tokens of all ranks.
        flops: floating-point operations of the model, all ranks, with causal attention counted once.
        attention_flops: the part of `flops` that is attention scores and their product with the values.
        ranks: number of ranks.
        peak_bytes: peak memory of the rank with the highest one.
        unused_bytes: reserved memory beyond the peak of allocated memory, of the rank with the most.
        peak_tflops: peak of all ranks together in TFLOP/s, or None if it is unknown.
    """

    seconds: float
    tokens: float
    flops: float
    attention_flops: float
    ranks: int
    peak_bytes: int
    unused_bytes: int
    peak_tflops: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks."""
        return self.tokens / self.seconds

    @property
    def tflops_per_rank(self) -> float:
        """Model TFLOP/s of a rank, with causal attention counted once."""
        return self.flops / self.seconds / self.ranks / 1e12

    @property
    def mfu_causal(self) -> float | None:
        """MFU that counts the visible half of a document's scores."""
        return self._mfu(self.flops)

    @property
    def mfu_full(self) -> float | None:
        """MFU that counts attention twice: all scores of a document, as in appendix B of the PaLM paper."""
        return self._mfu(self.flops + self.attention_flops)

    def _mfu(self, flops: float) -> float | None:
        return None if self.peak_tflops is None else flops / self.seconds / 1e12 / self.peak_tflops

    def line(self, iteration: int) -> str:
        """Return the line of the log."""
        parts = [
            f"iteration {iteration:8d}",
            f"tokens/s: {self.tokens_per_second:.1f}",
            f"tokens/s/rank: {self.tokens_per_second / self.ranks:.1f}",
            f"model TFLOP/s/rank: {self.tflops_per_rank:.4g}",
        ]
        if self.mfu_causal is not None and self.mfu_full is not None:
            parts += [f"MFU, causal (%): {100 * self.mfu_causal:.4g}", f"MFU, full (%): {100 * self.mfu_full:.4g}"]
        parts += [
            f"peak memory (MiB): {self.peak_bytes / _MIB:.1f}",
            f"reserved beyond it (MiB): {self.unused_bytes / _MIB:.1f}",
        ]
        return " " + " | ".join(parts) + " |"

    def scalars(self) -> dict[str, float]:
        """Return the figures for TensorBoard by name."""
        found = {
            "tokens-per-second": self.tokens_per_second,
            "model-tflops-per-rank": self.tflops_per_rank,
            "mfu-causal": self.mfu_causal,
            "mfu-full": self.mfu_full,
            "peak-memory-bytes": float(self.peak_bytes),
            "reserved-beyond-peak-bytes": float(self.unused_bytes),
        }
        return {name: value for name, value in found.items() if value is not None}
