"""Read a checkpoint's objects and its list of tensors without running code from the files."""

import io
from typing import Any

from megatron.longseq.checkpoints.safe_reading import load_metadata, load_object


def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
    """Take the place of `DefaultLoadPlanner.load_bytes`; the object is loaded with weights_only=True."""
    from torch.distributed.checkpoint._nested_dict import set_element

    name = read_item.dest_index.fqn
    loaded = load_object(value, name)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


def read_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Take the place of `FileSystemReader.read_metadata`; only PyTorch's and upstream's classes are created."""
    from torch.distributed.checkpoint.metadata import StorageMeta

    with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
        metadata = load_metadata(file)
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata
