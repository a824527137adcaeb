"""The chunked cross entropy equals upstream's own run step for step, through `pretrain`, whatever it is combined with.

The reference is arm U: the wheel with the cpu and local patches alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.equality import Equal
from tests.distributed.flags import DOCUMENTS, FULL, OVERLAP, PP2, SHALLOW, TIED, TINY, TP2, VPP, flags
from tests.distributed.probes import Notes, run_probed
from tests.pool import RankPool
from tests.regression.planted import wrapped

CHUNKS = "--cross-entropy-chunk-tokens"
SP = f"{TP2} --sequence-parallel"
CP2 = "--context-parallel-size 2"
RAGGED = "tests.distributed.script_variants:ragged_mask"

# name: (ranks, model flags of both arms, flags of arm O, what the script does differently)
CASES = {
    "one rank": (1, "", f"{CHUNKS} 7", RAGGED),
    "one token": (1, "", f"{CHUNKS} 1", None),
    "TP 2, sequence parallel": (2, "--micro-batch-size 2", f"{SP} {CHUNKS} 25", RAGGED),
    "TP 2": (2, TIED, f"{TP2} {CHUNKS} 25", RAGGED),
    "tied under PP 2, sequence parallel, segments, per-token loss": (
        4,
        f"{TIED} {SHALLOW} --calculate-per-token-loss",
        f"{PP2} {SP} --seq1f1b-splits 3 {CHUNKS} 7",
        RAGGED,
    ),
    "PP 2, V 2, full recompute": (2, "", f"{PP2} {VPP} {FULL} {CHUNKS} 30", None),
    "zero bubble, segments": (2, "", f"{PP2} --zero-bubble --seq1f1b-splits 2 {CHUNKS} 7", RAGGED),
    "zero bubble, tied": (2, TIED, f"{PP2} --zero-bubble {CHUNKS} 7", None),
    "context": (2, DOCUMENTS, f"{CP2} {CHUNKS} 9", RAGGED),
    "context, segments": (2, "", f"{CP2} --seq1f1b-splits 2 {CHUNKS} 9", RAGGED),
    "DP 2, distributed optimizer, overlap": (2, "", f"{OVERLAP} {CHUNKS} 9", RAGGED),
    "sharded parameters": (2, "", f"--paro GGG --overlap-grad-reduce --overlap-param-gather {CHUNKS} 9", None),
    "muP": (1, "--use-mup --mup-base-hidden-size 16", f"{CHUNKS} 9", None),
}
QUICK = {"context", "sharded parameters"}


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES])
def test_equals_upstream_in_float64(equal: Equal, case: str) -> None:
    world, model, own, variant = CASES[case]
    equal(f"chunked cross entropy, {case}", world, model, own, variant)


class _Widest(TorchDispatchMode):
    """Notes the most elements of a result as wide as the logits of a rank."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.elements = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == self.width:
            self.elements = max(self.elements, out.numel())
        return out


@contextmanager
def logits_of_a_step(notes: Notes) -> Iterator[None]:
    """Note the elements of the largest logits in the run's steps and evaluations, on this rank."""
    from megatron.training import training

    def counted(original: Callable[..., Any], *args: Any, **named: Any) -> Any:
        with _Widest(1024 // 2) as widest:
            result = original(*args, **named)
        notes.append(widest.elements)
        return result

    with wrapped(training, "train_step", counted), wrapped(training, "evaluate", counted):
        yield


def test_flag_bounds_the_logits(ranks: RankPool) -> None:
    """A rank's part of the output layer, 512 x 64, is smaller than the logits of 128 tokens."""
    run = flags(TINY, SP, "--vocab-size 1000 --make-vocab-size-divisible-by 512 --seq-length 128")
    run += flags("--max-position-embeddings 128 --train-iters 1 --eval-iters 1 --eval-interval 1 --global-batch-size 2")

    def largest(own: str) -> list[Notes]:
        probe = "tests.distributed.test_chunked_loss:logits_of_a_step"
        return run_probed(ranks, "O", 2, run + flags(own), probe)

    assert {max(notes) for notes in largest("")} == {512 * 128}
    chunked = largest(f"{CHUNKS} 16")
    assert all(len(notes) >= 2 and max(notes) <= 512 * 64 for notes in chunked), chunked
