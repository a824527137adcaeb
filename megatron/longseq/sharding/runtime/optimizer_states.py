"""This rank's shards of main parameters and optimizer states, as a checkpoint in upstream's format has them."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from megatron.longseq.sharding.runtime.pieces import cut_into_pieces, joined, sharded_pieces
from megatron.longseq.sharding.runtime.state_dicts import whole_of

PREFIX = "optimizer.state."
PARAM = "param"  # upstream's name of main parameters among the states


def shard_states(optimizer: Any, model_state: Any, *, is_loading: bool) -> dict[int, Any] | None:
    """Describe this rank's shards.

    Args:
        optimizer: the distributed optimizer.
        model_state: the model's sharded state dict, which says where parameters are in a checkpoint.
        is_loading: whether the states are about to be read; they then get memory of their own.

    Returns:
        For each parameter of which this rank has states, by number: for each state, its pieces. None if upstream splits
        a parameter in a way that leaves no ranges whole.

    Raises:
        ValueError: a parameter is missing in the model's state dict.
    """
    bases = {}
    for base in nested_values(extract_sharded_tensors_and_factories(model_state)[0]):
        bases[base.data] = whole_of(base)
    states: dict[int, Any] = {}
    for number, (param, span) in enumerate(_owned(optimizer)):
        if param not in bases:
            raise ValueError(f"{optimizer._param_name(param)} is not in the model's state dict, so it has no place.")
        pieces = cut_into_pieces(bases[param], span)
        if pieces is None:
            return None
        replica = (*bases[param].replica_id[:2], optimizer.distributed_optimizer_instance_id)
        tensors = optimizer._get_main_param_and_optimizer_states(param)
        states[number] = {}
        for key in (PARAM, *optimizer.optimizer_state_keys):
            flat = tensors[key].detach().reshape(-1)
            if is_loading:
                flat = torch.empty_like(flat, device="cpu")
            states[number][key] = sharded_pieces(pieces, f"{PREFIX}{key}.", flat, span.start, replica)
    return states


def is_of_shards(state_dict: dict[int, Any]) -> bool:
    """Return whether loaded states are those of `shard_states`, and not whole tensors."""
    return all(isinstance(tensors[PARAM], dict) for tensors in state_dict.values())


def load_shard_states(optimizer: Any, state_dict: dict[int, Any]) -> None:
    """Copy loaded pieces into this rank's shards.

    Args:
        optimizer: the distributed optimizer.
        state_dict: as `shard_states` has described it, with tensors.
    """
    for number, (param, _) in enumerate(_owned(optimizer)):
        loaded = {key: joined(pieces) for key, pieces in state_dict[number].items()}
        optimizer._set_main_param_and_optimizer_states(param, loaded)


def _owned(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, range]]:
    """Yield the parameters of which this rank has states, and which of their elements, in a fixed order."""
    for of_dtypes in optimizer.gbuf_ranges:
        for of_buckets in of_dtypes.values():
            for bucket in of_buckets:
                for param, ranges in bucket["param_map"].items():
                    yield param, range(ranges["param"].start, ranges["param"].end)
