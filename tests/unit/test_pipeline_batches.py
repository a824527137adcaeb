"""Schedules are validated for exactly the numbers of micro-batches that a run has."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patches.seq1f1b.checks import Entry, reached_sizes
from tests.distributed.flags import TINY, flags
from tests.pool import RankPool
from tests.unit.test_pipeline_flags import messages_of_upstreams_validation


def stepped(entries: list[Entry], steps: int | None, samples: int | None) -> list[int]:
    """Return the batch sizes as upstream computes them, step by step."""
    sizes: list[int] = []
    consumed = taken = 0
    while (steps is None or taken < steps) and (samples is None or consumed < samples):
        size = [size for threshold, size in entries if consumed >= threshold][-1]
        sizes += [size] if size not in sizes else []
        consumed, taken = consumed + size, taken + 1
    return sizes


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4)), max_size=5),
    st.integers(1, 6),
    st.sampled_from(["steps", "samples", "both"]),
    st.integers(1, 60),
)
def test_sizes_are_those_of_the_run_step_by_step(more: list[tuple[int, int]], first: int, kind: str, end: int) -> None:
    entries, at, size = [(0, 2 * first)], 0, first
    for further, larger in more:
        at, size = at + further, size + larger
        entries.append((at, 2 * size))
    steps, samples = end if kind != "samples" else None, end if kind != "steps" else None
    assert reached_sizes(entries, 2, steps=steps, samples=samples) == stepped(entries, steps, samples)


def test_a_size_that_is_no_whole_number_of_micro_batches_matters_if_it_comes() -> None:
    entries = [(0, 4), (8, 6), (100, 8)]
    with pytest.raises(ValueError, match="batch size 6 is not a multiple of 4"):
        reached_sizes(entries, 4, steps=3)
    with pytest.raises(ValueError, match="no batch size is a multiple of 4"):
        reached_sizes([], 4)
    with pytest.raises(ValueError, match="batch size 0 is not a multiple"):
        reached_sizes([(0, 0)], 4)
    assert reached_sizes(entries, 4, steps=2) == [4]
    assert reached_sizes([(0, 8), (2, 6), (4, 8)], 4) == [8], "the first step passes over the second entry"


def test_a_size_that_becomes_smaller_is_refused_as_upstream_does_when_it_comes() -> None:
    with pytest.raises(ValueError, match="batch size 4 follows 8"):
        reached_sizes([(0, 8), (16, 4)], 4, steps=3)
    assert reached_sizes([(0, 8), (16, 4)], 4, steps=2) == [8]


def test_upstreams_validation_proves_every_size_of_the_run(ranks: RankPool, tmp_path: Path) -> None:
    """With 8 layers on 4 stages and V 2, groups have 4 micro-batches of one segment, or 2 of two."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    virtual = "--num-layers 8 --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 1"
    steps = f"{virtual} --train-iters 4"
    k2 = "--seq1f1b-splits 2"
    few = "--step-batch-size-schedule 0:1,64:2,640:8"  # thresholds in tokens, 64 per sample
    cases: dict[str, str | None] = {
        f"{steps} {k2} --step-batch-size-schedule 0:8": None,
        f"{steps} {k2} --step-batch-size-schedule 0:2,640:3": None,  # 4 steps of 2 are 8 samples, 512 tokens
        f"{virtual} {k2} --train-iters 6 --step-batch-size-schedule 0:2,640:3": "0:2,640:3, batch size 3, 3 micro",
        f"{steps} {k2} {few}": f"{few}, batch size 1, 1 micro-batches: a group of 2 micro-batches",
        f"{steps} {k2} {few} --load {tmp_path}": None,
        f"{steps} {k2} {few} --load {tmp_path} --finetune": "batch size 1, 1 micro-batches: a group of 2",
        f"{steps} {k2} {few} --load {tmp_path / 'none'}": "batch size 1, 1 micro-batches: a group of 2",
        f"{steps} {k2} --step-batch-size-schedule 0:8,x:4": "--step-batch-size-schedule 0:8,x:4: ",
        f"{steps} {k2} --step-batch-size-schedule 0:8,64": "--step-batch-size-schedule 0:8,64: ",
        f"{steps} {k2} --global-batch-size 8 --rampup-batch-size 2 2 8": None,
        f"{steps} {k2} --global-batch-size 1 --rampup-batch-size 1 1 8": "--global-batch-size 1, 1 micro-batches: a",
        f"{steps} {k2} --global-batch-size 1 --skip-train": None,
        f"{steps} {k2} --global-batch-size 8 --eval-iters 1 --eval-global-batch-size 1": None,
    }
    lines = [flags(TINY.replace("--global-batch-size 8", ""), case) for case in cases]
    (messages,) = ranks.run(1, messages_of_upstreams_validation, lines, 4)
    for case, message, want in zip(cases, messages, cases.values(), strict=True):
        assert (message is None) == (want is None), (case, message)
        assert want is None or (message is not None and want in message), (case, message)
