"""The plans of scripts/plans: training accepts each of them, and they are those of the table."""

import shlex
from pathlib import Path

import pytest

from megatron.longseq.planner.plan.model import architecture
from scripts.make_plans import PLANS, Row, name_of, plan_text, rows, search
from tests.pool import RankPool
from tests.unit.test_planner_launch import validate

DATA = "--mock-data --split 1,0,0 --tokenizer-type NullTokenizer --vocab-size"
ALL = rows()
SIZES = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size")
QUICK = ("llama-7b-256k", "llama3-70b-32k")  # test_planner_launch.py validates further plans by default
CASES = [
    pytest.param(row, id=name_of(row), marks=() if name_of(row).startswith(QUICK) else pytest.mark.slow) for row in ALL
]


def read(file: Path) -> tuple[dict[str, int], list[str]]:
    """Return the options and the flags of a plan."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    at = lines.index("--")
    options = {name: int(value) for name, value in (line.split() for line in lines[:at])}
    return options, [word for line in lines[at + 1 :] for word in shlex.split(line)]


def test_there_is_a_plan_for_each_row_of_the_table() -> None:
    assert sorted(file.stem for file in PLANS.glob("*.plan")) == sorted(map(name_of, ALL))


@pytest.mark.parametrize("row", CASES)
def test_training_accepts_the_plan(ranks: RankPool, row: Row) -> None:
    options, flags = read(PLANS / f"{name_of(row)}.plan")
    gpus = options.get("--nodes", 1) * options["--gpus-per-node"]
    assert gpus == int(row["cluster"].split("-")[-1])
    model = architecture(row["model"], {})
    vocabulary = str(model.vocab_size or model.padded_vocab_size)
    words = [*flags, *DATA.split(), vocabulary]
    (found,) = ranks.run(1, validate, words, gpus, options["--gpus-per-node"])
    value = {name: flags[flags.index(name) + 1] for name in ("--num-layers", "--hidden-size", "--seq-length")}
    assert int(value["--seq-length"]) == int(row["seq_length"].removesuffix("K")) * 1024
    assert (int(value["--num-layers"]), int(value["--hidden-size"])) == (model.num_layers, model.hidden_size)
    sizes = [int(flags[flags.index(f"--{name}") + 1]) if f"--{name}" in flags else 1 for name in SIZES]
    assert found["data_parallel_size"] == gpus // (sizes[0] * sizes[1] * sizes[2])
    tokens = int(row["global_batch_tokens"].removesuffix("M")) * 2**20
    assert int(flags[flags.index("--global-batch-size") + 1]) * int(value["--seq-length"]) == tokens


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL, ids=name_of)
def test_the_table_makes_the_plan(row: Row) -> None:
    kept = (PLANS / f"{name_of(row)}.plan").read_text()
    assert plan_text(row, search(row)) == kept, "the planner has changed: python -m scripts.make_plans"
