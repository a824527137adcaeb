"""Flags of FlexSP: what is refused by name with the reason, before any process group exists."""

import os
import sys
from argparse import Namespace
from typing import Any

import pytest

from megatron.longseq.flexsp import from_args
from megatron.longseq.flexsp.arguments import (
    NOT_WITH_FLEXSP,
    check_flexsp_numbers,
    parse_degrees,
    parse_kinds,
    wants_flexsp,
)
from megatron.longseq.flexsp.from_args import (
    check_batches,
    check_plannable,
    cost_model,
    degrees_of,
    group_places,
    planner_of,
)
from megatron.longseq.flexsp.runtime.conversations import check_conversations, jsonl_files
from megatron.longseq.refusals import refused
from tests.distributed.flags import TINY, flags
from tests.pool import RankPool
from tests.unit.test_pipeline_flags import MOE
from tests.unit.test_pipeline_flags import args as known_args

SERVED: dict[str, Any] = {
    "flexsp": True,
    "flexsp_max_tokens_per_rank": 64,
    "attention_dropout": 0.0,
    "transformer_impl": "local",
    "micro_batch_size": 1,
    "eval_micro_batch_size": 1,
    "dataloader_type": None,
    "mock_data": False,
    "data_parallel_size": 8,
    "num_layers": 4,
    "hidden_size": 64,
    "kv_channels": 16,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 256,
    "vocab_size": 256,
}
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("--attention-dropout", {"attention_dropout": 0.1}),
    ("--multi-latent-attention", {"multi_latent_attention": True}),
    ("--is-hybrid-model", {"is_hybrid_model": True}),
    ("--experimental-attention-variant", {"experimental_attention_variant": "dsa"}),
    ("--softmax-type", {"softmax_type": "learnable"}),
    ("--qk-clip", {"qk_clip": True}),
    ("--window-size", {"window_size": (8, 8)}),
    ("--mtp-num-layers", {"mtp_num_layers": 1}),
    ("--hybrid-context-parallel", {"hybrid_context_parallel": True}),
    ("--cuda-graph-impl", {"cuda_graph_impl": "local"}),
    ("--position-embedding-type mrope", {"position_embedding_type": "mrope"}),
    ("--context-parallel-size", {"context_parallel_size": 2}),
    ("--cp-comm-type", {"cp_comm_type": ["a2a"]}),
    ("--seq1f1b-splits", {"seq1f1b_splits": 2}),
    ("--dataloader-inter-document-masking", {"dataloader_inter_document_masking": True}),
    ("--reset-attention-mask", {"reset_attention_mask": True}),
    ("--micro-batch-size", {"micro_batch_size": 2}),
    ("--mock-data", {"mock_data": True}),
    ("--dataloader-type", {"dataloader_type": "cyclic"}),
    ("--dataloader-defer-npy-index-mmap", {"dataloader_defer_npy_index_mmap": True}),
    ("--full-validation", {"full_validation": True}),
    ("--step-batch-size-schedule", {"step_batch_size_schedule": "0:8"}),
    ("--phase-transition-iterations", {"phase_transition_iterations": [2]}),
    ("--decrease-batch-size-if-needed", {"decrease_batch_size_if_needed": True}),
    ("--iterations-to-skip", {"iterations_to_skip": [2]}),
    ("--moe-router-load-balancing-type", MOE | {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1}),
    ("--moe-z-loss-coeff", MOE | {"moe_z_loss_coeff": 1e-3}),
    ("--moe-expert-capacity-factor", MOE | {"moe_expert_capacity_factor": 1.0}),
    ("--moe-router-enable-expert-bias", MOE | {"moe_router_enable_expert_bias": True}),
    ("--expert-model-parallel-size", MOE | {"expert_model_parallel_size": 2}),
    ("--use-megatron-fsdp", {"use_megatron_fsdp": True}),
    ("--tp-comm-overlap", {"tp_comm_overlap": True}),
    ("--fp8-format", {"fp8": "e4m3"}),
    ("--logits-save-dir", {"logits_save_dir": "here"}),
    ("--perform-rl-step", {"perform_rl_step": True}),
    (
        "--pipeline-model-parallel-size with --flexsp-refit",
        {"flexsp_refit": True, "pipeline_model_parallel_size": 2},
    ),
    ("--tensor-parallel-num-weight-shards", {"gtp_weight_remat_size": 2}),
]


VALIDATED = ("data_parallel_size", "flexsp_node_ranks")  # what validation adds


def args(**values: Any) -> Namespace:
    """Return validated arguments with some values changed."""
    given = known_args(**{name: value for name, value in values.items() if name not in VALIDATED})
    return Namespace(**vars(given), **{name: values.get(name) for name in VALIDATED})


@pytest.mark.parametrize(("flag", "values"), REFUSED)
def test_what_flexsp_does_not_support_is_named(flag: str, values: dict[str, Any]) -> None:
    (line,) = refused(args(**SERVED | values), NOT_WITH_FLEXSP)
    assert line.startswith(f"  {flag}: ")


