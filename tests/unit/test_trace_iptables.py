"""Packets through rendered iptables rules: the flow tables of upstream's unit tests (pkg/proxy/iptables/proxier_test.go)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from proxy_support import NODE_IP, endpoint, endpoint_slice, service, settings_of, state_of

from testbed.dataplane.iptables import render_full
from testbed.dataplane.trace import Fate, Node, Packet, Ruleset, Verdict, parse_rules, to_endpoints, trace

POD, REMOTE_POD = "10.0.0.2", "10.9.9.9"
OUTSIDE, BLOCKED = "203.0.113.2", "203.0.113.130"
HERE, THERE = "10.180.0.1:80", "10.180.1.1:80"
THIS_NODE = Node.of(NODE_IP, "192.168.1.2")
REJECT, DROP, NONE, ACCEPT = (Fate(v) for v in (Verdict.REJECT, Verdict.DROP, Verdict.NONE, Verdict.ACCEPT))


def rules_for(services: Sequence[Any], slices: Sequence[Any], config: Mapping[str, Any] | None = None) -> Ruleset:
    return parse_rules(render_full(state_of(services, slices), settings_of(config)).text)


def masq(*endpoints: str) -> Fate:
    return to_endpoints(*endpoints, masquerade=True)


# TestInternalExternalMasquerade: svc1 plain, svc2 externalTrafficPolicy Local, svc3 internalTrafficPolicy Local.
MASQUERADE_SERVICES = [
    service("svc1", "172.30.0.41", node_port=3001, ingress=["1.2.3.4"]),
    service(
        "svc2",
        "172.30.0.42",
        node_port=3002,
        ingress=["5.6.7.8"],
        externalTrafficPolicy="Local",
        healthCheckNodePort=30001,
    ),
    service("svc3", "172.30.0.43", node_port=3003, ingress=["9.10.11.12"], internalTrafficPolicy="Local"),
]
MASQUERADE_SLICES = [
    endpoint_slice(name, endpoint("10.180.0.1"), endpoint("10.180.1.1", "node2")) for name in ("svc1", "svc2", "svc3")
]
BOTH = (HERE, THERE)
CONFIGS: dict[str, dict[str, Any]] = {
    "base": {},
    "no detector": {"clusterCIDR": ""},
    "all": {"iptables": {"masqueradeAll": True}},
    "all, no detector": {"iptables": {"masqueradeAll": True}, "clusterCIDR": ""},
}
# Endpoints and whether the source is hidden, per configuration in the order above.
FLOWS: list[tuple[str, str, str, int, Sequence[str] | list[Sequence[str]], str]] = [
    ("pod to ClusterIP", POD, "172.30.0.41", 80, BOTH, "nnyy"),
    ("pod to ClusterIP, external policy Local", POD, "172.30.0.42", 80, BOTH, "nnyy"),
    ("node to ClusterIP", NODE_IP, "172.30.0.41", 80, BOTH, "ynyy"),
    ("node to ClusterIP, external policy Local", NODE_IP, "172.30.0.42", 80, BOTH, "ynyy"),
    ("outside to ClusterIP", OUTSIDE, "172.30.0.41", 80, BOTH, "ynyy"),
    ("outside to ClusterIP, external policy Local", OUTSIDE, "172.30.0.42", 80, BOTH, "ynyy"),
    ("pod to NodePort", POD, NODE_IP, 3001, BOTH, "yyyy"),
    ("pod to load balancer", POD, "1.2.3.4", 80, BOTH, "yyyy"),
    ("pod to NodePort, internal policy Local", POD, NODE_IP, 3003, BOTH, "yyyy"),
    ("pod to load balancer, internal policy Local", POD, "9.10.11.12", 80, BOTH, "yyyy"),
    ("node to NodePort", NODE_IP, NODE_IP, 3001, BOTH, "yyyy"),
    ("node to load balancer", NODE_IP, "1.2.3.4", 80, BOTH, "yyyy"),
    ("node to load balancer, internal policy Local", NODE_IP, "9.10.11.12", 80, BOTH, "yyyy"),
    ("outside to NodePort", OUTSIDE, NODE_IP, 3001, BOTH, "yyyy"),
    ("outside to load balancer", OUTSIDE, "1.2.3.4", 80, BOTH, "yyyy"),
    ("outside to NodePort, internal policy Local", OUTSIDE, NODE_IP, 3003, BOTH, "yyyy"),
    ("pod to NodePort, external policy Local", POD, NODE_IP, 3002, [BOTH, (HERE,), BOTH, (HERE,)], "nnnn"),
    ("pod to load balancer, external policy Local", POD, "5.6.7.8", 80, [BOTH, (HERE,), BOTH, (HERE,)], "nnnn"),
    ("node to NodePort, external policy Local", NODE_IP, NODE_IP, 3002, BOTH, "yyyy"),
    ("node to load balancer, external policy Local", NODE_IP, "5.6.7.8", 80, BOTH, "yyyy"),
    ("outside to NodePort, external policy Local", OUTSIDE, NODE_IP, 3002, (HERE,), "nnnn"),
    ("outside to load balancer, external policy Local", OUTSIDE, "5.6.7.8", 80, (HERE,), "nnnn"),
    ("pod to ClusterIP, internal policy Local", POD, "172.30.0.43", 80, (HERE,), "nnyy"),
    ("node to ClusterIP, internal policy Local", NODE_IP, "172.30.0.43", 80, (HERE,), "ynyy"),
    ("outside to ClusterIP, internal policy Local", OUTSIDE, "172.30.0.43", 80, (HERE,), "ynyy"),
]


@pytest.mark.parametrize("column", range(4), ids=list(CONFIGS))
@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow[0])
def test_masquerade(flow: tuple[Any, ...], column: int) -> None:
    """Every flow of TestInternalExternalMasquerade reaches the endpoints upstream's does, its source hidden or kept alike."""
    _, source, destination, port, endpoints, hidden = flow
    wanted = endpoints[column] if isinstance(endpoints, list) else endpoints
    rules = rules_for(MASQUERADE_SERVICES, MASQUERADE_SLICES, list(CONFIGS.values())[column])
    fate = trace(rules, Packet(source, destination, port), THIS_NODE)
    assert fate == to_endpoints(*wanted, masquerade=hidden[column] == "y")


