"""Short trainings on one rank, through upstream's `pretrain`: losses, norms, seconds and peak memory of upstream's (U)
and of ours (O), each in a process of its own.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tests.pool import RankFailure, RankPool
from tests.regression.arm import Arm, patched
from tests.regression.record import exact_norm

# Upstream alone on a GPU, without TransformerEngine and apex, and without a compiler for fused functions; the cpu
# system sets most of it by itself on a CPU.
GPU = (
    "--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion "
    "--no-persist-layer-norm --no-bias-swiglu-fusion --no-bias-dropout-fusion"
)
MODEL = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear --group-query-attention "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 --micro-batch-size 1 "
    "--weight-decay 0.1 --mock-data --tokenizer-type NullTokenizer --split 90,5,5 --eval-iters 0 --eval-interval 1000 "
    "--make-vocab-size-divisible-by 64 --log-interval 1000 --save-interval 1000 --num-workers 0 --seed 1 "
    "--no-create-attention-mask-in-dataloader"
)
LOGS = "LONGSEQ_GPU_LOGS"  # environment: the folder under which ranks write what they print
RECOMPUTE = {
    "none": "",
    "selective": "--recompute-granularity selective --recompute-modules core_attn mlp",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}


@dataclass
class RunResult:
    """What one short training did.

    Attributes:
        losses, norms: one per step, at full precision.
        seconds: of every step, after the device had finished it.
        peak_bytes: most memory of the device's allocator; of the process on a CPU.
        floor_bytes: what is held after the first step: weights, gradients, optimizer states.
        patches: ids of what was applied.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    floor_bytes: int = 0
    patches: list[str] = field(default_factory=list)


class OutOfMemory(RuntimeError):
    """The device's memory did not suffice."""


class Bench:
    """Ranks forked from one process that has imported torch and Megatron, but never touched a device.

    Args:
        job: what a rank does, with the arguments and the result of `train_on_this_rank`, which is the default.
    """

    def __init__(self, job: Callable[[Arm, list[str], bool], "RunResult"] | None = None) -> None:
        self.job = job or train_on_this_rank
        self.pool = RankPool(Path(mkdtemp(prefix="ranks-", dir=os.environ.get(LOGS))))

    def train(self, arm: Arm, *flags: str, float64: bool = False, ranks: int = 1, timeout: float = 300.0) -> RunResult:
        """Train with upstream's flags and ours; return what the last pipeline stage saw.

        Raises:
            OutOfMemory: out of memory.
            RankFailure: anything else went wrong, or took longer than `timeout` seconds.
        """
        words = [word for text in (GPU, MODEL, *flags) for word in text.split()]
        try:
            found: list[RunResult] = self.pool.run(ranks, self.job, arm, words, float64, timeout=timeout)
        except RankFailure as error:
            if "OutOfMemoryError" in str(error) or "out of memory" in str(error):
                raise OutOfMemory(str(error)[-400:]) from None
            raise
        return found[-1]


def train_on_this_rank(arm: Arm, flags: list[str], float64: bool) -> RunResult:
    """Run in a rank of the pool."""
    sys.argv = ["pretrain_gpt.py", *flags]
    trained = RunResult()
    with ExitStack() as stack:
        stack.enter_context(patched(arm))
        if float64:
            from tests.regression.float64 import double_precision

            stack.enter_context(double_precision())
        from megatron.training import training

        from megatron.longseq.pretrain_gpt import main
        from patches.engine.session import SESSION

        training.train_step = _noting(training.train_step, trained)
        main()
        trained.patches = sorted(SESSION.hashes)
        trained.peak_bytes = int(torch.cuda.max_memory_allocated())
    return trained


def _noting(train_step: Any, trained: RunResult) -> Any:
    def noted(forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, *rest: Any, **named: Any) -> Any:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with exact_norm(optimizer) as norm:
            result = train_step(forward_step, data_iterator, model, optimizer, *rest, **named)
        torch.cuda.synchronize()
        trained.seconds.append(time.perf_counter() - begin)
        loss = result[0].get("lm loss")
        trained.losses.append(float("nan") if loss is None else float(loss))
        trained.norms.append(float("nan") if norm[0] is None else norm[0])
        trained.floor_bytes = trained.floor_bytes or int(torch.cuda.memory_allocated())
        return result

    return noted
