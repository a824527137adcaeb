"""Data workers end with their run, even if something still has a reference to the data iterator."""

import atexit
import gc
import multiprocessing
import signal
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.flags import PP2, TINY, flags
from tests.pool import RankPool
from tests.regression.arm import _early_end, patched
from tests.regression.planted import wrapped

WORKERS = "--num-workers 2 --exit-signal-handler --train-iters 2 --eval-iters 1 --eval-interval 1 --global-batch-size 2"


def train_and_count(words: list[str]) -> tuple[int, int]:
    """Train in a rank without garbage collection; return how many data iterators and workers are left."""
    iterators: list[weakref.ref[Any]] = []

    def build(original: Any, *args: Any, **named: Any) -> Any:
        built = original(*args, **named)
        iterators.extend(weakref.ref(iterator) for iterator in built if iterator is not None)
        return built

    sys.argv = ["pretrain_gpt.py", *words]
    with patched("O"):
        from megatron.training import training

        from megatron.longseq.pretrain_gpt import main

        gc.disable()  # a circle of references stays until the collector runs, which at exit is too late
        with wrapped(training, "build_train_valid_test_data_iterators", build), _early_end():
            main()
    return sum(iterator() is not None for iterator in iterators), len(multiprocessing.active_children())


@pytest.mark.parametrize(
    ("ranks_wanted", "own"),
    [pytest.param(1, "--seq1f1b-splits 2", marks=pytest.mark.slow), (2, f"{PP2} --seq1f1b-splits 2 --zero-bubble")],
)
def test_nothing_holds_the_data_iterators_after_training(ranks: RankPool, ranks_wanted: int, own: str) -> None:
    left = ranks.run(ranks_wanted, train_and_count, flags(TINY, WORKERS, own))
    assert left == [(0, 0)] * ranks_wanted


def exit_with_kept_iterators(kind: str) -> int:
    """Exit a rank while its iterators are still referenced. Return how many workers are left."""
    from megatron.training import global_vars
    from megatron.training.dist_signal_handler import DistributedSignalHandler

    import patches

    dataset = [torch.arange(4) for _ in range(64)]
    with patches.applied("data.loader"):
        from megatron.core import mpu
        from megatron.training.datasets import data_samplers

        args = SimpleNamespace(
            dataloader_type=kind,
            micro_batch_size=1,
            global_batch_size=1,
            num_workers=2,
            exit_signal_handler=True,
            exit_signal=signal.SIGTERM,
            hybrid_context_parallel=False,
            data_sharding=False,
            full_validation=False,
        )
        global_vars._GLOBAL_ARGS = args
        mpu.get_data_parallel_rank = lambda: 0
        mpu.get_data_parallel_world_size = lambda: 1
        DistributedSignalHandler(signal.SIGTERM).__enter__()  # as upstream: before the workers are forked
        kept = [iter(data_samplers.build_pretraining_data_loader(dataset, 0)) for _ in range(2)]
        assert all(len(next(iterator)) == 1 for iterator in kept)
        assert len(multiprocessing.active_children()) == 4
        atexit._run_exitfuncs()
    return len(multiprocessing.active_children())


def test_kept_iterators_do_not_keep_their_workers(ranks: RankPool) -> None:
    assert ranks.run(1, exit_with_kept_iterators, "single") == [0]
