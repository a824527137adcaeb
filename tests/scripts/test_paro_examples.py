"""The scripts of examples/paro: the paper's launches have the paper's flags; upstream's validation and ours pass."""

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron.longseq.sharding.plan.memory import Model, memory
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import RUNNING, Strategy
from tests.pool import RankPool
from tests.scripts import example_scripts
from tests.scripts.example_scripts import script_flags, validated_args
from tests.scripts.fakes import ROOT

# model: GPUs, layers, hidden size, ffn size, heads, parameters
MODELS = {
    "7B": (32, 32, 4096, 11008, 32, 6_738_415_616),
    "65B": (64, 80, 8192, 22016, 64, 65_285_660_672),
}


paper, composed, example = (
    partial(run, "paro") for run in (example_scripts.paper, example_scripts.composed, example_scripts.example)
)


def validated(jobs: list[tuple[list[str], int]]) -> list[dict[str, Any]]:
    """Parse and validate flags as on the first rank of jobs of these sizes; no group is made. Runs on a rank."""
    import patches

    os.environ["LOCAL_WORLD_SIZE"] = "8"
    patches.start()

    from megatron.longseq.sharding.plan.from_args import sharding_plan

    found = []
    for flags, world in jobs:
        args = validated_args(flags, world)
        names = "num_layers hidden_size ffn_hidden_size num_attention_heads seq_length bf16 paro_wire mock_data "
        names += "grad_reduce_in_bf16 accumulate_allreduce_grads_in_fp32 overlap_grad_reduce overlap_param_gather "
        names += "data_parallel_size use_distributed_optimizer recompute_granularity"
        result = {name: getattr(args, name) for name in names.split()}
        result["sharding"] = str(sharding_plan(args)).partition(" (here")[0]
        result["microbatches"] = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
        found.append(result)
    return found


def test_the_papers_configurations_are_legal(ranks: RankPool) -> None:
    cases = [("7B", "NIG"), ("7B", "ING"), ("65B", "IIG"), ("65B", "GGG")]
    jobs = []
    for model, triplet in cases:
        flat = ["--", "--paro-collectives", "flat"] if triplet == "GGG" else []
        command, world = composed(model, triplet, "--dry-run", *flat), MODELS[model][0]
        assert int(command[command.index("--nnodes") + 1]) * 8 == world
        assert command[command.index("--nproc-per-node") + 1] == "8"
        jobs.append((script_flags(command), world))
    (found,) = ranks.run(1, validated, jobs)
    for (model, triplet), args in zip(cases, found, strict=True):
        world, layers, hidden, ffn, heads, _ = MODELS[model]
        groups = f"in {world // 8} group(s) of 8, overlapped" if triplet != "GGG" else f"in 1 group(s) of {world}, flat"
        expected = {
            "num_layers": layers,
            "hidden_size": hidden,
            "ffn_hidden_size": ffn,
            "num_attention_heads": heads,
            "seq_length": 2048,
            "bf16": True,
            "paro_wire": "bf16",
            "grad_reduce_in_bf16": False,
            "accumulate_allreduce_grads_in_fp32": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "data_parallel_size": world,
            "use_distributed_optimizer": True,
            "recompute_granularity": "full",
            "mock_data": True,
            "sharding": f"PaRO {triplet}: {world} data-parallel rank(s) {groups} collectives",
            "microbatches": 8,
        }
        assert args == expected, (model, triplet)


def test_further_flags_and_options_go_through() -> None:
    further = ["--paro-group-size", "16", "--data-path", "my text", "--tokenizer-type", "GPT2BPETokenizer"]
    options = ["--slurm", "--slurm-arg", "--partition=big one", "--dry-run"]
    words = composed("65B", "IIG", *options, "--", *further)
    assert words[words.index("sbatch") + 1 :][:2] == ["--nodes", "8"] and "--partition=big one" in words
    flags = script_flags(words)
    assert flags[-6:] == further and "--mock-data" not in flags and flags.count("--tokenizer-type") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("13B", "NIG"), "no model 13B"),
        (("7B", "IIN"), "IIN is not a supported triplet"),
        (("7B", "GNG"), "GNG is not a supported triplet"),
        (("7B",), "--dry-run is not a supported triplet"),
    ],
)
def test_what_does_not_run_is_refused_with_what_does(words: tuple[str, ...], message: str) -> None:
    done = paper(*words, "--dry-run")
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and "7B (32 GPUs), 65B (64)" in done.stderr
    listed = done.stderr.split("PGO:")[1].split(";")[0].split()
    assert sorted(listed) == sorted(map(str, RUNNING))


def test_the_folders_memory_is_the_formulas() -> None:
    rows = re.findall(r"^\| (\w{3}) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "examples/paro/README.md").read_text(), re.M)
    assert {name for name, *_ in rows} == set(map(str, RUNNING))
    for name, *cells in rows:
        for (world, *_, params), cell in zip(MODELS.values(), cells, strict=True):
            size = memory(Strategy.parse(name), RankGroups(world, 8), Model(params, params))
            assert cell == f"{size.total / 1e9:.1f}", name


@pytest.mark.slow
def test_the_laptops_run_shows_equal_losses(tmp_path: Path) -> None:
    done = example(tmp_path / "run", "--steps", "3", "NIG", "IIG")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert ", which is within rounding" in done.stdout and "s/step" in done.stdout
    for triplet in ("NIG", "IIG"):
        assert f"> PaRO {triplet}: 4 data-parallel rank(s) in 2 group(s) of 2" in done.stdout
    assert "> PaRO" not in (tmp_path / "run/upstream/log.txt").read_text()
    again = example(tmp_path / "run", "GGG")
    assert again.returncode == 2 and "already holds a run" in again.stderr


@pytest.mark.parametrize(("words", "message"), [(("IIN!",), "unknown option IIN!"), (("--steps", "0"), "--steps 0")])
def test_the_laptops_run_refuses_what_means_nothing(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = example(tmp_path / "run", *words)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "run").exists()
