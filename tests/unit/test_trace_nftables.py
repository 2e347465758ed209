"""Packets through rendered nftables rules: the same tables as iptables mode, and where the two differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import test_trace_iptables as shared
from proxy_support import NODE_IP, endpoint, endpoint_slice, nftables_settings, service, state_of
from test_trace_iptables import (
    BLOCKED,
    DEAD,
    DROP,
    ENDING_HERE,
    ENDING_THERE,
    HERE,
    NONE,
    OUTSIDE,
    POD,
    READY_HERE,
    READY_THERE,
    REJECT,
    THERE,
    THIS_NODE,
    masq,
)

from testbed.dataplane.nft_table import Chain, Hook, NftTable
from testbed.dataplane.nftables import NftablesRenderer
from testbed.dataplane.trace import Fate, Packet, to_endpoints
from testbed.dataplane.trace_nftables import trace_nftables


def table_for(services: Sequence[Any], slices: Sequence[Any], config: Mapping[str, Any] | None = None) -> NftTable:
    renderer = NftablesRenderer(nftables_settings(config))
    renderer.full(state_of(services, slices), None)
    return renderer.wanted()


def as_nftables(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the section of iptables mode as that of nftables mode."""
    return {"nftables" if key == "iptables" else key: value for key, value in config.items()}


@pytest.mark.parametrize("config", shared.CONFIGS)
@pytest.mark.parametrize(
    ("source", "destination", "port", "endpoints", "masquerade"),
    [pytest.param(*flow[1:], id=flow[0]) for flow in shared.FLOWS],
)
def test_internal_external_masquerade(
    config: str, source: str, destination: str, port: int, endpoints: Any, masquerade: str
) -> None:
    """Endpoints and masquerade by source, address and policy (TestInternalExternalMasquerade, nftables)."""
    table = table_for(shared.MASQUERADE_SERVICES, shared.MASQUERADE_SLICES, as_nftables(shared.CONFIGS[config]))
    number = list(shared.CONFIGS).index(config)
    reached = endpoints[number] if isinstance(endpoints, list) else endpoints
    wanted = to_endpoints(*reached, masquerade=masquerade[number] == "y")
    assert trace_nftables(table, Packet(source, destination, port), THIS_NODE) == wanted


GENERAL = [
    service("svc1", "172.30.0.41"),
    {
        **service("svc2", "172.30.0.42"),
        "spec": {
            "clusterIP": "172.30.0.42",
            "ports": [
                {"name": "http", "port": 80, "protocol": "TCP"},
                {"name": "https", "port": 443, "protocol": "TCP"},
                {"name": "dns-udp", "port": 53, "protocol": "UDP"},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                {"name": "dns-sctp", "port": 53, "protocol": "SCTP"},
            ],
        },
    },
]
TWO = (endpoint("10.180.0.1"), endpoint("10.180.2.1", "node2"))
GENERAL_SLICES = [
    endpoint_slice("svc1", endpoint("10.180.0.1")),
    endpoint_slice("svc2", *TWO, port_name="http", suffix="a"),
    endpoint_slice("svc2", *TWO, port_name="https", port=8443, suffix="b"),
    endpoint_slice("svc2", *TWO, port_name="dns-udp", port=53, protocol="UDP", suffix="c"),
    endpoint_slice("svc2", *TWO, port_name="dns-tcp", port=5353, suffix="d"),
    endpoint_slice("svc2", *TWO, port_name="dns-sctp", port=5354, protocol="SCTP", suffix="e"),
]


@pytest.mark.parametrize(
    ("packet", "fate"),
    [
        pytest.param(Packet("10.180.0.2", "172.30.0.41", 80), to_endpoints(HERE), id="pod to ClusterIP"),
        pytest.param(Packet(NODE_IP, "172.30.0.41", 80), masq(HERE), id="node to ClusterIP"),
        pytest.param(Packet("10.180.0.1", "172.30.0.41", 80), masq(HERE), id="pod to itself"),
        pytest.param(
            Packet("10.180.0.2", "172.30.0.42", 80), to_endpoints(HERE, "10.180.2.1:80"), id="several endpoints"
        ),
        pytest.param(Packet("10.180.0.1", "172.30.0.42", 80), masq(HERE, "10.180.2.1:80"), id="perhaps to itself"),
        pytest.param(
            Packet("10.180.0.2", "172.30.0.42", 443), to_endpoints("10.180.0.1:8443", "10.180.2.1:8443"), id="target port"
        ),
        pytest.param(
            Packet("10.180.0.2", "172.30.0.42", 53), to_endpoints("10.180.0.1:5353", "10.180.2.1:5353"), id="TCP"
        ),
        pytest.param(
            Packet("10.180.0.2", "172.30.0.42", 53, "udp"), to_endpoints("10.180.0.1:53", "10.180.2.1:53"), id="UDP"
        ),
        pytest.param(
            Packet("10.180.0.2", "172.30.0.42", 53, "sctp"), to_endpoints("10.180.0.1:5354", "10.180.2.1:5354"), id="SCTP"
        ),
        pytest.param(Packet("10.180.0.2", "172.30.0.42", 80, "udp"), REJECT, id="another protocol"),
        pytest.param(Packet("10.180.0.2", "172.30.0.41", 443), REJECT, id="another Service's port"),
        pytest.param(Packet(NODE_IP, "172.30.0.41", 443), REJECT, id="another Service's port, from the node"),
        pytest.param(Packet("10.180.0.2", "172.30.0.50", 80), DROP, id="ClusterIP that nobody has"),
        pytest.param(Packet("10.180.0.2", "203.0.113.9", 80), NONE, id="no Service"),
    ],
)  # fmt: skip
def test_cluster_ip(packet: Packet, fate: Fate) -> None:
    """TestClusterIPGeneral: unlike iptables mode, unknown ports are refused and unknown ClusterIPs dropped."""
    assert trace_nftables(table_for(GENERAL, GENERAL_SLICES), packet, THIS_NODE) == fate


