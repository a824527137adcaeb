"""What flags state and the run does not have: sizes that follow from others, and flags that training would refuse."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron.longseq.attention.arguments import check_context_numbers
from megatron.longseq.cross_entropy.arguments import check_cross_entropy_numbers
from megatron.longseq.pipeline.arguments import check_pipeline_numbers
from megatron.longseq.planner.plan.cluster import Cluster
from megatron.longseq.planner.plan.configuration import Configuration
from megatron.longseq.planner.plan.model import Architecture
from megatron.longseq.planner.plan.values import boolean, whole_number
from megatron.longseq.sharding.arguments import check_sharding_numbers

_CHECKS = (check_context_numbers, check_cross_entropy_numbers, check_pipeline_numbers, check_sharding_numbers)


def contradictions(
    values: Mapping[str, Any], given: Mapping[str, Any], model: Architecture, cluster: Cluster, run: Configuration
) -> list[str]:
    """Return what is wrong with the flags of a run and can no longer be seen in its configuration.

    Args:
        values: flags in snake case, as text or as values.
        given: those of a configuration, with their types.
        model, cluster, run: what the flags describe.
    """
    found = _sizes(values, model, run)
    if run.fp8 and not cluster.fp8_peak_tflops:
        found.append(f"fp8_format: the GPUs of {cluster.name} have no fp8 (fp8_peak_tflops is 0)")
    rows = whole_number("", values.get("max_position_embeddings", 0))
    if 0 < rows < run.seq_length:
        found.append(f"max_position_embeddings {rows} is below seq_length {run.seq_length}")
    if not boolean("", values.get("add_position_embedding", True)) and model.position_embedding_type != "rope":
        found.append("no_position_embedding is no longer valid without rope; give position_embedding_type none")
    if run.recompute_method == "block" and not run.recompute_num_layers:
        found.append("recompute_method block needs recompute_num_layers of at least 1")
    two_levels = given.get("cp_comm_type") == "a2a+p2p" and not run.context_parallel_auto
    if two_levels and not given.get("hierarchical_context_parallel_sizes"):
        found.append("cp_comm_type a2a+p2p needs hierarchical_context_parallel_sizes")
    if model.multi_latent_attention and boolean("", values.get("group_query_attention", False)):
        found.append("group_query_attention does not work with multi_latent_attention")
    return found + _refusals(given)


def _sizes(values: Mapping[str, Any], model: Architecture, run: Configuration) -> list[str]:
    """Return the sizes of a table that are not what the other sizes leave."""
    found = []
    if "data_parallel_size" in values:
        size = whole_number("data_parallel_size", values["data_parallel_size"])
        if size != run.data_parallel_size:
            found.append(
                f"data_parallel_size is {size}, but {run.gpus} GPUs in replicas of {run.model_parallel_size} are "
                f"{run.data_parallel_size}"
            )
    per_stage = whole_number("", values.get("num_layers_per_virtual_pipeline_stage", 0))
    virtual = whole_number("", values.get("num_virtual_stages_per_pipeline_rank", 0))
    layers = model.num_layers // max(1, run.pipeline_model_parallel_size)
    if per_stage and virtual and per_stage * virtual != layers:
        found.append(f"{virtual} virtual stages of {per_stage} layers are not the {layers} layers of a pipeline rank")
    return found


def _refusals(given: Mapping[str, Any]) -> list[str]:
    """Return what training's own checks of this project's flags refuse right after it has parsed them."""
    stated = {name: value for name, value in given.items() if value not in ("", 0) or isinstance(value, bool)}
    found = []
    for check in _CHECKS:
        try:
            check(Namespace(**{"zero_bubble": False, "seq1f1b_splits": 1, **stated}))
        except ValueError as error:
            found.append(str(error))
    return found
