"""Questions by ARP: who on the LAN says that he has an address?

Meant for `Lab.call`: `ask_arp` runs in a forked child inside a machine's namespaces.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

from testbed.kernel.addresses import link_towards, list_link_addresses

ETH_P_ARP = 0x0806
_BROADCAST = "ff:ff:ff:ff:ff:ff"


@dataclass(frozen=True, slots=True)
class ArpAnswer:
    """Somebody says that he has the address. ``mac`` in lower case with colons."""

    mac: str
    after_ms: float


def ask_arp(address: IPv4Address, patience_s: float) -> tuple[ArpAnswer, ...]:
    """Ask once who has an address, and return every answer that comes in time, in order; one machine may give several.

    Raises:
        OSError: no link leads to the address, or there is no permission.
    """
    return ask_arp_for_all([address], patience_s)[address]


def ask_arp_for_all(addresses: Sequence[IPv4Address], patience_s: float) -> dict[IPv4Address, tuple[ArpAnswer, ...]]:
    """Ask once who has each of these addresses of one LAN, and return the answers that come in time.

    Raises:
        OSError: no link leads to them, or there is no permission.
    """
    from scapy.layers.l2 import ARP, Ether

    link = link_towards(addresses[0])
    linked = list_link_addresses(link)
    found: dict[IPv4Address, list[ArpAnswer]] = {address: [] for address in addresses}
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as made:
        made.bind((link, ETH_P_ARP))
        mac = made.getsockname()[4].hex(":")
        began = time.monotonic()
        for address in addresses:
            own = next((one for one in linked if address in one.network), None)
            if own is None:
                raise OSError(f"{address} is not on a LAN of this machine")
            question = ARP(op="who-has", hwsrc=mac, psrc=str(own.ip), pdst=str(address))
            made.send(bytes(Ether(dst=_BROADCAST, src=mac) / question))
        while (left_s := patience_s - (time.monotonic() - began)) > 0:
            made.settimeout(left_s)
            try:
                frame, (_, _, kind, *_) = made.recvfrom(2048)
            except TimeoutError:
                break
            if kind == socket.PACKET_OUTGOING:
                continue
            said = Ether(frame).getlayer(ARP)
            # An answer to us; a gratuitous one in between says who has it as well.
            if said is not None and said.op == 2 and (asked := found.get(IPv4Address(said.psrc))) is not None:
                asked.append(ArpAnswer(str(said.hwsrc).lower(), round((time.monotonic() - began) * 1000, 3)))
    return {address: tuple(answers) for address, answers in found.items()}
