"""What people type into the planner's commands: it works, or one sentence says what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.longseq.planner.plan.cluster import cluster, with_even_nodes
from megatron.longseq.planner.plan.configuration import reasons
from megatron.longseq.planner.plan.flags import read, read_fully
from megatron.longseq.planner.plan.launch import model_flags
from megatron.longseq.planner.plan.model import Architecture, architecture
from megatron.longseq.planner.plan.step import predict
from megatron.longseq.planner.tools import calibrate
from megatron.longseq.planner.tools.cli import main

PREDICT = ["predict", "--model", "llama-7b", "--cluster", "a800-8", "--seq-length", "4096", "--bf16"]
SEARCH = ["search", "--model", "llama-7b", "--cluster", "a800-8", "--seq-length", "8K", "--global-batch-tokens", "1M"]
CONFIG = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 32}
CONFIG |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "hidden_act": "silu"}
DEEPSEEK = {"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*PREDICT, "--cluster", "a800-0"], "cluster a800-0: gpus must be positive, not 0"),
        ([*PREDICT, "--seq-length"], "seq_length has no value; give a whole number"),
        ([*PREDICT, "--rotary-percent"], "rotary_percent has no value; give a number"),
        ([*PREDICT, "--num-layers", "0"], "num_layers is '0'; give at least 1"),
        ([*PREDICT, "--micro-batch-size", "-1"], "micro_batch_size is '-1'; give at least 1"),
        ([*PREDICT, "--hierarchical-context-parallel-sizes", "0"], "hierarchical_context_parallel_sizes is '0'; give"),
        ([*PREDICT, "--global-batch-size", "0"], "global_batch_size is '0'; give at least 1"),
        (
            [*PREDICT, "--optimizer-cpu-offload", "--optimizer-offload-fraction", "2"],
            "optimizer_offload_fraction is '2'",
        ),
        (
            [*PREDICT, "--checkpoint-activations"],
            "checkpoint_activations True: upstream no longer takes it; give recomp",
        ),
        ([*PREDICT, "--make-vocab-size-divisible-by", "0"], "make_vocab_size_divisible_by must be at least 1, not 0"),
        ([*PREDICT, "--num-experts", "8", "--moe-layer-freq", "0"], "moe_layer_freq must be at least 1, not 0"),
        (
            [*PREDICT, "--num-experts", "8", "--moe-layer-freq", "[1]*99999999"],
            "a list of 99999999 layers; give at most",
        ),
        (
            [*PREDICT, "--num-experts", "8", "--moe-layer-freq", "exit()"],
            "moe_layer_freq is 'exit', not a whole number",
        ),
        (
            [*PREDICT, "--cluster", "a100-8,gpus_per_node=inf"],
            "cluster 'a100-8,gpus_per_node=inf': gpus_per_node is 'inf'",
        ),
        (
            [*PREDICT, "--cluster", "a100-8,gpus_per_node=4.9"],
            "cluster 'a100-8,gpus_per_node=4.9': gpus_per_node is '4.9'",
        ),
        ([*SEARCH, "--set", "product_efficiency=3"], "cluster a800-8: product_efficiency is a share, so it must be at"),
        ([*SEARCH, "--set", "hidden_dropout=abc"], "hidden_dropout is 'abc', not a number"),
        ([*SEARCH, "--set", "layernorm_epsilon=nan"], "layernorm_epsilon is nan, not a number"),
        ([*SEARCH, "--set", "rotary_percent=2"], "rotary_percent must be at most 1, not 2"),
        ([*SEARCH, "--length-steps", "5"], "--length-steps 5: steps are drawn from --lengths, which is not given"),
        (
            [*SEARCH, "--lengths", "github", "--top", "3"],
            "--top 3 with --lengths: the table has the best plans of each",
        ),
        ([*SEARCH, "--seq-length", "0"], "--seq-length '0': give a whole number of at least 1"),
        (
            [*SEARCH, "--global-batch-tokens", "4K"],
            "--global-batch-tokens 4K: not a multiple of --seq-length 8K; give 8192",
        ),
        ([*SEARCH, "--set", "num_layers=0"], "num_layers must be at least 1, not 0"),
        (["calibrate", "--device", "cuda"], "--device cuda: PyTorch sees no GPU; give --device cpu"),
        (["calibrate", "--device", "cpu", "--gpus", "9999"], "--gpus 9999: give 1 to "),
        (["calibrate", "--device", "cpu", "--output", "/"], "--output /: this is a folder; name a file"),
    ],
    ids=str,
)
def test_one_sentence_says_what_is_wrong(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(calibrate, "measure_ranks", lambda *_: pytest.fail("processes start"))  # thousands of them
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_tables_without_a_file_and_with_other_separators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--rows"])
    assert "argument --rows: expected one argument" in capsys.readouterr().err
    table = tmp_path / "rows.csv"
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        table.write_text("gpus,cluster\n8,a100\n".replace(",", mark))
        assert main(["predict", "--rows", str(table)]) == 1
        assert f"the columns are separated by {name}; separate them by commas" in capsys.readouterr().err


RUN = {"model": "llama-7b", "cluster": "h100-16", "seq_length": 4096, "bf16": True}
EXPERTS = {"num_experts": 8, "expert_model_parallel_size": 8}


def why(**changes: Any) -> str:
    """Return the reasons of a run and the contradictions of its flags."""
    reading = read_fully({**RUN, **changes})
    return "; ".join([*reading.contradictions, *reasons(reading.model, reading.run)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({**EXPERTS, "pipeline_model_parallel_size": 4}, "16 GPUs cannot be divided into replicas of 1 x 8 x 4"),
        (
            {**EXPERTS, "gpus": 4},
            "4 GPUs cannot be divided into replicas of 1 x 8 x 1 (expert tensor, expert, pipeline)",
        ),
        (
            {"num_experts": 8, "gpus": 8, "expert_tensor_parallel_size": 16},
            "8 GPUs cannot be divided into replicas of 16",
        ),
        ({"num_experts": 4, "moe_router_topk": 16}, "moe_router_topk must be at least 1 and at most num_experts"),
        ({"num_experts": 8, "tensor_model_parallel_size": 2}, "experts with tensor_model_parallel_size above 1 need"),
        ({"squared_relu": True}, "swiglu and squared_relu are two activations"),
        ({"overlap_param_gather": True, "overlap_grad_reduce": True}, "needs use_distributed_optimizer"),
        ({"tp_comm_overlap": True, "tensor_model_parallel_size": 2}, "tp_comm_overlap needs sequence_parallel"),
        ({"max_position_embeddings": 1024}, "max_position_embeddings 1024 is below seq_length 4096"),
        (
            {"use_torch_fsdp2": True, "pipeline_model_parallel_size": 2},
            "does not work with pipeline_model_parallel_size",
        ),
        ({"recompute_granularity": "full", "recompute_method": "block"}, "block needs recompute_num_layers"),
        ({"num_distributed_optimizer_instances": 3, "use_distributed_optimizer": True}, "does not divide the data- x"),
        ({"zero_bubble": True, "paro": "GGG", "transformer_impl": "local"}, "--zero-bubble with --paro GGG: weight"),
        (
            {"fp8": "hybrid", "seq1f1b_splits": 2, "pipeline_model_parallel_size": 2},
            "--fp8-format with --seq1f1b-splits",
        ),
        ({"fp8": "hybrid", "paro": "GGG"}, "--fp8-format with --paro GGG: TransformerEngine keeps unsharded copies"),
        ({"fp8": "hybrid", "cluster": "a100-16"}, "fp8_format: the GPUs of a100-16 have no fp8"),
        ({"paro_group_size": 8}, "--paro-group-size 8: --paro is not given, so it has no effect"),
        ({"paro": "NNG", "paro_selective_overlap": True}, "--paro NNG does not shard parameters"),
        ({"paro": "GGG", "use_megatron_fsdp": True}, "--use-megatron-fsdp with --paro GGG: it has its own sharding"),
        ({"context_parallel_auto": True}, "--context-parallel-auto: --context-parallel-size is 1, so it has no effect"),
        ({"context_parallel_size": 2, "cp_comm_type": "a2a+p2p"}, "a2a+p2p needs hierarchical_context_parallel_sizes"),
        ({"decoder_first_pipeline_num_layers": 2}, "32 layers cannot be divided among 1 stages"),
        (
            {"no_position_embedding": True, "position_embedding_type": "learned_absolute"},
            "no_position_embedding is no lo",
        ),
    ],
    ids=str,
)
def test_what_training_refuses_is_a_reason(changes: dict[str, Any], reason: str) -> None:
    assert why() == why(no_position_embedding=True) == ""  # rotary positions do without it
    assert reason in why(**changes)


def test_flags_without_effect_do_not_change_the_price() -> None:
    """Group sizes without --paro, query groups without --group-query-attention, layers of the first of one stage."""
    plain = {**RUN, "use_distributed_optimizer": True}
    assert predict(*read({**plain, "paro_group_size": 2, "cluster": "a100-16"})).breakdown == (
        predict(*read({**plain, "cluster": "a100-16"})).breakdown
    )
    found = read_fully({**RUN, "num_query_groups": 8})
    assert found.model.groups == 32 and "num_query_groups 8 has no effect without group_query" in found.assumed[0]
    grouped = {"group_query_attention": True}
    assert read({**RUN, **grouped, "num_query_groups": 8})[0].groups == 8
    assert read({**RUN, **grouped})[0].groups == 1  # upstream's default
    assert read({**RUN, "model": "llama3-8b"})[0].groups == 8  # a name has its groups without the flag
    assert read({**RUN, "decoder_first_pipeline_num_layers": 2})[2].stage_layers(32) == (32,)


def test_layers_with_experts_are_written_as_upstream_reads_them() -> None:
    for text, kinds in (
        ("([0]*2+[1]*2)*8", (0, 0, 1, 1) * 8),
        ("([1]*3+[0]*1)*8", (1, 1, 1, 0) * 8),
        ("8*([0]+3*[1])", (0, 1, 1, 1) * 8),
        (f"{[0, 1] * 16}", (0, 1) * 16),
        (" ".join("01" * 16), (0, 1) * 16),
        ([0, 1] * 16, (0, 1) * 16),
        ("2", 2),
    ):
        assert read({**RUN, "num_experts": 8, "moe_layer_freq": text})[0].moe_layer_freq == kinds


def test_an_error_is_the_reason_and_names_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows without a price have the reason, not what the pricing stumbled over, and the others are priced."""
    head = "cluster,model,seq_length,tensor_model_parallel_size,context_parallel_size,cp_comm_type,zero_bubble,lengths"
    head += ",pipeline_model_parallel_size,num_virtual_stages_per_pipeline_rank,transformer_impl,moe_layer_freq,flexsp"
    rows = [
        "a100-64,llama-7b,4096,8,8,a2a,,,,,,,",
        "a100-8,llama-7b,4096,,,,true,,2,2,local,,",
        "a100-8,llama-7b,4096,,,,,github,,,,,",
        "a100-8,llama-7b,4096,,,,,,,,,0,",
        "a100-8,llama-7b,4096,,,,,no-such-file,,,,,true",
        "a100-8,llama-7b,4096,,,,,,,,,,",
    ]
    (tmp_path / "rows.csv").write_text("\n".join([head, *rows]))
    assert main(["predict", "--rows", str(tmp_path / "rows.csv"), "--json"]) == 0
    errors = [one.get("error", "") for one in json.loads(capsys.readouterr().out)]
    parts = ["4 heads of a rank cannot be divided by Ulysses 8", "zero_bubble has no schedule with virtual stages"]
    parts += [
        "lengths are given, but not flexsp",
        "moe_layer_freq must be at least 1",
        "flexsp_max_tokens_per_rank",
        "",
    ]
    for number, (error, part) in enumerate(zip(errors, parts, strict=True), start=2):
        assert part in error and (f"rows.csv, line {number}: " in error) == bool(part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"products": [[1, 2, 3]]}, r"a product is \[1, 2, 3\]; give four positive numbers"),
        ({"products": 5}, "products is 5, no list"),
        ({"defaults": 5}, "defaults is 5, no object of flags"),
        ({"sms": "4"}, "sms must be positive, not 4"),
        ({"gpus_per_node": 4.5}, "gpus_per_node is 4.5, not a whole number"),
        ({"splits_messages": 1}, "splits_messages is 1, neither true nor false"),
    ],
    ids=str,
)
def test_profiles_with_wrong_entries_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    profile = {"gpus": 2, "peak_tflops": 1.0, "memory_bytes": 1e9, "memory_bandwidth": 1e9, **changes}
    (tmp_path / "p.json").write_text(json.dumps(profile))
    with pytest.raises(ValueError, match=message):
        cluster(str(tmp_path / "p.json"))


