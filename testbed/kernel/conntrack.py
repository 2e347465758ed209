"""Lists and deletes UDP connection tracking entries of the network namespace this process is in, by ctnetlink.

One dump and one batch of deletions, where conntrack(8) would be started once an entry.
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
from testbed.kernel.ctnetlink import (
    ACK,
    CT_DELETE,
    CT_GET,
    DONE,
    DUMP,
    ERROR,
    FAMILY_BYTES,
    IP_DESTINATION,
    IP_SOURCE,
    NESTED,
    PROTO_DESTINATION_PORT,
    PROTO_NUMBER,
    PROTO_SOURCE_PORT,
    RECEIVE_BYTES,
    REQUEST,
    TUPLE_IP,
    TUPLE_ORIG,
    TUPLE_PROTO,
    TUPLE_REPLY,
    attribute,
    attributes,
    message,
    messages,
    open_ctnetlink,
)  # fmt: skip

_DELETIONS_AT_ONCE = 64  # acknowledgements of a batch must fit into the socket's buffer


def list_udp_flows() -> list[UdpFlow]:
    """Return the IPv4 UDP entries. A dump that the kernel broke off for a change is returned as far as it went.

    Raises:
        KernelError: connection tracking is not there or may not be read.
    """
    with open_ctnetlink() as netlink:
        netlink.send(message(CT_GET, REQUEST | DUMP))
        return [flow for body in _answers(netlink, "list") if (flow := _decode(body)) is not None]


def delete_udp_flows(flows: Iterable[UdpFlow]) -> int:
    """Delete these entries and return how many were there; deleting what is absent succeeds.

    Raises:
        KernelError: the kernel refuses.
    """
    deleted = 0
    wanted = list(flows)
    with open_ctnetlink() as netlink:
        for start in range(0, len(wanted), _DELETIONS_AT_ONCE):
            batch = wanted[start : start + _DELETIONS_AT_ONCE]
            netlink.send(b"".join(message(CT_DELETE, REQUEST | ACK, _encode(flow)) for flow in batch))
            left = len(batch)
            while left:
                for kind, body in messages(netlink.recv(RECEIVE_BYTES)):
                    if kind != ERROR:
                        continue
                    left -= 1
                    code = -struct.unpack_from("=i", body)[0]
                    deleted += code == 0
                    if code not in (0, errno.ENOENT):
                        raise KernelError(f"could not delete UDP flows: {os.strerror(code)}")
    return deleted


def _answers(netlink: socket.socket, verb: str) -> Iterator[bytes]:
    try:
        while True:
            for kind, body in messages(netlink.recv(RECEIVE_BYTES)):
                if kind == DONE:
                    return
                if kind == ERROR:
                    code = -struct.unpack_from("=i", body)[0]
                    raise KernelError(f"could not {verb} UDP flows: {os.strerror(code)}")
                yield body[FAMILY_BYTES:]
    except OSError as error:
        raise KernelError(f"could not {verb} UDP flows: {error.strerror or error}") from error


def _decode(body: bytes) -> UdpFlow | None:
    top = attributes(body)
    ends: list[tuple[IPv4Address, int]] = []
    for side in (TUPLE_ORIG, TUPLE_REPLY):
        parts = attributes(top.get(side, b""))
        protocol, addresses = attributes(parts.get(TUPLE_PROTO, b"")), attributes(parts.get(TUPLE_IP, b""))
        if protocol.get(PROTO_NUMBER) != bytes([socket.IPPROTO_UDP]) or IP_SOURCE not in addresses:
            return None
        for address, port in ((IP_SOURCE, PROTO_SOURCE_PORT), (IP_DESTINATION, PROTO_DESTINATION_PORT)):
            ends.append((IPv4Address(addresses[address]), int.from_bytes(protocol[port], "big")))
    return UdpFlow(*ends[0], *ends[1], *ends[2])


def _encode(flow: UdpFlow) -> bytes:
    addresses = attribute(IP_SOURCE, flow.source.packed) + attribute(IP_DESTINATION, flow.destination.packed)
    protocol = (
        attribute(PROTO_NUMBER, bytes([socket.IPPROTO_UDP]))
        + attribute(PROTO_SOURCE_PORT, flow.source_port.to_bytes(2, "big"))
        + attribute(PROTO_DESTINATION_PORT, flow.port.to_bytes(2, "big"))
    )
    parts = attribute(TUPLE_IP | NESTED, addresses) + attribute(TUPLE_PROTO | NESTED, protocol)
    return attribute(TUPLE_ORIG | NESTED, parts)
