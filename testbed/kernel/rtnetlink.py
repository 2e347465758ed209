"""Links, addresses, routes and neighbours by rtnetlink, many requests in one round trip.

A pod's network is nine requests. pyroute2 spends 21 to 24 ms on them (most of it encoding in Python), stock Mininet 33;
packed by hand and sent as two batches they take under 2 (docs/adr/0002-raw-rtnetlink.md).

Message functions are pure and return a `Request`; `RtnetlinkSocket.send` hands a batch to the kernel.

Sources: linux/rtnetlink.h, linux/if_link.h, linux/neighbour.h, rtnetlink(7).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import NamedTuple

from testbed.kernel.netlink import NetlinkSocket, Request, attributes, messages

_NLM_F_REPLACE, _NLM_F_EXCL, _NLM_F_CREATE = 0x100, 0x200, 0x400
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 17, 18, 19
_RTM_DELADDR, _RTM_GETADDR = 21, 22
_RTM_NEWADDR, _RTM_NEWROUTE, _RTM_NEWNEIGH, _RTM_DELNEIGH = 20, 24, 28, 29
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_PROTINFO = 1, 3, 4, 10, 12
_IFLA_LINKINFO, _IFLA_NET_NS_FD = 18, 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFLA_BRPORT_MODE = 4  # hairpin
_IFLA_BR_FORWARD_DELAY, _IFLA_BR_STP_STATE = 1, 5
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_PERMANENT = 0x80
_NLA_F_NESTED = 0x8000
_IFF_UP, _IFF_LOWER_UP = 1, 1 << 16
_RTMGRP_LINK = 1

LOOPBACK_INDEX = 1
"""The index of lo in every network namespace."""


@dataclass(frozen=True, slots=True)
class LinkState:
    """A link as the kernel lists it."""

    index: int
    name: str
    is_up: bool
    master: int
    mac: bytes = b""


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + b"\0" * (-length % 4)


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _nested(kind: int, *parts: bytes) -> bytes:
    return _attribute(kind | _NLA_F_NESTED, b"".join(parts))


def _ifinfo(index: int = 0, *, up: bool | None = None, family: int = 0) -> bytes:
    flags, change = (0, 0) if up is None else (int(up), _IFF_UP)
    return struct.pack("=BxHiII", family, 0, index, flags, change)


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def mac_of(address: IPv4Address) -> str:
    """Return the hardware address that belongs to an address, as the CNI bridge plugin forms it: 0a:58 and the IPv4."""
    return ":".join(f"{byte:02x}" for byte in b"\x0a\x58" + address.packed)


def add_veth(
    name: str, index: int, peer_name: str, peer_index: int, peer_namespace_fd: int, *,
    peer_mac: str, mac: str = "", master: int = 0, mtu_bytes: int = 1500,
) -> Request:  # fmt: skip
    """Make a pair: one end here (up, a port of bridge ``master`` if given), the other in another namespace.

    The other end stays down: veth refuses to come up (ENOTCONN) before both ends know each other. Both indexes are
    chosen by the caller, so that the requests that follow in the same batch can name them.
    """
    peer = (
        _ifinfo(peer_index)
        + _text(_IFLA_IFNAME, peer_name)
        + _attribute(_IFLA_ADDRESS, mac_bytes(peer_mac))
        + _number(_IFLA_MTU, mtu_bytes)
        + _number(_IFLA_NET_NS_FD, peer_namespace_fd)
    )
    body = _ifinfo(index, up=True) + _text(_IFLA_IFNAME, name) + _number(_IFLA_MTU, mtu_bytes)
    if mac:
        body += _attribute(_IFLA_ADDRESS, mac_bytes(mac))
    if master:
        body += _number(_IFLA_MASTER, master)
    info = _nested(
        _IFLA_LINKINFO, _text(_IFLA_INFO_KIND, "veth"), _nested(_IFLA_INFO_DATA, _nested(_VETH_INFO_PEER, peer))
    )
    what = f"add veth {name} with peer {peer_name}"
    return Request(_RTM_NEWLINK, _NLM_F_CREATE | _NLM_F_EXCL, body + info, what)


def add_bridge(name: str, index: int, *, mac: str, mtu_bytes: int = 1500) -> Request:
    """Make a bridge that forwards at once (no spanning tree). A fixed address keeps it from taking its ports'."""
    info = _nested(
        _IFLA_LINKINFO,
        _text(_IFLA_INFO_KIND, "bridge"),
        _nested(_IFLA_INFO_DATA, _number(_IFLA_BR_FORWARD_DELAY, 0), _number(_IFLA_BR_STP_STATE, 0)),
    )
    body = _ifinfo(index, up=True) + _text(_IFLA_IFNAME, name) + _attribute(_IFLA_ADDRESS, mac_bytes(mac))
    body += _number(_IFLA_MTU, mtu_bytes)
    return Request(_RTM_NEWLINK, _NLM_F_CREATE | _NLM_F_EXCL, body + info, f"add bridge {name}")


