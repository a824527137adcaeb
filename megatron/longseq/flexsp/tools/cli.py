"""Command line of adaptive sequence parallelism.

`plan` plans a step from a file of lengths and prints the plan, `simulate` prints tables of the paper's configurations,
`draw` makes a picture of a step, with one degree for all groups and with fitting ones.
"""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.longseq.command_line import markdown_table, run_command
from megatron.longseq.flexsp.plan.bound import microbatch_bounds
from megatron.longseq.flexsp.plan.cost import FAMILIES, GroupCostModel, KindFamily
from megatron.longseq.flexsp.plan.cost_file import load_cost
from megatron.longseq.flexsp.plan.paper import BUILT_IN, PAPER_MODELS
from megatron.longseq.flexsp.plan.plan import PLANNERS, Kind, StepPlan
from megatron.longseq.flexsp.plan.planner import automatic_degrees, plan_step
from megatron.longseq.flexsp.plan.problem import StepProblem
from megatron.longseq.flexsp.tools.simulate import CONTEXTS, configurations, markdown

MOST_BATCHES = 1000
MOST_RANKS, MOST_MICROBATCHES = 200_000, 10_000  # a plan lists the groups of all ranks in all micro-batches


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, or 1 after an error."""
    return run_command(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron.longseq.flexsp", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="plan a step and print its micro-batches and groups")
    _add_plan_arguments(plan)
    plan.add_argument("--planner", choices=PLANNERS, default="heuristic", help="default: heuristic")
    plan.add_argument("--microbatches", type=int, default=1, metavar="N", help="smallest number of micro-batches")
    plan.add_argument(
        "--microbatch-bound",
        action="store_true",
        help="also bound the seconds of the plan's own micro-batches, whatever groups work on them (takes longer)",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    plan.set_defaults(run=_plan)
    simulate = commands.add_parser("simulate", help="print Markdown tables of the paper's configurations")
    simulate.add_argument("--batches", type=int, default=2, metavar="N", help="steps of a configuration (default 2)")
    for name, known in (("models", PAPER_MODELS), ("contexts", CONTEXTS)):
        simulate.add_argument(f"--{name}", default=",".join(known), metavar="NAME,...", help=f"of {', '.join(known)}")
    simulate.set_defaults(run=_simulate)
    draw = commands.add_parser("draw", help="draw a step, ranks by time, coloured by sequence: static and flexible")
    _add_plan_arguments(draw)
    draw.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture to write (.svg, .png)")
    draw.set_defaults(run=_draw)
    return parser


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=Path, required=True, metavar="FILE", help="one length in tokens a line")
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="data- and context-parallel ranks")
    parser.add_argument("--cost", required=True, metavar="FILE.json|NAME", help=f"JSON, or {', '.join(BUILT_IN)}")
    parser.add_argument("--degrees", metavar="auto|1,2,...", default="auto", help="degrees of groups (default auto)")
    parser.add_argument("--kinds", metavar="KIND,...", default=",".join(FAMILIES), help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--max-tokens-per-rank", type=int, metavar="T", help="memory limit (default: the cost model's)")


def read_lengths(file: Path) -> list[int]:
    """Read lengths, one a line. Empty lines are skipped.

    Raises:
        ValueError: A line is no whole number above 0, or there is none.
    """
    lengths = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            lengths.append(int(line))
        except ValueError:
            raise ValueError(f"{file}, line {number}: {line.strip()!r} is no length; give one number a line") from None
        if lengths[-1] < 1:
            raise ValueError(f"{file}, line {number}: length {lengths[-1]}; give at least 1")
    if not lengths:
        raise ValueError(f"{file}: it has no lengths; give one a line")
    return lengths


def _degrees(text: str, ranks: int) -> tuple[int, ...]:
    if text == "auto":
        return automatic_degrees(ranks)
    try:
        degrees = tuple(int(word) for word in text.split(","))
    except ValueError:
        degrees = (0,)
    if min(degrees) < 1:
        raise ValueError(f"--degrees {text}: give auto, or numbers above 0 such as 1,2,4")
    return degrees


def _kinds(text: str) -> tuple[KindFamily, ...]:
    kinds = tuple(one for one in FAMILIES if one in text.split(","))
    unknown = [word for word in text.split(",") if word not in FAMILIES]
    if unknown:
        raise ValueError(f"--kinds {text}: {unknown[0]!r} is unknown; give some of {', '.join(FAMILIES)}")
    return kinds


def _problem(
    args: argparse.Namespace,
) -> tuple[list[int], int, GroupCostModel, tuple[int, ...], tuple[KindFamily, ...]]:
    if not 1 <= args.ranks <= MOST_RANKS:
        raise ValueError(f"--ranks {args.ranks}: give 1 to {MOST_RANKS}")
    cost = load_cost(args.cost)
    if args.max_tokens_per_rank is not None:
        cost = replace(cost, tokens_per_rank=args.max_tokens_per_rank)
    degrees, kinds = _degrees(args.degrees, args.ranks), _kinds(args.kinds)
    for degree in degrees if args.degrees != "auto" else ():
        if degree > args.ranks or not cost.kinds(degree, kinds):
            why = f"there are {args.ranks} ranks" if degree > args.ranks else f"no kind of {args.kinds} can use it"
            print(f"note: degree {degree} is left out: {why}", file=sys.stderr)
    return read_lengths(args.lengths), args.ranks, cost, degrees, kinds


def _plan(args: argparse.Namespace) -> str:
    if not 1 <= args.microbatches <= MOST_MICROBATCHES:
        raise ValueError(f"--microbatches {args.microbatches}: give 1 to {MOST_MICROBATCHES}")
    problem = _problem(args)
    plan = plan_step(*problem, args.planner, least=args.microbatches)
    bound = microbatch_bounds(StepProblem(*problem), plan) if args.microbatch_bound else None
    if not args.json:
        return plan_table(plan, problem[0], bound)
    found = plan_object(plan, problem[3], problem[4])
    if bound is not None:
        found |= {"microbatch_bound": bound, "microbatch_gap": plan.seconds / bound - 1}
    return json.dumps(found)


def plan_object(plan: StepPlan, degrees: Collection[int], families: Sequence[KindFamily] = FAMILIES) -> dict[str, Any]:
    """Return a plan as the object that `plan --json` prints.

    Groups have one of the given degrees. Ranks on which none of them has a place are in no group: they wait.

    Args:
        plan: the plan.
        degrees: degrees that a group may have.
        families: kinds that a group may have.
    """

    def name(kind: Kind) -> str:
        return "ring" if kind.degree == 1 and "ulysses" not in families else str(kind)  # one rank needs neither

    return {
        "microbatches": [
            {
                "seconds": one.seconds,
                "groups": [
                    {
                        "degree": group.degree,
                        "kind": name(group.kind),
                        "ranks": list(group.ranks),
                        "sequences": list(group.sequences),
                    }
                    for group in one.groups
                    if group.degree in degrees
                ],
            }
            for one in plan.microbatches
        ],
        "seconds": plan.seconds,
        "bound": plan.bound,
        "gap": plan.gap,
        "planner_seconds": plan.planner_seconds,
    }


def plan_table(plan: StepPlan, lengths: Sequence[int], microbatch_bound: float | None = None) -> str:
    """Return a plan as a Markdown table: of every micro-batch its groups, sequences and seconds.

    Args:
        plan: the plan.
        lengths: tokens of every sequence.
        microbatch_bound: lower bound on the seconds of the plan's own micro-batches; None: it is not shown.
    """
    rows = []
    for number, one in enumerate(plan.microbatches):
        counts: dict[str, int] = {}
        for group in sorted((group for group in one.groups if group.sequences), key=lambda group: -group.degree):
            label = f"{group.degree} ({group.kind})" if group.degree > 1 else "1"
            counts[label] = counts.get(label, 0) + 1
        held = [lengths[index] for group in one.groups for index in group.sequences]
        groups = ", ".join(f"{count} x {label}" for label, count in counts.items())
        span = f"{min(held)} to {max(held)}" if held else "none"
        rows.append((str(number), str(len(held)), span, groups, f"{one.idle_share:.1%}", f"{one.seconds:.3f}"))
    table = markdown_table(("micro-batch", "sequences", "tokens", "groups x degree (kind)", "idle", "seconds"), rows)
    own = ""
    if microbatch_bound is not None:
        gap = plan.seconds / microbatch_bound - 1
        own = f"; bound of its own micro-batches {microbatch_bound:.3f} s, gap {gap:.2%}"
    return (
        f"{table}\n\n{plan.seconds:.3f} s, bound {plan.bound:.3f} s, gap {plan.gap:.2%}, idle {plan.idle_share:.1%}, "
        f"planned in {plan.planner_seconds:.2f} CPU seconds{own}"
    )


def _simulate(args: argparse.Namespace) -> str:
    if not 1 <= args.batches <= MOST_BATCHES:
        raise ValueError(
            f"--batches {args.batches}: give 1 to {MOST_BATCHES}; each takes seconds in every configuration"
        )
    for given, known in ((args.models, PAPER_MODELS), (args.contexts, CONTEXTS)):
        unknown = [name for name in given.split(",") if name not in known]
        if unknown:
            raise ValueError(f"simulate: {unknown[0]!r} is none of {', '.join(known)}")
    models, contexts = args.models.split(","), args.contexts.split(",")
    return markdown(args.batches, [row for row in configurations() if row[0] in models and row[1] in contexts])


def _draw(args: argparse.Namespace) -> None:
    from megatron.longseq.flexsp.tools.figure import draw  # imports matplotlib, which the other commands do not need

    problem = _problem(args)
    plans = {"one degree": plan_step(*problem, "static"), "FlexSP": plan_step(*problem)}
    draw(plans, problem[0], args.output)
