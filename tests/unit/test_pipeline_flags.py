"""The flags of the pipeline schedules: the combinations that are refused, and the plans that they give."""

import argparse
import functools
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from torch import nn

from megatron.longseq.arguments import add_longseq_arguments
from megatron.longseq.attention.module import refuse_inputs, refuse_mask_type, refuse_window
from megatron.longseq.pipeline.arguments import (
    NOT_IN_SCHEDULES,
    NOT_IN_SEGMENTS,
    NOT_WITH_ZERO_BUBBLE,
    check_pipeline_numbers,
    check_trace_step,
    refuse_unserved,
    wants_our_schedule,
)
from megatron.longseq.pipeline.forward_backward import ForwardBackward
from megatron.longseq.pipeline.plan import partition
from megatron.longseq.pipeline.plan.from_args import model_shape, plan_from_args, segment_lengths, stage_layers
from megatron.longseq.pipeline.plan.segment_cost import ModelShape
from megatron.longseq.pipeline.runtime.segmented_model import SegmentedModel
from patches.seq1f1b.checks import refuse_stages
from tests.distributed.flags import TINY, flags
from tests.pool import RankPool

# What upstream's validation adds to what its parser knows.
VALIDATED = {
    "virtual_pipeline_model_parallel_size": None,
    "variable_seq_lengths": False,
    "gtp_weight_remat_size": 1,
    "expert_gtp_weight_remat_size": 1,
    "padded_vocab_size": None,
}
MOE = {"num_experts": 4, "moe_router_load_balancing_type": "none"}
SEGMENTS = {"seq1f1b_splits": 4}
SLACK = {"seq1f1b_slack": 1}
SMALL_PIPE = {"pipeline_model_parallel_size": 2}
ZERO_BUBBLE = {"zero_bubble": True, "transformer_impl": "local"}

