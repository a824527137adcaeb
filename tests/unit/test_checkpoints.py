"""Commits survive a stop at every step, the newest complete checkpoint is found, and damage is noticed by name."""

import atexit
import functools
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.rerun_state_machine import Call, Caller
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron.longseq.checkpoints import commit, digest, latest, manifest
from megatron.longseq.checkpoints.faults import TRACKER
from megatron.longseq.checkpoints.manifest import Item
from megatron.longseq.checkpoints.safe_reading import load_metadata, load_object
from megatron.longseq.checkpoints.saving import FolderNotWritten, NonFiniteState, save_atomically
from patches.checkpoint.latest import _is_owner, with_untracked_checkpoints
from tests.pool import RankPool

ROOT = Path(__file__).parents[2]
WEIGHT = torch.arange(6000.0).view(60, 100)


class Stopped(Exception):
    """The process ends here."""


@functools.cache
def written(value: float) -> tuple[Path, list[Item]]:
    """Write a checkpoint's files without a manifest, and return their folder and the checksums of the state."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    state = {"layers.weight": WEIGHT + value, "bias": torch.full((7,), value, dtype=torch.bfloat16)}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / manifest.DESCRIPTION).write_text('{"sharded_backend": "torch_dist"}')
    return folder, [Item(name, (0,) * value.ndim, digest.tensor_digest(value)) for name, value in state.items()]


def save(folder: Path, value: float) -> None:
    """Save and commit a checkpoint."""
    files, items = written(value)
    commit.begin(folder)
    for file in files.iterdir():
        shutil.copy(file, commit.saving_folder(folder))
    commit.commit(folder, items)


def value_of(folder: Path) -> float:
    """Read a checkpoint's value, from both of its tensors."""
    state = {"layers.weight": torch.empty(60, 100), "bias": torch.empty(7, dtype=torch.bfloat16)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    (weight,) = (state["layers.weight"] - WEIGHT).unique().tolist()
    (bias,) = state["bias"].unique().tolist()
    assert weight == bias
    return float(weight)


@contextmanager
def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Stop before the change number `step` of the file system; removing a folder stops half-way, too."""
    done: list[str] = []

    def counted(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **named: Any) -> Any:
            if len(done) == step:
                if name == "rmtree":
                    next(path for path in Path(args[0]).iterdir()).unlink()
                raise Stopped
            done.append(name)
            return change(*args, **named)

        return counting

    with monkeypatch.context() as patched:
        for name in ("mkdir", "rmdir", "rename", "replace"):
            patched.setattr(Path, name, counted(name, getattr(Path, name)))
        patched.setattr(shutil, "rmtree", counted("rmtree", shutil.rmtree))
        patched.setattr(json, "dump", counted("dump", json.dump))
        patched.setattr(os, "fsync", counted("fsync", os.fsync))
        yield done


@pytest.mark.parametrize("name", ["iter_0000002", "iter_0000003"], ids=["over an old one", "a new one"])
def test_a_commit_stopped_at_any_step_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """There are always a complete checkpoint, an old or the new one, and no incomplete `iter_...`."""
    seen = set()
    written(3), written(4)
    for step in range(100):
        folder = tmp_path / str(step)
        save(folder / "iter_0000002", 2)
        (folder / TRACKER).write_text("2")
        (folder / name).mkdir(exist_ok=True)  # as upstream does ahead of a save
        ended = True
        with stop_at(step, monkeypatch) as done:
            try:
                save(folder / name, 3)
            except Stopped:
                ended = False
        choice = latest.choose_checkpoint(folder, "digests", None, is_owner=True)
        assert choice.name is not None
        assert not any(path.name.startswith(("saving", "replaced")) for path in folder.iterdir())
        seen.add((choice.name, value_of(folder / choice.name)))
        assert seen <= {("iter_0000002", 2.0), (name, 3.0)}
        save(folder / name, 4)  # what the stop has left is no obstacle
        assert value_of(folder / name) == 4 and {path.name for path in folder.iterdir()} <= {
            TRACKER,
            "iter_0000002",
            name,
        }
        if ended:
            break
    assert ended and step > 6 and len(seen) == 2, done


def test_a_save_replaces_a_link_and_keeps_what_it_names(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000001"
    save(folder, 1)
    moved(folder)
    save(folder, 2)
    assert value_of(folder) == 2 and not folder.is_symlink()
    assert value_of(tmp_path / "elsewhere/iter_0000001") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", folder.name}


def test_a_run_that_only_reads_leaves_a_save_at_work_alone(tmp_path: Path) -> None:
    save(tmp_path / "iter_0000001", 1)
    for name in ("saving_iter_0000002", "replaced_iter_0000003"):
        shutil.copytree(tmp_path / "iter_0000001", tmp_path / name)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert latest.choose_checkpoint(tmp_path, "digests", None).name == "iter_0000001"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def flip(file: Path, at: int) -> None:
    """Flip a bit of a file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def tensors(folder: Path) -> Path:
    """Return the file with a checkpoint's tensors."""
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def cut(file: Path) -> None:
    """Remove the end of a file."""
    file.write_bytes(file.read_bytes()[:-100])


def edited(file: Path, text: str) -> None:
    """Write a file at a later time than the others."""
    file.write_text(text)
    os.utime(file, ns=(2**62, 2**62))


def interrupted(folder: Path, name: str) -> None:
    """Leave a save as it is before its last rename."""
    saving = folder / f"saving_{name}"
    shutil.copytree(folder / "iter_0000001", saving)
    os.utime(saving / manifest.NAME, ns=(2**62, 2**62))


def strays(folder: Path) -> None:
    """Put files and folders beside the checkpoints whose names look like theirs."""
    for name in ("iter_0000009", "saving_iter_0000008.txt", "iter_0000004.tar", "iter_", "notes"):
        (folder / name).write_text("not a checkpoint")
    for name in ("iter_best", "saving_notes", "replaced_by_me", "iter_0000003/plots"):
        (folder / name).mkdir()
    (folder / "iter_0000003/plots/loss.png").write_bytes(b"\x89PNG")


def moved(checkpoint: Path) -> None:
    """Move a checkpoint to another place, and leave a link to it."""
    place = checkpoint.parent / "elsewhere" / checkpoint.name
    place.parent.mkdir(exist_ok=True)
    checkpoint.rename(place)
    checkpoint.symlink_to(place, target_is_directory=True)


def with_manifest(checkpoint: Path, key: str, value: Any) -> None:
    """Change one entry of a manifest, which stays valid JSON."""
    file = checkpoint / manifest.NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


CASES: dict[str, tuple[Callable[[Path], Any], str | None, list[str]]] = {
    "whole": (lambda f: None, "iter_0000003", []),
    "no tracker": (lambda f: (f / TRACKER).unlink(), "iter_0000003", []),
    "empty tracker": (lambda f: (f / TRACKER).write_text(""), "iter_0000003", []),
    "garbage in tracker": (lambda f: (f / TRACKER).write_bytes(b"\0\xff"), "iter_0000003", []),
    "tracker ahead": (lambda f: edited(f / TRACKER, "9"), "iter_0000003", ["there is no checkpoint"]),
    "tracker set back": (lambda f: edited(f / TRACKER, "1"), "iter_0000001", []),
    "stopped before the tracker": (
        lambda f: os.utime(f / "iter_0000003" / manifest.NAME, ns=(2**62, 2**62)),
        "iter_0000003",
        [],
    ),
    "truncated tensors": (lambda f: cut(tensors(f / "iter_0000003")), "iter_0000002", [".distcp has", "truncated"]),
    "flipped bit": (
        lambda f: flip(tensors(f / "iter_0000003"), 9000),
        "iter_0000002",
        [".distcp is damaged: layers.weight at [0, 0] differs from what was saved"],
    ),
    "flipped bit in the list": (
        lambda f: flip(f / "iter_0000003/.metadata", 70),
        "iter_0000002",
        [".metadata differs"],
    ),
    "no list": (lambda f: (f / "iter_0000003/.metadata").unlink(), "iter_0000002", [".metadata cannot be read"]),
    "manifest cut": (lambda f: cut(f / "iter_0000003" / manifest.NAME), "iter_0000002", ["manifest.json cannot"]),
    "two damaged": (
        lambda f: [flip(tensors(f / "iter_0000003"), 9000), cut(tensors(f / "iter_0000002"))],
        "iter_0000001",
        ["iter_0000003/", "iter_0000002/"],
    ),
    "none whole": (lambda f: [cut(tensors(path)) for path in f.glob("iter_*")], None, ["iter_0000001/"]),
    "interrupted save": (lambda f: interrupted(f, "iter_0000004"), "iter_0000004", []),
    "tensors of another iteration": (
        lambda f: shutil.copy(tensors(f / "iter_0000002"), tensors(f / "iter_0000003")),
        "iter_0000002",
        [".distcp is damaged: layers.weight at [0, 0] differs from what was saved"],
    ),
    "files of others": (strays, "iter_0000003", []),
    "links": (lambda f: [moved(path) for path in f.glob("iter_*")], "iter_0000003", []),
    "stopped before the first tracker after a release": (
        lambda f: [
            (f / "iter_0000001").rename(f / "release"),
            (f / TRACKER).write_text("release"),
            os.utime(f / "iter_0000003" / manifest.NAME, ns=(2**62, 2**62)),
        ],
        "iter_0000003",
        [],
    ),
    **{
        f"manifest with {key} {value}": (
            lambda f, key=key, value=value: with_manifest(f / "iter_0000003", key, value),
            "iter_0000002",
            ["manifest.json cannot be read"],
        )
        for key, value in [
            ("files", {manifest.DESCRIPTION: "2"}),
            ("files", {manifest.DESCRIPTION: [2]}),
            ("files", {manifest.DESCRIPTION: 2, "a\0b": 3}),
            ("files", {}),
            ("files", [["a", 1]]),
            ("items", [["a", [[1]], "b"]]),
        ]
    },
    "manifest of brackets": (
        lambda f: (f / "iter_0000003" / manifest.NAME).write_text("[" * 100_000),
        "iter_0000002",
        ["manifest.json cannot be read"],
    ),
    "upstream's, incomplete": (lambda f: (f / "iter_0000004").mkdir(), "iter_0000003", []),
}


@pytest.mark.parametrize("case", CASES)
def test_the_newest_complete_checkpoint_is_chosen(tmp_path: Path, case: str) -> None:
    change, name, words = CASES[case]
    for iteration in (1, 2, 3):
        save(tmp_path / f"iter_{iteration:07d}", iteration)
    (tmp_path / TRACKER).write_text("2" if case == "stopped before the tracker" else "3")
    change(tmp_path)
    choice = latest.choose_checkpoint(tmp_path, "digests", None, is_owner=True)
    assert choice.name == name
    assert all(word in " ".join(choice.skipped) for word in words) and bool(choice.skipped) == bool(words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64, torch.int64])
