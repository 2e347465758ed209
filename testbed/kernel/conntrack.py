"""Lists and deletes UDP connection tracking entries of the network namespace this process is in, by ctnetlink.

One dump and one batch of deletions, where conntrack(8) would be started once an entry.

Sources: linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h; net/netfilter/nf_conntrack_netlink.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address

from testbed.dataplane.flows import UdpFlow
from testbed.errors import KernelError

_NETLINK_NETFILTER = 12
_SUBSYSTEM_CTNETLINK = 1 << 8
_CT_GET, _CT_DELETE = 1, 2
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_TUPLE_ORIG, _TUPLE_REPLY = 1, 2
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SOURCE, _IP_DESTINATION = 1, 2
_PROTO_NUMBER, _PROTO_SOURCE_PORT, _PROTO_DESTINATION_PORT = 1, 2, 3
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_HEADER = struct.Struct("=IHHII")
_FAMILY = struct.pack("=BBH", socket.AF_INET, 0, 0)
_TIMEOUT_S = 5.0
_RECEIVE_BYTES = 1 << 18
_DELETIONS_AT_ONCE = 64  # acknowledgements of a batch must fit into the socket's buffer


def list_udp_flows() -> list[UdpFlow]:
    """Return the IPv4 UDP entries. A dump that the kernel broke off for a change is returned as far as it went.

    Raises:
        KernelError: connection tracking is not there or may not be read.
    """
    with _open() as netlink:
        netlink.send(_message(_CT_GET, _REQUEST | _DUMP, b""))
        return [flow for body in _answers(netlink, "list") if (flow := _decode(body)) is not None]


def delete_udp_flows(flows: Iterable[UdpFlow]) -> int:
    """Delete these entries and return how many were there; deleting what is absent succeeds.

    Raises:
        KernelError: the kernel refuses.
    """
    deleted = 0
    wanted = list(flows)
    with _open() as netlink:
        for start in range(0, len(wanted), _DELETIONS_AT_ONCE):
            batch = wanted[start : start + _DELETIONS_AT_ONCE]
            netlink.send(b"".join(_message(_CT_DELETE, _REQUEST | _ACK, _encode(flow)) for flow in batch))
            left = len(batch)
            while left:
                for kind, body in _messages(netlink.recv(_RECEIVE_BYTES)):
                    if kind != _ERROR:
                        continue
                    left -= 1
                    code = -struct.unpack_from("=i", body)[0]
                    deleted += code == 0
                    if code not in (0, errno.ENOENT):
                        raise KernelError(f"could not delete UDP flows: {os.strerror(code)}")
    return deleted


def _open() -> socket.socket:
    try:
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    except OSError as error:
        raise KernelError(f"the kernel has no netfilter netlink: {error.strerror}") from error
    netlink.settimeout(_TIMEOUT_S)
    netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    return netlink


def _message(kind: int, flags: int, body: bytes) -> bytes:
    length = _HEADER.size + len(_FAMILY) + len(body)
    return _HEADER.pack(length, _SUBSYSTEM_CTNETLINK | kind, flags, 1, 0) + _FAMILY + body


def _answers(netlink: socket.socket, verb: str) -> Iterator[bytes]:
    try:
        while True:
            for kind, body in _messages(netlink.recv(_RECEIVE_BYTES)):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    code = -struct.unpack_from("=i", body)[0]
                    raise KernelError(f"could not {verb} UDP flows: {os.strerror(code)}")
                yield body[len(_FAMILY) :]
    except OSError as error:
        raise KernelError(f"could not {verb} UDP flows: {error.strerror or error}") from error


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        yield kind, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def _attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        found[kind & _TYPE_MASK] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _decode(body: bytes) -> UdpFlow | None:
    top = _attributes(body)
    ends: list[tuple[IPv4Address, int]] = []
    for side in (_TUPLE_ORIG, _TUPLE_REPLY):
        parts = _attributes(top.get(side, b""))
        protocol, addresses = _attributes(parts.get(_TUPLE_PROTO, b"")), _attributes(parts.get(_TUPLE_IP, b""))
        if protocol.get(_PROTO_NUMBER) != bytes([socket.IPPROTO_UDP]) or _IP_SOURCE not in addresses:
            return None
        for address, port in ((_IP_SOURCE, _PROTO_SOURCE_PORT), (_IP_DESTINATION, _PROTO_DESTINATION_PORT)):
            ends.append((IPv4Address(addresses[address]), int.from_bytes(protocol[port], "big")))
    return UdpFlow(*ends[0], *ends[1], *ends[2])


def _encode(flow: UdpFlow) -> bytes:
    addresses = _attribute(_IP_SOURCE, flow.source.packed) + _attribute(_IP_DESTINATION, flow.destination.packed)
    protocol = (
        _attribute(_PROTO_NUMBER, bytes([socket.IPPROTO_UDP]))
        + _attribute(_PROTO_SOURCE_PORT, flow.source_port.to_bytes(2, "big"))
        + _attribute(_PROTO_DESTINATION_PORT, flow.port.to_bytes(2, "big"))
    )
    parts = _attribute(_TUPLE_IP | _NESTED, addresses) + _attribute(_TUPLE_PROTO | _NESTED, protocol)
    return _attribute(_TUPLE_ORIG | _NESTED, parts)
