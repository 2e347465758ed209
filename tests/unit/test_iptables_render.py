"""The text that iptables mode writes: names, order, what a partial sync leaves out, stale chains."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxy_support import NODE, FakeIptables, endpoint, endpoint_slice, node_object, service, settings_of, state_of

from testbed.dataplane import chains
from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.flows import UdpFlow, stale_udp_flows
from testbed.dataplane.health import health_checks, render_health_check
from testbed.dataplane.iptables import (
    JUMPS,
    Installed,
    IptablesRenderer,
    parse_installed,
    render_full,
    saved_form,
    split_evenly,
)
from testbed.model.service import ServicePortName, parse_node, parse_service

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


def tracked(services: list[Any], slices: list[Any]) -> tuple[ChangeTracker, IptablesRenderer]:
    """Return a tracker of these objects, and a renderer that has put their rules in place."""
    tracker, renderer = ChangeTracker(NODE), IptablesRenderer(settings_of())
    tracker.replace_services(services)
    tracker.replace_slices(slices)
    renderer.update(tracker.take()[0])
    renderer.accept(renderer.full(Installed()))
    return tracker, renderer


def test_partial_payload_has_what_changed_and_nothing_else() -> None:
    """A new endpoint declares and writes the chains it changes; dispatch and other service ports are not mentioned."""
    tracker, renderer = tracked(SVC, SLICES)
    tracker.set_slice(endpoint_slice("svc1", endpoint("10.180.0.1"), endpoint("10.180.1.9", "node2")))
    renderer.update(*tracker.take())
    suffix = chains.service_suffix(SVC1)
    old, new = (chains.endpoint_chain(SVC1, f"10.180.1.{n}:80") for n in (1, 9))
    lines = renderer.partial().text.splitlines()
    assert [line for line in lines if not line.startswith("-A")] == [
        "*nat", f":KUBE-SVC-{suffix} - [0:0]", f":{new} - [0:0]", f":{old} - [0:0]", f"-X {old}", "COMMIT",
    ]  # fmt: skip
    assert {line.split()[1] for line in lines if line.startswith("-A")} == {f"KUBE-SVC-{suffix}", new}


def test_a_new_service_is_put_on_top_and_an_old_one_taken_out() -> None:
    """Of the shared chains, only the lines that come and go are written."""
    tracker, renderer = tracked(SVC[:2], SLICES[:2])
    tracker.delete_service("ns", "svc1")
    tracker.set_service(SVC[2])
    renderer.update(*tracker.take())
    lines = renderer.partial().text.splitlines()
    changes = [line for line in lines if line.startswith(("-I", "-D"))]
    assert [line.split(" -m ")[0] for line in changes] == [
        "-I KUBE-SERVICES", "-I KUBE-EXTERNAL-SERVICES",  # svc3 has no endpoints
        "-D KUBE-SERVICES", "-D KUBE-NODEPORTS",
    ]  # fmt: skip
    assert all("svc1" in line for line in changes if line.startswith("-D"))
    assert all("svc3" in line for line in changes if line.startswith("-I"))


def test_many_removals_write_the_shared_chain_anew() -> None:
    """iptables looks for each deleted line in the whole chain, so many at once are not deleted one by one."""
    many = [service(f"s{n}", f"172.30.1.{n}") for n in range(1, 41)]
    tracker, renderer = tracked(many, [])
    for obj in many[:30]:
        tracker.delete_service("ns", obj["metadata"]["name"])
    renderer.update(*tracker.take())
    lines = renderer.partial().text.splitlines()
    assert not [line for line in lines if line.startswith("-D")]
    assert ":KUBE-SERVICES - [0:0]" in lines
    assert sum("has no endpoints" in line for line in lines) == 10


def test_rules_of_unchanged_service_ports_are_kept() -> None:
    """A change of one Service renders that one again and no other; the same content again changes nothing."""
    tracker, renderer = tracked(SVC, SLICES)
    tracker.set_service(dict(SVC[1]))
    tracker.set_slice(endpoint_slice("svc1", endpoint("10.180.0.77")))
    state, changed = tracker.take()
    assert changed == {SVC1}
    before = dict(renderer._known)
    renderer.update(state, changed)
    assert [name for name in before if renderer._known[name] is not before[name]] == [SVC1]
    renderer.accept(renderer.partial())
    assert renderer.partial().text == ""


def test_unused_chains_may_wait() -> None:
    """In a large cluster chains that are not used any more stay until a later payload deletes them."""
    tracker, renderer = tracked(SVC, SLICES)
    old = chains.endpoint_chain(SVC1, "10.180.0.1:80")
    tracker.set_slice(endpoint_slice("svc1", endpoint("10.180.0.7")))
    renderer.update(*tracker.take())
    payload = renderer.partial(clean_stale=False)
    assert "-X" not in payload.text
    renderer.accept(payload)
    assert f"-X {old}" in renderer.partial().text


def test_many_service_ports_may_be_written_in_several_transactions() -> None:
    """Each takes the chains of some service ports; jumps and dispatch come in the last; the rules are the same."""
    renderer = IptablesRenderer(settings_of())
    renderer.update(state_of(SVC, SLICES))
    whole, parts = renderer.full(Installed()).text, renderer.full(Installed(), per_transaction=1).text
    blocks = parts.split("COMMIT\n")[:-1]
    assert [block.split("\n", 1)[0] for block in blocks] == ["*mangle", "*nat", "*nat", "*nat", "*filter", "*nat"]
    assert "-I PREROUTING" in blocks[-1] and "-A KUBE-SERVICES" in blocks[-1]
    assert ":KUBE-MARK-MASQ" in blocks[1]

    def rules(text: str) -> list[str]:
        return sorted(line for line in text.splitlines() if line.startswith("-"))

    assert rules(whole) == rules(parts)


@pytest.mark.parametrize(
    ("written", "saved"),
    [
        ("-A C -s 0.0.0.0/0 -j T", "-A C -j T"),
        ("-A C -m comment --comment plain -j T", "-A C -m comment --comment plain -j T"),
        ("-A C -m comment --comment ns/x:p -s 10.0.0.1 -j T", '-A C -s 10.0.0.1/32 -m comment --comment "ns/x:p" -j T'),
        ("-A C ! -i veth+ -j T", "-A C ! -i veth+ -j T"),
        ("-A C -m mark ! --mark 0x00004000/0x00004000 -j RETURN", "-A C -m mark ! --mark 0x4000/0x4000 -j RETURN"),
    ],
)
def test_saved_form(written: str, saved: str) -> None:
    """What golden cases do not hold: rules as iptables-save prints them."""
    assert saved_form(written) == saved


def test_stale_chains_are_emptied_then_deleted() -> None:
    """A chain of ours that nothing uses is declared, and deleted at the end of the nat section, after its users changed."""
    stale = "KUBE-SVC-AAAAAAAAAAAAAAAA"
    payload = render_full(state_of(SVC, SLICES), settings_of(), Installed(chains={("nat", stale): ()}))
    lines = payload.text.splitlines()
    assert lines[-2:] == [f"-X {stale}", "COMMIT"]
    assert f":{stale} - [0:0]" in lines[lines.index("*nat") :]
    assert f"-A {stale}" not in payload.text


def test_chains_without_use_are_read_from_a_dump() -> None:
    """Of a dump, only our chains, our canaries and our jumps matter."""
    installed = parse_installed(
        "*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n"
        "*filter\n:INPUT ACCEPT [5:300]\n:KUBE-SVC-IN-FILTER - [0:0]\n:KUBE-FORWARD - [0:0]\n-A INPUT -j KUBE-FIREWALL\n"
        "-A INPUT -j SOMEONE\n-A KUBE-FORWARD -j DROP\nCOMMIT\n"
        "*nat\n:KUBE-SVC-X - [0:0]\n:KUBE-SERVICES - [0:0]\n:DOCKER - [0:0]\nCOMMIT\n"
    )
    assert installed == Installed(
        chains={
            ("filter", "KUBE-FORWARD"): ("-A KUBE-FORWARD -j DROP",),
            ("nat", "KUBE-SVC-X"): (),
            ("nat", "KUBE-SERVICES"): (),
        },
        jumps=frozenset({("filter", "-A INPUT -j KUBE-FIREWALL")}),
        canaries=frozenset({"mangle"}),
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


PLACE = ("nat", f"KUBE-SVC-{chains.service_suffix(SVC1)}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            lambda i: {"canaries": frozenset({"nat", "filter"})}, "the canary chain is gone from mangle", id="canary"
        ),
        pytest.param(lambda i: {"jumps": frozenset(list(i.jumps)[1:])}, "a jump is gone from", id="jump"),
        pytest.param(lambda i: {"chains": {}}, "22 chains are gone, for example KUBE-EXT-", id="chains"),
        pytest.param(
            lambda i: {"chains": {**i.chains, PLACE: ()}}, f"{PLACE[1]} of nat has 0 rules instead of 3", id="rules"
        ),
        pytest.param(
            lambda i: {"chains": {**i.chains, PLACE: i.chains[PLACE][::-1]}}, f"{PLACE[1]} of nat has other rules", id="order"
        ),
        pytest.param(lambda i: {}, "", id="intact"),
    ],
)  # fmt: skip
def test_damage_is_found(change: Any, words: str) -> None:
    """What somebody else took away or changed is named."""
    renderer = tracked(SVC, SLICES)[1]
    tables = FakeIptables()
    tables.run(["iptables-legacy-restore", "--noflush"], stdin=render_full(state_of(SVC, SLICES), settings_of()).text)
    installed = parse_installed(tables.run(["iptables-legacy-save"]))
    assert renderer.find_damage(installed) == ""
    found = renderer.find_damage(replace(installed, **change(installed)))
    assert words in found and bool(found) == bool(words)


def test_another_spelling_is_learned() -> None:
    """Where tools print our rules in another way, that is damage once, and never again after it was repaired."""
    renderer = tracked(SVC, SLICES)[1]
    tables = FakeIptables()
    tables.run(["iptables-legacy-restore", "--noflush"], stdin=render_full(state_of(SVC, SLICES), settings_of()).text)
    installed = parse_installed(tables.run(["iptables-legacy-save"]).replace(" --random-fully", " --random-whole"))
    assert renderer.find_damage(installed) == "KUBE-POSTROUTING of nat has other rules"
    renderer.learn_spelling(installed)
    assert renderer.find_damage(installed) == ""


UDP = service("dns", "172.30.0.10", protocol="UDP", port=53, node_port=30053, externalIPs=["192.168.99.1"])


def udp_flow(destination: str, answered_by: str) -> UdpFlow:
    ends = [end.split(":") for end in ("10.9.9.9:5000", destination, answered_by)]
    (a, b), (c, d), (e, f) = ((IPv4Address(address), int(port)) for address, port in ends)
    return UdpFlow(a, b, c, d, e, f)


@pytest.mark.parametrize(
    ("destination", "answered_by", "is_stale"),
    [
        pytest.param("172.30.0.10:53", "10.0.0.1:53", False, id="a serving endpoint"),
        pytest.param("172.30.0.10:53", "10.0.0.2:53", False, id="one that serves while it terminates"),
        pytest.param("172.30.0.10:53", "10.0.0.3:53", True, id="one that is gone"),
        pytest.param("172.30.0.10:53", "10.0.0.1:54", True, id="another port of an endpoint"),
        pytest.param("172.30.0.10:53", "172.30.0.10:53", True, id="sent before there was an endpoint"),
        pytest.param("172.30.0.10:54", "172.30.0.10:54", False, id="no port of the Service"),
        pytest.param("192.168.99.1:53", "10.0.0.3:53", True, id="by the external IP"),
        pytest.param("192.168.0.2:30053", "10.0.0.3:53", True, id="by the NodePort"),
        pytest.param("127.0.0.1:30053", "10.0.0.3:53", True, id="by the NodePort on the loopback"),
        pytest.param("8.8.8.8:30053", "8.8.8.8:30053", False, id="somebody else's port of that number"),
        pytest.param("172.30.0.11:53", "10.0.0.1:53", True, id="a deleted Service"),
        pytest.param("172.30.0.41:80", "1.1.1.1:80", False, id="a TCP Service's address"),
    ],
)
def test_stale_udp_flows(destination: str, answered_by: str, is_stale: bool) -> None:
    """Flows to a UDP service port that nat would go on sending to the wrong place are named; no others."""
    ending = endpoint("10.0.0.2", ready=False, serving=True, terminating=True)
    slices = [endpoint_slice("dns", endpoint("10.0.0.1"), ending, protocol="UDP", port=53)]
    state = state_of([UDP, *SVC], [*slices, *SLICES])
    [deleted] = parse_service(service("old", "172.30.0.11", protocol="UDP", port=53))
    one = udp_flow(destination, answered_by)
    found = stale_udp_flows([one], state, [deleted], [IPv4Address("192.168.0.2")])
    assert found == ([one] if is_stale else [])


def test_an_address_that_changed_hands_is_not_stale() -> None:
    """A Service that got the address of a deleted one decides."""
    state = state_of([UDP], [endpoint_slice("dns", endpoint("10.0.0.1"), protocol="UDP", port=53)])
    [deleted] = parse_service(service("old", "172.30.0.10", protocol="UDP", port=53))
    assert stale_udp_flows([udp_flow("172.30.0.10:53", "10.0.0.1:53")], state, [deleted]) == []


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
