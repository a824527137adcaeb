"""A run logs one warning for flags with which upstream's attention and ours compute different models."""

import re
from pathlib import Path
from typing import Any

import pytest

from megatron.longseq.attention.plan.model_difference import model_difference
from patches.entry.hooks import _print_model_difference
from tests.distributed.flags import PP2, TINY, VPP, flags
from tests.pool import RankPool
from tests.regression.arm import run_arm
from tests.unit.test_pipeline_flags import args

WINDOW = {"reset_attention_mask": True, "window_size": (7, 0)}
FUSED = {"reset_attention_mask": True, "bf16": True, "masked_softmax_fusion": True, "seq_length": 4096}
LOCAL, GPU, ENGINE = (
    {"is_local": True, "on_gpu": False},
    {"is_local": True, "on_gpu": True},
    {"is_local": False, "on_gpu": True},
)


@pytest.mark.parametrize(
    ("given", "where", "reason"),
    [
        (WINDOW, LOCAL, "--reset-attention-mask with --window-size: in layers with a window"),
        (WINDOW | {"window_attn_skip_freq": 2}, LOCAL, "as --window-attn-skip-freq says"),
        ({"reset_attention_mask": True, "pipeline_model_parallel_size": 4}, LOCAL, "more than 2 pipeline stages"),
        (
            {"reset_attention_mask": True, "pipeline_model_parallel_size": 2}
            | {"num_layers_per_virtual_pipeline_stage": 1},
            LOCAL,
            "virtual ones included",
        ),
        ({"reset_attention_mask": True}, ENGINE, "TransformerEngine's causal attention reads no mask"),
        (FUSED, GPU, "--no-masked-softmax-fusion reads it"),
        ({"window_size": (-1, 0)}, LOCAL, "--window-size -1,0: its local attention takes -1 as a number"),
        ({"window_size": (7, -1)}, GPU, "--window-size 7,-1: its local"),
        ({"window_size": (7, 0)}, LOCAL, None),
        ({"window_size": (-1, 0)}, ENGINE, None),
        ({"reset_attention_mask": True, "pipeline_model_parallel_size": 2}, LOCAL, None),
        (FUSED, LOCAL, None),
        (FUSED | {"seq_length": 8192}, GPU, None),
        (FUSED | {"masked_softmax_fusion": False}, GPU, None),
        ({"pipeline_model_parallel_size": 4}, ENGINE, None),
    ],
)
def test_what_makes_two_models_is_named(given: dict[str, Any], where: dict[str, bool], reason: str | None) -> None:
    for is_ours, runs in ((True, "runs there"), (False, "runs here")):
        text = model_difference(args(**given), is_ours=is_ours, **where)
        assert (text is None) if reason is None else (text is not None and reason in text and runs in text)


@pytest.mark.parametrize(
    ("given", "where", "is_dense", "is_told"),
    [
        (WINDOW, LOCAL, False, False),  # our attention runs on one rank, too
        (WINDOW, LOCAL, True, True),
        (WINDOW, ENGINE, False, True),
        (WINDOW | {"dataloader_inter_document_masking": True}, ENGINE, True, False),
    ],
)
def test_documents_without_a_mask_are_one_model(
    given: dict[str, Any], where: dict[str, bool], is_dense: bool, is_told: bool
) -> None:
    text = model_difference(args(**given), is_ours=False, is_dense=is_dense, **where)
    assert (text is not None) == is_told


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("auto", "in layers with a window"),
        ("longseq", "in layers with a window"),
        ("transformer_engine", "TransformerEngine's causal attention reads no mask"),
    ],
)
def test_local_layers_may_hold_te_attention(choice: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"context_parallel_size": 2, "context_parallel_attention": choice, "transformer_impl": "local"}
    _print_model_difference(args(**WINDOW, **given))
    assert reason in capsys.readouterr().out


@pytest.mark.slow
def test_it_is_said_once_in_the_runs_log(ranks: RankPool) -> None:
    """Rank 0 prints it when flags are parsed, before any process group exists."""
    base = flags(TINY, "--window-size=-1,0 --train-iters 1")
    for own, where in ((f"{PP2} --seq1f1b-splits 2", "there"), (f"{PP2} {VPP}", "here")):
        run_arm(ranks, "O", 2, base + flags(own))
        first, second = (log(ranks.logs, ranks.jobs, rank) for rank in range(2))
        assert len(re.findall(rf"> WARNING: with .* Upstream's attention runs {where}:", first)) == 1
        assert "another model" not in second
        assert first.index("another model") < first.index("initializing torch distributed")


def log(folder: Path, job: int, rank: int) -> str:
    return (folder / f"job{job:03d}-rank{rank}.log").read_text()
