"""The costs of segments equal counted masks, sums of FLOPs by hand, and fits of known coefficients."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.pipeline.plan.segment_cost import (
    Coefficients,
    Line,
    ModelShape,
    Sample,
    cells,
    fit,
    flops,
    seconds,
)

SMALL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 128}


@given(st.integers(0, 60), st.integers(0, 60), st.none() | st.integers(0, 70))
def test_cells_are_the_pairs_of_the_mask(begin, length, window):
    """In upstream's mask, query i sees key j if i - window <= j <= i."""
    end = begin + length
    counted = sum(j <= i and (window is None or j >= i - window) for i in range(begin, end) for j in range(end))
    assert cells(begin, end, window) == counted


def test_flops_of_a_plain_layer_are_the_sum_of_its_products():
    model = flops(ModelShape(**SMALL, padded_vocab_size=512))
    query = key = value = output = 2 * 64 * 64
    assert model.layer.forward.token == query + key + value + output + 2 * (2 * 64 * 256)
    scores = context = 2 * 16 * 4  # per pair: 16 channels in each of 4 heads
    assert model.layer.forward.cell == scores + context
    assert model.head.forward == Line(token=2 * 64 * 512)


def test_backward_is_two_products_for_one_and_five_of_attention_for_two():
    layer = flops(ModelShape(**SMALL)).layer
    assert layer.backward == Line(cell=2.5 * layer.forward.cell, token=2 * layer.forward.token)
    assert layer.weight == Line(token=layer.forward.token)


def test_groups_gates_channels_and_experts_count():
    shape = ModelShape(**SMALL, num_query_groups=2, kv_channels=32, swiglu=True, ffn_hidden_size=160, moe_router_topk=3)
    layer = flops(shape).layer.forward
    assert layer.token == 2 * 64 * (4 * 32 + 2 * 32 + 2 * 32 + 4 * 32) + 3 * 3 * 2 * 64 * 160
    assert layer.cell == 4 * 4 * 32


def test_defaults_are_upstreams():
    assert (ModelShape(**SMALL).ffn, ModelShape(**SMALL).groups, ModelShape(**SMALL).channels) == (256, 4, 16)
    assert ModelShape(**SMALL | {"hidden_size": 4096}, swiglu=True).ffn == int(4096 * 4 * 2 / 3) // 64 * 64


def test_windows_are_counted_by_layer():
    assert ModelShape(**SMALL).windows() == {None: 2}
    assert ModelShape(**SMALL, window=8).windows() == {8: 2}
    mixed = ModelShape(**SMALL, window=8, windowed=(True, False))
    assert (mixed.windows(), mixed.windows(range(1))) == ({8: 1, None: 1}, {8: 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, not 0"),
        ({"num_query_groups": 3}, "num_query_groups 3 does not divide num_attention_heads 4"),
        ({"hidden_size": 3}, "is too small for 4 heads"),
        ({"ffn_hidden_size": -1}, "ffn_hidden_size cannot be negative"),
        ({"window": -1}, "None for all"),
        ({"windowed": (True, True)}, "needs a window"),
        ({"window": 4, "windowed": (True,)}, "pattern of 1 layers needs a window and 2 layers"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelShape(**SMALL | change)


PLANTED = Coefficients(Line(2e-11, 3e-7, 1e-4), Line(5e-11, 6e-7, 3e-4), Line(token=3e-7))


def measured(layer, segments, noise=0.0, window=None):
    chance = random.Random(7)
    samples = []
    for begin, end in segments:
        pair = [
            line(cells(begin, end, window), end - begin) * (1 + chance.uniform(-noise, noise))
            for line in (layer.forward, layer.backward)
        ]
        samples.append(Sample(begin, end, *pair))
    return samples


LENGTHS = [(0, 512), (0, 2048), (0, 8192), (0, 32768), (16384, 32768), (24576, 32768)]


def close(found, planted, tolerance):
    for name in ("forward", "backward", "weight"):
        line, wanted = getattr(found, name), getattr(planted, name)
        for part in ("cell", "token", "call"):
            assert getattr(line, part) == pytest.approx(getattr(wanted, part), rel=tolerance, abs=1e-16), (name, part)


@pytest.mark.parametrize("window", [None, 1024])
def test_a_fit_finds_planted_coefficients(window):
    close(fit(measured(PLANTED, LENGTHS, window=window), window), PLANTED, 1e-6)
    close(fit(measured(PLANTED, LENGTHS[:3], window=window), window), PLANTED, 1e-6)


def test_a_fit_finds_planted_coefficients_in_noise():
    close(fit(measured(PLANTED, LENGTHS * 20, noise=0.03)), PLANTED, 0.08)


def test_a_fit_never_goes_below_zero():
    """Seconds that grow more slowly than tokens would need a negative cell cost. The best fit without one is found."""
    points = [(0, 1000), (0, 2000), (0, 4000), (0, 8000)]
    samples = [Sample(a, b, 1e-3 * b**0.9, 2e-3 * b**0.9) for a, b in points]
    line = fit(samples).forward
    assert line.cell == 0 and line.token > 0 and line.call > 0

    def error(line):
        return sum((line(cells(s.begin, s.end), s.end - s.begin) / s.forward - 1) ** 2 for s in samples)

    for part in ("token", "call"):
        for factor in (0.999, 1.001):
            near = {"cell": line.cell, "token": line.token, "call": line.call}
            near[part] *= factor
            assert error(Line(**near)) > error(line)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([Sample(0, 8, 1, 1)] * 5, "1 different segments do not determine three coefficients"),
        ([Sample(0, 8, 1, 1), Sample(8, 8, 1, 1)], "0 <= begin < end"),
        ([Sample(0, 8, 1, 0)], "must be finite and above 0"),
        ([Sample(0, 8, float("nan"), 1)], "must be finite and above 0"),
        ([Sample(a, a + 8, 1, 1) for a in (0, 8, 16, 24)], "lie on one line"),
    ],
)
def test_samples_that_say_too_little_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        fit(samples)


def test_the_head_runs_at_the_measured_speed_of_the_layers_products():
    shape = ModelShape(**SMALL, padded_vocab_size=512)
    model, counted = seconds(shape, PLANTED), flops(shape)
    ratio = counted.head.forward.token / counted.layer.forward.token
    assert model.head.forward.token == pytest.approx(PLANTED.forward.token * ratio)
    assert model.head.backward.token == pytest.approx(PLANTED.backward.token * ratio)
    assert model.head.weight.token == pytest.approx(PLANTED.weight.token * ratio)
