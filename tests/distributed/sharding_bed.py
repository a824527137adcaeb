"""Train with a sharding strategy through `pretrain`, and record in every step what a rank sends and holds."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.longseq.sharding.plan.collectives import Scope
from megatron.longseq.sharding.plan.comm_volume import CommVolume
from megatron.longseq.sharding.plan.memory import Widths
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from tests.bucket_volume import Bucket, describe_buckets
from tests.distributed.flags import PP2, TP2, flags
from tests.pool import RankPool
from tests.regression.arm import _early_end
from tests.regression.planted import wrapped

MODEL = """
--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --swiglu --normalization RMSNorm
--position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0
--attention-dropout 0 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --lr 1e-3
--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64 --mock-data --split 90,5,5
--lr-decay-samples 100 --eval-iters 0 --eval-interval 1000 --log-interval 1000 --num-workers 0 --seed 1
"""
STEPS = (1, 1, 4, 4)  # micro-batches of each: a batch grows in a run
TOKENS = 16  # of a sample

ASYNC = "--overlap-grad-reduce --overlap-param-gather"
RUNNING = ["NNN", "NNI", "NNG", "NII", "NIG", "III", "IIG", "IGG", "NGG", "GGG"]
PAIRS = "--paro-group-size 2 --paro-links 100 1"  # overlapped collectives are taken, whatever links there are
SERIAL = "--paro-group-size 2 --paro-collectives hierarchical"
FLAT = "--paro-collectives flat"
PART = r"--train-only layers\.1\.mlp"  # nothing below, no backward
HALF = "--bf16 --grad-reduce-in-bf16"
BUCKETS = "--ddp-bucket-size 8000"  # several, where layers are no buckets of their own

# Every letter in every place, and every kind of collective; the formulas have one term for each state of a letter.
QUICK = ("IIG",)
CASES = {
    **{name: f"{PAIRS} {ASYNC}" for name in QUICK},
    "GGG, flat": FLAT,
    "IIG, selective": f"{PAIRS} {ASYNC} --paro-selective-overlap",
    "NIG, bf16 on the wire": f"{PAIRS} {ASYNC} {HALF}",
    "ING": f"{PAIRS} {ASYNC} {PART}",
}
# All triplets with overlapped collectives; for everything else, each letter in each place.
LETTERS = ("NNI", "NIG", "III", "IGG", "GGG")
MORE = {
    **{name: f"{PAIRS} {ASYNC}" for name in RUNNING if name not in QUICK},
    **{f"{name}, flat": FLAT for name in ("NNN", "NNG", "NGG")},
    "ING, serial": f"{SERIAL} {PART}",
    "ING, bf16": f"{PAIRS} {PART} --bf16",
    **{f"{name}, serial": SERIAL for name in (*LETTERS, "NNN")},
    **{f"{name}, bf16 on the wire": f"{PAIRS} {HALF}" for name in (*LETTERS, "NNN") if name != "NIG"},
    **{f"{name}, bf16": f"{PAIRS} {ASYNC} --bf16" for name in (*LETTERS, "NNN")},
    **{f"{name}, flat, overlap": f"{FLAT} {ASYNC}" for name in ("NNN", "NGG", "GGG")},
    **{f"{name}, TP 2": f"{PAIRS} {ASYNC} {TP2}" for name in LETTERS},
    **{f"{name}, PP 2": f"--paro-group-size 1 --paro-links 100 1 {ASYNC} {PP2}" for name in LETTERS},
}


@dataclass
class StorageBytes:
    """Bytes of storages on a rank between two steps."""

    params: int = 0
    grads: int = 0
    optimizer: int = 0
    whole: int = 0  # of buckets of states that are held in parts


@dataclass
class RankRecord:
    """What one rank recorded.

    Attributes:
        member: this rank, as the data-parallel group numbers it.
        widths: bytes of an element.
        buckets: of the model.
        numel: elements of trained parameters, without padding.
        all: elements of all parameters.
        microbatches: of every step.
        sent: until the end of every step.
        held: after every step.
        units: the most units whose sharded parameters were whole at once, in any step.
        gradients: the same, of buckets of sharded gradients.
        allocations: buffers that the pool has allocated until the end of every step.
    """

    member: int = 0
    widths: Widths = field(default_factory=Widths)
    buckets: list[Bucket] = field(default_factory=list)
    numel: int = 0
    all: int = 0
    microbatches: list[int] = field(default_factory=list)
    sent: list[CommVolume] = field(default_factory=list)
    storages: list[StorageBytes] = field(default_factory=list)
    units: int = 0
    gradients: int = 0
    allocations: list[int] = field(default_factory=list)


def train(pool: RankPool, case: str, planted: str | None = None) -> list[RankRecord]:
    """Train one of the cases on four ranks, `planted` being `module:function` of an error; return what each noted."""
    samples = groups_of(case).ranks  # of a step with one micro-batch
    words = flags(MODEL, BUCKETS, f"--train-samples {sum(STEPS) * samples} --paro {case[:3]}", (CASES | MORE)[case])
    begins = [sum(STEPS[:step]) * samples * TOKENS for step in range(len(STEPS))]
    sizes = (f"{begin}:{count * samples}" for begin, count in zip(begins, STEPS, strict=True))
    words += ["--step-batch-size-schedule", " ".join(sizes)]
    return pool.run(4, train_on_this_rank, words, planted)


def groups_of(case: str) -> RankGroups:
    """Return the data-parallel ranks of a case."""
    own = (CASES | MORE)[case].split()
    ranks = 2 if "2" in case else 4
    return RankGroups(ranks, int(own[own.index("--paro-group-size") + 1]) if "--paro-group-size" in own else ranks)


def train_on_this_rank(words: list[str], planted: str | None = None) -> RankRecord:
    """Runs in a rank of the pool."""
    import patches

    sys.argv = ["pretrain_gpt.py", *words]
    patches.start()
    from megatron.training import training

    from megatron.longseq.pretrain_gpt import main

    seen = RankRecord()
    with ExitStack() as stack:
        if planted:
            module, name = planted.split(":")
            stack.enter_context(getattr(importlib.import_module(module), name)())
        stack.enter_context(wrapped(training, "train_step", _noting(seen)))
        with _early_end():
            main()
    return seen


def _noting(seen: RankRecord) -> Callable[..., Any]:
    def step(original: Any, forward_step: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **named: Any) -> Any:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        seen.microbatches.append(get_num_microbatches())
        with _watching(seen, model):
            result = original(forward_step, data, model, optimizer, *rest, **named)
        for chunk in model:
            for group in chunk.bucket_groups:
                if group.store.syncing is not None:
                    group.store.syncing.wait()
        seen.sent.append(_traffic(model[0].sharding))
        seen.allocations.append(model[0].sharding.buffers.allocations)
        if not seen.buckets:
            _introduce(seen, model)
        seen.storages.append(_storages(model, optimizer))
        return result

    return step


def _introduce(seen: RankRecord, model: list[Any]) -> None:
    from megatron.training import get_args

    from megatron.longseq.sharding.plan.from_args import widths

    seen.member = model[0].sharding.member
    seen.widths = widths(get_args())
    seen.buckets = [bucket for chunk in model for bucket in describe_buckets(chunk)]
    seen.numel = sum(param.numel() for chunk in model for param in chunk.parameters() if param.requires_grad)
    seen.all = sum(param.numel() for chunk in model for param in chunk.parameters())


def _traffic(sharding: Any) -> CommVolume:
    sent = sharding.sent
    each = [sent[scope].bytes for scope in (Scope.INSIDE, Scope.BETWEEN, Scope.FLAT)]
    return CommVolume(*each, sum(scope.messages for scope in sent.values()))


def stores_of(chunk: Any) -> list[Any]:
    """Return where a chunk's parameters lie, frozen ones too."""
    return [group.store for group in chunk.bucket_groups] + (
        chunk._unit_stores() if chunk.gather_hooks is not None else []
    )