BALANCER = service(
    "svc1", "172.30.0.41", node_port=3001, ingress=["1.2.3.4", "5.6.7.8"],
    loadBalancerSourceRanges=["192.168.0.0/24", " 203.0.113.0/25"],
)  # fmt: skip


@pytest.mark.parametrize(
    ("packet", "fate"),
    [
        pytest.param(Packet(POD, "172.30.0.41", 80), to_endpoints(HERE), id="pod to ClusterIP"),
        pytest.param(Packet(OUTSIDE, NODE_IP, 3001), masq(HERE), id="outside to NodePort"),
        pytest.param(Packet(BLOCKED, NODE_IP, 3001), masq(HERE), id="ranges do not guard NodePorts"),
        pytest.param(Packet(OUTSIDE, "1.2.3.4", 80), masq(HERE), id="allowed"),
        pytest.param(Packet(OUTSIDE, "5.6.7.8", 80), masq(HERE), id="allowed, second address"),
        pytest.param(Packet(BLOCKED, "1.2.3.4", 80), DROP, id="blocked"),
        pytest.param(Packet(BLOCKED, "5.6.7.8", 80), DROP, id="blocked, second address"),
        pytest.param(Packet(POD, "1.2.3.4", 80), DROP, id="pods are not among the ranges"),
        pytest.param(Packet(NODE_IP, "1.2.3.4", 80), masq(HERE), id="node"),
        pytest.param(Packet("1.2.3.4", "1.2.3.4", 80), masq(HERE), id="node with the balancer's address as source"),
    ],
)
def test_load_balancer_source_ranges(packet: Packet, fate: Fate) -> None:
    """TestLoadBalancer."""
    table = table_for([BALANCER], [endpoint_slice("svc1", endpoint("10.180.0.1"))])
    assert trace_nftables(table, packet, THIS_NODE) == fate


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(Packet(POD, "172.30.0.41", 80), id="ClusterIP"),
        pytest.param(Packet(NODE_IP, "172.30.0.41", 80), id="ClusterIP from the node"),
        pytest.param(Packet(POD, NODE_IP, 3001), id="pod to NodePort"),
        pytest.param(Packet(OUTSIDE, NODE_IP, 3001), id="outside to NodePort"),
        pytest.param(Packet(OUTSIDE, "192.168.99.11", 80), id="external IP"),
        pytest.param(Packet(POD, "1.2.3.4", 80), id="pod to load balancer"),
        pytest.param(Packet(OUTSIDE, "1.2.3.4", 80), id="outside to load balancer"),
    ],
)
def test_no_endpoints(packet: Packet) -> None:
    """A Service without endpoints refuses at each of its addresses (TestNoEndpointsReject)."""
    svc = service("svc1", "172.30.0.41", node_port=3001, ingress=["1.2.3.4"], externalIPs=["192.168.99.11"])
    assert trace_nftables(table_for([svc], []), packet, THIS_NODE) == REJECT


FIRST, SECOND, LOCALHOST = NODE_IP, "192.168.1.2", "127.0.0.1"


@pytest.mark.parametrize(
    ("entries", "answering"),
    [
        pytest.param([], {FIRST}, id="primary by default"),
        pytest.param(["192.168.0.0/24", "192.168.1.0/24"], {FIRST, SECOND}, id="two networks"),
        pytest.param(["0.0.0.0/0"], {FIRST, SECOND}, id="all"),
        pytest.param(["127.0.0.0/8"], set(), id="the loopback cannot"),
    ],
)
def test_node_port_addresses(entries: list[str], answering: set[str]) -> None:
    """NodePorts answer on the addresses the configuration names, and never on the loopback (TestNodePorts)."""
    svc, slice_ = service("svc1", "172.30.0.41", node_port=3001), endpoint_slice("svc1", endpoint("10.180.0.1"))
    table = table_for([svc], [slice_], {"nodePortAddresses": entries})
    for address in (FIRST, SECOND, LOCALHOST):
        fate = masq(HERE) if address in answering else NONE
        assert trace_nftables(table, Packet(address, address, 3001), THIS_NODE) == fate, f"{address} from itself"
        if address != LOCALHOST:
            assert trace_nftables(table, Packet(OUTSIDE, address, 3001), THIS_NODE) == fate, address


