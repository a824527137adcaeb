"""What a rank allocates while a model is built, saved and loaded: its own shard and a few units, whatever the model."""

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from tests.allocated import Allocated, AllocationCounter
from tests.distributed.flags import flags
from tests.pool import RankPool
from tests.regression.arm import _early_end, _write_results_in_this_process
from tests.regression.planted import wrapped

HIDDEN = 64
MODEL = f"""
--hidden-size {HIDDEN} --num-attention-heads 4 --ffn-hidden-size {4 * HIDDEN} --swiglu --normalization RMSNorm
--position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0
--attention-dropout 0 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3
--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64 --mock-data --split 90,5,5
--train-iters 1 --eval-iters 0 --eval-interval 1000 --log-interval 1000 --save-interval 1 --num-workers 0 --seed 1
--ddp-bucket-size 1
"""
LAYERS = (8, 24)
UNITS = 8


@dataclass
class Seen:
    """What one rank recorded.

    Attributes:
        shard: bytes of what this rank saves: its shards of parameters, main parameters and moments.
        whole: bytes of all parameters of the model.
        unit: bytes of the parameters of the largest unit.
        build, save, load: what each phase allocated.
    """

    shard: int = 0
    whole: int = 0
    unit: int = 0
    build: Allocated | None = None
    save: Allocated | None = None
    load: Allocated | None = None


def measure_on_this_rank(words: list[str]) -> Seen:
    """Train a step, save, and load what was saved; count what each allocates. Runs in a rank of the pool."""
    import patches

    sys.argv = ["pretrain_gpt.py", *words]
    patches.start()
    from megatron.training import get_args, training

    from megatron.longseq.pretrain_gpt import main

    seen, counter = Seen(), AllocationCounter()

    def build(original: Any, *args: Any, **named: Any) -> Any:
        counter.start()
        return original(*args, **named)

    def built(original: Any, *args: Any, **named: Any) -> Any:
        optimizer = original(*args, **named)
        seen.build = counter.stop()
        return optimizer

    def save(
        original: Any, iteration: int, model: Any, optimizer: Any, scheduler: Any, *rest: Any, **named: Any
    ) -> Any:
        _note_sizes(seen, model, optimizer)
        counter.start()
        original(iteration, model, optimizer, scheduler, *rest, **named)
        seen.save = counter.stop()
        get_args().load = get_args().save
        counter.start()
        training.load_checkpoint(model, optimizer, scheduler)
        seen.load = counter.stop()

    with ExitStack() as stack:
        stack.enter_context(_write_results_in_this_process())
        for name, act in (
            ("setup_model_and_optimizer", build),
            ("get_megatron_optimizer", built),
            ("save_checkpoint_and_time", save),
        ):
            stack.enter_context(wrapped(training, name, act))
        with _early_end():
            main()
    return seen


def _note_sizes(seen: Seen, model: Any, optimizer: Any) -> None:
    """Note the sizes of the rank's states. In float32, main parameters are views of parameters, and saved as well."""
    from tests.distributed.sharding_bed import _storages

    storages = _storages(model, optimizer)
    groups = [group for chunk in model for group in chunk.bucket_groups]
    widths = {param.element_size() for group in groups for param in group.params}
    seen.shard = storages.params * (2 if widths == {4} else 1) + storages.optimizer
    seen.whole = sum(param.nbytes for group in groups for param in group.params)
    seen.unit = max(sum(param.nbytes for param in group.params) for group in groups)


Measure = Callable[[str, int], list[Seen]]


@pytest.fixture(scope="module")
def seen(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Return a function that measures (once) a model of so many layers on every rank."""

    @functools.cache
    def run(case: str, layers: int) -> list[Seen]:
        world, own = CASES[case]
        base = flags(MODEL, own, f"--num-layers {layers}")
        return ranks.run(world, measure_on_this_rank, [*base, "--save", str(tmp_path_factory.mktemp("saved"))])

    return run


CASES = {
    "GGG": (2, "--paro GGG --paro-group-size 2"),
    "IIG, overlap": (4, "--paro IIG --paro-group-size 2 --overlap-grad-reduce --overlap-param-gather"),
    "III, bf16": (4, "--paro III --paro-group-size 2 --bf16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_rank_holds_the_model_while_it_is_built(seen: Measure, tell: Callable[[str], None], case: str) -> None:
    for layers in LAYERS:
        ranks = seen(case, layers)
        above = max(rank.build.peak - rank.build.left for rank in ranks if rank.build)
        rank = ranks[0]
        tell(
            f"{case}, {layers} layers: while the model is built, a rank has at most {above} bytes more than afterwards;"
            f" a unit has {rank.unit}, all parameters {rank.whole}"
        )
        assert above <= UNITS * rank.unit
    assert rank.whole > 2 * UNITS * rank.unit


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_saving_and_loading_take_a_shard_and_a_few_units(seen: Measure, tell: Callable[[str], None], case: str) -> None:
    for layers in LAYERS:
        for rank in seen(case, layers):
            assert rank.save is not None and rank.load is not None
            most = rank.shard + UNITS * rank.unit
            assert rank.save.peak <= most and rank.load.peak <= most
        tell(
            f"{case}, {layers} layers: saving takes at most {rank.save.peak} bytes, loading {rank.load.peak}; the "
            f"rank's shard has {rank.shard}, a unit {rank.unit}, all parameters {rank.whole}"
        )