def _storages(model: list[Any], optimizer: Any) -> StorageBytes:
    """Sum the sizes of storages, each counted once."""
    storages, known = StorageBytes(), set()

    def count(kind: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            setattr(storages, kind, getattr(storages, kind) + storage.nbytes())

    for chunk in model:
        for store in stores_of(chunk):
            count("params", store.shard)
            count("whole", store.full.flat)
        for group in chunk.bucket_groups:
            count("grads", group.grads.shard)
            count("whole", group.grads.full.flat)
            for param in group.params:
                count("whole", param.data)
                count("whole", param.main_grad)
    for one in optimizer.chained_optimizers:
        for mains in (*one.shard_fp32_from_float16_groups, *one.shard_fp32_groups):
            for main in mains:
                count("optimizer", main)
                count("optimizer", main.grad if main.grad is not None else main)
        for state in one.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.numel() > 1:
                    count("optimizer", value)
    return storages


@contextmanager
def _watching(seen: RankRecord, model: list[Any]) -> Iterator[None]:
    """Record how many units and buckets are unsharded at the same time."""
    from megatron.longseq.sharding.runtime.bucket_storage import FullBucket

    kinds: dict[int, tuple[str, str]] = {}
    wholes: dict[int, FullBucket] = {}
    for chunk in model:
        units = [] if chunk.gather_hooks is None else chunk.gather_hooks.units
        stores = [("units", unit.name, store) for unit in units for store in unit.stores]
        stores += [("gradients", group.label, group.grads) for group in chunk.bucket_groups if group.grads.level]
        for kind, name, store in stores:
            kinds[id(store.full)], wholes[id(store.full)] = (kind, name), store.full

    def look() -> None:
        for kind in ("units", "gradients"):
            there = {kinds[key] for key, whole in wholes.items() if whole.is_allocated and kinds[key][0] == kind}
            setattr(seen, kind, max(getattr(seen, kind), len(there)))

    def allocate(original: Any, self: Any, **named: Any) -> None:
        original(self, **named)
        look()

    with wrapped(FullBucket, "allocate", allocate) if wholes else nullcontext():
        yield