def test_every_refusal_is_tried() -> None:
    assert {flag for flag, _ in REFUSED} == set(NOT_WITH_FLEXSP)
    assert refused(args(**SERVED), NOT_WITH_FLEXSP) == refused(args(**SERVED | MOE), NOT_WITH_FLEXSP) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flexsp": False, "flexsp_max_tokens_per_rank": None, "flexsp_degrees": "2"}, "--flexsp is not given"),
        ({"flexsp": False}, "--flexsp is not given"),
        ({"flexsp_max_tokens_per_rank": None}, "--flexsp-max-tokens-per-rank T"),
        ({"flexsp_max_tokens_per_rank": 0}, "at least 1"),
        ({"flexsp_batch_tokens": 0}, "at least 1"),
        ({"flexsp_plan_ahead": 0}, "at least 1"),
        ({"flexsp_save_cost": "cost.json"}, "--flexsp-refit is not given"),
        ({"flexsp_refit": True, "flexsp_save_cost": "/dev/null/cost.json"}, "a folder that this process can write"),
        ({"flexsp_degrees": "2,2"}, "each once"),
        ({"flexsp_degrees": "0,2"}, "above 0"),
        ({"flexsp_degrees": "two"}, "whole numbers"),
        ({"flexsp_kinds": "ulysses,tree"}, "ulysses, ring, hybrid"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_flexsp_numbers(args(**SERVED | values))


def test_values_are_read() -> None:
    assert (parse_degrees("auto"), parse_degrees("4,1,3")) == (None, (1, 3, 4))
    assert parse_kinds("ring") == ("ring",)
    assert wants_flexsp(args(**SERVED)) and not wants_flexsp(Namespace())
    check_flexsp_numbers(args(**SERVED))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flexsp_degrees": "16"}, "groups of 16 ranks have no place on 8"),
        ({"flexsp_degrees": "4", "flexsp_node_ranks": 2, "data_parallel_size": 3}, "no place on 3"),
        ({"flexsp_degrees": "8", "flexsp_kinds": "ulysses"}, "4 query heads"),
        ({"flexsp_max_tokens_per_rank": 31}, "needs 32 tokens on each rank of the largest group"),
        ({"flexsp_degrees": "1,2"}, "needs 128 tokens"),
        ({"flexsp_cost": "/no/such/file.json"}, "/no/such/file.json"),
    ],
)
def test_plans_that_cannot_exist_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_plannable(args(**SERVED | values), on_gpu=False)


@pytest.mark.parametrize(
    ("path", "message"),
    [("none.jsonl", "neither a jsonl file nor"), (__file__, "local folder of a Hugging Face tokenizer")],
)
def test_conversations_that_cannot_be_tokenized_are_refused(path: str, message: str) -> None:
    files = jsonl_files((["1", path], None), [None, (["1"], None)])
    assert files == ["1", path]
    with pytest.raises(ValueError, match=message):
        check_conversations(args(tokenizer_model="no/such/folder"), files[1:])


def test_batches_in_tokens_of_a_blend_are_refused() -> None:
    given = args(**SERVED | {"flexsp_batch_tokens": 100})
    check_batches(given, (["one"], None), None)
    check_batches(given, None, [(["one"], [1.0]), None])
    check_batches(args(**SERVED), (["one", "two"], None), None)
    for data in (((["one"], [1.0]), None), ((["one", "two"], None), None), (None, [(["one", "two"], None), None])):
        with pytest.raises(ValueError, match="--flexsp-batch-tokens 100: upstream makes the order of a blend"):
            check_batches(given, *data)


def test_groups_are_aligned_and_every_rank_can_be_alone() -> None:
    given = args(**SERVED | {"flexsp_degrees": "3,4"})
    places = group_places(given)
    assert {mesh.size for mesh, _ in places} == {1, 3, 4}
    assert all(ranks[0] % mesh.size == 0 and len(ranks) == mesh.size for mesh, ranks in places)
    assert [ranks for mesh, ranks in places if mesh.size == 1] == [(rank,) for rank in range(8)]
    assert {(mesh.ulysses, mesh.ring) for mesh, _ in places if mesh.size == 4} == {(1, 4), (2, 2), (4, 1)}
    check_plannable(given, on_gpu=False)
    assert degrees_of(args(**SERVED)) == (1, 2, 3, 4, 6, 8)


@pytest.mark.parametrize("planner", ["heuristic", "static", "sorted", "exact"])
def test_a_plan_that_loses_a_document_is_not_run(planner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = args(**SERVED | {"flexsp_planner": planner, "flexsp_degrees": "1,2,4,8"})
    cost, lengths = cost_model(given, on_gpu=False), [200, 3, 64, 64, 17]
    assert planner_of(given)(lengths, cost=cost).microbatches
    of_four = from_args.plan_step(lengths[:4], 8, cost, (1, 2, 4, 8))
    monkeypatch.setattr(from_args, "plan_step", lambda *_, **__: of_four)
    with pytest.raises(ValueError, match=r"plan of 5 sequences: \[\] are planned twice, \[4\] not at all"):
        planner_of(given)(lengths, cost=cost)


def validated(case: list[str]) -> Any:
    """Validate flags on a rank; return what became of them, or the refusal."""
    import patches

    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    sys.argv = ["pretrain_gpt.py", *case]
    patches.start()
    from megatron.training import arguments

    try:
        given: Namespace = arguments.parse_args()
        arguments.validate_args(given)
    except ValueError as error:
        return str(error)
    return given.calculate_per_token_loss, given.dataloader_type, given.variable_seq_lengths


OWN = "--flexsp --flexsp-max-tokens-per-rank 64"


@pytest.mark.parametrize(
    ("own", "found"),
    [
        (OWN, (True, "external", False)),
        (f"{OWN} --attention-dropout 0.1", "--attention-dropout with --flexsp"),
        ("--flexsp", "--flexsp-max-tokens-per-rank T"),
        ("--flexsp --flexsp-max-tokens-per-rank 32", "needs 64 tokens"),
    ],
)
def test_upstreams_validation_refuses_what_flexsp_does_not_support(ranks: RankPool, own: str, found: Any) -> None:
    given = [flag for flag in flags(TINY, own) if flag != "--mock-data"]
    result = ranks.run(1, validated, given)[0]
    assert found in result if isinstance(found, str) else result == found