def test_no_endpoints_refuses() -> None:
    """Every address of a Service without endpoints refuses, from inside and outside (TestNoEndpointsReject)."""
    svc = service("svc", "172.30.0.41", node_port=3001, ingress=["1.2.3.4"], externalIPs=["192.168.99.11"])
    rules = rules_for([svc], [])
    for source, destination, port in [
        (POD, "172.30.0.41", 80),
        (POD, NODE_IP, 3001),
        (OUTSIDE, NODE_IP, 3001),
        (POD, "192.168.99.11", 80),
        (OUTSIDE, "192.168.99.11", 80),
        (POD, "1.2.3.4", 80),
        (OUTSIDE, "1.2.3.4", 80),
    ]:
        assert trace(rules, Packet(source, destination, port), THIS_NODE) == REJECT, (source, destination)


@pytest.mark.parametrize(
    ("packet", "fate"),
    [
        pytest.param(Packet(POD, "172.30.0.41", 80), to_endpoints("10.180.0.1:80", "10.180.0.2:80"), id="pod"),
        pytest.param(Packet(NODE_IP, "172.30.0.41", 80), masq("10.180.0.1:80", "10.180.0.2:80"), id="node"),
        pytest.param(Packet("10.180.0.1", "172.30.0.41", 80), masq("10.180.0.1:80", "10.180.0.2:80"), id="one of the endpoints"),
        pytest.param(Packet(POD, "172.30.0.42", 80), to_endpoints("10.180.0.3:8443"), id="target port differs"),
        pytest.param(Packet("10.180.0.3", "172.30.0.42", 80), masq("10.180.0.3:8443"), id="hairpin"),
        pytest.param(Packet(POD, "172.30.0.42", 80, "udp"), to_endpoints("10.180.0.4:80"), id="UDP on the same port"),
        pytest.param(Packet(POD, "172.30.0.42", 80, "sctp"), NONE, id="no SCTP there"),
        pytest.param(Packet(POD, "172.30.0.41", 80, "udp"), NONE, id="TCP only"),
        pytest.param(Packet(POD, "172.30.0.41", 443), NONE, id="another port"),
        pytest.param(Packet(POD, "172.30.0.99", 80), NONE, id="an address of no Service"),
    ],
)  # fmt: skip
def test_cluster_ip(packet: Packet, fate: Fate) -> None:
    """ClusterIPs match address, protocol and port, and hide the source of what is no pod or talks to itself."""
    services = [
        service("svc1", "172.30.0.41"),
        service("svc2", "172.30.0.42"),
        service("svc3", "172.30.0.42", protocol="UDP"),
    ]
    slices = [
        endpoint_slice("svc1", endpoint("10.180.0.1"), endpoint("10.180.0.2")),
        endpoint_slice("svc2", endpoint("10.180.0.3"), port=8443),
        endpoint_slice("svc3", endpoint("10.180.0.4"), protocol="UDP"),
    ]
    assert trace(rules_for(services, slices), packet, THIS_NODE) == fate


