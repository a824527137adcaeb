"""The flag of the chunked cross entropy: what it refuses, what it leaves alone, and which models it supports."""

import sys
import warnings
from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron.longseq.cross_entropy.arguments import (
    NOT_IN_CHUNKS,
    check_cross_entropy_numbers,
    describe_chunks,
    refuse_unserved_cross_entropy,
    wants_chunks,
)
from tests.distributed.flags import TINY, flags
from tests.pool import RankPool
from tests.unit import weight_bed
from tests.unit.test_pipeline_flags import args, messages

# Every way to ask for what chunks do not support: (flag in the message, values, why)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("--cross-entropy-loss-fusion", {"cross_entropy_loss_fusion": True}, "leave one of the two out"),
    ("--fp16-lm-cross-entropy", {"fp16_lm_cross_entropy": True}, "does not read this flag either"),
    ("--defer-embedding-wgrad-compute", {"defer_embedding_wgrad_compute": True}, "gradients of whole logits"),
    ("--mtp-num-layers", {"mtp_num_layers": 1}, "further predictions"),
    ("--is-hybrid-model", {"is_hybrid_model": True}, "only GPTModel is supported"),
    ("--is-hybrid-model", {"hybrid_layer_pattern": "M*-"}, "only GPTModel is supported"),
    ("--fp8-output-proj", {"fp8_output_proj": True}, "TransformerEngine's"),
    ("--tensor-parallel-num-weight-shards", {"gtp_weight_remat_size": 2}, "gathered for every chunk"),
    ("--use-megatron-fsdp", {"use_megatron_fsdp": True}, "--paro GGG"),
    ("--use-megatron-fsdp", {"use_torch_fsdp2": True}, "--paro GGG"),
    ("--config-logger-dir", {"config_logger_dir": "here"}, "whole logits"),
    ("--logits-save-dir", {"logits_save_dir": "here"}, "whole output"),
    ("--logits-load-dir", {"logits_load_dir": "here"}, "whole output"),
    ("--save-activations-interval", {"save_activations_interval": 1}, "save losses"),
    ("--save-dgrads-interval", {"save_dgrads_interval": 1}, "gradients of losses"),
    ("--cuda-graph-impl full_iteration", {"cuda_graph_impl": "full_iteration"}, "CUDA graph"),
    ("--overlap-moe-expert-parallel-comm", {"overlap_moe_expert_parallel_comm": True}, "schedule"),
]


def refused(given: Namespace) -> list[str]:
    """Return the lines of the refusal, or none."""
    try:
        refuse_unserved_cross_entropy(given)
    except ValueError as error:
        return str(error).splitlines()[1:]
    return []


@pytest.mark.parametrize(("flag", "values", "why"), REFUSED)
def test_refuses_by_name_and_reason(flag: str, values: dict[str, Any], why: str) -> None:
    lines = refused(args(**values))
    assert len(lines) == 1 and lines[0].startswith(f"  {flag} with --cross-entropy-chunk-tokens: ") and why in lines[0]


def test_every_refusal_is_tried() -> None:
    assert {flag for flag, _, _ in REFUSED} == set(NOT_IN_CHUNKS)
    assert refused(args(cuda_graph_impl="local", use_mup=True, gradient_accumulation_fusion=True)) == []


def test_numbers() -> None:
    check_cross_entropy_numbers(args(cross_entropy_chunk_tokens=1))
    check_cross_entropy_numbers(Namespace())  # a script's own namespace, without our flags
    assert [wants_chunks(given) for given in (args(), args(cross_entropy_chunk_tokens=1), Namespace())] == [0, 1, 0]
    with pytest.raises(ValueError, match="--cross-entropy-chunk-tokens 0: give at least 1"):
        check_cross_entropy_numbers(args(cross_entropy_chunk_tokens=0))


@pytest.mark.parametrize(
    ("chunk", "context", "lengths", "warns"),
    [
        (127, 1, (64,), False),
        (128, 1, (64,), True),
        (64, 2, (64,), True),
        (79, 1, (40, 24), False),
        (80, 1, (40,), True),
    ],
)
def test_chunks_that_hold_whole_logits_are_told(
    chunk: int, context: int, lengths: tuple[int, ...], warns: bool
) -> None:
    sizes = {"micro_batch_size": 2, "eval_micro_batch_size": 1, "seq_length": 64, "context_parallel_size": context}
    text = describe_chunks(args(**sizes, cross_entropy_chunk_tokens=chunk), lengths)
    assert text.startswith("WARNING") == warns and f"chunks of {chunk} tokens" in text


