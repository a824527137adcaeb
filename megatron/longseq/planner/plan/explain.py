"""Explain a plan: which resource binds it, how sensitive it is, and why its neighbours were rejected."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron.longseq.planner.plan.bounds import PlanningProblem
from megatron.longseq.planner.plan.launch import PlanChoice
from megatron.longseq.planner.plan.search import branch_and_bound, rounded
from megatron.longseq.planner.plan.space import Execution, StateSharding
from megatron.longseq.planner.plan.step import StepPrediction, price

RELIEF = 0.1  # share by which a resource is increased to see what it brings
_BINDS = 0.002  # gain below which no resource is said to bind
# Numbers of a cluster that stand for a resource, with the resource's name.
_RESOURCES = {
    "compute": "peak_tflops",
    "memory bandwidth": "memory_bandwidth",
    "bandwidth inside nodes": "link_bandwidth",
    "bandwidth between nodes": "node_bandwidth",
}
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Relief:
    """What 10% more of a resource brings.

    Attributes:
        resource: its name.
        seconds: of a step then; of another plan, if more memory allows one.
        gain: share of the step that is saved.
        plan: the plan that more memory allows; None: the same plan.
    """

    resource: str
    seconds: float
    gain: float
    plan: PlanChoice | None = None


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A plan that differs from the best one in one choice.

    Attributes:
        change: what differs.
        seconds: of a step; None: the plan is not valid.
        memory: bytes with the reserve; None: the plan is not valid.
        reason: why it was rejected.
    """

    change: str
    seconds: float | None
    memory: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a plan is the best one.

    Attributes:
        binding: a sentence that names the binding constraint.
        reliefs: what more of each resource brings, largest gain first.
        neighbours: the nearest rejected plans.
    """

    binding: str
    reliefs: tuple[Relief, ...]
    neighbours: tuple[Neighbour, ...]


def explain(problem: PlanningProblem, best: PlanChoice) -> Explanation:
    """Return the explanation of the best plan of a search.

    Args:
        problem: the problem that was searched; what it has computed is used again.
        best: its best plan.
    """
    found = reliefs(problem, best)
    return Explanation(_binding(problem, best, found[0]), found, tuple(neighbours(problem, best)))


def reliefs(problem: PlanningProblem, best: PlanChoice) -> tuple[Relief, ...]:
    """Return what 10% more of each resource would save, largest gain first.

    Args:
        problem: the search, with its results.
        best: the plan to explain.
    """
    task, seconds = problem.task, problem.prediction(best).step_seconds
    run = task.configuration(best)
    found = []
    for resource, name in _RESOURCES.items():
        more = replace(task.cluster, **{name: getattr(task.cluster, name) * (1 + RELIEF)})
        faster = price(task.model, more, run)[0]
        found.append(Relief(resource, faster, 1 - faster / seconds))
    ranked = branch_and_bound(problem, task.cluster.memory_bytes * (1 + RELIEF)).ranked
    plan, cost = ranked[0]
    found.append(Relief("memory", cost.seconds, 1 - cost.seconds / seconds, plan if plan != best else None))
    return tuple(sorted(found, key=lambda one: -one.gain))


def _binding(problem: PlanningProblem, best: PlanChoice, relief: Relief) -> str:
    """Return the sentence about the binding constraint."""
    prediction, task = problem.prediction(best), problem.task
    if relief.gain < _BINDS:
        return f"none: 10% more of any resource saves less than {_BINDS:.1%} of the step"
    text = f"{relief.resource}: 10% more of it saves {relief.gain:.1%} of the step"
    if relief.resource == "memory" and relief.plan is not None:
        return f"{text}, with {' and '.join(differences(best, relief.plan))}"
    free = (task.cluster.memory_bytes - prediction.peak_bytes - prediction.reserve_bytes) / _GB
    return f"{text}; {free:.1f} GB of a GPU's memory are left"


def differences(one: PlanChoice, other: PlanChoice) -> list[str]:
    """Return what another plan has instead, as texts."""
    found = []
    pairs = ((one.layout, other.layout), (one.execution, other.execution), (one.sharding, other.sharding))
    for mine, theirs in pairs:
        for name, old, new in zip(mine._fields, mine, theirs, strict=True):
            if old != new:
                found.append(f"{name.replace('_', ' ')} {_text(new)} instead of {_text(old)}")
    return found


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):  # a recomputation
        words = [_text(one) for one in value if one not in (None, ())]
        return " ".join(words) or "none"
    return str(value)


def neighbours(problem: PlanningProblem, best: PlanChoice) -> Iterator[Neighbour]:
    """Yield the plans that differ from the best one in one choice, with the reason why each was rejected.

    Args:
        problem: the search, with its results.
        best: the plan to explain.
    """
    space = problem.task.space
    for other in _changes(problem, best):
        change = "; ".join(differences(best, other))
        refusal = space.refusal(*other)
        if refusal is not None:
            yield Neighbour(change, None, None, f"not valid: {refusal}")
            continue
        prediction = problem.prediction(other)
        memory = prediction.peak_bytes + prediction.reserve_bytes
        reason = _reason(problem, best, prediction)
        if space.excludes(other.layout, other.execution):
            reason = f"left out by a restriction of the search: {reason}"
        yield Neighbour(change, prediction.step_seconds, memory, reason)


def _reason(problem: PlanningProblem, best: PlanChoice, other: StepPrediction) -> str:
    """Return why a valid plan was rejected."""
    if other.reasons:
        return f"not valid: {'; '.join(other.reasons)}"
    mine = problem.prediction(best)
    over = (other.peak_bytes + other.reserve_bytes - problem.task.cluster.memory_bytes) / _GB
    slower = other.step_seconds - mine.step_seconds
    if over > 0:
        totals = [sum(kinds.values()) for kinds in other.stages]
        return f"out of memory by {over:.1f} GB on stage {totals.index(max(totals))}, {slower:+.3g} s"
    kind = max(other.breakdown, key=lambda name: other.breakdown[name] - mine.breakdown[name])
    more = other.breakdown[kind] - mine.breakdown[kind]
    if rounded(other.step_seconds) <= rounded(mine.step_seconds):
        more = (other.peak_bytes - mine.peak_bytes) / _GB
        return f"{slower:+.3g} s and {more:+.1f} GB: not faster by enough to be worth the difference"
    return f"{slower:+.3g} s, of which {kind} {more:+.3g} s"


def _changes(problem: PlanningProblem, best: PlanChoice) -> Iterator[PlanChoice]:
    """Yield the plans next to the best one in every choice; data-parallel ranks make up for other sizes."""
    layout, execution, sharding = best
    space = problem.task.space
    for name in ("tensor", "pipeline", "virtual", "ulysses", "ring", "micro_batch"):
        value = getattr(layout, name)
        for number in (value // 2, value * 2):
            if number >= 1:
                yield _with_sharding(problem, _in_pipeline(PlanChoice(layout._replace(**{name: number}), *best[1:])))
    for segments in (execution.segments // 2, execution.segments * 2):
        if segments >= 1:
            yield PlanChoice(layout, execution._replace(segments=segments), sharding)
    if execution.segments > 1 or execution.zero_bubble:
        yield PlanChoice(layout, execution._replace(slack=1 - min(execution.slack, 1)), sharding)
    yield PlanChoice(layout, execution._replace(zero_bubble=not execution.zero_bubble), sharding)
    for recomputation in space.recomputations_of(layout):
        if recomputation != execution.recomputation:
            yield PlanChoice(layout, execution._replace(recomputation=recomputation), sharding)
    for chunk in space.chunk_tokens:
        if chunk != execution.chunk_tokens:
            yield PlanChoice(layout, execution._replace(chunk_tokens=chunk), sharding)
    for other in space.shardings(layout, execution):
        if other != sharding and _is_next(sharding, other):
            yield PlanChoice(layout, execution, other)


def _in_pipeline(choice: PlanChoice) -> PlanChoice:
    """Return a choice without the flags of a pipeline if it has none."""
    if choice.layout.pipeline > 1:
        return choice
    execution = Execution(recomputation=choice.execution.recomputation, chunk_tokens=choice.execution.chunk_tokens)
    return choice._replace(layout=choice.layout._replace(virtual=1), execution=execution)


def _is_next(one: StateSharding, other: StateSharding) -> bool:
    """Return whether two shardings differ in one level by one step, or in the group size alone."""
    mine, theirs = one.levels, other.levels
    steps = sum(
        abs(int(a) - int(b))
        for a, b in ((mine.params, theirs.params), (mine.grads, theirs.grads), (mine.optimizer, theirs.optimizer))
    )
    if steps == 0:
        sizes = one.group_size, other.group_size
        return None in sizes or (sizes[0] or 0) in ((sizes[1] or 0) * 2, (sizes[1] or 0) // 2)
    return steps == 1 and (one.group_size == other.group_size or None in (one.group_size, other.group_size))


def _with_sharding(problem: PlanningProblem, choice: PlanChoice) -> PlanChoice:
    """Return a choice whose group size divides its data-parallel ranks: the nearest one of the same triplet."""
    space = problem.task.space
    if space.layout_refusal(choice.layout) is not None:
        return choice
    same = [one for one in space.shardings(choice.layout, choice.execution) if one.levels == choice.sharding.levels]
    if not same or choice.sharding in same:
        return choice
    size = choice.sharding.group_size or 1
    return choice._replace(sharding=min(same, key=lambda one: abs((one.group_size or 1) - size)))
