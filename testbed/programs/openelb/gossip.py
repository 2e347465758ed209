"""Heartbeats on the wire: a UDP socket, and who is told. What they mean is decided in `testbed.dataplane.membership`."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from testbed.dataplane.membership import MAX_BYTES, BadHeartbeat, Heartbeat, decode_heartbeat, encode_heartbeat
from testbed.programs.proxy_status import ProxyMetrics


@dataclass(frozen=True, slots=True)
class Heard:
    """A heartbeat, and the address it came from."""

    heartbeat: Heartbeat
    address: str


class Gossip:
    """Sends heartbeats to peers, and hands on those that it receives.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self, bind: tuple[str, int], secret: bytes, metrics: ProxyMetrics, emit: Callable[[Heard], None]
    ) -> None:  # fmt: skip
        self._secret = secret
        self._metrics = metrics
        self._emit = emit
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind(bind)
        except BaseException:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._receive, name="gossip", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def send(self, heartbeat: Heartbeat, addresses: Iterable[str]) -> None:
        """Tell these addresses, each ``IP`` (on our own port) or ``IP:PORT``; who cannot be reached is not told."""
        datagram = encode_heartbeat(heartbeat, self._secret)
        for address in addresses:
            host, _, port = address.partition(":")
            with contextlib.suppress(OSError):
                self._socket.sendto(datagram, socket.MSG_DONTWAIT, (host, int(port or self.port)))

    def _receive(self) -> None:
        while True:
            try:
                datagram, (host, port) = self._socket.recvfrom(MAX_BYTES)
            except ConnectionRefusedError:  # told by ICMP about an earlier heartbeat
                continue
            except OSError:
                return
            if not datagram and self._socket.fileno() < 0:
                return
            try:
                heartbeat = decode_heartbeat(datagram, self._secret)
            except BadHeartbeat:
                self._metrics.count("heartbeats_ignored")
                continue
            self._emit(Heard(heartbeat, host if port == self.port else f"{host}:{port}"))
