"""FlexSP's planner: distance from bounds, CPU time, and simulated speed-ups over named baselines.

    python -m tests.benchmarks.flexsp [--batches N]

The planner is measured under the paper's cost model (7B, Ulysses, powers of two) on CommonCrawl-like lengths, 8
sequences per GPU. A plan's gap is measured against two bounds: `gap` against the fastest groups for the sequences of
its own micro-batches, and `step_gap` against any micro-batches at all, by a bound that ignores how sequences fit
together. The simulation has all kinds and degrees; `megatron.longseq.flexsp.tools.rivals` describes its baselines. The
last line is one JSON object.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence

from megatron.longseq.flexsp.plan.bound import microbatch_bounds
from megatron.longseq.flexsp.plan.paper import paper_cost
from megatron.longseq.flexsp.plan.planner import plan_step
from megatron.longseq.flexsp.plan.problem import StepProblem
from megatron.longseq.flexsp.tools.simulate import POWERS, configurations, draw_lengths, key, markdown, simulate

SIZES = (64, 256, 1024)


def planner_quality(ranks: int, seed: int) -> dict[str, float]:
    """Return gaps over both bounds and CPU seconds per micro-batch of one plan."""
    lengths, cost = draw_lengths("commoncrawl", 8 * ranks, seed), paper_cost("7b")
    plan = plan_step(lengths, ranks, cost, POWERS, ("ulysses",))
    bound = microbatch_bounds(StepProblem(lengths, ranks, cost, POWERS, ("ulysses",)), plan)
    return {
        f"gap_{ranks}": plan.seconds / bound - 1,
        f"step_gap_{ranks}": plan.gap,
        f"cpu_seconds_{ranks}": plan.planner_seconds / len(plan.microbatches),
    }


def measured() -> float | None:
    """Return the measured speed-up over the best static degree (`flexsp_measured`); None without that benchmark."""
    name = "tests.benchmarks.flexsp_measured"
    if importlib.util.find_spec(name) is None:
        return None
    run = subprocess.run([sys.executable, "-m", name], stdout=subprocess.PIPE, text=True, check=True)
    print(run.stdout, end="")
    return float(json.loads(run.stdout.splitlines()[-1])["measured_over_best_static"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.flexsp", description=__doc__)
    parser.add_argument("--batches", type=int, default=1, help="steps of every simulated configuration (default 1)")
    given = parser.parse_args(arguments)
    out: dict[str, object] = {}
    for ranks in SIZES:
        quality = planner_quality(ranks, 1000)
        out |= quality
        print(", ".join(f"{name} {value:.4f}" for name, value in quality.items()), flush=True)
    print(markdown(given.batches))
    rows = {key(*one): simulate(*one, given.batches) for one in configurations()}
    out["simulated"] = {name: round(one.static / one.ours, 4) for name, one in rows.items()}
    out["over_balanced"] = {name: round(one.best_balanced / one.ours, 4) for name, one in rows.items()}
    out["over_dev_rule"] = {name: round(one.development / one.ours, 4) for name, one in rows.items()}
    out["measured_over_best_static"] = measured()
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
