"""Collect whole weights and optimizer states of a run, as a checkpoint would hold them, without writing one.

Every rank takes its parts from upstream's sharded state dict. `assemble` puts the parts together in the parent process.
Ranks that hold the same part must hold the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
from numpy.typing import NDArray

Array = NDArray[Any]
PREFIX = "optimizer.state."


@dataclass(frozen=True)
class Part:
    """A part of a tensor: `data` belongs at `offset` in an array of shape `whole`."""

    name: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    data: Array


@dataclass
class Snapshot:
    """Whole tensors by their names in upstream's checkpoints, and names of those whose copies differ between ranks."""

    tensors: dict[str, Array] = field(default_factory=dict)
    differing_copies: list[str] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, Array]:
        """Return the model's weights."""
        return {name: array for name, array in self.tensors.items() if not name.startswith(PREFIX)}

    @property
    def first_moments(self) -> dict[str, Array]:
        """Return Adam's first moments. They are equal exactly if all gradients so far are."""
        prefix = f"{PREFIX}exp_avg."
        return {name: array for name, array in self.tensors.items() if name.startswith(prefix)}


def parts_of_this_rank(model: list[Any], optimizer: Any) -> list[Part]:
    """Return this rank's parts of the training state. This is a collective over the data-parallel ranks.

    Args:
        model: the model chunks of `train_step`.
        optimizer: upstream's optimizer, after at least one step.
    """
    from megatron.core import mpu
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model
    from megatron.training.training import force_param_sync, get_args, should_disable_forward_pre_hook

    if should_disable_forward_pre_hook(get_args()):  # with overlap, new weights would arrive in the next forward pass
        force_param_sync(model, optimizer=optimizer)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    chunks = unwrap_model(model)
    if _is_anything_frozen(chunks):  # only some layers have optimizer states
        metadata["non_homogeneous_layers"] = True
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)}
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=metadata)
    apply_factories(state)
    return [_part(leaf) for leaf in _leaves(state) if isinstance(leaf, ShardedTensor) and leaf.data is not None]


def _is_anything_frozen(chunks: list[Any]) -> bool:
    """Return whether a parameter is frozen on any rank."""
    import torch

    frozen = any(not param.requires_grad for chunk in chunks for param in chunk.parameters())
    seen = torch.tensor([frozen], dtype=torch.int32, device=torch.cuda.current_device())
    torch.distributed.all_reduce(seen)
    return bool(seen.item())


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _part(shard: Any) -> Part:
    import torch

    data = shard.data.detach()
    data = (
        (data.float() if data.dtype is torch.bfloat16 else data).cpu().clone().numpy()
    )  # a copy that shares no memory
    data = data.reshape((1,) * shard.prepend_axis_num + data.shape)
    return Part(shard.key, tuple(shard.global_shape), tuple(shard.global_offset), data)


def assemble(ranks: Sequence[Sequence[Part]]) -> Snapshot:
    """Put the parts of all ranks together.

    Raises:
        ValueError: no rank holds some part of a tensor.
    """
    snapshot = Snapshot()
    covered: dict[str, NDArray[numpy.bool_]] = {}
    for part in (part for parts in ranks for part in parts):
        tensor = snapshot.tensors.setdefault(part.name, numpy.zeros(part.whole, part.data.dtype))
        done = covered.setdefault(part.name, numpy.zeros(part.whole, bool))
        box = tuple(slice(start, start + size) for start, size in zip(part.offset, part.data.shape, strict=True))
        differs = (tensor[box] != part.data) & ~(numpy.isnan(tensor[box]) & numpy.isnan(part.data))
        if (done[box] & differs).any() and part.name not in snapshot.differing_copies:
            snapshot.differing_copies.append(part.name)
        tensor[box], done[box] = part.data, True
    holes = [name for name, done in covered.items() if not done.all()]
    if holes:
        raise ValueError(f"no rank holds all of {', '.join(holes)}")
    return snapshot