@pytest.mark.parametrize(
    ("endpoints", "inside", "outside"),
    [
        pytest.param([READY_HERE, READY_THERE, ENDING_HERE], (HERE, THERE), to_endpoints(HERE), id="ready first"),
        pytest.param([READY_THERE, ENDING_HERE], (THERE,), to_endpoints("10.180.0.9:80"), id="only terminating here"),
        pytest.param([ENDING_THERE], ("10.180.1.9:80",), DROP, id="only terminating elsewhere"),
        pytest.param([READY_THERE], (THERE,), DROP, id="none here"),
        pytest.param([DEAD], None, REJECT, id="none serves"),
    ],
)  # fmt: skip
def test_terminating_endpoints_external_local(
    endpoints: list[Any], inside: tuple[str, ...] | None, outside: Fate
) -> None:
    """TestTerminatingEndpointsTrafficPolicyLocal; what is dropped from outside still works from pods and the node."""
    svc = service("svc1", "172.30.0.41", node_port=3001, ingress=["1.2.3.4"], externalTrafficPolicy="Local")
    table = table_for([svc], [endpoint_slice("svc1", *endpoints)])
    assert trace_nftables(table, Packet(OUTSIDE, "1.2.3.4", 80), THIS_NODE) == outside
    for address in ("172.30.0.41", "1.2.3.4"):
        fate = REJECT if inside is None else to_endpoints(*inside)
        assert trace_nftables(table, Packet(POD, address, 80), THIS_NODE) == fate
    node = REJECT if inside is None else masq(*inside)
    assert trace_nftables(table, Packet(NODE_IP, "1.2.3.4", 80), THIS_NODE) == node


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
    table = table_for([svc], [endpoint_slice("svc1", *endpoints)])
    assert trace_nftables(table, Packet(POD, "172.30.0.41", 80), THIS_NODE) == fate


def test_detector_by_interface() -> None:
    """With a bridge or prefix detector, what came in by such an interface is a pod's, whatever its address."""
    objects = [service("svc1", "172.30.0.41")], [endpoint_slice("svc1", endpoint("10.180.0.1"))]
    for config in (
        {"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "cni0"}},
        {"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"interfaceNamePrefix": "cni"}},
    ):
        table = table_for(*objects, config)
        inside, outside = (Packet(a, "172.30.0.41", 80, interface=i) for a, i in ((OUTSIDE, "cni0"), (POD, "eth0")))
        assert trace_nftables(table, inside, THIS_NODE) == to_endpoints(HERE)
        assert trace_nftables(table, outside, THIS_NODE) == masq(HERE)


def test_affinity_reaches_every_endpoint() -> None:
    """A client not seen before may get any endpoint; one seen before, the one recorded."""
    svc = service("svc1", "172.30.0.41", sessionAffinity="ClientIP")
    table = table_for([svc], [endpoint_slice("svc1", endpoint("10.180.0.1"), endpoint("10.180.1.1", "node2"))])
    fate = trace_nftables(table, Packet(POD, "172.30.0.41", 80), THIS_NODE)
    assert fate == to_endpoints(HERE, THERE)
    assert sum("ip saddr @affinity-" in rule for rule in fate.rules) == 2
    assert sum("update @affinity-" in rule for rule in fate.rules) == 2


def test_rules_met_are_named() -> None:
    """The fate lists the rules and elements of the walk in order."""
    table = table_for([service("svc1", "172.30.0.41")], [endpoint_slice("svc1", endpoint("10.180.0.1"))])
    met = trace_nftables(table, Packet(POD, "172.30.0.41", 80), THIS_NODE).rules
    chain = next(name for name in table.chains if name.startswith("service-") and name.endswith("/p80"))
    assert met == (
        "filter-prerouting-pre-dnat: ct state new jump firewall-check",
        "nat-prerouting: jump services",
        "services: ip daddr . meta l4proto . th dport vmap @service-ips",
        f"@service-ips: 172.30.0.41 . tcp . 80 : goto {chain}",
        f"{chain}: meta l4proto tcp dnat ip addr . port to numgen random mod 1 map {{ 0 : 10.180.0.1 . 80 }}",
        "filter-forward: ct state new jump service-endpoints-check",
        "filter-forward: ct state new jump cluster-ips-check",
        "nat-postrouting: jump masquerading",
    )


def test_unknown_statement_is_refused() -> None:
    """A statement that the interpreter does not know is an error, never silently true."""
    table = NftTable(chains={"x": Chain(("ip ttl 1 drop",), Hook("filter", "forward", 0))})
    with pytest.raises(ValueError, match="no idea what 'ip ttl 1 drop' means in 'ip ttl 1 drop'"):
        trace_nftables(table, Packet(POD, OUTSIDE, 80), THIS_NODE)
