"""The rules of userspace mode, to the letter, and what is done about what is there."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from proxy_support import endpoint, endpoint_slice, node_object, service, state_of

from testbed.dataplane.state import ProxyState
from testbed.dataplane.trace import Node, Packet, Verdict, parse_rules
from testbed.dataplane.userspace import (
    HOOKS,
    NOTHING_INSTALLED,
    Installed,
    UserspaceSettings,
    answering_state,
    find_damage,
    make_userspace_settings,
    parse_installed,
    plan_repair,
    render_changes,
    render_cleanup,
    render_node,
    render_rules,
    render_start,
    stand_in_ports,
    trace_userspace,
)
from testbed.model.proxyconfig import parse_proxy_config
from testbed.model.service import parse_node

SETTINGS = UserspaceSettings(IPv4Address("192.168.0.2"), IPv4Address("0.0.0.0"))


def rules_of(obj: dict[str, object], settings: UserspaceSettings = SETTINGS) -> list[str]:
    [port] = state_of([obj], []).services.values()
    return [f"{rule.table} {rule.line}" for rule in render_rules(port, 40001, settings)]


def test_cluster_ip() -> None:
    """REDIRECT for what comes in, DNAT to the node's address for what the node sends."""
    match = '-d 172.30.0.41/32 -p tcp -m comment --comment "ns/svc:p80" -m tcp --dport 80'
    assert rules_of(service("svc", "172.30.0.41")) == [
        f"nat -A KUBE-PORTALS-CONTAINER {match} -j REDIRECT --to-ports 40001",
        f"nat -A KUBE-PORTALS-HOST {match} -j DNAT --to-destination 192.168.0.2:40001",
    ]


def test_external_ip() -> None:
    """The physdev and dst-type pair; a load balancer's IP is treated as a ClusterIP."""
    found = rules_of(service("svc", "172.30.0.41", externalIPs=["192.168.99.11"], ingress=["1.2.3.4"]))
    match = '-d 192.168.99.11/32 -p tcp -m comment --comment "ns/svc:p80" -m tcp --dport 80'
    assert found[2:] == [
        f"nat -A KUBE-PORTALS-CONTAINER {match} -m physdev ! --physdev-is-in -j REDIRECT --to-ports 40001",
        f"nat -A KUBE-PORTALS-CONTAINER {match} -m addrtype --dst-type LOCAL -j REDIRECT --to-ports 40001",
        f"nat -A KUBE-PORTALS-HOST {match} -m addrtype --dst-type LOCAL -j DNAT --to-destination 192.168.0.2:40001",
        *(rule.replace("172.30.0.41", "1.2.3.4") for rule in found[:2]),
    ]


def test_node_port() -> None:
    """A rule in each NodePort chain, and one that lets the proxy port through a firewall."""
    assert rules_of(service("svc", "172.30.0.41", node_port=30080, protocol="UDP"))[2:] == [
        'nat -A KUBE-NODEPORT-CONTAINER -p udp -m comment --comment "ns/svc:p80" -m udp --dport 30080 '
        "-j REDIRECT --to-ports 40001",
        'nat -A KUBE-NODEPORT-HOST -p udp -m comment --comment "ns/svc:p80" -m udp --dport 30080 '
        "-j DNAT --to-destination 192.168.0.2:40001",
        'filter -A KUBE-NODEPORT-NON-LOCAL -p udp -m comment --comment "ns/svc:p80" -m udp --dport 40001 '
        "-m state --state NEW -j ACCEPT",
    ]


def test_bind_address() -> None:
    """Where proxy ports listen on one address only, all rules lead there."""
    config, _ = parse_proxy_config({"mode": "userspace", "bindAddress": "192.168.0.9"})
    found = rules_of(
        service("svc", "172.30.0.41", node_port=30080), make_userspace_settings(config, parse_node(node_object()))
    )
    assert [rule.rpartition(" -j ")[2] for rule in found[:4]] == ["DNAT --to-destination 192.168.0.9:40001"] * 4


