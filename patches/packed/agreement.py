"""Comparison of the documents that pipeline stages have read, once per step."""

import functools
from collections.abc import Callable
from typing import Any


def of_stages(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_forward_backward_func`: after a step, compare the documents of all pipeline stages."""

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(_run_compared, original(*args, **kwargs))

    return get_forward_backward_func


def _run_compared(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a step's passes.

    Raises:
        ValueError: On every rank of the pipeline, if stages have read the documents of other micro-batches.
    """
    import torch
    from megatron.core import parallel_state

    from megatron.longseq.attention.runtime.comm import GroupCollectives
    from patches.packed.model import packed_reader

    reader = packed_reader()
    reader.digests.clear()  # of a step that failed
    result = run(*args, **kwargs)
    digests = reader.take_digests()
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return result
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    own = torch.tensor([min(digests), max(digests)], dtype=torch.int64, device=device)
    everyone = GroupCollectives(group).all_gather(own).tolist()
    if len({digest for pair in everyone for digest in pair}) > 1:
        raise ValueError(
            f"packed documents, pipeline stage {group.rank()} of {group.size()}: stages have read the documents of "
            f"different micro-batches in this step (digests {everyone}). Every stage must draw the same samples; check "
            "that the script's data iterators of all stages are alike."
        )
    return result
