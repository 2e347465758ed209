"""What a benchmark's client does with its connections, on a loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from testbed.bench import clients
from testbed.bench.clients import first_answers
from testbed.bench.objects import Target


@pytest.fixture
def server() -> Iterator[tuple[int, list[int]]]:
    """Serve HTTP; yield the port, and the ports of the clients that have come."""
    peers: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, peer = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        peers.append(peer[1])
                        connection.recv(1000)
                        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                        connection.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], peers
        listener.shutdown(socket.SHUT_RDWR)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        return [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)
        ]  # fmt: skip


def test_ports_take_turns(server: tuple[int, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection has the next one; that which somebody else has is left out."""
    monkeypatch.setattr(clients, "_MOST", 5)
    port, peers = server
    first, taken, last = free_ports(3)
    with socket.create_server(("127.0.0.1", taken)):
        took = first_answers(Target("127.0.0.1", port), 60, (first, taken, last))
    assert len(took) == len(peers) == 5
    assert peers == [(first, last)[number % 2] for number in range(len(peers))]


def test_the_kernel_chooses(server: tuple[int, list[int]]) -> None:
    port, peers = server
    assert len(first_answers(Target("127.0.0.1", port), 0.0)) == len(peers) == 1
