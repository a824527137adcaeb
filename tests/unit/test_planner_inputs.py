"""What people type into the planner's commands: it works, or one sentence says what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.longseq.planner.plan.configuration import reasons
from megatron.longseq.planner.plan.flags import read
from megatron.longseq.planner.plan.launch import model_flags
from megatron.longseq.planner.plan.model import Architecture, architecture
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


def test_biases_of_attention_alone_are_priced_but_not_launched(tmp_path: Path) -> None:
    assert read_config(tmp_path, attention_bias=True, mlp_bias=True).add_bias_linear
    for changes in ({"attention_bias": True}, {"mlp_bias": True}):
        with pytest.raises(ValueError, match=r"it has biases in .* alone, for which the GPT script has no flag"):
            model_flags(read_config(tmp_path, **changes), 8192)
