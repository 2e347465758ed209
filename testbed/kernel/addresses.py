"""The IPv4 addresses and the links of the network namespace this process is in."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from ipaddress import IPv4Address, IPv4Interface

from testbed.kernel.rtnetlink import RtnetlinkSocket

_SIOCGIFCONF = 0x8912
_IFREQ_BYTES = 40  # sizeof(struct ifreq) on 64-bit Linux
_ADDRESS_OFFSET = 20  # 16 of name, then sockaddr_in: family, port, address


def link_index(name: str) -> int:
    """Return the index of a link, 0 when there is none of that name."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def link_name(index: int) -> str:
    """Return the name of a link, '' when there is none of that index."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""


def list_link_addresses(name: str) -> tuple[IPv4Interface, ...]:
    """Return the addresses of a link with their prefix lengths; () when there is no link of that name."""
    index = link_index(name)
    with RtnetlinkSocket(f"link {name}") as netlink:
        return tuple(address for at, address in netlink.list_addresses() if index and at == index)


def link_towards(destination: IPv4Address) -> str:
    """Return the link that packets to a destination leave by; '' when no route leads there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, RtnetlinkSocket(str(destination)) as netlink:
        try:
            probe.connect((str(destination), 9))  # sends nothing: the kernel only chooses a source address
        except OSError:
            return ""
        source = IPv4Address(probe.getsockname()[0])
        return next((link_name(index) for index, address in netlink.list_addresses() if address.ip == source), "")


def list_local_addresses() -> tuple[IPv4Address, ...]:
    """Return every address of every interface that is up, sorted; netdevice(7), SIOCGIFCONF."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        room = 64 * _IFREQ_BYTES
        while True:
            buffer = array.array("B", bytes(room))
            start, _ = buffer.buffer_info()
            answer = fcntl.ioctl(probe, _SIOCGIFCONF, struct.pack("iP", room, start))
            used = int(struct.unpack("iP", answer)[0])
            if used < room:  # a full buffer may have cut the list short
                break
            room *= 2
    raw = buffer.tobytes()[:used]
    return tuple(
        sorted(
            {IPv4Address(raw[at + _ADDRESS_OFFSET : at + _ADDRESS_OFFSET + 4]) for at in range(0, used, _IFREQ_BYTES)}
        )
    )
