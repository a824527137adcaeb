"""Our process groups get the options that upstream's flags give to its groups."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron.longseq.distributed import same_backend_options
from patches.environment import has_one_queue

NCCL = pytest.mark.skipif(not dist.is_nccl_available(), reason="needs a torch with NCCL")


def group(options: Any) -> Any:
    return SimpleNamespace(_get_backend=lambda device: SimpleNamespace(options={"cuda": options}[device.type]))


@NCCL
def test_ours_have_upstreams_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    theirs = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    theirs.config.cga_cluster_size, theirs.config.max_ctas, theirs.config.min_ctas = 2, 16, 4
    ours = same_backend_options(group(theirs))
    assert ours is not theirs, "torch writes each group's ranks and name into its own"
    assert ours.is_high_priority_stream
    assert (ours.config.cga_cluster_size, ours.config.max_ctas, ours.config.min_ctas) == (2, 16, 4)
    assert not same_backend_options(group(dist.ProcessGroupNCCL.Options())).is_high_priority_stream


def test_other_backends_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    assert same_backend_options(group(None)) is None


@pytest.mark.parametrize(("text", "expected"), [(None, False), ("1", True), ("8", False)])
def test_the_launcher_says_whether_a_gpu_has_one_queue(
    text: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if text is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", text)
    assert has_one_queue() is expected
