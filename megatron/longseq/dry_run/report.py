"""The report of a dry run: the memory of a rank by kind, beside what the planner predicts."""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.longseq.command_line import markdown_table
from megatron.longseq.planner.plan.flags import read
from megatron.longseq.planner.plan.step import predict

GB = 1e9
CLUSTER = "a100"  # states and activations do not depend on it
OWN_FLAGS = ("dry_run_world", "dry_run_rank")
STATES = ("parameters", "gradients", "optimizer")


@dataclass
class RankMemory:
    """Bytes on one rank.

    Attributes:
        parameters: number of parameters in this rank's model chunks.
        params: what layers compute with.
        grads: gradients between micro-batches.
        optimizer: main parameters (unless they are views of `params`) and Adam's states.
        kept: for each model chunk, what a micro-batch keeps from its forward to its backward. Empty where that depends
            on values.
        in_flight: for each model chunk in `kept`, micro-batches that are kept at the moment when the rank keeps most.
    """

    parameters: int
    params: int
    grads: int
    optimizer: int
    kept: list[int]
    in_flight: list[float]

    @property
    def activations(self) -> int:
        """Bytes that are kept for backward at the moment when the rank keeps most."""
        return round(sum(kept * count for kept, count in zip(self.kept, self.in_flight, strict=True)))

    @property
    def total(self) -> int:
        """Sum of all states and activations."""
        return self.params + self.grads + self.optimizer + self.activations


def command_flags(words: Sequence[str]) -> dict[str, Any]:
    """Return the flags of a command line by their names in snake case; a flag without values is True."""
    flags: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            flags[name] = value or True
        elif name:
            flags[name] = word if flags[name] is True else f"{flags[name]} {word}"
    return {name: value for name, value in flags.items() if name not in OWN_FLAGS}


def predicted(words: Sequence[str], world: int, stage: int) -> dict[str, float]:
    """Return the planner's bytes of each kind on a pipeline stage at its peak instant.

    Args:
        words: the command line.
        world: ranks of the job.
        stage: pipeline rank.

    Raises:
        ValueError: the planner does not model a flag; the message names it.
    """
    flags = command_flags(words)
    return predict(*read({**flags, "cluster": f"{CLUSTER}-{world}"})).stages[stage]


def report(args: Namespace, place: Mapping[str, int], memory: RankMemory) -> str:
    """Return the report of a dry run.

    Args:
        args: upstream's, validated.
        place: the rank's place in each dimension of parallelism.
        memory: what was measured.
    """
    try:
        planned, why = predicted(sys.argv[1:], args.world_size, place["pipeline"]), ""
    except ValueError as error:
        planned, why = {}, f"\n> the planner predicts nothing for these flags: {error}"
    rest = sum(size for kind, size in planned.items() if kind not in STATES)
    in_all = sum(planned.values()) - (0 if memory.kept else rest)
    rows = [
        ("parameters", memory.params, planned.get("parameters")),
        ("gradients", memory.grads, planned.get("gradients")),
        ("optimizer states", memory.optimizer, planned.get("optimizer")),
        ("activations at the peak", memory.activations if memory.kept else None, rest if planned else None),
        ("sum" if memory.kept else "sum without activations", memory.total, in_all if planned else None),
    ]
    kinds = [(kind, _in_gb(size), _in_gb(other)) for kind, size, other in rows]
    ranks = ", ".join(f"{name} {rank}" for name, rank in place.items())
    kept = "what a micro-batch keeps depends on how many tokens each expert gets, and is not counted"
    if memory.kept:
        sizes = (f"{size / GB:.4g} GB x {count:g}" for size, count in zip(memory.kept, memory.in_flight, strict=True))
        kept = f"a micro-batch keeps, times micro-batches in flight, of each model chunk: {', '.join(sizes)}"
    return (
        f"> dry run of rank {args.rank} of {args.world_size} ({ranks}): every group, size and patch holds\n"
        f"> {memory.parameters:,} parameters; {kept}\n"
        f"{markdown_table(('', 'GB of this rank', 'GB of its stage by the planner'), kinds)}\n"
        f"> activations are those of {args.transformer_impl} layers, kept for backward; the planner's also contain "
        f"gathered and temporary buffers{why}"
    )


def _in_gb(size: float | None) -> str:
    return "" if size is None else f"{size / GB:.4g}"
