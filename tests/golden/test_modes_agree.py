"""Golden cases, and cases by chance, in nftables and ipvs mode: packets fare as in iptables mode, but for what is named here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network

import pytest
from proxy_support import node_object, state_of
from random_cluster import random_objects
from test_iptables_golden import CASES, read_case

from testbed.dataplane.iptables import make_settings, render_full
from testbed.dataplane.ipvs import IpvsRenderer, make_ipvs_settings
from testbed.dataplane.nftables import NftablesRenderer, make_nftables_settings
from testbed.dataplane.state import ProxyState
from testbed.dataplane.trace import Fate, Node, Packet, Verdict, parse_rules, trace
from testbed.dataplane.trace_ipvs import IpvsTracer
from testbed.dataplane.trace_nftables import trace_nftables
from testbed.model.proxyconfig import KubeProxyConfig, NftablesOptions, parse_proxy_config
from testbed.model.service import NodeView, ServicePort, TrafficPolicy, parse_node

SERVICE_CIDR = IPv4Network("10.96.0.0/12")  # of the golden cases; cases by chance have 172.30.0.0/16
SECOND_ADDRESS, LOOPBACK = "192.0.2.77", "127.0.0.1"
OUTSIDERS = ("203.0.113.2", "203.0.113.130", "198.51.100.7")


@dataclass(frozen=True)
class Case:
    """One golden case, as both modes see it."""

    state: ProxyState
    node_ip: str

    def targets(self) -> Iterator[tuple[ServicePort, str, int]]:
        """Yield the addresses and ports of each service port, NodePorts on each address of the node."""
        for service in self.state.services.values():
            for address in (service.cluster_ip, *service.external_ips, *service.load_balancer_ips):
                yield service, str(address), service.port
            if service.node_port:
                for address in (self.node_ip, SECOND_ADDRESS, LOOPBACK):
                    yield service, address, service.node_port

    def packets(self) -> Iterator[Packet]:
        """Yield a packet from each kind of source to each kind of destination, ports and protocols that fit and that do not."""
        endpoints = {str(e.address) for found in self.state.endpoints.values() for e in found}
        balancers = {str(a) for s in self.state.services.values() for a in s.load_balancer_ips}
        sources = [
            *OUTSIDERS,
            *sorted(endpoints),
            "10.244.1.200",
            self.node_ip,
            SECOND_ADDRESS,
            LOOPBACK,
            *sorted(balancers),
        ]
        pairs = {(address, port) for _, address, port in self.targets()}
        pairs |= {(address, 9) for address, _ in pairs}  # a port that nobody has
        pairs |= {(address, s.health_check_node_port) for s in self.state.services.values() if s.health_check_node_port
                  for address in (self.node_ip, LOOPBACK)}  # fmt: skip
        pairs |= {("10.96.200.200", 80), ("192.0.2.1", 80), *((e, 80) for e in endpoints)}
        for (destination, port), source, protocol in itertools.product(sorted(pairs), sources, ("tcp", "udp", "sctp")):
            yield Packet(source, destination, port, protocol)


# The differences. Each: who is concerned, and the fates in iptables and in nftables mode (None: whatever it is).
_Difference = tuple[Callable[[Case, Packet], bool], Callable[[Fate], bool], Callable[[Fate], bool]]


def _is(*verdicts: Verdict) -> Callable[[Fate], bool]:
    return lambda fate: fate.verdict in verdicts


def _to_cluster_ip(case: Case, packet: Packet) -> bool:
    return any(str(s.cluster_ip) == packet.destination for s in case.state.services.values())


def _to_nobodys_cluster_ip(case: Case, packet: Packet) -> bool:
    return IPv4Address(packet.destination) in SERVICE_CIDR and not _to_cluster_ip(case, packet)


def _to_loopback(case: Case, packet: Packet) -> bool:
    return packet.destination == LOOPBACK


def _to_second_address(case: Case, packet: Packet) -> bool:
    return packet.destination == SECOND_ADDRESS


def _to_health_check(case: Case, packet: Packet) -> bool:
    return any(s.health_check_node_port == packet.port for s in case.state.services.values())


def _from_node_to_external(case: Case, packet: Packet) -> bool:
    from_node = packet.source in (case.node_ip, SECOND_ADDRESS, LOOPBACK)
    return from_node and any(
        IPv4Address(packet.destination) in (*s.external_ips, *s.load_balancer_ips) for s in case.state.services.values()
    )


def _to_guarded_balancer(case: Case, packet: Packet) -> bool:
    return any(
        s.source_ranges and IPv4Address(packet.destination) in s.load_balancer_ips for s in case.state.services.values()
    )


DIFFERENCES: dict[str, _Difference] = {
    # A VIP's port without a rule is routed on in iptables mode (reference, 2.8); nftables mode refuses it (4.3).
    "a port of a ClusterIP that no Service has": (_to_cluster_ip, _is(Verdict.NONE), _is(Verdict.REJECT)),
    "a ClusterIP that no Service has": (_to_nobodys_cluster_ip, _is(Verdict.NONE), _is(Verdict.DROP)),
    # NodePorts answer on the primary address only, never on the loopback (4.3).
    "NodePorts on the loopback": (_to_loopback, _is(*Verdict), _is(Verdict.NONE)),
    "NodePorts on other addresses than the primary": (_to_second_address, _is(*Verdict), _is(Verdict.NONE)),
    # iptables mode lets health checks in past the node's own firewall; another table's drop cannot be overruled in nft.
    "health-check node ports": (_to_health_check, _is(Verdict.ACCEPT), _is(Verdict.NONE)),
    # KUBE-EXTERNAL-SERVICES is not hooked to OUTPUT (2.1); filter-output looks at every address (4.2).
    "the node to an external address without endpoints": (_from_node_to_external, _is(Verdict.NONE), _is(Verdict.REJECT)),
    # Source ranges are looked at before, and whatever, the endpoints (4.2).
    "a client outside the ranges of a balancer without endpoints": (
        _to_guarded_balancer, _is(Verdict.REJECT, Verdict.NONE), _is(Verdict.DROP),
    ),
}  # fmt: skip


def _same_endpoints(fate: Fate) -> bool:
    return fate.verdict is Verdict.ENDPOINT


def _to_bound(case: Case, packet: Packet) -> bool:
    return _to_cluster_ip(case, packet) or _to_external(case, packet)


def _to_external(case: Case, packet: Packet) -> bool:
    wanted = IPv4Address(packet.destination)
    return any(wanted in (*s.external_ips, *s.load_balancer_ips) for s in case.state.services.values())


def _by_local_policy(case: Case, packet: Packet) -> bool:
    """The packet is for a service port, by an address or NodePort for which only local endpoints count."""
    for service, address, port in case.targets():
        if (address, port, service.protocol.tool_name) == (packet.destination, packet.port, packet.protocol):
            inner = address == str(service.cluster_ip)
            policy = service.internal_policy if inner else service.external_policy
            if policy is TrafficPolicy.LOCAL:
                return True
    return False


def _from_loopback(case: Case, packet: Packet) -> bool:
    return packet.source == LOOPBACK


def _from_node(case: Case, packet: Packet) -> bool:
    """The source is the node's, what is bound included: a node's packet to its own address comes from it."""
    bound = {str(a) for s in case.state.services.values() for a in (*s.external_ips, *s.load_balancer_ips)}
    return packet.source in {case.node_ip, SECOND_ADDRESS, LOOPBACK, *bound}


def _from_node_to_guarded_balancer(case: Case, packet: Packet) -> bool:
    return _to_guarded_balancer(case, packet) and _from_node(case, packet)


def _from_remote_endpoint(case: Case, packet: Packet) -> bool:
    endpoints = [e for found in case.state.endpoints.values() for e in found if str(e.address) == packet.source]
    return any(not e.is_local for e in endpoints)


def _to_itself(case: Case, packet: Packet) -> bool:
    return packet.source == packet.destination


#: The differences between iptables and ipvs mode, in the same form.
IPVS_DIFFERENCES: dict[str, _Difference] = {
    # A bound address is the node's own; KUBE-IPVS-FILTER refuses its other ports (3.5).
    "a port of a bound address that no Service has": (_to_bound, _is(Verdict.NONE), _is(Verdict.REJECT)),
    # No DROP is written: without local endpoints the others serve, or nobody does and the kernel refuses (3.1).
    "policy Local and no endpoint here": (_by_local_policy, _is(Verdict.DROP), _is(Verdict.REJECT, Verdict.ENDPOINT)),
    # The virtual server has the local endpoints only, whoever asks (3.1).
    "policy Local, for pods and the node": (_by_local_policy, _same_endpoints, _same_endpoints),
    # IPVS cannot serve the loopback (3.1), and there is no KUBE-FIREWALL to keep others from it (3.5).
    "the loopback": (_to_loopback, _is(*Verdict), _is(Verdict.NONE, Verdict.ACCEPT)),
    # The first rule leaves what comes from 127.0.0.0/8 alone; a node's packets to its VIPs come from these themselves.
    "from the loopback": (_from_loopback, _same_endpoints, _same_endpoints),
    # KUBE-LOOP-BACK knows local endpoints; those of other nodes do not pass here on the way to themselves (3.4).
    "an endpoint of another node to itself": (_from_remote_endpoint, _same_endpoints, _same_endpoints),
    "an endpoint to its own address": (_to_itself, _is(Verdict.NONE), lambda fate: fate.masquerade),
    # A bitmap of ports knows no protocol (3.4).
    "health-check node ports": (_to_health_check, _is(Verdict.NONE), _is(Verdict.ACCEPT)),
    # Source ranges are looked at before, and whatever, the endpoints; for the node itself only if it uses the address (3.5).
    "a client outside the ranges of a balancer without endpoints": (
        _to_guarded_balancer, _is(Verdict.REJECT), _is(Verdict.DROP),
    ),
    "the node to a balancer with ranges": (
        _from_node_to_guarded_balancer, _is(Verdict.DROP), _is(Verdict.ENDPOINT, Verdict.REJECT),
    ),
}  # fmt: skip


Fares = Callable[[Packet], Fate]


def fates(config: KubeProxyConfig, node: NodeView, state: ProxyState) -> tuple[Case, Fares, Fares]:
    """Return a case and how a packet fares in iptables and in nftables mode."""
    assert node.internal_ip is not None
    addresses = [IPv4Address(LOOPBACK), IPv4Address(SECOND_ADDRESS), node.internal_ip]
    here = Node(frozenset(addresses))
    rules = parse_rules(render_full(state, make_settings(config, node, addresses)).text)
    # each mode has its own section for these
    options = NftablesOptions(
        masquerade_all=config.iptables.masquerade_all, masquerade_bit=config.iptables.masquerade_bit
    )
    settings = make_nftables_settings(replace(config, nftables=options), node, addresses, [SERVICE_CIDR])
    renderer = NftablesRenderer(settings)
    renderer.full(state, None)
    table = renderer.wanted()
    return (
        Case(state, str(node.internal_ip)),
        lambda packet: trace(rules, packet, here),
        lambda packet: trace_nftables(table, packet, here),
    )


def random_case(seed: int) -> tuple[KubeProxyConfig, NodeView, ProxyState]:
    """Return a case of `random_cluster`, each with another configuration."""
    document = {"clusterCIDR": "" if seed % 4 == 0 else "10.0.0.0/8", "iptables": {"masqueradeAll": seed % 5 == 0}}
    config, problems = parse_proxy_config(document)
    assert not problems
    return config, parse_node(node_object()), state_of(*random_objects(seed))


SEEDS = range(8)
MEETINGS = [pytest.param(lambda path=path: read_case(path), id=path.stem) for path in CASES]
MEETINGS += [pytest.param(lambda seed=seed: random_case(seed), id=f"by chance, {seed}") for seed in SEEDS]


@pytest.mark.parametrize("read", MEETINGS)
def test_packets_fare_the_same(read: Callable[[], tuple[KubeProxyConfig, NodeView, ProxyState]]) -> None:
    """What differs is one of the named differences, and these differ as named."""
    case, in_iptables, in_nftables = fates(*read())
    concerned = 0
    for packet in case.packets():
        one, other = in_iptables(packet), in_nftables(packet)
        concerned += one.verdict is not Verdict.NONE
        if one != other:
            assert reasons(case, packet, one, other), (
                f"{packet}: {one} in iptables mode, {other} in nftables mode\n" + "\n".join(other.rules)
            )
    assert concerned or not case.state.services


def reasons(
    case: Case, packet: Packet, in_iptables: Fate, other: Fate, differences: dict[str, _Difference] = DIFFERENCES
) -> set[str]:
    """Return the names of the differences that explain why two fates are not equal."""
    return {
        name
        for name, (concerns, before, after) in differences.items()
        if concerns(case, packet) and before(in_iptables) and after(other)
    }


def fates_ipvs(config: KubeProxyConfig, node: NodeView, state: ProxyState) -> tuple[Case, Fares, Fares]:
    """Return a case and how a packet fares in iptables and in ipvs mode."""
    case, in_iptables, _ = fates(config, node, state)
    assert node.internal_ip is not None
    addresses = [IPv4Address(LOOPBACK), IPv4Address(SECOND_ADDRESS), node.internal_ip]
    renderer = IpvsRenderer(make_ipvs_settings(config, node, addresses))
    renderer.update(state)
    return case, in_iptables, IpvsTracer(renderer, Node(frozenset(addresses))).trace


@pytest.mark.parametrize("read", MEETINGS[:-4])
def test_packets_fare_the_same_in_ipvs_mode(read: Callable[[], tuple[KubeProxyConfig, NodeView, ProxyState]]) -> None:
    """What differs between iptables and ipvs mode is one of the named differences, and these differ as named."""
    case, in_iptables, in_ipvs = fates_ipvs(*read())
    for packet in case.packets():
        one, other = in_iptables(packet), in_ipvs(packet)
        if one != other:
            assert reasons(case, packet, one, other, IPVS_DIFFERENCES), (
                f"{packet}: {one} in iptables mode, {other} in ipvs mode\n" + "\n".join(other.rules)
            )


def test_every_difference_of_ipvs_mode_is_met() -> None:
    """Each named difference explains some packet that nothing else explains."""
    met: set[str] = set()
    names = ("tutorial", "loadbalancer-local-none-here", "loadbalancer-source-ranges-with-node")
    for read in (
        *(partial(read_case, path) for path in CASES if path.stem in names),
        *(partial(random_case, n) for n in range(3)),
    ):
        case, in_iptables, in_ipvs = fates_ipvs(*read())
        for packet in case.packets():
            one, other = in_iptables(packet), in_ipvs(packet)
            if one != other:
                found = reasons(case, packet, one, other, IPVS_DIFFERENCES)
                met |= found if len(found) == 1 else set()
    assert met == IPVS_DIFFERENCES.keys()


def test_every_difference_is_met() -> None:
    """Each named difference explains some packet that nothing else explains: none is a leftover."""
    met: set[str] = set()
    for read in (
        lambda: read_case(next(p for p in CASES if p.stem == "tutorial")),
        *(partial(random_case, n) for n in range(3)),
    ):
        case, in_iptables, in_nftables = fates(*read())
        for packet in case.packets():
            one, other = in_iptables(packet), in_nftables(packet)
            if one != other:
                found = reasons(case, packet, one, other)
                met |= found if len(found) == 1 else set()
    assert met == DIFFERENCES.keys()
