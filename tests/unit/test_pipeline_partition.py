"""Partitions equal the authors' lists and bisection, are aligned, and invalid ones are refused."""

import dataclasses
from itertools import product

import pytest
from hypothesis import assume
from hypothesis import given as given_
from hypothesis import strategies as st

from megatron.longseq.pipeline.plan.partition import balanced, even, from_lengths, ideal_cuts, parse
from megatron.longseq.pipeline.plan.segment_cost import ModelShape, cells, flops
from megatron.longseq.pipeline.tools.compare import paper_partition

# The authors' own sweep: layers, hidden, heads, padded vocabulary, tensor-parallel size.
PAPER = {
    "2.7B": (32, 2560, 32, 50304, 1),
    "7B": (32, 4096, 32, 51200, 8),
    "13B": (40, 5120, 40, 51200, 8),
    "30B": (64, 6144, 64, 51200, 8),
}
# Lists that the authors' solver gives.
GOLDEN = [
    ("2.7B", 16384, "5271,4232,3639,3242"),
    ("2.7B", 32768, "11944,8268,6731,5825"),
    ("2.7B", 65536, "26872,15754,12375,10535"),
    ("2.7B", 131072, "58564,29876,23099,19533"),
    ("7B", 16384, "4936,4232,3776,3440"),
    ("7B", 32768, "11024,8416,7088,6240"),
    ("7B", 65536, "25024,16272,13040,11200"),
    ("7B", 131072, "55712,30872,24064,20424"),
    ("13B", 16384, "4800,4224,3832,3528"),
    ("13B", 32768, "10640,8456,7240,6432"),
    ("13B", 65536, "24136,16480,13368,11552"),
    ("13B", 131072, "54176,31368,24600,20928"),
    ("30B", 16384, "4720,4216,3864,3584"),
    ("30B", 32768, "10360,8472,7352,6584"),
    ("30B", 65536, "23424,16624,13640,11848"),
    ("30B", 131072, "52880,31768,25056,21368"),
    ("7B", 32768, "19440,13328"),
    ("7B", 32768, "6032,5024,4416,3992,3664,3408,3200,3032"),
]


def paper(name, seq_length, **more):
    layers, hidden, heads, vocabulary, _ = PAPER[name]
    return ModelShape(layers, hidden, heads, seq_length, padded_vocab_size=vocabulary, **more)


@pytest.mark.parametrize(("name", "seq_length", "lengths"), GOLDEN)
def test_the_papers_partition_is_the_authors_list(name, seq_length, lengths):
    wanted = tuple(map(int, lengths.split(",")))
    assert paper_partition(paper(name, seq_length), len(wanted), PAPER[name][4]).lengths == wanted


@pytest.mark.parametrize("name", PAPER)
def test_balanced_lengths_are_balanced_aligned_and_fall(name):
    multiple = PAPER[name][4]
    for seq_length, segments in product((16384, 32768, 65536, 131072), (1, 2, 3, 4, 8)):
        result = balanced(flops(paper(name, seq_length)), segments, multiple=multiple)
        assert sum(result.lengths) == seq_length and len(result.lengths) == segments
        assert all(length % result.align == 0 and length > 0 for length in result.lengths)
        assert result.align % multiple == 0
        assert list(result.lengths) == sorted(result.lengths, reverse=True)
        assert result.imbalance <= 1.01


def test_balancing_forward_and_backward_moves_the_cuts_later_than_the_papers():
    """Attention's backward costs relatively more than a product's, so late segments must be shorter."""
    ours, theirs = balanced(flops(paper("30B", 65536)), 4, multiple=8), paper_partition(paper("30B", 65536), 4, 8)
    assert ours.lengths == (24064, 16512, 13440, 11520)
    assert ours.lengths[0] > theirs.lengths[0] and ours.lengths[-1] < theirs.lengths[-1]
    assert even(flops(paper("30B", 65536)), 4).imbalance > 1.35


SHAPES = st.builds(
    ModelShape,
    num_layers=st.just(4),
    hidden_size=st.sampled_from([64, 1024, 4096]),
    num_attention_heads=st.sampled_from([4, 8]),
    seq_length=st.integers(64, 40000),
    padded_vocab_size=st.sampled_from([0, 50304]),
    swiglu=st.booleans(),
    window=st.none() | st.integers(0, 50000),
)
PATTERNS = st.none() | st.tuples(*[st.booleans()] * 4)