def test_start() -> None:
    """Chains are made or emptied; portal jumps go on top, NodePort jumps to the end; those that are there stay."""
    lines = render_start(NOTHING_INSTALLED).splitlines()
    assert lines[:5] == [
        "*filter", ":KUBE-NODEPORT-NON-LOCAL - [0:0]",
        '-I INPUT -m comment --comment "Ensure that non-local NodePort traffic can flow" -j KUBE-NODEPORT-NON-LOCAL',
        "COMMIT", "*nat",
    ]  # fmt: skip
    portal = '-m comment --comment "handle ClusterIPs; NOTE: this must be before the NodePort rules" -j KUBE-PORTALS-'
    node_port = (
        "-m addrtype --dst-type LOCAL -m comment --comment "
        '"handle service NodePorts; NOTE: this must be the last rule in the chain" -j KUBE-NODEPORT-'
    )
    assert lines[9:13] == [
        f"-I PREROUTING {portal}CONTAINER", f"-I OUTPUT {portal}HOST",
        f"-A PREROUTING {node_port}CONTAINER", f"-A OUTPUT {node_port}HOST",
    ]  # fmt: skip
    there = Installed(hooks=frozenset((hook.table, f"-A {hook.chain} {hook.rule}") for hook in HOOKS))
    assert "-I" not in render_start(there) and "-A" not in render_start(there)


def saved(state: ProxyState) -> str:
    """Return a node's rules as iptables-save prints them."""
    lines = []
    for line in render_node(state, SETTINGS, stand_in_ports(state, 40001)).splitlines():
        if line.startswith("*"):
            builtin = {"*filter": ("INPUT", "FORWARD", "OUTPUT"), "*nat": ("PREROUTING", "OUTPUT")}[line]
            lines += [line, *(f":{chain} ACCEPT [5:6]" for chain in builtin)]
        else:
            lines.append(line.replace("-I ", "-A ", 1) if line.startswith("-I ") else line)
    return "\n".join(lines) + "\n"


STATE = state_of([service("svc", "172.30.0.41", node_port=30080), service("other", "172.30.0.42")], [])
WANTED = [
    rule
    for name, port in stand_in_ports(STATE, 40001).items()
    for rule in render_rules(STATE.services[name], port, SETTINGS)
]


def test_what_is_right_is_left_alone() -> None:
    """Rules that are there as wanted are neither damage nor repaired."""
    installed = parse_installed(saved(STATE))
    assert find_damage(WANTED, installed) == ""
    assert plan_repair(WANTED, installed) == ([], [])
    assert render_changes(*plan_repair(WANTED, installed)) == ""


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("-j REDIRECT --to-ports 40001", "a rule of nat is gone: -A KUBE-PORTALS-CONTAINER -d 172.30.0.42/32"),
        ("-j KUBE-PORTALS-HOST", "a jump is gone from nat: -A OUTPUT"),
        (":KUBE-NODEPORT-HOST", "the chain KUBE-NODEPORT-HOST is gone"),
    ],
)
def test_damage_is_named(lost: str, words: str) -> None:
    """A rule, a jump or a chain that somebody took away."""
    text = "".join(line + "\n" for line in saved(STATE).splitlines() if lost not in line)
    assert find_damage(WANTED, parse_installed(text)).startswith(words)


def test_foreign_rules_in_our_chains_go() -> None:
    """What leads to another port is deleted by its text; what is missing is appended."""
    text = saved(STATE).replace("--to-ports 40001", "--to-ports 39999")
    installed = parse_installed(text)
    assert "is not ours" in find_damage([], installed) and "39999" not in str(WANTED)
    remove, add = plan_repair(WANTED, installed)
    assert [(rule.line[-5:]) for rule in remove] == ["39999"] and [rule.line[-5:] for rule in add] == ["40001"]
    assert render_changes(remove, add).splitlines() == ["*nat", f"-D{remove[0].line[2:]}", add[0].line, "COMMIT"]


def test_cleanup() -> None:
    """Jumps are deleted, then chains are emptied and deleted; where there is nothing, nothing is done."""
    lines = render_cleanup(parse_installed(saved(STATE))).splitlines()
    assert [line for line in lines if line.startswith("-X")] == [
        "-X KUBE-NODEPORT-NON-LOCAL", "-X KUBE-PORTALS-CONTAINER", "-X KUBE-PORTALS-HOST", "-X KUBE-NODEPORT-CONTAINER",
        "-X KUBE-NODEPORT-HOST",
    ]  # fmt: skip
    assert sum(line.startswith("-D") for line in lines) == len(HOOKS)
    assert render_cleanup(NOTHING_INSTALLED) == ""


