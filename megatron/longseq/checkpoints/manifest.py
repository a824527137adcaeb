"""The manifest of a checkpoint: sizes of its files, and checksums of the state that was saved.

Upstream's format is unchanged: the manifest is one more file, written last. Checksums are computed from the live state,
before it is copied or written. So a later comparison notices damage at any point between memory and disk.
"""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.longseq.checkpoints.digest import bytes_digest, tensor_digest, value_digest
from megatron.longseq.checkpoints.safe_reading import load_metadata

NAME = "longseq_manifest.json"
LIST = ".metadata"  # PyTorch's list of tensors and where they are
DESCRIPTION = "metadata.json"  # upstream's; it makes a folder a checkpoint of torch_dist


@dataclass(frozen=True)
class Item:
    """A piece of a tensor, or an object, as one rank has saved it.

    Attributes:
        name: of the tensor in the checkpoint.
        offset: of the piece in the whole tensor; empty for an object.
        digest: see `megatron.longseq.checkpoints.digest`.
    """

    name: str
    offset: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class Manifest:
    """Content of the file.

    Attributes:
        sizes: bytes of every file.
        digests: checksums of the files that rank 0 has written.
        items: checksums by name and offset.
    """

    sizes: dict[str, int]
    digests: dict[str, str]
    items: dict[tuple[str, tuple[int, ...]], str]


def items_of(write_buckets: Sequence[Any]) -> list[Item]:
    """Return the checksums of what this rank is about to write.

    Args:
        write_buckets: of upstream's writer: for each file its path, its name, and pairs of a planned item and its data.
    """
    found = []
    for _, _, (objects, tensors) in write_buckets:
        for planned, value in [*objects, *tensors]:
            found.append(Item(planned.index.fqn, tuple(planned.index.offset or ()), value_digest(value)))
    return found


def write_manifest(folder: Path, items: Sequence[Item]) -> None:
    """Write the manifest of a checkpoint that is otherwise complete.

    Args:
        folder: of the checkpoint.
        items: of all ranks.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != NAME)
    small = [path for path in files if path.name in (LIST, DESCRIPTION)]
    content = {
        "version": 1,
        "files": {path.name: path.stat().st_size for path in files},
        "digests": {path.name: bytes_digest(path.read_bytes()) for path in small},
        "items": [[item.name, item.offset, item.digest] for item in items],
    }
    partial = folder / f"{NAME}.partial"
    with partial.open("w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(folder / NAME)


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a checkpoint.

    Returns:
        The manifest, or None if the checkpoint has none, as those that upstream saves alone.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / NAME
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text("utf-8"))
        return Manifest(
            _sizes(content["files"]),
            dict(content["digests"]),
            {(name, tuple(offset)): digest for name, offset, digest in content["items"]},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error})") from error


def _sizes(listed: Any) -> dict[str, int]:
    """Check the list of files: damage may leave valid JSON."""
    for name, size in listed.items():
        if not isinstance(size, int) or "\0" in name:
            raise ValueError(f"{name!r} has {size!r} bytes")
    if DESCRIPTION not in listed:
        raise ValueError(f"it does not list {DESCRIPTION}")
    return dict(listed)


def find_size_fault(folder: Path, manifest: Manifest) -> str | None:
    """Compare the files of a checkpoint with its manifest, without reading those that hold tensors.

    Returns:
        A message that names the first damaged file, or None.
    """
    for name, size in sorted(manifest.sizes.items()):
        try:
            found = (folder / name).stat().st_size
            digest = bytes_digest((folder / name).read_bytes()) if name in manifest.digests else None
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})."
        if found != size:
            change = "it is truncated" if found < size else "it was changed"
            return f"{folder / name} has {found:,} bytes, but {size:,} were written: {change}."
        if digest is not None and digest != manifest.digests[name]:
            return f"{folder / name} differs from what was written: it was changed or damaged."
    return None


def find_content_fault(folder: Path, manifest: Manifest, part: int, parts: int) -> str | None:
    """Compare a share of a checkpoint's tensors and objects with the checksums of the state that was saved.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        part: number of this rank's share of the files.
        parts: number of shares.

    Returns:
        A message that names the file and the first tensor that differs, or None.
    """
    with (folder / LIST).open("rb") as stream:
        places = load_metadata(stream).storage_data
    by_file: dict[str, list[Any]] = {}
    for index, place in places.items():
        by_file.setdefault(place.relative_path, []).append((index, place))
    for number, name in enumerate(sorted(by_file)):
        if number % parts != part:
            continue
        with (folder / name).open("rb") as file:
            for index, digest in _digests(file, by_file[name]):
                key = index.fqn, tuple(index.offset or ())
                if manifest.items.get(key) != digest:
                    where = f" at {list(key[1])}" if key[1] else ""
                    return (
                        f"{folder / name} is damaged: {key[0]}{where} differs from what was saved "
                        f"(checksum {digest or 'none, it cannot be read'}, saved: {manifest.items.get(key)})."
                    )
    return None


def _digests(file: Any, places: list[Any]) -> Iterator[tuple[Any, str | None]]:
    """Yield the checksum of every item of a file, one after the other; None if an item cannot be read."""
    for index, place in sorted(places, key=lambda pair: pair[1].offset):
        if place.transform_descriptors:  # a compressing extension of PyTorch, which upstream does not use
            continue
        file.seek(place.offset)
        data = file.read(place.length)
        if index.offset is None:
            yield index, bytes_digest(data)
            continue
        try:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception:
            yield index, None
        else:
            yield index, tensor_digest(tensor)
