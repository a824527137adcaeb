"""Seq1F1B against upstream's 1F1B: throughput of real training steps, and what is kept for backward.

    python -m tests.benchmarks.pipeline [--rounds N] [-- UPSTREAM'S FLAGS...]

Two stages on two cores, one thread each, sequence 4096; attention has the share of the work that it has in a 7B model
at that length (8% of the forward's FLOPs). Every figure is a ratio of steps of one and the same run (see
`alternate`); beside it stands what the simulator predicts from the segment costs measured in that run. The last line is
one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from megatron.longseq.pipeline.plan.generators import one_f_one_b
from megatron.longseq.pipeline.plan.schedule import ActionKind, Pipeline
from megatron.longseq.pipeline.plan.simulate import Costs, simulate
from megatron.longseq.pipeline.plan.validate import prove
from tests.benchmarks.alternate import Contestant, Job, Measured, run_on_this_rank
from tests.pool import RankPool

UPSTREAM = 0
SPLITS = (1, 2, 4, 8)
MICROBATCHES = (2, 4, 8)
MODEL = """
--hidden-size 512 --num-attention-heads 2 --kv-channels 32 --group-query-attention --num-query-groups 1
--ffn-hidden-size 1728 --swiglu
--normalization RMSNorm --position-embedding-type rope --disable-bias-linear --hidden-dropout 0 --attention-dropout 0
--untie-embeddings-and-output-weights --seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1
--lr 1e-4 --lr-decay-iters 1000 --weight-decay 0.1 --tokenizer-type NullTokenizer --vocab-size 512 --mock-data
--make-vocab-size-divisible-by 64 --split 90,5,5 --eval-iters 0 --eval-interval 1000 --log-interval 1000
--no-create-attention-mask-in-dataloader --num-workers 0 --seed 1
"""

Results = Sequence[Sequence[Measured]]  # per rank, per step


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pipeline", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each schedule runs each step")
    parser.add_argument("flags", nargs="*", help="upstream's flags, after those of the benchmark's own model")
    given = parser.parse_args(arguments)
    rounds, model = given.rounds, [*MODEL.split(), *given.flags]
    with tempfile.TemporaryDirectory() as logs:
        pool = RankPool(Path(logs))
        speed = _measure(pool, model, 2, [Contestant(k, m) for m in MICROBATCHES for k in (UPSTREAM, *SPLITS)], rounds)
        kept = {
            stages: _measure(pool, model, stages, [Contestant(k, stages) for k in (UPSTREAM, *SPLITS)], 1, True)
            for stages in (2, 4)
        }
    print(_report(speed, kept))
    return 0


def _measure(
    pool: RankPool,
    model: list[str],
    stages: int,
    contestants: list[Contestant],
    rounds: int,
    count_bytes: bool = False,
) -> Results:
    """Run every contestant `rounds` times, each round in another order; before that the shortest ones, uncounted."""
    warm = [] if count_bytes else [one for one in contestants if one.microbatches == min(MICROBATCHES)]
    turns = list(warm)
    for number in range(rounds):
        cut = number * len(contestants) // rounds
        turns += [*contestants[cut:], *contestants[:cut]]
    flags = (
        *model,
        *f"--num-layers {stages} --pipeline-model-parallel-size {stages} --global-batch-size 8".split(),
        *f"--train-iters {len(turns)}".split(),
    )
    results = pool.run(stages, run_on_this_rank, Job(flags, tuple(turns), count_bytes), timeout=3600)
    return [steps[len(warm) :] for steps in results]


def step_seconds(results: Results, contestant: Contestant) -> list[float]:
    """Return the seconds of each of a contestant's steps: those of the slowest rank."""
    return [
        max(rank.step_seconds for rank in step)
        for step in zip(*results, strict=True)
        if step[0].contestant == contestant
    ]


def ratios(results: Results, contestant: Contestant) -> list[float]:
    """Return upstream's seconds over the contestant's, round by round."""
    upstream = step_seconds(results, Contestant(UPSTREAM, contestant.microbatches))
    return [a / b for a, b in zip(upstream, step_seconds(results, contestant), strict=True)]


