"""Scripts of examples: what a paper's launch composes, what upstream's validation makes of it, and runs on a laptop."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.scripts.fakes import ROOT


def paper(system: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a system's script outside of any launcher."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    return subprocess.run(
        ["bash", str(ROOT / "examples" / system / "paper.sh"), *words],
        env={**environment, "VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def composed(system: str, *words: str) -> list[str]:
    """Return the command line that a system's script composes."""
    done = paper(system, *words)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout, comments=True)


def script_flags(words: list[str]) -> list[str]:
    """Return what such a command line gives to the training script."""
    return words[next(at for at, word in enumerate(words) if word.endswith("examples/pretrain_gpt.py")) + 1 :]


def validated_args(flags: list[str], world: int) -> Any:
    """Parse and validate flags as on the first rank of a job of that size; no process group is made.

    Runs on a rank, where the ledger is open (`patches.start`).
    """
    import torch
    from megatron.training import arguments

    os.environ["WORLD_SIZE"] = str(world)

    sys.argv = ["pretrain_gpt.py", *flags]
    args = arguments.parse_args()  # applies the records that these flags ask for, of validate_args, too
    args = arguments.validate_args(args)
    assert not torch.distributed.is_initialized()
    return args


def example(system: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a system's laptop script on the CPU, its runs in a folder."""
    return subprocess.run(
        ["bash", f"examples/{system}/run.sh", "--run-dir", str(folder), *words],
        cwd=ROOT,
        env={**os.environ, "VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
