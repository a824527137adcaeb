"""Write the last operations of NCCL, as torch's watchdog does when a collective times out.

The stall monitor ends a process before that time, so it writes them itself. `torchfrtrace` compares the files of ranks.
"""

from collections.abc import Mapping
from pathlib import Path

WANTED = "TORCH_NCCL_DUMP_ON_TIMEOUT"
PREFIXES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # torch's own, to which it appends the rank
NAME = "nccl_trace_rank_"


def record_file(environment: Mapping[str, str], folder: str | None, rank: int) -> Path | None:
    """Return the file of a rank, or None if the environment does not ask torch to write one.

    Args:
        environment: of the process.
        folder: for files whose place the environment does not give; None: they are not written.
        rank: global rank.
    """
    if environment.get(WANTED, "").lower() not in ("1", "t", "true", "y", "yes"):
        return None
    prefix = next((environment[name] for name in PREFIXES if environment.get(name)), None)
    if prefix is None and folder is None:
        return None
    return Path(f"{prefix or f'{folder}/{NAME}'}{rank}")


def write_record(file: Path) -> str:
    """Write the operations of this rank, and return a line for the log.

    Raises:
        OSError: the file cannot be written.
    """
    from torch._C._distributed_c10d import _dump_nccl_trace  # builds for CUDA have it

    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_dump_nccl_trace())
    return f"its last NCCL operations are in {file} (torchfrtrace)"