def set_link(index: int, *, up: bool) -> Request:
    return Request(_RTM_NEWLINK, 0, _ifinfo(index, up=up), f"set link {index} {'up' if up else 'down'}")


def retire_link(index: int) -> list[Request]:
    """Take a link down and free its name, for what comes after it; succeeds when the link is gone already."""
    gone = frozenset({errno.ENODEV})
    return [
        Request(_RTM_NEWLINK, 0, _ifinfo(index, up=False), f"set link {index} down", gone),
        Request(_RTM_NEWLINK, 0, _ifinfo(index) + _text(_IFLA_IFNAME, f"old{index}"), f"rename link {index}", gone),
    ]


def set_hairpin(index: int) -> Request:
    """Let a bridge send a frame back out of the port it came in on: a pod reaching itself through its Service."""
    body = _ifinfo(index, family=socket.AF_BRIDGE) + _nested(_IFLA_PROTINFO, _attribute(_IFLA_BRPORT_MODE, b"\1"))
    return Request(_RTM_SETLINK, 0, body, f"set hairpin on port {index}")


def add_address(index: int, address: IPv4Interface) -> Request:
    body = struct.pack("=BBBBI", socket.AF_INET, address.network.prefixlen, 0, 0, index)
    body += _attribute(_IFA_LOCAL, address.ip.packed) + _attribute(_IFA_ADDRESS, address.ip.packed)
    if address.network.prefixlen < 31:
        body += _attribute(_IFA_BROADCAST, address.network.broadcast_address.packed)
    return Request(_RTM_NEWADDR, _NLM_F_CREATE | _NLM_F_EXCL, body, f"add address {address} to link {index}")


def add_bound_address(index: int, address: str) -> Request:
    """Give a link one address without a network around it, unless it has it; the text is IPv4."""
    packed = socket.inet_aton(address)
    body = struct.pack("=BBBBI", socket.AF_INET, 32, 0, 0, index)
    body += _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)
    return Request(
        _RTM_NEWADDR, _NLM_F_CREATE | _NLM_F_EXCL, body, f"bind address {address}", frozenset({errno.EEXIST})
    )


def delete_address(index: int, address: str) -> Request:
    """Take a /32 address from a link; succeeds when it is gone already."""
    body = struct.pack("=BBBBI", socket.AF_INET, 32, 0, 0, index) + _attribute(_IFA_LOCAL, socket.inet_aton(address))
    gone = frozenset({errno.EADDRNOTAVAIL, errno.ENODEV})
    return Request(_RTM_DELADDR, 0, body, f"unbind address {address}", gone)


def add_link(name: str, kind: str) -> Request:
    """Make a link that needs no options, and leave it down; succeeds when there is one of that name."""
    body = _ifinfo() + _text(_IFLA_IFNAME, name) + _nested(_IFLA_LINKINFO, _text(_IFLA_INFO_KIND, kind))
    return Request(
        _RTM_NEWLINK, _NLM_F_CREATE | _NLM_F_EXCL, body, f"add {kind} link {name}", frozenset({errno.EEXIST})
    )


def delete_link(name: str) -> Request:
    """Remove a link with all its addresses; succeeds when it is gone already."""
    return Request(
        _RTM_DELLINK, 0, _ifinfo() + _text(_IFLA_IFNAME, name), f"delete link {name}", frozenset({errno.ENODEV})
    )