# Every way to ask for what segments cannot serve: (flag in the message, values, why)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("--multi-latent-attention", {"multi_latent_attention": True}, "latents"),
    ("--mtp-num-layers", {"mtp_num_layers": 1}, "labels of the next segment"),
    ("--is-hybrid-model", {"is_hybrid_model": True}, "state"),
    ("--is-hybrid-model", {"hybrid_layer_pattern": "M*-"}, "state"),
    ("--is-hybrid-model", {"linear_attention_freq": 2}, "state"),
    ("--experimental-attention-variant", {"experimental_attention_variant": "dsa"}, "the keys of earlier segments"),
    ("--softmax-type", {"softmax_type": "learnable"}, "plain softmax"),
    ("--position-embedding-type mrope", {"position_embedding_type": "mrope"}, "positions"),
    ("--qk-clip", {"qk_clip": True}, "logits"),
    ("--qk-clip", {"log_max_attention_logit": True}, "logits"),
    ("--window-size", {"window_size": (8, 8)}, "keys of later segments"),
    (
        "--attention-backend flash with --attention-dropout",
        {"attention_backend": AttnBackend.flash, "attention_dropout": 0.1},
        "do not implement dropout",
    ),
    ("--fp8-format", {"fp8": "hybrid"}, "scaling factors"),
    ("--fp8-format", {"fp4": "e2m1"}, "scaling factors"),
    ("--tp-comm-overlap", {"tp_comm_overlap": True}, "whole sequence"),
    (
        "--moe-router-load-balancing-type",
        MOE | {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
        "whole micro-batch",
    ),
    (
        "--moe-router-load-balancing-type",
        MOE | {"moe_router_load_balancing_type": ["none", "seq_aux_loss"], "moe_aux_loss_coeff": [0.0, 0.1]},
        "whole micro-batch",
    ),
    ("--moe-router-load-balancing-type", MOE | {"moe_router_load_balancing_type": "sinkhorn"}, "whole micro-batch"),
    (
        "--moe-router-load-balancing-type",
        MOE | {"moe_router_load_balancing_type": ["quantile_balancing"]},
        "whole micro-batch",
    ),
    ("--moe-z-loss-coeff", MOE | {"moe_z_loss_coeff": 1e-3}, "mean over the whole micro-batch"),
    ("--moe-expert-capacity-factor", MOE | {"moe_expert_capacity_factor": 1.0}, "dropped"),
    ("--moe-expert-capacity-factor", MOE | {"moe_expert_rank_capacity_factor": 1.0}, "dropped"),
    ("--logits-save-dir", {"logits_save_dir": "here"}, "calls of the output layer"),
    ("--save-activations-interval", {"save_activations_interval": 1}, "last forward"),
    ("--save-dgrads-interval", {"save_dgrads_interval": 1}, "last backward"),
    ("--save-tokens-per-expert-interval", MOE | {"save_tokens_per_expert_interval": 1}, "every forward"),
    ("--moe-routing-trace-path", MOE | {"moe_routing_trace_path": "here"}, "every forward"),
]
IN_SCHEDULES: list[tuple[str, dict[str, Any], str]] = [
    ("--overlap-moe-expert-parallel-comm", {"overlap_moe_expert_parallel_comm": True}, "one action"),
    ("--defer-embedding-wgrad-compute", {"defer_embedding_wgrad_compute": True}, "first in, first out"),
    ("--decoder-seq-length", {"decoder_seq_length": 32}, "one sequence length"),
    (
        "--full-validation with --eval-micro-batch-size",
        {"full_validation": True, "eval_micro_batch_size": 2, "pipeline_model_parallel_size": 2},
        "one sample at a time",
    ),
    ("--variable-seq-lengths", {"variable_seq_lengths": True}, "the plan fixes the shapes"),
    ("--moe-paged-stash", {"moe_paged_stash": True}, "order"),
    ("--hybrid-context-parallel", {"hybrid_context_parallel": True}, "its own schedule"),
    ("--cuda-graph-impl", {"cuda_graph_impl": "local"}, "graphs"),
    ("--fine-grained-activation-offloading", {"fine_grained_activation_offloading": True}, "reload the activations"),
    ("--fine-grained-activation-offloading", {"cpu_offloading_num_layers": 1}, "reload the activations"),
    ("--tensor-parallel-num-weight-shards", {"gtp_weight_remat_size": 2}, "not tested with our"),
    (
        "--expert-tensor-parallel-num-weight-shards",
        {"expert_gtp_weight_remat_size": 2},
        "not tested with our",
    ),
    ("--use-megatron-fsdp", {"use_megatron_fsdp": True}, "all-gathers and reduce-scatters"),
    ("--use-megatron-fsdp", {"use_torch_fsdp2": True}, "all-gathers and reduce-scatters"),
]
WITH_ZERO_BUBBLE: list[tuple[str, dict[str, Any], str]] = [
    ("--num-layers-per-virtual-pipeline-stage", {"virtual_pipeline_model_parallel_size": 2}, "one stage per rank"),
    ("--transformer-impl", {"transformer_impl": "transformer_engine"}, "--transformer-impl local"),
    ("--num-experts", {"num_experts": 4}, "both gradients together"),
    ("--delay-wgrad-compute", {"delay_wgrad_compute": True}, "same weight gradients"),
    ("--num-distributed-optimizer-instances", {"num_distributed_optimizer_instances": 2}, "twice"),
]


@functools.cache
def known() -> dict[str, Any]:
    """Return upstream's defaults and ours, from the parsers."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_longseq_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return vars(parser.parse_args([])) | VALIDATED


def args(**changed: Any) -> Namespace:
    """Return arguments as upstream's validation leaves them, with some values changed."""
    assert set(changed) <= set(known()), "upstream knows no such argument"
    return Namespace(**(known() | changed))


def refused(given: Namespace) -> list[str]:
    """Return the lines of the refusal, or none."""
    try:
        refuse_unserved(given)
    except ValueError as error:
        return str(error).splitlines()[1:]
    return []


