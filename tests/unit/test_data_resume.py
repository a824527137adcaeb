"""A run that is killed at any time leaves no partial output, resumes, and gives bitwise the same result."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron.longseq.data import manifest, write
from megatron.longseq.data.__main__ import main

SUFFIXES = (".bin", ".idx", ".json")


def corpus(path: Path, documents: int = 300, size: int = 400) -> Path:
    rng = random.Random(0)
    path.write_text("".join(json.dumps({"text": rng.randbytes(size).hex()}) + "\n" for _ in range(documents)))
    return path


def arguments(path: Path, out: Path, *options: str) -> list[str]:
    return ["prepare", str(path), "--output", str(out), "--shard-mb", "0.1", "--shuffle-seed", "3", *options]


def contents(prefix: Path) -> list[bytes]:
    """Return the three files; what names the prefix itself is left out of the manifest."""
    record = json.loads(Path(f"{prefix}.json").read_text())
    del record["flags"]
    return [*(Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")), json.dumps(record).encode()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_when(command: list[str], reached) -> None:
    """Start the command line in a process, `kill -9` it as soon as `reached()`, and wait until its workers are gone."""
    process = subprocess.Popen([sys.executable, "-m", "megatron.longseq.data", *command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=300)
    assert not alive, "workers outlive their killed parent"


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_killed_in_the_middle_it_goes_on_from_the_finished_shards(tmp_path, capsys, workers):
    path = corpus(tmp_path / "in.jsonl", documents=20_000)
    work = tmp_path / "out/.out.unfinished"
    command = arguments(path, tmp_path / "out/out", "--workers", workers)
    kill_when(command, lambda: len(list(work.glob("*.npz"))) >= 5)
    assert names(tmp_path / "out") == [".out.unfinished"]
    done = {record: record.stat().st_mtime_ns for record in work.glob("*.npz")}
    # What a power cut leaves: a token file shorter than its record says. It must be made again.
    damaged = sorted(work.glob("*.tokens"))[0]
    os.truncate(damaged, 10)
    monitored = []
    original, write.merge = write.merge, lambda *a: monitored.append(dict(done_again(done))) or original(*a)
    try:
        assert main(command) == 0
    finally:
        write.merge = original
    assert monitored == [{record: record.stem == damaged.stem for record in done}]
    assert f"resuming, {len(done) - 1} of" in capsys.readouterr().out
    assert main(arguments(path, tmp_path / "whole")) == 0
    assert contents(tmp_path / "out/out") == contents(tmp_path / "whole")
    assert names(tmp_path / "out") == ["out.bin", "out.idx", "out.json"]


def done_again(done: dict[Path, int]):
    return ((record, record.stat().st_mtime_ns != time_ns) for record, time_ns in done.items())


def test_killed_while_merging_it_leaves_nothing_under_the_final_name(tmp_path):
    path = corpus(tmp_path / "in.jsonl", documents=30_000, size=20)
    command = arguments(path, tmp_path / "out/out", "--workers", "1")
    kill_when(command, (tmp_path / "out/.out.unfinished/out.bin").exists)
    assert names(tmp_path / "out") == [".out.unfinished"]
    assert main(command) == 0
    assert main(arguments(path, tmp_path / "whole")) == 0
    assert contents(tmp_path / "out/out") == contents(tmp_path / "whole")


class ProcessKilled(BaseException):
    """Stands for the end of the process: nothing in the product may catch it."""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("step", range(7))
def test_stopped_at_any_step_of_publishing_no_pair_is_mixed_and_the_next_run_ends_it(
    tmp_path, monkeypatch, overwrite, step
):
    old, path = corpus(tmp_path / "old.jsonl", 20), corpus(tmp_path / "in.jsonl", 50)
    out, whole = tmp_path / "made/out", tmp_path / "whole"
    assert main(arguments(path, whole)) == 0
    before = None
    if overwrite:
        assert main(arguments(old, out)) == 0
        before = contents(out)[:2]
    real_publish, real_replace, real_unlink, real_rmtree = write.publish, os.replace, Path.unlink, write.shutil.rmtree
    budget = [step]

    def counted(real):
        def act(*args, **kwargs):
            if budget[0] == 0:
                raise ProcessKilled
            budget[0] -= 1
            return real(*args, **kwargs)

        return act

    def dying_publish(folder, prefix):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(real_replace))
            patch.setattr(Path, "unlink", counted(real_unlink))
            patch.setattr(write.shutil, "rmtree", counted(real_rmtree))
            real_publish(folder, prefix)

    with monkeypatch.context() as patch:
        patch.setattr("megatron.longseq.data.write.publish", dying_publish)
        with pytest.raises(ProcessKilled):
            main(arguments(path, out, *(["--overwrite"] if overwrite else [])))
    pair = [Path(f"{out}{suffix}") for suffix in (".bin", ".idx")]
    if all(file.exists() for file in pair):
        assert [file.read_bytes() for file in pair] in (before, contents(whole)[:2])
    # No second --overwrite: the consent of the run that began to publish holds.
    if Path(f"{out}.json").exists() and manifest.read(str(out))["inputs"]["bytes"] == old.stat().st_size:
        assert contents(out)[:2] == before
    assert main(arguments(path, out)) == 0
    assert contents(out) == contents(whole)
    assert names(tmp_path / "made") == ["out.bin", "out.idx", "out.json"]


def test_a_finished_output_is_skipped_and_changes_are_named(tmp_path, capsys):
    path, out = corpus(tmp_path / "in.jsonl"), tmp_path / "out"
    assert main(arguments(path, out)) == 0
    before = [Path(f"{out}{suffix}").stat().st_mtime_ns for suffix in SUFFIXES]
    capsys.readouterr()
    # Neither the number of workers nor the size of the shards is part of what the output is.
    assert main([*arguments(path, out, "--workers", "2"), "--shard-mb", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: nothing to do, it was made from the same inputs, options and tokenizer"
    ]
    (tmp_path / "more.jsonl").write_text('{"text": "x"}')
    os.utime(path, ns=(5, 5))
    changed = [*arguments(path, out), "--no-append-eod", "--shuffle-seed", "4"]
    changed.insert(1, str(tmp_path / "more.jsonl"))
    assert main(changed) == 1
    message = capsys.readouterr().err
    assert "options.append_eod: True -> False" in message and "options.shuffle_seed: 3 -> 4" in message
    assert (
        f"1 new inputs: {tmp_path}/more.jsonl" in message and f"1 inputs with another size or time: {path}" in message
    )
    assert [Path(f"{out}{suffix}").stat().st_mtime_ns for suffix in SUFFIXES] == before
    # Upstream's cached sample indices do not depend on the data's content: they must go with the old data.
    cached = out / "cache/GPTDataset_indices"
    cached.mkdir(parents=True)
    assert main([*changed, "--overwrite"]) == 0
    assert manifest.read(str(out))["documents"] == 301
    assert not cached.exists()


def test_files_of_unknown_origin_are_kept(tmp_path, capsys):
    path, out = corpus(tmp_path / "in.jsonl"), tmp_path / "out"
    Path(f"{out}.bin").write_bytes(b"precious")
    assert main(arguments(path, out)) == 1
    assert "exists without a manifest" in capsys.readouterr().err
    assert Path(f"{out}.bin").read_bytes() == b"precious"
    assert main(arguments(path, out, "--overwrite")) == 0


def test_unfinished_work_of_other_options_is_not_used(tmp_path, capsys):
    path = corpus(tmp_path / "in.jsonl", documents=20_000)
    work = tmp_path / "out/.out.unfinished"
    kill_when(arguments(path, tmp_path / "out/out"), lambda: len(list(work.glob("*.npz"))) >= 2)
    assert main(arguments(path, tmp_path / "out/out", "--no-append-eod")) == 0
    assert "removing unfinished work" in capsys.readouterr().out
    assert manifest.read(str(tmp_path / "out/out"))["tokens"] == 20_000 * 800


def test_two_runs_at_once_full_disk_and_changing_inputs_are_refused(tmp_path, capsys, monkeypatch):
    path, out = corpus(tmp_path / "in.jsonl"), tmp_path / "made/out"
    work = tmp_path / "made/.out.unfinished"
    work.mkdir(parents=True)
    handle = os.open(work, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert main(arguments(path, out)) == 1
    os.close(handle)
    assert "another run is using" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 1000})
        patch.setattr("megatron.longseq.data.prepare.shutil.disk_usage", lambda _: usage)
        assert main(arguments(path, out)) == 1
    assert "GB are needed" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("megatron.longseq.data.prepare.changed_files", lambda _: [str(path)])
        assert main(arguments(path, out)) == 1
    assert f"1 inputs changed while they were read ({path})" in capsys.readouterr().err
    assert names(tmp_path / "made") == []
    assert main(arguments(path, out)) == 0
