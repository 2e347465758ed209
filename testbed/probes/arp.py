"""Questions by ARP: who on the LAN says that he has an address?

Meant for `Lab.call`: `ask_arp` runs in a forked child inside a machine's namespaces.
"""

from __future__ import annotations

import socket
import time
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
    from scapy.layers.l2 import ARP, Ether

    link = link_towards(address)
    own = next((one for one in list_link_addresses(link) if address in one.network), None)
    if own is None:
        raise OSError(f"{address} is not on a LAN of this machine")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as made:
        made.bind((link, ETH_P_ARP))
        mac = made.getsockname()[4].hex(":")
        question = Ether(dst=_BROADCAST, src=mac) / ARP(op="who-has", hwsrc=mac, psrc=str(own.ip), pdst=str(address))
        began = time.monotonic()
        made.send(bytes(question))
        answers = []
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
            if said is not None and said.op == 2 and said.psrc == str(address):
                answers.append(ArpAnswer(str(said.hwsrc).lower(), round((time.monotonic() - began) * 1000, 3)))
        return tuple(answers)
