"""A two-node cluster on one machine: two network namespaces, a cable between them, and every link as slow as asked.

Ranks of a node talk over its loopback, ranks of two nodes over a veth pair; a token bucket (`tc tbf`) paces what leaves
by each. Both are shared by a node's ranks, as a switch and a network card are. Linux sends what goes to an address of
the same namespace over the loopback, so gloo needs to know one interface only.

It takes root, `ip` and `tc`. What a bed makes goes with it, whatever ends it; what a killed one left, with the next.
"""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.pool import RankPool

NODES = 2
CABLE = "cable0"  # the name of the veth in each node
PREFIX = "longseq"
PORT = 29500

# Bytes that a link may send at once after a rest: little beside a message, yet more than the largest packet, or nothing
# leaves. Smaller packets on the slow link keep its rest short.
CABLE_PACKET, CABLE_BURST = 32 * 1024, 40 * 1024
LOOPBACK_BURST = 72 * 1024
CABLE_MTU = 9000
QUEUE = 64 * 2**20  # bytes that wait for a link; more than ranks can have under way, so nothing is dropped

# Congestion control that does not pace by guesses of its own, and forgets nothing while a link rests.
SETTINGS = {"tcp_congestion_control": "reno", "tcp_slow_start_after_idle": "0", "tcp_no_metrics_save": "1"}


class BedError(RuntimeError):
    """The bed cannot be made here, or is not what it was asked to be; the message says why and what to do."""


@dataclass(frozen=True)
class Rates:
    """Bytes per second of one node's links, each way; its ranks share them.

    Attributes:
        between: of the cable to the other node.
        inside: of the loopback.
    """

    between: float
    inside: float

    def __post_init__(self) -> None:
        if not (self.between > 0 and self.inside > 0):
            raise ValueError(f"links of {self.between} and {self.inside} bytes/s: give speeds")

    def of_rank(self, ranks: int) -> "Rates":
        """Return a rank's share, where so many of a node send at once."""
        return Rates(self.between / ranks, self.inside / ranks)

    def off(self, asked: "Rates") -> float:
        """Return by which share the worse of the two differs from what was asked."""
        return max(abs(self.between / asked.between - 1), abs(self.inside / asked.inside - 1))


@dataclass(frozen=True)
class Node:
    """One namespace.

    Attributes:
        name: of the namespace.
        address: of its end of the cable.
    """

    name: str
    address: str


def nodes(owner: int) -> tuple[Node, ...]:
    """Return the nodes of a process's bed."""
    return tuple(Node(f"{PREFIX}-{owner}-{number}", f"10.77.0.{number + 1}") for number in range(NODES))


def commands(pair: Sequence[Node], rates: Rates) -> list[list[str]]:
    """Return the command lines that make a bed."""
    lines = [["ip", "netns", "add", node.name] for node in pair]
    ends = [["name", CABLE, "netns", node.name] for node in pair]
    lines.append(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]])
    for node in pair:
        within = ["ip", "-n", node.name]
        lines += [
            ["ip", "netns", "exec", node.name, "sysctl", "-qw", f"net.ipv4.{key}={SETTINGS[key]}"] for key in SETTINGS
        ]
        lines += [
            [*within, "address", "add", f"{node.address}/24", "dev", CABLE],
            [*within, "link", "set", "dev", CABLE, "mtu", str(CABLE_MTU), "gso_max_size", str(CABLE_PACKET), "up"],
            [*within, "link", "set", "dev", "lo", "up"],
            pacing(node, CABLE, rates.between, CABLE_BURST),
            pacing(node, "lo", rates.inside, LOOPBACK_BURST),
        ]
    return lines


def pacing(node: Node, device: str, rate: float, burst: int) -> list[str]:
    """Return the command line that paces what leaves by a device."""
    bits = f"{round(rate * 8)}bit"
    bucket = ["tbf", "rate", bits, "burst", str(burst), "limit", str(QUEUE)]
    return ["tc", "-n", node.name, "qdisc", "replace", "dev", device, "root", *bucket]


def removal(names: Sequence[str]) -> list[list[str]]:
    """Return the command lines that remove namespaces, and with them their links."""
    return [["ip", "netns", "delete", name] for name in names]


def abandoned(names: Sequence[str], is_alive: Callable[[int], bool]) -> list[str]:
    """Return which namespaces belong to beds whose process is gone."""
    owners = {name: re.fullmatch(rf"{PREFIX}-(\d+)-\d+", name) for name in names}
    return [name for name, owner in owners.items() if owner and not is_alive(int(owner[1]))]


def sent(statistics: str) -> int:
    """Return the bytes that have left by a device, from `ip -s -j link show`."""
    return int(json.loads(statistics)[0]["stats64"]["tx"]["bytes"])


