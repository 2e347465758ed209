"""Messages of ctnetlink, the kernel's interface to its connection tracking table. Pure but for opening the socket.

Sources: linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h; net/netfilter/nf_conntrack_netlink.c.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from testbed.errors import KernelError

CT_NEW, CT_GET, CT_DELETE = 0, 1, 2
SUBSYSTEM = 1 << 8
REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
ERROR, DONE = 2, 3
TUPLE_ORIG, TUPLE_REPLY = 1, 2
TUPLE_IP, TUPLE_PROTO = 1, 2
IP_SOURCE, IP_DESTINATION, IP6_SOURCE, IP6_DESTINATION = 1, 2, 3, 4
PROTO_NUMBER, PROTO_SOURCE_PORT, PROTO_DESTINATION_PORT, PROTO_ICMP_ID, PROTO_ICMPV6_ID = 1, 2, 3, 4, 7
NESTED = 0x8000
GROUP_NEW, GROUP_DESTROY = 1, 3  # enum nfnetlink_groups
RECEIVE_BYTES = 1 << 18
FAMILY_BYTES = 4
_NETLINK_NETFILTER = 12
_SO_RCVBUFFORCE = 33
_TYPE_MASK = 0x3FFF
_HEADER = struct.Struct("=IHHII")
_BUFFER_BYTES = 4 << 20
_TIMEOUT_S = 5.0


def open_ctnetlink(groups: int = 0) -> socket.socket:
    """Return a socket of the network namespace that this process is in; ``groups`` is a bit mask of what to be told.

    Raises:
        KernelError: the kernel has no netfilter netlink.
    """
    try:
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        netlink.bind((0, groups))
    except OSError as error:
        raise KernelError(f"the kernel has no netfilter netlink: {error.strerror}") from error
    netlink.settimeout(_TIMEOUT_S)
    try:
        netlink.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    except PermissionError:
        netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    return netlink


def message(kind: int, flags: int, body: bytes = b"", *, family: int = socket.AF_INET) -> bytes:
    length = _HEADER.size + FAMILY_BYTES + len(body)
    return _HEADER.pack(length, SUBSYSTEM | kind, flags, 1, 0) + struct.pack("=BBH", family, 0, 0) + body


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Return the messages of one packet: type, and what follows the header."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        yield kind, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        found[kind & _TYPE_MASK] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)
