"""Golden cases, and cases by chance, in userspace mode: packets get where iptables mode takes them, but for what is named."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import pytest
from test_modes_agree import LOOPBACK, MEETINGS, SECOND_ADDRESS, Case

from testbed.dataplane.iptables import make_settings, render_full
from testbed.dataplane.state import ProxyState
from testbed.dataplane.trace import Fate, Node, Packet, Verdict, parse_rules, trace
from testbed.dataplane.userspace import make_userspace_settings, render_node, stand_in_ports, trace_userspace
from testbed.model.proxyconfig import KubeProxyConfig
from testbed.model.service import NodeView, ServicePort, TrafficPolicy

ENDPOINT, CLOSED = Verdict.ENDPOINT, Verdict.CLOSED


def concerned(case: Case, packet: Packet) -> list[ServicePort]:
    """Return the service ports that a packet's destination belongs to."""
    place = (packet.destination, packet.port)
    return [
        service
        for service, address, port in case.targets()
        if (address, port) == place and service.protocol.tool_name == packet.protocol
    ]


def ready(case: Case, service: ServicePort) -> set[str]:
    return {e.text for e in case.state.endpoints.get(service.name, ()) if e.ready}


_Difference = Callable[[Case, Packet, list[ServicePort], Fate, Fate], bool]

#: What explains a difference; `services` are those the packet is about.
DIFFERENCES: dict[str, _Difference] = {
    "refused there, closed here": lambda case, packet, services, there, here: (
        there.verdict is Verdict.REJECT and here.verdict is CLOSED
    ),
    "policy Local is not known": lambda case, packet, services, there, here: (
        any(TrafficPolicy.LOCAL in (s.external_policy, s.internal_policy) for s in services)
        and (here.verdict is CLOSED or set(here.endpoints) in [ready(case, s) for s in services])
    ),
    "source ranges are not known": lambda case, packet, services, there, here: (
        there.verdict is Verdict.DROP and any(s.source_ranges for s in services) and here.verdict in (ENDPOINT, CLOSED)
    ),
    "terminating endpoints and topology hints are not known": lambda case, packet, services, there, here: (
        there.verdict is ENDPOINT
        and here.verdict in (ENDPOINT, CLOSED)
        and any(e.terminating or e.zone_hints for s in services for e in case.state.endpoints.get(s.name, ()))
        and (here.verdict is CLOSED or set(here.endpoints) in [ready(case, s) for s in services])
    ),
    "SCTP is not copied": lambda case, packet, services, there, here: (
        packet.protocol == "sctp" and here.verdict is Verdict.NONE
    ),
    "an external IP from the node itself": lambda case, packet, services, there, here: (
        packet.source in (case.node_ip, SECOND_ADDRESS, LOOPBACK)
        and any(IPv4Address(packet.destination) in s.external_ips for s in services)
        and here.verdict is Verdict.NONE
    ),
    "a load balancer or external IP without endpoints, from the node itself": lambda case, packet, services, there, here: (
        packet.source in (case.node_ip, SECOND_ADDRESS, LOOPBACK)
        and there.verdict is Verdict.NONE
        and here.verdict is CLOSED
    ),
    "a health-check node port needs no rule": lambda case, packet, services, there, here: (
        there.verdict is Verdict.ACCEPT and here.verdict is Verdict.NONE
    ),
    "127.0.0.1 from elsewhere: the kernel drops such packets itself": lambda case, packet, services, there, here: (
        packet.destination == LOOPBACK and packet.source != LOOPBACK
    ),
    "nodePortAddresses and localhostNodePorts are not known": lambda case, packet, services, there, here: (
        packet.destination in (LOOPBACK, SECOND_ADDRESS, case.node_ip)
        and there.verdict is Verdict.NONE
        and here.verdict in (ENDPOINT, CLOSED)
        and any(s.node_port == packet.port for s in services)
    ),
}


Read = Callable[[], tuple[KubeProxyConfig, NodeView, ProxyState]]


def explanations(read: Read, every: int) -> Iterator[tuple[set[str], str]]:
    """Yield the names of the differences that explain why a packet fares otherwise, and words; of each so-manieth packet."""
    config, node, state = read()
    assert node.internal_ip is not None
    addresses = [IPv4Address(LOOPBACK), IPv4Address(SECOND_ADDRESS), node.internal_ip]
    where, case = Node(frozenset(addresses)), Case(state, str(node.internal_ip))
    in_iptables = parse_rules(render_full(state, make_settings(config, node, addresses)).text)
    ports = stand_in_ports(state, 40001)
    in_userspace = parse_rules(render_node(state, make_userspace_settings(config, node), ports))
    names = {int(port): name for name, port in ports.items()}
    for packet in itertools.islice(case.packets(), 0, None, every):
        there = trace(in_iptables, packet, where)
        here = trace_userspace(in_userspace, packet, where, state, names)
        assert here.masquerade is (here.verdict is ENDPOINT)
        if (there.verdict, there.endpoints) == (here.verdict, here.endpoints):
            continue
        services = concerned(case, packet)
        found = {name for name, explains in DIFFERENCES.items() if explains(case, packet, services, there, here)}
        yield found, f"{packet}: {there} in iptables mode, {here} in userspace mode\n" + "\n".join(here.rules)


@pytest.mark.parametrize("read", MEETINGS)
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_packets_get_to_the_same_place(read: Read, every: int) -> None:
    """The same endpoints, always hidden from the client; otherwise one of the named differences explains it."""
    for found, words in explanations(read, every):
        assert found, words


def test_every_difference_is_met() -> None:
    """Each named difference explains some packet that nothing else explains: none is a leftover."""
    met: set[str] = set()
    for meeting in MEETINGS:
        for found, _ in explanations(meeting.values[0], 5):
            met |= found if len(found) == 1 else set()
        if met == DIFFERENCES.keys():
            break
    assert met == DIFFERENCES.keys()
