"""Check the meeting point of a launch on several nodes before torchrun uses it.

torchrun waits for minutes for a name that does not resolve or an address that cannot be reached, and then prints C++
frames. The first node listens on the port after the meeting point's while it runs, and the others connect to it. The
kernel accepts their connections, so no thread is needed.
"""

import os
import socket
import time

DEFAULT_SECONDS = 30.0


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
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return f"the first node's name {host} does not resolve here ({error.strerror}): set MASTER_ADDR to its address"
    if node == 0:
        return _listen(port)
    seconds = float(os.environ.get("LONGSEQ_MEETING_SECONDS", DEFAULT_SECONDS))
    return _connect(host, port + 1, str(addresses[0][4][0]), seconds)


def _listen(port: int) -> "socket.socket | str":
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return f"port {port} of this node cannot be used ({error.strerror}): set MASTER_PORT to a free port"
    try:
        return socket.create_server(("", port + 1), backlog=4096)
    except OSError as error:
        return f"port {port + 1} of this node cannot be used ({error.strerror}): set MASTER_PORT to another port"


def _connect(host: str, port: int, address: str, seconds: float) -> "socket.socket | str":
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((address, port), timeout=max(1.0, min(5.0, seconds)))
        except OSError as error:
            if time.monotonic() > end:
                reason = error.strerror or str(error)
                return (
                    f"the first node {host} ({address}) cannot be reached at port {port} within {seconds:.0f} s"
                    f" ({reason}): its launcher did not start, or a firewall or another network is between the nodes"
                )
        time.sleep(0.5)