def measured_costs(results: Results, segments: int) -> Costs:
    """Return the median seconds of every stage's and segment's actions over all steps with that many segments."""
    tables = {}
    for kind in (ActionKind.FORWARD, ActionKind.BACKWARD):
        seconds: dict[tuple[int, int], list[float]] = defaultdict(list)
        for stage, steps in enumerate(results):
            for name, segment, span in chain.from_iterable(s.spans for s in steps if s.contestant.segments == segments):
                if name == kind.value:
                    seconds[stage, segment].append(span)
        tables[kind] = tuple(
            tuple(statistics.median(seconds[stage, segment]) for segment in range(segments))
            for stage in range(len(results))
        )
    nothing = tuple((0.0,) * segments for _ in results)
    return Costs(tables[ActionKind.FORWARD], tables[ActionKind.BACKWARD], nothing)


def rest_seconds(results: Results) -> float:
    """Return the median of what a step takes outside its schedule: optimizer, batch bookkeeping."""
    return statistics.median(step.step_seconds - step.schedule_seconds for steps in results for step in steps)


def simulated_ratio(results: Results, contestant: Contestant) -> float:
    """Return what the simulator predicts for `ratios`, from segment costs measured in the same run."""

    def predicted(segments: int) -> float:
        pipeline = Pipeline(len(results), contestant.microbatches, segments)
        span = simulate(one_f_one_b(pipeline), measured_costs(results, segments)).makespan
        return span + rest_seconds(results)

    return predicted(1) / predicted(contestant.segments)


def activation_ratios(results: Results, segments: int) -> list[float]:
    """Return per stage the peak of bytes kept for backward, over upstream's."""
    peaks = [{step.contestant.segments: step.peak_bytes for step in steps} for steps in results]
    return [peak[segments] / peak[UPSTREAM] for peak in peaks]


def formula_ratios(stages: int, lengths: Sequence[int]) -> list[float]:
    """Return per stage what the schedule alone says: peak of live segments over 1F1B's live micro-batches."""
    ours = prove(one_f_one_b(Pipeline(stages, stages, len(lengths)))).peak_live(lengths)
    theirs = prove(one_f_one_b(Pipeline(stages, stages))).peak_live((sum(lengths),))
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _report(speed: Results, kept: dict[int, Results]) -> str:
    lines = ["throughput over upstream's 1F1B, 2 stages (simulated from measured segment costs; spread over rounds)"]
    out: dict[str, dict[str, object]] = {"throughput_ratio": {}, "simulated_ratio": {}, "spread": {}}
    for contestant in (Contestant(k, m) for m in MICROBATCHES for k in SPLITS):
        key = f"M{contestant.microbatches}K{contestant.segments}"
        each, simulated = ratios(speed, contestant), simulated_ratio(speed, contestant)
        ratio = statistics.median(each)
        out["throughput_ratio"][key] = round(ratio, 4)
        out["simulated_ratio"][key] = round(simulated, 4)
        out["spread"][key] = [round(min(each), 4), round(max(each), 4)]
        lines.append(f"  {key}: {ratio:.3f} (simulated {simulated:.3f}; {min(each):.3f} to {max(each):.3f})")
    activation, predicted = {}, {}
    lines.append("bytes kept for backward over upstream's, per stage; tokens per segment")
    for stages, results in kept.items():
        for segments in SPLITS:
            each = activation_ratios(results, segments)
            lengths = next(step.lengths for step in results[0] if step.contestant.segments == segments)
            formula = formula_ratios(stages, lengths)
            key = f"P{stages}M{stages}K{segments}"
            activation[key], predicted[key] = _rounded(each), _rounded(formula)
            lines.append(f"  {key}, {','.join(map(str, lengths))}: {_stages(each)} (formula {_stages(formula)})")
    # The fullest stage of two; more micro-batches change nothing, for no more of them are alive at once.
    activation |= {f"M{m}K{k}": activation[f"P2M2K{k}"][0] for m in MICROBATCHES for k in SPLITS}
    return "\n".join([*lines, json.dumps(out | {"activation_ratio": activation, "activation_formula": predicted})])


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _stages(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
