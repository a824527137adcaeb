"""A layer's core attention is replaced while it runs in segments, and its checkpoint state is upstream's."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from torch import nn

from megatron.longseq.attention.kernels.select import KernelSelector
from megatron.longseq.attention.module import LongSequenceAttention, SegmentState, run_in_segments
from megatron.longseq.attention.runtime.kv_cache import SegmentKVCache
from megatron.longseq.segment import Segment

CONFIG = Namespace(
    attention_dropout=0.0,
    attention_backend=AttnBackend.auto,
    window_size=None,
    window_attn_skip_freq=None,
    softmax_scale=None,
    kv_channels=8,
    cp_comm_type=None,
    sequence_parallel=True,
)


class Core(nn.Module):
    """A core attention with a parameter and extra state, as TransformerEngine's has."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.ones(2))
        self.extra = torch.zeros(1)

    def get_extra_state(self) -> torch.Tensor:
        return self.extra

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.extra = state


class Layer(nn.Module):
    """The attributes of upstream's self-attention that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.layer_number, self.core_attention = CONFIG, 1, Core()


def test_a_replaced_core_attention_runs_segments_and_keeps_upstreams_state() -> None:
    layer: Any = Layer()
    core, names = layer.core_attention, list(layer.state_dict())
    state = SegmentState(SegmentKVCache(), {}, KernelSelector("segments"))
    undo = run_in_segments(layer, state)
    assert isinstance(layer.core_attention, LongSequenceAttention)
    assert list(layer.state_dict()) == names == ["core_attention.offset", "core_attention._extra_state"]
    layer.load_state_dict({names[0]: torch.full((2,), 5.0), names[1]: torch.full((1,), 7.0)})
    assert core.offset.tolist() == [5.0, 5.0] and core.extra.item() == 7.0

    state.cache.current = Segment(0, 0, (4,), forward_only=True)
    q = torch.randn(4, 1, 2, 8)
    assert layer.core_attention(q, q, q).shape == (4, 1, 16)
    state.cache.assert_empty()
    layer.eval()
    undo()
    assert layer.core_attention is core and not core.training


def test_ours_leaves_out_the_fp8_state_of_te_alone() -> None:
    layer: Any = Layer()
    layer.core_attention = LongSequenceAttention(CONFIG, 1, AttnMaskType.causal, "self")
    assert list(layer.state_dict()) == []
    state = {"core_attention._extra_state": torch.ones(3, dtype=torch.uint8)}
    assert layer.load_state_dict(state) == ([], [])
    with pytest.raises(RuntimeError, match=r"core_attention\.softmax_offset"):
        layer.load_state_dict(state | {"core_attention.softmax_offset": torch.ones(2)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp8_dot_product_attention", True),
        ("fp8_multi_head_attention", True),
        ("softmax_type", "learnable"),
        ("qk_clip", True),
        ("log_max_attention_logit", True),
    ],
)
def test_settings_that_it_would_ignore_are_refused(name: str, value: Any) -> None:
    config = Namespace(**vars(CONFIG) | {name: value})
    with pytest.raises(ValueError, match=f"layer 1: the configuration sets {name}"):
        LongSequenceAttention(config, 1, AttnMaskType.causal, "self")
