"""Who announces which address: the election that every speaker holds for itself, with the same outcome everywhere.

::

    Eip.status.used ─▶ address ─▶ its Services ─▶ nodes (Cluster: all, Local: with a ready endpoint)
                                                    ∩ live speakers that can announce the pool ─▶ least sha256(node#address)

Source: openelb v0.6 pkg/speaker/layer2/memberlist.go, pkg/speaker/manager.go; MetalLB's formula is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface

from testbed.controllers.openelb.names import LAYER2
from testbed.controllers.openelb.pools import AddressRange, Pool
from testbed.model.objects import Object

CAN_REACH = "can_reach"
#: Among the pools that a speaker cannot announce: it has just started, and can announce none yet.
EVERYTHING = "*"


def election_order(nodes: Iterable[str], address: str) -> tuple[str, ...]:
    """Return nodes in the order in which they would announce an address: the first one does."""
    return tuple(sorted(nodes, key=lambda node: hashlib.sha256(f"{node}#{address}".encode()).digest()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """The outcome of one address's election. ``order``: the candidates, the announcing one first; () when there is none."""

    address: str
    pool: str
    interface: str
    services: tuple[str, ...]  # NAMESPACE/NAME
    order: tuple[str, ...]

    @property
    def owner(self) -> str:
        return self.order[0] if self.order else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """What a speaker knows. Services and Endpoints by NAMESPACE/NAME."""

    pools: Sequence[Pool]
    services: Mapping[str, Object]
    endpoints: Mapping[str, Object]
    nodes: frozenset[str]


def candidate_nodes(view: ClusterView, services: Iterable[str]) -> frozenset[str]:
    """Return the nodes that may announce an address of these Services: the union over them."""
    found: set[str] = set()
    for key in services:
        service = view.services.get(key)
        if service is None:
            continue
        if (service.get("spec") or {}).get("externalTrafficPolicy") == "Local":
            found |= ready_nodes(view.endpoints.get(key)) & view.nodes
        else:
            found |= view.nodes
    return frozenset(found)


def ready_nodes(endpoints: Object | None) -> frozenset[str]:
    """Return the nodes that a ready endpoint address is on."""
    subsets = (endpoints or {}).get("subsets") or ()
    addresses = (address for subset in subsets for address in subset.get("addresses") or ())
    return frozenset(address["nodeName"] for address in addresses if address.get("nodeName"))


class Elections:
    """Holds the elections of all layer-2 addresses whenever something changed.

    Args:
        is_strict: as upstream 0.6 is: nodes that cannot announce a pool take part in its elections (and nobody answers
            when they win), and the nodes of a Service that has its address alone are looked at only when the address is
            new or the members change.
    """

    def __init__(self, *, is_strict: bool = False) -> None:
        self.is_strict = is_strict
        self._remembered: dict[str, frozenset[str]] = {}
        self._members: frozenset[str] = frozenset()

    def hold(self, view: ClusterView, members: Mapping[str, frozenset[str]]) -> dict[str, Announcement]:
        """Return the outcome of every address in use.

        Args:
            members: live speakers, each with the pools that it cannot announce.
        """
        if frozenset(members) != self._members:
            self._remembered.clear()
            self._members = frozenset(members)
        outcome: dict[str, Announcement] = {}
        for pool in view.pools:
            if pool.protocol != LAYER2 or pool.is_deleting:
                continue
            able = {node for node, cannot in members.items() if self.is_strict or not {pool.name, EVERYTHING} & cannot}
            for address, services in pool.used.items():
                nodes = self._nodes(view, address, services)
                outcome[address] = Announcement(
                    address=address,
                    pool=pool.name,
                    interface=pool.interface,
                    services=services,
                    order=election_order(nodes & able, address),
                )
        self._remembered = {address: nodes for address, nodes in self._remembered.items() if address in outcome}
        return outcome

    def _nodes(self, view: ClusterView, address: str, services: Sequence[str]) -> frozenset[str]:
        if not self.is_strict or len(services) != 1:
            return candidate_nodes(view, services)
        if address not in self._remembered:
            self._remembered[address] = candidate_nodes(view, services)
        return self._remembered[address]


def interface_problem(interface: str, parsed: AddressRange, addresses: Sequence[IPv4Interface]) -> str:
    """Return why a pool cannot be announced on a link with these addresses, or ''."""
    for address in addresses:
        if parsed.first in address.network and parsed.last in address.network:
            return ""
    return f"{interface}'s ip and the eip[{parsed.first}-{parsed.last}] are not in the same network segment"


def parse_interface(text: str) -> tuple[str, str]:
    """Return the name of an Eip's interface and '', or '' and the address that its route leads to.

    Raises:
        ValueError: in upstream's words.
    """
    method, colon, address = text.partition(":")
    if not colon:
        return text, ""
    if method != CAN_REACH:
        raise ValueError("invalid interface string, now only support can_reach")
    return "", address.strip()
