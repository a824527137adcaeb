"""The planner's seconds of messages, against formulas written out by hand."""

import pytest

from megatron.longseq.planner.plan.cluster import cluster
from megatron.longseq.planner.plan.communication import group, layer_messages, network_rate, ring_seconds
from megatron.longseq.planner.plan.compute import attention_seconds, layer_seconds
from megatron.longseq.planner.plan.flags import read

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
