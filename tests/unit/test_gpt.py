"""The GPT script's own parts that need no run."""

import argparse
import re
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.longseq.unserved import UNSERVED, refuse_unserved

QUIET: dict[str, Any] = {
    "sft": False,
    "freeze_all_layers": False,
    "fim_data": False,
    "hybrid_layer_pattern": None,
    "is_hybrid_model": False,
    "hybrid_context_parallel": False,
    "logits_load_dir": None,
    "per_dataset_sequences_path": None,
    "mtp_num_layers": None,
    "pipeline_model_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "inprocess_restart": False,
    "dataloader_type": None,
    "dataloader_fast_cache_load": False,
    "dataloader_defer_npy_index_mmap": False,
    "data_cache_path": None,
    "data_path": None,
    "data_args_path": None,
    "train_data_path": None,
    "valid_data_path": None,
    "test_data_path": None,
    "per_split_data_args_path": None,
    "mock_data": False,
    "split": None,
    "skip_train": False,
    "eval_iters": 100,
    "full_validation": False,
    "multiple_validation_sets": False,
    "async_save": False,
    "async_strategy": "nvrx",
    "eval_micro_batch_size": None,
    "rampup_batch_size": None,
    "position_embedding_type": "learned_absolute",
    "apply_residual_connection_post_layernorm": False,
    "openai_gelu": False,
}
MOCK: dict[str, Any] = {"mock_data": True, "eval_interval": 100}
CACHED: dict[str, Any] = {"data_cache_path": "caches"}
SETS: dict[str, Any] = {"multiple_validation_sets": True, "split": "1,1,0"}
OWN: dict[str, Any] = {"mock_data": False, "train_data_path": ["some"]}  # data for each part
SERVED: list[dict[str, Any]] = [
    {"dataloader_fast_cache_load": True, **CACHED},
    {"dataloader_defer_npy_index_mmap": True, "data_path": ["some"], **CACHED},
    {"full_validation": True, **SETS, "eval_micro_batch_size": 4},
    {
        "full_validation": True,
        "multiple_validation_sets": True,
        "eval_micro_batch_size": 1,
        **OWN,
        "valid_data_path": [""],
    },
    {**OWN, "eval_iters": 0},
    {**OWN, "valid_data_path": ["some"]},
    {**OWN, "train_data_path": None, "test_data_path": ["some"], "eval_iters": 0, "skip_train": True},
    {"mock_data": False, "data_path": ["some"]},
    {"mock_data": False, "data_args_path": "file", "split": "9, 1"},
    {"mock_data": False, "per_split_data_args_path": "s3://somewhere/file.json"},
    {"split": "1", "eval_iters": 0},
    {"full_validation": True, **SETS, "eval_micro_batch_size": 1, "tensor_model_parallel_size": 2},
    {"mtp_num_layers": 1},
    {"eval_interval": None, "skip_train": True},
    {"async_save": True, "async_strategy": "mcore"},
    {"sft": True, "eval_iters": 0, **OWN},
    {"dataloader_type": "cyclic", "position_embedding_type": "yarn"},
]
REFUSED: dict[str, dict[str, Any]] = {
    "--sft with --eval-iters 0": {"sft": True, "eval_iters": 0, **OWN, "valid_data_path": ["some"]},
    "--freeze-all-layers": {"freeze_all_layers": True},
    "--fim-data": {"fim_data": True},
    "--hybrid-layer-pattern": {"hybrid_layer_pattern": "M*M-"},
    "--is-hybrid-model": {"is_hybrid_model": True},
    "--hybrid-context-parallel": {"hybrid_context_parallel": True},
    "--logits-load-dir": {"logits_load_dir": "somewhere"},
    "--per-dataset-sequences-path": {"per_dataset_sequences_path": "file.json"},
    "--mtp-num-layers with pipeline stages": {"mtp_num_layers": 1, "pipeline_model_parallel_size": 2},
    "--inprocess-restart": {"inprocess_restart": True},
    "--dataloader-type external": {"dataloader_type": "external"},
    "--dataloader-fast-cache-load": {"dataloader_fast_cache_load": True, "data_path": ["some"], **CACHED},
    "--dataloader-defer-npy-index-mmap": {"dataloader_defer_npy_index_mmap": True},
    "--full-validation without --multiple-validation-sets": {"full_validation": True, "eval_micro_batch_size": 1},
    "--full-validation with --eval-micro-batch-size": {
        "full_validation": True,
        **SETS,
        "eval_micro_batch_size": 2,
        "tensor_model_parallel_size": 2,
    },
    "--async-strategy nvrx": {"async_save": True},
    "--multiple-validation-sets without --full-validation": {"multiple_validation_sets": True},
    "--multiple-validation-sets with test data": {
        "full_validation": True,
        "multiple_validation_sets": True,
        "eval_micro_batch_size": 1,
    },
    "--data-path or --mock-data": {"mock_data": False},
    "--train-data-path or --skip-train": {"split": "0,1,1"},
    "--eval-iters without validation data": {"split": "1,0,1"},
    "--eval-interval is missing": {"eval_interval": None},
    "--rampup-batch-size": {"rampup_batch_size": [2, 2, 8]},
    "--position-embedding-type relative": {"position_embedding_type": "relative"},
    "--apply-residual-connection-post-layernorm": {"apply_residual_connection_post_layernorm": True},
    "--openai-gelu": {"openai_gelu": True},
}


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_that_would_be_ignored_is_refused(flag: str) -> None:
    assert set(REFUSED) == set(UNSERVED)
    refuse_unserved(Namespace(**{**QUIET, **MOCK}))
    with pytest.raises(ValueError, match=f"\n  {flag}: {re.escape(UNSERVED[flag][1])}$"):
        refuse_unserved(Namespace(**{**QUIET, **MOCK, **REFUSED[flag]}))


