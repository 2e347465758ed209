"""UDP in userspace mode: a socket to an endpoint for each client, for as long as datagrams pass.

splice(2) cannot read datagrams, so these go through one buffer, 4,096 bytes of each as upstream's do.
"""

from __future__ import annotations

import errno
import select
import socket
from collections import OrderedDict
from typing import Final

from testbed.dataplane.balancer import Dial, Rotation
from testbed.programs.userspace_loop import Loop, Notice, Timer
from testbed.programs.userspace_tcp import EXHAUSTED

_DATAGRAM_BYTES: Final = 4096
_AT_ONCE: Final = 256
IP_PKTINFO: Final = 8  # linux/in.h: on receipt the address it was sent to, on sending the one it is to come from
_PKTINFO_BYTES: Final = 12
_SOCKET: Final = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_ANCILLARY: Final = socket.CMSG_SPACE(_PKTINFO_BYTES)

_buffer = bytearray(_DATAGRAM_BYTES)
_view = memoryview(_buffer)

#: Address and port of the client, and the address of ours that it sent to.
_Key = tuple[str, int, bytes]


class _Client:
    """One client of one service port, and its socket to an endpoint."""

    __slots__ = ("_port", "key", "last_s", "socket")

    def __init__(self, port: UdpPort, key: _Key, backend: socket.socket, now_s: float) -> None:
        self._port = port
        self.key = key
        self.socket = backend
        self.last_s = now_s

    def on_event(self, fd: int, events: int) -> None:
        self._port.answer(self)

    def leave(self) -> None:
        """Forget this client: its next datagram makes it a new one."""
        self._port.forget(self)


class UdpClients:
    """The clients of all UDP ports, who was quiet for longest first."""

    def __init__(self, loop: Loop, idle_s: float) -> None:
        self._loop = loop
        self._idle_s = idle_s
        self._quiet: OrderedDict[_Client, None] = OrderedDict()
        self._timer: Timer | None = None

    def add(self, client: _Client) -> None:
        self._quiet[client] = None
        if self._timer is None:
            self._timer = self._loop.at(self._loop.now_s + self._idle_s, self._purge)

    def touch(self, client: _Client) -> None:
        """Datagrams of this client passed."""
        client.last_s = self._loop.now_s
        self._quiet.move_to_end(client)

    def remove(self, client: _Client) -> None:
        self._quiet.pop(client, None)

    def drop_oldest(self) -> bool:
        """Make room; say whether there was anybody to drop."""
        if not self._quiet:
            return False
        client = next(iter(self._quiet))
        backend = client.socket
        client.leave()
        backend.close()  # at once: its number is wanted, and as a datagram socket it has no event that others could take
        return True

    def _purge(self) -> None:
        self._timer = None
        before_s = self._loop.now_s - self._idle_s
        while self._quiet:
            client = next(iter(self._quiet))
            if client.last_s > before_s:
                self._timer = self._loop.at(client.last_s + self._idle_s, self._purge)
                return
            client.leave()


class UdpPort:
    """The port of one UDP service port."""

    def __init__(self, loop: Loop, clients: UdpClients, name: str, listener: socket.socket, rotation: Rotation) -> None:
        self._loop = loop
        self._all = clients
        self._name = name
        self._listener = listener
        self._rotation = rotation
        self._clients: dict[_Key, _Client] = {}
        listener.setblocking(False)
        loop.watch(listener.fileno(), self, select.EPOLLIN)

    def on_event(self, fd: int, events: int) -> None:
        listener = self._listener
        for _ in range(_AT_ONCE):
            try:
                length, ancillary, _, (address, port) = listener.recvmsg_into([_buffer], _ANCILLARY)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error about an earlier answer
            sent_to = ancillary[0][2][4:8] if ancillary else b"\0\0\0\0"  # in_pktinfo: index, then ipi_spec_dst
            self._pass_on(length, (address, port, sent_to))

    def _pass_on(self, length: int, key: _Key) -> None:
        client = self._clients.get(key)
        if client is not None:
            self._all.touch(client)
            try:
                client.socket.send(_view[:length])
                return
            except BlockingIOError:
                return  # lost, as datagrams are
            except OSError:
                client.leave()  # the endpoint refused an earlier one; this one has not been sent
        client = self._admit(key)
        if client is not None:
            try:
                client.socket.send(_view[:length])
            except OSError:
                client.leave()

    def _admit(self, key: _Key) -> _Client | None:
        dial = Dial(self._rotation, key[0])
        while (turn := dial.next(self._loop.now_s)) is not None:
            backend = self._open()
            if backend is None:
                return None
            address, _, number = turn.endpoint.rpartition(":")
            if backend.connect_ex((address, int(number))):
                backend.close()
                continue
            client = self._clients[key] = _Client(self, key, backend, self._loop.now_s)
            self._loop.watch(backend.fileno(), client, select.EPOLLIN)
            self._all.add(client)
            return client
        return None

    def _open(self) -> socket.socket | None:
        while True:
            try:
                return socket.socket(socket.AF_INET, _SOCKET)
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
            dropped = self._all.drop_oldest()
            what = (
                "the clients that were quiet for longest are dropped"
                if dropped
                else "datagrams of new clients are lost"
            )
            message = f"all file descriptors are in use: of UDP Service {self._name} {what}"
            self._loop.tell_seldom(Notice("Warning", "OutOfFileDescriptorsUDP", message))
            if not dropped:
                return None

    def answer(self, client: _Client) -> None:
        """Pass an endpoint's datagrams on to the client, from the address that it had sent to."""
        address, port, sent_to = client.key
        origin = [(socket.IPPROTO_IP, IP_PKTINFO, b"\0\0\0\0" + sent_to + b"\0\0\0\0")]
        for _ in range(_AT_ONCE):
            try:
                length = client.socket.recv_into(_buffer)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.ECONNREFUSED:
                    client.leave()
                return
            try:
                self._listener.sendmsg([_view[:length]], origin, 0, (address, port))
            except OSError:
                break  # lost
        self._all.touch(client)

    def forget(self, client: _Client) -> None:
        self._clients.pop(client.key, None)
        self._all.remove(client)
        self._loop.close(client.socket)

    def close(self) -> None:
        """Take no datagrams any more, in neither direction."""
        for client in list(self._clients.values()):
            client.leave()
        self._loop.close(self._listener)