def _route(destination: IPv4Network, gateway: IPv4Address | None, index: int) -> bytes:
    scope = 0 if gateway else 253  # universe, or link
    # family, prefix lengths, tos, table main, protocol static, scope, type unicast, flags
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, destination.prefixlen, 0, 0, 254, 4, scope, 1, 0)
    if destination.prefixlen:
        body += _attribute(_RTA_DST, destination.network_address.packed)
    if gateway:
        body += _attribute(_RTA_GATEWAY, gateway.packed)
    return body + (_number(_RTA_OIF, index) if index else b"")


def add_route(destination: IPv4Network, gateway: IPv4Address | None, index: int = 0) -> Request:
    what = f"add route {destination} via {gateway or f'link {index}'}"
    return Request(_RTM_NEWROUTE, _NLM_F_CREATE | _NLM_F_REPLACE, _route(destination, gateway, index), what)


def add_neighbour(index: int, address: IPv4Address, mac: str) -> Request:
    """Make a permanent entry: the machine-wide neighbour table is small (docs/architecture.md) and never asks for these."""
    body = struct.pack("=BxHiHBB", socket.AF_INET, 0, index, _NUD_PERMANENT, 0, 0)
    body += _attribute(_NDA_DST, address.packed) + _attribute(_NDA_LLADDR, mac_bytes(mac))
    return Request(_RTM_NEWNEIGH, _NLM_F_CREATE | _NLM_F_REPLACE, body, f"add neighbour {address} on link {index}")


def delete_neighbour(index: int, address: IPv4Address) -> Request:
    body = struct.pack("=BxHiHBB", socket.AF_INET, 0, index, 0, 0, 0) + _attribute(_NDA_DST, address.packed)
    return Request(_RTM_DELNEIGH, 0, body, f"delete neighbour {address}", frozenset({errno.ENOENT, errno.ENODEV}))


class LinkEvent(NamedTuple):
    """What has become of a link: it is there (``has_carrier``: and connected), or it is not (``deleted``)."""

    name: str
    has_carrier: bool
    deleted: bool


class LinkWatch:
    """What happens to the links of the namespace that this is made in. `fileno` is readable when something has happened."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, _RTMGRP_LINK))

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def read(self) -> Iterator[LinkEvent]:
        """Return what has happened; where the kernel had to leave something out, only what came after."""
        while True:
            try:
                packet = self._socket.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                continue
            for kind, _flags, _sequence, body in messages(packet):
                # a bridge tells of its ports with messages of its own family, also when one only leaves it
                if kind in (_RTM_NEWLINK, _RTM_DELLINK) and body[0] == socket.AF_UNSPEC:
                    name = dict(attributes(body[16:]))[_IFLA_IFNAME].rstrip(b"\0").decode()
                    flags = struct.unpack_from("=I", body, 8)[0]
                    yield LinkEvent(name, bool(flags & _IFF_LOWER_UP), kind == _RTM_DELLINK)


class RtnetlinkSocket(NetlinkSocket):
    """Links and addresses of the namespace that it was opened in."""

    def __init__(self, where: str) -> None:
        """``where`` names the namespace in error messages."""
        super().__init__(where)

    def __enter__(self) -> RtnetlinkSocket:
        return self

    def list_links(self) -> list[LinkState]:
        found: list[LinkState] = []
        for body in self.dump(_RTM_GETLINK, _ifinfo(), "list links"):
            index, flags = struct.unpack_from("=iI", body, 4)
            values = dict(attributes(body[16:]))
            name = values[_IFLA_IFNAME].rstrip(b"\0").decode()
            master = struct.unpack("=I", values[_IFLA_MASTER])[0] if _IFLA_MASTER in values else 0
            found.append(LinkState(index, name, bool(flags & _IFF_UP), master, values.get(_IFLA_ADDRESS, b"")))
        return found

    def list_addresses(self) -> list[tuple[int, IPv4Interface]]:
        """Return the index of a link and an IPv4 address that it has, for every address, whether the link is up or not."""
        found: list[tuple[int, IPv4Interface]] = []
        for body in self.dump(_RTM_GETADDR, struct.pack("=BBBBI", socket.AF_INET, 0, 0, 0, 0), "list addresses"):
            _, length, _, _, index = struct.unpack_from("=BBBBI", body)
            values = dict(attributes(body[8:]))
            packed = values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS)
            if packed:
                found.append((index, IPv4Interface((packed, length))))
        return found
