"""The text that iptables mode writes: names, order, what a partial sync leaves out, stale chains."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxy_support import NODE, endpoint, endpoint_slice, node_object, service, settings_of, state_of

from testbed.dataplane import chains
from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.flows import StaleFlows, stale_udp_flows
from testbed.dataplane.health import health_checks, render_health_check
from testbed.dataplane.iptables import (
    JUMPS,
    Installed,
    IptablesRenderer,
    missing_parts,
    parse_installed,
    render_full,
    split_evenly,
)
from testbed.model.service import ServicePortName, parse_address, parse_node

SVC = [service(f"svc{n}", f"172.30.0.4{n}", node_port=30000 + n) for n in range(1, 4)]
SLICES = [endpoint_slice(f"svc{n}", endpoint(f"10.180.0.{n}"), endpoint(f"10.180.1.{n}", "node2")) for n in range(1, 4)]
SVC1, SVC2 = (ServicePortName("ns", f"svc{n}", "p80", "TCP") for n in (1, 2))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        (ServicePortName("ns1", "svc1", "p80", "TCP"), "XPGD46QRK7WJZT7O"),
        (ServicePortName("ns1", "svc1", "", "TCP"), "AQI2S6QIMU7PVVRP"),
        (ServicePortName("ns1", "svc1", "p80", "UDP"), "OJWW7NSBVZTDHXNW"),
        (ServicePortName("default", "kubernetes", "https", "TCP"), "NPX46M4PTMTKRN6Y"),
    ],
)
def test_service_chain_names(name: ServicePortName, suffix: str) -> None:
    """Names are the hashes that upstream computes."""
    assert chains.service_suffix(name) == suffix


def test_endpoint_chain_name() -> None:
    """An endpoint's chain hashes the service port, the protocol and the endpoint."""
    name = ServicePortName("ns1", "svc1", "p80", "TCP")
    assert chains.endpoint_chain(name, "10.180.0.1:80") == "KUBE-SEP-SXIVWICOYRO3J4NJ"


@pytest.mark.parametrize(("n", "wanted"), [(1, []), (2, ["0.5000000000"]), (3, ["0.3333333333", "0.5000000000"])])
def test_split_evenly(n: int, wanted: list[str]) -> None:
    """Each rule takes its share of what the rules before it left."""
    assert split_evenly(n) == wanted


def test_split_evenly_needs_an_endpoint() -> None:
    """Nothing to spread over is a mistake of the caller."""
    with pytest.raises(ValueError, match="need at least one endpoint, got 0"):
        split_evenly(0)


@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 2), max_size=3))
def test_order_of_events_does_not_matter(chance: random.Random, deleted: list[int]) -> None:
    """Whatever the order in which objects come and go, the same objects render to the same bytes."""
    tracker = ChangeTracker(NODE)
    events: list[Any] = [(tracker.set_service, obj) for obj in SVC] + [(tracker.set_slice, obj) for obj in SLICES]
    chance.shuffle(events)
    for event, obj in events:
        event(obj)
        if chance.random() < 0.3:
            tracker.take()
    for n in deleted:  # gone and back again
        tracker.delete_slice("ns", f"svc{n + 1}-x")
        tracker.delete_service("ns", f"svc{n + 1}")
        tracker.take()
        tracker.set_service(SVC[n])
        tracker.set_slice(SLICES[n])
    wanted = render_full(state_of(SVC, SLICES), settings_of()).text
    assert render_full(tracker.take()[0], settings_of()).text == wanted


def test_first_payload_adds_jumps_so_that_they_end_in_upstreams_order() -> None:
    """Every jump is inserted on top of its chain, KUBE-FIREWALL last, and only those that are missing."""
    payload = render_full(state_of([], []), settings_of())
    inserted = [line for line in payload.text.splitlines() if line.startswith("-I INPUT")]
    assert [line.rsplit(" ", 1)[1] for line in inserted] == [
        "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-PROXY-FIREWALL", "KUBE-FIREWALL",
    ]  # fmt: skip
    present = Installed(jumps=frozenset((jump.table, jump.saved) for jump in JUMPS[1:]))
    again = render_full(state_of([], []), settings_of(), present)
    assert [line for line in again.text.splitlines() if line.startswith("-I")] == [f"-I INPUT {JUMPS[0].rule}"]


