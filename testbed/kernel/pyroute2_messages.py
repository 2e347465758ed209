"""Netlink messages encoded by pyroute2 once per shape, and filled in by the thousand.

pyroute2 knows the formats of IPVS and ipset, and takes 0.25 ms for a message (0.45 in the nested kernel), sent one by one
with an event loop around each. A full sync of 5,000 Services has 35,000 of them, all of a few dozen shapes: they differ in
addresses and ports. So each shape is encoded with markers in their places, and what is between the markers is kept
(docs/adr/0009-ipvs-netlink.md).

Importing pyroute2 takes 22 MiB, and 1.6 s in the nested kernel: only what runs in ipvs mode does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HEADER_BYTES = 16


def load() -> None:
    """Import what of pyroute2 is used, for a process whose children will need it."""
    from pyroute2.netlink.generic import ipvs
    from pyroute2.netlink.nfnetlink import ipset

    del ipvs, ipset


class Shape:
    """A message whose variable parts are left open.

    Args:
        message: A pyroute2 message, its attributes set, with each marker in the place of a value of the same length.
        kind: The message's type: pyroute2 chooses formats by it.
        markers: Bytes that occur once each, in the order in which they stand.
    """

    def __init__(self, message: Any, kind: int, markers: Sequence[bytes]) -> None:
        message["header"]["type"] = kind
        message["header"]["flags"] = message["header"]["sequence_number"] = 0
        message.encode()
        rest = bytes(message.data)[_HEADER_BYTES:]
        self._parts: list[bytes] = []
        for marker in markers:
            if rest.count(marker) != 1:
                raise AssertionError(f"marker {marker!r} occurs {rest.count(marker)} times in {rest!r}")
            before, _, rest = rest.partition(marker)
            self._parts.append(before)
        self._last = rest

    def fill(self, *values: bytes) -> bytes:
        """Return the body of the message (without its netlink header) with these values in the markers' places."""
        pieces = []
        for part, value in zip(self._parts, values, strict=True):
            pieces += [part, value]
        return b"".join([*pieces, self._last])
