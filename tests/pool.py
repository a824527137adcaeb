"""Fork the ranks of distributed tests from one warm process, so that a job starts in a fraction of a second.

    pool.run(2, "tests.distributed.jobs:all_reduce_of_ones")        # one result per rank

Starting Python, torch and Megatron costs about ten seconds; a fork server pays it once. Every job gets new processes,
so no global state of upstream (groups, arguments, timers) leaks from one test into the next, and a hung rank can be
killed.
"""

import contextlib
import importlib
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy
import torch

TAIL_LINES = 40


class RankFailure(RuntimeError):
    """A rank raised, died or hung; the message names the rank and holds its traceback or the end of its output."""


def _prepare(rank: int, world_size: int, port: int, log: Path) -> None:
    """Make this process look like one that torchrun started; everything it prints goes to `log`."""
    os.setsid()  # upstream's checkpoint writer spawns helpers: they are killed with their rank, as one group
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the parent's: no port can be lost between two processes
    }
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as torchrun's ranks have it; this one came from a fork server
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def _rank_main(
    connection: Connection, rank: int, world_size: int, port: int, log: Path, job: str, arguments: tuple[Any, ...]
) -> None:
    _prepare(rank, world_size, port, log)
    try:
        module, name = job.split(":")
        result = getattr(importlib.import_module(module), name)(*arguments)
        connection.send(("done", result))
    except BaseException:
        connection.send(("raised", traceback.format_exc()))
    finally:
        connection.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # what the job left behind (threads, groups of dead peers) must not keep the rank alive


class RankPool:
    """Runs jobs on N forked ranks.

    Args:
        logs: folder for the ranks' output, `jobNNN-rankR.log`.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.jobs = 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.warm"])

    def run(self, world_size: int, job: str | Callable[..., Any], *arguments: Any, timeout: float = 400.0) -> list[Any]:
        """Run `job(*arguments)` on every rank and return the results in rank order.

        Args:
            world_size: number of ranks.
            job: `module:function`, or a function at a module's top level; it finds torchrun's variables (RANK, ...) in
                its environment. Arguments and result must pickle.
            timeout: seconds for the whole job.

        Raises:
            RankFailure: a rank raised, died without an error message, or did not end in time; the others are killed.
        """
        name = job if isinstance(job, str) else f"{job.__module__}:{job.__qualname__}"
        self.jobs += 1
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = []
        for rank in range(world_size):
            here, there = self.context.Pipe()
            log = self.logs / f"job{self.jobs:03d}-rank{rank}.log"
            process = self.context.Process(
                target=_rank_main,
                args=(there, rank, world_size, store.port, log, name, arguments),
                daemon=False,
            )
            process.start()
            there.close()
            ranks.append((process, here, log))
        try:
            return self._collect(name, ranks, time.monotonic() + timeout)
        finally:
            for process, _, _ in ranks:
                _kill(process)

    def _collect(self, name: str, ranks: list[Any], deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        waiting = {connection: rank for rank, (_, connection, _) in enumerate(ranks)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(waiting.values())
                raise RankFailure(f"{name}: ranks {late} did not end in time.\n{_tail(ranks[late[0]][2])}")
            for connection in ready:
                rank = waiting.pop(connection)
                results[rank] = _result(name, rank, connection, ranks[rank][2])
        return [results[rank] for rank in range(len(ranks))]


def _kill(process: Any) -> None:
    """Kill a rank and all processes that it started, even if the rank itself has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _result(name: str, rank: int, connection: Any, log: Path) -> Any:
    try:
        kind, value = connection.recv()
    except EOFError:
        raise RankFailure(f"{name}: rank {rank} died without an error message.\n{_tail(log)}") from None
    if kind == "raised":
        raise RankFailure(f"{name}: rank {rank} raised\n{value}\n--- end of its output ({log}) ---\n{_tail(log)}")
    return value


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-TAIL_LINES:])
