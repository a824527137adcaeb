"""Parts of a slurm job that need no slurm: the meeting point, progress, and what the console shows."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.lib import meeting
from scripts.lib.follow import Follower
from scripts.lib.job import newest_iteration
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


def test_progress_is_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert newest_iteration(None) == newest_iteration(tmp_path / "absent") == newest_iteration(tmp_path) == -1
    (tmp_path / "iter_0000004").mkdir()
    assert newest_iteration(tmp_path) == -1, "a save that was interrupted has no metadata.json"
    (tmp_path / "iter_0000004/metadata.json").touch()
    assert newest_iteration(tmp_path) == 4
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for content, newest in (("6", 6), ("", 4), ("release", 4)):
        tracker.write_text(content)
        assert newest_iteration(tmp_path) == newest, content


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


def test_a_supervisor_that_was_asked_before_its_start_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    command = [sys.executable, str(ROOT / "scripts/lib/supervise.py"), "--start-dir", str(tmp_path), "--"]
    done = subprocess.run([*command, "sleep", "600"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0
    assert "asked to save and stop before the ranks had started" in done.stderr
