"""More of upstream's flow tables through rendered iptables rules: external policies, terminating endpoints, fixed rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from proxy_support import NODE_IP, endpoint, endpoint_slice, service, settings_of, state_of

from testbed.dataplane.iptables import render_full
from testbed.dataplane.trace import Fate, Node, Packet, Ruleset, Verdict, parse_rules, to_endpoints, trace

POD, OUTSIDE = "10.0.0.2", "203.0.113.2"
HERE, THERE = "10.180.0.1:80", "10.180.1.1:80"
CLUSTER_IP, EXTERNAL, BALANCER = "172.30.0.41", "192.168.99.11", "1.2.3.4"
THIS_NODE = Node.of(NODE_IP)
REJECT, DROP = Fate(Verdict.REJECT), Fate(Verdict.DROP)

KEPT = {"all": to_endpoints(HERE, THERE), "here": to_endpoints(HERE)}
HIDDEN = {"all": to_endpoints(HERE, THERE, masquerade=True)}


def rules_for(policy: str, endpoints: Sequence[Any], config: Mapping[str, Any] | None = None, **fields: Any) -> Ruleset:
    svc = service(
        "svc1",
        CLUSTER_IP,
        node_port=3001,
        ingress=[BALANCER],
        externalIPs=[EXTERNAL],
        externalTrafficPolicy=policy,
        **fields,
    )
    return parse_rules(render_full(state_of([svc], [endpoint_slice("svc1", *endpoints)]), settings_of(config)).text)


TWO = [endpoint("10.180.0.1"), endpoint("10.180.1.1", "node2")]


@pytest.mark.parametrize(
    ("policy", "source", "destination", "port", "fate"),
    [
        ("Local", POD, CLUSTER_IP, 80, KEPT["all"]),
        ("Local", POD, EXTERNAL, 80, KEPT["all"]),
        ("Local", POD, BALANCER, 80, KEPT["all"]),
        ("Local", POD, NODE_IP, 3001, KEPT["all"]),
        ("Local", OUTSIDE, EXTERNAL, 80, KEPT["here"]),
        ("Local", OUTSIDE, BALANCER, 80, KEPT["here"]),
        ("Local", OUTSIDE, NODE_IP, 3001, KEPT["here"]),
        ("Cluster", POD, CLUSTER_IP, 80, KEPT["all"]),
        ("Cluster", POD, EXTERNAL, 80, HIDDEN["all"]),
        ("Cluster", POD, BALANCER, 80, HIDDEN["all"]),
        ("Cluster", POD, NODE_IP, 3001, HIDDEN["all"]),
        ("Cluster", OUTSIDE, EXTERNAL, 80, HIDDEN["all"]),
        ("Cluster", OUTSIDE, BALANCER, 80, HIDDEN["all"]),
        ("Cluster", OUTSIDE, NODE_IP, 3001, HIDDEN["all"]),
    ],
)
def test_external_policy(policy: str, source: str, destination: str, port: int, fate: Fate) -> None:
    """TestExternalTrafficPolicyLocal and …Cluster: who answers by each address, and whether the source is hidden."""
    assert trace(rules_for(policy, TWO), Packet(source, destination, port), THIS_NODE) == fate


def ending(address: str, node: str = "node1", *, serving: bool = True) -> Any:
    return endpoint(address, node, ready=False, serving=serving, terminating=True)


@pytest.mark.parametrize(
    ("endpoints", "inside", "outside"),
    [
        pytest.param(
            [*TWO, ending("10.180.0.9")], KEPT["all"], HIDDEN["all"], id="ready ones: terminating ones are not used"
        ),
        pytest.param(
            [TWO[1], ending("10.180.0.9")],
            to_endpoints(THERE),
            to_endpoints(THERE, masquerade=True),
            id="a ready one elsewhere",
        ),
        pytest.param(
            [ending("10.180.0.9"), ending("10.180.1.9", "node2")],
            to_endpoints("10.180.0.9:80", "10.180.1.9:80"),
            to_endpoints("10.180.0.9:80", "10.180.1.9:80", masquerade=True),
            id="only terminating ones: all that serve",
        ),
        pytest.param(
            [ending("10.180.1.9", "node2"), ending("10.180.1.8", "node2", serving=False)],
            to_endpoints("10.180.1.9:80"),
            to_endpoints("10.180.1.9:80", masquerade=True),
            id="only terminating ones elsewhere",
        ),
        pytest.param([ending("10.180.0.9", serving=False)], REJECT, REJECT, id="none serves"),
    ],
)
def test_terminating_endpoints_external_cluster(endpoints: list[Any], inside: Fate, outside: Fate) -> None:
    """TestTerminatingEndpointsTrafficPolicyCluster: pods to the ClusterIP, and outsiders to the load balancer."""
    rules = rules_for("Cluster", endpoints)
    assert trace(rules, Packet(POD, CLUSTER_IP, 80), THIS_NODE) == inside
    assert trace(rules, Packet(OUTSIDE, BALANCER, 80), THIS_NODE) == outside


def test_both_policies_local() -> None:
    """The ClusterIP keeps to this node, and so do outsiders; pods by an external address reach every pod."""
    rules = rules_for("Local", TWO, internalTrafficPolicy="Local")
    assert trace(rules, Packet(POD, CLUSTER_IP, 80), THIS_NODE) == KEPT["here"]
    assert trace(rules, Packet(OUTSIDE, BALANCER, 80), THIS_NODE) == KEPT["here"]
    assert trace(rules, Packet(POD, BALANCER, 80), THIS_NODE) == KEPT["all"]
    elsewhere = rules_for("Local", TWO[1:], internalTrafficPolicy="Local")
    assert trace(elsewhere, Packet(POD, CLUSTER_IP, 80), THIS_NODE) == DROP
    assert trace(elsewhere, Packet(OUTSIDE, BALANCER, 80), THIS_NODE) == DROP
    assert trace(elsewhere, Packet(POD, BALANCER, 80), THIS_NODE) == to_endpoints(THERE)


def test_zone_hints_narrow_the_cluster_list_only() -> None:
    """On a hinted Service a node of zone a uses that zone's endpoints, and policy Local all that are here."""
    from proxy_support import node_object

    from testbed.model.service import parse_node

    hinted = [{**one, "hints": {"forZones": [{"name": zone}]}} for one, zone in zip(TWO, ("b", "a"), strict=True)]
    svc = service(
        "svc1", CLUSTER_IP, node_port=3001, externalTrafficPolicy="Local",
        annotations={"service.kubernetes.io/topology-mode": "Auto"},
    )  # fmt: skip
    node = parse_node(node_object(topology_kubernetes_io__zone="a"))
    payload = render_full(state_of([svc], [endpoint_slice("svc1", *hinted)]), settings_of(None, node))
    rules = parse_rules(payload.text)
    assert trace(rules, Packet(POD, CLUSTER_IP, 80), THIS_NODE) == to_endpoints(THERE)
    assert trace(rules, Packet(OUTSIDE, NODE_IP, 3001), THIS_NODE) == KEPT["here"]


@pytest.mark.parametrize(
    ("addresses", "wanted"), [(["fd00::/8"], None), (["primary", "fd00::/8"], 1), (["0.0.0.0/0"], None)]
)
def test_node_port_addresses_of_the_other_family_do_not_count(addresses: list[str], wanted: int | None) -> None:
    """With none of this family NodePorts answer everywhere, as if the option was not given."""
    found = settings_of({"nodePortAddresses": addresses}).node_port_ips
    assert (found if found is None else len(found)) == wanted
