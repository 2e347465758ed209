"""A strict reader of pcapng files, and frames to put into them: what captures are tested with.

The reader is written from draft-ietf-opsawg-pcapng alone and refuses whatever that does not allow.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from testbed.capture.merge import Record
from testbed.model.flows import TCP, UDP, FlowKey, flow_key

NANOSECOND = b"\x09"


@dataclass(frozen=True)
class Interface:
    """An interface description block."""

    name: str
    snap_bytes: int
    options: dict[int, list[bytes]]


@dataclass(frozen=True)
class CapturedPacket:
    """An enhanced packet block."""

    interface: int
    time_ns: int
    length: int
    data: bytes
    comments: tuple[str, ...] = ()
    direction: int = 0


@dataclass
class CaptureFile:
    """A whole file."""

    comment: str = ""
    application: str = ""
    interfaces: list[Interface] = field(default_factory=list)
    packets: list[CapturedPacket] = field(default_factory=list)
    statistics: dict[int, dict[int, int]] = field(default_factory=dict)  # interface -> option -> number


def read_pcapng(data: bytes) -> CaptureFile:
    """Return what a file holds; ValueError when it is not valid to its last byte."""
    found = CaptureFile()
    at = 0
    while at < len(data):
        if at + 12 > len(data):
            raise ValueError(f"half a block at {at}")
        kind, length = struct.unpack_from("<II", data, at)
        if length % 4 or length < 12 or at + length > len(data):
            raise ValueError(f"block of {length} bytes at {at} of {len(data)}")
        if struct.unpack_from("<I", data, at + length - 4)[0] != length:
            raise ValueError(f"block at {at}: its two lengths differ")
        _read_block(found, kind, data[at + 8 : at + length - 4], is_first=at == 0)
        at += length
    return found


def _read_block(found: CaptureFile, kind: int, body: bytes, *, is_first: bool) -> None:
    if is_first != (kind == 0x0A0D0D0A):
        raise ValueError(f"block {kind:#x} is where it must not be")
    if kind == 0x0A0D0D0A:
        magic, major, minor, _length = struct.unpack_from("<IHHq", body)
        if (magic, major, minor) != (0x1A2B3C4D, 1, 0):
            raise ValueError("no section header of version 1.0")
        options = _options(body[16:])
        found.comment, found.application = (options.get(code, [b""])[0].decode() for code in (1, 4))
    elif kind == 1:
        link, reserved, snap = struct.unpack_from("<HHI", body)
        options = _options(body[8:])
        if link != 1 or reserved or options.get(9) != [NANOSECOND]:
            raise ValueError("an interface that is not Ethernet with nanoseconds")
        found.interfaces.append(Interface(options[2][0].decode(), snap, options))
    elif kind == 6:
        interface, high, low, captured, length = struct.unpack_from("<IIIII", body)
        if interface >= len(found.interfaces) or captured > length:
            raise ValueError(f"a packet of interface {interface} with {captured} of {length} bytes")
        padded = captured + (-captured % 4)
        options = _options(body[20 + padded :])
        flags = struct.unpack("<I", options[2][0])[0] if 2 in options else 0
        comments = tuple(text.decode() for text in options.get(1, ()))
        found.packets.append(
            CapturedPacket(interface, high << 32 | low, length, body[20 : 20 + captured], comments, flags & 3)
        )
    elif kind == 5:
        interface = struct.unpack_from("<I", body)[0]
        values = _options(body[12:])
        found.statistics[interface] = {code: struct.unpack("<Q", v[0])[0] for code, v in values.items() if code > 3}
    else:
        raise ValueError(f"block {kind:#x} is of no type that a capture writes")


def _options(data: bytes) -> dict[int, list[bytes]]:
    options: dict[int, list[bytes]] = {}
    at = 0
    while at < len(data):
        code, length = struct.unpack_from("<HH", data, at)
        if code == 0:
            if length or at + 4 != len(data):
                raise ValueError("options do not end where they say")
            return options
        if at + 4 + length > len(data):
            raise ValueError(f"option {code} is cut off")
        options.setdefault(code, []).append(data[at + 4 : at + 4 + length])
        at += 4 + length + (-length % 4)
    if data:
        raise ValueError("options without an end")
    return options


# -- frames ------------------------------------------------------------------------------------------------------------


def end(text: str) -> tuple[bytes, int]:
    """Return ADDRESS:PORT, packed."""
    address, _, port = text.partition(":")
    return IPv4Address(address).packed, int(port or 0)


def key(protocol: int, source: str, destination: str) -> FlowKey:
    (a, a_port), (b, b_port) = end(source), end(destination)
    return flow_key(protocol, a, b, a_port, b_port)


def frame(
    protocol: int, source: str, destination: str, body: bytes, *, ip_id: int = 1, mac: bytes = b"\2" * 6
) -> bytes:
    """Return an Ethernet frame with an IPv4 packet, whose checksums are zero: no reader here looks at them."""
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), ip_id, 0x4000, 64, protocol, 0)
    return b"\4" * 6 + mac + b"\x08\x00" + header + end(source)[0] + end(destination)[0] + body


def tcp(
    source: str, destination: str, flags: int, *, sequence: int = 1000, acknowledged: int = 0, payload: bytes = b"",
    ip_id: int = 1, mac: bytes = b"\2" * 6,
) -> bytes:  # fmt: skip
    ports = end(source)[1], end(destination)[1]
    header = struct.pack(">HHIIBBHHH", *ports, sequence, acknowledged, 5 << 4, flags, 64240, 0, 0)
    return frame(TCP, source, destination, header + payload, ip_id=ip_id, mac=mac)


def udp(source: str, destination: str, payload: bytes, *, ip_id: int = 1) -> bytes:
    header = struct.pack(">HHHH", end(source)[1], end(destination)[1], 8 + len(payload), 0)
    return frame(UDP, source, destination, header + payload, ip_id=ip_id)


def port_unreachable(sender: str, about: bytes) -> bytes:
    """Return the ICMP error of a machine about a frame: to its sender, quoting it."""
    quoted = about[14:]
    to = str(IPv4Address(quoted[12:16]))
    return frame(1, sender, to, struct.pack(">BBHI", 3, 3, 0, 0) + quoted)


def record(time_us: float, point: int, data: bytes) -> Record:
    return Record(round(time_us * 1000), point, len(data), data)


def pcap_stream(*records: tuple[int, bytes], magic: int = 0xA1B23C4D) -> bytes:
    """Return what a tcpdump writes: (time stamp in nanoseconds, frame)…"""
    stream = struct.pack("<IHHiIII", magic, 2, 4, 0, 0, 262144, 1)
    for time_ns, data in records:
        stream += struct.pack("<IIII", *divmod(time_ns, 10**9), len(data), len(data)) + data
    return stream
