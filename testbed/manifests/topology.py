"""Topology files: their format, and the rules that hold between fields.

The format is the Structs below; docs/topology.md explains it to people. Names of nodes, outside hosts and networks share
one name space, because all of them are places or links of one lab.
"""

# No `from __future__ import annotations`: evaluating the Structs' types from text would take longer than all the rest.

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import field

from testbed.errors import ManifestError, Problem
from testbed.manifests.decode import Decoded, Wire, described, json_schema
from testbed.manifests.kubeproxy import KubeProxyWire
from testbed.manifests.scalars import (
    BRIDGE_PREFIX,
    Delay,
    DnsAddress,
    Domain,
    Duration,
    InterfaceName,
    Label,
    LabelKey,
    LabelValue,
    MachineName,
    NetworkName,
    Percent,
    PortRange,
    Rate,
)
from testbed.manifests.source import Document, find_line, load_one
from testbed.manifests.text import suggestion
from testbed.model.cluster import (
    DEFAULT_DOMAIN,
    DEFAULT_NODE_MONITOR_GRACE_S,
    DEFAULT_NODE_PORT_RANGE,
    DEFAULT_POD_CIDR,
    DEFAULT_SERVICE_CIDR,
    DNS_OFFSET,
    ClusterConfig,
)
from testbed.model.proxyconfig import parse_proxy_config
from testbed.model.topology import (
    DEFAULT_INTERFACE,
    DEFAULT_MAX_PODS,
    DEFAULT_PROXY_MODE,
    HostSpec,
    LinkSpec,
    Network,
    NodeSpec,
    Taint,
    Topology,
)

TOPOLOGIES = Path(__file__).resolve().parents[2] / "topologies"
NODE_MASK_BITS = 24  # kube-controller-manager --node-cidr-mask-size
_SMALLEST_NETWORK = 30  # prefix length: a gateway and one machine
_SHORTEST_GRACE_S = 2.0  # times of objects have whole seconds
_LARGEST_SERVICE_CIDR = 12  # kube-apiserver takes no more than 20 bits of addresses

# ── the format ──────────────────────────────────────────────────────────────────────────────────────────────────────


class MetadataWire(Wire):
    """What a document is called."""

    name: Annotated[Label, described("a DNS label")] | None
    labels: Annotated[dict[LabelKey, LabelValue], described("for your own use")] = field(default_factory=dict)
    annotations: Annotated[dict[str, str], described("for your own use")] = field(default_factory=dict)


_MachineName = Annotated[
    MachineName,
    described("a DNS name of at most 63 characters; nodes, hosts and networks share one name space"),
]
_OnNetwork = Annotated[str, described("the name of the LAN it is on")]
_OnAddress = Annotated[
    IPv4Address, described("in the LAN's cidr, and not its network, broadcast or gateway address; used once")
]
_Interface = Annotated[
    InterfaceName,
    described(
        "what its LAN link is called: letters, digits, `_`, `.`, `-`; not a name that nodes use already: lo, cni0, "
        "kube-ipvs0, kube-dummy0, all, default",
        default=DEFAULT_INTERFACE,
    ),
]


class NetworkWire(Wire):
    """A LAN: one bridge, `br-NAME`, in the lab's own network namespace."""

    name: (
        Annotated[
            NetworkName,
            described("a DNS label; the kernel takes 15 characters, and the bridge's name has `br-` before it"),
        ]
        | None
    )
    cidr: (
        Annotated[IPv4Network, described("/30 or larger; must not overlap another LAN, a podCIDR or the serviceCIDR")]
        | None
    )
    gateway: (
        Annotated[
            IPv4Address,
            described(
                "the bridge's own address: the way to other LANs, and the nodes' default route; default: the first one of cidr"
            ),
        ]
        | None
    ) = None


