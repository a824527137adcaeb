"""What one rank finds out about its node, its software, the storage and the data, before it is connected to others."""

import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import time
import uuid
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.utils import get_blend_from_list

from megatron.longseq.data import LOSS_MASK

PROBE_BYTES = 64 << 20
PACKAGES = ("megatron-core", "transformer-engine", "flash-attn", "flash-attn-3", "numpy", "triton")
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
TOKENIZER_FLAGS = ("tokenizer_model", "vocab_file", "merge_file")


def gather(args: Namespace, code: Iterable[Path]) -> dict[str, Any]:
    """Return the facts of this rank, which can be written as JSON.

    Args:
        args: upstream's parsed arguments.
        code: folders of this project's source. Ranks compare its digest.
    """
    facts: dict[str, Any] = {
        "rank": args.rank,
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "software": software(),
        "code": code_digest(code),
        "data": data_files(args),
    }
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        facts["node"] = {
            "ranks": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            "gpus": gpus(),
            "interfaces": interface_faults(),
            "host_address": host_address(),
            "storage": storage(args.save),
        }
    return facts


def software() -> dict[str, str]:
    """Return the versions that must be the same on all ranks."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "CUDA": torch.version.cuda or "none"}
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = (_nvidia_smi("driver_version") or ["unknown"])[0]
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def code_digest(folders: Iterable[Path]) -> str:
    """Return a digest of the Python files below the folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(glob.iglob("**/*.py", root_dir=folder, recursive=True)):
            digest.update(file.encode() + b"\0" + (folder / file).read_bytes())
    return digest.hexdigest()[:16]


def _nvidia_smi(fields: str) -> list[str]:
    """Return one line per GPU, or an empty list without a driver."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def gpus() -> list[dict[str, Any]]:
    """Return name, memory in use (MiB) and utilization (%) of each GPU of the node that its ranks may use."""
    found = []
    for line in _nvidia_smi("index,uuid,name,memory.used,utilization.gpu"):
        index, uuid, name, used, busy = (word.strip() for word in line.split(","))
        if is_visible(index, uuid, os.environ.get("CUDA_VISIBLE_DEVICES")):
            found.append({"index": int(index), "name": name, "used_mib": _number(used), "busy_percent": _number(busy)})
    return found


def is_visible(index: str, uuid: str, visible: str | None) -> bool:
    """Return whether CUDA_VISIBLE_DEVICES allows a GPU. nvidia-smi lists the others, too, which may serve other users.

    Args:
        index, uuid: of the GPU, as nvidia-smi has them.
        visible: the variable; None: it is not set. If it names parts of GPUs (MIG), every GPU may be one of theirs.
    """
    if visible is None:
        return True
    entries = [entry.strip() for entry in visible.split(",")]
    return any(
        entry == index or entry.startswith("MIG-") or (entry.startswith("GPU-") and uuid.startswith(entry))
        for entry in entries
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "[N/A]" on some devices
        return 0.0


def interface_faults(variables: Iterable[str] = INTERFACES, root: Path = Path("/sys/class")) -> list[str]:
    """Return one sentence for each variable that names network devices of which this node has none.

    Args:
        variables: names of the environment variables. NCCL_IB_HCA is always checked.
        root: where the kernel lists its devices.
    """
    faults = []
    kinds = [(name, "net") for name in variables] + [("NCCL_IB_HCA", "infiniband")]
    for variable, kind in kinds:
        value = os.environ.get(variable, "")
        if not value or value.startswith("^"):  # a list of devices to leave out
            continue
        try:
            devices = sorted(entry.name for entry in (root / kind).iterdir())
        except OSError:
            devices = []
        is_exact = value.startswith("=") or variable == "GLOO_SOCKET_IFNAME"
        for word in value.lstrip("=").split(","):
            name = word.partition(":")[0]
            if not any(one == name or (not is_exact and one.startswith(name)) for one in devices):
                faults.append(
                    f"{variable}={value}: there is no device {name} (there are: {', '.join(devices) or 'none'})"
                )
    return faults


def host_address() -> str:
    """Return the address of this node's name, which gloo uses without GLOO_SOCKET_IFNAME, or an empty string."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def storage(save: str | None) -> dict[str, Any] | None:
    """Write and delete a file in the folder of checkpoints.

    Returns:
        Free bytes and the speed of writing in bytes/s, or an error; None without a folder.
    """
    if save is None:
        return None
    folder = Path(save)
    probe = folder / f".preflight-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < 2 * PROBE_BYTES:
            return {"error": f"{folder} has {free / 2**20:.0f} MiB left"}
        block = os.urandom(1 << 20)  # file systems compress zeros
        started = time.perf_counter()
        with probe.open("wb") as stream:
            for _ in range(PROBE_BYTES >> 20):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        return {"free": free, "speed": PROBE_BYTES / (time.perf_counter() - started)}
    except OSError as error:
        return {"error": f"{folder} cannot be written: {error.strerror}"}
    finally:
        probe.unlink(missing_ok=True)


def data_files(args: Namespace) -> dict[str, int | str]:
    """Return the size in bytes of each file of data sets and tokenizer, or why this rank cannot read it."""
    files = [Path(path) for prefix in _prefixes(args) for path in _files_of(prefix, args)]
    for name in TOKENIZER_FLAGS:
        # What is no path may be the name of a tokenizer on a hub.
        path = Path(getattr(args, name, None) or "")
        if path.is_absolute() or path.is_file() or (path.is_dir() and path != Path()):
            files.append(path)
    return {str(file): _size(file) for file in files}


def _files_of(prefix: str, args: Namespace) -> list[str]:
    """Return the files of an indexed data set, or with --sft those of prepared conversations, or jsonl files.

    Data behind an address (s3://) are no files.
    """
    if "://" in prefix:
        return []
    indexed = [prefix + suffix for suffix in (".bin", ".idx")]
    if not getattr(args, "sft", False):
        return indexed
    masks = [prefix + LOSS_MASK + suffix for suffix in (".bin", ".idx")]
    if Path(f"{prefix}.idx").is_file():
        return [*indexed, *masks, f"{prefix}.json"]
    return sorted(glob.glob(prefix)) or [prefix]


def _size(path: Path) -> int | str:
    """Return the size of a file, or of all files in a folder, or why it cannot be read."""
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        with path.open("rb") as stream:
            stream.read(1)
        return path.stat().st_size
    except OSError as error:
        return error.strerror or str(error)


def _prefixes(args: Namespace) -> list[str]:
    """Return the prefixes of the data sets that the flags name, as upstream reads them: weights are left out.

    Flags that name files with prefixes were read when they were validated.
    """
    blends: list[list[str] | None] = [
        getattr(args, name, None) for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    ]
    if getattr(args, "data_args_path", None):
        blends.append(Path(args.data_args_path).read_text().split())
    if getattr(args, "per_split_data_args_path", None):
        parts = json.loads(Path(args.per_split_data_args_path).read_text())
        # A part is a list, or one text as on a command line.
        blends += [
            part.split() if isinstance(part, str) else part for part in map(parts.get, ("train", "valid", "test"))
        ]
    return sorted({prefix for words in blends if words for prefix in get_blend_from_list(words)[0]})
