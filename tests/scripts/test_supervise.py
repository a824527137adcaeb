"""The end of a launch: which rank is blamed, signals, no process left. Real torchrun, ranks without torch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.lib.verdict import Failure, NodeEnd, culprit, describe, job_verdict, parse_failures
from tests.scripts.fakes import ROOT

# Stands for `python -m patches` in the folder of the run: this test is about processes, not about patches.
STAND_IN = """
import runpy, sys
if sys.argv[1] == "list":
    print("[]")
else:
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""

RANK = """
import os, signal, sys, time
rank = os.environ["RANK"]
if "late" in sys.argv:  # as a rank that imports torch and Megatron
    open(f"begun{rank}", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.01)
if "saves" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", rank, flush=True), sys.exit(0)))
if "saves-on-usr2" in sys.argv:
    signal.signal(signal.SIGUSR2, lambda *_: (print("saved", rank, flush=True), sys.exit(0)))
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "saves-slowly" in sys.argv:  # for longer than the launcher leaves to processes that it sweeps away
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(5), print("saved", rank, flush=True), sys.exit(0)))
with open(f"pid{rank}.new", "w") as out:
    out.write(str(os.getpid()))
os.rename(f"pid{rank}.new", f"pid{rank}")
if "boom" in sys.argv and rank == "1":
    while not os.path.exists("pid0"):  # or rank 0 is ended before it says who it is
        time.sleep(0.01)
    raise ValueError("bad batch")
while "chats" in sys.argv and not os.path.exists("go"):
    print("a line", flush=True)
    time.sleep(0.1)
if "chats" not in sys.argv:
    time.sleep(60)
"""


