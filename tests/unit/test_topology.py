"""Topology files: what they become, and every rule that refuses one, with its whole text."""

# ruff: noqa: E501  # whole messages, in tables

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import jsonschema
import pytest

from testbed.dataplane.outside_dns import render_outside_dnsmasq, render_outside_hosts
from testbed.errors import ManifestError
from testbed.manifests import find_topology, load_topology, topology_schema
from testbed.manifests.source import parse_documents
from testbed.model.cluster import ClusterConfig
from testbed.model.topology import HostSpec, LinkSpec, Network, NodeSpec, Taint

FILES = Path(__file__).parent / "files"
REPOSITORY = Path(__file__).parents[2]

# Every line has a number that the table below relies on.
GOOD = """\
apiVersion: testbed/v1
kind: Topology
metadata: {name: t}
spec:
  networks:
    - {name: lan, cidr: 192.168.93.0/24, gateway: 192.168.93.1}
    - {name: office, cidr: 172.20.0.0/24}
  nodes:
    - {name: node1, network: lan, address: 192.168.93.11, podCIDR: 10.244.1.0/24, labels: {}, taints: []}
    - {name: node2, network: lan, address: 192.168.93.12}
  hosts:
    - {name: client, network: office, address: 172.20.0.100}
  links: [{between: [node1, lan], rate: 1gbit, delay: 10ms, loss: 1%}]
  cluster: {podCIDR: 10.244.0.0/16, serviceCIDR: 10.96.0.0/22, nodePortRange: 30000-32767, domain: a.b, dns: 10.96.0.10}
  kubeProxy: {mode: ipvs, ipvs: {strictARP: true, minSyncPeriod: 1s}}
"""


