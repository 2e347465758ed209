"""Which endpoints a node uses: the cases of upstream's TestCategorizeEndpoints, and decoding of Services and slices."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest
from proxy_support import endpoint as slice_endpoint
from proxy_support import endpoint_slice, service

from testbed.dataplane.topology import ZONE_LABEL, EndpointChoice, HintPolicy, choose_endpoints
from testbed.model.service import (
    Endpoint,
    ServicePort,
    ServicePortName,
    TrafficPolicy,
    parse_address,
    parse_endpoint_slices,
    parse_network,
    parse_service,
)

LOCAL = TrafficPolicy.LOCAL


def port(**changes: Any) -> ServicePort:
    fields: dict[str, Any] = {
        "name": ServicePortName("ns", "svc", "p80", "TCP"),
        "cluster_ip": IPv4Address("172.30.0.41"),
        "port": 80,
        "topology_mode": "Auto",
    }
    return ServicePort(**{**fields, **changes})


def ep(number: int, zones: str = "", *, local: bool = False, state: str = "ready", nodes: str = "") -> Endpoint:
    """Return 10.0.0.NUMBER; ``state`` is ready, unready, ending (serving, terminating) or dead (terminating)."""
    return Endpoint(
        address=IPv4Address(f"10.0.0.{number}"),
        port=80,
        is_local=local,
        ready=state == "ready",
        serving=state in ("ready", "ending"),
        terminating=state in ("ending", "dead"),
        zone_hints=frozenset(zones.split()),
        node_hints=frozenset(nodes.split()),
    )


def numbers(choice: EndpointChoice) -> tuple[list[int], list[int], list[int], bool]:
    def last(endpoints: tuple[Endpoint, ...]) -> list[int]:
        return [int(str(e.address).rsplit(".", 1)[1]) for e in endpoints]

    return last(choice.cluster), last(choice.local), last(choice.reachable), choice.has_any


HINTED = [ep(1, "a", local=True), ep(2, "b"), ep(3, "c"), ep(4, "a")]
EXTERNAL_LOCAL = {"external_policy": LOCAL, "node_port": 30000}
CASES: list[Any] = [
    pytest.param(port(), HINTED, "a", ([1, 4], [], [1, 4], True), id="hints for our zone"),
    pytest.param(port(**EXTERNAL_LOCAL), HINTED, "b", ([2], [1], [1, 2], True), id="external Local: hints for cluster only"),
    pytest.param(port(internal_policy=LOCAL), HINTED, "b", ([], [1], [1], True), id="internal Local: no hints"),
    pytest.param(port(topology_mode=""), HINTED, "a", ([1, 2, 3, 4], [], [1, 2, 3, 4], True), id="no annotation"),
    pytest.param(port(topology_mode="disabled"), HINTED, "a", ([1, 2, 3, 4], [], [1, 2, 3, 4], True), id="disabled"),
    pytest.param(port(), HINTED, "", ([1, 2, 3, 4], [], [1, 2, 3, 4], True), id="node without zone"),
    pytest.param(port(), HINTED, "d", ([1, 2, 3, 4], [], [1, 2, 3, 4], True), id="nobody is hinted for our zone"),
    pytest.param(port(), [*HINTED, ep(5)], "a", ([1, 2, 3, 4, 5], [], [1, 2, 3, 4, 5], True), id="one lacks hints"),
    pytest.param(port(), [*HINTED, ep(5, state="unready")], "a", ([1, 4], [], [1, 4], True), id="an unready one lacks hints"),
    pytest.param(port(), [ep(1, "a", state="unready"), ep(2, "b")], "a", ([2], [], [2], True), id="only an unready one here"),
    pytest.param(port(), [ep(1, "a b c"), ep(2, "b c"), ep(3, "c")], "a", ([1], [], [1], True), id="several zones in a hint"),
    pytest.param(port(), [ep(1, state="unready")], "a", ([], [], [], False), id="all unready"),
    pytest.param(port(), [ep(1, state="ending"), ep(2, state="unready")], "", ([1], [], [1], True), id="serving-terminating"),
    pytest.param(
        port(), [ep(1, "b", state="ending"), ep(2, "a", state="ending")], "a",
        ([1, 2], [], [1, 2], True), id="…ignore hints",
    ),
    pytest.param(port(), [ep(1, state="dead")], "", ([], [], [], False), id="non-serving never"),
    pytest.param(port(internal_policy=LOCAL), [ep(1), ep(2)], "", ([], [], [], True), id="internal Local: none here"),
    pytest.param(
        port(internal_policy=LOCAL), [ep(1, local=True), ep(2, local=True)], "",
        ([], [1, 2], [1, 2], True), id="…all here",
    ),
    pytest.param(port(internal_policy=LOCAL), [], "", ([], [], [], False), id="…none anywhere"),
    pytest.param(
        port(**EXTERNAL_LOCAL), [ep(1, local=True), ep(2, local=True, state="ending"), ep(3)], "",
        ([1, 3], [1], [1, 3], True), id="external Local: ready before terminating",
    ),
    pytest.param(
        port(**EXTERNAL_LOCAL), [ep(1, local=True, state="ending"), ep(3)], "",
        ([3], [1], [1, 3], True), id="…terminating here, ready elsewhere",
    ),
    pytest.param(
        port(**EXTERNAL_LOCAL), [ep(1, state="ending"), ep(2, local=True, state="dead")], "",
        ([1], [], [1], True), id="…terminating elsewhere",
    ),
    pytest.param(
        port(internal_policy=LOCAL, node_port=30000), [ep(1), ep(2, local=True)], "",
        ([1, 2], [2], [1, 2], True), id="internal Local, external Cluster",
    ),
    pytest.param(
        port(external_policy=LOCAL), [ep(1, local=True), ep(2)], "",
        ([1, 2], [], [1, 2], True), id="external Local counts only with an external address",
    ),
    pytest.param(
        port(internal_policy=LOCAL, **EXTERNAL_LOCAL), [ep(1), ep(2)], "",
        ([1, 2], [], [1, 2], True), id="both Local, none here",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("service_port", "endpoints", "zone", "wanted"), CASES)
def test_choice(service_port: ServicePort, endpoints: list[Endpoint], zone: str, wanted: Any) -> None:
    """The cluster, local and reachable lists are those of upstream's CategorizeEndpoints."""
    labels = {ZONE_LABEL: zone} if zone else {}
    assert numbers(choose_endpoints(service_port, endpoints, labels)) == wanted


