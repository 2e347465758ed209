"""What was seen of a running cluster, as of one moment: the input of every detector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from testbed.dataplane.flows import UdpFlow
from testbed.dataplane.ipvs import IpvsObjects
from testbed.model.objects import Object
from testbed.model.proxyconfig import KubeProxyConfig
from testbed.model.topology import Topology


@dataclass(frozen=True, slots=True)
class LinkSeen:
    """A network interface of a node."""

    mtu_bytes: int
    has_carrier: bool


@dataclass(frozen=True, slots=True)
class RouteSeen:
    """A route of a node's main table."""

    destination: IPv4Network
    link: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesSeen:
    """What a node's kernel has of kube-proxy's making, as far as its mode writes it."""

    iptables: str = ""  # iptables-save
    nftables: str | None = None  # the listing of its table, None: there is no table
    ipvs: IpvsObjects = field(default_factory=IpvsObjects)
    ipvs_missing: str = ""  # what of the places for IPVS's objects is gone


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSeen:
    """What was seen inside a node. ``failure``: why nothing could be seen."""

    failure: str = ""
    links: Mapping[str, LinkSeen] = field(default_factory=dict)
    routes: tuple[RouteSeen, ...] = ()
    sysctls: Mapping[str, str] = field(default_factory=dict)  # with slashes, below /proc/sys
    bridge_ports: Mapping[str, bool] = field(default_factory=dict)  # of cni0: is hairpin mode on
    conntrack_count: int = 0
    conntrack_max: int = 0
    udp_flows: tuple[UdpFlow, ...] = ()
    local_addresses: tuple[IPv4Address, ...] = ()
    listening: frozenset[tuple[str, int]] = frozenset()  # protocol (tcp, udp), port
    proxy_answer: str = ""  # what is wrong with kube-proxy's answer to a health check; '': nothing
    rules: RulesSeen = field(default_factory=RulesSeen)


@dataclass(frozen=True, slots=True)
class DnsCount:
    """Counters of a DNS pod, since it started."""

    after_s: float  # when they were read
    answered: int  # with NOERROR, or by dnsmasq itself
    not_found: int  # NXDOMAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsSeen:
    """What a pod of cluster DNS says of itself. ``failure``: why it does not."""

    pod: str  # NAMESPACE/NAME
    failure: str = ""
    counts: tuple[DnsCount, ...] = ()  # two, when both were answered


@dataclass(frozen=True, slots=True)
class ArpSeen:
    """Who on the LAN said that he has an address: machines by name, strangers by MAC."""

    address: IPv4Address
    answered_by: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSeen:
    """A cluster's objects, and what was seen of its machines. ``nodes_seen`` has an entry for every node of the topology."""

    topology: Topology
    config: KubeProxyConfig
    objects: Mapping[str, tuple[Object, ...]] = field(
        default_factory=dict
    )  # by Resource.key; absent: none of that kind
    nodes_seen: Mapping[str, NodeSeen] = field(default_factory=dict)
    dns_seen: tuple[DnsSeen, ...] = ()
    arp_seen: tuple[ArpSeen, ...] = ()

    def list(self, resource: str) -> tuple[Object, ...]:
        return self.objects.get(resource, ())