@given_(SHAPES, PATTERNS, st.integers(1, 8))
def test_the_closed_form_is_what_bisection_finds(shape, pattern, segments):
    if shape.window is not None and pattern is not None:
        shape = dataclasses.replace(shape, windowed=pattern)
    model = flops(shape)

    def cumulative(x):  # tokens one by one are exact at whole x; between them the cost is the mask's, made continuous
        visible = 0.0
        for window, layers in shape.windows().items():
            width = x if window is None else min(x, window + 1.0)
            visible += layers * (width * (width + 1) / 2 + (x - width) * width)
        token = shape.num_layers * 3 * model.layer.forward.token + 3 * model.head.forward.token
        return 3.5 * model.layer.forward.cell * visible + token * x

    x = shape.seq_length // 2
    direct = sum(layers * cells(0, x, window) for window, layers in shape.windows().items())
    direct *= 3.5 * model.layer.forward.cell
    direct += x * 3 * (shape.num_layers * model.layer.forward.token + model.head.forward.token)
    assert cumulative(x) == pytest.approx(direct)
    for i, cut in enumerate(ideal_cuts(model, segments), start=1):
        low, high = 0.0, float(shape.seq_length)
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if cumulative(middle) < cumulative(shape.seq_length) * i / segments else (low, middle)
            )
        assert cut == pytest.approx(low, rel=1e-9, abs=1e-6)


@given_(SHAPES, st.integers(1, 8), st.sampled_from([1, 2, 3, 8, 24]))
def test_any_shape_is_cut_into_whole_aligned_segments(shape, segments, multiple):
    shape = dataclasses.replace(shape, seq_length=shape.seq_length // multiple * multiple)
    assume(shape.seq_length >= segments * multiple)
    for result in (
        balanced(flops(shape), segments, multiple=multiple),
        even(flops(shape), segments, multiple=multiple),
    ):
        assert len(result.lengths) == segments and sum(result.lengths) == shape.seq_length
        assert all(length > 0 and length % multiple == 0 for length in result.lengths)
        assert all(length % result.align == 0 for length in result.lengths[:-1])
    assert max(result.lengths) - min(result.lengths) <= multiple


def test_alignment_is_given_up_only_where_it_costs_balance():
    long, short = flops(paper("7B", 131072)), flops(paper("7B", 4096))
    assert balanced(long, 4, multiple=8).align == 128
    assert balanced(long, 4, multiple=3 * 128 - 128).align == 256
    fine = balanced(short, 8, multiple=8)
    assert fine.align < 128 and fine.imbalance < balanced(short, 8, multiple=8, align=128).imbalance
    assert str(fine).startswith("balanced: ") and f"multiples of {fine.align}," in str(fine)


def test_a_window_flattens_the_lengths():
    full, windowed = flops(paper("7B", 131072)), flops(paper("7B", 131072, window=4095))
    assert balanced(full, 4).lengths[0] > 1.3 * 131072 / 4
    assert balanced(windowed, 4).lengths[0] < 1.02 * 131072 / 4
    half = flops(paper("7B", 131072, window=4095, windowed=(True, False) * 16))
    assert balanced(windowed, 4).lengths[0] < balanced(half, 4).lengths[0] < balanced(full, 4).lengths[0]


def test_a_flags_text_is_parsed():
    model = flops(paper("7B", 4096))
    assert parse("even", model, 3).lengths == (1366, 1365, 1365)
    assert parse("even", model, 3, multiple=8).lengths == (1368, 1368, 1360)
    assert parse("balanced", model, 2) == balanced(model, 2)
    assert parse("balanced", model, 2, align=512).align == 512
    result = parse("3000, 1096", model, 2, multiple=8)
    assert (result.name, result.lengths) == ("given", (3000, 1096)) and result.imbalance > 1.4


@pytest.mark.parametrize(
    ("text", "segments", "multiple", "message"),
    [
        ("halves", 2, 1, "'halves': give even, balanced or lengths such as 3072,1024"),
        ("2048,2048", 3, 1, "2 lengths for --seq1f1b-splits 3; give one per segment"),
        ("2048,2047", 2, 1, r"sum to 4095, but --seq-length is 4096; change one by \+1"),
        ("4096,0", 2, 1, "0 is not a positive multiple of 1"),
        ("2044,2052", 2, 8, "2044 is not a positive multiple of 8"),
        (
            "even",
            4097,
            1,
            "cannot be cut into 4097 segments of at least 1 tokens; lower --seq1f1b-splits to at most 4096",
        ),
        ("balanced", 513, 8, "lower --seq1f1b-splits to at most 512"),
        ("even", 2, 3, "--seq-length 4096 is not a multiple of 3 .* the nearest multiple is 4095"),
        ("balanced", 0, 1, "must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(text, segments, multiple, message):
    with pytest.raises(ValueError, match=message):
        parse(text, flops(paper("7B", 4096)), segments, multiple=multiple)


def test_an_alignment_that_does_not_fit_is_refused():
    model = flops(paper("7B", 4096))
    with pytest.raises(ValueError, match="an alignment of 12 tokens is not a positive multiple of 8"):
        balanced(model, 2, multiple=8, align=12)
    with pytest.raises(ValueError, match=r"holds 2 blocks of 2048 tokens, fewer than the 4 segments"):
        balanced(model, 4, align=2048)
    with pytest.raises(ValueError, match="give one per segment"):
        from_lengths(model, [4096], 2)
