"""Processor time of searching the whole space of many GPUs; `tests/benchmarks/planner.py` prints it."""

from megatron.longseq.planner.plan.cluster import cluster
from megatron.longseq.planner.plan.model import architecture
from megatron.longseq.planner.plan.task import planning_task
from megatron.longseq.planner.tools.search_command import search

_MODEL, _SEQ_LENGTH = "llama-65b", 131072
_BATCH_TOKENS = {1024: 4 << 20, 8192: 32 << 20}


def search_times() -> dict[str, float | None]:
    """Return the seconds of a search of all plans, with its explanation, by the number of GPUs."""
    times: dict[str, float | None] = {}
    for gpus, tokens in _BATCH_TOKENS.items():
        task = planning_task(architecture(_MODEL, {}), cluster(f"a800-{gpus}"), _SEQ_LENGTH, tokens // _SEQ_LENGTH)
        times[f"seconds_{gpus}"] = search(task).total_seconds
    return times
