"""Flows as bytes: what makes packets belong together, in the order in which an IPv4 header and a UDP or TCP header have it.

::

    protocol (1) │ source address (4 or 16) │ destination address (4 or 16) │ source port (2) │ destination port (2)

A key is cut out of a packet with two slices, which is what lets Python look at every packet of a capture. ICMP echo has
its identifier in place of both ports.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple, NewType

FlowKey = NewType("FlowKey", bytes)

ICMP, TCP, UDP, SCTP, ICMPV6 = 1, 6, 17, 132, 58
PROTOCOL_NAMES = {ICMP: "ICMP", TCP: "TCP", UDP: "UDP", SCTP: "SCTP", ICMPV6: "ICMPv6"}
_IPV4_KEY_BYTES = 13


class Flow(NamedTuple):
    """A key, read."""

    protocol: int
    source: IPv4Address | IPv6Address
    source_port: int
    destination: IPv4Address | IPv6Address
    port: int

    @property
    def has_ports(self) -> bool:
        return self.protocol in (TCP, UDP, SCTP)

    @property
    def sender(self) -> str:
        return end_text(self.source, self.source_port if self.has_ports else 0)

    @property
    def receiver(self) -> str:
        return end_text(self.destination, self.port if self.has_ports else 0)

    def __str__(self) -> str:
        return f"{self.sender} → {self.receiver}"


def end_text(address: IPv4Address | IPv6Address, port: int) -> str:
    """Return ADDRESS:PORT, or the address alone for port 0."""
    shown = f"[{address}]" if address.version == 6 and port else str(address)
    return f"{shown}:{port}" if port else shown


def flow_key(protocol: int, source: bytes, destination: bytes, source_port: int, port: int) -> FlowKey:
    """Return the key of packed addresses and of ports."""
    ports = source_port.to_bytes(2, "big") + port.to_bytes(2, "big")
    return FlowKey(bytes([protocol]) + source + destination + ports)


def reverse(key: FlowKey) -> FlowKey:
    """Return the key of the answers."""
    half = 1 + (4 if len(key) == _IPV4_KEY_BYTES else 16)
    ports = 2 * half - 1
    return FlowKey(key[:1] + key[half:ports] + key[1:half] + key[ports + 2 :] + key[ports : ports + 2])


def read_key(key: FlowKey) -> Flow:
    """Return what a key says."""
    half = 1 + (4 if len(key) == _IPV4_KEY_BYTES else 16)
    ports = 2 * half - 1
    return Flow(
        key[0],
        ip_address(key[1:half]),
        int.from_bytes(key[ports : ports + 2], "big"),
        ip_address(key[half:ports]),
        int.from_bytes(key[ports + 2 :], "big"),
    )


@dataclass(frozen=True, slots=True)
class ConntrackEntry:
    """One connection as a node tracks it: packets that come as ``original`` are answered by packets that come as ``reply``.

    Without translation ``reply`` is the reverse of ``original``; otherwise the packet leaves as the reverse of ``reply``.
    """

    original: FlowKey
    reply: FlowKey

    @property
    def sent_on(self) -> FlowKey:
        """The key with which a packet of the original direction leaves."""
        return reverse(self.reply)

    @property
    def handed_back(self) -> FlowKey:
        """The key with which an answer leaves."""
        return reverse(self.original)

    @property
    def is_translated(self) -> bool:
        return self.sent_on != self.original