class TaintWire(Wire):
    """A taint of a node."""

    key: Annotated[LabelKey, described("as a label's key")] | None
    effect: (
        Annotated[
            Literal["NoSchedule", "PreferNoSchedule", "NoExecute"],
            described("what it does to pods that do not tolerate it"),
        ]
        | None
    )
    value: (
        Annotated[LabelValue, described("what tolerations with `operator: Equal` compare; default: empty")] | None
    ) = None


class NodeWire(Wire):
    """A machine of the cluster: a network, mount and UTS namespace with one link to its LAN."""

    name: _MachineName | None
    network: _OnNetwork | None
    address: _OnAddress | None
    interface: _Interface | None = None
    pod_cidr: (
        Annotated[
            IPv4Network,
            described(
                "the addresses of its pods, inside the cluster's podCIDR; the first one is the bridge cni0's; "
                f"default: the next free /{NODE_MASK_BITS}"
            ),
        ]
        | None
    ) = field(default=None, name="podCIDR")
    max_pods: (
        Annotated[
            int,
            described(
                "how many pods the node says it takes, which is the scheduler's limit", default=DEFAULT_MAX_PODS, ge=1
            ),
        ]
        | None
    ) = None
    labels: Annotated[dict[LabelKey, LabelValue], described("of the Node object, besides the usual ones")] = field(
        default_factory=dict
    )
    taints: Annotated[list[TaintWire], described("of the Node object")] = field(default_factory=list)


class HostWire(Wire):
    """A machine outside the cluster: a client, a server, a router's neighbour."""

    name: _MachineName | None
    network: _OnNetwork | None
    address: _OnAddress | None
    interface: _Interface | None = None
    gateway: (
        Annotated[IPv4Address, described("its default route, an address of its LAN; default: the network's gateway")]
        | None
    ) = None
    names: Annotated[
        list[Domain],
        described("DNS names that outsideDNS gives for its address besides its own; not in `cluster.domain`"),
    ] = field(default_factory=list)


class LinkWire(Wire):
    """The quality of the link between a machine and its LAN, at both ends. A link that is not listed is as fast as it goes.

    Delay and loss need the kernel's netem (sch_netem), unless they are 0. `testbed validate` looks at files only; on a
    kernel without it, `up` refuses them, and `run` uses the nested kernel or skips the scenario.
    """

    between: (
        Annotated[
            list[str],
            described("a node or host, and its network", min_length=2, max_length=2, examples=[["client", "lan"]]),
        ]
        | None
    )
    rate: (
        Annotated[Rate, described("bits a second that it lets through, as tc spells them; default: no limit")] | None
    ) = None
    delay: Annotated[Delay, described("added to each packet, in each direction; default: none")] | None = None
    loss: Annotated[Percent, described("of the packets of each direction; default: none")] | None = None


class ClusterWire(Wire):
    """Cluster-wide settings: what a real cluster gives its API server, controllers and kubelets as flags."""

    pod_cidr: (
        Annotated[IPv4Network, described("the range that nodes get their podCIDR from", default=str(DEFAULT_POD_CIDR))]
        | None
    ) = field(default=None, name="podCIDR")
    service_cidr: (
        Annotated[
            IPv4Network,
            described(
                f"the range of ClusterIPs, /{_LARGEST_SERVICE_CIDR} to /{_SMALLEST_NETWORK}; its first address is the Service "
                "`kubernetes`",
                default=str(DEFAULT_SERVICE_CIDR),
            ),
        ]
        | None
    ) = field(default=None, name="serviceCIDR")
    node_port_range: (
        Annotated[
            PortRange,
            described("first and last port that a nodePort may be", default="{}-{}".format(*DEFAULT_NODE_PORT_RANGE)),
        ]
        | None
    ) = None
    domain: Annotated[Domain, described("the zone of cluster DNS", default=DEFAULT_DOMAIN)] | None = None
    dns: (
        Annotated[
            DnsAddress,
            described(
                "the ClusterIP of cluster DNS; `none`: the cluster has no DNS; default: the tenth address of serviceCIDR"
            ),
        ]
        | None
    ) = None
    node_monitor_grace_period: (
        Annotated[
            Duration,
            described(
                f"how long a node may be silent before it is NotReady, {_SHORTEST_GRACE_S:g}s at least; also the duration of its "
                "Lease",
                default=f"{DEFAULT_NODE_MONITOR_GRACE_S:g}s",
            ),
        ]
        | None
    ) = None