def test_partial_payload_leaves_unchanged_chains_alone() -> None:
    """Only the changed service port's chains are declared and written; every dispatch rule is."""
    renderer = IptablesRenderer(settings_of())
    state = state_of(SVC, SLICES)
    full = renderer.full(state, Installed())
    text = renderer.partial(state, {SVC1}, full.chains).text
    changed, unchanged = chains.service_suffix(SVC1), chains.service_suffix(SVC2)
    assert f":KUBE-SVC-{changed}" in text and f"-A KUBE-SVC-{changed}" in text
    assert f":KUBE-SVC-{unchanged}" not in text and f"-A KUBE-SVC-{unchanged}" not in text
    assert f"-j KUBE-SVC-{unchanged}" in text
    assert "-I " not in text


def test_rules_of_unchanged_service_ports_are_kept() -> None:
    """A change of one Service renders that one again and no other."""
    tracker, renderer = ChangeTracker(NODE), IptablesRenderer(settings_of())
    tracker.replace_services(SVC)
    tracker.replace_slices(SLICES)
    renderer.full(tracker.take()[0], Installed())
    before = dict(renderer._cache)
    tracker.set_service(SVC[1])  # the same content again
    tracker.set_slice(endpoint_slice("svc1", endpoint("10.180.0.77")))
    state, changed = tracker.take()
    assert changed == {SVC1}
    renderer.partial(state, changed, ())
    assert [name for name in before if renderer._cache[name] is not before[name]] == [SVC1]


def test_stale_chains_are_emptied_then_deleted() -> None:
    """A chain of ours that nothing uses is declared, and deleted at the end of the nat section, after its users changed."""
    stale = "KUBE-SVC-AAAAAAAAAAAAAAAA"
    payload = render_full(state_of(SVC, SLICES), settings_of(), Installed(chains=frozenset({stale})))
    lines = payload.text.splitlines()
    assert lines[-2:] == [f"-X {stale}", "COMMIT"]
    assert f":{stale} - [0:0]" in lines[lines.index("*nat") :]
    assert stale not in payload.chains


def test_chains_without_use_are_read_from_a_dump() -> None:
    """Of a dump, only our service chains of nat, our canaries, our jumps and the number of our rules matter."""
    installed = parse_installed(
        "*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n"
        "*filter\n:INPUT ACCEPT [5:300]\n:KUBE-SVC-IN-FILTER - [0:0]\n-A INPUT -j KUBE-FIREWALL\n"
        "-A INPUT -j SOMEONE\n-A KUBE-FORWARD -j DROP\nCOMMIT\n"
        "*nat\n:KUBE-SVC-X - [0:0]\n:KUBE-SERVICES - [0:0]\n:DOCKER - [0:0]\nCOMMIT\n"
    )
    assert installed == Installed(
        chains=frozenset({"KUBE-SVC-X"}),
        jumps=frozenset({("filter", "-A INPUT -j KUBE-FIREWALL")}),
        canaries=frozenset({"mangle"}),
        rules={"filter": 1, "nat": 0},
    )


def test_large_clusters_leave_comments_out() -> None:
    """Above 1000 endpoints, rules to and in endpoint chains have no comment; other rules keep theirs."""
    many = [
        endpoint_slice("svc1", *(endpoint(f"10.180.{n // 250}.{n % 250}") for n in range(count)))
        for count in (1000, 1001)
    ]
    small, large = (render_full(state_of(SVC[:1], [obj]), settings_of()).text for obj in many)
    assert "ns/svc1:p80 -> 10.180.0.1:80" in small and "-m comment --comment ns/svc1:p80 -s 10.180.0.1" in small
    assert " -> " not in large
    assert "--comment ns/svc1:p80 -s" not in large
    assert "ns/svc1:p80 cluster IP" in large


def test_settings_of_the_kernel_are_left_alone_when_not_needed() -> None:
    """The INVALID drop goes with conntrack.tcpBeLiberal, and the mark follows masqueradeBit."""
    text = render_full(
        state_of(SVC, SLICES), settings_of({"conntrack": {"tcpBeLiberal": True}, "iptables": {"masqueradeBit": 5}})
    ).text
    assert "INVALID" not in text
    assert "--or-mark 0x00000020" in text and "0x00004000" not in text