def test_segment_lengths_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With context parallelism every micro-batch needs them."""
    file, calls = tmp_path / "layer.json", {"parse": 0, "read_text": 0}
    file.write_text("[[0, 8, 1.0, 2.0], [8, 24, 2.5, 5.0], [24, 64, 9.0, 20.0]]")
    given = args(**SMALL | SEGMENTS, seq1f1b_layer_seconds=str(file), context_parallel_size=2)
    for owner, name in ((partition, "parse"), (Path, "read_text")):
        original = getattr(owner, name)

        def counted(*values: Any, original: Any = original, name: str = name, **named: Any) -> Any:
            calls[name] += 1
            return original(*values, **named)

        monkeypatch.setattr(owner, name, counted)
    lengths = {segment_lengths(given) for _ in range(5)}
    assert len(lengths) == 1 and calls == {"parse": 1, "read_text": 1}
    given.padded_vocab_size = 1_000_000  # unknown when flags are validated: the tokenizer comes later
    assert segment_lengths(given) in lengths


@pytest.mark.parametrize(("flag", "values", "why"), REFUSED)
def test_segments_refuse_by_name_and_reason(flag: str, values: dict[str, Any], why: str) -> None:
    lines = refused(args(**SEGMENTS, **values))
    assert len(lines) == 1 and lines[0].startswith(f"  {flag} with --seq1f1b-splits: ") and why in lines[0]
    assert refused(args(**SLACK, **values)) == [], "whole sequences are served"


@pytest.mark.parametrize("asking", [SEGMENTS, SLACK, ZERO_BUBBLE, {"pipeline_trace": "here"}])
@pytest.mark.parametrize(("flag", "values", "why"), IN_SCHEDULES)
def test_every_schedule_of_ours_refuses(asking: dict[str, Any], flag: str, values: dict[str, Any], why: str) -> None:
    lines = refused(args(**asking, **values))
    assert len(lines) == 1 and lines[0].startswith(f"  {flag} with our pipeline schedules: ") and why in lines[0]


@pytest.mark.parametrize(("flag", "values", "why"), WITH_ZERO_BUBBLE)
def test_zero_bubble_refuses(flag: str, values: dict[str, Any], why: str) -> None:
    lines = refused(args(**ZERO_BUBBLE | values))
    assert len(lines) == 1 and lines[0].startswith(f"  {flag} with --zero-bubble: ") and why in lines[0]
    assert refused(args(**SEGMENTS, **values, moe_router_load_balancing_type="none")) == []


def test_every_refusal_is_tried() -> None:
    tried = {flag for flag, _, _ in (*REFUSED, *IN_SCHEDULES, *WITH_ZERO_BUBBLE)}
    assert tried == {*NOT_IN_SEGMENTS, *NOT_IN_SCHEDULES, *NOT_WITH_ZERO_BUBBLE}


def test_all_reasons_are_told_at_once() -> None:
    lines = refused(args(**SEGMENTS, zero_bubble=True, qk_clip=True, multi_latent_attention=True, moe_paged_stash=True))
    assert [line.split()[0] for line in lines] == [
        "--moe-paged-stash",
        "--multi-latent-attention",
        "--qk-clip",
        "--transformer-impl",
    ]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"window_size": (8, 0)},
        {"window_size": (-1, -1)},
        {"reset_attention_mask": True},
        {"reset_attention_mask": True, "create_attention_mask_in_dataloader": False},
        {"sft": True},
        {"dataloader_inter_document_masking": True},
        {"reset_position_ids": True, "eod_mask_loss": True},
        {"position_embedding_type": "yarn"},
        {"position_embedding_type": "none"},
        {"attention_dropout": 0.1, "hidden_dropout": 0.1},
        {"virtual_pipeline_model_parallel_size": 4},
        {"recompute_granularity": "full"},
        {"calculate_per_token_loss": True},
        MOE,
        {"context_parallel_size": 2},
        MOE | {"moe_router_load_balancing_type": "aux_loss"},
        MOE | {"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": [0.0]},
        {"moe_router_load_balancing_type": "sinkhorn"},
    ],
    ids=str,
)
def test_what_segments_serve_is_let_through(values: dict[str, Any]) -> None:
    assert refused(args(**SEGMENTS, **values)) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq1f1b_splits": 0}, "--seq1f1b-splits 0: give at least 1"),
        ({"seq1f1b_slack": -1}, "--seq1f1b-slack -1: give at least 0"),
        ({"pipeline_trace_step": 0}, "--pipeline-trace-step 0: give at least 1"),
        ({"pipeline_patience": 5.0}, "--pipeline-patience 5.0: no flag selects our schedules, so it has no effect"),
        ({"pipeline_patience": 0.0}, "--pipeline-patience 0.0: give seconds above 0"),
        ({"pipeline_patience": math.nan}, "--pipeline-patience nan: give seconds above 0"),
        ({"pipeline_patience": math.inf}, r"--pipeline-patience inf: give seconds above 0 and at most 1e\+08"),
        ({"pipeline_trace": "/dev/null/trace"}, "--pipeline-trace /dev/null/trace: /dev/null is not a folder"),
        ({"pipeline_trace": ""}, "--pipeline-trace is empty"),
        ({"pipeline_trace_step": 4}, "--pipeline-trace-step 4: --pipeline-trace is not given"),
        ({"seq1f1b_layer_seconds": "file"}, "--seq1f1b-layer-seconds file: the file balances segments, but neither"),
        (SEGMENTS | {"seq1f1b_layer_seconds": "file", "seq1f1b_partition": "even"}, "file: the file balances segments"),
        ({"seq1f1b_partition": "40,24"}, "--seq1f1b-partition 40,24: --seq1f1b-splits is 1, so it has no effect"),
        ({"seq1f1b_partition": "even"}, "--seq1f1b-partition even: --seq1f1b-splits is 1, so it has no effect"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pipeline_numbers(args(**values))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory"),
        ("folder", "Is a directory"),
        ("", "not a JSON list"),
        ("{}", "0 different segments do not determine"),
        ("[[0, 8, 1]]", "not a JSON list"),
        ("[[0, 8, NaN, 1]]", "must be finite and above 0"),
        ("[[8, 0, 1, 1]]", "a segment needs 0 <= begin < end"),
        ("[[0, 8, 1, 1], [0, 16, 2, 2]]", "2 different segments do not determine"),
        ("\udcff", "not a JSON list"),
        ("[" * 100_000, "not a JSON list"),
    ],
)
def test_a_file_of_seconds_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, content: str | None, why: str
) -> None:
    file = tmp_path / "seconds.json"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"--seq1f1b-layer-seconds {file}: .*{why}.*; give a JSON list of"):
        check_pipeline_numbers(args(**SEGMENTS, seq1f1b_layer_seconds=str(file)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_iters": 2}, "--pipeline-trace-step 3: --train-iters ends this run after 2 steps at most"),
        ({"train_samples": 16, "global_batch_size": 8}, "--train-samples ends this run after 2 steps"),
        ({"train_iters": 9, "exit_interval": 2}, "--exit-interval ends this run after 2 steps"),
        ({"train_iters": 9, "skip_train": True}, "--skip-train runs none"),
    ],
    ids=str,
)
def test_a_measured_step_past_the_end_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_trace_step(args(pipeline_trace="here", **values))
    check_trace_step(args(**values))
    check_trace_step(args(pipeline_trace="here", pipeline_trace_step=2, **values | {"skip_train": False}))


def test_a_measured_step_that_a_resumed_run_does_not_reach_is_told_at_its_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runner = ForwardBackward(plan=None, trace_step=3, steps=2)  # type: ignore[arg-type]
    runner._warn_of_missing_trace()
    assert "WARNING: --pipeline-trace-step 3: this run ended after 2 training steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (SMALL_PIPE | {"num_layers": 4, "decoder_first_pipeline_num_layers": 0}, "stage 0 of 2 has no transformer"),
        (
            SMALL_PIPE | {"num_layers": 1, "account_for_embedding_in_pipeline_split": True},
            r"stage 0 of 2 has no transformer .*\[0, 1\]",
        ),
        (SMALL_PIPE | {"pipeline_model_parallel_layout": "E|ttttL"}, r"stage 0 of 2 has no .*\[0, 4\]"),
        (
            {"pipeline_model_parallel_size": 3, "pipeline_model_parallel_layout": "Ett||ttL"},
            r"stage 1 of 3 has no .*\[2, 0, 2\]",
        ),
    ],
    ids=str,
)
def test_zero_bubble_refuses_a_stage_without_layers(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"--zero-bubble: pipeline {message}"):
        refuse_stages(args(**values, **ZERO_BUBBLE))
    refuse_stages(args(**values, **SEGMENTS))


def test_a_last_stage_without_layers_has_the_output_layers_weight_gradient() -> None:
    refuse_stages(args(**SMALL_PIPE, pipeline_model_parallel_layout="Etttt|L", **ZERO_BUBBLE))


def test_prediction_of_further_tokens_in_a_stage_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="multi-token prediction in stage 1"):
        refuse_stages(args(pipeline_model_parallel_size=3, pipeline_model_parallel_layout="Etttt|m|L", **SLACK))
    refuse_stages(args(pipeline_model_parallel_size=3, pipeline_model_parallel_layout="Ett|tt|mL", **SLACK))


@pytest.mark.parametrize("kind", ["no_mask", "padding", "padding_causal", "arbitrary"])
def test_a_mask_handed_to_a_layer_past_the_flags_is_refused(kind: str) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    with pytest.raises(ValueError, match=f"--seq1f1b-splits, layer 3: attention mask type {kind} is not supported"):
        refuse_mask_type(AttnMaskType[kind], "--seq1f1b-splits, layer 3")
    nothing = dict.fromkeys(("attention_mask", "attention_bias", "packed_seq_params"))
    for name in nothing:
        with pytest.raises(ValueError, match=f"layer 3: {name} passed to one layer"):
            refuse_inputs("layer 3", {**nothing, name: torch.zeros(1)})
    refuse_mask_type(AttnMaskType.causal, "layer 3")
    refuse_inputs("layer 3", nothing)


def test_a_window_that_a_script_sets_is_refused_if_it_reaches_to_the_right() -> None:
    with pytest.raises(ValueError, match=r"layer 1: the window \(4, 4\) includes later tokens"):
        refuse_window(Namespace(window_size=(4, 4)), "layer 1")
    for window in (None, (4, 0), (-1, -1), [4, -1]):
        refuse_window(Namespace(window_size=window), "layer 1")


def test_numbers_that_mean_something_pass() -> None:
    check_pipeline_numbers(args())
    check_pipeline_numbers(args(seq1f1b_splits=8, seq1f1b_slack=3, pipeline_patience=0.5))
    check_pipeline_numbers(args(pipeline_trace="here", pipeline_trace_step=1))
    check_pipeline_numbers(args(seq1f1b_splits=2, seq1f1b_partition="40,24"))
    check_pipeline_numbers(Namespace())  # a script's own namespace, without our flags


def test_our_schedule_runs_where_a_flag_asks_for_it() -> None:
    assert not wants_our_schedule(args())
    assert not wants_our_schedule(Namespace())
    assert not wants_our_schedule(args(seq1f1b_partition="even", pipeline_patience=1.0, pipeline_trace_step=2))
    for asking in (SEGMENTS, SLACK, ZERO_BUBBLE, {"pipeline_trace": "here"}):
        assert wants_our_schedule(args(**asking))


SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 256,
    "kv_channels": 16,
    "ffn_hidden_size": 128,
    "padded_vocab_size": 320,
}
PLAIN = ModelShape(4, 64, 4, 256, 320, 128, 4, 16)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, PLAIN),
        ({"num_query_groups": 2}, PLAIN),  # upstream reads the number with --group-query-attention alone
        ({"group_query_attention": True, "num_query_groups": 2}, ModelShape(4, 64, 4, 256, 320, 128, 2, 16)),
        ({"swiglu": True}, ModelShape(4, 64, 4, 256, 320, 128, 4, 16, swiglu=True)),
        (
            {"num_experts": 8, "moe_ffn_hidden_size": 32, "moe_router_topk": 3},
            ModelShape(4, 64, 4, 256, 320, 32, 4, 16, moe_router_topk=3),
        ),
        ({"moe_ffn_hidden_size": 32, "moe_router_topk": 3}, PLAIN),  # no experts
        ({"window_size": (10, 0)}, ModelShape(4, 64, 4, 256, 320, 128, 4, 16, window=10)),
        ({"window_size": (-1, 0), "window_attn_skip_freq": 2}, PLAIN),
        (
            {"window_size": (10, 0), "window_attn_skip_freq": 2},
            ModelShape(4, 64, 4, 256, 320, 128, 4, 16, window=10, windowed=(True, False, True, False)),
        ),
        (
            {"window_size": (10, 0), "window_attn_skip_freq": [1, 1, 0, 1]},
            ModelShape(4, 64, 4, 256, 320, 128, 4, 16, window=10, windowed=(True, True, False, True)),
        ),
        ({"padded_vocab_size": None, "vocab_size": 300}, ModelShape(4, 64, 4, 256, 300, 128, 4, 16)),
    ],
    ids=str,
)
def test_the_model_as_the_cost_formulas_see_it(values: dict[str, Any], wanted: ModelShape) -> None:
    assert model_shape(args(**SMALL | values)) == wanted


def test_windows_are_upstreams() -> None:
    from megatron.core.transformer.utils import is_layer_window_attention

    for frequency in (None, 1, 2, 3, [0, 1, 1, 0]):
        given = args(**SMALL, window_size=(7, 0), window_attn_skip_freq=frequency)
        upstreams = [is_layer_window_attention((7, 0), frequency, layer) for layer in (1, 2, 3, 4)]
        counts = model_shape(given).windows()
        assert (counts.get(7, 0), counts.get(None, 0)) == (sum(upstreams), 4 - sum(upstreams))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, [2, 2, 2, 2]),
        ({"decoder_first_pipeline_num_layers": 2}, [2, 2, 2, 2]),
        ({"decoder_last_pipeline_num_layers": 5}, [1, 1, 1, 5]),
        ({"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 3}, [1, 2, 2, 3]),
        ({"num_layers": 7, "account_for_loss_in_pipeline_split": True}, [2, 2, 2, 1]),
        (
            {
                "num_layers": 6,
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
            [1, 2, 2, 1],
        ),
    ],
    ids=str,
)
def test_zero_bubble_is_fitted_to_the_layers_that_upstream_deals(values: dict[str, Any], wanted: list[int]) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    given = args(**SMALL | {"num_layers": 8} | values, pipeline_model_parallel_size=4, zero_bubble=True)
    assert stage_layers(given) == wanted
    config = TransformerConfig(
        num_layers=given.num_layers,
        hidden_size=64,
        num_attention_heads=4,
        pipeline_model_parallel_size=4,
        pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=given.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=given.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=given.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=given.account_for_loss_in_pipeline_split,
    )
    assert [get_num_layers_to_build(config, pp_rank=rank) for rank in range(4)] == wanted
    costs = plan_from_args(given).costs
    assert costs is not None and len(costs.forward) == 4
    per_layer = [row[0] / layers for row, layers in zip(costs.forward, wanted, strict=True)]
    assert per_layer[0] == pytest.approx(per_layer[1]) and per_layer[3] > per_layer[1]  # the head


def test_a_layout_of_layers_leaves_a_zero_bubble_order_unfitted() -> None:
    given = args(**SMALL, pipeline_model_parallel_size=4, zero_bubble=True, pipeline_model_parallel_layout="Et|t|t|tL")
    assert plan_from_args(given).costs is None


def _bare(kind: type[nn.Module], **modules: nn.Module) -> Any:
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    for name, module in modules.items():
        setattr(made, name, module)
    return made


def test_layers_whose_attention_is_another_are_refused_and_nothing_is_bound() -> None:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.attention import CrossAttention, SelfAttention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_layer import TransformerLayer

    class Capped(DotProductAttention):
        """A script's own core attention, which may cap scores."""

    causal, blind, capped, sink = (
        _bare(SelfAttention, core_attention=_bare(kind))
        for kind in (DotProductAttention, DotProductAttention, Capped, DotProductAttention)
    )
    for attention in (causal, blind, capped, sink):
        attention.attn_mask_type, attention.config = AttnMaskType.causal, Namespace(window_size=None)
    blind.attn_mask_type, sink.config = AttnMaskType.padding, Namespace(window_size=None, softmax_type="learnable")
    first = _bare(TransformerLayer, self_attention=causal)
    for attention, message in (
        (_bare(CrossAttention), "decoder.1 has CrossAttention"),
        (blind, "mask type padding is not supported"),
        (capped, "its core attention is .*Capped"),
        (sink, "sets softmax_type to learnable"),
    ):
        layers = nn.ModuleList([first, _bare(TransformerLayer, self_attention=attention)])
        model = _bare(GPTModel, decoder=layers)
        with pytest.raises(ValueError, match=message):
            SegmentedModel(model, (32, 32)).attach()
        assert "forward" not in vars(model) and "forward" not in vars(causal.core_attention)
    with pytest.raises(ValueError, match="one GPTModel, but this chunk is Linear and contains 0 of them"):
        SegmentedModel(nn.Linear(1, 1), (32, 32)).attach()