class SpecWire(Wire):
    """What a lab is made from."""

    networks: Annotated[list[NetworkWire], described("the LANs", min_length=1)] | None
    nodes: Annotated[list[NodeWire], described("the machines of the cluster", min_length=1)] | None
    hosts: Annotated[list[HostWire], described("machines outside the cluster")] = field(default_factory=list)
    links: Annotated[list[LinkWire], described("links that are worse than perfect, one entry for each machine")] = (
        field(default_factory=list)
    )
    cluster: Annotated[ClusterWire | None, described("address ranges and names; default: as below")] = None
    outside_dns: (
        Annotated[
            str,
            described(
                "the outside host that is the DNS server of the world: it knows all machines by name, and the hosts' `names`. "
                "Every machine's resolv.conf names it, and cluster DNS forwards to it; default: nobody"
            ),
        ]
        | None
    ) = field(default=None, name="outsideDNS")
    kube_proxy: Annotated[
        KubeProxyWire | None, described(f"how kube-proxy runs on every node; default: mode {DEFAULT_PROXY_MODE}")
    ] = None


class TopologyWire(Wire):
    """A topology file."""

    api_version: Annotated[Literal["testbed/v1"], described("the version of the format")] | None
    kind: Annotated[Literal["Topology"], described("what the file is")] | None
    metadata: Annotated[MetadataWire | None, described("its name")]
    spec: Annotated[SpecWire | None, described("what a lab is made from")]


def topology_schema() -> dict[str, Any]:
    """Return the format as JSON Schema."""
    return json_schema(TopologyWire, "Topology")


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def find_topology(text: str, folder: Path = Path(), ours: Path = TOPOLOGIES) -> Path:
    """Return the file that a name or path means: a file (from ``folder``), or the NAME of one in ``folder`` or of ours.

    Raises:
        ManifestError: there is no such file.
    """
    is_name = "/" not in text and not text.endswith((".yaml", ".yml"))
    candidates = [folder / f"{text}.yaml", ours / f"{text}.yaml"] if is_name else [folder / text]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(file.stem for file in ours.glob("*.yaml"))
    hint = suggestion(text, known) or f" (ours: {', '.join(known)})"
    what = f"there is no topology {text!r}{hint}" if is_name else f"there is no file {text!r}"
    raise ManifestError([Problem(text if text.isprintable() else repr(text), 0, what)])


def load_topology(path: Path) -> Topology:
    """Return the topology of a file.

    Raises:
        ManifestError: every problem of the file.
    """
    return load_one(path, "topology", read_topology)


def read_topology(document: Document) -> tuple[Topology | None, list[Problem]]:
    """Return the topology of a document, or None, and everything wrong with it."""
    decoded = Decoded(document)
    wire = decoded.decode(TopologyWire)
    if wire is None or wire.spec is None:
        return None, decoded.problems
    topology = _Reader(decoded, wire.spec).read(wire.metadata)
    return (None if decoded.problems else topology), decoded.problems


