"""A damaged checkpoint is named and skipped. If none can be loaded, a message says why; the status is not 0."""

import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.distributed.flags import TINY, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import run_arm
from tests.regression.planted import Planted, wrapped

PARO = "--paro NIG"
ITERATION, TRACKER = "iter_0000002", "latest_checkpointed_iteration.txt"
MORE = f"{TINY} --train-iters 3"


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with checkpoints of the first and the second step."""
    folder = tmp_path_factory.mktemp("saved")
    run_arm(ranks, "O", 2, flags(TINY, PARO, "--train-iters 3 --exit-interval 2 --save-interval 1"), folder)
    return folder


def _largest(folder: Path, name: str = ITERATION) -> Path:
    return max((folder / name).glob("*.distcp"), key=lambda path: path.stat().st_size)


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FIRST = "iter_0000001 is loaded instead."
DAMAGES: dict[str, tuple[Callable[[Path], object], int, list[str]]] = {
    "no-tracker": (lambda f: (f / TRACKER).unlink(), 2, []),
    "empty-tracker": (lambda f: (f / TRACKER).write_bytes(b""), 2, []),
    "garbage-tracker": (lambda f: (f / TRACKER).write_bytes(b"\0\xff\0"), 2, []),
    "tracker-ahead": (
        lambda f: (f / TRACKER).write_text("7"),
        2,
        ["there is no checkpoint", "iter_0000007.", "iter_0000002 is loaded instead."],
    ),
    "no-description": (
        lambda f: (f / ITERATION / "metadata.json").unlink(),
        1,
        ["metadata.json cannot be read", FIRST],
    ),
    "cut-list": (lambda f: _halve(f / ITERATION / ".metadata"), 1, [".metadata has", "it is truncated", FIRST]),
    "cut-tensors": (lambda f: _halve(_largest(f)), 1, [".distcp has", "it is truncated", FIRST]),
    "no-tensors": (lambda f: _largest(f).unlink(), 1, [".distcp cannot be read (No such file", FIRST]),
    "flipped-bit": (lambda f: _flip(_largest(f)), 1, [".distcp is damaged: ", "differs from what was saved", FIRST]),
    "upstreams-cut-tensors": (lambda f: _as_upstreams(f, _halve), 1, [".distcp has", "its tensors need", FIRST]),
    "upstreams-no-common-state": (
        lambda f: (_as_upstreams(f), _without_common_state(f / ITERATION / ".metadata")),
        1,
        ["common.pt is missing", FIRST],
    ),
    "upstreams-cut-list": (
        lambda f: (_as_upstreams(f), _halve(f / ITERATION / ".metadata")),
        1,
        [".metadata cannot be read", FIRST],
    ),
}
FAST = ("empty-tracker", "flipped-bit")


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in DAMAGES]
)
def test_a_damaged_checkpoint_is_skipped(ranks: RankPool, saved: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    harm, iteration, message = DAMAGES[damage]
    harm(folder)
    run = run_arm(ranks, "O", 2, [*flags(MORE, PARO), "--load", str(folder)])
    assert [step["iteration"] for step in run.curve] == list(range(iteration + 1, 4))
    logs = [(ranks.logs / f"job{ranks.jobs:03d}-rank{rank}.log").read_text() for rank in (0, 1)]
    said = [line for line in logs[0].splitlines() if line.startswith("> WARNING: ") and str(folder) in line]
    assert len(said) == bool(message) and str(folder / ITERATION) not in logs[1]  # one message, from rank 0
    assert all(words in said[0] for words in message)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _as_upstreams(folder: Path, harm: Callable[[Path], object] = lambda file: None) -> None:
    """Remove the manifests, which upstream does not write, and damage the newest tensors."""
    for file in folder.glob("iter_*/longseq_manifest.json"):
        file.unlink()
    harm(_largest(folder))


def _without_common_state(listed: Path) -> None:
    """Remove the arguments from the list of a checkpoint: older ones have them in a file, which may be lost."""
    metadata = pickle.loads(listed.read_bytes())
    names = [name for name in metadata.state_dict_metadata if name.startswith("common_state")]
    assert names
    for name in names:
        del metadata.state_dict_metadata[name]
    listed.write_bytes(pickle.dumps(metadata))


def test_nothing_complete_is_a_failure(ranks: RankPool, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    for path in folder.glob("iter_*/.metadata"):
        _halve(path)
    _fails(ranks, [*flags(MORE, PARO), "--load", str(folder)], r"rank \d: .*.metadata has .* no other complete", 2)


def test_a_step_that_is_asked_for_is_examined(ranks: RankPool, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    _flip(_largest(folder))
    run = run_arm(ranks, "O", 2, [*flags(MORE, PARO, "--ckpt-step 1"), "--load", str(folder)])
    assert [step["iteration"] for step in run.curve] == [2, 3]
    asked = [*flags(MORE, PARO, "--ckpt-step 2"), "--load", str(folder)]
    _fails(ranks, asked, r"rank \d: .*.distcp is damaged: .* Give another --ckpt-step", 2)


PASSING = "--save-interval 2 --non-persistent-save-interval 1 --non-persistent-ckpt-type global"


@pytest.fixture(scope="module")
def saved_in_passing(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint of the second step, and non-persistent ones of the first and the third."""
    folder = tmp_path_factory.mktemp("passing")
    run_arm(ranks, "O", 2, flags(TINY, PASSING, "--exit-interval 3"), folder)
    return folder


def _all_cut(folder: Path) -> None:
    for file in folder.glob("iter_*/*.distcp"):
        _halve(file)


