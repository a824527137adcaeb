"""Loaded optimizer states belong to the loaded weights, or loading fails."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megatron.longseq.sharding.runtime.bucket_storage import ParamStore
from megatron.longseq.sharding.runtime.state import cut

APART = 0.02  # of a tensor's norm: far above what rounding to bf16 changes, far below what another tensor would


@contextmanager
def matching_weights(optimizer: Any, stores: Mapping[torch.nn.Parameter, ParamStore]) -> Iterator[None]:
    """Hold main parameters, which are loaded inside, to the weights, which were loaded before.

    Upstream's distributed optimizer, with several padded buckets, writes tensors of other parameters into a fully
    reshardable checkpoint (its issue 504), without a word.

    Args:
        optimizer: upstream's.
        stores: of its parameters.

    Raises:
        ValueError: on a rank that holds a part of such a parameter; it names the first one.
    """
    weights = {}
    for param, store in stores.items():
        if param in optimizer.model_param_group_index_map:
            span = optimizer._get_model_param_range_map(param)["gbuf_world_in_bucket"]
            weights[param] = cut(store.part, range(span.start, span.end), store.held.start).clone()
    yield
    for param, weight in weights.items():
        main = optimizer._get_main_param_and_optimizer_states(param)["param"].detach()
        apart = float((main.to(weight.dtype) - weight).float().norm() / weight.float().norm().clamp_min(1e-30))
        if not apart <= APART:
            raise ValueError(
                f"rank {torch.distributed.get_rank()}: optimizer states of {optimizer._param_name(param)} are not of "
                f"the weights in the same checkpoint: main parameters are {apart:.1%} of the norm away. Upstream's "
                "distributed optimizer mixes tensors up where it saves fully reshardable states out of several padded "
                "buckets, as with --overlap-grad-reduce (its issue 504). Give --no-load-optim: weights are right, and "
                "the optimizer starts anew."
            )
