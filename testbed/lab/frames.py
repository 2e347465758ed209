"""Messages between the processes of one lab: a length, a pickled value, and file descriptors beside them.

Both ends are our own processes of the same root user: one end of a socket pair, or a socket in a folder of mode 0700.
"""

from __future__ import annotations

import array
import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any

from testbed.errors import LabError

_HEADER = struct.Struct("!IB")  # bytes that follow, descriptors that came along
_MAX_FDS = 8


def pack_frame(value: Any, fd_count: int = 0) -> bytes:
    """Return a message as it is sent."""
    packed = pickle.dumps(value, protocol=5)
    return _HEADER.pack(len(packed), fd_count) + packed


def send_frame(connection: socket.socket, value: Any, fds: Sequence[int] = ()) -> None:
    """Send one message, whole. The descriptors stay open here."""
    data = memoryview(pack_frame(value, len(fds)))
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = connection.sendmsg([data], ancillary)
    if sent < len(data):
        connection.sendall(data[sent:])


class FrameReader:
    """Puts messages together from what arrives on a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._fds: list[int] = []

    def receive(self) -> list[tuple[Any, list[int]]] | None:
        """Read once and return the messages that are complete, or None when the other side has closed."""
        size = socket.CMSG_SPACE(_MAX_FDS * 4)
        data, ancillary, _flags, _address = self._connection.recvmsg(1 << 18, size, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                self._fds.extend(numbers)
        if not data:
            return None
        self._buffer += data
        messages: list[tuple[Any, list[int]]] = []
        while len(self._buffer) >= _HEADER.size:
            length, fd_count = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + length
            if len(self._buffer) < end:
                break
            value = pickle.loads(bytes(self._buffer[_HEADER.size : end]))  # noqa: S301  # our own processes, see above
            del self._buffer[:end]
            messages.append((value, self._fds[:fd_count]))
            del self._fds[:fd_count]
        return messages


def request(connection: socket.socket, value: Any, fds: Sequence[int] = ()) -> tuple[Any, list[int]]:
    """Send one message and wait for the answer."""
    send_frame(connection, value, fds)
    reader = FrameReader(connection)
    while True:
        answers = reader.receive()
        if answers is None:
            raise LabError("the lab closed the connection: it is stopping, or its spawner has died")
        if answers:
            return answers[0]
