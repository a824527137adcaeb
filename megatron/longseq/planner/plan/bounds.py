"""The planner's search problem: its tree, the price of a plan, and lower bounds for all plans below a node.

The levels of the tree are layouts, what is recomputed, and the schedule with the loss; leaves differ in the sharding of
the model states. A bound is the price of a configuration without what a level has not chosen yet: a layout is bounded
by its compute and exposed communication without recomputation, bubble, data parallelism and optimizer, and by the
smallest model states and one micro-batch of layer inputs. `tests/unit/test_planner_plans.py` compares bounds
and prices.
"""

from collections.abc import Hashable, Iterable
from functools import cached_property
from math import inf
from typing import NamedTuple

from megatron.longseq.pipeline.plan.generators import smallest_group
from megatron.longseq.pipeline.plan.schedule import Pipeline
from megatron.longseq.planner.plan.activations import loss_bytes, weight_grad_bytes
from megatron.longseq.planner.plan.configuration import Configuration, reasons
from megatron.longseq.planner.plan.launch import PlanChoice
from megatron.longseq.planner.plan.memory import StageParams, stage_kept, stage_params, stages_bytes, state_bytes
from megatron.longseq.planner.plan.search import LeafPrice
from megatron.longseq.planner.plan.space import Execution, ParallelLayout, Recomputation, StateSharding
from megatron.longseq.planner.plan.step import StepPrediction, pipeline_price, predict, price
from megatron.longseq.planner.plan.task import PlanningTask

# Kinds of a step's seconds that do not shrink when a schedule, a sharding or further recomputation is chosen.
_OF_LAYOUT = ("compute", "recomputation", "tensor", "context", "host")
_OF_EXECUTION = (*_OF_LAYOUT, "bubble", "pipeline")
_MODEL_STATES = ("parameters", "gradients", "optimizer", "gathered")
_ROUNDING = 1 - 1e-9


class SearchNode(NamedTuple):
    """A node of the search.

    Attributes:
        layout: chosen at the first level.
        recomputation: chosen at the second level, else None.
        execution: chosen at the third level, else None; its recomputation is that of the second.
    """

    layout: ParallelLayout
    recomputation: Recomputation | None = None
    execution: Execution | None = None


