"""The log line of a real run."""

import functools
import re
import resource
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.conversations import sft_flags
from tests.distributed.flags import MOE, PP2, TINY, VPP, flags
from tests.distributed.script_variants import random_documents
from tests.pool import RankPool
from tests.regression.arm import run_arm

SEQUENCE, BATCH = 64, 4
SIZES = f"{TINY} --global-batch-size {BATCH}"
PEAK = 1e-3  # TFLOP/s of a rank
LINE = re.compile(
    r"iteration +(\d+) \| tokens/s: ([\d.]+) \| tokens/s/rank: ([\d.]+) \| model TFLOP/s/rank: ([\d.e-]+) "
    r"(?:\| MFU, causal \(%\): ([\d.e+-]+) \| MFU, full \(%\): ([\d.e+-]+) )?"
    r"\| peak memory \(MiB\): ([\d.]+) \| reserved beyond it \(MiB\): ([\d.]+) \|"
)
MODELS = {
    "grouped queries": "",
    "experts": f"{MOE} --moe-layer-freq 2",
    "window": "--window-size 10,0 --window-attn-skip-freq 2",
}
LAYOUTS = {
    "one rank": (1, ""),
    "PP 2, V 2, DP 2": (4, f"{PP2} {VPP}"),
    "CP 2, PP 2, segments": (4, f"{PP2} --context-parallel-size 2 --seq1f1b-splits 2"),
    "TP 2, PP 2": (4, f"{PP2} --tensor-model-parallel-size 2"),
}
STEPS = "--train-iters 4 --log-interval 2 --eval-interval 1 --eval-iters 1 --split 50,50,0 --log-throughput"
STEPS += f" --peak-tflops-per-gpu {PEAK}"
VARIANT = "tests.distributed.script_variants:reported_documents"
RUNS = [
    ("grouped queries", "one rank"),
    pytest.param("window", "PP 2, V 2, DP 2", marks=pytest.mark.slow),
    ("grouped queries", "CP 2, PP 2, segments"),
    pytest.param("experts", "one rank", marks=pytest.mark.slow),
    pytest.param("grouped queries", "TP 2, PP 2", marks=pytest.mark.slow),
    pytest.param("window", "CP 2, PP 2, segments", marks=pytest.mark.slow),
]


def _printed(pool: RankPool) -> str:
    return "\n".join(path.read_text() for path in sorted(Path(pool.logs).glob(f"job{pool.jobs:03d}-rank*.log")))


