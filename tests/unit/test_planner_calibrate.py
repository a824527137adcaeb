"""The planner's profile of a machine: what is fitted to measurements, and one real measurement on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.longseq.planner.plan.cluster import cluster
from megatron.longseq.planner.plan.compute import product_seconds
from megatron.longseq.planner.plan.flags import read
from megatron.longseq.planner.plan.step import predict
from megatron.longseq.planner.tools.calibrate import fit_link, profile_of
from megatron.longseq.planner.tools.cli import main


def measured(**changes: Any) -> dict[str, Any]:
    """Return what one rank measures on a machine with known numbers."""
    products = [[m, n, k, 0.05 if m == 128 else 0.1] for m in (128, 1024) for n in (256, 1024) for k in (256, 1024)]
    messages = [
        [ranks, size, 2 * (ranks - 1) * (2e-5 + size / ranks / 3e9)] for ranks in (2, 4) for size in (1 << 14, 1 << 24)
    ]
    rank = {
        "products": products,
        "memory_bandwidth": 2e10,
        "memory_efficiency": 0.5,
        "layer_seconds": 1e-4,
        "attention": (4e10, 3e10),
    }
    rank |= {"messages": messages, "name": "cpu", "memory_bytes": 8e9, "sms": 1, "attention_length": 1024}
    return rank | changes


def test_links_are_fitted_to_all_reduces() -> None:
    bandwidth, latency = fit_link(measured()["messages"])
    assert bandwidth == pytest.approx(3e9)
    assert latency == pytest.approx(2e-5)
    assert fit_link([[2, 1 << 20, 1.0], [2, 1 << 10, 1.0]])[0] > 0  # larger messages that are not slower
    assert fit_link([]) == (1e12, 0.0)


def test_profile_reproduces_what_was_measured(tmp_path: Path) -> None:
    ranks = [measured(), measured(layer_seconds=3e-4)]
    (tmp_path / "machine.json").write_text(json.dumps(profile_of(ranks, "cpu")))
    machine = cluster(str(tmp_path / "machine.json"))
    assert machine.gpus == 2
    assert machine.peak_tflops == 0.1
    assert machine.layer_seconds == pytest.approx(2e-4)
    for m, rate in ((128, 0.05e12), (1024, 0.1e12)):
        assert product_seconds(machine, m, 1024, 1024) == pytest.approx(2 * m * 1024 * 1024 / rate, rel=0.02)
    values = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 1024, "seq_length": 256}
    values |= {"cluster": str(tmp_path / "machine.json"), "global_batch_size": 8}
    one, two = (predict(*read({**values, "micro_batch_size": size})) for size in (1, 4))
    assert 0 < two.step_seconds < one.step_seconds


def test_a_profile_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({**profile_of([measured()], "cpu"), "tflop": 3}))
    with pytest.raises(ValueError, match=r"unknown fields \['tflop'\]"):
        cluster(str(file))
    with pytest.raises(ValueError, match="no number 'tflop'"):
        cluster("a100-8,tflop=3")


@pytest.mark.slow  # two processes import torch
def test_calibrate_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "profile.json"
    assert main(["calibrate", "--device", "cpu", "--gpus", "2", "--seconds", "2", "--output", str(file)]) == 0
    assert f"give --cluster {file}" in capsys.readouterr().out
    found = cluster(str(file))
    assert len(found.products) > 10
    assert found.gpus == 2
    assert 0 < found.attention_efficiency < 20
    assert found.link_bandwidth > 1e6
