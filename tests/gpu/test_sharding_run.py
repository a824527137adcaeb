"""Training under --paro on GPUs: memory of buckets comes and goes between streams, and losses stay upstream's."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--num-layers 8 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16 --swiglu --seq-length 2048 "
    "--max-position-embeddings 2048 --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--hidden-dropout 0 --attention-dropout 0 --micro-batch-size 1 --train-iters 12 --lr 1e-3 --min-lr 1e-4 "
    "--clip-grad 1.0 --seed 1 --bf16 --mock-data --tokenizer-type NullTokenizer --vocab-size 4096 --eval-iters 0 "
    "--eval-interval 1000 --log-interval 1 --num-workers 0 --transformer-impl local --no-rope-fusion "
    "--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --overlap-grad-reduce "
    "--overlap-param-gather"
)
LOSS = re.compile(r"iteration +(\d+)/.*?elapsed time per iteration \(ms\): ([\d.]+).*?lm loss: ([\d.E+-]+)")


def trained(folder: Path, *more: str) -> tuple[list[float], float]:
    """Return the losses of a run on all GPUs, and milliseconds of its fastest step."""
    ranks = torch.cuda.device_count()
    command = ["bash", "scripts/launch.sh", "--local", "--nproc", str(ranks), "--run-dir", str(folder), "--"]
    command += ["examples/pretrain_gpt.py", *FLAGS.split(), "--global-batch-size", str(4 * ranks), *more]
    environment = {**os.environ, "VENV": sys.prefix}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    steps = LOSS.findall(output)
    assert len(steps) == 12, output[-3000:]
    return [float(loss) for _, _, loss in steps], min(float(ms) for _, ms, _ in steps)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], float]:
    return trained(tmp_path_factory.mktemp("upstream"), "--use-distributed-optimizer")


@pytest.mark.parametrize("more", ["NNG", "NIG", "NIG --grad-reduce-in-bf16", "IIG", "GGG"])
def test_losses_are_upstreams(
    more: str, upstream: tuple[list[float], float], tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """With one GPU nothing is sent, but buffers, gathers and releases are those of many GPUs."""
    size = 2 if torch.cuda.device_count() % 2 == 0 else 1
    losses, best = trained(tmp_path, "--paro", *more.split(), "--paro-group-size", str(size))
    theirs, their_best = upstream
    assert all(abs(mine / yours - 1) < 1e-2 for mine, yours in zip(losses, theirs, strict=True)), (losses, theirs)
    assert losses[-1] < losses[0]
    where = f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    tell(f"{where}: --paro {more}: a step takes {best / their_best:.3f} of upstream's distributed optimizer")


@pytest.mark.skipif(torch.cuda.device_count() % 4 != 0, reason="needs four CUDA devices, or a multiple of them")
def test_first_collectives_beside_receives_that_are_posted_early(
    upstream: tuple[list[float], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL makes a communicator at its first collective, in a backward, while receives of the pipeline wait.

    All streams share one queue, in which nothing may wait for what is behind it. The job hangs if something does.
    """
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    pipeline = ("--pipeline-model-parallel-size", "2", "--seq1f1b-splits", "2")
    losses, _ = trained(tmp_path, "--paro", "NIG", "--paro-group-size", "2", *pipeline)
    theirs, _ = upstream
    assert all(abs(mine / yours - 1) < 2e-2 for mine, yours in zip(losses, theirs, strict=True)), (losses, theirs)
