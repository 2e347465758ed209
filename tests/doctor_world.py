"""A healthy cluster as the doctor sees it: three nodes with the rules that kube-proxy wrote, DNS that answers, one Service."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from ipvs_support import FakeNode
from nft_support import FakeNft
from proxy_support import FakeIptables, endpoint, endpoint_slice, node_object, service

from testbed.dataplane import nft_names, userspace
from testbed.dataplane.doctor import (
    ArpSeen,
    ClusterSeen,
    DnsCount,
    DnsSeen,
    Finding,
    LinkSeen,
    NodeSeen,
    RouteSeen,
    RulesSeen,
    diagnose,
)
from testbed.dataplane.doctor.rules import proxy_state
from testbed.kernel.iptables import Backend, Iptables
from testbed.kernel.nftables import Nftables
from testbed.manifests import find_topology, load_topology
from testbed.model.objects import Object
from testbed.model.proxyconfig import parse_proxy_config
from testbed.model.service import parse_node
from testbed.programs.proxy_iptables import IptablesProxier
from testbed.programs.proxy_ipvs import IpvsProxier
from testbed.programs.proxy_nftables import NftablesProxier

NODES = ("node1", "node2", "node3")
TOPOLOGY = load_topology(find_topology("three-nodes"))
SLICES, CLASSES = "endpointslices.discovery.k8s.io", "ingressclasses.networking.k8s.io"
EIPS, INGRESSES = "eips.network.kubesphere.io", "ingresses.networking.k8s.io"


def pod(name: str, node: str = "node1", *, namespace: str = "ns", ready: bool = True, **labels: str) -> Object:
    """Return a running pod."""
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {k.replace("_", "-"): v for k, v in labels.items()},
        },
        "spec": {"nodeName": node, "containers": [{"name": "main", "ports": [{"name": "http", "containerPort": 80}]}]},
        "status": {"phase": "Running", "conditions": conditions},
    }


def node(name: str, ready: str = "True", message: str = "") -> Object:
    """Return a Node of the topology."""
    made = node_object(name, str(TOPOLOGY.node(name).address))
    made["spec"]["podCIDR"] = str(TOPOLOGY.node(name).pod_cidr)
    made["status"]["conditions"] = [{"type": "Ready", "status": ready, "message": message}]
    return made


@dataclass
class World:
    """Change what you like, then `write_rules` (kube-proxy takes note) and `findings`."""

    mode: str = "iptables"
    strict_arp: bool = False
    objects: dict[str, list[Object]] = field(default_factory=dict)
    nodes: dict[str, NodeSeen] = field(default_factory=dict)
    dns: list[DnsSeen] = field(default_factory=list)
    arp: list[ArpSeen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.objects = {
            "nodes": [node(name) for name in NODES],
            "services": [
                service("web", "10.96.0.80", node_port=30080, selector={"app": "web"}),
                service("dns", "10.96.0.81", protocol="UDP", port=53, node_port=30053, selector={"app": "web"}),
                service("kube-dns", "10.96.0.10", namespace="kube-system", selector={"k8s-app": "kube-dns"}),
            ],
            SLICES: [
                endpoint_slice("web", endpoint("10.244.1.5", "node1"), endpoint("10.244.2.5", "node2")),
                endpoint_slice("dns", endpoint("10.244.1.5", "node1"), protocol="UDP", port=53),
                endpoint_slice("kube-dns", endpoint("10.244.1.2", "node1"), namespace="kube-system"),
            ],
            "pods": [
                pod("web-1", app="web"),
                pod("web-2", "node2", app="web"),
                pod("coredns-1", namespace="kube-system", k8s_app="kube-dns"),
                pod("coredns-2", "node2", namespace="kube-system", k8s_app="kube-dns"),
            ],
        }
        quiet = (DnsCount(1.0, 10, 5), DnsCount(2.0, 12, 6))
        self.dns = [DnsSeen(pod=f"kube-system/coredns-{number}", counts=quiet) for number in (1, 2)]
        for name in NODES:
            spec = TOPOLOGY.node(name)
            routes = [RouteSeen(IPv4Network("0.0.0.0/0"), "eth0"), RouteSeen(spec.pod_cidr, "cni0")]
            routes += [RouteSeen(o.pod_cidr, "eth0") for o in TOPOLOGY.nodes if o is not spec]
            self.nodes[name] = NodeSeen(
                links={"eth0": LinkSeen(1500, True), "cni0": LinkSeen(1500, True)},
                routes=tuple(routes),
                sysctls={
                    "net/bridge/bridge-nf-call-iptables": "1", "net/ipv4/ip_forward": "1", "net/ipv4/conf/all/rp_filter": "0",
                    "net/ipv4/conf/eth0/rp_filter": "0", "net/ipv4/conf/all/arp_ignore": "1" if self.strict_arp else "0",
                },
                bridge_ports={"veth1": True},
                conntrack_count=10,
                conntrack_max=1000,
                local_addresses=(IPv4Address("127.0.0.1"), spec.address),
                listening=frozenset({("tcp", 22), ("tcp", 10256)}),
            )  # fmt: skip
        self.write_rules()

    @property
    def seen(self) -> ClusterSeen:
        config, problems = parse_proxy_config(
            {"clusterCIDR": "10.244.0.0/16", "mode": self.mode, "ipvs": {"strictARP": self.strict_arp}}
        )
        assert not problems
        return ClusterSeen(
            topology=TOPOLOGY, config=config, objects={kind: tuple(all_) for kind, all_ in self.objects.items()},
            nodes_seen=self.nodes, dns_seen=tuple(self.dns), arp_seen=tuple(self.arp),
        )  # fmt: skip

    def change(self, name: str, **fields: Any) -> None:
        """Change what is seen of a node."""
        self.nodes[name] = replace(self.nodes[name], **fields)

    def set(self, name: str, **sysctls: str) -> None:
        """Change settings of a node; '__' stands for '/'."""
        new = {key.replace("__", "/"): value for key, value in sysctls.items()}
        self.change(name, sysctls={**self.nodes[name].sysctls, **new})

    def service(self, name: str) -> Object:
        return next(one for one in self.objects["services"] if one["metadata"]["name"] == name)

    def write_rules(self, *names: str) -> None:
        """Have the kube-proxies of these nodes (of all) write what they should have."""
        for name in names or NODES:
            self.change(name, rules=self._written(name))

    def _written(self, name: str) -> RulesSeen:
        seen = self.seen
        view, addresses = parse_node(node(name)), self.nodes[name].local_addresses
        state = proxy_state(seen, name)
        names = frozenset(state.services)
        fake = FakeIptables()
        tools = Iptables(fake, Backend.LEGACY)
        if self.mode == "nftables":
            nft = FakeNft()
            tables = NftablesProxier(Nftables(nft, nft_names.FAMILY, nft_names.TABLE))
            tables.sync(state, names, tables.make_settings(seen.config, view, ()))
            return RulesSeen(nftables=Nftables(nft, nft_names.FAMILY, nft_names.TABLE).list())
        if self.mode == "ipvs":
            kernel = FakeNode(local=frozenset(addresses))
            servers = IpvsProxier(kernel, tools, seen.config.ipvs)
            servers.sync(state, names, servers.make_settings(seen.config, view, addresses))
            listing = kernel.list()
            return RulesSeen(iptables=tools.save(), ipvs=listing.objects, ipvs_missing=listing.missing)
        if self.mode == "userspace":
            settings = userspace.make_userspace_settings(seen.config, view)
            tools.apply(userspace.render_node(state, settings, userspace.stand_in_ports(state, 40000)))
            return RulesSeen(iptables=tools.save())
        rules = IptablesProxier(tools)
        rules.sync(state, names, rules.make_settings(seen.config, view, ()))
        return RulesSeen(iptables=tools.save())

    def findings(self) -> tuple[Finding, ...]:
        return diagnose(self.seen)
