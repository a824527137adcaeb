"""The line about fragmentation contains what CUDA's allocator reports, the most of all ranks."""

from argparse import Namespace
from typing import Any

import pytest
import torch

from patches.log import fragmentation
from patches.log.throughput import logs_lines


def test_the_line_is_what_the_allocator_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron import training

    printed: list[str] = []
    others = torch.tensor([700_000_000, 2_000_000_000, 9])

    def all_reduce(values: torch.Tensor, op: Any) -> None:
        assert op is torch.distributed.ReduceOp.MAX
        values.copy_(torch.maximum(values, others))

    for name, value in (("memory_reserved", 3_500_000_000), ("memory_allocated", 3_000_000_000)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_device_alloc": 12})
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch, "tensor", lambda data, dtype, device, make=torch.tensor: make(data, dtype=dtype))
    monkeypatch.setattr(training, "print_rank_last", printed.append)
    monkeypatch.setattr(training, "get_tensorboard_writer", lambda: None)
    fragmentation.log_fragmentation(7)
    (line,) = printed
    assert "iteration        7 |" in line and "most of all ranks): 0.700 |" in line
    assert "reserved (GB): 3.500 |" in line and "device so far: 12 |" in line


def test_either_flag_adds_lines() -> None:
    for throughput, memory in ((False, False), (True, False), (False, True)):
        given = Namespace(log_throughput=throughput, log_memory_fragmentation=memory)
        assert logs_lines(given) == (throughput or memory)
    assert not logs_lines(Namespace())
