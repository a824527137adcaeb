"""Read checkpoints without running code from them: only known classes are created."""

import importlib
import io
import pickle
import re
from typing import Any

import torch
from megatron.core.rerun_state_machine import Call, Caller

_CHECKPOINT = "torch.distributed.checkpoint"
# What PyTorch and upstream write into the file `.metadata`.
_ALLOWED = {
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_CHECKPOINT}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "frozenset", "slice"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}


class _KnownClasses(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint contains")


def load_metadata(file: Any) -> Any:
    """Read the content of a checkpoint's `.metadata`.

    Args:
        file: open for reading bytes.

    Raises:
        pickle.UnpicklingError: the file names a class or function that does not belong into it.
    """
    return _KnownClasses(file).load()


def load_object(value: io.BytesIO, name: str) -> Any:
    """Read an object of a checkpoint, such as its arguments or random-number states.

    Args:
        value: as `torch.save` wrote it.
        name: of the object in the checkpoint.

    Raises:
        ValueError: the object has a class that is not registered as safe. The message names it.
    """
    try:
        # Upstream saves these where it asks to be started again, to repeat a step whose result was not finite.
        with torch.serialization.safe_globals([Call, Caller]):
            return torch.load(value, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        named = found[1] if found else "unknown"
        raise ValueError(
            f"the object {name!r} of the checkpoint is not loaded, because loading it could run code from the file: it "
            f"names {named}. If you trust the checkpoint, register that class with "
            "torch.serialization.add_safe_globals in the training script."
        ) from error