@given(st.data())
def test_every_flipped_bit_changes_the_checksum(dtype: torch.dtype, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 300))
    raw = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8)
    before = digest.tensor_digest(raw.view(dtype))
    at, bit = data.draw(st.integers(0, raw.numel() - 1)), data.draw(st.integers(0, 7))
    raw[at] ^= 1 << bit
    assert digest.tensor_digest(raw.view(dtype)) != before
    raw[at] ^= 1 << bit
    block, digest.BLOCK = digest.BLOCK, 16
    try:
        assert digest.tensor_digest(raw.view(dtype)) == before
    finally:
        digest.BLOCK = block
    shifted = torch.cat([raw.view(dtype)[:1], raw.view(dtype)])[1:]
    assert digest.tensor_digest(shifted) == before  # begins within a word of 32 bits
    two = torch.stack([raw.view(dtype), raw.view(dtype).flip(0)], 1)
    assert digest.tensor_digest(two[:, 0]) == before  # not contiguous
    parts = raw.view(size, dtype.itemsize)
    if not parts[0].equal(parts[-1]):
        moved = parts.clone()
        moved[0], moved[-1] = parts[-1], parts[0]
        assert digest.tensor_digest(moved.view(-1).view(dtype)) != before


def test_the_first_value_that_is_not_finite_is_found() -> None:
    values = torch.zeros(3, 5)
    assert digest.first_not_finite(values) is None
    values[1, 2], values[2, 0] = torch.inf, torch.nan
    assert digest.first_not_finite(values) == ((1, 2), torch.inf)