def messages_of_upstreams_validation(cases: list[list[str]], world: int = 1) -> list[str | None]:
    """Parse and validate each command line as upstream's scripts do; return what is refused. Runs on a rank."""
    import os

    import patches

    os.environ["WORLD_SIZE"] = str(world)

    patches.start()
    from megatron.training import arguments

    messages: list[str | None] = []
    for case in cases:
        sys.argv = ["pretrain_gpt.py", *case]
        try:
            given = arguments.parse_args()  # first: it puts our validation in the place of upstream's
            arguments.validate_args(given)
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
        assert not torch.distributed.is_initialized()
    return messages


def messages(ranks: RankPool, *cases: str) -> list[str | None]:
    """Return what upstream's validation says about the tiny model with these flags."""
    lines = [flags(TINY, case) for case in cases]
    result: list[str | None] = ranks.run(1, messages_of_upstreams_validation, lines)[0]
    return result


def test_upstreams_validation_refuses_what_segments_cannot_serve(ranks: RankPool) -> None:
    cases: dict[str, str | None] = {
        "--seq1f1b-splits 4": None,
        "--seq1f1b-splits 4 --seq1f1b-partition even": None,
        "--seq1f1b-splits 3 --seq1f1b-partition 32,20,12": None,
        "--seq1f1b-splits 2 --softmax-type learnable": "--softmax-type with --seq1f1b-splits: the attention kernels",
        "--seq1f1b-splits 2 --window-size 8,8": "--window-size with --seq1f1b-splits: a window that includes",
        "--seq1f1b-splits 3 --seq1f1b-partition 32,32": "2 lengths for --seq1f1b-splits 3; give one per segment",
        "--seq1f1b-splits 2 --seq1f1b-partition 32,33": "the lengths sum to 65, but --seq-length is 64",
        "--seq1f1b-splits 2 --seq1f1b-partition 32;32": "'32;32': give even, balanced or lengths",
        "--seq1f1b-splits 65": "--seq-length 64 cannot be cut into 65 segments of at least 1 tokens",
    }
    for case, message, want in zip(cases, messages(ranks, *cases), cases.values(), strict=True):
        assert (message is None) == (want is None), (case, message)
        assert want is None or (message is not None and want in message)


