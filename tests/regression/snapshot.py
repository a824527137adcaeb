"""Whole logical tensors (weights, optimizer states) of a run: what a checkpoint would hold, without writing one.

Every rank cuts its part out of upstream's sharded state dict; `assemble` lays the parts together in the parent. A place
that several ranks hold must hold the same bits in all of them.
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
    """A box of a logical tensor: `data` lies at `offset` in an array of shape `whole`."""

    name: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    data: Array


@dataclass
class Snapshot:
    """Logical tensors by upstream's checkpoint names, and the names of which ranks hold different copies."""

    tensors: dict[str, Array] = field(default_factory=dict)
    torn: list[str] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, Array]:
        """The model's weights."""
        return {name: array for name, array in self.tensors.items() if not name.startswith(PREFIX)}

    @property
    def first_moments(self) -> dict[str, Array]:
        """Adam's first moments: a fixed linear combination of the gradients so far, so equal iff all of these are."""
        prefix = f"{PREFIX}exp_avg."
        return {name: array for name, array in self.tensors.items() if name.startswith(prefix)}


def parts_of_this_rank(model: list[Any], optimizer: Any) -> list[Part]:
    """Cut this rank's parts out of the training state; collective over the data-parallel ranks.

    Args:
        model: the chunks that `train_step` got.
        optimizer: upstream's optimizer, after at least one step.
    """
    from megatron.core import mpu
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model
    from megatron.training.training import force_param_sync, get_args, should_disable_forward_pre_hook

    if should_disable_forward_pre_hook(get_args()):  # with overlap, new weights arrive at the next forward only
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
    """Return whether any rank's part of the model has a frozen parameter."""
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
    data = (data.float() if data.dtype is torch.bfloat16 else data).cpu().clone().numpy()  # shares no memory
    data = data.reshape((1,) * shard.prepend_axis_num + data.shape)
    return Part(shard.key, tuple(shard.global_shape), tuple(shard.global_offset), data)


def assemble(ranks: Sequence[Sequence[Part]]) -> Snapshot:
    """Lay the parts of all ranks together.

    Raises:
        ValueError: a place of a tensor is held by no rank.
    """
    snapshot = Snapshot()
    covered: dict[str, NDArray[numpy.bool_]] = {}
    for part in (part for parts in ranks for part in parts):
        tensor = snapshot.tensors.setdefault(part.name, numpy.zeros(part.whole, part.data.dtype))
        done = covered.setdefault(part.name, numpy.zeros(part.whole, bool))
        box = tuple(slice(start, start + size) for start, size in zip(part.offset, part.data.shape, strict=True))
        differs = (tensor[box] != part.data) & ~(numpy.isnan(tensor[box]) & numpy.isnan(part.data))
        if (done[box] & differs).any() and part.name not in snapshot.torn:
            snapshot.torn.append(part.name)
        tensor[box], done[box] = part.data, True
    holes = [name for name, done in covered.items() if not done.all()]
    if holes:
        raise ValueError(f"no rank holds all of {', '.join(holes)}")
    return snapshot
