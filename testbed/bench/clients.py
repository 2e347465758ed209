"""What runs inside a pod, node or outside host and is timed there. Each function is called in a forked process of its own."""

from __future__ import annotations

import errno
import gc
import itertools
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

from testbed.bench.objects import Target
from testbed.errors import KernelError

_PATIENCE_S = 3.0
_MOST = 100_000

OWN_PORTS = range(10_000, 30_000)
"""Of clients: none that the kernel chooses (net.ipv4.ip_local_port_range, from 32768 on)."""


def first_answers(target: Target, duration_s: float, ports: Sequence[int] = ()) -> list[int]:
    """Return how many nanoseconds each of many new connections took, one after the other: to connect, ask, have an answer.

    Args:
        duration_s: for so long; 0: once.
        ports: of the client, in turn; none: the kernel chooses.

    Raises:
        KernelError: there was no answer, or a refusal.
    """
    request = f"GET / HTTP/1.0\r\nHost: {target.host or target.address}\r\n\r\n".encode()
    place = (target.address, target.http_port)
    at_once = struct.pack("ii", 1, 0)  # SO_LINGER: closed by a reset, so that no port is kept back
    took: list[int] = []
    turn = itertools.cycle(ports)
    gc.disable()
    end = time.perf_counter() + duration_s
    try:
        while True:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
                connection.settimeout(_PATIENCE_S)
                if ports:
                    bind_next(connection, turn)
                started = time.perf_counter_ns()
                connection.connect(place)
                connection.sendall(request)
                answer = connection.recv(256)
                took.append(time.perf_counter_ns() - started)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            if answer[:7] != b"HTTP/1." or answer[8:12] != b" 200":
                raise KernelError(f"{target.address}:{target.http_port} answered {answer[:40]!r}")
            if time.perf_counter() >= end or len(took) >= _MOST:
                return took
    except OSError as error:
        reason = error.strerror or str(error)
        raise KernelError(f"connection {len(took) + 1} to {target.address}:{target.http_port}: {reason}") from error


def bind_next(connection: socket.socket, ports: Iterator[int]) -> None:
    """Have a connection come from the next port that nobody has."""
    for port in ports:
        try:
            connection.bind(("", port))
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise


def fetch_metrics() -> str:
    """Return the text of kube-proxy's metrics on this node; '' while it does not answer."""
    try:
        with urllib.request.urlopen("http://127.0.0.1:10249/metrics", timeout=5) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return ""
