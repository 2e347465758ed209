"""What one node's table holds in nftables mode: the objects of a service port, and those that are there whatever the Services.

Source: kubernetes pkg/proxy/nftables/proxier.go (v1.36).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from testbed.dataplane import nft_names as names
from testbed.dataplane.nft_table import (
    Chain,
    Element,
    ElementKey,
    Hook,
    NftTable,
    SetSpec,
    cut_comment,
)
from testbed.dataplane.topology import ANNOTATED_ONLY, EndpointChoice, HintPolicy
from testbed.model.proxyconfig import PRIMARY, KubeProxyConfig, LocalDetector, Origin, local_detector, node_address
from testbed.model.service import Endpoint, NodeView, ServicePort, TrafficPolicy, parse_network

_LOCALHOST = IPv4Address("127.0.0.1")
_DESTINATION = "ip daddr . meta l4proto . th dport"
_PORT = "meta l4proto . th dport"

_BY_ADDRESS = "ipv4_addr . inet_proto . inet_service : verdict"
_BY_PORT = "inet_proto . inet_service : verdict"
_COMMENT = "rules for kube-proxy"


@dataclass(frozen=True, slots=True, kw_only=True)
class NftablesSettings:
    """Everything but Services and endpoints that the rules depend on."""

    node: str = ""
    node_ip: IPv4Address = _LOCALHOST
    node_labels: Mapping[str, str] = field(default_factory=dict)
    detector: LocalDetector | None = None
    masquerade_all: bool = False
    masquerade_bit: int = 14
    #: Where NodePorts answer; None is every local address but the loopback.
    node_port_ips: tuple[IPv4Address, ...] | None = None
    #: What ClusterIPs are allocated from; () is unknown, and then nothing is dropped for being unallocated.
    service_cidrs: tuple[IPv4Network, ...] = ()
    hints: HintPolicy = ANNOTATED_ONLY

    @property
    def mark(self) -> str:
        return f"{1 << self.masquerade_bit:#x}"

    @property
    def marking(self) -> str:
        """The statement that asks for masquerade."""
        return f"mark set mark or {self.mark}"


def make_nftables_settings(
    config: KubeProxyConfig,
    node: NodeView,
    local_addresses: Collection[IPv4Address],
    service_cidrs: Collection[IPv4Network] = (),
) -> NftablesSettings:
    """Return the settings of one node.

    Args:
        config: The node's kube-proxy configuration.
        node: Its Node object.
        local_addresses: Every address of the node; only looked at when nodePortAddresses has networks.
        service_cidrs: Those of the cluster's ServiceCIDR objects.
    """
    own = node_address(config, node)
    gates = config.feature_gates
    return NftablesSettings(
        node=node.name,
        node_ip=own,
        node_labels=node.labels,
        detector=local_detector(config, node),
        masquerade_all=config.nftables.masquerade_all,
        masquerade_bit=config.nftables.masquerade_bit,
        node_port_ips=_node_port_ips(config, own, local_addresses),
        service_cidrs=tuple(sorted(service_cidrs)),
        hints=HintPolicy(
            without_annotation=bool(gates.get("ServiceTrafficDistribution")),
            of_nodes=bool(gates.get("PreferSameTrafficDistribution")),
        ),
    )


def _node_port_ips(
    config: KubeProxyConfig, own: IPv4Address, local_addresses: Collection[IPv4Address]
) -> tuple[IPv4Address, ...] | None:
    entries = config.node_port_addresses or (PRIMARY,)  # the default of this mode only
    networks = [network for network in map(parse_network, entries) if network is not None]
    if any(network.prefixlen == 0 for network in networks):
        return None
    found = {a for a in local_addresses if any(a in network for network in networks)}
    if PRIMARY in entries:
        found.add(own)
    return tuple(sorted(a for a in found if not a.is_loopback))  # what is sent to the loopback cannot leave it here


# One service port -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServiceObjects:
    """What one service port contributes to the table."""

    elements: tuple[Element, ...]
    chains: Mapping[str, Chain]
    affinity_sets: Mapping[str, SetSpec]
    no_local_endpoints: tuple[bool, bool]  # internal, external: there are endpoints, but none here


NO_OBJECTS = ServiceObjects((), {}, {}, (False, False))


def _is_pod(detector: LocalDetector | None, *, negated: bool = False) -> str:
    """Return the match for packets of local pods, '' when there is no way to tell."""
    if detector is None:
        return ""
    operator = "!= " if negated else ""
    if detector.origin is Origin.ADDRESS:
        return f"ip saddr {operator}{detector.value}"
    if detector.origin is Origin.INTERFACE:
        return f"iifname {operator}{detector.value}"
    return f'iifname {operator}"{detector.value}*"'


def render_service(service: ServicePort, choice: EndpointChoice, settings: NftablesSettings) -> ServiceObjects:
    """Return the objects of one service port for the endpoints chosen for it."""
    protocol, base = service.protocol.tool_name, names.service_base(service.name)
    cluster_chain, local_chain = names.CLUSTER_PREFIX + base, names.LOCAL_PREFIX + base
    external_chain, firewall_chain = names.EXTERNAL_PREFIX + base, names.FIREWALL_PREFIX + base
    internal_local = service.internal_policy is TrafficPolicy.LOCAL
    external_local = service.external_policy is TrafficPolicy.LOCAL
    has_internal = bool(choice.local if internal_local else choice.has_any)
    has_external = bool(choice.local if external_local else choice.has_any)
    # no endpoint anywhere: refuse; some, but none that this traffic may use: drop, so that the client tries elsewhere
    refusal = "drop" if choice.has_any else f"goto {names.REJECT}"
    comment = cut_comment(str(service.name))
    cluster_ip = str(service.cluster_ip)
    elements = [Element(names.CLUSTER_IPS, cluster_ip)]

    def key(address: IPv4Address | str) -> str:
        return f"{address} . {protocol} . {service.port}"

    if has_internal:
        target = local_chain if internal_local else cluster_chain
        elements.append(Element(names.SERVICE_IPS, key(cluster_ip), f"goto {target}"))
    else:
        elements.append(Element(names.NO_ENDPOINT_SERVICES, key(cluster_ip), refusal, comment))
    for address in (*service.external_ips, *service.load_balancer_ips):
        if choice.has_any:
            elements.append(Element(names.SERVICE_IPS, key(address), f"goto {external_chain}"))
        if not has_external:
            elements.append(Element(names.NO_ENDPOINT_SERVICES, key(address), refusal, comment))
    uses_firewall = bool(service.load_balancer_ips and service.source_ranges)
    if uses_firewall:
        for address in service.load_balancer_ips:
            elements.append(Element(names.FIREWALL_IPS, key(address), f"goto {firewall_chain}"))
    if service.node_port:
        port = f"{protocol} . {service.node_port}"
        if choice.has_any:
            elements.append(Element(names.SERVICE_NODE_PORTS, port, f"goto {external_chain}"))
        if not has_external:
            elements.append(Element(names.NO_ENDPOINT_NODE_PORTS, port, refusal, comment))
    for e in choice.reachable:
        address_text, _, port_text = e.text.rpartition(":")
        elements.append(Element(names.HAIRPIN, f"{address_text} . {address_text} . {protocol} . {port_text}"))

    chains: dict[str, Chain] = {}
    if choice.cluster:
        chains[cluster_chain] = Chain(tuple(_balancing_rules(service, choice.cluster)))
    if choice.local:
        chains[local_chain] = Chain(tuple(_balancing_rules(service, choice.local)))
    if choice.has_any and service.is_externally_accessible:
        rules = list(_external_rules(cluster_chain, external_local, settings))
        if has_external:
            rules.append(f"goto {local_chain if external_local else cluster_chain}")
        chains[external_chain] = Chain(tuple(rules))
    if uses_firewall:
        chains[firewall_chain] = Chain((_firewall_rule(service, settings.node_ip),))
    sets: dict[str, SetSpec] = {}
    if service.affinity_timeout_s:
        for e in choice.reachable:
            chains[_endpoint_name(names.ENDPOINT_PREFIX, service, e)] = Chain(_affinity_rules(service, e))
            affinity_set = _endpoint_name(names.AFFINITY_PREFIX, service, e)
            sets[affinity_set] = SetSpec("set", "ipv4_addr", timeout_s=service.affinity_timeout_s)
    return ServiceObjects(
        elements=tuple(elements),
        chains=chains,
        affinity_sets=sets,
        no_local_endpoints=(
            choice.has_any and internal_local and not choice.local,
            choice.has_any and external_local and service.is_externally_accessible and not choice.local,
        ),
    )


def _endpoint_name(prefix: str, service: ServicePort, endpoint: Endpoint) -> str:
    return prefix + names.endpoint_base(service.name, str(endpoint.address), endpoint.port)


def _balancing_rules(service: ServicePort, endpoints: Sequence[Endpoint]) -> Iterator[str]:
    """Yield the choice of an endpoint, each as probable as the others."""
    if not service.affinity_timeout_s:
        targets = [endpoint.text.replace(":", " . ") for endpoint in endpoints]  # faster than printing addresses again
        choices = " , ".join(f"{number} : {target}" for number, target in enumerate(targets))
        yield (
            f"meta l4proto {service.protocol.tool_name} dnat ip addr . port to "
            f"numgen random mod {len(endpoints)} map {{ {choices} }}"
        )
        return
    targets = [_endpoint_name(names.ENDPOINT_PREFIX, service, e) for e in endpoints]
    for endpoint, target in zip(endpoints, targets, strict=True):
        yield f"ip saddr @{_endpoint_name(names.AFFINITY_PREFIX, service, endpoint)} goto {target}"
    choices = " , ".join(f"{number} : goto {target}" for number, target in enumerate(targets))
    yield f"numgen random mod {len(endpoints)} vmap {{ {choices} }}"


def _affinity_rules(service: ServicePort, endpoint: Endpoint) -> tuple[str, ...]:
    """Return what makes a client stay: it is recorded when it is sent to this endpoint."""
    return (
        f"update @{_endpoint_name(names.AFFINITY_PREFIX, service, endpoint)} {{ ip saddr }}",
        f"meta l4proto {service.protocol.tool_name} dnat to {endpoint.text}",
    )


def _external_rules(cluster_chain: str, local: bool, settings: NftablesSettings) -> Iterator[str]:
    """Yield what happens to packets for an external address before the endpoints are chosen."""
    if not local:
        # Another node's endpoint must answer through this node, which is the one the client talks to.
        yield settings.marking
        return
    is_pod = _is_pod(settings.detector)
    if is_pod:
        # A pod that uses an external address gets what the ClusterIP would give it: every node's endpoints.
        yield f'{is_pod} goto {cluster_chain} comment "short-circuit pod traffic"'
    yield f'fib saddr type local {settings.marking} comment "masquerade local traffic"'
    yield f'fib saddr type local goto {cluster_chain} comment "short-circuit local traffic"'


def _firewall_rule(service: ServicePort, node_ip: IPv4Address) -> str:
    """Return the gate of loadBalancerSourceRanges: it is met before DNAT, so it can drop by itself."""
    sources = [str(network) for network in service.source_ranges]
    if any(node_ip in network for network in service.source_ranges):
        # Packets of the node to its own load-balancer address are looped back with that address as their source.
        sources += [str(address) for address in service.load_balancer_ips]
    return f"ip saddr != {{ {' , '.join(sources)} }} drop"


# What is there whatever the Services ----------------------------------------------------------------------------------


def render_base(settings: NftablesSettings) -> NftTable:
    """Return the table as it is without any Service."""
    if settings.node_port_ips is None:
        # On the input hook every packet is for this node, so that need not be asked there.
        to_node_ports, arrived = "fib daddr type local ip daddr != 127.0.0.0/8", "ip daddr != 127.0.0.0/8"
    else:
        to_node_ports = arrived = f"ip daddr @{names.NODE_PORT_IPS}"
    new = "ct state new jump"
    chains = {
        "filter-prerouting-pre-dnat": Chain((f"{new} {names.FIREWALL_CHECK}",), Hook("filter", "prerouting", -110)),
        "filter-output-pre-dnat": Chain((f"{new} {names.FIREWALL_CHECK}",), Hook("filter", "output", -110)),
        "filter-input": Chain(
            (f"{new} {names.NODE_PORT_ENDPOINTS_CHECK}", f"{new} {names.SERVICE_ENDPOINTS_CHECK}"),
            Hook("filter", "input", 0),
        ),
        "filter-forward": Chain(
            (f"{new} {names.SERVICE_ENDPOINTS_CHECK}", f"{new} {names.CLUSTER_IPS_CHECK}"), Hook("filter", "forward", 0)
        ),
        "filter-output": Chain(
            (f"{new} {names.SERVICE_ENDPOINTS_CHECK}", f"{new} {names.CLUSTER_IPS_CHECK}"), Hook("filter", "output", 0)
        ),
        "nat-prerouting": Chain((f"jump {names.SERVICES}",), Hook("nat", "prerouting", -100)),
        "nat-output": Chain((f"jump {names.SERVICES}",), Hook("nat", "output", -100)),
        "nat-postrouting": Chain((f"jump {names.MASQUERADING}",), Hook("nat", "postrouting", 100)),
        names.NODE_PORT_ENDPOINTS_CHECK: Chain((f"{arrived} {_PORT} vmap @{names.NO_ENDPOINT_NODE_PORTS}",)),
        names.SERVICE_ENDPOINTS_CHECK: Chain((f"{_DESTINATION} vmap @{names.NO_ENDPOINT_SERVICES}",)),
        names.FIREWALL_CHECK: Chain((f"{_DESTINATION} vmap @{names.FIREWALL_IPS}",)),
        names.SERVICES: Chain(
            (
                *_cluster_masquerade(settings),
                f"{_DESTINATION} vmap @{names.SERVICE_IPS}",
                f"{to_node_ports} {_PORT} vmap @{names.SERVICE_NODE_PORTS}",
            )
        ),
        names.MASQUERADING: Chain(
            (
                # Cleared at once, so that a packet that passes here again (in a tunnel, say) is not translated twice.
                f"mark and {settings.mark} != 0 mark set mark xor {settings.mark} masquerade fully-random",
                # Hairpin: a pod that reaches itself must see the node as its peer, or it would answer itself directly.
                f"ct status dnat ip saddr . ip daddr . meta l4proto . th dport @{names.HAIRPIN} masquerade fully-random",
            )
        ),
        names.CLUSTER_IPS_CHECK: Chain(tuple(_cluster_ips_rules(settings))),
        names.REJECT: Chain(
            ("reject",), comment=f"helper for @{names.NO_ENDPOINT_SERVICES} / @{names.NO_ENDPOINT_NODE_PORTS}"
        ),
    }
    sets = {
        names.CLUSTER_IPS: SetSpec("set", "ipv4_addr", "Active ClusterIPs"),
        names.NODE_PORT_IPS: SetSpec("set", "ipv4_addr", "IPs that accept NodePort traffic"),
        names.HAIRPIN: SetSpec(
            "set", "ipv4_addr . ipv4_addr . inet_proto . inet_service", "service hairpin connections"
        ),
        names.NO_ENDPOINT_SERVICES: SetSpec(
            "map", _BY_ADDRESS, "vmap to drop or reject packets to services with no endpoints"
        ),
        names.NO_ENDPOINT_NODE_PORTS: SetSpec(
            "map", _BY_PORT, "vmap to drop or reject packets to service nodeports with no endpoints"
        ),
        names.FIREWALL_IPS: SetSpec("map", _BY_ADDRESS, "destinations that are subject to LoadBalancerSourceRanges"),
        names.SERVICE_IPS: SetSpec("map", _BY_ADDRESS, "ClusterIP, ExternalIP and LoadBalancer IP traffic"),
        names.SERVICE_NODE_PORTS: SetSpec("map", _BY_PORT, "NodePort traffic"),
    }
    elements: dict[ElementKey, Element] = {}
    if settings.node_port_ips is None:
        del sets[names.NODE_PORT_IPS]
    else:
        for address in settings.node_port_ips:
            elements[names.NODE_PORT_IPS, str(address)] = Element(names.NODE_PORT_IPS, str(address))
    return NftTable(_COMMENT, sets, chains, elements)


def _cluster_masquerade(settings: NftablesSettings) -> Iterator[str]:
    to_cluster_ip = f"ip daddr @{names.CLUSTER_IPS}"
    if settings.masquerade_all:
        yield f'{to_cluster_ip} {settings.marking} comment "masquerade all clusterIP traffic"'
    elif settings.detector is not None:
        # Whoever routes the service network to a node gets answers through that node.
        is_not_pod = _is_pod(settings.detector, negated=True)
        yield f'{to_cluster_ip} {is_not_pod} {settings.marking} comment "masquerade clusterIP traffic from outside cluster"'


def _cluster_ips_rules(settings: NftablesSettings) -> Iterator[str]:
    yield f'ip daddr @{names.CLUSTER_IPS} reject comment "Reject traffic to invalid ports of ClusterIPs"'
    if settings.service_cidrs:
        cidrs = " , ".join(map(str, settings.service_cidrs))
        yield f'ip daddr {{ {cidrs} }} drop comment "Drop traffic to unallocated ClusterIPs"'
