"""Flags of packed documents: who packs, whose attention reads them, and what is refused by name with the reason."""

import os
import sys
from argparse import Namespace
from typing import Any

import pytest

from megatron.longseq.attention.arguments import NOT_WITH_DOCUMENTS, NOT_WITH_SFT
from megatron.longseq.refusals import refused
from patches.packed import conditions
from tests.distributed.flags import TINY, flags
from tests.pool import RankPool
from tests.unit.test_pipeline_flags import args

SERVED = {"attention_dropout": 0.0, "transformer_impl": "local"}
STORED = {"dataloader_inter_document_masking": True}
MASK = {"reset_attention_mask": True}
SFT = {"sft": True}
SEGMENTS = {"seq1f1b_splits": 2}
CONTEXT = {"context_parallel_size": 2}
ENGINE = {"transformer_impl": "transformer_engine"}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("--attention-dropout", {"attention_dropout": 0.1}, "give 0"),
    ("--multi-latent-attention", {"multi_latent_attention": True}, "different sizes"),
    ("--is-hybrid-model", {"is_hybrid_model": True}, "recurrent"),
    ("--experimental-attention-variant", {"experimental_attention_variant": "dsa"}, "its own core attention"),
    ("--softmax-type", {"softmax_type": "learnable"}, "plain softmax"),
    ("--qk-clip", {"qk_clip": True}, "logits"),
    ("--window-size", {"window_size": (8, 8)}, "not causal"),
    ("--mtp-num-layers", {"mtp_num_layers": 1}, "next document"),
    ("--hybrid-context-parallel", {"hybrid_context_parallel": True}, "from batch to batch"),
    ("--cuda-graph-impl", {"cuda_graph_impl": "local"}, "graph"),
    ("--position-embedding-type mrope", {"position_embedding_type": "mrope"}, "images"),
    ("--allow-ambiguous-pad-tokens", MASK | {"allow_ambiguous_pad_tokens": True}, "where documents end"),
]
REFUSED_SFT: list[tuple[str, dict[str, Any]]] = [
    ("--reset-attention-mask", MASK),
    ("--reset-position-ids", {"reset_position_ids": True}),
    ("--mock-data", {"mock_data": True}),
    ("--tokenizer-type", {"tokenizer_type": "NullTokenizer"}),
]


@pytest.mark.parametrize(("flag", "values", "why"), REFUSED)
def test_what_documents_do_not_serve_is_named(flag: str, values: dict[str, Any], why: str) -> None:
    (line,) = refused(args(**SERVED | values), NOT_WITH_DOCUMENTS)
    assert line.startswith(f"  {flag}: ") and why in line


def test_every_refusal_is_tried() -> None:
    assert {flag for flag, _, _ in REFUSED} == set(NOT_WITH_DOCUMENTS)
    packages = {"the package datasets", "the package transformers"}
    assert {flag for flag, _ in REFUSED_SFT} == set(NOT_WITH_SFT) - packages


@pytest.mark.parametrize(("flag", "values"), REFUSED_SFT)
def test_what_conversations_do_not_serve_is_named(
    flag: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    given = args(**SFT | {"tokenizer_type": "SFTTokenizer"} | values)
    assert [line.split(":")[0] for line in refused(given, NOT_WITH_SFT)] == [f"  {flag}"]


def test_missing_packages_are_named_with_the_way_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines = refused(args(**SFT, tokenizer_type="SFTTokenizer"), NOT_WITH_SFT)
    assert len(lines) == 2 and all("pip install" in line for line in lines)


@pytest.mark.parametrize(
    ("values", "packs", "at_eod"),
    [
        ({}, False, False),
        (STORED, True, False),
        (SFT, True, False),
        (MASK, True, True),
        (MASK | STORED, True, False),
        (MASK | {"attention_dropout": 0.1}, False, False),  # upstream's own attention, with its dense mask
        (MASK | CONTEXT | {"attention_dropout": 0.1}, True, True),  # refused later
        (MASK | SEGMENTS, True, True),
        ({"reset_position_ids": True}, False, False),
    ],
    ids=str,
)
def test_who_packs(values: dict[str, Any], packs: bool, at_eod: bool) -> None:
    given = args(**SERVED | values)
    assert (conditions.packs_documents(given), conditions.ends_documents_at_eod(given)) == (packs, at_eod)


def test_the_layers_of_transformer_engine_keep_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for values in (STORED, SFT, MASK, STORED | CONTEXT):
        assert not conditions.packs_documents(args(**SERVED | values | ENGINE))
        assert not conditions.reads_documents(args(**SERVED | values | ENGINE))
    assert conditions.packs_documents(args(**SERVED | STORED | ENGINE | SEGMENTS))


def validated(case: list[str]) -> Any:
    """Validate flags on a rank, and return the resulting flags of the data loader, or the refusal."""
    import patches

    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    sys.argv = ["pretrain_gpt.py", *case]
    patches.start()
    from megatron.training import arguments

    given: Namespace = arguments.parse_args()  # applies the patches of these flags, that of validate_args, too
    try:
        arguments.validate_args(given)
    except ValueError as error:
        return str(error)
    return given.create_attention_mask_in_dataloader, given.dataloader_inter_document_masking


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ("", (True, False)),
        ("--reset-attention-mask", (False, True)),
        ("--reset-attention-mask --attention-dropout 0.1", (True, False)),
        ("--dataloader-inter-document-masking --attention-dropout 0.1", "--attention-dropout with --dataloader-inter"),
        ("--reset-attention-mask --context-parallel-size 2 --attention-dropout 0.1", "--attention-dropout with"),
        ("--sft", "--tokenizer-type with --sft: "),
    ],
)
def test_upstreams_validation_refuses_what_documents_cannot_serve(ranks: RankPool, own: str, found: Any) -> None:
    world = 2 if "context" in own else 1
    result = ranks.run(world, validated, flags(TINY, own))[0]
    assert found in result if isinstance(found, str) else result == found
