"""Which connection a userspace proxy has opened for which: its own table, for whoever explains captured packets.

The proxy listens on an abstract Unix socket of the node's network namespace, so that no path is needed and two nodes do not
collide. Whoever connects is sent every pair that there is, and each new one: one message a pair, 26 bytes, the key
(model/flows.py) of the client's packets as they reach the proxy, and of the proxy's own to the endpoint.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from ipaddress import ip_address

from testbed.model.flows import TCP, UDP, FlowKey, flow_key

ADDRESS = "\0testbed/userspace-proxy"
_KEY_BYTES = 13
_WATCHERS = 8


class PairTable:
    """The proxy's side. All sockets are non-blocking: `listener` belongs into the proxy's event loop, with `accept`."""

    def __init__(self) -> None:
        """Listen in the network namespace that this process is in. Raises OSError when somebody does already."""
        self.listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        self.listener.bind(ADDRESS)
        self.listener.listen(_WATCHERS)
        self._pairs: dict[bytes, None] = {}
        self._watchers: list[socket.socket] = []

    def accept(self) -> None:
        """Take a watcher in, and send it what there is."""
        with contextlib.suppress(BlockingIOError):
            watcher, _ = self.listener.accept()
            watcher.setblocking(False)
            self._watchers.append(watcher)
            if all(self._send(watcher, pair) for pair in list(self._pairs)):
                return
            self._drop(watcher)

    def add(self, client: socket.socket, backend: socket.socket) -> bytes:
        """Note a pair: the socket to the client, and the one to the endpoint. Return what `remove` wants.

        A socket whose other side has gone already has no name any more: then nothing is noted.
        """
        protocol = TCP if client.type & socket.SOCK_STREAM == socket.SOCK_STREAM else UDP
        try:
            front = _key(protocol, client.getpeername(), client.getsockname())
            pair = front + _key(protocol, backend.getsockname(), backend.getpeername())
        except OSError:  # one of them has gone already
            return b""
        self._pairs[pair] = None
        for watcher in list(self._watchers):
            if not self._send(watcher, pair):
                self._drop(watcher)
        return pair

    def remove(self, pair: bytes) -> None:
        self._pairs.pop(pair, None)

    def close(self) -> None:
        for each in (self.listener, *self._watchers):
            each.close()

    @staticmethod
    def _send(watcher: socket.socket, pair: bytes) -> bool:
        try:
            watcher.send(pair)
        except OSError:  # it has gone, or does not read
            return False
        return True

    def _drop(self, watcher: socket.socket) -> None:
        self._watchers.remove(watcher)
        watcher.close()


class PairWatch:
    """The other side, in the network namespace that this is made in; `fileno` is readable when there is something to read."""

    def __init__(self) -> None:
        """Raises ConnectionRefusedError when no proxy is there."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(ADDRESS)
        except BaseException:
            self._socket.close()
            raise
        self.has_ended = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def read(self) -> Iterator[tuple[FlowKey, FlowKey]]:
        """Return the pairs that are new: the client's key, and the proxy's own. The proxy's end sets ``has_ended``."""
        while True:
            try:
                pair = self._socket.recv(2 * _KEY_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                pair = b""
            if not pair:
                self.has_ended = True
                return
            yield FlowKey(pair[:_KEY_BYTES]), FlowKey(pair[_KEY_BYTES:])


def _key(protocol: int, source: tuple[str, int], destination: tuple[str, int]) -> FlowKey:
    return flow_key(
        protocol, ip_address(source[0]).packed, ip_address(destination[0]).packed, source[1], destination[1]
    )