def overwrites(case: list[str]) -> bool:
    """Return whether TransformerEngine's layers may overwrite fused weight gradients. Runs on a rank."""
    import patches

    patches.start()
    from megatron.training import arguments
    from megatron.training.argument_utils import core_transformer_config_from_args

    sys.argv = ["pretrain_gpt.py", *case]
    args = arguments.parse_args()  # puts our records in
    config = core_transformer_config_from_args(arguments.validate_args(args))
    return not config.disable_parameter_transpose_cache


@pytest.mark.parametrize(
    ("case", "may"), [("", True), ("--seq1f1b-slack 1", True), ("--seq1f1b-splits 2 --seq1f1b-slack 1", False)]
)
def test_fused_weight_gradients_of_segments_are_added_up(ranks: RankPool, case: str, may: bool) -> None:
    assert ranks.run(1, overwrites, flags(TINY, case)) == [may]


def chosen_by(case: list[str]) -> dict[str, Any]:
    """Return what the flags apply, and whether upstream's own function stays in its places. Runs on a rank."""
    from megatron.core import pipeline_parallel
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import arguments, training

    own = schedules.get_forward_backward_func
    import patches
    from patches.engine.session import SESSION

    patches.start()
    sys.argv = ["pretrain_gpt.py", *case]
    arguments.parse_args()
    places = (schedules, pipeline_parallel, training)
    return {
        "applied": sorted(name for name in SESSION.hashes if name.startswith("seq1f1b.")),
        "upstreams": [place.get_forward_backward_func is own for place in places],
    }


# The guards act around upstream's function unless they are off.
UNGUARDED = (
    "--no-locate-nonfinite-gradients --loss-spike-policy off --stall-timeout-minutes 0 --first-step-timeout-minutes 0"
)


@pytest.mark.parametrize("case", [UNGUARDED, f"{UNGUARDED} --seq1f1b-splits 1"])
def test_without_our_flags_upstreams_own_function_runs(ranks: RankPool, case: str) -> None:
    (found,) = ranks.run(1, chosen_by, flags(TINY, case))
    assert found == {"applied": [], "upstreams": [True] * 3}


@pytest.mark.parametrize("case", ["--seq1f1b-splits 2", "--seq1f1b-slack 1", "--zero-bubble", "--pipeline-trace here"])
def test_with_a_flag_ours_stands_in_its_place(ranks: RankPool, case: str) -> None:
    (found,) = ranks.run(1, chosen_by, flags(TINY, case))
    assert found == {"applied": ["seq1f1b.arguments", "seq1f1b.schedule"], "upstreams": [False] * 3}
