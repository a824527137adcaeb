"""The planner on documents: FlexSP in `search` and `predict`, beside one degree and packed sequences."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron.longseq.flexsp.plan.plan import Kind
from megatron.longseq.planner.plan import flexsp_search
from megatron.longseq.planner.plan.cluster import cluster
from megatron.longseq.planner.plan.flags import read
from megatron.longseq.planner.plan.flexsp_cost import most_tokens, rank_bytes
from megatron.longseq.planner.plan.flexsp_search import DocumentTask, search_documents
from megatron.longseq.planner.plan.flexsp_step import document_run, pack, predict_flexsp, predict_packed
from megatron.longseq.planner.plan.model import architecture
from megatron.longseq.planner.plan.step import predict
from megatron.longseq.planner.plan.task import planning_task
from megatron.longseq.planner.tools.cli import main
from megatron.longseq.planner.tools.document_lengths import steps_of
from tests.pool import RankPool
from tests.unit.test_planner_launch import validate

SEARCH = ["search", "--model", "llama3-8b", "--cluster", "a100-16", "--seq-length", "32K", "--global-batch-size", "64"]
RESTRICTED = ["--tensor-model-parallel-size", "1", "2", "--pipeline-model-parallel-size", "1", "--length-steps", "1"]
RESTRICTED += ["--strategies", "upstream-zero1", "NIG"]
LENGTHS = (200, 300, 500, 800, 1500, 3000, 6000, 32000, 40000)  # the last one is split


def base(**changes: Any) -> dict[str, Any]:
    given = {"model": "llama-7b", "cluster": "a800-64", "seq_length": 65536, "bf16": True, "overlap_grad_reduce": True}
    return given | {"use_distributed_optimizer": True} | changes


@pytest.mark.parametrize(
    ("tensor", "ulysses", "ring", "stages", "recompute"),
    [(1, 8, 1, 1, ""), (1, 1, 8, 1, ""), (2, 2, 2, 1, ""), (1, 8, 1, 2, ""), (2, 2, 4, 1, ""), (1, 8, 4, 1, "full")],
)
def test_full_sequences_cost_what_static_context_parallelism_costs(
    tensor: int, ulysses: int, ring: int, stages: int, recompute: str
) -> None:
    """Documents that all fill a sequence are the case that the planner prices without FlexSP's cost model."""
    size = ulysses * ring
    replicas = 64 // (tensor * stages * size)
    given = base(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1, pipeline_model_parallel_size=stages)
    given["recompute_granularity"] = recompute
    mesh: dict[str, Any] = {"context_parallel_size": size, "cp_comm_type": "a2a" if ring == 1 else "p2p"}
    if min(ulysses, ring) > 1:
        mesh |= {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": f"{ulysses} {ring}"}
    expected = predict(*read({**given, **mesh, "global_batch_size": 4 * replicas}))
    model, machine, run = read(given)
    steps = [[65536] * (4 * replicas)]
    one = document_run(model, machine, run, steps, tokens=65536 // size)
    assert one is not None
    packed = predict_packed(model, machine, one, steps, 65536, Kind(ulysses, ring))
    assert packed.microbatches == 4
    # FlexSP counts a latency for every message, and the planner hides those of a ring: up to 0.5% of these steps.
    assert packed.prediction.step_seconds == pytest.approx(expected.step_seconds, rel=0.01)
    assert packed.prediction.mfu == pytest.approx(expected.mfu, rel=0.01)
    # Plans may have any kind of group, so every layer keeps the attention's output on both sides of an all-to-all.
    again = 0 if ulysses > 1 else model.num_layers * 65536 // ring * model.hidden_size * 2
    assert packed.prediction.peak_bytes == pytest.approx(expected.peak_bytes + again)
    assert sum(packed.prediction.breakdown.values()) == pytest.approx(packed.prediction.step_seconds)
    static = predict_flexsp(model, machine, one, steps, (size,), planner="static")
    assert static.prediction.step_seconds <= packed.prediction.step_seconds * 1.001  # it chooses the kind, too


def test_the_memory_limit_is_the_most_that_fits() -> None:
    model, machine, run = read(base(seq_length=262144))
    most = most_tokens(model, machine, run, 262144)
    assert 4096 < most < 262144
    assert rank_bytes(model, machine, run, most)[1] <= machine.memory_bytes
    assert rank_bytes(model, machine, run, most + 256)[1] > machine.memory_bytes
    assert most_tokens(model, machine, run, 1000) == 1024


def test_short_documents_need_room_for_the_tiles_of_the_backward() -> None:
    """Per document and head, 128 rows more of the float32 sums of the queries' gradients, and of a number per row."""
    given = base(seq_length=8192, cluster="a800-2,memory_bytes=200e9", cross_entropy_chunk_tokens=1024)
    model, machine, run = read(given)  # in chunks, logits are not the largest tensors
    tiles = 128 * 32 * (128 + 1) * 4

    def peak(documents: float) -> float:
        return max(sum(kinds.values()) for kinds in rank_bytes(model, machine, run, 8192, documents)[0])

    assert peak(1024) - peak(256) == pytest.approx(768 * tiles)
    assert peak(8) == peak(1)  # the MLP's backward needs more
    most = most_tokens(model, machine, run, 1 << 17, [[16] * 9000])
    assert 0 < most < most_tokens(model, machine, run, 1 << 17)
    assert rank_bytes(model, machine, run, most, most // 16)[1] <= machine.memory_bytes
    steps = [[16] * 1200]
    one = document_run(model, machine, run, steps, 8192)
    assert one is not None
    found = predict_flexsp(model, machine, one, steps)
    groups = [group for microbatch in found.plans[0].microbatches for group in microbatch.groups]
    documents = max(len(group.sequences) / group.kind.ulysses for group in groups)
    assert documents > 256 and found.prediction.peak_bytes == pytest.approx(peak(documents))


def test_packed_sequences_are_full_and_in_order() -> None:
    found = list(pack([5, 3, 9, 1], 4, 3))
    assert found == [[4], [1, 3], [4], [4], [1, 1, 2], [3, 1]]
    assert list(pack([4, 4], 8, 1)) == [[4, 4]]


def test_training_accepts_printed_plans_of_documents(
    ranks: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lengths.txt").write_text("\n".join(map(str, LENGTHS)))
    search = [*SEARCH, *RESTRICTED, "--lengths", str(tmp_path / "lengths.txt")]
    assert main([*search, "--json", "--output", str(tmp_path / "plans")]) == 0
    report = json.loads(capsys.readouterr().out)
    best = {plan["plan"]: plan for plan in reversed(report["plans"])}
    assert set(best) == {"FlexSP", "one degree", "packed sequences"}
    assert report["plans"][0] == best["FlexSP"]
    assert all(plan["fits"] and not plan["reasons"] for plan in best.values())
    assert best["FlexSP"]["step_seconds"] <= best["one degree"]["step_seconds"]
    written = {file.name for file in (tmp_path / "plans").iterdir()}
    assert written == {"plans.json", "plans.md", "launch.sh", "flexsp-cost.json", "groups.svg"}
    (prefix,) = ranks.run(1, write_corpus, tmp_path / "text")
    for plan in best.values():
        words = shlex.split(plan["command"].replace("\\\n", " "))
        flags = words[words.index("--") + 2 :]
        flags[flags.index("DATA")] = prefix
        (found,) = ranks.run(1, validate, flags, 16, 8)
        size = plan["flags"]["tensor_model_parallel_size"] * plan["flags"].get("context_parallel_size", 1)
        assert found["data_parallel_size"] == 16 // size
    given = {name: value for name, value in best["FlexSP"]["flags"].items() if name != "seq1f1b_splits"}
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    predicted = ["predict", "--model", "llama3-8b", "--cluster", "a100-16", "--bf16", *flags]
    assert main([*predicted, "--lengths", str(tmp_path / "lengths.txt"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["peak_gb"] == pytest.approx(best["FlexSP"]["peak_gb"])
    assert again["step_seconds"] == pytest.approx(best["FlexSP"]["step_seconds"], rel=0.25)  # two steps instead of one


@pytest.mark.slow  # every candidate is planned
def test_the_search_finds_what_planning_every_candidate_finds() -> None:
    model = architecture("gpt-1.7b", {"attention_dropout": 0.0, "num_layers": 8})
    task = planning_task(model, cluster("a100-4,memory_bytes=24e9"), 16384, 16, strategies=("upstream-zero1", "GGG"))
    steps = tuple(map(tuple, steps_of("github", 16384, 16, None, 1)))
    search = DocumentTask(task, steps)
    candidates = list(flexsp_search._candidates(search))
    assert len(candidates) > 50
    every = [flexsp_search._predict(search, one, "heuristic").seconds for one in candidates]
    assert search_documents(search)[0].seconds <= 1.01 * min(every)


def write_corpus(prefix: Path) -> str:
    """Write a small corpus, whose prefix is returned. Runs on a rank."""
    from tests.packed_corpus import write_documents

    write_documents(prefix, (200,), 200_000)
    return str(prefix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--lengths", "books"], "--lengths books: neither a file nor one of github, commoncrawl, wikipedia"),
        (["--lengths", "github", "--seq-length", "512"], "--seq-length 512 with --lengths github: give at least 1024"),
        (["--lengths", "github", "--set", "memory_bytes=9e9"], "no plan fits: a GPU has 9.0 GB"),
        (["--lengths", "github", "--seq1f1b-splits", "4"], "--seq1f1b-splits with --lengths: FlexSP has one"),
        (["--lengths", "github", "--length-steps", "0"], "--length-steps 0: give at least 1"),
        (["--lengths", "github", "--model", "gpt3-175b"], "attention_dropout above 0"),
    ],
    ids=str,
)
def test_errors_say_what_to_do(changes: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SEARCH, *RESTRICTED, *changes]) == 1
    assert message in capsys.readouterr().err


PREDICT = ["predict", "--model", "llama-7b", "--cluster", "a100-8", "--seq-length", "16K", "--global-batch-size", "64"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--flexsp", "--flexsp-max-tokens-per-rank", "4K"], "give lengths, such as a file with one length a line"),
        (["--flexsp", "--lengths", "github"], "give flexsp_max_tokens_per_rank, such as 8192"),
        (["--lengths", "github"], "lengths are given, but not flexsp"),
        (["--flexsp", "--lengths", "github", "--flexsp-max-tokens-per-rank", "1K"], "hold no document of seq_length"),
        (
            ["--flexsp", "--lengths", "github", "--flexsp-max-tokens-per-rank", "4K", "--context-parallel-size", "2"],
            "flexsp with context_parallel_size above 1: training refuses it",
        ),
    ],
    ids=str,
)
def test_flags_that_are_missing_are_named(changes: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREDICT, *changes]) == 1
    assert message in capsys.readouterr().err
