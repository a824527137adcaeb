"""A dry run reports what a rank of a large job would hold, without its memory and without the other ranks."""

import math
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron.longseq.distributed import translated_groups
from megatron.longseq.dry_run.arguments import check_dry_run
from megatron.longseq.dry_run.report import command_flags, predicted
from megatron.longseq.pipeline.plan.generators import make
from megatron.longseq.pipeline.plan.schedule import Pipeline
from megatron.longseq.sharding.runtime.bucket_layout import BUCKET_ALIGNMENT

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
--num-layers 4 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 512 --swiglu --normalization RMSNorm
--position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0
--attention-dropout 0 --seq-length 128 --max-position-embeddings 128 --micro-batch-size 1 --global-batch-size 1024
--lr 1e-3 --train-iters 2 --tokenizer-type NullTokenizer --vocab-size 1000 --mock-data --bf16
"""
LAYER = 4 * 256 * 256 + 3 * 256 * 512 + 2 * 256  # attention, MLP, norms
VOCABULARY = 1024 * 256  # padded to a multiple of 128 times 2


def dry_run(*words: str, model: str = MODEL) -> tuple[str, dict[str, float]]:
    """Return what a dry run prints, and its table: bytes of this rank by kind."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "pretrain_gpt.py"), *model.split(), *words]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = re.findall(r"^\| ([a-z ]+) \| ([\d.e-]+) \|", ran.stdout, re.MULTILINE)
    return ran.stdout, {kind.strip(): float(size) * 1e9 for kind, size in rows}


@pytest.mark.slow
def test_the_states_of_a_rank_of_4096_are_those_of_the_formula() -> None:
    """The last of four stages: a layer, the norm and the output layer, each halved by tensor parallelism.

    Attention is a ring of four ranks, in two segments.
    """
    shape = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --context-parallel-size 4"
    own = "--paro NIG --paro-group-size 8 --seq1f1b-splits 2"
    printed, table = dry_run("--dry-run-world", "4096", "--dry-run-rank", "4095", *shape.split(), *own.split())
    parameters = int(re.search(r"> ([\d,]+) parameters", printed)[1].replace(",", ""))
    assert parameters == (LAYER - 512) // 2 + 512 + VOCABULARY // 2 + 256
    assert "(tensor 1, context 3, data 127, pipeline 3)" in printed and "rank 4095 of 4096" in printed
    padded = math.ceil(parameters / (8 * BUCKET_ALIGNMENT)) * 8 * BUCKET_ALIGNMENT  # one bucket, sharded in groups of 8
    assert table["parameters"] == pytest.approx(2 * padded, rel=5e-4)  # printed with four digits
    assert table["gradients"] == pytest.approx(4 * padded / 8, rel=5e-4)
    logits = 128 // 4 * 1024 // 2 * 4  # of a quarter of the tokens, in float32
    assert logits < table["activations at the peak"] < 4 * 2 * logits


@pytest.mark.slow
def test_experts_are_counted_without_their_activations() -> None:
    own = "--num-experts 4 --expert-model-parallel-size 2 --moe-ffn-hidden-size 512 --tensor-model-parallel-size 1"
    printed, table = dry_run("--dry-run-world", "8", *own.split())
    parameters = int(re.search(r"> ([\d,]+) parameters", printed)[1].replace(",", ""))
    mlp, router = 3 * 256 * 512, 4 * 256
    assert parameters == 4 * (LAYER - mlp + 2 * mlp + router) + 2 * VOCABULARY + 256
    assert "depends on how many tokens each expert gets" in printed and "activations at the peak" not in table
    assert table["parameters"] == pytest.approx(2 * parameters, rel=5e-4)
    assert table["sum without activations"] == pytest.approx(sum(table.values()) / 2, rel=5e-4)
    planned = dict(re.findall(r"^\| ([a-z ]+) \| [\d.e-]* \| ([\d.e-]+) \|$", printed, re.MULTILINE))
    states = sum(float(planned[kind]) for kind in ("parameters", "gradients", "optimizer states"))
    assert float(planned["sum without activations"]) == pytest.approx(states, rel=5e-3)