@pytest.mark.parametrize(
    ("hints", "wanted"),
    [
        pytest.param(["n1", "n2", "n3"], [1], id="hints on all: this node's"),
        pytest.param(["n1", "", "n3"], [1, 2], id="missing on one: the zone's"),
        pytest.param(["n2", "n2", "n3"], [1, 2], id="none for this node: the zone's"),
    ],
)
def test_node_hints(hints: list[str], wanted: list[int]) -> None:
    """With the gate for them on, hints for a node come before hints for a zone (PreferSameNode)."""
    endpoints = [ep(1, "a", nodes=hints[0]), ep(2, "a", nodes=hints[1]), ep(3, "b", nodes=hints[2])]
    policy = HintPolicy(without_annotation=True, of_nodes=True)
    choice = choose_endpoints(port(topology_mode=""), endpoints, {ZONE_LABEL: "a"}, "n1", policy)
    assert numbers(choice)[0] == wanted


def test_slices_of_a_service_are_merged() -> None:
    """Endpoints of several slices are one list without doubles, sorted as text, and a copy on this node wins."""
    elsewhere, here = slice_endpoint("10.0.0.9", "node2"), slice_endpoint("10.0.0.9", "node1")
    slices = [
        endpoint_slice("svc", elsewhere, slice_endpoint("10.0.0.10", "node2"), suffix="a"),
        endpoint_slice("svc", here, suffix="b"),
        endpoint_slice("svc", elsewhere, suffix="c"),
    ]
    found = parse_endpoint_slices(slices, "node1")
    assert list(found) == [ServicePortName("ns", "svc", "p80", "TCP")]
    [endpoints] = found.values()
    assert [(str(e), e.is_local) for e in endpoints] == [("10.0.0.10:80", False), ("10.0.0.9:80", True)]