# name: damage to the folder of non-persistent checkpoints, flag, iteration that is loaded
PASSED: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "flipped-bit": (lambda f: _flip(_largest(f, "iter_0000003")), "", 2),
    "cut-tensors": (lambda f: _halve(_largest(f, "iter_0000003")), "", 2),
    "empty-tracker": (lambda f: (f / TRACKER).write_bytes(b""), "", 3),
    "others-cut": (lambda f: _all_cut(f.parent), "", 3),
    "another-step": (lambda f: None, "--ckpt-step 2", 2),
}


@pytest.mark.parametrize("name", PASSED)
def test_non_persistent_checkpoints_are_examined(
    ranks: RankPool, saved_in_passing: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "passing"
    shutil.copytree(saved_in_passing, folder)
    harm, own, iteration = PASSED[name]
    harm(folder / "non_persistent")
    run = run_arm(ranks, "O", 2, [*flags(TINY, PASSING, own), "--load", str(folder)])
    assert [step["iteration"] for step in run.curve] == list(range(iteration + 1, 5))
    log = (ranks.logs / f"job{ranks.jobs:03d}-rank0.log").read_text()
    assert ("iter_0000002 is loaded instead." in log) == (name in ("flipped-bit", "cut-tensors"))


def test_what_a_killed_first_save_leaves_does_not_hide_the_pretrained_checkpoint(
    ranks: RankPool, saved: Path, tmp_path: Path
) -> None:
    (tmp_path / ITERATION).mkdir()  # as upstream does ahead of a save
    line = flags(TINY, PARO, "--train-iters 1 --lr 5e-3")
    begun, random = (
        run_arm(ranks, "O", 2, [*line, *own])
        for own in (["--load", str(tmp_path), "--pretrained-checkpoint", str(saved)], [])
    )
    finetuned = run_arm(ranks, "O", 2, [*line, "--load", str(saved), "--finetune"])
    assert begun.curve == finetuned.curve and begun.curve != random.curve


def test_a_run_that_began_with_a_damaged_tracker_saves_and_deletes(
    ranks: RankPool, saved: Path, tmp_path: Path
) -> None:
    """Upstream reads the tracker file again when it looks for the checkpoint to delete."""
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    (folder / TRACKER).write_bytes(b"")
    line = [*flags(MORE, PARO, "--save-interval 1 --save-retain-interval 10"), "--load", f"./{os.path.relpath(folder)}"]
    run = run_arm(ranks, "O", 2, line, folder)
    assert [step["iteration"] for step in run.curve] == [3]
    assert (folder / TRACKER).read_text() == "3"


@contextmanager
def printed_reads() -> Iterator[Planted]:
    """Print each comparison of tensors with their checksums."""
    from megatron.longseq.checkpoints import manifest

    def find_content_fault(original: Callable[..., Any], folder: Path, found: Any, part: int, parts: int) -> Any:
        print(f"reads part {part} of {parts}", flush=True)
        return original(folder, found, part, parts)

    with wrapped(manifest, "find_content_fault", find_content_fault):
        yield Planted()


def test_each_rank_reads_its_share_once(ranks: RankPool, saved: Path) -> None:
    """Before the ranks are connected, each of them needs the arguments of the checkpoint alone."""
    line = [*flags(MORE, PARO, "--use-checkpoint-args"), "--load", str(saved)]
    run_arm(ranks, "O", 2, line, mutant=f"{__name__}:printed_reads")
    for rank in (0, 1):
        log = (ranks.logs / f"job{ranks.jobs:03d}-rank{rank}.log").read_text()
        assert re.findall(r"reads part (\d+ of \d+)", log) == [f"{rank} of 2"]


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


@pytest.fixture(scope="module")
def saved_plainly(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint of a plain optimizer, after the second step."""
    folder = tmp_path_factory.mktemp("plain")
    run_arm(ranks, "O", 2, flags(TINY, "--train-iters 3 --exit-interval 2"), folder)
    return folder


def test_a_plain_optimizer_is_explained_too(ranks: RankPool, saved: Path, saved_plainly: Path) -> None:
    for own, folder, message in (
        ("--lr 5e-3", saved_plainly, r"--lr is 0\.005, was 0\.01\. .*--no-load-optim"),
        (
            "",
            saved,
            r"it was saved with --use-distributed-optimizer .*, and this run is without it\. .*--no-load-optim",
        ),
        (
            "--use-distributed-optimizer",
            saved_plainly,
            "it was saved without --use-distributed-optimizer .* is with it",
        ),
    ):
        line = [*flags(MORE, own), "--load", str(folder)]
        _fails(ranks, line, f"the optimizer cannot continue from the checkpoint: {message}", 2)
    run = run_arm(ranks, "O", 2, [*flags(MORE, "--no-load-optim"), "--load", str(saved)])
    assert [step["iteration"] for step in run.curve] == [3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("--hidden-size 128", r"--hidden-size is 128, was 64(; --kv-channels is 32, was 16)?\. Give the saved values"),
        ("--num-layers 6", r"--num-layers is 6, was 4\. Give the saved values"),
        (
            "--paro GGG --num-layers 2 --ffn-hidden-size 64",
            r"--num-layers is 2, was 4; --ffn-hidden-size is 64, was 128",
        ),
    ],
)
def test_another_model_is_refused_by_name(ranks: RankPool, saved: Path, other: str, message: str) -> None:
    _fails(
        ranks,
        [*flags(MORE, PARO, other), "--load", str(saved)],
        rf"rank \d: .* cannot be loaded: it holds another model: {message}",
        2,
    )


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


def _fails(ranks: RankPool, words: list[str], message: str, world_size: int = 1) -> None:
    """A failure on one rank gives a message and a status other than 0."""
    with pytest.raises(RankFailure) as failure:
        run_arm(ranks, "O", world_size, words)
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