class _Reader:
    """Turns a decoded spec into a Topology, reporting what does not fit together.

    Fields that are None were reported by the decoder already; the rules here pass over them.
    """

    def __init__(self, decoded: Decoded, spec: SpecWire) -> None:
        self.decoded = decoded
        self.refuse = decoded.refuse
        self.spec = spec
        self.networks = spec.networks or []
        self.nodes = spec.nodes or []
        self.machines: list[NodeWire | HostWire] = [*self.nodes, *spec.hosts]
        self.cluster = spec.cluster

    def read(self, metadata: MetadataWire | None) -> Topology | None:
        self._check_names()
        networks = [network for wire in self.networks if (network := self._network(wire))]
        self.by_name = {network.name: network for network in networks}
        cluster = self._cluster_config()
        self._check_overlaps(cluster)
        self._check_addresses()
        pod_cidrs = self._pod_cidrs(cluster)
        links = [link for wire in self.spec.links if (link := self._link(wire))]
        self._check_one_link_each()
        self._check_outside_names(cluster)
        self._check_kube_proxy()
        if self.decoded.problems or metadata is None or metadata.name is None:
            return None
        return Topology(
            name=str(metadata.name),
            networks=tuple(networks),
            nodes=tuple(self._node(wire, pod_cidrs[wire.name]) for wire in self.nodes if wire.name is not None),
            hosts=tuple(self._host(wire) for wire in self.spec.hosts),
            links=tuple(links),
            cluster=cluster,
            outside_dns=str(self.spec.outside_dns or ""),
            kube_proxy=self.decoded.document.value["spec"].get("kubeProxy") or {},
        )

    def _check_kube_proxy(self) -> None:
        """Check what kube-proxy itself would refuse when it starts."""
        document = self.decoded.document
        if self.decoded.problems or self.spec.kube_proxy is None:
            return
        for cause in parse_proxy_config(document.value["spec"].get("kubeProxy") or {})[1]:
            path = f"spec.kubeProxy.{cause.field}"
            line = find_line(document.lines, path)
            self.decoded.problems.append(Problem(document.file, line, f"spec.kubeProxy.{cause}"))

    # Names

    def _check_names(self) -> None:
        taken: dict[str, str] = {}  # name -> where it is taken
        for wire in (*self.networks, *self.machines):
            if wire.name is None:
                continue
            place = f"line {self.decoded.line(wire, 'name')}"
            names = (wire.name, BRIDGE_PREFIX + wire.name) if isinstance(wire, NetworkWire) else (wire.name,)
            clash = next((name for name in names if name in taken), None)
            if clash == wire.name:
                self.refuse(wire, "name", reason=f"{wire.name!r} is already the name of {taken[clash]}")
            elif clash is not None:
                self.refuse(wire, "name", reason=f"its bridge {clash!r} has the name of {taken[clash]}")
            for name in names:
                what = "the bridge of the network" if name != wire.name else _kind_of(wire)
                taken.setdefault(str(name), f"{what} in {place}")

    # Networks and addresses

    def _network(self, wire: NetworkWire) -> Network | None:
        if wire.cidr is None:
            return None
        if wire.cidr.prefixlen > _SMALLEST_NETWORK:
            self.refuse(wire, "cidr", reason=f"{wire.cidr} is too small for a gateway and a machine (/30 at least)")
            return None
        if reason := _unusable(wire.cidr):
            self.refuse(wire, "cidr", reason=f"{wire.cidr} {reason}")
        gateway = wire.gateway or wire.cidr[1]
        if wire.gateway is not None:
            self._check_host_part(wire, "gateway", gateway, wire.cidr, f"network {wire.name}")
        return Network(name=str(wire.name), cidr=wire.cidr, gateway=gateway) if wire.name is not None else None

    def _check_host_part(self, wire: Wire, field_name: str, address: IPv4Address, cidr: IPv4Network, what: str) -> bool:
        """Say whether the address is one that a machine in the range can have; report it if not."""
        if address not in cidr:
            reason = f"{address} is outside {what} ({cidr})"
        elif address == cidr.network_address:
            reason = f"{address} is the network address of {what} ({cidr})"
        elif address == cidr.broadcast_address:
            reason = f"{address} is the broadcast address of {what} ({cidr})"
        else:
            return True
        self.refuse(wire, field_name, reason=reason)
        return False

    def _check_addresses(self) -> None:
        taken: dict[IPv4Address, str] = {}
        for wire in self.machines:
            network = self._network_of(wire)
            if wire.address is None:
                continue
            if network is not None and self._check_host_part(
                wire, "address", wire.address, network.cidr, f"network {network.name}"
            ):
                if wire.address == network.gateway:
                    self.refuse(wire, "address", reason=f"{wire.address} is the gateway of network {network.name}")
                if isinstance(wire, HostWire) and wire.gateway is not None:
                    self._check_gateway(wire, wire.gateway, network)
            if wire.address in taken:
                self.refuse(wire, "address", reason=f"{wire.address} is already on {taken[wire.address]}")
            taken.setdefault(wire.address, f"{_shown(wire)} (line {self.decoded.line(wire, 'address')})")

    def _check_gateway(self, wire: HostWire, gateway: IPv4Address, network: Network) -> None:
        if (
            self._check_host_part(wire, "gateway", gateway, network.cidr, f"network {network.name}")
            and gateway == wire.address
        ):
            self.refuse(wire, "gateway", reason=f"{gateway} is its own address")

    def _network_of(self, wire: NodeWire | HostWire) -> Network | None:
        if wire.network is None:
            return None
        if wire.network not in {network.name for network in self.networks}:
            self.refuse(
                wire,
                "network",
                reason=_no_such("network", wire.network, [str(n.name) for n in self.networks if n.name]),
            )
        return self.by_name.get(wire.network)

    # Ranges

    def _cluster_config(self) -> ClusterConfig:
        wire = self.cluster or ClusterWire()  # of a new one no field is given, so nothing is reported for it
        service_cidr = wire.service_cidr or DEFAULT_SERVICE_CIDR
        if wire.service_cidr is not None and not _LARGEST_SERVICE_CIDR <= service_cidr.prefixlen <= _SMALLEST_NETWORK:
            self.refuse(
                wire,
                "serviceCIDR",
                reason=f"{service_cidr} is not between /{_LARGEST_SERVICE_CIDR} and /{_SMALLEST_NETWORK}",
            )
        dns: IPv4Address | None
        if wire.dns is not None:
            dns = None if wire.dns == "none" else IPv4Address(wire.dns)
            if dns is None or self._is_unread(wire, "serviceCIDR"):
                pass
            elif self._check_host_part(wire, "dns", dns, service_cidr, "serviceCIDR") and dns == service_cidr[1]:
                self.refuse(wire, "dns", reason=f"{dns} is the address of the Service 'kubernetes'")
        elif service_cidr.num_addresses > DNS_OFFSET + 1:
            dns = service_cidr[DNS_OFFSET]
        else:
            dns = service_cidr[2]
        grace_s = wire.node_monitor_grace_period
        if grace_s is not None and grace_s < _SHORTEST_GRACE_S:
            self.refuse(wire, "nodeMonitorGracePeriod", reason=f"{grace_s:g}s is less than {_SHORTEST_GRACE_S:g}s")
        for name, cidr in (("podCIDR", wire.pod_cidr), ("serviceCIDR", wire.service_cidr)):
            if cidr is not None and (reason := _unusable(cidr)):
                self.refuse(wire, name, reason=f"{cidr} {reason}")
        return ClusterConfig(
            pod_cidr=wire.pod_cidr or DEFAULT_POD_CIDR,
            service_cidr=service_cidr,
            node_port_range=wire.node_port_range or DEFAULT_NODE_PORT_RANGE,
            domain=str(wire.domain or DEFAULT_DOMAIN),
            dns=dns,
            node_monitor_grace_s=float(wire.node_monitor_grace_period or DEFAULT_NODE_MONITOR_GRACE_S),
        )

    def _check_overlaps(self, cluster: ClusterConfig) -> None:
        """Report ranges that share addresses: a packet to one of them would have two places to go."""
        seen: list[tuple[IPv4Network, str]] = []
        ranges: list[tuple[IPv4Network, str, Wire, str]] = [
            (wire.cidr, f"network {wire.name}", wire, "cidr") for wire in self.networks if wire.cidr is not None
        ]
        at: Wire = self.cluster or self.spec
        for cidr, name in ((cluster.pod_cidr, "podCIDR"), (cluster.service_cidr, "serviceCIDR")):
            if not self._is_unread(self.cluster, name):
                ranges.append((cidr, name, at, name))
        for cidr, what, wire, field_name in ranges:
            for other, other_what in seen:
                if cidr.overlaps(other):
                    self.refuse(wire, field_name, reason=f"{cidr} overlaps {other_what} ({other})")
            seen.append((cidr, what))

    def _pod_cidrs(self, cluster: ClusterConfig) -> dict[str, IPv4Network]:
        """Return each node's range: its own, or the next free /24 of the cluster's."""
        given: dict[IPv4Network, str] = {}
        for wire in self.nodes:
            cidr = wire.pod_cidr
            if cidr is None:
                continue
            if not cidr.subnet_of(cluster.pod_cidr) and not self._is_unread(self.cluster, "podCIDR"):
                self.refuse(wire, "podCIDR", reason=f"{cidr} is outside the cluster's podCIDR ({cluster.pod_cidr})")
            if cidr.prefixlen > _SMALLEST_NETWORK:
                self.refuse(wire, "podCIDR", reason=f"{cidr} is too small for a gateway and a pod (/30 at least)")
            for other, owner in given.items():
                if cidr.overlaps(other):
                    self.refuse(wire, "podCIDR", reason=f"{cidr} overlaps the podCIDR of {owner} ({other})")
            given.setdefault(cidr, f"{_shown(wire)} in line {self.decoded.line(wire, 'podCIDR')}")
        free = self._free_blocks(cluster.pod_cidr, tuple(given))
        found: dict[str, IPv4Network] = {}
        for wire in self.nodes:
            if wire.pod_cidr is None and (self._is_unread(wire, "podCIDR") or self._is_unread(self.cluster, "podCIDR")):
                continue
            cidr = wire.pod_cidr or next(free, None)
            if cidr is None:
                self.refuse(
                    wire,
                    reason=f"no /{NODE_MASK_BITS} is left for its pods in the cluster's podCIDR ({cluster.pod_cidr})",
                )
            elif wire.name is not None:
                found[str(wire.name)] = cidr
        return found

    def _is_unread(self, wire: Wire | None, field_name: str) -> bool:
        """Say whether a field was given but could not be read; rules about its value would only repeat that."""
        return wire is not None and self.decoded.is_unread(wire, field_name)

    @staticmethod
    def _free_blocks(whole: IPv4Network, taken: Sequence[IPv4Network]) -> Iterator[IPv4Network]:
        if whole.prefixlen > NODE_MASK_BITS:
            return iter(())
        blocks = whole.subnets(new_prefix=NODE_MASK_BITS)
        return (block for block in blocks if not any(block.overlaps(other) for other in taken))

    # Links

    def _link(self, wire: LinkWire) -> LinkSpec | None:
        if wire.between is None or len(wire.between) != 2:
            return None
        networks = {str(network.name) for network in self.networks}
        machines = {str(machine.name): machine for machine in self.machines if machine.name is not None}
        first, second = wire.between
        machine, network = (second, first) if first in networks and second in machines else (first, second)
        for index, name in enumerate(wire.between):
            if name not in networks and name not in machines:
                reason = _no_such("node, host or network", name, [*machines, *networks])
                self.refuse(wire, "between", index, reason=reason)
        if not {first, second} <= networks | machines.keys():
            return None
        if machine not in machines or network not in networks:
            self.refuse(wire, "between", reason=f"wants a node or host and its network, got {first!r} and {second!r}")
            return None
        if machines[machine].network != network:
            self.refuse(
                wire,
                "between",
                reason=f"{machine!r} is not on network {network!r} but on {machines[machine].network!r}",
            )
            return None
        return LinkSpec(
            between=(machine, network),
            rate_mbit=None if wire.rate is None else float(wire.rate),
            # None where there is nothing to do: the kernel may lack what it takes to delay or lose packets.
            delay_ms=float(wire.delay) if wire.delay else None,
            loss_percent=float(wire.loss) if wire.loss else None,
        )

    def _check_one_link_each(self) -> None:
        seen: dict[frozenset[str], int] = {}
        for wire in self.spec.links:
            if wire.between is None or len(wire.between) != 2:
                continue
            ends = frozenset(wire.between)
            if ends in seen:
                self.refuse(wire, "between", reason=f"this link is already described in line {seen[ends]}")
            seen.setdefault(ends, self.decoded.line(wire))

    # Names outside the cluster

    def _check_outside_names(self, cluster: ClusterConfig) -> None:
        server = self.spec.outside_dns
        hosts = [str(host.name) for host in self.spec.hosts if host.name is not None]
        if server is not None and server not in hosts:
            self.refuse(self.spec, "outsideDNS", reason=_no_such("outside host", server, hosts))
        for wire in self.spec.hosts:
            if wire.names and server is None and not self._is_unread(self.spec, "outsideDNS"):
                self.refuse(wire, "names", reason="nobody serves them: set spec.outsideDNS to one of the hosts")
            for index, name in enumerate(wire.names):
                if f".{name}".endswith(f".{cluster.domain}"):
                    reason = f"{name!r} is in the cluster's own domain ({cluster.domain})"
                    self.refuse(wire, "names", index, reason=reason)

    # Nothing is wrong any more

    def _node(self, wire: NodeWire, pod_cidr: IPv4Network) -> NodeSpec:
        assert wire.address is not None, wire.name
        return NodeSpec(
            name=str(wire.name),
            network=str(wire.network),
            address=wire.address,
            interface=str(wire.interface or DEFAULT_INTERFACE),
            pod_cidr=pod_cidr,
            max_pods=wire.max_pods or DEFAULT_MAX_PODS,
            labels={str(key): str(value) for key, value in wire.labels.items()},
            taints=tuple(Taint(key=str(t.key), value=str(t.value or ""), effect=str(t.effect)) for t in wire.taints),
        )

    def _host(self, wire: HostWire) -> HostSpec:
        assert wire.address is not None, wire.name
        return HostSpec(
            name=str(wire.name),
            network=str(wire.network),
            address=wire.address,
            interface=str(wire.interface or DEFAULT_INTERFACE),
            gateway=wire.gateway or self.by_name[str(wire.network)].gateway,
            names=tuple(str(name) for name in wire.names),
        )


def _kind_of(wire: Wire) -> str:
    match wire:
        case NetworkWire():
            return "the network"
        case NodeWire():
            return "the node"
    return "the host"


def _shown(wire: NodeWire | HostWire) -> str:
    return f"{'node' if isinstance(wire, NodeWire) else 'host'} {wire.name}"


def _no_such(what: str, name: str, known: Sequence[str]) -> str:
    hint = suggestion(name, known) or f" (there is: {', '.join(known)})" * bool(known)
    return f"no {what} is called {name!r}{hint}"


def _unusable(cidr: IPv4Network) -> str:
    """Return why a range means something else to every kernel, or ''."""
    special = {
        "127.0.0.0/8": "loopback",
        "224.0.0.0/3": "multicast or reserved",
        "0.0.0.0/8": "'this network'",
        "169.254.0.0/16": "link-local",
    }
    return next(
        (f"overlaps {other}, which is {what}" for other, what in special.items() if cidr.overlaps(IPv4Network(other))),
        "",
    )