class Run:
    """launch.sh with two ranks."""

    def __init__(self, folder: Path, *words: str, before: tuple[str, ...] = (), console: int | None = None) -> None:
        self.folder = folder
        (folder / "patches").mkdir()
        (folder / "patches/__init__.py").touch()
        (folder / "patches/__main__.py").write_text(STAND_IN)
        (folder / "rank.py").write_text(RANK)
        options = ("--run-dir", "out")
        self.process = subprocess.Popen(
            [*before, "bash", str(ROOT / "scripts/launch.sh"), "--nproc", "2", *options, "--", "rank.py", *words],
            cwd=folder,
            env={**os.environ, "VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.DEVNULL if console is None else console,
            stderr=subprocess.PIPE if console is None else console,
            text=True,
            start_new_session=True,
        )

    def pids(self) -> list[int]:
        files = [self.folder / f"pid{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() for file in files))
        return [int(file.read_text()) for file in files]

    def saved(self) -> list[list[str]]:
        """The last two words of each rank's log."""
        logs = self.folder.glob("out/start-0/ranks/rank-*.log")
        return sorted(path.read_text().split()[-2:] for path in logs)

    def end(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=300)
        return self.process.returncode, err


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def nothing_left(pids: list[int]) -> None:
    wait_until(lambda: not any(alive(pid) for pid in pids))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*words: str, **options: Any) -> Run:
        runs.append(Run(tmp_path, *words, **options))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()


def test_a_killed_rank_is_named(start: Callable[..., Run]) -> None:
    run = start()
    pids = run.pids()
    os.kill(pids[1], signal.SIGKILL)
    status, err = run.end()
    assert status == 1
    assert f"launch: rank 1 (host {os.uname().nodename}, pid {pids[1]}) died of signal 9 (SIGKILL)" in err
    assert err.rstrip().endswith("no process is left")
    assert not any(map(alive, pids))


def test_a_failing_rank_is_named_with_its_last_words(start: Callable[..., Run]) -> None:
    run = start("boom")
    pids = run.pids()
    status, err = run.end()
    assert status == 1
    assert f"pid {pids[1]}) failed with exit code 1\n  its last words: ValueError: bad batch" in err
    assert "torch.distributed.elastic" not in err and "torch/distributed" not in err
    (log,) = run.folder.glob("out/start-0/ranks/rank-00001-*.log")
    assert f"its log: {log}" in err
    assert not any(map(alive, pids))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_all(start: Callable[..., Run], signum: signal.Signals) -> None:
    run = start()
    pids = run.pids()
    run.process.send_signal(signum)
    status, err = run.end()
    assert status == 128 + signum
    assert f"stopped by signal {signum.value}" in err
    assert not any(map(alive, pids))


@pytest.mark.parametrize("inherited", [(), ("LOCAL_RANK", "RANK", "WORLD_SIZE")], ids=["", "below-a-rank"])
def test_usr1_lets_the_ranks_save(
    start: Callable[..., Run], inherited: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in inherited:
        monkeypatch.setenv(name, "7")
    run = start("saves")
    pids = run.pids()
    run.process.send_signal(signal.SIGUSR1)
    status, err = run.end()
    assert status == 0, err
    assert run.saved() == [["saved", "0"], ["saved", "1"]]
    assert not any(map(alive, pids))


@pytest.mark.parametrize(
    ("word", "signum", "status"), [("saves-slowly", signal.SIGTERM, 128 + signal.SIGTERM), ("chats", 0, 0)]
)
def test_a_console_that_is_gone_changes_nothing(start: Callable[..., Run], word: str, signum: int, status: int) -> None:
    reader, writer = os.pipe()
    run = start(word, console=writer)
    os.close(writer)
    run.pids()
    os.close(reader)  # everything that is written from now on fails
    time.sleep(1)
    if signum:
        run.process.send_signal(signum)
    (run.folder / "go").touch()
    assert run.end()[0] == status
    assert run.saved() == ([["saved", "0"], ["saved", "1"]] if signum else [["a", "line"]] * 2)
    (end,) = run.folder.glob("out/start-0/nodes/*.json")
    assert json.loads(end.read_text())["status"] == status


def test_a_hangup_that_nohup_ignores_is_ignored(start: Callable[..., Run]) -> None:
    run = start(before=("nohup",))
    pids = run.pids()
    run.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert run.process.poll() is None and all(map(alive, pids))
    run.process.send_signal(signal.SIGTERM)
    status, err = run.end()
    assert status == 128 + signal.SIGTERM and "SIGHUP" not in err, err


def test_a_record_that_cannot_be_written_hides_nothing(start: Callable[..., Run]) -> None:
    run = start()
    pids = run.pids()
    shutil.rmtree(run.folder / "out/start-0/nodes")
    os.kill(pids[1], signal.SIGKILL)
    status, err = run.end()
    assert status == 1 and f"pid {pids[1]}) died of signal 9 (SIGKILL)" in err, err
    assert ".json cannot be written: No such file or directory" in err


def test_ranks_are_asked_when_they_can_save(start: Callable[..., Run]) -> None:
    run = start("late", "saves", "--exit-signal-handler")
    wait_until(lambda: all((run.folder / f"begun{rank}").exists() for rank in range(2)))
    run.process.send_signal(signal.SIGUSR1)
    time.sleep(1)  # ten times as long as the launcher needs to find the request
    (run.folder / "go").touch()
    status, err = run.end()
    assert status == 0, err
    assert err.count("asked to save and stop while the ranks start") == 1
    assert err.count("asking 2 rank(s) to save and stop") == 1
    assert run.saved() == [["saved", "0"], ["saved", "1"]]


@pytest.mark.parametrize("flag", [("--exit-signal", "SIGUSR2"), ("--exit-signal=SIGUSR2",)])
@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_get_the_signal_on_which_they_save(
    start: Callable[..., Run], flag: tuple[str, ...], signum: signal.Signals
) -> None:
    run = start("saves-on-usr2", "--exit-signal-handler", *flag)
    pids = run.pids()
    run.process.send_signal(signum)
    status, err = run.end()
    assert status == (0 if signum == signal.SIGUSR1 else 128 + signum), err
    assert run.saved() == [["saved", "0"], ["saved", "1"]]
    assert not any(map(alive, pids))


def test_a_machine_that_waits_says_so(start: Callable[..., Run]) -> None:
    """Where several machines without slurm have entered a start, folders.sh looks at the age of this file."""
    run = start()
    run.pids()
    entered = run.folder / "out/start-0/machines" / os.uname().nodename
    entered.parent.mkdir()
    entered.touch()
    os.utime(entered, (1000, 1000))
    wait_until(lambda: entered.stat().st_mtime > 1000, seconds=30)
    run.process.send_signal(signal.SIGTERM)
    run.end()


def test_killing_torchrun_leaves_no_rank(start: Callable[..., Run]) -> None:
    run = start()
    pids = run.pids()
    os.kill(parent(pids[0]), signal.SIGKILL)
    status, err = run.end()
    assert status == 1
    assert "torchrun itself died of signal 9" in err and err.rstrip().endswith("no process is left")
    assert not any(map(alive, pids))


def test_killing_the_keeper_leaves_no_rank(start: Callable[..., Run]) -> None:
    run = start("deaf")
    pids = run.pids()
    os.kill(parent(parent(pids[0])), signal.SIGKILL)
    status, err = run.end()
    assert status == 1
    assert "the keeper of torchrun died of signal 9" in err
    assert not any(map(alive, pids))


def test_ranks_that_ignore_term_are_killed_in_time(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSEQ_STOP_SECONDS", "1")
    run = start("deaf")
    pids = run.pids()
    run.process.send_signal(signal.SIGTERM)
    run.process.send_signal(signal.SIGTERM)  # schedulers send it several times
    status, err = run.end()
    assert status == 128 + signal.SIGTERM, err
    assert not any(map(alive, pids))


def test_killing_the_supervisor_leaves_no_rank(start: Callable[..., Run]) -> None:
    run = start("deaf")
    pids = run.pids()
    run.process.kill()
    run.process.wait()
    nothing_left(pids)


# Whom to blame, from torchrun's words --------------------------------------------------------------------------------


def entry(rank: int, exitcode: int, pid: int) -> list[str]:
    return [
        f"[{rank}]:",
        "  time      : 2026-01-01_00:00:00",
        f"  rank      : {rank} (local_rank: {rank})",
        f"  exitcode  : {exitcode} (pid: {pid}) (SIGX)",
        "  error_file: <N/A>",
        "  traceback : rank : 9 (local_rank: 9)",
    ]


def table(root: list[str], *others: list[str]) -> list[str]:
    listed = [line for other in others for line in other]
    return ["train FAILED", "Failures:", *listed, "Root Cause (first observed failure):", *root]


def blamed(lines: list[str]) -> int:
    found = culprit(parse_failures(lines))
    assert found is not None
    return found.rank


def test_a_survivor_that_failed_in_the_same_second_is_not_blamed() -> None:
    assert blamed(table(entry(0, 1, 100), entry(1, -9, 101))) == 1


def test_a_rank_that_torchrun_had_to_kill_is_not_blamed() -> None:
    lines = ["W [1] Sending process 100 closing signal SIGTERM", *table(entry(1, 1, 101), entry(0, -9, 100))]
    assert blamed(lines) == 1


def test_an_aborting_watchdog_is_blamed_only_as_root() -> None:
    assert blamed(table(entry(2, -11, 102), entry(0, -6, 100))) == 2
    assert blamed(table(entry(0, -6, 100), entry(2, -11, 102))) == 2
    assert blamed(table(entry(0, -6, 100), entry(2, 1, 102))) == 0


def test_the_others_are_mentioned() -> None:
    failures = [Failure(0, 10, -9, True, False), Failure(1, 11, 1, False, False), Failure(2, 12, -15, False, True)]
    assert "ranks [1] failed after it or with it" in describe(failures[0], failures)


def test_a_rank_that_complains_about_its_peer_is_not_blamed() -> None:
    lost = Failure(0, 10, 1, True, False, seconds=5, last_lines=["RuntimeError: Connection closed by peer [::1]:5"])
    assert culprit([lost, Failure(1, 11, 1, False, False, seconds=6, last_lines=["ValueError: bad batch"])]).rank == 1  # type: ignore[union-attr]


# The verdict of a job on several nodes -------------------------------------------------------------------------------


def failed(host: str, at: float, *failures: Failure) -> NodeEnd:
    return NodeEnd(host, 1, ended_at=at, message=f"{host} failed", failures=list(failures))


def stopped(host: str, at: float, *failures: Failure) -> NodeEnd:
    return NodeEnd(host, 143, stopped_by=15, stopped_at=at, ended_at=at + 1, failures=list(failures))


def test_the_node_that_failed_is_blamed_not_the_ones_that_were_stopped_because_of_it() -> None:
    ends = [
        stopped("a", 11.0, Failure(0, 1, -9, True, False, "a")),
        failed("b", 10.0, Failure(3, 7, 1, True, False, "b")),
    ]
    status, message = job_verdict(ends)
    assert status == 1 and message.startswith("rank 3 (host b, pid 7) failed with exit code 1"), message


def test_a_late_clock_does_not_hide_a_failure() -> None:
    # Node a was stopped because of b, but its clock is late.
    lost = Failure(0, 1, 1, True, False, "a", last_lines=["RuntimeError: Connection closed by peer [::1]:5"])
    ends = [stopped("a", 9.0, lost), failed("b", 10.0, Failure(3, 7, 1, True, False, "b"))]
    assert job_verdict(ends)[1].startswith("rank 3 (host b, pid 7) failed with exit code 1")
    assert job_verdict([stopped("a", 9.0), failed("b", 10.0)]) == (1, "b: b failed")
    # A node that only lost its peer is not the cause, even if it names a rank and the cause does not.
    assert job_verdict([failed("a", 9.0, lost), failed("b", 10.0)]) == (1, "b: b failed")


def test_nodes_that_were_stopped_first_were_stopped_from_outside() -> None:
    lost = Failure(3, 7, 1, True, False, "b", last_lines=["RuntimeError: Connection closed by peer [::1]:5"])
    status, message = job_verdict([stopped("a", 9.0), failed("b", 10.0, lost)])
    assert (status, message) == (143, "stopped by signal 15 (SIGTERM)")


def test_a_node_without_a_rank_to_blame_speaks_for_itself() -> None:
    assert job_verdict([failed("b", 10.0), NodeEnd("a", 0)]) == (1, "b: b failed")
    assert job_verdict([NodeEnd("a", 0), NodeEnd("b", 0)]) == (0, "")
