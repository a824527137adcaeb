"""The paper's configurations compose, and upstream's validation and ours accept them; unknown ones are refused."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.pool import RankPool

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "examples/seq1f1b/paper.sh"
SIZES = {"2.7B": (8, 8, 1), "7B": (32, 4, 8), "13B": (32, 4, 8), "30B": (64, 8, 8)}  # GPUs, PP, TP


def composed(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(PAPER), *words], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )


def validated(flags: list[str], world: int) -> dict[str, Any]:
    """Run in a rank: parse and validate as a job of `world` GPUs would, without starting one."""
    import os
    import sys

    os.environ |= {"WORLD_SIZE": str(world), "RANK": "0"}
    sys.argv = ["pretrain_gpt.py", *flags]
    import patches

    patches.start()
    from megatron.training.arguments import parse_args, validate_args

    from megatron.longseq.pipeline.plan import plan_from_args

    args = parse_args()
    validate_args(args)
    plan = plan_from_args(args)
    return {
        "stages": plan.stages,
        "lengths": plan.lengths,
        "tensor": args.tensor_model_parallel_size,
        "data": args.data_parallel_size,
        "mock": args.mock_data,
        "actions": len(plan.schedule(16).orders[0]),
    }


@pytest.mark.parametrize("length", ["16k", "64k"])
@pytest.mark.parametrize("model", SIZES)
def test_the_papers_configurations_are_legal(ranks: RankPool, model: str, length: str) -> None:
    done = composed(model, length, "--slurm", "--dry-run")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[-1])
    gpus, stages, tensor = SIZES[model]
    assert words[words.index("--nodes") + 1] == str(gpus // 8) or f"--nodes={gpus // 8}" in words
    flags = words[max(i for i, word in enumerate(words) if word.endswith("pretrain_gpt.py")) + 1 :]
    (found,) = ranks.run(1, validated, flags, gpus, timeout=60)
    assert (found["stages"], found["tensor"], found["data"]) == (stages, tensor, 1)
    assert len(found["lengths"]) == 4 and sum(found["lengths"]) == int(length[:-1]) * 1024
    assert found["actions"] == 2 * 16 * 4


def test_a_corpus_takes_the_place_of_mock_data() -> None:
    done = composed("7B", "32k", "--slurm", "--dry-run", "--", "--data-path", "corpus", "--seq1f1b-splits", "8")
    assert done.returncode == 0 and "--mock-data" not in done.stdout
    assert "--seq1f1b-splits 8" in done.stdout


@pytest.mark.parametrize("words", [("70B", "32k"), ("7B", "33k"), ("7B",)])
def test_other_sizes_are_refused_with_the_list(words: tuple[str, ...]) -> None:
    done = composed(*words)
    assert done.returncode == 2 and "2.7B (8 GPUs" in done.stderr
