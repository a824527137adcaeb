"""The examples' scripts: the paper's launches have the paper's flags, which upstream's validation and ours accept."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron.longseq.pipeline.tools.paper import MODELS
from tests.pool import RankPool
from tests.scripts import example_scripts
from tests.scripts.example_scripts import script_flags, validated_args

GPUS = {"2.7B": 8, "7B": 32, "13B": 32, "30B": 64}


paper, composed, example = (
    partial(run, "seq1f1b") for run in (example_scripts.paper, example_scripts.composed, example_scripts.example)
)


def validated(job: tuple[list[str], int]) -> dict[str, Any]:
    """Parse and validate flags as on the first rank of a job of that size; no process group is made. Runs on a rank."""
    import patches

    patches.start()
    args = validated_args(*job)

    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

    from megatron.longseq.pipeline.plan.from_args import plan_from_args

    plan = plan_from_args(args)
    names = "num_layers hidden_size num_attention_heads seq_length sequence_parallel bf16 data_parallel_size mock_data "
    names += "tensor_model_parallel_size pipeline_model_parallel_size seq1f1b_splits hidden_dropout attention_dropout "
    names += "use_distributed_optimizer untie_embeddings_and_output_weights position_embedding_type eval_interval"
    return {
        **{name: getattr(args, name) for name in names.split()},
        "lengths": plan.lengths,
        "virtual": plan.virtual,
        "padded_vocab_size": vocab_size_with_padding(args.vocab_size, args, logging_enabled=False),
        "actions": len(plan.schedule(16).orders[0]),
        "microbatches": args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
    }


def of_this_size(ranks: RankPool, flags: list[str], world: int) -> dict[str, Any]:
    (result,) = ranks.run(1, validated, (flags, world))
    return result


@pytest.mark.parametrize(("model", "seq"), [("2.7B", "16k"), ("7B", "128k"), ("13B", "48k"), ("30B", "65536")])
def test_the_papers_configurations_are_legal(ranks: RankPool, model: str, seq: str) -> None:
    words = composed(model, seq, "--dry-run")
    stages, tensor, shape = MODELS[model]
    world = GPUS[model]
    nodes = 1 if "--standalone" in words else int(words[words.index("--nnodes") + 1])
    assert nodes * int(words[words.index("--nproc-per-node") + 1]) == world
    args = of_this_size(ranks, script_flags(words), world)
    tokens = int(seq.removesuffix("k")) * (1024 if seq.endswith("k") else 1)
    expected = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": stages,
        "data_parallel_size": world // (tensor * stages),
        "sequence_parallel": tensor > 1,
        "seq_length": tokens,
        "seq1f1b_splits": 4,
        "microbatches": 16,
        "actions": 2 * 16 * 4,
        "padded_vocab_size": shape.padded_vocab_size,
        "bf16": True,
        "mock_data": True,
        "untie_embeddings_and_output_weights": True,
        "use_distributed_optimizer": True,
        "position_embedding_type": "rope",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    assert {name: args[name] for name in expected} == expected
    lengths = args["lengths"]
    assert sum(lengths) == tokens and sorted(lengths, reverse=True) == list(lengths) and lengths[0] > lengths[3]
    assert args["eval_interval"], "upstream divides by it, also where nothing is evaluated"


def test_further_flags_and_options_go_through(ranks: RankPool) -> None:
    further = ["--seq1f1b-splits", "8", "--num-layers-per-virtual-pipeline-stage", "1"]
    words = composed("30B", "64k", "--slurm", "--slurm-arg", "--partition=big one", "--dry-run", "--", *further)
    assert words[words.index("sbatch") + 1 :][:2] == ["--nodes", "8"] and "--partition=big one" in words
    assert script_flags(words)[-4:] == further
    args = of_this_size(ranks, script_flags(words), 64)
    assert (args["seq1f1b_splits"], args["virtual"], len(args["lengths"])) == (8, 8, 8)


def test_a_corpus_takes_the_place_of_mock_data() -> None:
    own = ["--data-path", "my text", "--tokenizer-type", "GPT2BPETokenizer"]
    flags = script_flags(composed("7B", "32k", "--dry-run", "--", *own))
    assert flags[-4:] == own and "--mock-data" not in flags and flags.count("--tokenizer-type") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("70B", "64k"), "no model 70B"),
        (("7B", "long"), "long is not a sequence length"),
        (("7B", "0k"), "0k is not a sequence length"),
        (("7B",), "a model and a sequence length are needed"),
        (("7", "64k"), "no model 7\n"),
    ],
)
def test_what_the_paper_does_not_have_is_refused_with_what_it_has(words: tuple[str, ...], message: str) -> None:
    done = paper(*words)
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and "2.7B (8 GPUs), 7B (32), 13B (32), 30B (64)" in done.stderr


@pytest.mark.slow
def test_the_laptops_run_shows_equal_losses_and_a_picture(tmp_path: Path) -> None:
    done = example(tmp_path / "run", "--steps", "4")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1F1B     Seq1F1B" in done.stdout and ", which is within rounding" in done.stdout
    assert (tmp_path / "run/timeline.png").read_bytes().startswith(b"\x89PNG")
    again = example(tmp_path / "run")
    assert again.returncode == 2 and "already holds a run" in again.stderr
