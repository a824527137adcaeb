"""Search the layouts of runs on documents: with FlexSP's groups, and packed with a static context-parallel size.

A candidate is a tensor- and pipeline-parallel size, what is recomputed, chunks of the loss, and a sharding of the model
states. Its memory limit (--flexsp-max-tokens-per-rank) is what the model states leave. Candidates are ranked by
FlexSP's lower bound, the best of them by quick plans with one degree for every micro-batch, and the best of these by
FlexSP's planner. Unlike the search without documents, this one does not prove its result.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron.longseq.flexsp.plan.plan import PlannerName
from megatron.longseq.flexsp.plan.planner import automatic_degrees
from megatron.longseq.flexsp.plan.problem import StepProblem
from megatron.longseq.flexsp.plan.step_bound import step_bound
from megatron.longseq.planner.plan.data_parallel import data_seconds, step_optimizer_seconds
from megatron.longseq.planner.plan.flexsp_step import (
    DocumentPrediction,
    DocumentRun,
    Lengths,
    document_run,
    pack,
    predict_flexsp,
    predict_packed,
)
from megatron.longseq.planner.plan.launch import FlagValue, PlanChoice, plan_flags
from megatron.longseq.planner.plan.memory import stage_params, state_bytes
from megatron.longseq.planner.plan.space import Execution, ParallelLayout, StateSharding
from megatron.longseq.planner.plan.task import PlanningTask

_BOUNDED = 24  # candidates, by their bound, that get quick plans
_QUICK = 2  # of these, candidates that FlexSP's planner plans
_PER_SIZES = 4  # candidates of one tensor- and pipeline-parallel size that get quick plans


@dataclass(frozen=True)
class DocumentTask:
    """A search for documents.

    Attributes:
        task: model, cluster and restrictions; the sequence length is the most tokens of a document.
        steps: lengths of the documents of some steps.
        batch_tokens: --flexsp-batch-tokens; None: a step has as many documents as the task has sequences.
    """

    task: PlanningTask
    steps: tuple[Lengths, ...]
    batch_tokens: int | None = None


class DocumentPlan(NamedTuple):
    """A plan for documents.

    Attributes:
        name: what is planned: "FlexSP", "one degree" or "packed sequences".
        choice: the layout; its context parallelism is that of packed sequences.
        one: the layout with its cost model.
        found: the prediction.
    """

    name: str
    choice: PlanChoice
    one: DocumentRun
    found: DocumentPrediction

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.found.prediction.step_seconds


class _Candidate(NamedTuple):
    """A layout with its cost model, and the seconds of a step besides its micro-batches."""

    choice: PlanChoice
    one: DocumentRun
    besides: float


def search_documents(search: DocumentTask) -> list[DocumentPlan]:
    """Return the best plans with FlexSP, then those of one degree and of packed sequences, each fastest first.

    Raises:
        ValueError: no layout holds the longest document.
    """
    candidates = list(_candidates(search))
    if not candidates:
        raise ValueError(_nothing(search))
    packed = _packed(search, candidates)
    return [*_flexible(search, candidates), *([packed] if packed else [])]


def flexsp_flags(search: DocumentTask, plan: DocumentPlan) -> dict[str, FlagValue]:
    """Return the flags of a plan, by their names in snake case.

    Args:
        search: the task.
        plan: one of its plans.
    """
    space = search.task.space
    flags = plan_flags(space, plan.choice)
    ranks = space.gpus // (plan.choice.layout.tensor * plan.choice.layout.pipeline)
    if plan.found.context is not None:
        replicas = ranks // plan.found.context.degree
        sequences = -(-sum(search.steps[0]) // space.seq_length)
        flags["global_batch_size"] = -(-sequences // replicas) * replicas
        flags["dataloader_inter_document_masking"] = True
        return flags
    flags |= {"flexsp": True, "flexsp_max_tokens_per_rank": plan.one.tokens}
    if search.batch_tokens is not None:
        flags |= {"flexsp_batch_tokens": search.batch_tokens, "global_batch_size": ranks}
    if plan.name == "one degree":
        (degree,) = {degree for one in plan.found.plans for degrees in one.degrees() for degree in degrees}
        flags["flexsp_degrees"] = str(degree)
    return flags


def _candidates(search: DocumentTask) -> Iterator[_Candidate]:
    """Yield the layouts that hold some tokens beside their model states."""
    task, space = search.task, search.task.space
    for tensor, pipeline in space.model_parallel_sizes():
        layout = ParallelLayout(tensor, pipeline, 1, 1, 1, 1)
        ranks = space.gpus // (tensor * pipeline)
        if search.batch_tokens is None and space.global_batch_size % ranks:
            continue  # upstream divides the batch among the ranks
        shardings = list(_shardings(task, layout))
        for recomputation in space.recomputations_of(layout):
            for chunk in space.chunk_tokens:
                execution = Execution(recomputation=recomputation, chunk_tokens=chunk)
                for sharding, besides in shardings:
                    choice = PlanChoice(layout, execution, sharding)
                    run = replace(task.configuration(choice), global_batch_size=ranks)
                    one = document_run(task.model, task.cluster, run, search.steps)
                    if one is not None and one.holds(space.seq_length):
                        yield _Candidate(choice, one, besides)


def _shardings(task: PlanningTask, layout: ParallelLayout) -> list[tuple[StateSharding, float]]:
    """Return the shardings of a layout that no other one beats in both bytes and seconds, with their seconds.

    Their seconds are compared without compute to hide behind.
    """
    found = []
    for sharding in task.space.shardings(layout, Execution()):
        run = task.configuration(PlanChoice(layout, Execution(), sharding))
        params = stage_params(task.model, run)[0]
        size = sum(state_bytes(task.model, run, task.cluster, params).values())
        seconds = step_optimizer_seconds(task.cluster, run, params)
        seconds += data_seconds(task.cluster, replace(run, global_batch_size=run.data_parallel_size), params, 0, 0)[0]
        found.append((size, seconds, sharding))
    kept: list[tuple[StateSharding, float]] = []
    for _, seconds, sharding in sorted(found, key=lambda one: one[:2]):
        if not kept or seconds < kept[-1][1]:
            kept.append((sharding, seconds))
    return kept


def _flexible(search: DocumentTask, candidates: Sequence[_Candidate]) -> list[DocumentPlan]:
    """Return the best plans of FlexSP, and the best one with a single degree under the same layout as the first."""
    counts: dict[tuple[int, int], int] = {}
    quick: list[tuple[float, int]] = []
    for number in _bounded(search, candidates):
        sizes = candidates[number].choice.layout[:2]
        counts[sizes] = counts.get(sizes, 0) + 1
        if counts[sizes] <= _PER_SIZES and len(quick) < _BOUNDED:
            quick.append((_predict(search, candidates[number], "sorted").seconds, number))
    best = [candidates[number] for _, number in sorted(quick)[:_QUICK]]
    plans = sorted((_predict(search, one, "heuristic") for one in best), key=lambda plan: plan.seconds)
    static = _one_degree(search, next(one for one in best if one.choice == plans[0].choice))
    return [*plans, *([static] if static else [])]


def _bounded(search: DocumentTask, candidates: Sequence[_Candidate]) -> list[int]:
    """Return the numbers of candidates by FlexSP's bound, without those whose least work alone is above it."""
    lengths = search.steps[0]
    tokens, squares = sum(lengths), sum(length * length for length in lengths)
    shares = []
    for number, (_, one, besides) in enumerate(candidates):
        work = one.cost.linear * tokens + one.cost.square * squares
        shares.append((work / one.run.data_parallel_size + besides, number))
    found: list[tuple[float, int]] = []
    for share, number in sorted(shares):
        if len(found) >= 2 * _BOUNDED and share > sorted(found)[_BOUNDED - 1][0]:
            break
        ranks = candidates[number].one.run.data_parallel_size
        problem = StepProblem(lengths, ranks, candidates[number].one.cost, automatic_degrees(ranks))
        found.append((step_bound(problem) + candidates[number].besides, number))
    return [number for _, number in sorted(found)]


