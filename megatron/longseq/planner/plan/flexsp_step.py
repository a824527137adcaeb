"""Predict steps of whole documents: with FlexSP's groups, or packed into sequences for a static context-parallel size.

Both are priced by the same cost model of groups (`flexsp_cost`). FlexSP's plans come from its own planner. Data
parallelism, the optimizer and memory are those of any other run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import NamedTuple

from megatron.longseq.attention.plan.layout import length_multiple
from megatron.longseq.flexsp.plan.cost import FAMILIES, GroupCostModel, KindFamily
from megatron.longseq.flexsp.plan.plan import Kind, PlannerName, StepPlan
from megatron.longseq.flexsp.plan.planner import automatic_degrees, plan_step
from megatron.longseq.flexsp.plan.problem import StepProblem
from megatron.longseq.planner.plan.cluster import Cluster
from megatron.longseq.planner.plan.communication import boundary_seconds
from megatron.longseq.planner.plan.configuration import Configuration, reasons
from megatron.longseq.planner.plan.data_parallel import data_seconds, step_optimizer_seconds, tied_seconds
from megatron.longseq.planner.plan.flexsp_cost import UNIT, group_cost, most_tokens, packed_run, rank_bytes
from megatron.longseq.planner.plan.memory import stage_params
from megatron.longseq.planner.plan.model import Architecture
from megatron.longseq.planner.plan.step import StepPrediction, step_prediction, visible_cells

Lengths = Sequence[int]  # tokens of the documents of a step
# The groups of a micro-batch: how each computes attention, and the lengths of its documents.
Groups = Sequence[tuple[Kind, Lengths]]


@dataclass(frozen=True)
class DocumentRun:
    """A layout that trains on documents.

    Attributes:
        run: its flags, without context parallelism.
        tokens: --flexsp-max-tokens-per-rank.
        cost: cost model of a group.
        tensor: seconds per token of a rank's exposed tensor-parallel messages, a part of the cost model's.
    """

    run: Configuration
    tokens: int
    cost: GroupCostModel
    tensor: float

    def holds(self, length: int) -> bool:
        """Return whether the largest group holds a document, as `flexsp.from_args.check_plannable` requires."""
        run = self.run
        degrees = StepProblem(
            (1,), run.data_parallel_size, self.cost, automatic_degrees(run.data_parallel_size)
        ).degrees
        sharing = run.tensor_model_parallel_size if run.sequence_parallel else 1
        multiple = length_multiple(degrees[-1], sharing)
        return -(-length // multiple) * multiple <= self.cost.capacity(degrees[-1])


class DocumentPrediction(NamedTuple):
    """A prediction for documents, the mean over some steps.

    Attributes:
        prediction: seconds and memory; its breakdown has the kind `waiting` for faster groups that wait.
        plans: FlexSP's plan of every step; none for packed sequences.
        microbatches: mean number of a step.
        context: static context parallelism as Ulysses x ring; None: groups of FlexSP.
    """

    prediction: StepPrediction
    plans: tuple[StepPlan, ...]
    microbatches: float
    context: Kind | None = None


class _Passes(NamedTuple):
    """Seconds of the micro-batches of a step, the mean of all ranks by what they do, and documents.

    Attributes:
        seconds, longest: of all micro-batches, and of the longest one.
        number: of micro-batches.
        compute, context: mean seconds of a rank in its layers, and in messages of its group.
        documents: most documents of a pack, over the ranks of its all-to-all.
    """

    seconds: float
    longest: float
    number: int
    compute: float
    context: float
    documents: float


def document_run(
    model: Architecture, cluster: Cluster, run: Configuration, steps: Sequence[Lengths], tokens: int = 0
) -> DocumentRun | None:
    """Return a layout with its cost model; None if no token fits into the memory.

    Args:
        model: its architecture.
        cluster: the GPUs.
        run: layout, recomputation and sharding, without context parallelism; its sequence length is that of the longest
            document.
        steps: lengths of the documents of some steps.
        tokens: most tokens of a micro-batch on a rank; 0: as many as fit.
    """
    share_of_step = max(-(-sum(lengths) // run.data_parallel_size) for lengths in steps)
    tokens = tokens or most_tokens(model, cluster, run, max(run.seq_length, share_of_step), steps)
    if not tokens:
        return None
    cost, messages = group_cost(model, cluster, run, tokens)
    return DocumentRun(run, tokens, cost, messages)


def predict_flexsp(
    model: Architecture,
    cluster: Cluster,
    one: DocumentRun,
    steps: Sequence[Lengths],
    degrees: Sequence[int] | None = None,
    kinds: Sequence[KindFamily] = FAMILIES,
    planner: PlannerName = "heuristic",
) -> DocumentPrediction:
    """Return the prediction of `--flexsp`.

    Args:
        model: its architecture.
        cluster: the GPUs.
        one: the layout.
        steps: lengths of the documents of every step.
        degrees, kinds, planner: see `flexsp.plan.planner.plan_step`.

    Raises:
        PlanError: a document fits into no group.
    """
    ranks = one.run.data_parallel_size
    plans = tuple(plan_step(lengths, ranks, one.cost, degrees, kinds, planner) for lengths in steps)
    passes = []
    for lengths, plan in zip(steps, plans, strict=True):
        found = [
            [(group.kind, [lengths[index] for index in group.sequences]) for group in microbatch.groups]
            for microbatch in plan.microbatches
        ]
        passes.append(_passes(one.cost, found, ranks))
    prediction = _prediction(model, cluster, one, steps, passes)
    return DocumentPrediction(prediction, plans, mean(found.number for found in passes))


def predict_packed(
    model: Architecture, cluster: Cluster, one: DocumentRun, steps: Sequence[Lengths], seq_length: int, context: Kind
) -> DocumentPrediction:
    """Return the prediction of documents that are packed into sequences, with static context parallelism.

    Documents are packed in their order and cut at the ends of sequences, as upstream's data sets do. The last sequences
    of a step are filled with its first documents again, and the seconds are scaled to the tokens of the documents.

    Args:
        model, cluster, one, steps: see `predict_flexsp`.
        seq_length: tokens of a sequence.
        context: context parallelism.

    Raises:
        ValueError: a rank's part of a sequence does not fit into its memory.
    """
    if seq_length > context.degree * one.tokens:
        raise ValueError(f"{seq_length} tokens do not fit on {context.degree} ranks of {one.tokens} tokens")
    ranks = one.run.data_parallel_size
    replicas = ranks // context.degree
    passes = []
    for lengths in steps:
        sequences = list(pack(lengths, seq_length, replicas))
        found = [
            [(context, documents) for documents in sequences[begin : begin + replicas]]
            for begin in range(0, len(sequences), replicas)
        ]
        scale = sum(lengths) / (len(sequences) * seq_length)
        once = _passes(one.cost, found, ranks)
        passes.append(
            once._replace(seconds=scale * once.seconds, compute=scale * once.compute, context=scale * once.context)
        )
    prediction = _prediction(model, cluster, one, steps, passes)
    return DocumentPrediction(prediction, (), mean(found.number for found in passes), context)


def pack(lengths: Lengths, seq_length: int, multiple: int) -> Iterator[list[int]]:
    """Yield sequences of documents, in their order, cut at the ends of sequences; a multiple of them.

    Args:
        lengths: tokens of the documents; they are repeated until the last sequence is full.
        seq_length: tokens of a sequence.
        multiple: of which the number of sequences is one.
    """
    count = -(-sum(lengths) // seq_length)
    count = -(-count // multiple) * multiple
    index, left = 0, lengths[0]
    for _ in range(count):
        room, parts = seq_length, []
        while room:
            part = min(room, left)
            parts.append(part)
            room, left = room - part, left - part
            if not left:
                index = (index + 1) % len(lengths)
                left = lengths[index]
        yield parts


def _passes(cost: GroupCostModel, microbatches: Sequence[Groups], ranks: int) -> _Passes:
    """Return the seconds of some micro-batches."""
    seconds, longest, compute, context, documents = 0.0, 0.0, 0.0, 0.0, 1.0
    for groups in microbatches:
        slowest = cost.fixed
        for kind, lengths in groups:
            if not lengths:
                continue
            documents = max(documents, len(lengths) / kind.ulysses)
            spent = cost.seconds(kind, lengths)
            tokens, squares = sum(lengths), sum(length * length for length in lengths)
            own = cost.fixed + (cost.linear * tokens + cost.square * squares) / kind.degree
            slowest = max(slowest, spent)
            compute += kind.degree * min(own, spent) / ranks
            context += kind.degree * max(0.0, spent - own) / ranks
        seconds, longest = seconds + slowest, max(longest, slowest)
    return _Passes(seconds, longest, len(microbatches), compute, context, documents)


def _prediction(
    model: Architecture, cluster: Cluster, one: DocumentRun, steps: Sequence[Lengths], passes: Sequence[_Passes]
) -> StepPrediction:
    """Return a prediction from the seconds of micro-batches, with what a step takes besides them.

    Pipeline stages take equally long for a micro-batch, but micro-batches differ. The last stage begins after the
    others have run one, and the longest one delays them (as in a proportionate flow shop), so the bubble is that of
    the longest micro-batch.
    """
    run, stages = one.run, one.run.pipeline_model_parallel_size
    count = mean(found.number for found in passes)
    seconds = mean(found.seconds for found in passes)
    compute, context = mean(found.compute for found in passes), mean(found.context for found in passes)
    tokens = mean(sum(lengths) for lengths in steps)
    messages = one.tensor * tokens / run.data_parallel_size
    parts = packed_run(model, run, max(1, round(tokens / run.data_parallel_size / count)), round(count))
    boundary = boundary_seconds(model, cluster, parts)
    once = seconds / count
    ends = stage_params(model, run)
    data = max(
        (data_seconds(cluster, parts, params, once / 3, once * 2 / 3) for params in (ends[0], ends[-1])),
        key=lambda found: found.exposed,
    )
    breakdown = {
        "compute": compute - messages,
        "tensor": messages,
        "context": context,
        "waiting": seconds - compute - context,
        "pipeline": 2.0 * (stages - 1 + count) * boundary if stages > 1 else 0.0,
        "bubble": (stages - 1) * mean(found.longest for found in passes),
        "data": data.exposed + tied_seconds(model, cluster, run),
        "optimizer": max(step_optimizer_seconds(cluster, run, params) for params in (ends[0], ends[-1])),
        "host": cluster.step_seconds,
    }
    documents = max(found.documents for found in passes)
    return _with_memory(model, cluster, one, steps, breakdown, data.hidden, documents)


def _with_memory(
    model: Architecture,
    cluster: Cluster,
    one: DocumentRun,
    steps: Sequence[Lengths],
    breakdown: dict[str, float],
    hidden: float,
    documents: float,
) -> StepPrediction:
    run = one.run
    stages, _ = rank_bytes(model, cluster, run, one.tokens, documents)
    tokens = mean(sum(lengths) for lengths in steps)
    cells = mean(sum(visible_cells(model, length) for length in lengths) for lengths in steps)
    why = reasons(model, replace(run, micro_batch_size=1, seq_length=UNIT))  # documents may have any length
    found = step_prediction(model, cluster, run, breakdown, {"data": hidden}, stages, tokens, cells)
    return replace(found, reasons=tuple(why))
