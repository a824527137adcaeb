"""Packed documents over two context-parallel ranks: causal, with a dense mask, and by cumulative lengths (THD).

    python -m tests.benchmarks.packed [--tokens 8192 32768 131072] [--rounds N] [-- UPSTREAM'S FLAGS...]

Real training steps of a small model through `pretrain`, a ring of two CPU ranks, one thread each, float32. Three
arms:

- causal: the sequence is one document;
- mask: documents by a dense mask [1, 1, tokens, tokens] of the script, which upstream cuts by rows; it is left out
  where the masks of both ranks need more than a quarter of the machine's memory;
- thd: documents by --dataloader-inter-document-masking.

Document lengths are log-normal, as in a text corpus: half of them below 800 tokens, the longest above 30,000. A row
shows the resident memory of both ranks together at its highest, and the seconds of a step per token. *Over ideal*
divides the seconds by those that the documents' own FLOPs would take at the FLOP/s of the causal arm of the same
length, where the sequence is one document and nothing is packed.

The last line is one JSON object: `peak_bytes_128k` and `seconds_over_padding_free_flops` of arm thd at 131,072 tokens
(at the longest length, if that was not run), `logits_peak_ratio_32k` of `tests.benchmarks.logits`, and all rows.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy
import psutil
import torch

from tests.benchmarks.peak import status
from tests.packed_corpus import EOD, VOCABULARY, write_documents
from tests.pool import RankPool

Arm = Literal["causal", "mask", "thd"]
ARMS: tuple[Arm, ...] = ("causal", "mask", "thd")
TOKENS = (8192, 32768, 131072)
RANKS = 2
LAYERS, HIDDEN, FFN = 2, 128, 384
MODEL = f"""
--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads 2 --ffn-hidden-size {FFN} --swiglu
--normalization RMSNorm --position-embedding-type rope --disable-bias-linear --hidden-dropout 0 --attention-dropout 0
--untie-embeddings-and-output-weights --micro-batch-size 1 --global-batch-size 1 --lr 1e-4 --lr-decay-iters 1000
--make-vocab-size-divisible-by 64 --eval-iters 0 --eval-interval 1000 --log-interval 1000 --num-workers 0 --seed 1
--no-create-attention-mask-in-dataloader --transformer-impl local --context-parallel-size {RANKS}
"""


@dataclass(frozen=True)
class Job:
    """The task of the ranks.

    Attributes:
        arm: how documents are told apart.
        flags: upstream's command line.
        steps: number of measured steps, after a warm-up step if `warm`.
        warm: whether a step runs before the measured ones.
    """

    arm: Arm
    flags: tuple[str, ...]
    steps: int
    warm: bool


@dataclass
class Steps:
    """What one rank measured.

    Attributes:
        seconds: of each measured step.
        peak_bytes: highest resident memory during the measured steps.
        documents: lengths of the documents of the measured steps.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    documents: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A line of the table; `spread` is the largest less the smallest of the steps' seconds, over their median."""

    tokens: int
    arm: Arm
    documents: int
    peak_bytes: int
    seconds: float
    spread: float
    flops: float
    over_ideal: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.packed", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="lengths of the sequence")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps; one where a causal step takes minutes")
    parser.add_argument("flags", nargs="*", help="upstream's flags, after those of the benchmark's own model")
    given = parser.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(Path(folder))
        for tokens in given.tokens:
            data = write_documents(Path(folder) / f"data{tokens}" / "text", document_lengths(), 10 * tokens)
            rows += measure(pool, tokens, [*data, *given.flags], given.rounds)
    print(table(rows))
    last = next(row for row in reversed(rows) if row.arm == "thd")
    summary = {
        "peak_bytes_128k": last.peak_bytes,
        "seconds_over_padding_free_flops": last.over_ideal,
        "logits_peak_ratio_32k": logits_ratio(),
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(summary))
    return 0


def document_lengths() -> list[int]:
    """Return lengths as in a text corpus: log-normal, median 800, at least 2."""
    drawn = numpy.random.default_rng(1).lognormal(numpy.log(800), 1.3, size=2000)
    return [max(2, int(length)) for length in drawn]


