"""The rules of one service port in iptables mode, and the settings they depend on.

::

    PREROUTING, OUTPUT ─ KUBE-SERVICES ─┬─ ClusterIP ──────── KUBE-SVC or KUBE-SVL ─ KUBE-SEP ─ DNAT
        (nat)                           ├─ external IP ────── KUBE-EXT ─┤
                                        ├─ load balancer IP ─ KUBE-FW ─ KUBE-EXT
                                        └─ last: to this node KUBE-NODEPORTS ─ KUBE-EXT
    INPUT, FORWARD, OUTPUT (filter): KUBE-SERVICES, KUBE-EXTERNAL-SERVICES refuse what has no endpoints,
                                     KUBE-PROXY-FIREWALL drops what KUBE-FW did not admit
    POSTROUTING (nat): KUBE-POSTROUTING masquerades marked packets

`testbed.dataplane.iptables` joins the service ports to payloads.

Source: kubernetes pkg/proxy/iptables/proxier.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network

from testbed.dataplane import chains
from testbed.dataplane.topology import ANNOTATED_ONLY, EndpointChoice, HintPolicy
from testbed.model.proxyconfig import PRIMARY, KubeProxyConfig, LocalDetector, Origin, local_detector, node_address
from testbed.model.service import Endpoint, NodeView, ServicePort, TrafficPolicy, parse_network

_LOCALHOST = IPv4Address("127.0.0.1")
_LOOPBACK = IPv4Network("127.0.0.0/8")


@dataclass(frozen=True, slots=True, kw_only=True)
class IptablesSettings:
    """Everything but Services and endpoints that the rules depend on."""

    node: str = ""
    node_ip: IPv4Address = _LOCALHOST
    node_labels: Mapping[str, str] = field(default_factory=dict)
    detector: LocalDetector | None = None
    masquerade_all: bool = False
    masquerade_bit: int = 14
    localhost_node_ports: bool = True
    #: Where NodePorts answer; None is every local address.
    node_port_ips: tuple[IPv4Address, ...] | None = None
    drops_invalid: bool = True
    random_fully: bool = True  # iptables 1.6.2 and later
    hints: HintPolicy = ANNOTATED_ONLY

    @property
    def mark(self) -> str:
        return f"0x{1 << self.masquerade_bit:08x}"


def make_settings(
    config: KubeProxyConfig, node: NodeView, local_addresses: Collection[IPv4Address]
) -> IptablesSettings:
    """Return the settings of one node.

    Args:
        config: The node's kube-proxy configuration.
        node: Its Node object.
        local_addresses: Every address of the node; only looked at when NodePorts are limited to some.
    """
    options = config.iptables
    own = node_address(config, node)
    gates = config.feature_gates
    return IptablesSettings(
        node=node.name,
        node_ip=own,
        node_labels=node.labels,
        detector=local_detector(config, node),
        masquerade_all=options.masquerade_all,
        masquerade_bit=options.masquerade_bit,
        # upstream switches the option off when no NodePort is to answer on the loopback
        localhost_node_ports=needs_route_localnet(config),
        node_port_ips=node_port_addresses(config, own, local_addresses),
        drops_invalid=not config.conntrack.tcp_be_liberal,
        hints=HintPolicy(
            without_annotation=bool(gates.get("ServiceTrafficDistribution")),
            of_nodes=bool(gates.get("PreferSameTrafficDistribution")),
        ),
    )


def node_port_addresses(
    config: KubeProxyConfig, own: IPv4Address, local_addresses: Collection[IPv4Address]
) -> tuple[IPv4Address, ...] | None:
    """Return the node's addresses on which NodePorts answer, sorted, or None when all do.

    Args:
        config: Its nodePortAddresses choose.
        own: What ``primary`` stands for.
        local_addresses: Every address of the node.
    """
    wanted = _node_port_networks(config)
    if wanted is None or any(network.prefixlen == 0 for network in wanted):
        return None
    found = {a for a in local_addresses if any(a in network for network in wanted)}
    if PRIMARY in config.node_port_addresses:
        found.add(own)
    if not config.iptables.localhost_node_ports:
        found = {a for a in found if not a.is_loopback}
    return tuple(sorted(found))


def _node_port_networks(config: KubeProxyConfig) -> list[IPv4Network] | None:
    """Return nodePortAddresses of this family, or None when none is: then every address counts, as if none was given."""
    networks = [parse_network(entry) for entry in config.node_port_addresses if entry != PRIMARY]
    wanted = [network for network in networks if network is not None]
    return wanted if wanted or PRIMARY in config.node_port_addresses else None


def needs_route_localnet(config: KubeProxyConfig) -> bool:
    """Say whether packets to 127.0.0.1 must be allowed to leave the loopback: NodePorts answer there."""
    if not config.iptables.localhost_node_ports:
        return False
    wanted = _node_port_networks(config)
    return wanted is None or any(network.overlaps(_LOOPBACK) for network in wanted)


@dataclass(frozen=True, slots=True)
class ServiceRules:
    """The rules of one service port: lines without line ends, each list in upstream's order.

    ``filter_rules`` and ``nat_dispatch`` go into chains that all service ports share; ``chains`` are this one's own (nat).
    """

    filter_rules: tuple[str, ...]
    nat_dispatch: tuple[str, ...]
    chains: Mapping[str, tuple[str, ...]]
    no_local_endpoints: tuple[bool, bool]  # internal, external: there are endpoints, but none here


class _Matches:
    """The arguments that say where packets come from, once per settings."""

    def __init__(self, detector: LocalDetector | None) -> None:
        self.is_pod = self.is_not_pod = ""
        if detector is not None:
            option = "-s" if detector.origin is Origin.ADDRESS else "-i"
            value = f"{detector.value}+" if detector.origin is Origin.INTERFACE_PREFIX else detector.value
            self.is_pod = f" {option} {value}"
            self.is_not_pod = f" ! {option} {value}"


_matches = lru_cache(maxsize=16)(_Matches)


def render_service(
    service: ServicePort, choice: EndpointChoice, settings: IptablesSettings, *, large: bool = False
) -> ServiceRules:
    """Return the rules of one service port for the endpoints chosen for it.

    ``large`` leaves out the comments of the rules that lead to endpoints and of the endpoints' own.
    """
    name, protocol = str(service.name), service.protocol.tool_name
    suffix = chains.service_suffix(service.name)
    cluster_chain, local_chain = chains.CLUSTER_PREFIX + suffix, chains.LOCAL_PREFIX + suffix
    external_chain, ranges_chain = chains.EXTERNAL_PREFIX + suffix, chains.SOURCE_RANGES_PREFIX + suffix
    internal_local = service.internal_policy is TrafficPolicy.LOCAL
    external_local = service.external_policy is TrafficPolicy.LOCAL
    internal_target = local_chain if internal_local else cluster_chain
    external_target = local_chain if external_local else cluster_chain
    has_internal = bool(choice.local if internal_local else choice.has_any)
    has_external = bool(choice.local if external_local else choice.has_any)
    refusal = ("has no local endpoints", "DROP") if choice.has_any else ("has no endpoints", "REJECT")
    uses_external_chain = choice.has_any and service.is_externally_accessible
    uses_ranges_chain = choice.has_any and bool(service.load_balancer_ips) and bool(service.source_ranges)
    matches = _matches(settings.detector)
    filter_rules: list[str] = []
    dispatch: list[str] = []
    own: dict[str, list[str]] = {}

    def to(address: IPv4Address) -> str:
        return f"-m {protocol} -p {protocol} -d {address} --dport {service.port}"

    def refuse(chain: str, match: str) -> None:
        filter_rules.append(f'-A {chain} -m comment --comment "{name} {refusal[0]}" {match} -j {refusal[1]}')

    # Dispatch: which destination leads to which chain.
    to_cluster_ip = to(service.cluster_ip)
    if has_internal:
        dispatch.append(
            f'-A {chains.SERVICES} -m comment --comment "{name} cluster IP" {to_cluster_ip} -j {internal_target}'
        )
    else:
        refuse(chains.SERVICES, to_cluster_ip)
    for address in service.external_ips:
        if choice.has_any:
            dispatch.append(
                f'-A {chains.SERVICES} -m comment --comment "{name} external IP" {to(address)} -j {external_chain}'
            )
        if not has_external:
            refuse(chains.EXTERNAL_SERVICES, to(address))
    for address in service.load_balancer_ips:
        if choice.has_any:
            target = ranges_chain if uses_ranges_chain else external_chain
            dispatch.append(
                f'-A {chains.SERVICES} -m comment --comment "{name} loadbalancer IP" {to(address)} -j {target}'
            )
        if uses_ranges_chain:
            filter_rules.append(
                f'-A {chains.PROXY_FIREWALL} -m comment --comment "{name} traffic not accepted by {ranges_chain}" '
                f"{to(address)} -j DROP"
            )
    if not has_external:
        for address in service.load_balancer_ips:
            refuse(chains.EXTERNAL_SERVICES, to(address))
    if service.node_port:
        to_node_port = f"-m {protocol} -p {protocol} --dport {service.node_port}"
        if choice.has_any:
            dispatch.append(f"-A {chains.NODE_PORTS} -m comment --comment {name} {to_node_port} -j {external_chain}")
        if not has_external:
            refuse(chains.EXTERNAL_SERVICES, f"-m addrtype --dst-type LOCAL {to_node_port}")
    if service.health_check_node_port:
        filter_rules.append(
            f'-A {chains.NODE_PORTS} -m comment --comment "{name} health check node port" '
            f"-m tcp -p tcp --dport {service.health_check_node_port} -j ACCEPT"
        )

    # Chains of this service port's own.
    if has_internal:
        source = None if settings.masquerade_all else matches.is_not_pod
        if source != "":
            own.setdefault(internal_target, []).append(
                f'-A {internal_target} -m comment --comment "{name} cluster IP" {to_cluster_ip}{source or ""} '
                f"-j {chains.MARK_MASQ}"
            )
    if uses_external_chain:
        own[external_chain] = [*_external_rules(name, external_chain, cluster_chain, external_local, matches)]
        if has_external:
            own[external_chain].append(f"-A {external_chain} -j {external_target}")
    if uses_ranges_chain:
        own[ranges_chain] = [*_ranges_rules(service, ranges_chain, external_chain, settings.node_ip)]
    texts = [endpoint.text for endpoint in choice.reachable]
    targets = chains.endpoint_chains(service.name, texts)
    comments = {text: "" if large else f' -m comment --comment "{name} -> {text}"' for text in texts}
    for chain, endpoints in ((cluster_chain, choice.cluster), (local_chain, choice.local)):
        if endpoints:
            own[chain] = [*own.get(chain, ()), *_balancing_rules(service, chain, endpoints, targets, comments)]
    comment = "" if large else f" -m comment --comment {name}"
    found = {chain: tuple(rules) for chain, rules in own.items()}
    for text, chain in targets.items():
        found[chain] = _endpoint_rules(service, chain, text, comment)
    return ServiceRules(
        filter_rules=tuple(filter_rules),
        nat_dispatch=tuple(dispatch),
        chains=found,
        no_local_endpoints=(
            choice.has_any and internal_local and not choice.local,
            choice.has_any and external_local and service.is_externally_accessible and not choice.local,
        ),
    )


def _external_rules(name: str, chain: str, cluster_chain: str, local: bool, matches: _Matches) -> Iterable[str]:
    """Yield what happens to packets for an external address before the endpoints are chosen."""
    if not local:
        # Another node's endpoint must answer through this node, which is the one the client talks to.
        yield (
            f'-A {chain} -m comment --comment "masquerade traffic for {name} external destinations" -j {chains.MARK_MASQ}'
        )
        return
    if matches.is_pod:
        # A pod that uses an external address gets what the ClusterIP would give it: every node's endpoints.
        yield (
            f'-A {chain} -m comment --comment "pod traffic for {name} external destinations"{matches.is_pod} '
            f"-j {cluster_chain}"
        )
    for verb, target in (("masquerade", chains.MARK_MASQ), ("route", cluster_chain)):
        yield (
            f'-A {chain} -m comment --comment "{verb} LOCAL traffic for {name} external destinations" '
            f"-m addrtype --src-type LOCAL -j {target}"
        )


def _ranges_rules(service: ServicePort, chain: str, target: str, node_ip: IPv4Address) -> Iterable[str]:
    """Yield the gate of loadBalancerSourceRanges. What it does not admit meets KUBE-PROXY-FIREWALL later."""
    comment = f'-m comment --comment "{service.name} loadbalancer IP"'
    for network in service.source_ranges:
        yield f"-A {chain} {comment} -s {network} -j {target}"
    if any(node_ip in network for network in service.source_ranges):
        # Packets of the node to its own load-balancer address are looped back with that address as their source.
        for address in service.load_balancer_ips:
            yield f"-A {chain} {comment} -s {address} -j {target}"
    yield (
        f'-A {chain} -m comment --comment "other traffic to {service.name} will be dropped by {chains.PROXY_FIREWALL}"'
    )


def split_evenly(n: int) -> list[str]:
    """Return ``--probability`` values that spread traffic evenly over ``n`` endpoints.

    Rules are tried in order, so rule ``i`` must take ``1/(n-i)`` of what reaches it; the last endpoint takes the rest.

    Returns:
        ``n - 1`` fractions in (0, 1), ten decimals, in rule order.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"need at least one endpoint, got {n}")
    return [f"{1 / (n - i):.10f}" for i in range(n - 1)]


