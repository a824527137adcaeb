"""Check the meeting point of a launch on several nodes before torchrun uses it.

torchrun waits for minutes for a name that does not resolve or an address that cannot be reached, and then prints C++
frames. The first node listens on the port after the meeting point's while it runs, and the others connect to it. The
kernel accepts their connections, so no thread is needed.
"""

import math
import os
import socket
import sys
import time

DEFAULT_SECONDS = 30.0
Address = tuple[socket.AddressFamily, str]


def split(endpoint: str) -> tuple[str, int]:
    """Split HOST:PORT."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def check(host: str, port: int, node: int) -> "socket.socket | str":
    """Check the meeting point from this node.

    Args:
        host: name or address of the first node.
        port: of torchrun's store. The one after it is used for the check.
        node: number of this node.

    Returns:
        What is wrong, or a socket, which the first node has to keep open.
    """
    if isinstance(found := _resolve(host), str):
        return found
    family, address = found
    return _listen(family, port) if node == 0 else _connect(host, port + 1, address)


def check_store(host: str, port: int) -> str:
    """Check the meeting point where torchrun itself decides which machine is the first one.

    Args:
        host: name or address of the first machine.
        port: of torchrun's store, which the first machine's torchrun opens.

    Returns:
        What is wrong, or an empty string.
    """
    if isinstance(found := _resolve(host), str):
        return found
    family, address = found
    if _is_of_this_machine(family, address):
        return ""
    connection = _connect(host, port, address)
    if isinstance(connection, str):
        return connection
    connection.close()
    return ""


def _resolve(host: str) -> "Address | str":
    """Return the address to which torchrun connects, or what is wrong."""
    try:
        family, *_, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no name"
        return f"the first node's name {host} does not resolve here ({reason}): set MASTER_ADDR to its address"
    return family, str(address[0])


def _is_of_this_machine(family: socket.AddressFamily, address: str) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def meeting_seconds() -> float:
    """Return how long to wait for the first node, in seconds."""
    text = os.environ.get("LONGSEQ_MEETING_SECONDS", str(DEFAULT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        sys.exit(f"error: LONGSEQ_MEETING_SECONDS={text} is not a number of seconds")
    return seconds


def _listen(family: socket.AddressFamily, port: int) -> "socket.socket | str":
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return f"port {port} of this node cannot be used ({reason}): set MASTER_PORT to a free port"
    try:
        return socket.create_server(("", port + 1), family=family, backlog=4096)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return f"port {port + 1} of this node cannot be used ({reason}): set MASTER_PORT to another port"


def _connect(host: str, port: int, address: str) -> "socket.socket | str":
    seconds = meeting_seconds()
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((address, port), timeout=max(1.0, min(5.0, seconds)))
        except (OSError, OverflowError) as error:
            if time.monotonic() > end:
                reason = getattr(error, "strerror", None) or str(error)
                return (
                    f"the first node {host} ({address}) cannot be reached at port {port} within {seconds:.0f} s"
                    f" ({reason}): its launcher did not start, or a firewall or another network is between the nodes"
                )
        time.sleep(0.5)