def test_a_checkpoint_without_tracker_exists(tmp_path: Path) -> None:
    exists = with_untracked_checkpoints(lambda path: (Path(path) / TRACKER).is_file())
    owner, evaluation = (Namespace(save=str(tmp_path), skip_train=skips) for skips in (False, True))
    (tmp_path / "iter_0000001").mkdir()  # as upstream does ahead of a save
    assert not exists(tmp_path)
    save(tmp_path / "iter_0000001", 1)
    assert exists(tmp_path)
    (tmp_path / "iter_0000001").rename(commit.saving_folder(tmp_path / "iter_0000001"))  # stopped before its last name
    assert not exists(tmp_path)
    assert latest.has_checkpoint(tmp_path, is_owner=_is_owner(tmp_path, owner))
    assert not latest.has_checkpoint(tmp_path, is_owner=_is_owner(tmp_path, evaluation))  # it leaves saves alone


def test_a_list_that_names_other_classes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / ".metadata"
    file.write_bytes(pickle.dumps({"state_dict_metadata": os.getcwd}))
    with file.open("rb") as stream, pytest.raises(pickle.UnpicklingError, match=r"names posix\.getcwd"):
        load_metadata(stream)


class Background:
    """A strategy and its request: upstream's interface, and a writer that runs when the test says so."""

    def __init__(self, folder: Path, tensor: torch.Tensor) -> None:
        index = MetadataIndex("layers.weight", torch.Size([0, 0]))
        self.bucket = (folder / "file", "file", ([], [(SimpleNamespace(index=index), tensor)]))
        self.async_fn_args = (0, [self.bucket], None)
        self.finalize_fns: list[Callable[[], None]] = []

    def async_save(self) -> "Background":
        """Plan the save."""
        return self

    def add_finalize_fn(self, function: Callable[[], None]) -> None:
        """Add what to do once all writers are done."""
        self.finalize_fns.append(function)

    def write(self, place: Path) -> None:
        """Write the files, as another process would."""
        ((_, tensor),) = self.bucket[2][1]
        dcp.save({"layers.weight": tensor}, checkpoint_id=place, no_dist=True)
        (place / manifest.DESCRIPTION).write_text("{}")