def test_upstreams_validation_refuses_unsupported_flags(ranks: RankPool) -> None:
    cases: dict[str, str | None] = {
        "--cross-entropy-chunk-tokens 16": None,
        "--cross-entropy-chunk-tokens -1": "--cross-entropy-chunk-tokens -1: give at least 1",
        "--cross-entropy-chunk-tokens 16 --cross-entropy-loss-fusion": "--cross-entropy-loss-fusion with --cross-",
        "--cross-entropy-chunk-tokens 16 --mtp-num-layers 1": "--mtp-num-layers with --cross-entropy-chunk-tokens",
    }
    for case, message, want in zip(cases, messages(ranks, *cases), cases.values(), strict=True):
        assert (message is None) == (want is None), (case, message)
        assert want is None or (message is not None and want in message)


def applied_by(case: list[str]) -> tuple[list[str], bool]:
    """Return what the flags apply, and whether upstream's `_postprocess` stays in its place. Runs on a rank."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training import arguments

    import patches
    from patches.engine.session import SESSION

    own = GPTModel._postprocess
    patches.start()
    sys.argv = ["pretrain_gpt.py", *case]
    arguments.parse_args()
    return sorted(name for name in SESSION.hashes if name.startswith("cross_entropy.")), GPTModel._postprocess is own


@pytest.mark.parametrize("given", [False, True])
def test_without_the_flag_upstreams_own_function_runs(ranks: RankPool, given: bool) -> None:
    ours = ["cross_entropy.arguments", "cross_entropy.chunks", "cross_entropy.model"]
    (found,) = ranks.run(1, applied_by, flags(TINY, "--cross-entropy-chunk-tokens 16" * given))
    assert found == ((ours, False) if given else ([], True))


def messages_of_models() -> dict[str, str]:
    """Return what is said of models before their first step. Runs on a rank."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from patches.cross_entropy.runtime import with_checked_model

    class OwnLoss(GPTModel):
        def compute_language_model_loss(self, labels: Any, logits: Any) -> Any:
            return logits.mean()

    class OwnLayer(ColumnParallelLinear):
        pass

    with weight_bed.world(weight_bed.Case()):
        steps = with_checked_model(lambda: lambda *, model: None)()
        served, loss, layer, gathers, bias = (weight_bed.model_of(weight_bed.Case()) for _ in range(5))
        loss.__class__, layer.output_layer.__class__, gathers.output_layer.gather_output = OwnLoss, OwnLayer, True
        bias.output_layer.bias = torch.nn.Parameter(torch.zeros(1))
        hidden = weight_bed.model_of(weight_bed.Case())
        hidden.post_process = False  # an earlier pipeline stage
        steps(model=[torch.nn.Sequential(served), hidden])
        models = {"loss": loss, "layer": layer, "gathers": gathers, "bias": bias, "other": torch.nn.Linear(1, 1)}
        messages = {}
        for name, model in models.items():
            try:
                steps(model=model)
            except ValueError as error:
                messages[name] = str(error)
        return messages


def test_other_models_are_refused_before_their_first_step(ranks: RankPool) -> None:
    (found,) = ranks.run(1, messages_of_models)
    words = {
        "loss": "does not support this OwnLoss: its compute_language_model_loss is not upstream's",
        "layer": "does not support this GPTModel: its output layer is OwnLayer",
        "gathers": "does not support this GPTModel: it gathers whole logits",
        "bias": "does not support this GPTModel: its output layer has a bias",
        "other": "supports GPTModel only; this model is Linear",
    }
    assert found.keys() == words.keys() and all(words[name] in found[name] for name in words), found


def calls_of_scripts() -> tuple[bool, list[str], str]:
    """Return what scripts get that do not ask for losses, and what is said about it. Runs on a rank."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training import global_vars

    from patches.cross_entropy.runtime import with_chunked_loss

    with weight_bed.world(weight_bed.Case()):
        global_vars._GLOBAL_ARGS = Namespace(cross_entropy_chunk_tokens=3, overlap_grad_reduce=False)
        model = weight_bed.model_of(weight_bed.Case())
        tokens = torch.arange(weight_bed.SEQUENCE)[None]
        inputs = (tokens, tokens, torch.ones(16, 16, dtype=torch.bool).triu(1)[None, None])
        upstreams = model(*inputs)
        GPTModel._postprocess = with_chunked_loss(GPTModel._postprocess)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            same = torch.equal(model(*inputs), upstreams)
            handed = model(*inputs, labels=tokens, output_processor=lambda **given: given["hidden_states"])
        same &= handed.shape == (16, 1, weight_bed.HIDDEN)
        try:
            model(*inputs, labels=tokens, runtime_gather_output=True)
        except ValueError as error:
            return same, [str(one.message) for one in caught], str(error)
    return same, [], ""


def test_a_script_that_asks_for_logits_gets_them_and_is_told(ranks: RankPool) -> None:
    (found,) = ranks.run(1, calls_of_scripts)
    same, warned, refusal = found
    assert same and "runtime_gather_output=True" in refusal
    assert [text.split(": ")[1].split(",")[0] for text in warned if "--cross-entropy-chunk-tokens" in text] == [
        "the script asks the model for logits (labels=None)",
        "the script gives the model an output_processor",
    ]