@pytest.mark.parametrize(
    ("packet", "fate"),
    [
        pytest.param(Packet(POD, "1.2.3.4", 80), DROP, id="pod: not in a range"),
        pytest.param(Packet(OUTSIDE, "1.2.3.4", 80), masq(HERE), id="outside, allowed"),
        pytest.param(Packet(OUTSIDE, "5.6.7.8", 80), masq(HERE), id="outside, allowed, second address"),
        pytest.param(Packet(BLOCKED, "1.2.3.4", 80), DROP, id="outside, blocked"),
        pytest.param(Packet(BLOCKED, NODE_IP, 3001), masq(HERE), id="ranges do not guard NodePorts"),
        pytest.param(Packet(NODE_IP, "1.2.3.4", 80), masq(HERE), id="node in a range"),
        pytest.param(Packet("1.2.3.4", "1.2.3.4", 80), masq(HERE), id="node's own packet looped back"),
    ],
)
def test_source_ranges(packet: Packet, fate: Fate) -> None:
    """loadBalancerSourceRanges admit exactly their clients, to load-balancer addresses only (TestLoadBalancer)."""
    ranges = ["192.168.0.0/24", "203.0.113.0/25"]
    svc = service(
        "svc1", "172.30.0.41", node_port=3001, ingress=["1.2.3.4", "5.6.7.8"], loadBalancerSourceRanges=ranges
    )
    rules = rules_for([svc], [endpoint_slice("svc1", endpoint("10.180.0.1"))])
    assert trace(rules, packet, THIS_NODE) == fate


FIRST, SECOND, LOCALHOST = NODE_IP, "192.168.1.2", "127.0.0.1"


@pytest.mark.parametrize(
    ("config", "fates"),
    [
        pytest.param({}, {FIRST: masq(HERE), SECOND: masq(HERE), LOCALHOST: masq(HERE)}, id="defaults"),
        pytest.param(
            {"iptables": {"localhostNodePorts": False}},
            {FIRST: masq(HERE), SECOND: masq(HERE), LOCALHOST: NONE},
            id="not on localhost",
        ),
        pytest.param(
            {"nodePortAddresses": ["192.168.0.0/24"]}, {FIRST: masq(HERE), SECOND: NONE, LOCALHOST: NONE}, id="one CIDR"
        ),
        pytest.param(
            {"nodePortAddresses": ["192.168.0.0/24", "127.0.0.0/8"]},
            {FIRST: masq(HERE), SECOND: NONE, LOCALHOST: masq(HERE)},
            id="localhost and one CIDR",
        ),
        pytest.param(
            {"nodePortAddresses": ["primary"]}, {FIRST: masq(HERE), SECOND: NONE, LOCALHOST: NONE}, id="primary"
        ),
    ],
)
def test_node_port_addresses(config: dict[str, Any], fates: dict[str, Fate]) -> None:
    """NodePorts answer on the addresses the configuration names, and from the node itself as from outside (TestNodePorts)."""
    rules = rules_for(
        [service("svc1", "172.30.0.41", node_port=3001)], [endpoint_slice("svc1", endpoint("10.180.0.1"))], config
    )
    for address, fate in fates.items():
        source = LOCALHOST if address == LOCALHOST else OUTSIDE
        assert trace(rules, Packet(source, address, 3001), THIS_NODE) == fate, address
        assert trace(rules, Packet(address, address, 3001), THIS_NODE) == fate, f"{address} from itself"


def test_packets_from_outside_to_localhost_are_dropped() -> None:
    """Route_localnet lets them in, so KUBE-FIREWALL must not; unless NodePorts are off there, and it is not needed."""
    rules = rules_for([], [])
    assert trace(rules, Packet(OUTSIDE, "127.0.0.1", 10249), THIS_NODE) == DROP
    assert trace(rules, Packet("127.0.0.1", "127.0.0.1", 10249), THIS_NODE) == NONE
    off = rules_for([], [], {"iptables": {"localhostNodePorts": False}})
    assert trace(off, Packet(OUTSIDE, "127.0.0.1", 10249), THIS_NODE) == NONE


def test_health_check_node_port_is_let_in() -> None:
    """The health check's port is accepted whether or not endpoints are here, and forgotten with the Service."""
    svc = service(
        "svc1",
        "172.30.0.41",
        node_port=3001,
        ingress=["1.2.3.4"],
        externalTrafficPolicy="Local",
        healthCheckNodePort=30000,
    )
    assert trace(rules_for([svc], []), Packet(OUTSIDE, NODE_IP, 30000), THIS_NODE) == ACCEPT
    assert trace(rules_for([], []), Packet(OUTSIDE, NODE_IP, 30000), THIS_NODE) == NONE


