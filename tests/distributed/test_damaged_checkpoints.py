"""If a checkpoint cannot be loaded, the message names the file or setting and what to do; the status is not 0."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from tests.distributed.flags import TINY, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import run_arm

PARO = "--paro NIG"
ITERATION, TRACKER = "iter_0000002", "latest_checkpointed_iteration.txt"
MORE = f"{TINY} --train-iters 3"


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with checkpoints of the first and the second step."""
    folder = tmp_path_factory.mktemp("saved")
    run_arm(ranks, "O", 2, flags(TINY, PARO, "--train-iters 3 --exit-interval 2 --save-interval 1"), folder)
    return folder


def _largest(folder: Path) -> Path:
    return max((folder / ITERATION).glob("*.distcp"), key=lambda path: path.stat().st_size)


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FIRST = "The newest complete checkpoint is iter_0000001: give --ckpt-step 1"
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty-tracker": (
        lambda f: (f / TRACKER).write_bytes(b""),
        [f"{TRACKER} holds b'', not an iteration number", "is iter_0000002: write that number into"],
    ),
    "garbage-tracker": (
        lambda f: (f / TRACKER).write_bytes(b"\0\xff\0"),
        ["holds b'\\x00\\xff\\x00', not an iteration"],
    ),
    "words-in-tracker": (lambda f: (f / TRACKER).write_text("latest"), ["holds b'latest', not an iteration"]),
    "negative-tracker": (lambda f: (f / TRACKER).write_text("-5"), ["holds b'-5', not an iteration"]),
    "tracker-ahead": (
        lambda f: (f / TRACKER).write_text("7"),
        ["there is no checkpoint", "iter_0000007, but latest_checkp", "is iter_0000002: give --ckpt-step 2"],
    ),
    "no-description": (lambda f: (f / ITERATION / "metadata.json").unlink(), ["metadata.json is missing", FIRST]),
    "cut-description": (lambda f: _halve(f / ITERATION / "metadata.json"), ["metadata.json cannot be read", FIRST]),
    "no-list": (lambda f: (f / ITERATION / ".metadata").unlink(), [".metadata is missing", FIRST]),
    "cut-list": (lambda f: _halve(f / ITERATION / ".metadata"), [".metadata cannot be read", FIRST]),
    "cut-tensors": (lambda f: _halve(_largest(f)), [".distcp has", "it is truncated", FIRST]),
    "empty-tensors": (lambda f: _largest(f).write_bytes(b""), [".distcp has 0 bytes", FIRST]),
    "no-tensors": (lambda f: _largest(f).unlink(), [".distcp cannot be read (No such file", FIRST]),
    "nothing-whole": (
        lambda f: [_halve(path) for path in f.glob("iter_*/.metadata")],
        [".metadata cannot be read", "There is no other complete checkpoint in"],
    ),
}


FAST = ("tracker-ahead", "no-description", "cut-tensors")  # one of each kind


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in DAMAGES]
)
def test_a_damaged_checkpoint_is_named(ranks: RankPool, saved: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(RankFailure) as failure:
        run_arm(ranks, "O", 2, [*flags(MORE, PARO), "--load", str(folder)])
    last = str(failure.value).split("--- end of its output")[0]
    assert "\nValueError: rank " in last
    for words in message:
        assert words in last, last[-3000:]


def test_what_is_advised_helps(ranks: RankPool, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    _halve(_largest(folder))
    run = run_arm(ranks, "O", 2, [*flags(MORE, PARO, "--ckpt-step 1"), "--load", str(folder)])
    assert [step["iteration"] for step in run.curve] == [2, 3]
    (folder / TRACKER).unlink()  # as upstream has it: without a tracker there is nothing to load
    run = run_arm(ranks, "O", 2, [*flags(MORE, PARO), "--load", str(folder)])
    assert [step["iteration"] for step in run.curve] == [1, 2, 3]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param("--lr 5e-3", r"--lr is 0\.005, was 0\.01\. .*--no-load-optim", marks=pytest.mark.slow),
        pytest.param(
            "--min-lr 1e-4 --override-opt-param-scheduler",
            r"--min-lr is 0\.0001, was 0\.001\. ",
            marks=pytest.mark.slow,
        ),
        ("--lr 5e-3 --min-lr 1e-4", r"--lr is 0\.005, was 0\.01; --min-lr is 0\.0001, was 0\.001\. "),
    ],
)
def test_other_learning_rates_are_refused_by_name(ranks: RankPool, saved: Path, other: str, message: str) -> None:
    with pytest.raises(RankFailure, match=f"ValueError: the optimizer cannot continue from the checkpoint: {message}"):
        run_arm(ranks, "O", 2, [*flags(MORE, PARO, other), "--load", str(saved)])