def _balancing_rules(
    service: ServicePort,
    chain: str,
    endpoints: Sequence[Endpoint],
    targets: Mapping[str, str],
    comments: Mapping[str, str],
) -> list[str]:
    """Return the rules that choose among endpoints; ``targets`` and ``comments`` are by their texts."""
    rules = []
    if service.affinity_timeout_s:
        rules = [
            f"-A {chain}{comments[e.text]} -m recent --name {targets[e.text]} --rcheck "
            f"--seconds {service.affinity_timeout_s} --reap -j {targets[e.text]}"
            for e in endpoints
        ]
    *others, last = endpoints
    for endpoint, probability in zip(others, split_evenly(len(endpoints)), strict=True):
        text = endpoint.text
        rules.append(
            f"-A {chain}{comments[text]} -m statistic --mode random --probability {probability} -j {targets[text]}"
        )
    rules.append(f"-A {chain}{comments[last.text]} -j {targets[last.text]}")
    return rules


def _endpoint_rules(service: ServicePort, chain: str, endpoint: str, comment: str) -> tuple[str, str]:
    protocol = service.protocol.tool_name
    recent = f" -m recent --name {chain} --set" if service.affinity_timeout_s else ""
    return (
        # Hairpin: a pod that reaches itself must see the node as its peer, or it would answer itself directly.
        f"-A {chain}{comment} -s {endpoint.partition(':')[0]} -j {chains.MARK_MASQ}",
        f"-A {chain}{comment}{recent} -m {protocol} -p {protocol} -j DNAT --to-destination {endpoint}",
    )