@pytest.fixture(scope="module")
def linear_and_square(ranks: RankPool) -> Callable[[str], tuple[float, float]]:
    """Return a function that gives FLOPs per token, and per square of a sequence's length, all scores counted.

    PyTorch counts the matrix products of upstream's own training steps, forward and backward, at two lengths.
    """

    @functools.cache
    def measure(model: str) -> tuple[float, float]:
        counted = []
        for length in (SEQUENCE, SEQUENCE // 2):
            run = flags(TINY, model, f"--train-iters 1 --global-batch-size 1 --seq-length {length}")
            counted.append(
                run_arm(ranks, "U", 1, run, mutant="tests.distributed.script_variants:counted_flops").planted
            )
        square = (counted[0] - 2 * counted[1]) / (SEQUENCE**2 - 2 * (SEQUENCE // 2) ** 2)
        linear = counted[0] / SEQUENCE - square * SEQUENCE
        if model:
            linear -= 6 * 64 * 4 * 2  # the routers of two layers, which upstream's formula leaves out
        return linear, square

    return lambda model: measure(MODELS[model] if model == "experts" else "")


def visible(cu_seqlens: torch.Tensor, window: int) -> float:
    """Return twice the number of scores that the documents' tokens see; a score on the diagonal counts half.

    The formulas count the first triangle of a document as half a square, without the half of its diagonal.
    """
    total = 0.0
    for length in (cu_seqlens[1:] - cu_seqlens[:-1]).tolist():
        scores = torch.ones(length, length).tril().triu(1 - window)
        total += 2 * float(scores.sum()) - min(length, window)
    return total


def squares_of(documents: list[torch.Tensor], model: str) -> float:
    """Return `visible` of all documents, as a mean over the layers."""
    windows = [11, SEQUENCE, 11, SEQUENCE] if model == "window" else [SEQUENCE]
    return sum(visible(ends, window) for ends in documents for window in windows) / len(windows)


@pytest.fixture(scope="module")
def on_one_rank(ranks: RankPool) -> tuple[str, list[list[torch.Tensor]]]:
    """What a run on one rank printed, and the documents of every step, which every model and layout reads."""
    run = run_arm(ranks, "O", 1, flags(SIZES, STEPS), mutant=VARIANT, keep_batches=True)
    batches = [[torch.as_tensor(np.asarray(batch["tokens"])) for batch in step] for step in run.batches]
    return _printed(ranks), [[random_documents(tokens) for tokens in step] for step in batches]


def rounding(*printed: str) -> float:
    """Return the relative error of a product or quotient of printed numbers, each off by half of its last digit."""
    exponents = [int(Decimal(text).as_tuple().exponent) for text in printed]
    return sum(0.5 * 10.0**exponent / float(text) for exponent, text in zip(exponents, printed, strict=True)) * 1.01


def test_log_line_tells_tokens_flops_and_memory(
    ranks: RankPool, linear_and_square: Callable[[str], tuple[float, float]]
) -> None:
    linear, square = linear_and_square("window")
    scores = squares_of([torch.tensor([0, SEQUENCE])], "window") / SEQUENCE
    run_arm(ranks, "O", 2, flags(SIZES, MODELS["window"], PP2, "--log-throughput --log-interval 2 --train-iters 4"))
    found = LINE.findall(_printed(ranks))
    assert [int(row[0]) for row in found] == [2, 4]
    elapsed = [float(ms) for ms in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", _printed(ranks))[-2:]]
    for (_, per_second, per_rank, tflops, *mfu, peak, unused), milliseconds in zip(found, elapsed, strict=True):
        tokens_per_step = float(per_second) * milliseconds / 1e3
        # Upstream reads the same clock later than we do: by how much, is the machine's. Another number of steps or
        # ranks would make it half or twice as many.
        assert BATCH * SEQUENCE * (1 - 1e-3) <= tokens_per_step < 2 * BATCH * SEQUENCE
        assert float(per_second) / float(per_rank) == pytest.approx(2, rel=rounding(per_second, per_rank))
        flops = linear + square / 2 * scores
        assert float(tflops) * 1e12 / float(per_rank) == pytest.approx(flops, rel=rounding(tflops, per_rank))
        # About what this process has, which holds the same libraries; another unit would be a factor of 1024.
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        assert own / 32 < float(peak) < own * 32
        assert float(unused) == 0  # a CPU has no reserved memory apart
        assert mfu == ["", ""]
    assert _printed(ranks).count("the peak TFLOP/s of a rank's device is unknown (on this rank: cpu)") == 1


def test_without_the_flag_upstreams_log_is_untouched(ranks: RankPool) -> None:
    run_arm(ranks, "O", 1, flags(TINY, "--log-interval 1 --train-iters 1"))
    assert "tokens/s" not in _printed(ranks)
    assert "log.throughput" not in _printed(ranks)


def sums_of_all_ranks(printed: str) -> list[tuple[float, float]]:
    """Return tokens and squares that the ranks printed."""
    found = re.findall(r"sums of documents: \(([\d.]+), ([\d.]+)\)", printed)
    return sorted((float(tokens), float(squares)) for tokens, squares in found)


@pytest.mark.parametrize(("model", "layout"), RUNS)
def test_flops_are_those_of_the_documents(
    ranks: RankPool,
    linear_and_square: Callable[[str], tuple[float, float]],
    on_one_rank: tuple[str, list[list[torch.Tensor]]],
    model: str,
    layout: str,
) -> None:
    printed, documents = on_one_rank
    world, own = LAYOUTS[layout]
    if (model, world) != ("grouped queries", 1):
        assert run_arm(ranks, "O", world, flags(SIZES, MODELS[model], STEPS, own), mutant=VARIANT).planted
        printed = _printed(ranks)
    on_each_rank = [(float(BATCH * SEQUENCE), squares_of(ends, model)) for ends in documents]
    assert sums_of_all_ranks(printed) == sorted(on_each_rank * world)
    linear, square = linear_and_square(model)
    for row, first in zip(LINE.findall(printed), (0, 2), strict=True):
        per_rank, tflops, causal, full = (float(value) for value in row[2:6])
        of_interval = [*documents[first], *documents[first + 1]]
        scores = squares_of(of_interval, model) / sum(int(ends[-1]) for ends in of_interval)
        # The time of a step cancels out.
        flops, all_flops = linear + square / 2 * scores, linear + square * scores
        assert tflops * 1e12 / per_rank == pytest.approx(flops, rel=rounding(row[3], row[2]))
        assert causal / 100 == pytest.approx(tflops / PEAK, rel=rounding(row[4], row[3]))
        assert full / causal == pytest.approx(all_flops / flops, rel=rounding(row[5], row[4]))


@pytest.mark.parametrize(
    "own",
    [
        f"{PP2} --context-parallel-size 2 --seq1f1b-splits 2",
        pytest.param(f"{PP2} {VPP} --context-parallel-size 2", marks=pytest.mark.slow),
    ],
)
def test_conversations_count_their_own_squares(ranks: RankPool, tmp_path: Path, own: str) -> None:
    """Here every stage reports the documents, at every virtual stage."""
    base = [flag for flag in flags(SIZES, "--train-iters 2 --log-throughput", own) if flag != "--mock-data"]
    variant = "tests.distributed.script_variants:printed_sums"
    run = run_arm(ranks, "O", 4, [*base, *sft_flags(tmp_path)], mutant=variant, keep_batches=True)
    expected = []
    for step in run.batches:
        rows = [row for batch in step for row in np.asarray(batch["cu_seqlens"])]
        lengths = [length for row in rows for length in np.diff(row).tolist()]
        assert np.count_nonzero(lengths) > BATCH
        expected.append((float(sum(lengths)), float(sum(length**2 for length in lengths))))
    assert sums_of_all_ranks(_printed(ranks)) == sorted(expected * 4)
