"""The planner's seconds of messages, experts and offloaded states, against formulas written out by hand."""

import pytest

from megatron.longseq.planner.plan.activations import layer_bytes
from megatron.longseq.planner.plan.cluster import cluster
from megatron.longseq.planner.plan.communication import group, layer_messages, network_rate, ring_seconds
from megatron.longseq.planner.plan.compute import attention_seconds, layer_seconds
from megatron.longseq.planner.plan.data_parallel import step_optimizer_seconds
from megatron.longseq.planner.plan.flags import read
from megatron.longseq.planner.plan.memory import StageParams

RUN = {"model": "llama-7b", "seq_length": 8192, "global_batch_size": 512, "bf16": True, "context_parallel_size": 8}


def test_a_ring_hides_behind_the_attention_of_its_own_pass() -> None:
    """Gradients of keys and values travel beside the backward's attention, not beside a multiple of the forward's."""
    model, machine, run = read({**RUN, "cluster": "a800-64,node_bandwidth=10e9"})
    seconds = layer_seconds(model, machine, run, False)
    assert seconds.attention_backward == attention_seconds(model, machine, run).backward > 2 * seconds.attention > 0

    def context(forward: float, backward: float) -> tuple[float, float]:
        found = seconds._replace(attention=forward, attention_backward=backward)
        messages = layer_messages(model, machine, run, False, found)
        return messages.context_forward, messages.context_backward

    out, back = context(0.0, 0.0)
    rows = 7 * 1024 * 3 // 4  # a rank sends all its keys to the ranks before it, and half of them to those behind it
    rate = machine.link_bandwidth * machine.link_efficiency * 64e6 / (64e6 + machine.message_bytes)
    assert out == pytest.approx(2 * rows * 4096 * 2 / rate + 7 * machine.link_latency)  # keys and values in 16 bits
    assert back == pytest.approx(2 * rows * 4096 * (2 + 4) / rate + 7 * machine.link_latency)  # and gradients in 32
    assert context(0.3 * out, 0.2 * back) == pytest.approx((0.7 * out, 0.8 * back))
    assert context(2 * out, 2 * back) == (0.0, 0.0)


def test_a_group_of_one_rank_a_node_sends_all_its_hops_over_the_network() -> None:
    for links, between in ((3e-6, 8e-6), (30e-6, 8e-6)):
        machine = cluster(f"a100-64,link_latency={links},network_latency={between}")
        ranks = group(machine, 8, 8)
        sent = 1e6 * 7 / 8 / network_rate(machine, 1)
        assert ranks.inside == 1 and ring_seconds(machine, ranks, 1e6) == pytest.approx(sent + 7 * between)


def test_a_capacity_changes_what_experts_compute_send_and_keep() -> None:
    """Padding fills every expert up to its capacity; without it, a capacity only drops tokens."""
    flags = {"model": "deepseek-v2", "cluster": "h100-64", "seq_length": 4096, "global_batch_size": 64, "bf16": True,
             "expert_model_parallel_size": 8}  # fmt: skip

    def parts(**changes: object) -> tuple[float, float, float]:
        model, machine, run = read({**flags, **changes})
        experts = layer_bytes(model, run, True).kept - layer_bytes(model, run, False).kept
        seconds = layer_seconds(model, machine, run, True)
        sent = layer_messages(model, machine, run, True, seconds).expert_forward
        return seconds.forward, sent, experts

    plain = parts()
    assert parts(moe_expert_capacity_factor=-1) == plain  # upstream: no limit
    assert parts(moe_expert_capacity_factor=1.5) == plain
    padded = parts(moe_expert_capacity_factor=1.5, moe_pad_expert_input_to_capacity=True)
    assert all(more > one for more, one in zip(padded, plain, strict=True))
    dropped = parts(moe_expert_capacity_factor=0.5)
    assert all(less < one for less, one in zip(dropped, plain, strict=True))
    assert 1.45 < padded[1] / plain[1] < 1.5 and 0.5 < dropped[1] / plain[1] < 0.53  # latencies stay


def test_an_offloaded_optimizer_takes_the_hosts_time() -> None:
    """Of 1e9 parameters, gradients go down, 28 bytes each pass through the host's memory, and parameters go up."""
    flags = {"model": "llama-7b", "cluster": "h100-8,host_bandwidth=100e9,pcie_bandwidth=50e9", "seq_length": 4096,
             "global_batch_size": 8, "bf16": True, "use_distributed_optimizer": True,
             "use_precision_aware_optimizer": True}  # fmt: skip

    def seconds(**changes: object) -> float:
        _, machine, run = read({**flags, **changes})
        return step_optimizer_seconds(machine, run, StageParams(8 * 10**9, 0, 0, 0))

    on_gpu, offload = seconds(), {"optimizer_cpu_offload": True}
    update = 38e9 / (3350e9 * 0.72)
    assert seconds(**offload) == pytest.approx(on_gpu - update + 28 / 100 + 8 / 50)
    assert seconds(**offload, overlap_cpu_optimizer_d2h_h2d=True) == pytest.approx(on_gpu - update + 28 / 100)
    half = seconds(**offload, optimizer_offload_fraction=0.5)
    assert half == pytest.approx((on_gpu + seconds(**offload)) / 2)
