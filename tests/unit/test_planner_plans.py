"""The planner's search finds what pricing every plan finds, and its bounds hold."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.longseq.planner.plan.bounds import PlanningProblem, SearchNode
from megatron.longseq.planner.plan.cluster import cluster
from megatron.longseq.planner.plan.launch import PlanChoice
from megatron.longseq.planner.plan.model import Architecture, architecture
from megatron.longseq.planner.plan.restrictions import unusable
from megatron.longseq.planner.plan.search import branch_and_bound
from megatron.longseq.planner.plan.task import PlanningTask, parse_count, planning_task
from tests.unit.brute_force import brute_force

ROUNDING = 1 + 1e-6
FAMILIES = ("a100", "a800", "h100")


@st.composite
def small_tasks(draw: st.DrawFn) -> PlanningTask:
    """A small model on 2 to 16 GPUs, with a random part of the choices and of the memory."""
    heads = draw(st.sampled_from([4, 8]))
    model = Architecture(
        num_layers=draw(st.sampled_from([2, 4, 8])),
        hidden_size=1024,
        num_attention_heads=heads,
        num_query_groups=draw(st.sampled_from([heads, 2])),
        ffn_hidden_size=2816,
        vocab_size=32000,
        swiglu=True,
        untie_embeddings_and_output_weights=draw(st.booleans()),
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    gpus = draw(st.sampled_from([2, 4, 8, 16]))
    machine = cluster(f"{draw(st.sampled_from(FAMILIES))}-{gpus}")
    machine = replace(machine, gpus_per_node=draw(st.sampled_from([2, 4])), context_bytes=1e8)
    seq_length = draw(st.sampled_from([2048, 16384]))
    task = planning_task(
        model,
        machine,
        seq_length,
        draw(st.sampled_from([gpus, 12, 16])),
        segments=draw(st.sampled_from([(1,), (1, 2), (1, 4)])),
        partitions=draw(st.sampled_from([("balanced",), ("balanced", "even")])),
        slacks=draw(st.sampled_from([(0,), (0, 1)])),
        zero_bubble=draw(st.sampled_from([(False,), (False, True)])),
        chunk_tokens=draw(st.sampled_from([(None,), (None, 1024)])),
        strategies=draw(st.sampled_from([("upstream", "upstream-zero1"), ("upstream-zero1", "NIG", "IIG", "GGG")])),
        micro_batch=draw(st.sampled_from([(1,), (1, 2)])),
    )
    memory = draw(st.sampled_from([1.2e9, 2e9, 4e9, 80e9]))
    return replace(task, cluster=replace(machine, memory_bytes=memory))


def check_search(task: PlanningTask, count: int) -> None:
    """Compare the search's best plans with those of pricing every plan."""
    problem = PlanningProblem(task)
    found = branch_and_bound(problem, task.cluster.memory_bytes, count)
    everything = brute_force(problem, task.cluster.memory_bytes, count)
    assert found == everything
    for leaf, price in found.ranked:
        prediction = problem.prediction(leaf)
        assert prediction.fits and not prediction.reasons
        assert price.seconds == pytest.approx(prediction.step_seconds, rel=1e-9)
        assert price.memory == pytest.approx(prediction.peak_bytes + prediction.reserve_bytes, rel=1e-6)


@settings(max_examples=15)
@given(small_tasks(), st.integers(1, 4))
def test_the_search_equals_pricing_every_plan(task: PlanningTask, count: int) -> None:
    check_search(task, count)


@pytest.mark.slow
@settings(max_examples=40)  # four minutes
@given(small_tasks(), st.integers(1, 4))
def test_the_search_equals_pricing_every_plan_of_many(task: PlanningTask, count: int) -> None:
    check_search(task, count)


def random_leaf(problem: PlanningProblem, rng: random.Random) -> tuple[list[SearchNode], PlanChoice]:
    """Return a random plan and the nodes above it."""
    path = [rng.choice(list(problem.roots()))]
    while children := list(problem.children(path[-1])):
        path.append(rng.choice(children))
    return path, rng.choice(list(problem.leaves(path[-1])))


@pytest.mark.parametrize(("name", "gpus", "seq_length"), [("llama-7b", 64, 32768), ("llama3-70b", 256, 131072)])
def test_bounds_hold(name: str, gpus: int, seq_length: int) -> None:
    task = planning_task(architecture(name, {}), cluster(f"a800-{gpus}"), seq_length, 128)
    problem, rng = PlanningProblem(task), random.Random(gpus)
    for _ in range(50):
        path, leaf = random_leaf(problem, rng)
        prediction = problem.prediction(leaf)
        assert not prediction.reasons, leaf
        needed = prediction.peak_bytes + prediction.reserve_bytes
        for node in path:
            assert problem.node_seconds(node) <= prediction.step_seconds * ROUNDING, (node, leaf)
            assert problem.node_bytes(node) <= needed * ROUNDING, (node, leaf)
        assert problem.leaf_seconds(leaf) == pytest.approx(prediction.step_seconds, rel=1e-6)
        assert problem.leaf_bytes(leaf) == pytest.approx(needed, rel=1e-6)


def test_every_plan_of_the_space_is_valid_and_none_is_listed_twice() -> None:
    task = planning_task(architecture("llama3-8b", {}), cluster("a100-8"), 32768, 8, segments=(1, 4))
    problem = PlanningProblem(task)
    seen: set[PlanChoice] = set()
    stack = list(problem.roots())
    while stack:
        node = stack.pop()
        stack += problem.children(node)
        leaves = list(problem.leaves(node))
        for leaf in leaves:
            assert leaf not in seen
            assert task.space.refusal(*leaf) is None, leaf
        seen.update(leaves)
    assert len(seen) > 2_000


def test_counts() -> None:
    assert [parse_count(text) for text in ("128K", "4M", "1000", "1.5k")] == [131072, 4 << 20, 1000, 1536]
    for text in ("", "K", "-4", "0", "many", "1.5"):
        with pytest.raises(ValueError, match="give a whole number"):
            parse_count(text)


def test_restrictions_that_no_plan_has_are_refused() -> None:
    """Values are compared with the plans themselves; a value that some plan has stays."""
    given = {
        "tensor": (1, 2, 3),
        "micro_batch": (1, 32),
        "segments": (1, 4, 16384),
        "slacks": (0, 7),
        "group_sizes": (2, 3),
    }
    task = planning_task(architecture("llama-7b", {}), cluster("a100-8"), 8192, 16, **given)
    expected = {"tensor": [3], "micro_batch": [32], "segments": [16384], "group_sizes": [3]}
    assert unusable(task.space, given) == expected
    alone = planning_task(architecture("llama-7b", {}), cluster("a100-8"), 8192, 16, pipeline=(1,), slacks=(0, 1))
    assert unusable(alone.space, ("slacks", "pipeline")) == {"slacks": [1]}
    upstream = planning_task(
        architecture("llama-7b", {}), cluster("a100-8"), 8192, 16, group_sizes=(2,), strategies=("upstream",)
    )
    assert unusable(upstream.space, ("group_sizes",)) == {"group_sizes": [2]}