def test_a_cluster_is_named_after_the_gpus_that_are_planned() -> None:
    assert [cluster(*one).name for one in (("a100-8", 16), ("a100", 16), ("a100-16",))] == ["a100-16"] * 3
    assert with_even_nodes(cluster("a100-12")).gpus_per_node == 6  # two nodes of 8 would be 16
    assert with_even_nodes(cluster("a100-3")).gpus_per_node == 3
    assert with_even_nodes(cluster("a100-20")).gpus_per_node == 8  # three nodes cannot share 20


@pytest.mark.parametrize(("family", "told"), [("selene", True), ("a100", False)])
def test_a_search_says_what_it_does_not_assume(family: str, told: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"search --model gpt-1.7b --cluster {family}-2 --seq-length 2K --global-batch-size 8 --top 1"
    assert main(words.split()) == 0
    assert ("assumed: plans are priced with current software" in capsys.readouterr().out) is told
    assert main([*words.split(), "--json"]) == 0
    assert bool(json.loads(capsys.readouterr().out)["assumed"]) is told


@pytest.mark.parametrize(("size", "strategy", "ranks"), [("8", "GGG", 1), ("4", "NIG", 2)])
def test_a_strategy_for_several_ranks_is_not_dropped(
    size: str, strategy: str, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "search --model gpt-1.7b --cluster a100-8 --seq-length 2K --global-batch-size 96 --tensor-model-parallel-size"
    )
    assert main([*words.split(), size, "--strategies", strategy]) == 1
    why = f"no layout has ranks for --strategies {strategy}"
    told = capsys.readouterr().err
    assert why in told and f"(at most {ranks})" in told
    assert main([*words.split(), "2", "--strategies", strategy, "--json"]) == 0
    assert all("paro" in plan["flags"] for plan in json.loads(capsys.readouterr().out)["plans"])


def test_zero_bubble_needs_what_training_requires() -> None:
    given = {"model": "llama-7b", "cluster": "a800-8", "seq_length": 4096, "global_batch_size": 64, "bf16": True}
    given |= {"pipeline_model_parallel_size": 4, "zero_bubble": True}
    (why,) = reasons(*read(given)[::2])
    assert "needs transformer_impl local" in why
    assert reasons(*read({**given, "transformer_impl": "local"})[::2]) == []
    assert "experts" in reasons(*read({**given, "transformer_impl": "local", "num_experts": 8})[::2])[0]


def read_config(folder: Path, **changes: Any) -> Architecture:
    """Return the architecture of a config.json; entries that are None are left out."""
    config = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return architecture(str(folder), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling 'yarn', which is no JSON object"),
        (DEEPSEEK, "of model_type 'deepseek_v3', lacks 'v_head_dim'; give upstream's flags in a JSON file"),
        ({"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation 'gelu_pytorch_tanh'"),
        ({"model_type": "jamba"}, "model_type 'jamba': its layers may differ"),
        ({"model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 1}, "4096 tokens in 3 of 4 layers"),
        ({"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}, "9 tokens in 2 of 4"),
        ({"num_hidden_layers": "4", "num_local_experts": 8}, "num_layers is '4', not a whole number"),
        ({"attention_dropout": "0.0"}, "attention_dropout '0.0', which is no number"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "which lacks a factor"),
        ({"rope_theta": "1e6"}, "rope_theta '1e6', which is no number"),
        ({"sliding_window": "4096"}, "sliding_window '4096', which is no whole number"),
        ({"num_local_experts": 8, "decoder_sparse_step": "2"}, "decoder_sparse_step '2', which is no whole number"),
    ],
    ids=str,
)
def test_configs_of_other_models_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path, **changes)


def test_configs_say_which_layers_have_experts_and_windows(tmp_path: Path) -> None:
    """Layers with experts as Transformers chooses them: Qwen's steps and exceptions, DeepSeek's first layers."""
    qwen = {"model_type": "qwen2_moe", "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 512}
    found = read_config(tmp_path, **qwen, shared_expert_intermediate_size=2048)
    assert found.moe_layer_freq == 1 and found.moe_shared_expert_intermediate_size == 2048 and found.add_qkv_bias
    assert read_config(tmp_path, **qwen, decoder_sparse_step=2).moe_layer_freq == (0, 1, 0, 1)
    assert read_config(tmp_path, **qwen, mlp_only_layers=[0, 3]).moe_layer_freq == (0, 1, 1, 0)
    routed = {"n_routed_experts": 8, "moe_intermediate_size": 512, "n_shared_experts": 2, "first_k_dense_replace": 1}
    found = read_config(tmp_path, **DEEPSEEK, **routed, v_head_dim=128)
    assert found.moe_layer_freq == (0, 1, 1, 1) and found.moe_shared_expert_intermediate_size == 1024
    window = {"model_type": "qwen2", "sliding_window": 4096}
    assert read_config(tmp_path, **window, max_window_layers=4).window_size == 0
    assert read_config(tmp_path, **window, max_window_layers=0).window_size == 4095
    assert read_config(tmp_path, rope_theta=None).rotary_base == 10000
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "rms_norm_eps": None}))
    assert architecture(str(tmp_path), {}).layernorm_epsilon == 1e-6


def test_biases_of_attention_alone_are_priced_but_not_launched(tmp_path: Path) -> None:
    assert read_config(tmp_path, attention_bias=True, mlp_bias=True).add_bias_linear
    for changes in ({"attention_bias": True}, {"mlp_bias": True}):
        with pytest.raises(ValueError, match=r"it has biases in .* alone, for which the GPT script has no flag"):
            model_flags(read_config(tmp_path, **changes), 8192)
