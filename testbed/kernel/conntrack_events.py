"""Connections that a node's kernel begins or ends to track, as they happen: ctnetlink's events, after what is there already."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import NamedTuple

from testbed.errors import KernelError
from testbed.kernel.ctnetlink import (
    CT_DELETE,
    CT_GET,
    CT_NEW,
    DUMP,
    FAMILY_BYTES,
    GROUP_DESTROY,
    GROUP_NEW,
    IP6_DESTINATION,
    IP6_SOURCE,
    IP_DESTINATION,
    IP_SOURCE,
    PROTO_DESTINATION_PORT,
    PROTO_ICMP_ID,
    PROTO_ICMPV6_ID,
    PROTO_NUMBER,
    PROTO_SOURCE_PORT,
    RECEIVE_BYTES,
    REQUEST,
    SUBSYSTEM,
    TUPLE_IP,
    TUPLE_ORIG,
    TUPLE_PROTO,
    TUPLE_REPLY,
    attributes,
    message,
    messages,
    open_ctnetlink,
)  # fmt: skip
from testbed.model.flows import ConntrackEntry, FlowKey, flow_key

_NEW, _DELETED = SUBSYSTEM | CT_NEW, SUBSYSTEM | CT_DELETE


class ConntrackEvent(NamedTuple):
    """An entry that is there, or (``ended``) has gone."""

    entry: ConntrackEntry
    ended: bool


class ConntrackWatch:
    """The connection tracking of the network namespace that this is made in, wherever the process moves afterwards.

    `fileno` is readable when something has happened.
    """

    def __init__(self) -> None:
        """Raises KernelError where the kernel has no ctnetlink."""
        self._socket = open_ctnetlink((1 << (GROUP_NEW - 1)) | (1 << (GROUP_DESTROY - 1)))
        self._socket.setblocking(False)
        self.lost = 0  # how often the kernel had to throw events away
        self._ask()

    def _ask(self) -> None:
        """Have everything that is tracked listed, among the events: none is missed between the two."""
        self._socket.send(message(CT_GET, REQUEST | DUMP, family=socket.AF_UNSPEC))

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def read(self) -> Iterator[ConntrackEvent]:
        """Return what has happened. Where events were lost, everything is listed anew.

        Raises:
            KernelError: the kernel does not answer any more.
        """
        while True:
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(f"could not read conntrack events: {error.strerror}") from error
                self.lost += 1
                self._ask()
                continue
            for kind, body in messages(data):
                if kind in (_NEW, _DELETED) and (entry := _decode(body[FAMILY_BYTES:])) is not None:
                    yield ConntrackEvent(entry, kind == _DELETED)


def _decode(body: bytes) -> ConntrackEntry | None:
    top = attributes(body)
    original, reply = (_key(attributes(top.get(side, b""))) for side in (TUPLE_ORIG, TUPLE_REPLY))
    return ConntrackEntry(original, reply) if original and reply else None


def _key(parts: dict[int, bytes]) -> FlowKey | None:
    addresses, protocol = attributes(parts.get(TUPLE_IP, b"")), attributes(parts.get(TUPLE_PROTO, b""))
    source = addresses.get(IP_SOURCE) or addresses.get(IP6_SOURCE)
    destination = addresses.get(IP_DESTINATION) or addresses.get(IP6_DESTINATION)
    if not source or not destination or PROTO_NUMBER not in protocol:
        return None
    echo = protocol.get(PROTO_ICMP_ID) or protocol.get(PROTO_ICMPV6_ID)
    ports = [protocol.get(kind) or echo or b"\0\0" for kind in (PROTO_SOURCE_PORT, PROTO_DESTINATION_PORT)]
    return flow_key(protocol[PROTO_NUMBER][0], source, destination, *(int.from_bytes(port, "big") for port in ports))