def test_conditions_that_are_absent() -> None:
    """An endpoint without conditions is ready and serving, and not terminating."""
    obj = endpoint_slice("svc", {"addresses": ["10.0.0.1"]})
    [[only]] = parse_endpoint_slices([obj], "node1").values()
    assert (only.ready, only.serving, only.terminating, only.is_local) == (True, True, False, False)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}}, id="headless"),
        pytest.param({"spec": {"clusterIP": "", "clusterIPs": []}}, id="no address yet"),
        pytest.param({"spec": {"type": "ExternalName"}}, id="ExternalName"),
        pytest.param({"spec": {"clusterIP": "fd00::1", "clusterIPs": ["fd00::1"]}}, id="IPv6 only"),
        pytest.param({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": ""}}}, id="another proxy's"),
        pytest.param({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}}, id="labelled headless"),
    ],
)
def test_services_that_a_proxy_ignores(change: dict[str, dict[str, Any]]) -> None:
    """Such a Service gives no service port."""
    obj = service("svc", "172.30.0.41")
    for part, fields in change.items():
        obj[part].update(fields)
    assert parse_service(obj) == ()


def test_load_balancer_addresses() -> None:
    """Addresses with ipMode Proxy and entries that are host names only are left out."""
    obj = service("svc", "172.30.0.41", node_port=30000)
    obj["spec"]["type"] = "LoadBalancer"
    obj["status"]["loadBalancer"]["ingress"] = [
        {"ip": "1.2.3.4", "ipMode": "VIP"},
        {"ip": "1.2.3.5", "ipMode": "Proxy"},
        {"ip": "1.2.3.6"},
        {"hostname": "lb.example"},
    ]
    [only] = parse_service(obj)
    assert [str(address) for address in only.load_balancer_ips] == ["1.2.3.4", "1.2.3.6"]


@pytest.mark.parametrize(
    ("kind", "extra", "wanted"),
    [
        ("NodePort", {}, TrafficPolicy.LOCAL),
        ("LoadBalancer", {}, TrafficPolicy.LOCAL),
        ("ClusterIP", {}, TrafficPolicy.CLUSTER),
        ("ClusterIP", {"externalIPs": ["192.168.99.11"]}, TrafficPolicy.LOCAL),
    ],
)
def test_external_policy_counts_only_with_outside_traffic(kind: str, extra: Any, wanted: TrafficPolicy) -> None:
    """A plain ClusterIP Service has no external traffic, whatever its externalTrafficPolicy says."""
    obj = service("svc", "172.30.0.41", externalTrafficPolicy="Local", **extra)
    obj["spec"]["type"] = kind
    assert parse_service(obj)[0].external_policy is wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("10.1.2.3", "10.1.2.3"), ("010.001.02.3", "10.1.2.3"), ("10.1.2", None), ("256.1.1.1", None), ("fd00::1", None),
     (None, None)],
)  # fmt: skip
def test_addresses_are_read_sloppily(text: object, wanted: str | None) -> None:
    """Leading zeros are decimal, nonsense and the other family are nothing."""
    assert parse_address(text) == (IPv4Address(wanted) if wanted else None)


def test_networks_lose_their_host_bits() -> None:
    """A range with host bits set means its network."""
    assert str(parse_network("203.0.113.7/25")) == "203.0.113.0/25"
    assert parse_network("203.0.113.7") is None
