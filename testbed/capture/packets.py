"""Ethernet frames, as far as a capture must understand them: whose packet it is, and what makes it the same one elsewhere."""

from __future__ import annotations

import zlib
from typing import NamedTuple

from testbed.model.flows import ICMP, ICMPV6, TCP, UDP, FlowKey, flow_key, reverse

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
_IPV4, _IPV6 = b"\x08\x00", b"\x86\xdd"
_IPV4_HEADER = 20
_ETHERNET = 14
_ICMP_ECHO = {8: "echo request", 0: "echo reply", 128: "echo request", 129: "echo reply"}
_ICMP_ERRORS = {3: "unreachable", 11: "time exceeded", 12: "parameter problem"}
_ICMPV6_ERRORS = {1: "unreachable", 2: "packet too big", 3: "time exceeded", 4: "parameter problem"}
_UNREACHABLE = {
    0: "net unreachable", 1: "host unreachable", 3: "port unreachable", 4: "fragmentation needed",
    9: "net prohibited", 10: "host prohibited", 13: "administratively prohibited",
}  # fmt: skip


class Packet(NamedTuple):
    """What a packet is, for tying it to others.

    ``identity`` is what forwarding and translation leave as it is: equal for two sightings of one packet (for an echo or a
    datagram nearly always), different for the next packet and for one that is sent again.
    """

    key: FlowKey
    label: str  # 'SYN', 'data, 74 bytes', 'echo request'
    identity: tuple[int, ...]
    tcp_flags: int = 0
    sequence: int = 0
    acknowledged: int = 0
    payload_bytes: int = 0
    about: FlowKey | None = None  # of an ICMP error: the packet that it is about

    @property
    def opens(self) -> bool:
        """A TCP connection begins with this packet."""
        return self.tcp_flags & (SYN | ACK) == SYN


def read_packet(frame: bytes) -> Packet | None:
    """Return what an Ethernet frame holds; None for anything but whole IP packets of a flow (ARP, later fragments…)."""
    kind = frame[12:14]
    if kind == _IPV4 and len(frame) >= _ETHERNET + _IPV4_HEADER:
        return _read_ipv4(frame[_ETHERNET:])
    if kind == _IPV6 and len(frame) >= _ETHERNET + 40:
        return _read_transport(frame[20], frame[22:38], frame[38:54], frame[54:], 0, len(frame) - 54)
    return None


def _read_ipv4(packet: bytes) -> Packet | None:
    header = (packet[0] & 0x0F) * 4
    if int.from_bytes(packet[6:8], "big") & 0x1FFF:  # a fragment other than the first has no ports
        return None
    length = int.from_bytes(packet[2:4], "big") or len(packet)
    identification = int.from_bytes(packet[4:6], "big")
    return _read_transport(packet[9], packet[12:16], packet[16:20], packet[header:], identification, length - header)


def _read_transport(
    protocol: int, source: bytes, destination: bytes, body: bytes, identification: int, length: int
) -> Packet | None:  # fmt: skip
    """``length``: of the body as it was sent; less of it may have been captured."""
    if protocol in (ICMP, ICMPV6):
        return _read_icmp(protocol, source, destination, body, identification, length)
    if len(body) < 4:
        return None
    key = flow_key(protocol, source, destination, *_ports(body))
    if protocol == TCP and len(body) >= 20:
        sequence, acknowledged = int.from_bytes(body[4:8], "big"), int.from_bytes(body[8:12], "big")
        flags, payload = body[13], max(0, length - (body[12] >> 4) * 4)
        return Packet(
            key, _tcp_label(flags, payload), (identification, sequence, acknowledged, flags, payload), flags, sequence,
            acknowledged, payload,
        )  # fmt: skip
    if protocol == UDP and len(body) >= 8:
        payload = max(0, length - 8)
        return Packet(
            key, f"datagram, {_bytes(payload)}", (identification, payload, zlib.crc32(body[8:])), payload_bytes=payload
        )
    return Packet(key, f"protocol {protocol}", (identification, length), payload_bytes=length)


def _ports(body: bytes) -> tuple[int, int]:
    return int.from_bytes(body[:2], "big"), int.from_bytes(body[2:4], "big")


def _bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count} bytes"


def _tcp_label(flags: int, payload: int) -> str:
    names = [name for name, bit in (("SYN", SYN), ("FIN", FIN), ("RST", RST)) if flags & bit]
    if payload:
        names.append(f"data, {_bytes(payload)}")
    if flags & ACK and (not names or flags & SYN):
        names.append("ACK")
    return "-".join(names)


def _read_icmp(
    protocol: int, source: bytes, destination: bytes, body: bytes, identification: int, length: int
) -> Packet | None:  # fmt: skip
    if len(body) < 8:
        return None
    kind, code = body[0], body[1]
    errors = _ICMP_ERRORS if protocol == ICMP else _ICMPV6_ERRORS
    if kind in errors:
        inner = _read_ipv4(body[8:]) if protocol == ICMP and len(body) >= 28 else None
        label = _UNREACHABLE.get(code, "unreachable") if protocol == ICMP and kind == 3 else errors[kind]
        about = inner.key if inner is not None else _quoted_key(body[8:])
        key = reverse(about) if about is not None else flow_key(protocol, source, destination, 0, 0)
        return Packet(key, f"ICMP {label}", (identification, kind, code), about=about)
    number = int.from_bytes(body[4:6], "big") if kind in _ICMP_ECHO else 0
    key = flow_key(protocol, source, destination, number, number)
    sequence = int.from_bytes(body[6:8], "big")
    return Packet(
        key, _ICMP_ECHO.get(kind, f"ICMP type {kind}"), (identification, kind, sequence), payload_bytes=length
    )


def _quoted_key(packet: bytes) -> FlowKey | None:
    """Return the key of an IPv4 packet of which an error quotes no more than eight bytes behind the header."""
    header = (packet[0] & 0x0F) * 4 if packet else 0
    if len(packet) < 24 or header < 20 or len(packet) < header + 4 or packet[0] >> 4 != 4:
        return None
    return flow_key(packet[9], packet[12:16], packet[16:20], *_ports(packet[header:]))
