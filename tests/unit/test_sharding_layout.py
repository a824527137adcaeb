"""Buckets contain whole units, every parameter occurs once, and every bucket divides into equal shards."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.sharding.runtime.bucket_layout import (
    BUCKET_ALIGNMENT,
    PARAM_ALIGNMENT,
    by_unit,
    lay_out,
    unit_of,
    units_of,
)

NAMES = {
    "module.embedding.word_embeddings.weight": "module.embedding",
    "embedding.position_embeddings.weight": "embedding",
    "module.module.decoder.layers.3.mlp.linear_fc1.weight": "module.module.decoder.layers.3",
    "decoder.layers.11.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.11",
    "decoder.final_layernorm.weight": "decoder.final_layernorm",
    "output_layer.weight": "output_layer",
}


def model(sizes: list[list[int]], shared: bool = False) -> list[tuple[str, torch.nn.Parameter]]:
    """Return parameters of an embedding, layers of these sizes, and an output layer."""
    named = [("embedding.word_embeddings.weight", torch.nn.Parameter(torch.empty(700)))]
    named[0][1].shared_embedding = shared  # type: ignore[attr-defined]
    for layer, elements in enumerate(sizes):
        for number, size in enumerate(elements):
            named.append((f"decoder.layers.{layer}.weight{number}", torch.nn.Parameter(torch.empty(size))))
    return [*named, ("output_layer.weight", torch.nn.Parameter(torch.empty(300)))]


def test_units_are_layers_embeddings_and_holders() -> None:
    assert {name: unit_of(name) for name in NAMES} == NAMES


def test_what_follows_the_layers_of_a_block_belongs_to_the_last_one() -> None:
    layers = [f"{block}.layers.{layer}.weight" for block in ("decoder", "mtp") for layer in (0, 1)]
    names = ["embedding.weight", *layers[:2], "decoder.final_layernorm.weight", *layers[2:], "output_layer.weight"]
    units = units_of(names)
    assert units.pop("decoder.final_layernorm.weight") == "decoder.layers.1"
    assert units == {name: unit_of(name) for name in units}
    alone = ["decoder.final_layernorm.weight", "output_layer.weight"]
    assert units_of(alone) == {name: unit_of(name) for name in alone}, "a stage without layers"


def test_units_keep_their_parameters_in_order() -> None:
    units = by_unit(model([[1, 2], [3]]))
    assert [name for name, _ in units["decoder.layers.0"]] == ["decoder.layers.0.weight0", "decoder.layers.0.weight1"]
    assert list(units) == ["embedding", "decoder.layers.0", "decoder.layers.1", "output_layer"]


@given(
    st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=4), min_size=1, max_size=5),
    st.integers(1, 12),
    st.sampled_from([0, 400, 10**9]),
    st.booleans(),
)
def test_every_parameter_has_its_place(sizes: list[list[int]], ranks: int, at_least: int, shared: bool) -> None:
    named = model(sizes, shared)
    made = lay_out(named, ranks, at_least)
    assert list(made.places) == [param for _, param in reversed(named)]
    end, buckets = 0, []
    for param, (first, last, bucket) in made.places.items():
        begin, after = made.bounds[bucket]
        assert last - first == param.numel() and first % PARAM_ALIGNMENT == 0
        assert max(begin, end) <= first and last <= after  # none overlaps the one before, all lie in their bucket
        end = last
        buckets.append(bucket)
    assert buckets == sorted(buckets) and set(buckets) == set(range(len(made.bounds)))
    assert all(size > 0 and size % ranks == 0 and size % BUCKET_ALIGNMENT == 0 for size in made.sizes)
    assert [begin for begin, _ in made.bounds] == [0, *(after for _, after in made.bounds[:-1])]


@given(st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=4), min_size=1, max_size=5), st.booleans())
def test_buckets_end_where_units_do(sizes: list[list[int]], alone: bool) -> None:
    named = model(sizes)
    made = lay_out(named, 4, 0 if alone else 400)
    units: dict[int, set[str]] = {}
    for name, param in named:
        units.setdefault(made.places[param][2], set()).add(unit_of(name))
    split = [
        unit
        for unit in {unit_of(name) for name, _ in named}
        if sum(unit in unit_set for unit_set in units.values()) > 1
    ]
    assert not split
    if alone:
        assert all(len(unit_set) == 1 for unit_set in units.values())


def test_a_weight_of_both_ends_of_a_pipeline_is_alone() -> None:
    named = model([[10], [20]], shared=True)
    made = lay_out(named, 2, 10**9)
    bucket = made.places[named[0][1]][2]
    assert [place[2] for place in made.places.values()].count(bucket) == 1
    assert len(made.bounds) == 2


def test_padding_beyond_shards() -> None:
    made = lay_out(model([[10]]), 3, 10**9, padding=2**16)
    assert made.sizes == [3 * 2**16]