READY_HERE, READY_THERE = endpoint("10.180.0.1"), endpoint("10.180.1.1", "node2")
ENDING_HERE = endpoint("10.180.0.9", ready=False, serving=True, terminating=True)
ENDING_THERE = endpoint("10.180.1.9", "node2", ready=False, serving=True, terminating=True)
DEAD = endpoint("10.180.1.8", "node2", ready=False, serving=False, terminating=True)


@pytest.mark.parametrize(
    ("endpoints", "inside", "outside"),
    [
        pytest.param(
            [READY_HERE, READY_THERE, ENDING_HERE], to_endpoints(HERE, THERE), to_endpoints(HERE), id="ready ones first"
        ),
        pytest.param([READY_THERE, ENDING_HERE], to_endpoints(THERE), to_endpoints("10.180.0.9:80"), id="only terminating here"),
        pytest.param([ENDING_THERE], to_endpoints("10.180.1.9:80"), DROP, id="only terminating elsewhere"),
        pytest.param([READY_THERE], to_endpoints(THERE), DROP, id="none here"),
        pytest.param([DEAD], REJECT, REJECT, id="none serves"),
    ],
)  # fmt: skip
def test_terminating_endpoints_external_local(endpoints: list[Any], inside: Fate, outside: Fate) -> None:
    """TestTerminatingEndpointsTrafficPolicyLocal: pods to the ClusterIP, and outsiders to the load balancer."""
    svc = service("svc1", "172.30.0.41", node_port=3001, ingress=["1.2.3.4"], externalTrafficPolicy="Local")
    rules = rules_for([svc], [endpoint_slice("svc1", *endpoints)])
    assert trace(rules, Packet(POD, "172.30.0.41", 80), THIS_NODE) == inside
    assert trace(rules, Packet(OUTSIDE, "1.2.3.4", 80), THIS_NODE) == outside


@pytest.mark.parametrize(
    ("endpoints", "fate"),
    [
        pytest.param([READY_HERE, READY_THERE], to_endpoints(HERE), id="one of two here"),
        pytest.param([READY_THERE], DROP, id="none here"),
        pytest.param([], REJECT, id="none at all"),
    ],
)
def test_internal_policy_local(endpoints: list[Any], fate: Fate) -> None:
    """internalTrafficPolicy Local keeps to this node, drops when only others serve, refuses when nobody does."""
    svc = service("svc1", "172.30.0.41", internalTrafficPolicy="Local")
    rules = rules_for([svc], [endpoint_slice("svc1", *endpoints)])
    assert trace(rules, Packet(POD, "172.30.0.41", 80), THIS_NODE) == fate


def test_detector_by_interface() -> None:
    """With a bridge or prefix detector, what came in by such an interface is a pod's, whatever its address."""
    objects = [service("svc1", "172.30.0.41")], [endpoint_slice("svc1", endpoint("10.180.0.1"))]
    for config in (
        {"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "cni0"}},
        {"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"interfaceNamePrefix": "cni"}},
    ):
        rules = rules_for(*objects, config)
        assert trace(rules, Packet(OUTSIDE, "172.30.0.41", 80, interface="cni0"), THIS_NODE) == to_endpoints(HERE)
        assert trace(rules, Packet(POD, "172.30.0.41", 80, interface="eth0"), THIS_NODE) == masq(HERE)


def test_affinity_reaches_every_endpoint() -> None:
    """A client not seen before may get any endpoint; one seen before, the one recorded."""
    svc = service("svc1", "172.30.0.41", sessionAffinity="ClientIP")
    rules = rules_for([svc], [endpoint_slice("svc1", endpoint("10.180.0.1"), endpoint("10.180.1.1", "node2"))])
    fate = trace(rules, Packet(POD, "172.30.0.41", 80), THIS_NODE)
    assert fate == to_endpoints(HERE, THERE)
    assert sum("--rcheck --seconds 10800" in rule for rule in fate.rules) == 2


def test_rules_met_are_named() -> None:
    """The fate lists the rules of the walk in order, from the hook to the last."""
    rules = rules_for([service("svc1", "172.30.0.41")], [endpoint_slice("svc1", endpoint("10.180.0.1"))])
    met = trace(rules, Packet(POD, "172.30.0.41", 80), THIS_NODE).rules
    assert met[0].startswith("nat: -I PREROUTING")
    assert "ns/svc1:p80 cluster IP" in met[1]
    assert any("--to-destination 10.180.0.1:80" in rule for rule in met)


def test_unknown_match_is_refused() -> None:
    """A match that the interpreter does not know is an error, never silently true."""
    with pytest.raises(ValueError, match="no idea what --limit means in '-A INPUT -m limit --limit 1/s -j DROP'"):
        parse_rules("*filter\n-A INPUT -m limit --limit 1/s -j DROP\nCOMMIT\n")