@dataclass(frozen=True)
class Counters:
    """Bytes that have left by each link, per node, with packets' headers."""

    between: tuple[int, ...]
    inside: tuple[int, ...]

    def since(self, before: "Counters") -> "Counters":
        """Return what has left since."""
        return Counters(
            tuple(a - b for a, b in zip(self.between, before.between, strict=True)),
            tuple(a - b for a, b in zip(self.inside, before.inside, strict=True)),
        )


class Bed:
    """A made bed: runs jobs on its ranks, and says what its links have carried.

    Args:
        pool: where ranks come from.
        pair: its nodes.
        rates: of their links.
        ranks: of each node; the first are the first node's.
    """

    def __init__(self, pool: RankPool, pair: Sequence[Node], rates: Rates, ranks: int) -> None:
        self.pool, self.pair, self.rates, self.ranks = pool, tuple(pair), rates, ranks
        self.jobs = 0

    @property
    def world_size(self) -> int:
        """Return the ranks of both nodes."""
        return self.ranks * len(self.pair)

    def run(self, job: Callable[..., Any], *arguments: Any, timeout: float = 600.0) -> list[Any]:
        """Run `job(*arguments)` on every rank and return the results in rank order; see `RankPool.run`."""
        self.jobs += 1
        name = f"{job.__module__}:{job.__qualname__}"
        place = (self.pair, self.ranks, PORT + self.jobs)
        return self.pool.run(self.world_size, run_in_node, place, name, arguments, timeout=timeout)

    def counters(self) -> Counters:
        """Return what has left by the links until now."""

        def read(device: str) -> tuple[int, ...]:
            return tuple(sent(_run(["ip", "-n", n.name, "-s", "-j", "link", "show", "dev", device])) for n in self.pair)

        return Counters(read(CABLE), read("lo"))


def run_in_node(place: tuple[tuple[Node, ...], int, int], name: str, arguments: tuple[Any, ...]) -> Any:
    """Enter this rank's node, set the environment that a launcher would set there, and run `module:function`.

    Args:
        place: nodes, ranks of each, the port of the first rank's store.
        name: the function.
        arguments: of it.
    """
    pair, ranks, port = place
    rank = int(os.environ["RANK"])
    with open(f"/run/netns/{pair[rank // ranks].name}") as namespace:
        os.setns(namespace.fileno(), os.CLONE_NEWNET)
    os.environ |= {
        "LOCAL_RANK": str(rank % ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": pair[0].address,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": CABLE,
    }
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]  # the pool is in neither node: the first rank keeps the store
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)(*arguments)


@contextlib.contextmanager
def two_nodes(pool: RankPool, rates: Rates, ranks: int = 2) -> Iterator[Bed]:
    """Make a bed, and remove it at the end, whatever that is.

    Args:
        pool: where ranks come from.
        rates: of the links.
        ranks: of each node.

    Raises:
        BedError: not root, no `ip` or `tc`, or one of them fails.
    """
    refuse_unable(os.geteuid(), shutil.which)
    listed = [line.split()[0] for line in _run(["ip", "netns", "list"]).splitlines() if line.strip()]
    pair = nodes(os.getpid())
    _remove([*abandoned(listed, _is_alive), *(node.name for node in pair if node.name in listed)])
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for line in commands(pair, rates):
            _run(line)
        yield Bed(pool, pair, rates, ranks)
    finally:
        _remove([node.name for node in pair if os.path.exists(f"/run/netns/{node.name}")])
        signal.signal(signal.SIGTERM, before)


def refuse_unable(user: int, find: Callable[[str], str | None]) -> None:
    """Refuse a machine on which the two nodes cannot be emulated.

    Raises:
        BedError: what is missing.
    """
    missing = [tool for tool in ("ip", "tc", "sysctl") if find(tool) is None]
    if user != 0 or missing:
        why = ["not root"] if user != 0 else []
        why += [f"no {tool}" for tool in missing]
        raise BedError(
            f"two nodes on one machine: {', '.join(why)}. Network namespaces and token buckets need root "
            "(in a container CAP_NET_ADMIN and CAP_SYS_ADMIN), iproute2 and procps: run as root, install them"
        )


def _remove(names: Sequence[str]) -> None:
    for line in removal(names):
        _run(line)


def _is_alive(process: int) -> bool:
    return os.path.exists(f"/proc/{process}")


def _run(line: Sequence[str]) -> str:
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BedError(
            f"`{' '.join(line)}` ended with status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}. "
            "The bed needs network namespaces, veth and the tbf queue of this kernel"
        )
    return done.stdout