@pytest.mark.slow
def test_flags_that_read_values_or_gather_weights_are_measured() -> None:
    """Recomputed attention reads its mask's kind, frozen layers are counted, and the forward gathers weights."""
    own = "--recompute-activations --train-only mlp --use-distributed-optimizer --overlap-grad-reduce"
    _, table = dry_run("--dry-run-world", "8", "--overlap-param-gather", *own.split())
    trained = 4 * (3 * 256 * 512)
    assert table["gradients"] == pytest.approx(4 * trained, rel=5e-3)
    assert table["optimizer states"] == pytest.approx(12 * trained / 8, rel=5e-3)
    assert 0 < table["activations at the peak"] < 128 * 1024 * 4 + 4 * 60 * 128 * 256


@pytest.mark.slow
def test_an_optimizer_without_main_parameters_is_counted() -> None:
    printed, table = dry_run("--dry-run-world", "8", model=MODEL.replace("--bf16", ""))
    parameters = int(re.search(r"> ([\d,]+) parameters", printed)[1].replace(",", ""))
    assert table["parameters"] == table["gradients"] == pytest.approx(4 * parameters, rel=5e-4)
    assert table["optimizer states"] == pytest.approx(2 * 4 * parameters, rel=5e-4)


def test_an_optimizer_may_keep_fewer_numbers_than_adam() -> None:
    from megatron.longseq.dry_run.measure import _numbers_of_a_parameter

    kinds = {("adam", 0.9): 2, ("sgd", 0.9): 1, ("sgd", 0.0): 0, ("lion", 0.9): 1}
    for (kind, momentum), numbers in kinds.items():
        assert _numbers_of_a_parameter(Namespace(optimizer=kind, sgd_momentum=momentum)) == numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--skip-train", "error: These flags cannot be combined:\n  --skip-train with --dry-run-world"),
        ("--multi-latent-attention", "error: upstream refuses the model of these flags: TypeError: "),
    ],
)
def test_a_refusal_is_one_message(flag: str, message: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "patches", "run", "examples/pretrain_gpt.py", *MODEL.split()]
    ran = subprocess.run([*command, "--dry-run-world=8", flag], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert message in ran.stderr


def test_groups_of_a_grid_are_found_from_one_of_them() -> None:
    grid = [(tp + 2 * (cp + 4 * dp)) for dp in range(8) for cp in range(4) for tp in range(2)]
    assert grid == list(range(64))
    found = translated_groups([1 + 2 * (2 + 4 * dp) for dp in range(8)], 64)
    assert found == [tuple(tp + 2 * (cp + 4 * dp) for dp in range(8)) for cp in range(4) for tp in range(2)]
    with pytest.raises(ValueError, match="cannot be divided into groups"):
        translated_groups([0, 3], 4)


def test_flags_that_mean_nothing_are_refused() -> None:
    given = {"use_megatron_fsdp": False, "use_torch_fsdp2": False, "load": None, "pretrained_checkpoint": None}
    given |= {"fp8": None, "fp4": None, "optimizer_cpu_offload": False, "skip_train": False}
    for values, message in (
        ({"dry_run_rank": 1}, "--dry-run-rank 1: --dry-run-world is not given"),
        ({"dry_run_world": 4097}, "give a number of ranks from 1 to 4096"),
        ({"dry_run_world": 8, "dry_run_rank": 8}, "--dry-run-rank 8: give a rank from 0 to 7"),
        ({"dry_run_world": 8, "load": "somewhere"}, "--load"),
    ):
        with pytest.raises(ValueError, match=message):
            check_dry_run(Namespace(**{"dry_run_world": None, "dry_run_rank": None, **given, **values}))


def test_micro_batches_in_flight_are_those_of_1f1b() -> None:
    from megatron.longseq.dry_run.measure import in_flight

    for stages, microbatches in ((4, 8), (4, 2), (1, 3)):
        for rank, order in enumerate(make(Pipeline(stages, microbatches)).orders):
            assert in_flight(order, [128], [10]) == [min(microbatches, stages - rank)]


def test_the_planner_reads_the_same_command_line() -> None:
    words = [*MODEL.split(), "--tensor-model-parallel-size", "2", "--use-distributed-optimizer", "--dry-run-world=64"]
    assert command_flags(words)["bf16"] is True and "dry_run_world" not in command_flags(words)
    stage = predicted(words, 64, 0)
    parameters = 4 * ((LAYER - 512) // 2 + 512) + 2 * VOCABULARY // 2 + 256
    assert stage["parameters"] == pytest.approx(2 * parameters, rel=0.01)
