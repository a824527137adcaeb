"""The floor on a GPU: the cpu system stays out, the quickstart trains, resumes and tells its figures."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples import loss_curve
from patches.engine import session
from tests import ledgers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROOT = Path(__file__).resolve().parents[2]


def test_cpu_records_are_not_wanted_where_cuda_is_available() -> None:
    assert not session.select(ledgers.of_systems("cpu"), None)


def test_quickstart_on_the_gpus(tmp_path: Path, tell: Callable[[str], None]) -> None:
    command = ["bash", "scripts/quickstart.sh", "--run-dir", str(tmp_path), "--steps", "40"]
    environment = {**os.environ, "VENV": sys.prefix}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    curve = loss_curve.read(tmp_path / "tensorboard").train
    assert len(curve) == 40 and curve[-1][1] < curve[0][1] - 1
    arguments = json.loads((tmp_path / "arguments.json").read_text())
    assert arguments["distributed_backend"] == "nccl"
    assert not [name for name in arguments["longseq_patches"] if name.startswith("cpu.")]
    speeds = re.findall(r"tokens/s/GPU: ([\d.]+)", (tmp_path / "log.txt").read_text())
    tell(f"{torch.cuda.get_device_name()}: quickstart model {max(map(float, speeds)):.0f} tokens/s/GPU")
