"""The flags of context parallelism: the layouts that they select, and the combinations that are refused."""

import os
import sys
from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron.longseq.attention.arguments import (
    NOT_IN_TE_LAYERS,
    NOT_WITH_CONTEXT,
    check_context_numbers,
    refuse_unserved_context,
    refuse_unserved_te_attention,
    serves_core_attention,
    wants_context,
)
from megatron.longseq.attention.plan.comm_type import (
    CommType,
    choose_comm_type,
    comm_types,
    layer_comm_type,
    mesh_of_sizes,
    validate_comm_types,
)
from megatron.longseq.attention.plan.layout import Mesh
from tests.distributed.flags import TINY, flags
from tests.pool import RankPool
from tests.unit.test_pipeline_flags import args

SERVED = {"attention_dropout": 0.0}
MODEL = {"num_layers": 4, "num_attention_heads": 8, "group_query_attention": True, "num_query_groups": 2}

# Every way to ask for what attention over context-parallel ranks cannot serve: (flag in the message, values, why)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("--attention-dropout", {"attention_dropout": 0.1}, "give 0"),
    ("--multi-latent-attention", {"multi_latent_attention": True}, "different sizes"),
    ("--is-hybrid-model", {"is_hybrid_model": True}, "recurrent"),
    ("--is-hybrid-model", {"hybrid_layer_pattern": "M*-"}, "recurrent"),
    ("--is-hybrid-model", {"linear_attention_freq": 2}, "recurrent"),
    ("--experimental-attention-variant", {"experimental_attention_variant": "dsa"}, "its own core attention"),
    ("--softmax-type", {"softmax_type": "learnable"}, "plain softmax"),
    ("--qk-clip", {"qk_clip": True}, "logits"),
    ("--qk-clip", {"log_max_attention_logit": True}, "logits"),
    ("--window-size", {"window_size": (8, 8)}, "not causal"),
    ("--mtp-num-layers", {"mtp_num_layers": 1}, "not tested with context"),
    ("--hybrid-context-parallel", {"hybrid_context_parallel": True}, "from batch to batch"),
    ("--cuda-graph-impl", {"cuda_graph_impl": "local"}, "graph"),
]


# As ASKED, of our attention in TransformerEngine's layers.
ASKED_IN_TE_LAYERS: list[tuple[str, dict[str, Any], str]] = [
    ("--transformer-impl inference_optimized", {"transformer_impl": "inference_optimized"}, "for inference"),
    ("--heterogeneous-layers-config-path", {"heterogeneous_layers_config_path": "file"}, "name TransformerEngine's"),
    ("--heterogeneous-layers-config-path", {"heterogeneous_layers_config_encoded_json": "{}"}, "themselves"),
    ("--use-kitchen-attention", {"use_kitchen_attention": True}, "Kitchen's attention"),
]


def refused(given: Namespace, **layers: bool) -> list[str]:
    """Return the lines of the refusal, or none."""
    try:
        refuse_unserved_context(given, **layers)
    except ValueError as error:
        return str(error).splitlines()[1:]
    return []


@pytest.mark.parametrize(("flag", "values", "why"), REFUSED)
def test_refuses_by_name_and_reason(flag: str, values: dict[str, Any], why: str) -> None:
    lines = refused(args(**SERVED | values))
    assert len(lines) == 1 and lines[0].startswith(f"  {flag} with --context-parallel-size: ") and why in lines[0]


@pytest.mark.parametrize(("flag", "values", "why"), ASKED_IN_TE_LAYERS)
def test_refuses_other_attention_in_te_layers(flag: str, values: dict[str, Any], why: str) -> None:
    given = args(**SERVED | values)
    (line,) = refused(given, is_local=False)
    assert line.startswith(f"  {flag} with --context-parallel-attention longseq: ") and why in line
    assert refused(given) == []


def test_every_refusal_is_tried() -> None:
    assert {flag for flag, _, _ in REFUSED} == set(NOT_WITH_CONTEXT)
    assert {flag for flag, _, _ in ASKED_IN_TE_LAYERS} == set(NOT_IN_TE_LAYERS)


@pytest.mark.parametrize(
    ("choice", "splits", "in_local_layers", "in_te_layers"),
    [
        ("auto", 1, True, False),
        ("auto", 4, True, True),
        ("longseq", 1, True, True),
        ("longseq", 4, True, True),
        ("transformer_engine", 1, False, False),
    ],
)
def test_whose_attention_it_is(choice: str, splits: int, in_local_layers: bool, in_te_layers: bool) -> None:
    given = args(context_parallel_attention=choice, seq1f1b_splits=splits)
    assert serves_core_attention(given, is_local=True) is in_local_layers
    assert serves_core_attention(given, is_local=False) is in_te_layers