def problems_of(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(ManifestError) as caught:
        load_topology(path)
    return [str(problem).removeprefix(f"{tmp_path}/") for problem in caught.value.problems]


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, (old, GOOD.count(old))
    return GOOD.replace(old, new)


def test_a_full_file_becomes_a_topology(tmp_path: Path) -> None:
    """Every field reaches the model, with defaults where the file says nothing."""
    path = tmp_path / "t.yaml"
    path.write_text(
        changed(
            "labels: {}, taints: []",
            "labels: {a: b}, taints: [{key: k, effect: NoExecute}], maxPods: 9, interface: eth33",
        )
    )
    topology = load_topology(path)
    assert topology.name == "t"
    assert topology.networks == (
        Network(name="lan", cidr=IPv4Network("192.168.93.0/24"), gateway=IPv4Address("192.168.93.1")),
        Network(name="office", cidr=IPv4Network("172.20.0.0/24"), gateway=IPv4Address("172.20.0.1")),
    )
    assert topology.nodes == (
        NodeSpec(
            name="node1",
            network="lan",
            address=IPv4Address("192.168.93.11"),
            interface="eth33",
            pod_cidr=IPv4Network("10.244.1.0/24"),
            max_pods=9,
            labels={"a": "b"},
            taints=(Taint(key="k", value="", effect="NoExecute"),),
        ),
        NodeSpec(
            name="node2",
            network="lan",
            address=IPv4Address("192.168.93.12"),
            pod_cidr=IPv4Network("10.244.0.0/24"),
            max_pods=110,
        ),
    )
    client = HostSpec(
        name="client", network="office", address=IPv4Address("172.20.0.100"), gateway=IPv4Address("172.20.0.1")
    )
    assert topology.hosts == (client,)
    assert topology.links == (LinkSpec(between=("node1", "lan"), rate_mbit=1000.0, delay_ms=10.0, loss_percent=1.0),)
    assert topology.cluster == ClusterConfig(
        node_monitor_grace_s=40.0,
        pod_cidr=IPv4Network("10.244.0.0/16"),
        service_cidr=IPv4Network("10.96.0.0/22"),
        node_port_range=(30000, 32767),
        domain="a.b",
        dns=IPv4Address("10.96.0.10"),
    )
    assert topology.kube_proxy == {"mode": "ipvs", "ipvs": {"strictARP": True, "minSyncPeriod": "1s"}}
    assert topology.proxy_mode == "ipvs"
    assert topology.machine("client") is topology.hosts[0]


def test_cluster_defaults_are_those_of_kubernetes(tmp_path: Path) -> None:
    """Without `cluster` the ranges are kubeadm's; nodes get /24s in order, passing over those taken."""
    text = "".join(
        line for line in GOOD.splitlines(keepends=True) if "cluster:" not in line and "kubeProxy" not in line
    )
    path = tmp_path / "t.yaml"
    path.write_text(text.replace("podCIDR: 10.244.1.0/24", "podCIDR: 10.244.0.0/23"))
    topology = load_topology(path)
    assert topology.cluster == ClusterConfig(node_monitor_grace_s=40.0)
    assert str(topology.cluster.service_cidr) == "10.96.0.0/12"
    assert str(topology.cluster.dns) == "10.96.0.10"
    assert [str(node.pod_cidr) for node in topology.nodes] == ["10.244.0.0/23", "10.244.2.0/24"]
    assert topology.proxy_mode == "iptables"


def test_a_link_that_neither_delays_nor_loses_asks_for_nothing(tmp_path: Path) -> None:
    """0ms and 0% need no kernel feature, so they are the same as leaving them out; either end may come first."""
    path = tmp_path / "t.yaml"
    path.write_text(changed("[node1, lan], rate: 1gbit, delay: 10ms, loss: 1%", "[lan, node1], delay: 0ms, loss: 0%"))
    assert load_topology(path).links == (LinkSpec(between=("node1", "lan")),)


NODE1 = "address: 192.168.93.11,"
PODS = "podCIDR: 10.244.1.0/24"
DNS = "dns: 10.96.0.10"
NAME_RULE = "is not a valid name: lower case letters, digits, '-' and '.', with a letter or digit at both ends"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param(NODE1, "adress: 192.168.93.11,", [
            't.yaml:9: spec.nodes[0]: required field "address" is missing',
            't.yaml:9: spec.nodes[0]: unknown field "adress" (did you mean "address"?)',
        ], id="misspelt field"),
        pytest.param(NODE1, "address: 5,", [
            "t.yaml:9: spec.nodes[0].address: wants an IPv4 address, got the number 5"], id="wrong type"),
        pytest.param("labels: {}", "labels: [a]", [
            "t.yaml:9: spec.nodes[0].labels: wants a mapping, got a list"], id="wrong type: list for mapping"),
        pytest.param("labels: {}", "labels: {a: 1}", [
            "t.yaml:9: spec.nodes[0].labels.a: wants a label value (text), got the number 1"], id="label that is a number"),
        pytest.param("labels: {}", "labels: {a b: x y}", [
            "t.yaml:9: spec.nodes[0].labels[a b]: 'a b' is not a valid label key, such as 'app' or 'example.com/role'",
            "t.yaml:9: spec.nodes[0].labels[a b]: 'x y' is not a valid label value: at most 63 letters, digits, '-', '_' and '.', "
            "with a letter or digit at both ends"], id="label syntax"),
        pytest.param("taints: []", "taints: [{key: a, effect: noschedule}]", [
            "t.yaml:9: spec.nodes[0].taints[0].effect: 'noschedule' is not one of NoExecute, NoSchedule, PreferNoSchedule "
            '(did you mean "NoSchedule"?)'], id="taint effect"),
        pytest.param(NODE1, "address: 192.168.94.11,", [
            "t.yaml:9: spec.nodes[0].address: 192.168.94.11 is outside network lan (192.168.93.0/24)"], id="address outside"),
        pytest.param(NODE1, "address: 192.168.93.0,", [
            "t.yaml:9: spec.nodes[0].address: 192.168.93.0 is the network address of network lan (192.168.93.0/24)"],
            id="network address"),
        pytest.param(NODE1, "address: 192.168.93.255,", [
            "t.yaml:9: spec.nodes[0].address: 192.168.93.255 is the broadcast address of network lan (192.168.93.0/24)"],
            id="broadcast address"),
        pytest.param(NODE1, "address: 192.168.93.1,", [
            "t.yaml:9: spec.nodes[0].address: 192.168.93.1 is the gateway of network lan"], id="gateway's address"),
        pytest.param(NODE1, "address: 192.168.93.12,", [
            "t.yaml:10: spec.nodes[1].address: 192.168.93.12 is already on node node1 (line 9)"], id="duplicate address"),
        pytest.param(NODE1, "address: 'fd00::1',", [
            "t.yaml:9: spec.nodes[0].address: 'fd00::1' is an IPv6 address: IPv4 only so far"], id="IPv6 address"),
        pytest.param("cidr: 172.20.0.0/24", "cidr: 'fd00::/64'", [
            "t.yaml:7: spec.networks[1].cidr: 'fd00::/64' is an IPv6 network: IPv4 only so far"], id="IPv6 network"),
        pytest.param("cidr: 172.20.0.0/24", "cidr: 172.20.0.9/24", [
            "t.yaml:7: spec.networks[1].cidr: '172.20.0.9/24' has bits set beyond its prefix length "
            "(did you mean 172.20.0.0/24?)"], id="bits beyond the prefix"),
        pytest.param("cidr: 172.20.0.0/24", "cidr: 172.20.0.0", [
            "t.yaml:7: spec.networks[1].cidr: '172.20.0.0' has no prefix length, such as /24"], id="no prefix length"),
        pytest.param("cidr: 172.20.0.0/24", "cidr: 127.20.0.0/24", [
            "t.yaml:7: spec.networks[1].cidr: 127.20.0.0/24 overlaps 127.0.0.0/8, which is loopback",
            "t.yaml:12: spec.hosts[0].address: 172.20.0.100 is outside network office (127.20.0.0/24)"], id="loopback"),
        pytest.param("gateway: 192.168.93.1}", "gateway: 192.168.9.1}", [
            "t.yaml:6: spec.networks[0].gateway: 192.168.9.1 is outside network lan (192.168.93.0/24)"], id="gateway outside"),
        pytest.param("name: node2", "name: node1", [
            "t.yaml:10: spec.nodes[1].name: 'node1' is already the name of the node in line 9"], id="duplicate node"),
        pytest.param("name: client", "name: node2", [
            "t.yaml:12: spec.hosts[0].name: 'node2' is already the name of the node in line 10"], id="host named as a node"),
        pytest.param("name: client", "name: lan", [
            "t.yaml:12: spec.hosts[0].name: 'lan' is already the name of the network in line 6"], id="host named as a network"),
        pytest.param("name: client", "name: br-lan", [
            "t.yaml:12: spec.hosts[0].name: 'br-lan' is already the name of the bridge of the network in line 6"],
            id="host named as a bridge"),
        pytest.param("name: client", "name: localhost", [
            "t.yaml:12: spec.hosts[0].name: 'localhost' already means the loopback address"], id="localhost"),
        pytest.param("network: office", "network: offise", [
            't.yaml:12: spec.hosts[0].network: no network is called \'offise\' (did you mean "office"?)'], id="unknown network"),
        pytest.param("labels: {}", "interface: enp0s31f6vlan100", [
            "t.yaml:9: spec.nodes[0].interface: 'enp0s31f6vlan100' is longer than 15 characters, the kernel's limit for "
            "interface names"], id="long interface"),
        pytest.param("labels: {}", "interface: 'eth/0'", [
            "t.yaml:9: spec.nodes[0].interface: 'eth/0' is not a valid interface name: letters, digits, '_', '.' and '-', not "
            "starting with a sign"], id="odd interface"),
        pytest.param("labels: {}", "interface: cni0", [
            "t.yaml:9: spec.nodes[0].interface: 'cni0' is a name that nodes use for something else"], id="reserved interface"),
        pytest.param("name: office", "name: a-long-network", [
            "t.yaml:7: spec.networks[1].name: 'a-long-network' is longer than 12 characters: its bridge 'br-a-long-network' would "
            "exceed the kernel's 15",
            "t.yaml:12: spec.hosts[0].network: no network is called 'office' (there is: lan)"], id="long network name"),
        pytest.param("cidr: 172.20.0.0/24", "cidr: 192.168.0.0/16", [
            "t.yaml:7: spec.networks[1].cidr: 192.168.0.0/16 overlaps network lan (192.168.93.0/24)",
            "t.yaml:12: spec.hosts[0].address: 172.20.0.100 is outside network office (192.168.0.0/16)"], id="networks overlap"),
        pytest.param("podCIDR: 10.244.0.0/16", "podCIDR: 10.0.0.0/8", [
            "t.yaml:14: spec.cluster.serviceCIDR: 10.96.0.0/22 overlaps podCIDR (10.0.0.0/8)"], id="pods and Services overlap"),
        pytest.param("serviceCIDR: 10.96.0.0/22", "serviceCIDR: 192.168.92.0/22", [
            "t.yaml:14: spec.cluster.dns: 10.96.0.10 is outside serviceCIDR (192.168.92.0/22)",
            "t.yaml:14: spec.cluster.serviceCIDR: 192.168.92.0/22 overlaps network lan (192.168.93.0/24)"],
            id="Services and a network overlap"),
        pytest.param("address: 192.168.93.12}", "address: 192.168.93.12, podCIDR: 10.244.1.128/25}", [
            "t.yaml:10: spec.nodes[1].podCIDR: 10.244.1.128/25 overlaps the podCIDR of node node1 in line 9 (10.244.1.0/24)"],
            id="pod ranges overlap"),
        pytest.param(PODS, "podCIDR: 10.245.1.0/24", [
            "t.yaml:9: spec.nodes[0].podCIDR: 10.245.1.0/24 is outside the cluster's podCIDR (10.244.0.0/16)"],
            id="pod range outside"),
        pytest.param("podCIDR: 10.244.0.0/16", "podCIDR: 10.244.1.0/24", [
            "t.yaml:10: spec.nodes[1]: no /24 is left for its pods in the cluster's podCIDR (10.244.1.0/24)"],
            id="no pod range left"),
        pytest.param(DNS, "dns: 10.97.0.10", [
            "t.yaml:14: spec.cluster.dns: 10.97.0.10 is outside serviceCIDR (10.96.0.0/22)"], id="dns outside"),
        pytest.param(DNS, "dns: 10.96.0.1", [
            "t.yaml:14: spec.cluster.dns: 10.96.0.1 is the address of the Service 'kubernetes'"], id="dns is kubernetes"),
        pytest.param("30000-32767", "32767-30000", [
            "t.yaml:14: spec.cluster.nodePortRange: '32767-30000' ends before it begins (did you mean 30000-32767?)"],
            id="range inverted"),
        pytest.param("30000-32767", "30000:32767", [
            "t.yaml:14: spec.cluster.nodePortRange: '30000:32767' is not a port range such as 30000-32767"], id="range malformed"),
        pytest.param("30000-32767", "30000-70000", [
            "t.yaml:14: spec.cluster.nodePortRange: '30000-70000' is not a port range: ports go from 1 to 65535"],
            id="range too far"),
        pytest.param("[node1, lan]", "[nod1, lan]", [
            't.yaml:13: spec.links[0].between[0]: no node, host or network is called \'nod1\' (did you mean "node1"?)'],
            id="link of nobody"),
        pytest.param("[node1, lan]", "[node1, node2]", [
            "t.yaml:13: spec.links[0].between: wants a node or host and its network, got 'node1' and 'node2'"],
            id="link between nodes"),
        pytest.param("[node1, lan]", "[node1, office]", [
            "t.yaml:13: spec.links[0].between: 'node1' is not on network 'office' but on 'lan'"], id="link to another LAN"),
        pytest.param("[node1, lan]", "[node1]", [
            "t.yaml:13: spec.links[0].between: wants at least 2, got 1"], id="link with one end"),
        pytest.param("rate: 1gbit", "rate: 1gib", [
            "t.yaml:13: spec.links[0].rate: '1gib' is not a rate such as 100mbit or 1gbit"], id="rate"),
        pytest.param("rate: 1gbit", "rate: 0mbit", [
            "t.yaml:13: spec.links[0].rate: '0mbit' lets nothing through: to cut a link, use a fault step"], id="rate of nothing"),
        pytest.param("delay: 10ms", "delay: 10", [
            "t.yaml:13: spec.links[0].delay: wants a delay such as 10ms, got the number 10"], id="delay without unit"),
        pytest.param("loss: 1%", "loss: 101%", [
            "t.yaml:13: spec.links[0].loss: '101%' is more than 100%"], id="loss"),
        pytest.param("mode: ipvs", "mode: ipv", [
            't.yaml:15: spec.kubeProxy.mode: \'ipv\' is not one of iptables, ipvs, nftables, userspace (did you mean "ipvs"?)'],
            id="proxy mode"),
        pytest.param("strictARP", "strictArp", [
            't.yaml:15: spec.kubeProxy.ipvs: unknown field "strictArp" (did you mean "strictARP"?)'], id="kube-proxy field"),
        pytest.param("minSyncPeriod: 1s", "minSyncPeriod: 1", [
            "t.yaml:15: spec.kubeProxy.ipvs.minSyncPeriod: wants a duration such as 30s, got the number 1"], id="kube-proxy type"),
        pytest.param("ipvs: {strictARP: true, minSyncPeriod: 1s}}", "portRange: nine}", [
            "t.yaml:15: spec.kubeProxy.portRange: Invalid value: 'nine': must be a valid port range (e.g. 300-2000)"],
            id="kube-proxy value"),
        pytest.param("name: t}", "name: t, name: u}", [
            't.yaml:3: duplicate key "name" (first in line 3)'], id="duplicate key"),
        pytest.param("metadata: {name: t}", "metadata: {name: t", [
            "t.yaml:4: YAML syntax: while parsing a flow mapping that begins in line 3, did not find expected ',' or '}'"], id="syntax"),
        pytest.param("kind: Topology", "kind: Topologie", [
            "t.yaml:2: kind: 'Topologie' is not one of Topology (did you mean \"Topology\"?)"], id="kind"),
        pytest.param("apiVersion: testbed/v1", "apiVersion: testbed/v2", [
            "t.yaml:1: apiVersion: 'testbed/v2' is not one of testbed/v1 (did you mean \"testbed/v1\"?)"], id="apiVersion"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    """Each mistake is reported at its line, in these words, and causes no other report."""
    assert problems_of(tmp_path, changed(old, new)) == expected


OUTSIDE = [
    ("address: 172.20.0.100}", "address: 172.20.0.100, names: [www.example.com, a.b.c]}"),
    ("  kubeProxy:", "  outsideDNS: client\n  kubeProxy:"),
]


def with_outside_dns(*changes: tuple[str, str]) -> str:
    text = GOOD
    for old, new in [*OUTSIDE, *changes]:
        assert old in text, old
        text = text.replace(old, new)
    return text


def test_a_dns_server_outside(tmp_path: Path) -> None:
    """The host that serves names, the names of hosts, and every machine's resolv.conf."""
    path = tmp_path / "t.yaml"
    path.write_text(with_outside_dns())
    topology = load_topology(path)
    assert topology.outside_dns == "client"
    assert topology.machine("client").names == ("www.example.com", "a.b.c")  # type: ignore[union-attr]
    assert topology.resolv_conf == "nameserver 172.20.0.100\n"
    hosts = render_outside_hosts(topology).splitlines()
    assert hosts[-1] == "172.20.0.100 www.example.com a.b.c client"
    assert hosts[0] == "192.168.93.11 node1"
    assert "listen-address=172.20.0.100" in render_outside_dnsmasq(topology, "/h").splitlines()
    path.write_text(GOOD)
    assert load_topology(path).resolv_conf == "# this network has no DNS server\n"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([("outsideDNS: client", "outsideDNS: node1")], ["t.yaml:15: spec.outsideDNS: no outside host is called 'node1' (there is: client)"]),
        ([("outsideDNS: client", "outsideDNS: clint")], ["t.yaml:15: spec.outsideDNS: no outside host is called 'clint' (did you mean \"client\"?)"]),
        ([("  outsideDNS: client\n", "")], ["t.yaml:12: spec.hosts[0].names: nobody serves them: set spec.outsideDNS to one of the hosts"]),
        ([("a.b.c]", "x.a.b]")], ["t.yaml:12: spec.hosts[0].names[1]: 'x.a.b' is in the cluster's own domain (a.b)"]),
        ([("a.b.c]", "a_b.c]")], [f"t.yaml:12: spec.hosts[0].names[1]: 'a_b.c' {NAME_RULE}"]),
        ([("dns: 10.96.0.10", "dns: nothing")], ["t.yaml:14: spec.cluster.dns: 'nothing' is not an IPv4 address"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_names_outside(tmp_path: Path, changes: list[tuple[str, str]], expected: list[str]) -> None:
    """Each mistake at its line."""
    assert problems_of(tmp_path, with_outside_dns(*changes)) == expected


def test_a_cluster_without_dns(tmp_path: Path) -> None:
    """`none` is no address."""
    path = tmp_path / "t.yaml"
    path.write_text(GOOD.replace("dns: 10.96.0.10", "dns: none"))
    assert load_topology(path).cluster.dns is None


def test_all_problems_come_at_once() -> None:
    """A file with many mistakes, some of them in one entry, gives all of them in file order."""
    path = FILES / "invalid-many-topology.yaml"
    with pytest.raises(ManifestError) as caught:
        load_topology(path)
    assert [str(problem).removeprefix(f"{FILES}/") for problem in caught.value.problems] == [
        "invalid-many-topology.yaml:4: metadata.name: 'Many' is not a valid name: lower case letters, digits, '-', with a letter or digit at both ends",
        'invalid-many-topology.yaml:7: spec.networks[0]: unknown field "cdir" (did you mean "cidr"?)',
        'invalid-many-topology.yaml:11: spec.nodes[0].address: 192.168.94.11 is outside network lan (192.168.93.0/24)',
        "invalid-many-topology.yaml:11: spec.nodes[0].interface: 'a-very-long-interface' is longer than 15 characters, the kernel's limit for interface names",
        "invalid-many-topology.yaml:12: spec.nodes[1].podCIDR: 10.1.0.0/24 is outside the cluster's podCIDR (10.244.0.0/16)",
        'invalid-many-topology.yaml:13: spec.nodes[2].address: 192.168.93.12 is already on node node2 (line 12)',
        "invalid-many-topology.yaml:13: spec.nodes[2].name: 'node2' is already the name of the node in line 12",
        'invalid-many-topology.yaml:14: spec.hosts: wants a list, got the number 5',
        "invalid-many-topology.yaml:15: spec.cluster.nodePortRange: 'high' is not a port range such as 30000-32767",
        'invalid-many-topology.yaml:15: spec.cluster.podCIDR: 10.244.0.0/16 overlaps network office (10.244.0.0/20)',
        'invalid-many-topology.yaml:16: spec.kubeProxy.ipvs: unknown field "sheduler" (did you mean "scheduler"?)',
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["a\nb", "../a", "$(x)", "a;b", "a/b", "a b", "-a", "", "a\0b", "a" * 64, "`x`", "a|b", "..", "."]
)
@pytest.mark.parametrize(
    ("old", "line"),
    [("{name: t}", 3), ("name: office", 7), ("name: node2", 10), ("name: client", 12), ("domain: a.b", 14)],
)
def test_hostile_names_are_refused(tmp_path: Path, old: str, line: int, name: str) -> None:
    """No name with shell, path or control characters gets in, whatever it names."""
    key = old.strip("{}").split(":")[0]
    quoted = '"' + name.replace("\n", "\\n").replace("\0", "\\0") + '"'
    new = f"{key}: {quoted}"
    problems = problems_of(tmp_path, changed(old, f"{{{new}}}" if old.startswith("{") else new))
    assert any(f"t.yaml:{line}: " in problem and repr(name) in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


@pytest.mark.parametrize("name", ["a\nb", "../a", "$(x)", "a;b", "a/b", "a b", "-a", "", "a:b", "..", "."])
def test_hostile_interface_names_are_refused(tmp_path: Path, name: str) -> None:
    """A link's name never holds anything that a path or a command would read differently."""
    quoted = '"' + name.replace("\n", "\\n") + '"'
    (problem,) = problems_of(tmp_path, changed("labels: {}", f"interface: {quoted}"))
    assert problem.startswith(f"t.yaml:9: spec.nodes[0].interface: {name!r} is not a valid interface name")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "topologies").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_topologies_are_valid(path: Path) -> None:
    """Every file we ship loads, is named after its file, and fits the schema that editors get."""
    assert load_topology(path).name == path.stem
    (document,), _ = parse_documents(path.read_text(), str(path))
    jsonschema.validate(document.value, topology_schema())


def test_a_big_topology_has_room_for_its_pods() -> None:
    """Each node of big.yaml can hold all 1,000 pods."""
    nodes = load_topology(REPOSITORY / "topologies/big.yaml").nodes
    assert [node.pod_cidr.num_addresses for node in nodes] == [1024, 1024, 1024]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (NODE1, "adress: 192.168.93.11,"),
        (NODE1, "address: 5,"),
        ("mode: ipvs", "mode: ipv"),
        ("name: office", "name: a-long-network"),
        ("delay: 10ms", "delay: 10"),
        ("[node1, lan]", "[node1]"),
        ("address: 192.168.93.12}", "address: null}"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(old: str, new: str) -> None:
    """Editors see what has to do with one field: unknown names, types, closed sets, lengths."""
    (good,), _ = parse_documents(GOOD, "t.yaml")
    jsonschema.validate(good.value, topology_schema())
    (bad,), _ = parse_documents(changed(old, new), "t.yaml")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad.value, topology_schema())


def test_the_schema_is_a_schema() -> None:
    """It fits the metaschema it names."""
    jsonschema.Draft202012Validator.check_schema(topology_schema())


def test_topologies_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    """The folder's own files come before ours; an unknown name lists what there is."""
    assert find_topology("three-nodes") == REPOSITORY / "topologies/three-nodes.yaml"
    own = tmp_path / "three-nodes.yaml"
    own.write_text(GOOD)
    assert find_topology("three-nodes", tmp_path) == own
    assert find_topology(str(own)) == own
    with pytest.raises(ManifestError, match=r"there is no topology 'three-node' \(did you mean \"three-nodes\"\?\)"):
        find_topology("three-node")


def test_a_missing_and_an_unreadable_file_are_problems(tmp_path: Path) -> None:
    """No file, a folder, and text that is not UTF-8 are reported like any other mistake."""
    with pytest.raises(ManifestError, match=r"nope\.yaml: no such file$"):
        load_topology(tmp_path / "nope.yaml")
    with pytest.raises(ManifestError, match="cannot be read: is a directory$"):
        load_topology(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("a: b\nc: caf\xe9\n".encode("latin-1"))
    with pytest.raises(ManifestError, match=r"latin\.yaml:2: is not UTF-8 text$"):
        load_topology(latin)
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    with pytest.raises(ManifestError, match=r"empty\.yaml: is empty$"):
        load_topology(empty)
