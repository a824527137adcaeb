"""The scripts of examples/usp: the paper's launches have the paper's flags; upstream's validation and ours pass."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron.longseq.runlog.record import STEP, record, to_json
from tests.pool import RankPool
from tests.scripts import example_scripts
from tests.scripts.example_scripts import script_flags, validated_args
from tests.scripts.fakes import ROOT

# (model, sequence, tensor / Ulysses / ring): GPUs, query groups, ffn size, padded vocabulary, micro-batches
PAPER = {
    ("8B", "64k", "1/8/2"): (16, 8, 14336, 128256, 1),
    ("8B", "64k", "1/4/4"): (16, 8, 14336, 128256, 1),
    ("8B", "64k", "1/2/8"): (16, 8, 14336, 128256, 1),
    ("8B", "64k", "1/1/16"): (16, 8, 14336, 128256, 1),
    ("8B", "64k", "8/1/2"): (16, 8, 14336, 129024, 1),
    ("8B", "208k", "8/1/2"): (16, 8, 14336, 129024, 1),
    ("7B", "64k", "4/2/1"): (8, 32, 11008, 32256, 16),
    ("7B", "30k", "1/8/1"): (8, 32, 11008, 32000, 16),
    ("7B", "30k", "1/1/8"): (8, 32, 11008, 32000, 16),
}


paper, composed, example = (
    partial(run, "usp") for run in (example_scripts.paper, example_scripts.composed, example_scripts.example)
)


def validated(jobs: list[tuple[list[str], int]]) -> list[dict[str, Any]]:
    """Parse and validate flags as on the first rank of jobs of these sizes; no group is made. Runs on a rank."""
    import patches

    patches.start()
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

    from megatron.longseq.attention.plan.comm_type import comm_types
    from patches.usp.conditions import spreads_attention

    found = []
    for flags, world in jobs:
        args = validated_args(flags, world)
        (way,) = comm_types(args).values()
        names = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups seq_length bf16 "
        names += "tensor_model_parallel_size sequence_parallel data_parallel_size transformer_impl mock_data "
        names += "hidden_dropout attention_dropout use_distributed_optimizer"
        found.append(
            {
                **{name: getattr(args, name) for name in names.split()},
                "spread": (way.mesh.ulysses, way.mesh.ring),
                "ours": spreads_attention(args),
                "padded_vocab_size": vocab_size_with_padding(args.vocab_size, args, logging_enabled=False),
                "microbatches": args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
            }
        )
    return found


def test_the_papers_configurations_are_legal(ranks: RankPool) -> None:
    jobs = []
    for words, (world, *_) in PAPER.items():
        command = composed(*words, "--dry-run")
        nodes = 1 if "--standalone" in command else int(command[command.index("--nnodes") + 1])
        assert nodes * int(command[command.index("--nproc-per-node") + 1]) == world
        jobs.append((script_flags(command), world))
    (found,) = ranks.run(1, validated, jobs)
    for (name, args), (_, groups, ffn, vocabulary, microbatches) in zip(
        zip(PAPER, found, strict=True), PAPER.values(), strict=True
    ):
        _, seq, layout = name
        tensor, ulysses, ring = map(int, layout.split("/"))
        expected = {
            "num_layers": 32,
            "hidden_size": 4096,
            "ffn_hidden_size": ffn,
            "num_attention_heads": 32,
            "num_query_groups": groups,
            "seq_length": int(seq.removesuffix("k")) * 1024,
            "tensor_model_parallel_size": tensor,
            "sequence_parallel": tensor > 1,
            "data_parallel_size": 1,
            "spread": (ulysses, ring),
            "ours": True,
            "padded_vocab_size": vocabulary,
            "microbatches": microbatches,
            "bf16": True,
            "mock_data": True,
            "transformer_impl": "local",
            "use_distributed_optimizer": True,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        assert {key: args[key] for key in expected} == expected, name


def test_further_flags_and_options_go_through() -> None:
    further = ["--seq1f1b-splits", "4", "--data-path", "my text", "--tokenizer-type", "GPT2BPETokenizer"]
    options = ["--slurm", "--slurm-arg", "--partition=big one", "--dry-run"]
    words = composed("8B", "64k", "1/4/4", *options, "--", *further)
    assert words[words.index("sbatch") + 1 :][:2] == ["--nodes", "2"] and "--partition=big one" in words
    flags = script_flags(words)
    assert flags[-6:] == further and "--mock-data" not in flags and flags.count("--tokenizer-type") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("70B", "64k", "1/4/4"), "no model 70B"),
        (("8B", "long", "1/4/4"), "long is not a sequence length"),
        (("8B", "64k", "4x4"), "4x4 is not a layout"),
        (("8B", "64k", "1/4/2"), "1/4/2: the product is not 16, the number of GPUs of 8B"),
        (("8B", "64k"), "--dry-run is not a layout"),
    ],
)
def test_what_the_paper_does_not_have_is_refused_with_what_it_has(words: tuple[str, ...], message: str) -> None:
    done = paper(*words, "--dry-run")
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and "8B 208k: 8/1/2" in done.stderr


@pytest.mark.slow
def test_the_laptops_run_shows_equal_losses(tmp_path: Path) -> None:
    done = example(tmp_path / "run", "--steps", "3")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert ", which is within rounding" in done.stdout and "s/step" in done.stdout
    chosen = "> attention over 4 context-parallel ranks (a2a+p2p): Ulysses 2 x ring 2"
    logs = {name: (tmp_path / "run" / name / "log.txt").read_text() for name in ("one", "hybrid", "segments")}
    assert [chosen in log for log in logs.values()] == [False, True, True]
    again = example(tmp_path / "run")
    assert again.returncode == 2 and "already holds a run" in again.stderr


@pytest.mark.parametrize(
    ("other", "status", "message"),
    [
        ([5.0, 4.0, 3.000001], 0, "the largest relative difference is 3.3e-07, which is within rounding"),
        ([5.0, 4.001, 3.0], 1, "differ by 2.5e-04, more than 1e-05"),
        ([5.0, float("nan"), 3.0], 1, "differ by nan"),
        ([float("nan"), 4.0, 3.0], 1, "differ by nan"),
        ([5.0, 4.0], 1, "other has steps [1, 2], one has [1, 2, 3]"),
        ([], 2, "the record contains no training step"),
    ],
)
def test_losses_that_differ_are_told(tmp_path: Path, other: list[float], status: int, message: str) -> None:
    for name, losses in (("one", [5.0, 4.0, 3.0]), ("other", other)):
        steps = [
            record(STEP, iteration=step, steps=1, tokens=8, losses={"lm loss": loss}, seconds=9.0 if step == 1 else 2.0)
            for step, loss in enumerate(losses, 1)
        ]
        (tmp_path / name / "start-0").mkdir(parents=True)
        (tmp_path / name / "start-0/steps.jsonl").write_text("".join(to_json(step) + "\n" for step in steps))
    runs = [f"{name}={tmp_path / name}" for name in ("one", "other")]
    command = [sys.executable, "-m", "examples.losses", *runs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status and message in done.stdout + done.stderr
    if status == 0:
        assert "s/step        2.00        2.00" in done.stdout
