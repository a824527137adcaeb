"""Parts of a slurm job that need no slurm: the meeting point, requeues, and what the console shows."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.lib import meeting, output
from scripts.lib.follow import Follower
from scripts.lib.job import checkpoints
from scripts.lib.rank import log_name
from tests.scripts.fakes import ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_other_nodes_reach_the_first_one() -> None:
    port = free_port()
    server = meeting.check("127.0.0.1", port, node=0)
    assert isinstance(server, socket.socket)
    with server:
        client = meeting.check("127.0.0.1", port, node=1)
        assert isinstance(client, socket.socket)
        client.close()
        with socket.socket() as torchrun:
            torchrun.bind(("127.0.0.1", port))  # it stays free for torchrun


def test_the_store_of_another_machine_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSEQ_MEETING_SECONDS", "0.1")
    port = free_port()
    assert meeting.check_store("127.0.0.1", port) == "", "the first machine opens the store itself"
    assert "no.such.host.invalid does not resolve" in meeting.check_store("no.such.host.invalid", port)
    monkeypatch.setattr(meeting, "_is_of_this_machine", lambda family, address: False)
    assert f"127.0.0.1) cannot be reached at port {port} within 0 s" in meeting.check_store("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        assert meeting.check_store("127.0.0.1", port) == ""


def test_a_first_node_with_an_ipv6_address() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    assert meeting.split("[::1]:2000") == ("::1", 2000)
    port = free_port()
    server = meeting.check("::1", port, node=0)
    assert isinstance(server, socket.socket)
    with server:
        client = meeting.check("::1", port, node=1)
        assert isinstance(client, socket.socket)
        client.close()


def test_a_meeting_point_that_cannot_serve_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSEQ_MEETING_SECONDS", "0.1")
    assert "no.such.host.invalid does not resolve" in str(meeting.check("no.such.host.invalid", 1234, node=1))
    port = free_port()
    assert f"cannot be reached at port {port + 1} within 0 s" in str(meeting.check("127.0.0.1", port, node=1))
    with socket.create_server(("", 0)) as other:
        taken = other.getsockname()[1]
        assert f"port {taken} of this node cannot be used" in str(meeting.check("127.0.0.1", taken, node=0))


def test_a_checkpoint_is_complete_when_its_metadata_is_written(tmp_path: Path) -> None:
    assert checkpoints(None) == checkpoints(tmp_path / "absent") == checkpoints(tmp_path) == {}
    (tmp_path / "iter_0000004").mkdir()
    assert checkpoints(tmp_path) == {}, "a save that was interrupted has no metadata.json"
    (tmp_path / "iter_0000004/metadata.json").touch()
    assert set(checkpoints(tmp_path)) == {4}
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for content, found in (("6", {4, 6}), ("", {4}), ("release", {4})):
        tracker.write_text(content)
        assert set(checkpoints(tmp_path)) == found, content


# Requeues: a Python program in the place of srun does what the nodes would do -----------------------------------------

NODES = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from scripts.lib.verdict import Failure, NodeEnd
def save(step):
    folder = Path("save", f"iter_{{step:07d}}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text("of this start")
    Path("save/latest_checkpointed_iteration.txt").write_text(str(step))
def log(*lines):
    Path("start-0/ranks/rank-00000-n1.log").write_text("".join(f"{{line}}\\n" for line in lines))
def end(status=0, *failures, **values):
    NodeEnd("n1", status, ended_at=1.0, failures=list(failures), **values).write(Path("start-0/nodes/n1.json"))
    sys.exit(status)
def asked():
    Path("start-0/stop").touch()
asked()
"""
# A checkpoint that was saved is a metadata.json of another time.
OLD_NS = 10**18