def test_te_attention_is_refused_where_it_cannot_be() -> None:
    theirs = {"context_parallel_attention": "transformer_engine"}
    refuse_unserved_te_attention(args(), is_installed=False)
    refuse_unserved_te_attention(args(**theirs), is_installed=True)
    with pytest.raises(ValueError, match="transformer_engine: it does not see the keys of earlier segments"):
        refuse_unserved_te_attention(args(**theirs, seq1f1b_splits=2), is_installed=True)
    with pytest.raises(ValueError, match="transformer_engine: TransformerEngine is not installed here, or there is no"):
        refuse_unserved_te_attention(args(**theirs), is_installed=False)


def test_all_reasons_are_told_at_once() -> None:
    lines = refused(args(attention_dropout=0.1, qk_clip=True, mtp_num_layers=1))
    assert [line.split()[0] for line in lines] == ["--attention-dropout", "--qk-clip", "--mtp-num-layers"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"window_size": (8, 0)},
        {"window_size": (-1, -1)},
        {"hidden_dropout": 0.1},
        {"reset_attention_mask": True},
        {"reset_attention_mask": True, "pipeline_model_parallel_size": 4},
        {"reset_attention_mask": True, "create_attention_mask_in_dataloader": False},
        {"sft": True},
        {"dataloader_inter_document_masking": True},
        {"reset_attention_mask": True, "pipeline_model_parallel_size": 4, "seq1f1b_splits": 2},
        {"create_attention_mask_in_dataloader": False},
        {"recompute_granularity": "full"},
        {"calculate_per_token_loss": True},
        {"num_experts": 4},
        {"seq1f1b_splits": 4},
    ],
    ids=str,
)
def test_what_is_served_is_let_through(values: dict[str, Any]) -> None:
    assert refused(args(**SERVED | values)) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context_parallel_size": 4, "ring_window": 0}, "--ring-window 0: give at least 1"),
        ({"ring_window": 2}, "--ring-window 2: --context-parallel-size is 1, so it has no effect"),
        ({"context_parallel_auto": True}, "--context-parallel-auto: --context-parallel-size is 1"),
        (
            {"context_parallel_attention": "longseq"},
            "--context-parallel-attention longseq: --context-parallel-size is 1",
        ),
        (
            {"context_parallel_placement": "context-first"},
            "--context-parallel-placement context-first: --context-parallel-size is 1",
        ),
    ],
)
def test_flags_that_mean_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_context_numbers(args(**values))


def test_flags_that_mean_something_pass() -> None:
    check_context_numbers(args())
    check_context_numbers(args(context_parallel_size=2, context_parallel_auto=True, ring_window=1))
    check_context_numbers(Namespace())  # a script's own namespace, without our flags
    assert [wants_context(given) for given in (args(), args(context_parallel_size=2), Namespace())] == [0, 1, 0]


HYBRID = {"cp_comm_type": ["a2a+p2p"], "hierarchical_context_parallel_sizes": [2, 4]}


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, {"p2p": CommType(Mesh(1, 8))}),
        ({"cp_comm_type": ["a2a"]}, {"a2a": CommType(Mesh(8, 1))}),
        ({"cp_comm_type": ["all_gather"]}, {"all_gather": CommType(Mesh(1, 8), gathers=True)}),
        (HYBRID, {"a2a+p2p": CommType(Mesh(2, 4))}),
        (
            HYBRID | {"context_parallel_placement": "context-first"},
            {"a2a+p2p": CommType(Mesh(2, 4, "context-first"))},
        ),
        (
            HYBRID | {"cp_comm_type": ["p2p", "a2a+p2p", "p2p", "a2a"]},
            {"p2p": CommType(Mesh(1, 8)), "a2a+p2p": CommType(Mesh(2, 4)), "a2a": CommType(Mesh(8, 1))},
        ),
    ],
    ids=str,
)
def test_what_the_flags_spread(values: dict[str, Any], wanted: dict[str, CommType]) -> None:
    given = args(**MODEL | {"context_parallel_size": 8} | values)
    assert validate_comm_types(given, (64, 32)) == comm_types(given) == wanted