class PlanningProblem:
    """A `SearchProblem` for one task. What it computes is kept, so later searches of the same task are cheap.

    Args:
        task: the model, the cluster and the choices.
    """

    def __init__(self, task: PlanningTask) -> None:
        self.task = task
        self._predictions: dict[PlanChoice, StepPrediction] = {}
        self._seconds: dict[PlanChoice, float] = {}
        self._breakdowns: dict[tuple[ParallelLayout, Execution], dict[str, float]] = {}
        self._states: dict[tuple[int, int, StateSharding, bool], tuple[float, float]] = {}
        self._smallest: dict[tuple[int, int, bool, bool], StateSharding | None] = {}
        self._peaks: dict[tuple[ParallelLayout, Execution], tuple[float, float]] = {}
        self._kept: dict[tuple[ParallelLayout, Execution], tuple[float, float]] = {}

    def roots(self) -> Iterable[SearchNode]:
        """Return the layouts."""
        return map(SearchNode, self.task.space.layouts())

    def children(self, node: SearchNode) -> Iterable[SearchNode]:
        """Return what may be recomputed under a layout, or the ways to run it then."""
        space = self.task.space
        if node.recomputation is None:
            return [SearchNode(node.layout, one) for one in space.recomputations_of(node.layout)]
        if node.execution is None:
            return [
                SearchNode(node.layout, node.recomputation, one)
                for one in space.executions(node.layout, (node.recomputation,))
            ]
        return []

    def leaves(self, node: SearchNode) -> Iterable[PlanChoice]:
        """Return the shardings of the model states of a way to run a layout."""
        if node.execution is None:
            return []
        return [PlanChoice(node.layout, node.execution, one) for one in self._shardings(node)]

    def _shardings(self, node: SearchNode) -> Iterable[StateSharding]:
        return self.task.space.shardings(node.layout, node.execution or Execution())

    def family(self, node: SearchNode) -> Hashable:
        """Return the sizes of tensor, pipeline and context parallelism."""
        return node.layout.tensor, node.layout.pipeline, node.layout.context

    def node_seconds(self, node: SearchNode) -> float:
        """Return the seconds of the node's configuration without what is not chosen yet."""
        if node.execution is not None:
            return self._sum(self._breakdown(node.layout, node.execution), _OF_EXECUTION)
        plain = Execution(recomputation=node.recomputation or Recomputation())
        return self._sum(self._breakdown(node.layout, plain), _OF_LAYOUT)

    def _sum(self, breakdown: dict[str, float], kinds: tuple[str, ...]) -> float:
        return sum(breakdown[kind] for kind in kinds) * _ROUNDING

    def _breakdown(self, layout: ParallelLayout, execution: Execution) -> dict[str, float]:
        """Return what the seconds consist of without sharded model states and chunks of the loss, which add to them."""
        slack = execution.slack if execution.zero_bubble else 0
        key = layout, execution._replace(chunk_tokens=None, slack=slack, partition="balanced")
        if key not in self._breakdowns:
            run = self.task.configuration(PlanChoice(*key, StateSharding()))
            self._breakdowns[key] = pipeline_price(self.task.model, self.task.cluster, run, least=True)
        return self._breakdowns[key]

    def node_bytes(self, node: SearchNode) -> float:
        """Return the bytes of the smallest model states, and of what the layers keep for the fewest micro-batches."""
        if node.execution is None:
            # Everything recomputed, in as many segments as there may be, is what every layout can at least have.
            recomputation = node.recomputation or Recomputation("full", (), "uniform", self.task.space.sizes.num_layers)
            segments = max(self.task.space.segments) if node.layout.pipeline > 1 else 1
            execution = Execution(segments, recomputation=recomputation, chunk_tokens=1)
        else:
            execution = node.execution
        smallest = self._smallest_sharding(node)
        if smallest is None:
            return inf
        states = self._states_of(node.layout, smallest, _segments_of(node))
        return self._with_reserve(states, self._kept_of(node.layout, execution))

    def _smallest_sharding(self, node: SearchNode) -> StateSharding | None:
        """Return the sharding of a node with the smallest model states; None if it has none."""
        layout = node.layout
        segments = _segments_of(node)
        key = layout.tensor, layout.pipeline, node.execution is not None and node.execution.zero_bubble, segments > 1
        if key not in self._smallest:
            sizes = {one: max(self._states_of(layout, one, segments)) for one in self._shardings(node)}
            self._smallest[key] = min(sizes, key=sizes.__getitem__, default=None)
        return self._smallest[key]

    def leaf_bytes(self, leaf: PlanChoice) -> float:
        """Return the bytes of a plan: with equal layers per stage, the first or the last stage is the fullest."""
        states = self._states_of(leaf.layout, leaf.sharding, leaf.execution.segments)
        return self._with_reserve(states, self._kept_exactly(*leaf[:2]))

    def _with_reserve(self, states: tuple[float, float], kept: tuple[float, float]) -> float:
        peak = max(map(sum, zip(states, kept, strict=True))) * _ROUNDING
        return peak + self.task.cluster.reserve_bytes(peak)

    def _kept_exactly(self, layout: ParallelLayout, execution: Execution) -> tuple[float, float]:
        """Return the bytes of the first and the last stage at their peak, without the model states."""
        key = layout, execution
        if key not in self._peaks:
            run = self.task.configuration(PlanChoice(layout, execution, StateSharding()))
            stages = stages_bytes(self.task.model, run, self.task.cluster)
            first, last = (
                sum(size for kind, size in stage.items() if kind not in _MODEL_STATES)
                for stage in (stages[0], stages[-1])
            )
            self._peaks[key] = first, last
        return self._peaks[key]

    def _states_of(self, layout: ParallelLayout, sharding: StateSharding, segments: int) -> tuple[float, float]:
        """Return the bytes of the model states of the first and the last stage, which grow if there are segments."""
        key = layout.tensor, layout.pipeline, sharding, segments > 1
        if key not in self._states:
            run = self.task.configuration(PlanChoice(layout, Execution(segments), sharding))
            params = stage_params(self.task.model, run)
            first, last = (self._state_bytes(run, one) for one in (params[0], params[-1]))
            self._states[key] = first, last
        return self._states[key]

    def _state_bytes(self, run: Configuration, params: StageParams) -> float:
        return sum(state_bytes(self.task.model, run, self.task.cluster, params).values())

    def _kept_of(self, layout: ParallelLayout, execution: Execution) -> tuple[float, float]:
        """Return the bytes that the first and the last stage keep at least for backward, without model states."""
        key = layout, execution._replace(partition="balanced", slack=0, zero_bubble=False)
        if key not in self._kept:
            run = self.task.configuration(PlanChoice(layout, key[1], StateSharding()))
            model, layers = self.task.model, self.task.space.sizes.num_layers // layout.pipeline
            kept = stage_kept(model, run, self.task.cluster, layers, 0)
            buffers = weight_grad_bytes(model, run)
            logits = sum(loss_bytes(model, run)) / execution.segments
            self._kept[key] = kept * self._in_flight(layout, execution) + buffers, kept / execution.segments + logits
        return self._kept[key]

    def _in_flight(self, layout: ParallelLayout, execution: Execution) -> float:
        """Return the micro-batches that the first stage has run forward when its first backward ends the warm-up."""
        stages, virtual, segments = layout.pipeline, layout.virtual, execution.segments
        microbatches = self.task.space.microbatches(layout)
        group = smallest_group(Pipeline(stages, microbatches, segments, virtual), execution.slack) if virtual > 1 else 0
        after = (2 if virtual > 1 else 1) * (stages - 1)
        units = after + (virtual - 1) * group * segments + segments
        return min(units, microbatches * segments * virtual) / (segments * virtual)

    def leaf_seconds(self, leaf: PlanChoice) -> float:
        """Return the seconds of a plan, without its memory."""
        if leaf not in self._seconds:
            run = self.task.configuration(leaf)
            self._seconds[leaf] = price(self.task.model, self.task.cluster, run)[0]
        return self._seconds[leaf] * _ROUNDING

    def price(self, leaf: PlanChoice) -> LeafPrice | None:
        """Return the seconds and bytes of a plan; None if the configuration is not valid."""
        if reasons(self.task.model, self.task.configuration(leaf)):
            return None
        return LeafPrice(self.leaf_seconds(leaf) / _ROUNDING, self.leaf_bytes(leaf) / _ROUNDING, self.preference(leaf))

    def prediction(self, leaf: PlanChoice) -> StepPrediction:
        """Return the prediction of a plan."""
        if leaf not in self._predictions:
            self._predictions[leaf] = predict(self.task.model, self.task.cluster, self.task.configuration(leaf))
        return self._predictions[leaf]

    def preference(self, leaf: PlanChoice) -> tuple[float, ...]:
        """Return how simple a plan is, lower is simpler: the number of mechanisms that it uses, then their sizes.

        Returns:
            Key to compare plans by.
        """
        layout, execution, sharding = leaf
        mechanisms = (
            layout.tensor > 1,
            layout.pipeline > 1,
            layout.virtual > 1,
            layout.ulysses > 1,
            layout.ring > 1,
            execution.segments > 1,
            execution.slack > 0,
            execution.zero_bubble,
            execution.recomputation.granularity is not None,
            execution.chunk_tokens is not None,
            sharding.strategy is not None,
        )
        sizes = (*layout, execution.segments, execution.slack, execution.chunk_tokens or 0, sharding.group_size or 0)
        return float(sum(mechanisms)), *map(float, sizes), float(self._order[sharding.strategy or ""])

    @cached_property
    def _order(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(("", *self.task.space.strategies))}


def _segments_of(node: SearchNode) -> int:
    """Return the segments of a node's execution; 1, with which model states are smallest, if it is not chosen yet."""
    return 1 if node.execution is None else node.execution.segments
