"""The blocks of a pcapng file that a capture writes. Pure (docs/adr/0014-capture.md says why they are our own).

::

    section header │ interface description, one a point │ enhanced packet … │ interface statistics, one a point

Every block is whole in what a function returns, so a file cut between two of them is valid.

Source: draft-ietf-opsawg-pcapng-02 (PCAP Now Generic), sections 3 and 4.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from testbed.capture.merge import Record

_SECTION, _INTERFACE, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 5, 6
_BYTE_ORDER = 0x1A2B3C4D
_ANY_LENGTH = 0xFFFFFFFFFFFFFFFF
_OPT_COMMENT = 1
_SHB_OS, _SHB_USERAPPL = 3, 4
_IF_NAME, _IF_DESCRIPTION, _IF_MACADDR, _IF_TSRESOL, _IF_FILTER = 2, 3, 6, 9, 11
_EPB_FLAGS = 2
_ISB_START, _ISB_END, _ISB_RECEIVED, _ISB_DROPPED, _ISB_OS_DROPPED, _ISB_DELIVERED = 2, 3, 4, 5, 7, 8
_ETHERNET = 1  # LINKTYPE_ETHERNET
_NANOSECONDS = b"\x09"
_LONGEST = 0xFFFC  # of an option, whose length is 16 bits
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")
_END_OF_OPTIONS = b"\0\0\0\0"
_LENGTH = struct.Struct("<I")
_PACKET_HEADER = struct.Struct("<IIIIIII")
_PACKET_OVERHEAD = _PACKET_HEADER.size + _LENGTH.size

INBOUND, OUTBOUND, UNKNOWN = 1, 2, 0
"""Directions of a packet, as its interface sees it (epb_flags, bits 0 and 1)."""


def option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + _PADDING[len(value) & 3]


def _text(code: int, text: str) -> bytes:
    encoded = text.encode()[:_LONGEST]
    return option(code, encoded.decode(errors="ignore").encode()) if encoded else b""


def _block(kind: int, body: bytes, options: bytes = b"") -> bytes:
    if options:
        options += _END_OF_OPTIONS
    length = struct.pack("<I", 12 + len(body) + len(options))
    return struct.pack("<I", kind) + length + body + options + length


def section_header(*, system: str, application: str, comment: str = "") -> bytes:
    """Return what a file begins with."""
    body = struct.pack("<IHHQ", _BYTE_ORDER, 1, 0, _ANY_LENGTH)
    return _block(
        _SECTION, body, _text(_OPT_COMMENT, comment) + _text(_SHB_OS, system) + _text(_SHB_USERAPPL, application)
    )


def interface_description(
    name: str, *, snap_bytes: int, mac: bytes = b"", description: str = "", filter_text: str = ""
) -> bytes:  # fmt: skip
    """Return the block of one point; packets name it by its place among them, from 0."""
    options = _text(_IF_NAME, name) + _text(_IF_DESCRIPTION, description)
    if len(mac) == 6:
        options += option(_IF_MACADDR, mac)
    options += option(_IF_TSRESOL, _NANOSECONDS)
    if filter_text:
        options += option(_IF_FILTER, b"\0" + filter_text.encode()[: _LONGEST - 1])  # 0: as libpcap writes filters
    return _block(_INTERFACE, struct.pack("<HHI", _ETHERNET, 0, snap_bytes), options)


def packet_options(direction: int, comments: Sequence[str] = ()) -> bytes:
    """Return the options of packets alike, for `enhanced_packet`; b'' when there is nothing to say."""
    options = b"".join(_text(_OPT_COMMENT, comment) for comment in comments)
    if direction != UNKNOWN:
        options += option(_EPB_FLAGS, struct.pack("<I", direction))
    return options + _END_OF_OPTIONS if options else b""


def enhanced_packet(record: Record, options: bytes) -> bytes:
    """Return one packet's block."""
    time_ns, point, length, data = record
    captured = len(data)
    padding = _PADDING[captured & 3]
    total = _PACKET_OVERHEAD + captured + len(padding) + len(options)
    return b"".join(
        (
            _PACKET_HEADER.pack(_PACKET, total, point, time_ns >> 32, time_ns & 0xFFFFFFFF, captured, length),
            data,
            padding,
            options,
            _LENGTH.pack(total),
        )
    )


def interface_statistics(
    point: int, *, start_ns: int, end_ns: int, received: int, dropped: int, delivered: int, comment: str = ""
) -> bytes:  # fmt: skip
    """Return what became of the packets at a point.

    Args:
        received: packets that passed the filter.
        dropped: those of them that the kernel had no room for.
        delivered: packets that came out of it.
    """
    options = _text(_OPT_COMMENT, comment)
    for code, time_ns in ((_ISB_START, start_ns), (_ISB_END, end_ns)):
        options += option(code, struct.pack("<II", time_ns >> 32, time_ns & 0xFFFFFFFF))
    counts = (_ISB_RECEIVED, received), (_ISB_DROPPED, dropped), (_ISB_OS_DROPPED, dropped), (_ISB_DELIVERED, delivered)
    for code, count in counts:
        options += option(code, struct.pack("<Q", count))
    return _block(_STATISTICS, struct.pack("<III", point, end_ns >> 32, end_ns & 0xFFFFFFFF), options)