def test_the_kind_of_a_layer() -> None:
    assert [layer_comm_type(given, 3) for given in (None, "a2a", ["a2a"], ["p2p", "p2p", "a2a", "p2p"])] == [
        "p2p",
        "a2a",
        "a2a",
        "a2a",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cp_comm_type": ["ring"]}, r"--cp-comm-type ring: give p2p, a2a, a2a\+p2p, all_gather, for all layers"),
        ({"cp_comm_type": ["p2p", "a2a"]}, "--cp-comm-type p2p a2a: 2 types for --num-layers 4; give one for all"),
        ({"cp_comm_type": ["a2a+p2p"]}, "--hierarchical-context-parallel-sizes nothing: give two sizes"),
        (HYBRID | {"hierarchical_context_parallel_sizes": [2, 2]}, "sizes 2 2: give two sizes.* product is .*-size 8"),
        (HYBRID | {"hierarchical_context_parallel_sizes": [2, 2, 2]}, "sizes 2 2 2: give two sizes"),
        ({"hierarchical_context_parallel_sizes": [2, 4]}, r"needs --cp-comm-type a2a\+p2p; give both"),
        ({"context_parallel_placement": "context-first"}, r"placement needs --cp-comm-type a2a\+p2p; give both"),
        ({"ring_window": 3}, r"windows of 3 do not divide a ring of 8 ranks; give \[1, 2, 4, 8\]"),
        (HYBRID | {"ring_window": 8}, "windows of 8 do not divide a ring of 4 ranks"),
        ({"ring_window": 2, "cp_comm_type": ["a2a"]}, "--ring-window 2: no layer uses a ring"),
        ({"ring_window": 2, "cp_comm_type": ["all_gather"]}, "--ring-window 2: no layer uses a ring"),
        (
            {"cp_comm_type": ["a2a"], "num_attention_heads": 12, "num_query_groups": 12},
            "12 query heads cannot be shared by 8 ranks. Possible degrees: .*a2a.p2p --hierarchical-.*-sizes 4 2",
        ),
        (
            {"cp_comm_type": ["a2a"], "num_attention_heads": 24, "num_query_groups": 6},
            "8 does not divide the 6 key-value heads, or the reverse",
        ),
        ({"cp_comm_type": ["a2a"], "tensor_model_parallel_size": 2}, "with 4 query heads and 1 key-value heads"),
        (
            {
                "sequence_parallel": True,
                "tensor_model_parallel_size": 3,
                "num_attention_heads": 6,
                "num_query_groups": 3,
            },
            "segment 0 of 2 has 64 tokens.*3 tensor-parallel ranks; give a multiple of 48",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_comm_types(args(**MODEL | {"context_parallel_size": 8} | values), (64, 32))


def test_segments_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        ValueError, match="segment 1 of 2 has 24 tokens: it is cut into 2 chunks per context-parallel rank, of 8"
    ):
        validate_comm_types(args(**MODEL, context_parallel_size=8), (32, 24))


@pytest.mark.parametrize(
    ("size", "node", "values", "kind", "sizes"),
    [
        (8, 8, {}, "a2a", None),
        (8, 4, {}, "a2a+p2p", [4, 2]),
        (8, 2, {}, "a2a+p2p", [2, 4]),
        (8, 1, {}, "p2p", None),
        (8, 8, {"tensor_model_parallel_size": 2}, "a2a+p2p", [4, 2]),  # 4 query heads a rank, 4 places of a node
        (4, 8, {"num_attention_heads": 6, "num_query_groups": 6}, "a2a+p2p", [2, 2]),
        (4, 8, {"group_query_attention": False}, "a2a", None),
        (2, 8, {"num_attention_heads": 7, "group_query_attention": False}, "p2p", None),
    ],
)
def test_the_largest_all_to_all_inside_a_node_is_chosen(
    size: int, node: int, values: dict[str, Any], kind: str, sizes: list[int] | None
) -> None:
    given = args(**MODEL | {"context_parallel_size": size} | values)
    choose_comm_type(given, node)
    assert (given.cp_comm_type, given.hierarchical_context_parallel_sizes) == ([kind], sizes)
    (way,) = validate_comm_types(given, (128,)).values()
    assert way.mesh.size == size
    if sizes:
        assert mesh_of_sizes(given) == Mesh(*sizes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "--context-parallel-auto: --context-parallel-size is 1"),
        ({"context_parallel_size": 4, "cp_comm_type": ["a2a"]}, "--context-parallel-auto sets --cp-comm-type"),
        (
            {"context_parallel_size": 4, "hierarchical_context_parallel_sizes": [2, 2]},
            "and --hierarchical-context-parallel-sizes, and one of them is given",
        ),
    ],
    ids=str,
)
def test_nothing_is_chosen_twice(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_comm_type(args(**MODEL | values), 8)


def what_upstreams_validation_says(cases: list[list[str]]) -> list[tuple[str | None, Any, Any]]:
    """Parse and validate each command line as one of four ranks would; return what is refused and what is set."""
    os.environ |= {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    import patches

    patches.start()
    from megatron.training import arguments

    messages: list[tuple[str | None, Any, Any]] = []
    for case in cases:
        sys.argv = ["pretrain_gpt.py", *case]
        message, parsed = None, None
        try:
            parsed = arguments.parse_args()
            arguments.validate_args(parsed)
        except ValueError as error:
            message = str(error)
        messages.append(
            (
                message,
                getattr(parsed, "cp_comm_type", None),
                getattr(parsed, "hierarchical_context_parallel_sizes", None),
            )
        )
        assert not torch.distributed.is_initialized()
    return messages


def messages(ranks: RankPool, *cases: str) -> list[tuple[str | None, Any, Any]]:
    """Return the messages about the tiny model; all cases run under the same patches."""
    lines = [flags(TINY, case) for case in cases]
    result: list[tuple[str | None, Any, Any]] = ranks.run(1, what_upstreams_validation_says, lines)[0]
    return result


CP4 = "--context-parallel-size 4"


def assert_refusals(ranks: RankPool, cases: dict[str, str | None]) -> None:
    """Check what is refused, and that the rest passes."""
    for case, (message, _, _), want in zip(cases, messages(ranks, *cases), cases.values(), strict=True):
        assert (message is None) == (want is None), (case, message)
        assert want is None or (message is not None and want in message), (case, message)


def test_upstreams_validation_refuses_what_context_cannot_serve(ranks: RankPool) -> None:
    hybrid = f"{CP4} --cp-comm-type a2a+p2p"
    cases: dict[str, str | None] = {
        CP4: None,
        f"{hybrid} --hierarchical-context-parallel-sizes 2 2": None,
        f"{hybrid} --hierarchical-context-parallel-sizes 2 2 --context-parallel-placement context-first": None,
        hybrid: "--hierarchical-context-parallel-sizes nothing: give two sizes",
        f"{hybrid} --hierarchical-context-parallel-sizes 4 2": "whose product is --context-parallel-size 4",
        f"{CP4} --attention-dropout 0.1": "--attention-dropout with --context-parallel-size: the flash kernels",
        f"{CP4} --softmax-type learnable": "--softmax-type with --context-parallel-size: the attention kernels",
        f"{CP4} --window-size 8,8": "--window-size with --context-parallel-size: a window that includes later tokens",
        f"{CP4} --cp-comm-type ring": "--cp-comm-type ring: give p2p",
        f"{CP4} --cp-comm-type p2p a2a": "2 types for --num-layers 4",
        f"{CP4} --cp-comm-type a2a --num-attention-heads 6 --num-query-groups 3 --kv-channels 16": "Possible degrees:",
        f"{CP4} --ring-window 3": "windows of 3 do not divide a ring of 4 ranks",
        "--ring-window 2": "--ring-window 2: --context-parallel-size is 1",
        "--context-parallel-auto": "--context-parallel-auto: --context-parallel-size is 1",
        f"{CP4} --context-parallel-attention longseq": None,
        f"{CP4} --context-parallel-auto --cp-comm-type a2a": "--context-parallel-auto sets --cp-comm-type",
    }
    assert_refusals(ranks, cases)


def test_upstreams_validation_refuses_te_attention_without_a_gpu(ranks: RankPool) -> None:
    assert_refusals(
        ranks, {f"{CP4} --context-parallel-attention transformer_engine": "TransformerEngine is not installed"}
    )


def test_upstreams_validation_refuses_segments_that_ranks_cannot_share(ranks: RankPool) -> None:
    cases: dict[str, str | None] = {
        f"{CP4} --ring-window 2 --seq1f1b-splits 4": None,
        f"{CP4} --seq1f1b-splits 4 --seq1f1b-partition 24,16,16,8": None,
        f"{CP4} --seq1f1b-splits 4 --seq1f1b-partition 16,16,20,12": "20 is not a positive multiple of 8 (each",
    }
    assert_refusals(ranks, cases)


def test_auto_chooses_before_upstream_validates(ranks: RankPool) -> None:
    found = messages(ranks, f"{CP4} --context-parallel-auto", f"{CP4} --context-parallel-auto --num-attention-heads 2")
    assert found == [(None, ["a2a"], None), (None, ["a2a+p2p"], [2, 2])]
