"""The command `search`: what it prints, and that training's own validation accepts every plan."""

import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.longseq.planner.plan.bounds import PlanningProblem
from megatron.longseq.planner.plan.cluster import cluster
from megatron.longseq.planner.plan.launch import PlanChoice, flag_words, model_flags
from megatron.longseq.planner.plan.model import architecture
from megatron.longseq.planner.plan.task import PlanningTask, planning_task
from megatron.longseq.planner.tools import search_command
from megatron.longseq.planner.tools.cli import main
from megatron.longseq.planner.tools.search_tables import training_words
from megatron.longseq.planner.tools.training_flags import is_planned
from tests.pool import RankPool

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["search", "--model", "llama3-8b", "--cluster", "a100-16", "--seq-length", "32K", "--global-batch-size", "16"]
ONE_LAYOUT = ["--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "2", "--virtual-stages", "1"]


def validate(words: list[str], world: int, node: int) -> dict[str, Any]:
    """Parse and validate a command line as rank 0 of a job would, and return the resolved arguments. Runs on a rank."""
    import torch

    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(node), "RANK": "0", "LOCAL_RANK": "0"}
    import patches

    patches.start()
    from megatron.training import arguments

    sys.argv = ["pretrain_gpt.py", *words]
    args = arguments.parse_args()
    arguments.validate_args(args)
    assert not torch.distributed.is_initialized()
    names = ("data_parallel_size", "virtual_pipeline_model_parallel_size", "paro", "seq1f1b_splits", "zero_bubble")
    return {name: getattr(args, name) for name in names}


def check(ranks: RankPool, task: PlanningTask, choice: PlanChoice) -> None:
    """Validate a plan, and compare what upstream derives from its flags with what the planner assumes."""
    words = training_words(task, choice)
    layout, execution, sharding = choice
    (found,) = ranks.run(1, validate, words, task.space.gpus, task.space.gpus_per_node)
    assert found == {
        "data_parallel_size": task.space.gpus // (layout.tensor * layout.pipeline * layout.context),
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "paro": sharding.strategy,
        "seq1f1b_splits": execution.segments,
        "zero_bubble": execution.zero_bubble,
    }


@pytest.mark.parametrize(
    ("name", "machine", "seq_length", "batch"),
    [
        ("llama-7b", "a800-64", 131072, 32),
        pytest.param("llama3-70b", "h100-256", 32768, 128, marks=pytest.mark.slow),
        pytest.param("gpt3-175b", "a100-1024", 2048, 1024, marks=pytest.mark.slow),
    ],
)
def test_training_accepts_plans_from_all_over_the_space(
    ranks: RankPool, name: str, machine: str, seq_length: int, batch: int
) -> None:
    task = planning_task(architecture(name, {}), cluster(machine), seq_length, batch)
    problem, rng = PlanningProblem(task), random.Random(name)
    layouts = list(problem.roots())
    chosen = []
    # One plan for each mechanism, so that none is missing from the random ones.
    mechanisms = [
        lambda plan: plan.execution.zero_bubble,
        lambda plan: plan.execution.segments > 1 and plan.layout.virtual > 1,
        lambda plan: plan.execution.slack > 0,
        lambda plan: plan.sharding.group_size is not None,
        lambda plan: plan.layout.pipeline == 1,
    ]
    for wanted in mechanisms:
        for _ in range(500):
            layout = rng.choice(layouts).layout
            execution = rng.choice(list(task.space.executions(layout)))
            choice = PlanChoice(layout, execution, rng.choice(list(task.space.shardings(layout, execution))))
            if wanted(choice):
                chosen.append(choice)
                break
    assert len(chosen) == len(mechanisms)
    for choice in chosen:
        check(ranks, task, choice)