def test_node_cidr_detector_uses_the_nodes_own_range() -> None:
    """NodeCIDR tells pods by the Node's podCIDR."""
    text = render_full(
        state_of(SVC, SLICES), settings_of({"detectLocalMode": "NodeCIDR"}, parse_node(node_object()))
    ).text
    assert "! -s 10.0.1.0/24 -j KUBE-MARK-MASQ" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            lambda i: {"canaries": frozenset({"nat", "filter"})}, "the canary chain is gone from mangle", id="canary"
        ),
        pytest.param(lambda i: {"jumps": frozenset(list(i.jumps)[1:])}, "a jump is gone from", id="jump"),
        pytest.param(lambda i: {"chains": frozenset()}, "chains are gone, for example KUBE-EXT-", id="chains"),
        pytest.param(
            lambda i: {"rules": {**i.rules, "nat": 1}}, "nat has 1 rules in our chains instead of", id="rules"
        ),
        pytest.param(lambda i: {}, "", id="intact"),
    ],
)
def test_damage_is_found(change: Any, words: str) -> None:
    """What somebody else took away is named."""
    payload = render_full(state_of(SVC, SLICES), settings_of())
    fields = {
        "chains": payload.chains,
        "jumps": frozenset((jump.table, jump.saved) for jump in JUMPS),
        "canaries": frozenset({"mangle", "nat", "filter"}),
        "rules": dict(payload.rules),
    }
    found = missing_parts(Installed(**{**fields, **change(Installed(**fields))}), payload)
    assert words in found and bool(found) == bool(words)


UDP = service("dns", "172.30.0.10", protocol="UDP", node_port=30053, externalIPs=["192.168.99.1"])
UDP_PORT = ServicePortName("ns", "dns", "p80", "UDP")


def dns(*endpoints: Any) -> Any:
    return state_of([UDP], [endpoint_slice("dns", *endpoints, protocol="UDP")])


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        pytest.param(dns(endpoint("10.0.0.1")), state_of([], []), [("172.30.0.10", 0, None)], id="Service deleted"),
        pytest.param(
            dns(endpoint("10.0.0.1", ready=False)),
            dns(endpoint("10.0.0.1")),
            [("172.30.0.10", 0, None), ("192.168.99.1", 0, None), (None, 30053, None)],
            id="first ready endpoint",
        ),
        pytest.param(
            dns(endpoint("10.0.0.1"), endpoint("10.0.0.2")),
            dns(endpoint("10.0.0.2")),
            [("172.30.0.10", 0, "10.0.0.1"), ("192.168.99.1", 0, "10.0.0.1"), (None, 30053, "10.0.0.1")],
            id="endpoint removed",
        ),
        pytest.param(
            dns(endpoint("10.0.0.1")), dns(endpoint("10.0.0.1"), endpoint("10.0.0.2")), [], id="endpoint added"
        ),
    ],
)
def test_stale_udp_flows(before: Any, after: Any, wanted: list[tuple[str | None, int, str | None]]) -> None:
    """Flows that nat would go on sending to the wrong place are named; TCP's are left alone."""
    flows = [StaleFlows(parse_address(d), p, parse_address(e)) for d, p, e in wanted]
    assert list(stale_udp_flows(before, after, [UDP_PORT])) == flows
    assert stale_udp_flows(state_of(SVC, SLICES), state_of([], []), [SVC1]) == ()


def test_health_checks_count_ready_addresses_here() -> None:
    """A health check counts local ready addresses once; terminating ones do not count although they serve."""
    obj = service("web", "172.30.0.50", ingress=["1.2.3.4"], externalTrafficPolicy="Local", healthCheckNodePort=31000)
    ending = endpoint("10.180.0.3", ready=False, serving=True, terminating=True)
    slices = [
        endpoint_slice("web", endpoint("10.180.0.1"), endpoint("10.180.0.2"), endpoint("10.180.1.1", "node2"), ending)
    ]
    [check] = health_checks(state_of([obj, *SVC], [*slices, *SLICES]))
    assert (check.namespace, check.name, check.port, check.local_endpoints) == ("ns", "web", 31000, 2)
    status, body = render_health_check(check, proxy_healthy=True)
    assert status == 200
    assert body == (
        '{\n\t"service": {\n\t\t"namespace": "ns",\n\t\t"name": "web"\n\t},\n'
        '\t"localEndpoints": 2,\n\t"serviceProxyHealthy": true\n}'
    )
    assert render_health_check(check, proxy_healthy=False)[0] == 503