def test_a_background_save_has_the_state_of_its_step_and_is_committed_last(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    group = torch.distributed.group.WORLD
    assert group is not None
    try:
        folder, weight = tmp_path / "iter_0000001", WEIGHT.clone()
        strategy = Background(tmp_path, weight)
        saved = save_atomically(lambda place: strategy.async_save(), folder, strategy, group, in_background=True)
        assert saved is strategy and not folder.exists()
        weight.add_(1)  # training goes on
        strategy.write(commit.saving_folder(folder))
        for function in strategy.finalize_fns:
            function()
        assert latest.choose_checkpoint(tmp_path, "digests", group).name == folder.name
        state = {"layers.weight": torch.empty(60, 100)}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        assert state["layers.weight"].equal(WEIGHT)
        at_work, place = Background(tmp_path, weight), tmp_path / "iter_0000004"
        save_atomically(lambda place: at_work.async_save(), place, at_work, group, in_background=True)
        commit.recover(tmp_path)  # by another run
        with pytest.raises(FolderNotWritten, match=r"iter_0000004 is not saved: .*; another run has removed what"):
            at_work.finalize_fns[-1]()
        weight[7, 3] = torch.inf
        with pytest.raises(NonFiniteState, match=r"iter_0000002 is not saved.* rank 0: layers.weight\[7, 3\] is inf"):
            second = Background(tmp_path, weight)
            save_atomically(
                lambda place: second.async_save(), tmp_path / "iter_0000002", second, group, in_background=True
            )
        (tmp_path / "full").write_text("a file where the folder of checkpoints should be")
        with pytest.raises(FolderNotWritten, match=r"iter_0000003 is not saved: NotADirectoryError: .* unchanged"):
            save_atomically(
                lambda place: second.async_save(), tmp_path / "full/iter_0000003", second, group, in_background=True
            )
    finally:
        torch.distributed.destroy_process_group()


def save_where_the_second_rank_cannot_write(folder: Path) -> str:
    """Save as upstream does when one writer failed: the first rank alone has the reason. Runs on a rank."""
    torch.distributed.init_process_group("gloo")
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    assert group is not None
    strategy = Background(folder, WEIGHT)

    def finalize() -> None:
        raise CheckpointException("write", {} if rank else {1: (OSError(28, "No space left on device"), [])})

    strategy.finalize_fns.append(finalize)
    save_atomically(lambda place: strategy.async_save(), folder / "iter_0000001", strategy, group, in_background=True)
    with pytest.raises(FolderNotWritten) as failure:
        for function in strategy.finalize_fns:
            function()
    return str(failure.value)


def test_all_ranks_say_what_one_could_not_write(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(2, save_where_the_second_rank_cannot_write, tmp_path)
    assert first == second
    reason = r"rank 1: OSError: \[Errno 28\] No space left on device; the disk of this folder has \S+ GB free"
    assert re.search(rf"iter_0000001 is not saved: {reason}\. The", first)
    assert not (tmp_path / "iter_0000001").exists()


RANK = """
import multiprocessing, os, sys, time
if __name__ == "__main__":
    from patches.checkpoint.writer import async_loop
    spawn = multiprocessing.get_context("spawn")
    queues = spawn.JoinableQueue(), spawn.JoinableQueue(), spawn.Queue()
    writer = spawn.Process(target=async_loop, args=(0, *queues), daemon=True)
    writer.start()
    print(writer.pid, flush=True)
    if sys.argv[1] == "stopped":
        queues[0].put("DONE")
        queues[0].join()
        writer.join()
        sys.exit(writer.exitcode)
    time.sleep(3600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_background_writer_ends_with_its_rank(tmp_path: Path, end: str) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    words = [sys.executable, "-W", "ignore", str(script), end]
    rank = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    writer = psutil.Process(int(rank.stdout.readline()))
    try:
        if end == "killed":
            rank.kill()
            assert rank.wait(120) == -signal.SIGKILL
        else:
            assert rank.wait(120) == 0
        writer.wait(120)
    finally:
        rank.kill()
        if writer.is_running():
            writer.kill()
            pytest.fail("the process that writes checkpoints is left")


def test_the_state_of_a_step_that_is_to_be_repeated_is_loaded() -> None:
    """Upstream saves it with its class of a call, where it exits with status 16 and asks to be started again."""
    call = Call(Caller("a gradient is not finite", 1), 1)
    state = {
        "failed_validation_call": call,
        "initial_result": torch.tensor(torch.inf),
        "max_values": {call.caller: 1.0},
    }
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert load_object(file, "rerun_state_machine_state") == state