@pytest.mark.parametrize("values", SERVED, ids=str)
def test_what_the_script_serves_is_let_through(values: dict[str, Any]) -> None:
    refuse_unserved(Namespace(**{**QUIET, **MOCK, **values}))


def test_every_attribute_exists_in_upstreams_parser() -> None:
    from megatron.training.arguments import add_megatron_arguments

    known = vars(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args([]))
    assert {name: known[name] for name in QUIET} == QUIET


def test_loss_is_the_sum_over_valid_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megatron.longseq import pretrain_gpt

    monkeypatch.setattr(
        pretrain_gpt,
        "get_args",
        lambda: SimpleNamespace(check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False),
    )
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    total, tokens, logged = pretrain_gpt.loss_func(mask, losses)
    assert (total.item(), tokens.item(), tokens.dtype) == (21.0, 3, torch.int)
    assert logged["lm loss"].tolist() == [21.0, 3.0]
    nothing, none, _ = pretrain_gpt.loss_func(torch.zeros_like(mask), losses)
    assert (nothing.item(), none.item()) == (0.0, 0)


def test_a_spike_of_the_loss_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megatron.longseq import pretrain_gpt

    given = SimpleNamespace(check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=True)
    asked: list[dict[str, Any]] = []
    rerun = SimpleNamespace(validate_result=lambda **named: asked.append(named), is_unexpectedly_large=max)
    monkeypatch.setattr(pretrain_gpt, "get_args", lambda: given)
    monkeypatch.setattr(pretrain_gpt, "get_rerun_state_machine", lambda: rerun)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    pretrain_gpt.loss_func(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]))
    (call,) = asked
    assert (
        call["result"].item() == 3.0 and not call["fatal"] and "spike in the forward loss of rank 3" in call["message"]
    )
    assert call["rejection_func"].keywords == {"threshold": 10.0, "context": "loss"}


def test_a_batch_of_another_size_is_refused() -> None:
    from megatron.longseq import pretrain_gpt

    pretrain_gpt._check_size((2, 64), (2, 64), rank=3)
    with pytest.raises(ValueError, match=r"rank 3: .* samples of size \[3, 64\], but .* expect \[2, 64\]"):
        pretrain_gpt._check_size((3, 64), (2, 64), rank=3)


def test_a_parameters_name_is_the_models_whatever_the_stage() -> None:
    import torch

    from megatron.longseq.freeze import global_param_name

    stage = torch.nn.Module()
    stage.decoder = torch.nn.Module()
    stage.decoder.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(2)])
    for index, layer in enumerate(stage.decoder.layers):
        layer.layer_number = 3 + index  # from 1, through the model
    assert [global_param_name(stage, name) for name, _ in stage.named_parameters()] == [
        "decoder.layers.2.weight",
        "decoder.layers.2.bias",
        "decoder.layers.3.weight",
        "decoder.layers.3.bias",
    ]
    assert global_param_name(stage, "output_layer.weight") == "output_layer.weight"
    stage.share_embeddings_and_output_weights = True
    assert global_param_name(stage, "output_layer.weight") == "embedding.word_embeddings.weight"
    assert global_param_name(stage, "output_layer.bias") == "output_layer.bias"
