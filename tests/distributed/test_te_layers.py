"""Core attention of ours in TransformerEngine's layers, and its in local ones, through `pretrain` and in float64.

A stand-in computes what TransformerEngine would (`tests/standin`); upstream's classes around it are upstream's own. The
reference is upstream's run in local layers on one rank, which starts from the same weights.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.equality import SNAPSHOTS, Start, assert_equal, assert_steps_equal
from tests.distributed.flags import DOCUMENTS, EVALUATED, FULL, TINY, TP2, flags
from tests.distributed.test_context import CP2, HYBRID
from tests.regression.arm import Run
from tests.standin.runs import Training, train

TE = "--transformer-impl transformer_engine"
OURS, THEIRS = (f"--context-parallel-attention {name}" for name in ("longseq", "transformer_engine"))
# This format holds whatever a module's state_dict holds.
KEPT = "--save-interval 2 --ckpt-format torch"
SPEC = "--spec tests.standin.specs naming_te_attention"

SLOW = {
    "TE's attention in its layers, one rank": ("U", 1, "", TE),
    "Ulysses": ("O", 2, "", f"{TE} {CP2} {OURS} --cp-comm-type a2a"),
    "2 x 2, context-first": ("O", 4, "", f"{TE} {HYBRID} {OURS} --context-parallel-placement context-first"),
    "full recompute": ("O", 2, "", f"{TE} {CP2} {OURS} {FULL}"),
    "sliding window": ("O", 2, "--window-size 10,0", f"{TE} {CP2} {OURS}"),
    "sliding window, TE's attention": ("O", 2, "--window-size 10,0", f"{TE} {CP2}"),
    "documents": ("O", 2, DOCUMENTS, f"{TE} {CP2} {OURS}"),
    "documents, TP 2": ("O", 4, DOCUMENTS, f"{TE} {CP2} {OURS} {TP2}"),
    "documents, TP 2, sequence parallel": ("O", 4, DOCUMENTS, f"{TE} {CP2} {OURS} {TP2} --sequence-parallel {FULL}"),
    "documents in segments, TP 2, sequence parallel": (
        "O",
        4,
        DOCUMENTS,
        f"{TE} {CP2} {TP2} --sequence-parallel --seq1f1b-splits 2",
    ),
    "a spec of its own in segments": ("O", 2, "", f"{TE} {CP2} {SPEC} --seq1f1b-splits 2"),
}


@pytest.fixture(scope="module")
def runs(
    start: Start, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Run | str]:
    """Train once for the tests of this file; without --all leave out what only slow tests need."""
    folder = tmp_path_factory.mktemp("te")

    def training(base: list[str], own: str, keep: bool = False) -> Training:
        return Training("O", 2, base + flags(CP2, own), keep, () if "--ckpt-step" in base else SNAPSHOTS)

    # A seed checkpoint holds upstream's initial weights, but in another format than KEPT's.
    seed, initial = start(""), flags(TINY, EVALUATED, KEPT)
    saved = [*initial, "--ckpt-step", "2", "--load"]
    trainings = {
        "ours": training(initial, f"{TE} {OURS}", keep=True),
        "theirs": training(initial, TE, keep=True),
        "ours, from theirs": training([*saved, str(folder / "theirs")], f"{TE} {OURS}"),
        "ours in segments": training(seed, f"{TE} --seq1f1b-splits 2"),
        "a spec of its own": training(seed, f"{TE} {OURS} {SPEC}"),
    }
    if request.config.option.markexpr != "not slow":
        trainings["theirs, from ours"] = training([*saved, str(folder / "ours")], TE)
        trainings["theirs in local layers"] = training(seed, f"--transformer-impl local {THEIRS}")
    return train(trainings, folder)


def finished(run: Run | str) -> Run:
    assert isinstance(run, Run), run
    return run


def records(run: Run) -> set[str]:
    """Return the records of `usp` that were applied, but for what is applied to any choice."""
    return {name for name in run.header["patches"] if name.startswith("usp.")} - {"usp.arguments"}


# Of one rank: four layers, four micro-batches a step, three steps and three evaluations (one in between, two last).
FORWARDS = 4 * 4 * (3 + 3)
OURS_ANYWHERE = {"usp.batch", "usp.groups", "usp.loss", "usp.te-layers"}


def test_ours_in_te_layers(
    runs: dict[str, Run | str], upstream: Callable[..., Run], tell: Callable[[str], None]
) -> None:
    run = finished(runs["ours"])
    assert records(run) == OURS_ANYWHERE | {"usp.own-specs"} and run.planted == 2 * FORWARDS
    assert_equal(run, upstream(""), "ours in TransformerEngine's layers", tell)


def test_theirs_in_te_layers_by_default(
    runs: dict[str, Run | str], upstream: Callable[..., Run], tell: Callable[[str], None]
) -> None:
    run = finished(runs["theirs"])
    assert records(run) == set() and run.planted == 0
    assert_equal(run, upstream(""), "TransformerEngine's in its own layers", tell)


@pytest.mark.slow
def test_theirs_in_local_layers(
    runs: dict[str, Run | str], upstream: Callable[..., Run], tell: Callable[[str], None]
) -> None:
    run = finished(runs["theirs in local layers"])
    assert records(run) == {"usp.core-attention"} and run.planted == 0
    assert_equal(run, upstream(""), "TransformerEngine's in local layers", tell)


def test_ours_in_te_layers_in_segments_by_default(
    runs: dict[str, Run | str], upstream: Callable[..., Run], tell: Callable[[str], None]
) -> None:
    run = finished(runs["ours in segments"])
    assert records(run) == OURS_ANYWHERE | {"usp.batch"} and run.planted == 2 * 2 * FORWARDS  # segments, ranks
    assert_equal(run, upstream(""), "ours in TransformerEngine's layers, segments", tell)


@pytest.mark.parametrize("name", ["ours, from theirs", pytest.param("theirs, from ours", marks=pytest.mark.slow)])
def test_checkpoints_go_both_ways(runs: dict[str, Run | str], name: str) -> None:
    """TransformerEngine's core attention has an `_extra_state` there, ours has none."""
    assert_steps_equal(finished(runs[name]).curve, finished(runs["theirs"]).curve[2:])


def test_a_spec_of_its_own_is_refused(runs: dict[str, Run | str]) -> None:
    error = runs["a spec of its own"]
    assert isinstance(error, str)
    assert "layer 1: its layer spec names TEDotProductAttention" in error
    assert "--context-parallel-attention transformer_engine" in error


@pytest.mark.slow
def test_more_in_te_layers(
    start: Start, upstream: Callable[..., Run], tell: Callable[[str], None], tmp_path: Path
) -> None:
    trainings = {
        name: Training(arm, world, start(model) + flags(own), snapshots=SNAPSHOTS)  # type: ignore[arg-type]
        for name, (arm, world, model, own) in SLOW.items()
    }
    found = train(trainings, tmp_path)
    for name, (_, _, model, _) in SLOW.items():
        assert_equal(finished(found[name]), upstream(model), f"TransformerEngine's layers, {name}", tell)
