"""A topology: the networks, nodes and outside hosts of a lab, as asked for. The running thing is in `underlay/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from testbed.model.cluster import ClusterConfig

PROXY_MODES = ("userspace", "iptables", "ipvs", "nftables")
DEFAULT_PROXY_MODE = "iptables"  # what kube-proxy on Linux does with an empty mode
DEFAULT_INTERFACE = "eth0"
DEFAULT_MAX_PODS = 110  # the kubelet's


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A LAN: a bridge called ``br-NAME`` that holds ``gateway``, through which everything on it reaches other networks."""

    name: str
    cidr: IPv4Network
    gateway: IPv4Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Taint:
    """A Node's taint; ``effect`` is NoSchedule, PreferNoSchedule or NoExecute."""

    key: str
    value: str = ""
    effect: str = "NoSchedule"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """A machine of the cluster."""

    name: str
    network: str
    address: IPv4Address
    interface: str = DEFAULT_INTERFACE
    pod_cidr: IPv4Network
    max_pods: int = DEFAULT_MAX_PODS
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Taint, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpec:
    """A machine outside the cluster; ``gateway`` is its default route, ``names`` are what outside DNS calls it besides."""

    name: str
    network: str
    address: IPv4Address
    interface: str = DEFAULT_INTERFACE
    gateway: IPv4Address
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """How good the link between a machine and its LAN is; None means the kernel's own, unlimited."""

    between: tuple[str, str]  # a node or outside host, then a network
    rate_mbit: float | None = None
    delay_ms: float | None = None
    loss_percent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """What a lab is made from. All names are checked: they are safe in commands, link names and paths."""

    name: str
    networks: tuple[Network, ...]
    nodes: tuple[NodeSpec, ...]
    hosts: tuple[HostSpec, ...] = ()
    links: tuple[LinkSpec, ...] = ()
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    outside_dns: str = ""  # the outside host that serves the hosts' names; '': nobody does
    kube_proxy: Mapping[str, Any] = field(default_factory=dict)  # KubeProxyConfiguration fields, as written

    @property
    def proxy_mode(self) -> str:
        """The mode that kube-proxy runs in unless something else is asked for."""
        return str(self.kube_proxy.get("mode") or DEFAULT_PROXY_MODE)

    @property
    def needs_netem(self) -> bool:
        """Say whether a link has delay or loss, which take the kernel's network emulator."""
        return any(link.delay_ms or link.loss_percent for link in self.links)

    @property
    def machines(self) -> tuple[NodeSpec | HostSpec, ...]:
        """Nodes, then outside hosts, in file order."""
        return (*self.nodes, *self.hosts)

    @property
    def resolv_conf(self) -> str:
        """Return /etc/resolv.conf of every machine, which pods with dnsPolicy Default have as well."""
        if not self.outside_dns:
            return "# this network has no DNS server\n"
        return f"nameserver {self.machine(self.outside_dns).address}\n"

    def network(self, name: str) -> Network:
        """Return a network by name; KeyError when there is none."""
        return {network.name: network for network in self.networks}[name]

    def node(self, name: str) -> NodeSpec:
        """Return a node by name; KeyError when there is none."""
        return {node.name: node for node in self.nodes}[name]

    def machine(self, name: str) -> NodeSpec | HostSpec:
        """Return a node or outside host by name; KeyError when there is none."""
        return {machine.name: machine for machine in self.machines}[name]
