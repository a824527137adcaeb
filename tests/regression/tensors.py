"""The logical tensors of a checkpoint (whole weights, whole optimizer states), whatever layout of ranks wrote it."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp


def logical_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of an upstream `torch_dist` checkpoint in this process, without any process group.

    Args:
        checkpoint: an `iter_NNNNNNN` folder.

    Returns:
        Names as upstream's checkpoint has them (layers stacked on dimension 0) to whole tensors.
    """
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    sizes = {name: entry for name, entry in metadata.items() if hasattr(entry, "size")}
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in sizes.items()}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state