@pytest.mark.slow
@pytest.mark.parametrize("own", [PARO, "--use-distributed-optimizer", ""])
def test_adams_settings_come_from_the_checkpoint(ranks: RankPool, tmp_path: Path, own: str) -> None:
    """This is what the report on changed flags says (checkpoint.changed-flags)."""
    run_arm(ranks, "O", 2, flags(MORE, own, "--exit-interval 2 --save-interval 2"), tmp_path)
    changes = ("", "--adam-beta1 0.5 --adam-beta2 0.5 --adam-eps 1e-2")
    last, changed = (
        run_arm(ranks, "O", 2, [*flags(MORE, own, change), "--load", str(tmp_path)], snapshots=(3,))
        for change in changes
    )
    assert [step["iteration"] for step in changed.curve] == [3]
    tensors = last.snapshots[3].tensors
    assert all(numpy.array_equal(changed.snapshots[3].tensors[name], array) for name, array in tensors.items())
    log = (ranks.logs / f"job{ranks.jobs:03d}-rank0.log").read_text()
    assert log.count("The optimizer continues with the saved value") == 3


TORCH = "--use-distributed-optimizer --ckpt-format torch"


@pytest.fixture(scope="module")
def saved_by_torch(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with checkpoints of --ckpt-format torch, without random states."""
    folder = tmp_path_factory.mktemp("torch")
    more = flags(MORE, TORCH, "--exit-interval 2 --save-interval 1 --no-save-rng")
    run_arm(ranks, "O", 1, more, folder)
    return folder


def _fails(ranks: RankPool, words: list[str], message: str) -> None:
    """A failure on one rank gives a message and a status other than 0."""
    with pytest.raises(RankFailure) as failure:
        run_arm(ranks, "O", 1, words)
    last = str(failure.value).split("--- end of its output")[0]
    assert re.search(f"\nValueError: {message}", last), last[-3000:]


MODEL, OPTIMIZER = "mp_rank_00/model_optim_rng.pt", "mp_rank_00/distrib_optim.pt"
OF_TORCH: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut-model": (MODEL, _halve, f"rank 0: .*{MODEL} is truncated"),
    "empty-model": (MODEL, lambda path: path.write_bytes(b""), f"rank 0: .*{MODEL} is empty"),
    "no-model": (MODEL, Path.unlink, f"rank 0: .*{MODEL} cannot be read .No such file"),
    "cut-optimizer": (OPTIMIZER, _halve, f".*{OPTIMIZER} is truncated"),
    "empty-optimizer": (OPTIMIZER, lambda path: path.write_bytes(b""), f".*{OPTIMIZER} is empty"),
    "no-optimizer": (OPTIMIZER, Path.unlink, f".*{OPTIMIZER} cannot be read .No such file"),
}


@pytest.mark.parametrize(
    "damage",
    [pytest.param(name, marks=() if name == "cut-model" else pytest.mark.slow) for name in OF_TORCH],
)
def test_a_damaged_file_of_torch_is_named(ranks: RankPool, saved_by_torch: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved_by_torch, folder)
    name, harm, message = OF_TORCH[damage]
    harm(folder / ITERATION / name)
    _fails(ranks, [*flags(MORE, TORCH), "--load", str(folder)], f"{message}.* The newest complete .* --ckpt-step 1")


def test_giving_up_is_a_failure(ranks: RankPool, saved_by_torch: Path, tmp_path: Path) -> None:
    _fails(ranks, [*flags(MORE, TORCH), "--load", str(saved_by_torch)], "rank 0: no checkpoint .* The lines before")
    missing = flags(MORE, "--exit-on-missing-checkpoint --load")
    _fails(ranks, [*missing, str(tmp_path)], "rank 0: no checkpoint was .*: there is none")
    _fails(ranks, [*flags(MORE, "--ckpt-step 3 --load"), str(tmp_path / "no")], "rank 0: there is no checkpoint .*/no")