def _predict(search: DocumentTask, candidate: _Candidate, planner: PlannerName) -> DocumentPlan:
    task = search.task
    found = predict_flexsp(task.model, task.cluster, candidate.one, search.steps, planner=planner)
    return DocumentPlan("FlexSP", candidate.choice, candidate.one, found)


def _one_degree(search: DocumentTask, candidate: _Candidate) -> DocumentPlan | None:
    """Return the plan with the best single degree that holds a document of the sequence length."""
    task, one, plans = search.task, candidate.one, []
    for degree in automatic_degrees(one.run.data_parallel_size):
        if degree * one.tokens < task.space.seq_length:
            continue
        try:
            found = predict_flexsp(task.model, task.cluster, one, search.steps, (degree,), planner="static")
        except ValueError:  # the degree has no place on the ranks
            continue
        plans.append(DocumentPlan("one degree", candidate.choice, one, found))
    return min(plans, key=lambda plan: plan.seconds, default=None)


def _packed(search: DocumentTask, candidates: Sequence[_Candidate]) -> DocumentPlan | None:
    """Return the best plan of documents that are packed into sequences with a static context-parallel size."""
    task, length = search.task, search.task.space.seq_length
    best: DocumentPlan | None = None
    for candidate in candidates:
        one, cost = candidate.one, candidate.one.cost
        ranks = one.run.data_parallel_size
        squares = sum(sum(part * part for part in sequence) for sequence in pack(search.steps[0], length, 1))
        least = (cost.linear * sum(search.steps[0]) + cost.square * squares) / ranks
        if best is not None and least > best.seconds:
            continue
        sizes = task.space.context_sizes(*candidate.choice.layout[:2])
        for degree in (size for size in sizes if size * one.tokens >= length):
            for kind in cost.kinds(degree):
                found = predict_packed(task.model, task.cluster, one, search.steps, length, kind)
                layout = candidate.choice.layout._replace(ulysses=kind.ulysses, ring=kind.ring)
                plan = DocumentPlan("packed sequences", candidate.choice._replace(layout=layout), one, found)
                if best is None or plan.seconds < best.seconds:
                    best = plan
    return best


def _nothing(search: DocumentTask) -> str:
    space = search.task.space
    return (
        f"no plan fits: a GPU has {search.task.cluster.memory_bytes / 1e9:.1f} GB; no layout of {space.gpus} GPUs "
        f"divides the {space.global_batch_size} documents of a step evenly, and holds a document of {space.seq_length} "
        "tokens on all of its data-parallel ranks beside the model states; give more GPUs, a smaller --seq-length, "
        "another --global-batch-size, or fewer restrictions"
    )
