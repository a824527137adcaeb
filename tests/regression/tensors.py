"""Read whole weights and optimizer states from a checkpoint of any parallel layout."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp


def logical_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of an upstream `torch_dist` checkpoint in this process, without any process group.

    Args:
        checkpoint: an `iter_NNNNNNN` folder.

    Returns:
        Whole tensors by their names in upstream's checkpoint, in which layers are stacked on dimension 0.
    """
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    sizes = {name: entry for name, entry in metadata.items() if hasattr(entry, "size")}
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in sizes.items()}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state
