"""The GPT script's own parts that need no run."""

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

QUIET: dict[str, Any] = {
    "sft": False,
    "freeze_all_layers": False,
    "fim_data": False,
    "dataloader_inter_document_masking": False,
    "hybrid_context_parallel": False,
    "logits_load_dir": None,
    "per_dataset_sequences_path": None,
    "mtp_num_layers": None,
    "pipeline_model_parallel_size": 1,
}
ASKED: dict[str, dict[str, Any]] = {
    "--sft": {"sft": True},
    "--freeze-all-layers": {"freeze_all_layers": True},
    "--fim-data": {"fim_data": True},
    "--dataloader-inter-document-masking": {"dataloader_inter_document_masking": True},
    "--hybrid-context-parallel": {"hybrid_context_parallel": True},
    "--logits-load-dir": {"logits_load_dir": "somewhere"},
    "--per-dataset-sequences-path": {"per_dataset_sequences_path": "file.json"},
    "--mtp-num-layers with pipeline stages": {"mtp_num_layers": 1, "pipeline_model_parallel_size": 2},
}


@pytest.mark.parametrize("flag", ASKED)
def test_a_flag_that_would_be_ignored_is_refused(flag: str) -> None:
    from megatron.longseq.gpt import UNSERVED, refuse_unserved

    assert set(ASKED) == set(UNSERVED)
    refuse_unserved(SimpleNamespace(**QUIET))
    with pytest.raises(ValueError, match=f"{flag}.*patches run"):
        refuse_unserved(SimpleNamespace(**{**QUIET, **ASKED[flag]}))


def test_every_attribute_exists_in_upstreams_parser() -> None:
    from megatron.training.arguments import add_megatron_arguments

    known = vars(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args([]))
    assert {name: known[name] for name in QUIET} == QUIET


def test_loss_is_the_sum_over_valid_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megatron.longseq import gpt

    monkeypatch.setattr(gpt, "get_args", lambda: SimpleNamespace(check_for_nan_in_loss_and_grad=False))
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    total, tokens, logged = gpt.loss_func(mask, losses)
    assert (total.item(), tokens.item(), tokens.dtype) == (21.0, 3, torch.int)
    assert logged["lm loss"].tolist() == [21.0, 3.0]
    nothing, none, _ = gpt.loss_func(torch.zeros_like(mask), losses)
    assert (nothing.item(), none.item()) == (0.0, 0)


def test_a_parameters_name_is_the_models_whatever_the_stage() -> None:
    import torch

    from megatron.longseq.partial import model_name

    stage = torch.nn.Module()
    stage.decoder = torch.nn.Module()
    stage.decoder.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(2)])
    for index, layer in enumerate(stage.decoder.layers):
        layer.layer_number = 3 + index  # from 1, through the model
    assert [model_name(stage, name) for name, _ in stage.named_parameters()] == [
        "decoder.layers.2.weight",
        "decoder.layers.2.bias",
        "decoder.layers.3.weight",
        "decoder.layers.3.bias",
    ]
    assert model_name(stage, "output_layer.weight") == "output_layer.weight"
    stage.share_embeddings_and_output_weights = True
    assert model_name(stage, "output_layer.weight") == "embedding.word_embeddings.weight"
    assert model_name(stage, "output_layer.bias") == "output_layer.bias"