class Job:
    """job.py in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("start-0/ranks", "start-0/nodes", "bin"):
            (folder / name).mkdir(parents=True)
        (folder / "bin/scontrol").write_text("#!/bin/sh\ntouch requeued\n")
        (folder / "bin/scontrol").chmod(0o755)

    def has_saved(self, *steps: int) -> None:
        """Checkpoints that are there before the start; the last one is the newest by its date."""
        for step in steps:
            file = self.folder / f"save/iter_{step:07d}/metadata.json"
            file.parent.mkdir(parents=True)
            file.touch()
            os.utime(file, ns=(OLD_NS, OLD_NS))
            (self.folder / "save/latest_checkpointed_iteration.txt").write_text(str(step))

    def start(self, program: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[str]":
        words = [sys.executable, str(ROOT / "scripts/lib/job.py"), "--start-dir", "start-0", "--max-requeues", "3"]
        return subprocess.Popen(
            [*words, "--save", "save", "--", sys.executable, "-c", NODES.format(root=str(ROOT)) + program],
            cwd=self.folder,
            env={**os.environ, "SLURM_JOB_ID": "7", "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"},
            stdout=stdout,
            text=True,
        )

    def run(self, program: str) -> tuple[int, str, bool]:
        """Return its status, what it printed, and whether it was requeued."""
        job = self.start(program)
        said, _ = job.communicate(timeout=120)
        is_requeued = (self.folder / "requeued").exists()
        outcome = json.loads((self.folder / "start-0/job.json").read_text())["outcome"]
        assert outcome == ("requeued" if is_requeued else "ended")
        return job.returncode, said, is_requeued


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_progress_is_what_was_saved_since_the_start(job: Job) -> None:
    job.has_saved(300, 200)  # the run went back from 300 to 200
    _, said, is_requeued = job.run("end(is_asked=True)")
    assert not is_requeued and "this start has saved no checkpoint" in said
    _, said, is_requeued = job.run("save(250); end(is_asked=True)")
    assert is_requeued and "requeued to continue at iteration 250" in said


def test_a_checkpoint_that_was_saved_again_is_progress(job: Job) -> None:
    job.has_saved(200, 300)
    _, said, is_requeued = job.run("save(300); end(is_asked=True)")
    assert is_requeued and "requeued to continue at iteration 300" in said


FAILED = "save(4); end(1, Failure(2, 11, 1, True, False, 'n1', last_lines=['ValueError: bad batch']), is_asked=True)"
DIED_OF_TERM = "save(4); end(1, Failure(2, 11, -15, True, False, 'n1'), is_asked=True)"
AT_THE_END = "Path('start-0/arguments.json').write_text('{\"train_iters\": 4}'); save(4); "
EARLY = AT_THE_END + "log('exiting program after receiving SIGTERM.'); end(is_asked=True)"


@pytest.mark.parametrize(
    ("program", "status", "words", "is_requeued"),
    [
        (FAILED, 1, "rank 2 (host n1, pid 11) failed with exit code 1", False),
        (DIED_OF_TERM, 1, "requeued to continue at iteration 4", True),
        ("save(4); end(is_asked=True)", 0, "requeued to continue at iteration 4", True),
        ("save(4); end(is_asked=False)", 0, "the training has ended", False),
        (AT_THE_END + "log('done'); end(is_asked=True)", 0, "the training has ended", False),
        (EARLY, 0, "requeued to continue at iteration 4", True),  # its last evaluation is left
        ("sys.exit(3)", 3, "srun ended with status 3, and no node has said how it ended", False),
    ],
    ids=["failed", "died-of-term", "saved", "never-asked", "at-the-end", "before-its-evaluation", "no-node"],
)
def test_a_job_that_was_asked_is_requeued_only_if_something_is_left(
    job: Job, program: str, status: int, words: str, is_requeued: bool
) -> None:
    found = job.run(program)
    assert (found[0], found[2]) == (status, is_requeued) and words in found[1], found


def test_a_full_disk_does_not_keep_a_job_from_asking(job: Job) -> None:
    with open("/dev/full", "w") as full:
        begin = "Path('start-0/stop').unlink(); Path('ready').touch(); time.sleep(2)"
        process = job.start(f"{begin}; Path('start-0/nodes/n1.log').touch(); time.sleep(60)", full.fileno())
    wait_for((job.folder / "ready").exists)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 128 + signal.SIGUSR1, "the end of the program in the place of srun"
    assert (job.folder / "start-0/stop").exists()
    log = job.folder / "start-0/nodes/n1.log"
    assert log.exists(), "srun gets the signal when the supervisor is there: it would end the creation of a container"


def test_a_requeue_that_slurm_refuses_is_explained(job: Job) -> None:
    (job.folder / "bin/scontrol").write_text("#!/bin/sh\necho disabled >&2\nexit 1\n")
    status, said, _ = job.run("save(4); end(is_asked=True)")
    assert status == 0 and "not requeued: slurm refuses it (disabled); a batch script needs #SBATCH --requeue" in said


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# The console ---------------------------------------------------------------------------------------------------------


def test_a_console_that_nobody_reads_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as console:
        assert output.write(console, b"x" * 10_000) and os.read(reader, 20_000) == b"x" * 10_000
        assert not output.write(console, b"x" * 10**6, seconds=0.1)
        monkeypatch.setattr(sys, "stdout", console)
        follower = Follower(tmp_path, "n1", {0}, has_host=False)
        (tmp_path / log_name(0, "n1")).write_text("a line\n")
        follower.start()
        follower.finish(lambda: True)
        assert follower.is_alive()
        assert os.read(reader, 1 << 20)
        follower.finish()
        assert not follower.is_alive()
        os.close(reader)
        assert not output.write(console, b"x")
    assert not output.write(console, b"x") and not output.write(None, b"x")


def test_the_console_shows_whole_lines_of_the_first_and_the_last_rank(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    follower = Follower(tmp_path, "n1", {0, 3}, has_host=True)
    (tmp_path / log_name(2, "n1")).write_text("another rank\n")
    (tmp_path / log_name(0, "n2")).write_text("another node\n")
    file = tmp_path / log_name(3, "n1")
    file.write_text("one\ntw")
    follower.copy()
    assert capfdbinary.readouterr().out == b"[rank3 n1]:one\n"
    with file.open("a") as stream:
        stream.write("o\n[rank3]: Traceback")
    follower.start()
    follower.finish()
    assert capfdbinary.readouterr().out == b"[rank3 n1]:two\n[rank3 n1]:Traceback\n"


def test_a_rank_writes_its_own_file_and_keeps_its_status(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts/lib/rank.py"),
        str(tmp_path),
        "bash",
        "-c",
        "echo hi; echo no >&2; exit 7",
    ]
    done = subprocess.run(command, env={"RANK": "12", "PATH": "/usr/bin:/bin", "SLURMD_NODENAME": "n9"}, check=False)
    assert done.returncode == 7
    assert (tmp_path / "rank-00012-n9.log").read_text() == "hi\nno\n"


RANK = """
import pathlib, signal, sys, time
time.sleep(1)
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("saved").touch(), sys.exit()))
time.sleep(60)
"""


def test_ranks_that_were_asked_before_their_start_save(tmp_path: Path) -> None:
    """Other nodes may have started theirs before the request, and would wait for them."""
    (tmp_path / "stop").touch()
    torchrun = ["bash", "-c", 'LOCAL_RANK=0 "$@"', "torchrun", sys.executable, "-c", RANK, "--exit-signal-handler"]
    command = [sys.executable, str(ROOT / "scripts/lib/supervise.py"), "--start-dir", str(tmp_path), "--", *torchrun]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and (tmp_path / "saved").exists(), done.stderr
    assert "they are asked as soon as they can save" in done.stderr
