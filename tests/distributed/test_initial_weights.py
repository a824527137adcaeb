"""Compare the weights that are drawn without a checkpoint on one rank and on several."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch

from tests.distributed.flags import MOE, PP2, TINY, TP2, VPP, flags
from tests.distributed.probes import Notes, run_probed
from tests.pool import RankPool
from tests.regression.planted import wrapped

CP2 = "--context-parallel-size 2"


Weights = dict[str, tuple[numpy.ndarray, bool]]  # name -> weight, whether tensor-parallel ranks hold parts of it


@contextmanager
def drawn(notes: Notes) -> Iterator[None]:
    """Record the parameters before the first step, and skip the training."""
    from megatron.training import training

    def train(original: Any, forward_step: Any, model: list[torch.nn.Module], *rest: Any, **named: Any) -> Any:
        parameters = model[0].named_parameters()
        notes.append({n: (p.detach().numpy(), getattr(p, "tensor_model_parallel", False)) for n, p in parameters})
        return 0, 0

    with wrapped(training, "train", train):
        yield


@contextmanager
def gathered(notes: Notes) -> Iterator[None]:
    """Record the whole parameters before the first step, by name, and skip the training."""
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    def train(original: Any, forward_step: Any, model: list[torch.nn.Module], *rest: Any, **named: Any) -> Any:
        for chunk in unwrap_model(model):
            state = chunk.state_dict()
            notes.append({name: value.float().numpy() for name, value in state.items() if torch.is_tensor(value)})
        return 0, 0

    with wrapped(training, "train", train):
        yield


@pytest.fixture(scope="module")
def weights(ranks: RankPool) -> Callable[[int, str], list[Weights]]:
    """Return a function that draws the weights of a layout and returns every rank's."""

    @functools.cache
    def draw(world: int, own: str) -> list[Weights]:
        base = flags(TINY, MOE, own, "--position-embedding-type learned_absolute --train-iters 1")
        found = run_probed(ranks, "O", world, base, "tests.distributed.test_initial_weights:drawn")
        return [notes[0] for notes in found]

    return draw


QUICK = (CP2, f"{TP2} --sequence-parallel")
SLOW = ("", TP2, "--expert-model-parallel-size 2", "--micro-batch-size 2", f"{CP2} --seq1f1b-splits 2")


@pytest.mark.parametrize("own", [*QUICK, *(pytest.param(own, marks=pytest.mark.slow) for own in SLOW)])
def test_initial_weights_are_those_of_one_rank(weights: Callable[[int, str], list[Weights]], own: str) -> None:
    """Exclude tensor-parallel weights and distributed experts, which upstream draws per rank on any device."""
    (one,) = weights(1, "")
    for mine in weights(2, own):
        compared = [
            name
            for name, (_, is_cut) in mine.items()
            if not (is_cut and "tensor" in own) and not ("expert-model" in own and "experts" in name)
        ]
        assert sum("router.weight" in name for name in compared) == 4
        assert [name for name in compared if not numpy.array_equal(mine[name][0], one[name][0])] == []


@pytest.mark.slow
def test_initial_weights_of_the_first_stage_are_those_of_one_rank(weights: Callable[[int, str], list[Weights]]) -> None:
    """Upstream uses a new seed for every other stage, on any device."""
    (one,), (first, second) = weights(1, ""), weights(2, PP2)
    assert all(numpy.array_equal(array, one[name][0]) for name, (array, _) in first.items())
    router = "module.decoder.layers.0.mlp.router.weight"
    assert not numpy.array_equal(second[router][0], one["module.decoder.layers.2.mlp.router.weight"][0])


PAIRS = "--paro-group-size 2"
GROUPED = f"--paro GGG {PAIRS}"
# flags of both runs, those of ours, ranks of upstream's run and of ours, tensor-parallel ranks
SHARDED = {
    "GGG, tied, bf16": ("--tied --bf16", GROUPED, 1, 2, 1),
    "GGG, TP 2": (f"{TP2} --sequence-parallel", GROUPED, 2, 4, 2),
    "III, PP 2": (PP2, f"--paro III {PAIRS}", 2, 4, 1),
    "GGG, PP 2, V 2": (f"{PP2} {VPP}", GROUPED, 2, 4, 1),
    "IIG, experts": (MOE, f"--paro IIG {PAIRS}", 1, 2, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED)
def test_sharded_weights_are_those_of_an_unsharded_start(ranks: RankPool, case: str) -> None:
    """Shards are cut from every layer as soon as it is built."""
    model, own, theirs, ours, inner = SHARDED[case]
    tiny = [flag for flag in flags(TINY) if not ("--tied" in model and flag.startswith("--untie"))]
    base = [*tiny, *flags(model.replace("--tied", ""), "--train-iters 1")]
    probe = "tests.distributed.test_initial_weights:gathered"
    upstream = run_probed(ranks, "U", theirs, base, probe, float64=False)
    sharded = run_probed(ranks, "O", ours, [*base, *flags(own)], probe, float64=False)
    for rank, chunks in enumerate(sharded):
        stage = rank // (ours // theirs * inner)
        expected = upstream[stage * inner + rank % inner]
        assert len(chunks) == len(expected) and all(len(chunk) > 2 for chunk in chunks)
        for chunk, other in zip(chunks, expected, strict=True):
            assert chunk.keys() == other.keys()
            assert [name for name, array in chunk.items() if not numpy.array_equal(array, other[name])] == []