def measure(pool: RankPool, tokens: int, flags: Sequence[str], rounds: int) -> list[Row]:
    """Run the arms at one length."""
    rows: list[Row] = []
    for arm in ARMS:
        if arm == "mask" and RANKS * tokens**2 > psutil.virtual_memory().total / 4:
            continue
        long = tokens > TOKENS[1]
        steps, warm = (1, arm == "thd") if long else (rounds, True)
        own = ("--dataloader-inter-document-masking",) if arm == "thd" else ()
        lengths = f"--seq-length {tokens} --max-position-embeddings {tokens} --train-iters {steps + warm}".split()
        job = Job(arm, (*MODEL.split(), *flags, *lengths, *own), steps, warm)
        rows.append(row_of(tokens, arm, pool.run(RANKS, run_on_this_rank, job, timeout=3600)))
        print(f"{tokens} tokens, {arm}: {rows[-1].seconds:.1f} s per step", flush=True)
    causal = rows[0]
    ideal = causal.seconds / causal.flops
    return [Row(**{**asdict(row), "over_ideal": row.seconds / (row.flops * ideal)}) for row in rows]


def row_of(tokens: int, arm: Arm, results: Sequence[Steps]) -> Row:
    """Combine the measurements of the ranks. A step takes as long as on the slowest rank."""
    seconds = [max(step) for step in zip(*(rank.seconds for rank in results), strict=True)]
    documents = [[tokens]] * len(seconds) if arm == "causal" else results[0].documents
    median = statistics.median(seconds)
    return Row(
        tokens,
        arm,
        statistics.median_high(len(lengths) for lengths in documents),
        sum(rank.peak_bytes for rank in results),
        median,
        (max(seconds) - min(seconds)) / median,
        statistics.median(model_flops(lengths) for lengths in documents),
    )


def model_flops(lengths: Sequence[int]) -> float:
    """Return the model FLOPs of a step, forward and backward: each document's own causal square, and its tokens."""
    weights = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * FFN) + HIDDEN * VOCABULARY
    return 6.0 * weights * sum(lengths) + 6.0 * LAYERS * HIDDEN * sum(length**2 for length in lengths)


def table(rows: Sequence[Row]) -> str:
    """Return the measurements as a Markdown table."""
    lines = [
        "| tokens | arm | documents | peak, GiB | microseconds per token | spread | over ideal |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        per_token, over = 1e6 * row.seconds / row.tokens, f"{row.over_ideal:.2f}"
        lines.append(
            f"| {row.tokens:,} | {row.arm} | {row.documents} | {row.peak_bytes / 2**30:.2f} | {per_token:.0f} | "
            f"{row.spread:.0%} | {over} |"
        )
    return "\n".join(lines)


def logits_ratio() -> float:
    """Return `logits_peak_ratio_32k` of `tests.benchmarks.logits`, which runs in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.logits"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1])["logits_peak_ratio_32k"])


def run_on_this_rank(job: Job) -> Steps:
    """Train through `pretrain`; runs in a rank of the pool, on one core and one thread."""
    rank, cores = int(os.environ["RANK"]), sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    sys.argv = ["pretrain_gpt.py", *job.flags]
    import patches

    patches.start()
    from megatron.training import training

    from megatron.longseq import pretrain_gpt

    steps = Steps()
    pretrain_gpt.get_batch_on_this_cp_rank = _observed(pretrain_gpt.get_batch_on_this_cp_rank, job.arm, steps)
    training.train_step = _timed(training.train_step, steps, job.warm)
    pretrain_gpt.main()
    steps.documents = steps.documents[job.warm :]
    return steps


def _observed(cut: Callable[..., Any], arm: Arm, steps: Steps) -> Callable[..., Any]:
    """Wrap the function that cuts a batch over the ranks: record its documents, and give arm `mask` its mask."""

    def observed(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens = batch["tokens"][0]
        borders = (tokens == EOD).nonzero().flatten() + 1
        inner = borders[borders < len(tokens)]
        edges = torch.cat([borders.new_zeros(1), inner, borders.new_full((1,), len(tokens))])
        steps.documents.append(edges.diff().tolist())
        if arm == "mask":
            starts = torch.repeat_interleave(edges[:-1], edges.diff())
            position = torch.arange(len(tokens))
            hidden = (position > position[:, None]).logical_or_(position < starts[:, None])
            batch = {**batch, "attention_mask": hidden[None, None]}
        return cut(batch, *args, **kwargs)

    return observed


def _timed(train_step: Callable[..., Any], steps: Steps, warm: bool) -> Callable[..., Any]:
    """Wrap upstream's `train_step`: measure every step but the one to warm up."""
    uncounted = iter([True] if warm else [])

    def step(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        torch.distributed.barrier()
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the high-water mark of resident memory starts anew
        start = time.perf_counter()
        result = train_step(*args, **kwargs)
        if not next(uncounted, False):
            steps.seconds.append(time.perf_counter() - start)
            steps.peak_bytes = max(steps.peak_bytes, status("VmHWM"))
        return result

    return step


if __name__ == "__main__":
    sys.exit(main())