def test_every_printed_plan_can_be_launched(ranks: RankPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--tensor-model-parallel-size", "4", "8", "--top", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["plans"]) == 3 and all(plan["fits"] and not plan["reasons"] for plan in found["plans"])
    for plan in found["plans"]:
        words = shlex.split(plan["command"].replace("\\\n", " "))
        launcher, flags = words[: words.index("--") + 2], words[words.index("--") + 2 :]
        assert launcher[-1] == "examples/pretrain_gpt.py"
        ranks.run(1, validate, flags, 16, 8)
        printed = subprocess.run(
            [*launcher[: launcher.index("--")], "--dry-run", *launcher[launcher.index("--") :], *flags],
            cwd=ROOT,
            env=os.environ | {"MASTER_ADDR": "node-0"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "--nproc-per-node" in printed.replace("_", "-") and flags[-1] in printed


def test_the_command_has_the_positions_and_norms_of_a_hugging_face_config(tmp_path: Path) -> None:
    """Bases, scalings and epsilons as the config has them; scalings that upstream cannot express are refused."""
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 500000.0}
    config |= {"rms_norm_eps": 1e-06, "tie_word_embeddings": True, "partial_rotary_factor": 0.5}
    llama3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

    def words(**changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return " ".join(flag_words(model_flags(architecture(str(tmp_path), {}), 8192)))

    plain = words()
    assert "--rotary-base 500000 --rotary-percent 0.5 " in plain and "--norm-epsilon 1e-06 " in plain
    assert "--untie" not in plain and "scaling" not in plain
    assert "--use-rope-scaling --rope-scaling-factor 32 " in words(rope_scaling=llama3)
    assert "--rotary-seq-len-interpolation-factor 4 " in words(rope_scaling={"type": "linear", "factor": 4.0})
    assert "--rotary-base 1000000 " in words(rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    for scaling in ({"type": "yarn", "factor": 4.0}, llama3 | {"low_freq_factor": 2.0}):
        with pytest.raises(ValueError, match="for which the GPT script has no flag"):
            words(rope_scaling=scaling)


def test_the_command_says_what_was_priced(ranks: RankPool, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As many ranks as were planned, the padded vocabulary, and no flag of a plan that --training-flags may replace."""
    words = ["search", "--model", "llama-7b", "--cluster", "a100-12", "--seq-length", "4K", "--global-batch-size", "96"]
    words += ["--tensor-model-parallel-size", "2", "--no-recomputation", "--set", "padded_vocab_size=65536"]
    assert main([*words, "--command-only"]) == 0
    command = shlex.split(capsys.readouterr().out.replace("\\\n", " "))
    assert command[2:6] == ["--nodes", "2", "--gpus-per-node", "6"]
    flags = command[command.index("--") + 2 :]
    assert flags[flags.index("--padded-vocab-size") + 1] == "65536"
    ranks.run(1, validate, flags, 12, 6)
    free = {"lr", "min_lr", "weight_decay", "vocab_size"}
    printed = [word for word in flags[: flags.index("--lr")] if word.startswith("--")]
    assert printed and all(map(is_planned, printed)) and not any(map(is_planned, free - {"vocab_size"}))
    assert main([*words, "--command-only", "--training-flags", "--lr 1e-4 --vocab-size 32000"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("--lr 1e-4 --vocab-size 32000")
    found = []
    for kernels in ("", "--no-gradient-accumulation-fusion --deterministic-mode"):  # what is priced, and stated once
        assert main([*words, "--json", "--training-flags", f"--lr 1e-4 {kernels}"]) == 0
        found.append(json.loads(capsys.readouterr().out)["plans"][0])
        assert found[-1]["command"].count("--deterministic-mode") == bool(kernels)
    assert found[1]["step_seconds"] > found[0]["step_seconds"]


def test_a_model_without_flags_is_planned_but_not_launched(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"attention_bias": True}))
    words, folder = [*SMALL, *ONE_LAYOUT, "--no-recomputation", "--model", str(tmp_path)], tmp_path / "plans"
    folder.mkdir()
    (folder / "launch.sh").write_text("an earlier plan")
    assert main([*words, "--output", str(folder)]) == 0
    assert "No command launches it. model" in capsys.readouterr().out
    found = json.loads((folder / "plans.json").read_text())
    assert "has biases in attention alone" in found["not_launched"] and not (folder / "launch.sh").exists()
    assert found["plans"][0]["command"] is None and found["plans"][0]["step_seconds"] > 0
    monkeypatch.setattr(search_command, "search", lambda *_: pytest.fail("searched without a command to print"))
    assert main([*words, "--command-only"]) == 1
    assert "for which the GPT script has no flag" in capsys.readouterr().err


def test_the_table_explains_the_first_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*SMALL, *ONE_LAYOUT, "--output", str(tmp_path / "plans")]) == 0
    text = capsys.readouterr().out
    for part in (
        "Binding constraint: ",
        "| rejected neighbour |",
        "out of memory by",
        "not valid: ",
        "scripts/launch.sh",
    ):
        assert part in text
    written = {file.name for file in (tmp_path / "plans").iterdir()}
    assert written == {"plans.json", "plans.md", "launch.sh", "memory.svg", "seconds.svg", "front.svg", "timeline.svg"}
    report = json.loads((tmp_path / "plans" / "plans.json").read_text())
    best = report["plans"][0]
    assert best["step_seconds"] == pytest.approx(sum(best["breakdown"].values()))
    assert {one["resource"] for one in report["reliefs"]} >= {"compute", "memory", "bandwidth between nodes"}
    assert all(one["gain"] >= 0 for one in report["reliefs"])
    ranked = [plan["step_seconds"] for plan in report["plans"]]
    assert ranked == sorted(ranked) or max(ranked) / min(ranked) < 1.001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--set", "memory_bytes=5e9"], "no plan fits: a GPU has 5.0 GB, and every layout needs at least"),
        (["--set", "wheels=4"], "--set wheels=4: give NAME=VALUE"),
        (["--seq-length", "32X"], "'32X': give a whole number"),
        (["--cluster", "abacus-16"], "no cluster 'abacus-16'"),
        (["--tensor-model-parallel-size", "3"], "no layout divides 16 GPUs"),
        (["--model", "deepseek-v3"], "the planner searches dense models"),
        (["--top", "0"], "--top 0: give at least 1"),
        (["--set", "swiglu=maybe"], "swiglu is 'maybe', neither true nor false"),
        (["--set", "vocab_size=0"], "it has no vocab_size; give --set vocab_size="),
        (["--set", "normalization=BatchNorm"], "normalization 'BatchNorm': the GPT script trains with LayerNorm or"),
        (["--set", "hidden_dropout=1"], "hidden_dropout 1: give 0 or more, and less than 1"),
        (["--context-parallel-size", "0"], "--context-parallel-size 0: give at least 1"),
        (["--seq1f1b-slack", "-1"], "--seq1f1b-slack -1: give at least 0"),
        (["--gpus", "0"], "--gpus 0: give at least 1"),
        (["--training-flags", "--lr '1"], "--training-flags --lr '1: No closing quotation"),
        (["--training-flags", "--fp16"], "--training-flags: a plan sets --fp16, or its price depends on it"),
        (["--training-flags", "--lr 1e-4 --use-megatron-fsdp"], "--training-flags: a plan sets --use-megatron-fsdp"),
        (["--training-flags", "--no-overlap-p2p-communication"], "a plan sets --no-overlap-p2p-communication"),
        (
            ["--training-flags", "--fp8-format hybrid --hidden-dropout 0.5"],
            "a plan sets --fp8-format, --hidden-dropout",
        ),
        (["--training-flags", "--vocab-size 5"], "--training-flags: a plan sets --vocab-size"),
        (["--training-flags", "--micro-batch 4"], "'--micro-batch' (did you mean micro_batch_size?)"),
        (["--training-flags", "--optimizer sgd"], "--training-flags: optimizer 'sgd': the planner does not model it"),
        (["--output", "/dev/null"], "--output /dev/null: /dev/null is not a folder that this process can"),
        (["--set", "squared_relu=true"], "model llama3-8b: swiglu and squared_relu are two activations"),
        (["--set", "hidden_size=4100"], "model llama3-8b: hidden_size 4100 is not a multiple of 32 heads"),
        (
            ["--gpus", "20"],
            "cluster a100-20: 3 nodes cannot share 20 GPUs evenly, so no command launches them; give 16",
        ),
        (["--training-flags", "--seq-length 5 --paro=NIG"], "--training-flags: a plan sets --paro, --seq-length"),
        (["--paro-group-size", "3"], "--paro-group-size 3: PaRO's groups divide"),
        (["--tensor-model-parallel-size", "4", "3"], "--tensor-model-parallel-size 3: no layout of the search has it"),
        (["--set", "sms=0"], "cluster a100-16: sms must be positive, not 0"),
        (["--set", "link_latency=-1"], "cluster a100-16: link_latency must be 0 or more, not -1.0"),
        (["--set", "node_bandwidth=inf"], "cluster a100-16: node_bandwidth must be positive, not inf"),
        (["--strategies", "GNN"], "unknown strategies GNN: give some of upstream, upstream-zero1, NNI"),
    ],
    ids=str,
)
def test_errors_say_what_to_do(changes: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *ONE_LAYOUT, *changes]) == 1
    assert message in capsys.readouterr().err


LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "hidden_act": "silu"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_act": "gelu_pytorch_tanh"},
            "hidden_act 'gelu_pytorch_tanh': only families with a gated MLP and SiLU",
        ),
        ({"hidden_size": "4096"}, "hidden_size is '4096', not a whole number"),
        ({"num_hidden_layers": 32.5}, "num_layers is 32.5, not a whole number"),
        ({"num_key_value_heads": 5}, "num_query_groups 5 does not divide num_attention_heads 32"),
        ({"intermediate_size": None}, "lacks 'intermediate_size'; give upstream's flags in a JSON file"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "the planner searches dense models"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_planned_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {name: value for name, value in (LLAMA | changes).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main([*SMALL, *ONE_LAYOUT, "--model", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_a_config_with_a_window_and_dropout_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"sliding_window": 4096, "attention_dropout": 0.1}))
    found = architecture(str(tmp_path), {})
    assert (found.window_size, found.attention_dropout) == (4095, 0.1)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"sliding_window": 4096, "use_sliding_window": False}))
    assert architecture(str(tmp_path), {}).window_size == 0