def test_sctp_has_no_port() -> None:
    """Userspace mode copies TCP and UDP."""
    assert stand_in_ports(state_of([service("phone", "172.30.0.9", protocol="SCTP")], [])) == {}


NODE = Node.of("192.168.0.2", "127.0.0.1")
EXTERNAL = state_of(
    [service("svc", "172.30.0.41", node_port=30080, externalIPs=["192.168.99.11", "192.168.0.2"], ingress=["1.2.3.4"])],
    [endpoint_slice("svc", endpoint("10.180.0.1"), endpoint("10.180.1.1", "node2"))],
)


@pytest.mark.parametrize(
    ("packet", "reaches"),
    [
        pytest.param(Packet("10.180.2.1", "172.30.0.41", 80), True, id="pod to ClusterIP"),
        pytest.param(Packet("192.168.0.2", "172.30.0.41", 80), True, id="node to ClusterIP"),
        pytest.param(Packet("203.0.113.2", "172.30.0.41", 80), True, id="outside to ClusterIP"),
        pytest.param(Packet("203.0.113.2", "172.30.0.41", 81), False, id="another port"),
        pytest.param(Packet("203.0.113.2", "172.30.0.41", 80, "udp"), False, id="another protocol"),
        pytest.param(Packet("203.0.113.2", "192.168.0.2", 30080), True, id="outside to NodePort"),
        pytest.param(Packet("192.168.0.2", "127.0.0.1", 30080), True, id="node to NodePort on the loopback"),
        pytest.param(Packet("10.180.2.1", "192.168.0.2", 30080, is_bridged=True), True, id="pod to NodePort"),
        pytest.param(Packet("203.0.113.2", "1.2.3.4", 80), True, id="outside to load balancer"),
        pytest.param(Packet("203.0.113.2", "192.168.99.11", 80), True, id="outside to external IP"),
        pytest.param(Packet("10.180.2.1", "192.168.99.11", 80, is_bridged=True), False, id="bridged pod to external IP"),
        pytest.param(Packet("192.168.0.2", "192.168.99.11", 80), False, id="node to external IP"),
        pytest.param(Packet("10.180.2.1", "192.168.0.2", 80, is_bridged=True), True, id="pod to the node's external IP"),
        pytest.param(Packet("192.168.0.2", "192.168.0.2", 80), True, id="node to its own external IP"),
    ],
)  # fmt: skip
def test_where_packets_go(packet: Packet, reaches: bool) -> None:
    """To both endpoints, their client hidden, or past kube-proxy."""
    ports = stand_in_ports(EXTERNAL, 40001)
    rules = parse_rules(render_node(EXTERNAL, SETTINGS, ports))
    fate = trace_userspace(rules, packet, NODE, EXTERNAL, {int(port): name for name, port in ports.items()})
    assert fate.endpoints == (("10.180.0.1:80", "10.180.1.1:80") if reaches else ())
    assert fate.masquerade is reaches
    assert (fate.verdict is Verdict.ENDPOINT) is reaches


def test_nobody_is_no_refusal() -> None:
    """Without endpoints the connection is accepted and closed."""
    state = state_of([service("svc", "172.30.0.41")], [])
    ports = stand_in_ports(state, 40001)
    rules = parse_rules(render_node(state, SETTINGS, ports))
    packet = Packet("203.0.113.2", "172.30.0.41", 80)
    fate = trace_userspace(rules, packet, NODE, state, {int(p): n for n, p in ports.items()})
    assert (fate.verdict, fate.endpoints) == (Verdict.CLOSED, ())


def test_udp_flows_answered_by_a_proxy_port_are_right() -> None:
    """For connection tracking the node's own addresses answer, at the proxy port."""
    state = state_of([service("dns", "172.30.0.10", protocol="UDP"), service("web", "172.30.0.11")], [])
    ports = {name: 40000 + n for n, name in enumerate(sorted(state.services))}
    found = answering_state(state, ports, [IPv4Address("192.168.0.2"), IPv4Address("10.244.1.1")])
    assert {str(name): [e.text for e in es] for name, es in found.endpoints.items()} == {
        "ns/dns:p80": ["192.168.0.2:40000", "10.244.1.1:40000"]
    }
