"""Make the plans of scripts/plans from its table, with the planner. `scripts/launch.sh --plan FILE` launches one.

python -m scripts.make_plans            # all of them
python -m scripts.make_plans llama3     # those whose name begins so
"""

import argparse
import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

PLANS = Path(__file__).resolve().parent / "plans"
TABLE = PLANS / "table.csv"
# Flags that the planner does not choose. Data is up to the user.
TRAINING = """
--lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-fraction 0.01 --weight-decay 0.1 --adam-beta2 0.95
--clip-grad 1.0 --train-iters 10000 --eval-iters 0 --eval-interval 1000 --save-interval 500 --log-interval 10
--exit-signal-handler
"""
Row = dict[str, str]


def rows() -> list[Row]:
    """Return the rows of the table."""
    with TABLE.open(newline="") as stream:
        return list(csv.DictReader(stream))


def name_of(row: Row) -> str:
    """Return the name of a row's plan."""
    return f"{row['model']}-{row['seq_length'].lower()}-{row['cluster']}"


def search_words(row: Row) -> list[str]:
    """Return the planner's command line for a row."""
    words = ["search", "--model", row["model"], "--cluster", row["cluster"], "--seq-length", row["seq_length"]]
    return [*words, "--global-batch-tokens", row["global_batch_tokens"]]


def search(row: Row) -> dict[str, Any]:
    """Return the fastest plan of a row, as the planner's JSON describes it.

    Raises:
        RuntimeError: the planner found none.
    """
    module = [sys.executable, "-m", "megatron.longseq.planner"]
    training = " ".join([*TRAINING.split(), *row["model_flags"].split()])
    words = [*module, *search_words(row), "--top", "1", "--json", "--training-flags", training]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name_of(row)}: {done.stderr.strip()}")
    plan: dict[str, Any] = json.loads(done.stdout)["plans"][0]
    return plan


def plan_text(row: Row, plan: dict[str, Any]) -> str:
    """Return the file of a plan.

    Args:
        row: of the table.
        plan: of `search`.
    """
    options, _, flags = plan["command"].replace("\\\n", " ").partition(" -- ")
    words = shlex.split(options)
    figures = (
        f"{plan['step_seconds']:.3g} s a step, {plan['tokens_per_second_per_gpu']:.4g} tokens/s/GPU, "
        f"MFU {plan['mfu']:.1%}, {plan['peak_gb']:.3g} of {plan['memory_gb']:.3g} GB"
    )
    lines = [
        f"# {row['model']}, {row['seq_length']} tokens, on {row['cluster']}. Predicted, not measured: {figures}.",
        f"# Made by python -m scripts.make_plans {name_of(row)}",
        f"# (python -m megatron.longseq.planner {shlex.join(search_words(row))}).",
        *(f"{option} {words[words.index(option) + 1]}" for option in ("--nodes", "--gpus-per-node") if option in words),
        "--",
    ]
    return "\n".join(lines + _flag_lines(shlex.split(flags)[1:])) + "\n"


def _flag_lines(words: list[str]) -> list[str]:
    """Return a line for each flag with its values."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return lines


def main() -> int:
    """Make the plans whose names begin with one of the words, and print a line about each."""
    parser = argparse.ArgumentParser(prog="python -m scripts.make_plans", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="make only plans whose names begin so")
    args = parser.parse_args()
    chosen = [row for row in rows() if not args.names or name_of(row).startswith(tuple(args.names))]
    if not chosen:
        parser.error(f"no plan begins with {' or '.join(args.names)}; {TABLE} has {', '.join(map(name_of, rows()))}")
    failed = 0
    for row in chosen:
        try:
            text = plan_text(row, search(row))
        except RuntimeError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
            continue
        (PLANS / f"{name_of(row)}.plan").write_text(text)
        print(text.splitlines()[0].removeprefix("# "), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
