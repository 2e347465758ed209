"""Objects of nftables mode against upstream's expected dump (pkg/proxy/nftables/proxier_test.go, TestOverallNFTablesRules)."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from proxy_support import NODE, NODE_IP, endpoint, endpoint_slice, nftables_settings, service, state_of

from testbed.dataplane import nft_names as names
from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.nft_table import (
    Chain,
    Element,
    Hook,
    NftTable,
    SetSpec,
    as_listed,
    cut_comment,
    differences,
    parse_listing,
)
from testbed.dataplane.nftables import NftablesRenderer, render_base, render_table
from testbed.model.service import ServicePortName

# The six Services of upstream's test: plain, policy Local without a local endpoint, NodePort, external IP,
# source ranges with affinity, no endpoints. The dump is that of shape C (v1.36): docs/proxy-modes.md.
OVERALL_SERVICES = [
    service("svc1", "172.30.0.41", namespace="ns1"),
    service(
        "svc2", "172.30.0.42", namespace="ns2", node_port=3001, ingress=["1.2.3.4"], externalIPs=["192.168.99.22"],
        externalTrafficPolicy="Local", healthCheckNodePort=30000,
    ),
    service("svc3", "172.30.0.43", namespace="ns3", node_port=3003),
    service("svc4", "172.30.0.44", namespace="ns4", externalIPs=["192.168.99.33"]),
    service(
        "svc5", "172.30.0.45", namespace="ns5", node_port=3002, ingress=["5.6.7.8"], sessionAffinity="ClientIP",
        loadBalancerSourceRanges=[" 203.0.113.0/25"],
    ),
    service("svc6", "172.30.0.46", namespace="ns6"),
]  # fmt: skip
OVERALL_SLICES = [
    endpoint_slice("svc1", endpoint("10.180.0.1", "node2"), namespace="ns1"),
    endpoint_slice("svc2", endpoint("10.180.0.2", "node2"), namespace="ns2"),
    endpoint_slice("svc3", endpoint("10.180.0.3", "node2"), namespace="ns3"),
    endpoint_slice("svc4", endpoint("10.180.0.4", "node2"), endpoint("10.180.0.5"), namespace="ns4"),
    endpoint_slice("svc5", endpoint("10.180.0.3", "node2"), namespace="ns5"),
]

BASE = """
add table ip kube-proxy { comment "rules for kube-proxy" ; }
add set ip kube-proxy cluster-ips { type ipv4_addr ; comment "Active ClusterIPs" ; }
add set ip kube-proxy hairpin-connections { type ipv4_addr . ipv4_addr . inet_proto . inet_service ; comment "service hairpin connections" ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; comment "IPs that accept NodePort traffic" ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; comment "destinations that are subject to LoadBalancerSourceRanges" ; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; comment "vmap to drop or reject packets to service nodeports with no endpoints" ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; comment "vmap to drop or reject packets to services with no endpoints" ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; comment "ClusterIP, ExternalIP and LoadBalancer IP traffic" ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; comment "NodePort traffic" ; }
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-output-pre-dnat { type filter hook output priority -110 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0 ; }
add chain ip kube-proxy filter-input { type filter hook input priority 0 ; }
add chain ip kube-proxy filter-output { type filter hook output priority 0 ; }
add chain ip kube-proxy firewall-check
add chain ip kube-proxy masquerading
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy reject-chain { comment "helper for @no-endpoint-services / @no-endpoint-nodeports" ; }
add chain ip kube-proxy services
add chain ip kube-proxy service-endpoints-check
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"
add rule ip kube-proxy cluster-ips-check ip daddr { 172.30.0.0/16 } drop comment "Drop traffic to unallocated ClusterIPs"
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy masquerading mark and 0x4000 != 0 mark set mark xor 0x4000 masquerade fully-random
add rule ip kube-proxy masquerading ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy reject-chain reject
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
add rule ip kube-proxy services ip daddr @cluster-ips ip saddr != 10.0.0.0/8 mark set mark or 0x4000 comment "masquerade clusterIP traffic from outside cluster"
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add element ip kube-proxy nodeport-ips { 192.168.0.2 }
"""  # noqa: E501

OVERALL = """
add chain ip kube-proxy service-ULMVA6XW-ns1/svc1/tcp/p80
add rule ip kube-proxy service-ULMVA6XW-ns1/svc1/tcp/p80 meta l4proto tcp dnat ip addr . port to numgen random mod 1 map { 0 : 10.180.0.1 . 80 }
add element ip kube-proxy cluster-ips { 172.30.0.41 }
add element ip kube-proxy service-ips { 172.30.0.41 . tcp . 80 : goto service-ULMVA6XW-ns1/svc1/tcp/p80 }
add element ip kube-proxy hairpin-connections { 10.180.0.1 . 10.180.0.1 . tcp . 80 }
add chain ip kube-proxy service-42NFTM6N-ns2/svc2/tcp/p80
add rule ip kube-proxy service-42NFTM6N-ns2/svc2/tcp/p80 meta l4proto tcp dnat ip addr . port to numgen random mod 1 map { 0 : 10.180.0.2 . 80 }
add chain ip kube-proxy external-42NFTM6N-ns2/svc2/tcp/p80
add rule ip kube-proxy external-42NFTM6N-ns2/svc2/tcp/p80 ip saddr 10.0.0.0/8 goto service-42NFTM6N-ns2/svc2/tcp/p80 comment "short-circuit pod traffic"
add rule ip kube-proxy external-42NFTM6N-ns2/svc2/tcp/p80 fib saddr type local mark set mark or 0x4000 comment "masquerade local traffic"
add rule ip kube-proxy external-42NFTM6N-ns2/svc2/tcp/p80 fib saddr type local goto service-42NFTM6N-ns2/svc2/tcp/p80 comment "short-circuit local traffic"
add element ip kube-proxy cluster-ips { 172.30.0.42 }
add element ip kube-proxy service-ips { 172.30.0.42 . tcp . 80 : goto service-42NFTM6N-ns2/svc2/tcp/p80 }
add element ip kube-proxy service-ips { 192.168.99.22 . tcp . 80 : goto external-42NFTM6N-ns2/svc2/tcp/p80 }
add element ip kube-proxy service-ips { 1.2.3.4 . tcp . 80 : goto external-42NFTM6N-ns2/svc2/tcp/p80 }
add element ip kube-proxy service-nodeports { tcp . 3001 : goto external-42NFTM6N-ns2/svc2/tcp/p80 }
add element ip kube-proxy no-endpoint-nodeports { tcp . 3001 comment "ns2/svc2:p80" : drop }
add element ip kube-proxy no-endpoint-services { 1.2.3.4 . tcp . 80 comment "ns2/svc2:p80" : drop }
add element ip kube-proxy no-endpoint-services { 192.168.99.22 . tcp . 80 comment "ns2/svc2:p80" : drop }
add element ip kube-proxy hairpin-connections { 10.180.0.2 . 10.180.0.2 . tcp . 80 }
add chain ip kube-proxy service-4AT6LBPK-ns3/svc3/tcp/p80
add rule ip kube-proxy service-4AT6LBPK-ns3/svc3/tcp/p80 meta l4proto tcp dnat ip addr . port to numgen random mod 1 map { 0 : 10.180.0.3 . 80 }
add chain ip kube-proxy external-4AT6LBPK-ns3/svc3/tcp/p80
add rule ip kube-proxy external-4AT6LBPK-ns3/svc3/tcp/p80 mark set mark or 0x4000
add rule ip kube-proxy external-4AT6LBPK-ns3/svc3/tcp/p80 goto service-4AT6LBPK-ns3/svc3/tcp/p80
add element ip kube-proxy cluster-ips { 172.30.0.43 }
add element ip kube-proxy service-ips { 172.30.0.43 . tcp . 80 : goto service-4AT6LBPK-ns3/svc3/tcp/p80 }
add element ip kube-proxy service-nodeports { tcp . 3003 : goto external-4AT6LBPK-ns3/svc3/tcp/p80 }
add element ip kube-proxy hairpin-connections { 10.180.0.3 . 10.180.0.3 . tcp . 80 }
add chain ip kube-proxy service-LAUZTJTB-ns4/svc4/tcp/p80
add rule ip kube-proxy service-LAUZTJTB-ns4/svc4/tcp/p80 meta l4proto tcp dnat ip addr . port to numgen random mod 2 map { 0 : 10.180.0.4 . 80 , 1 : 10.180.0.5 . 80 }
add chain ip kube-proxy external-LAUZTJTB-ns4/svc4/tcp/p80
add rule ip kube-proxy external-LAUZTJTB-ns4/svc4/tcp/p80 mark set mark or 0x4000
add rule ip kube-proxy external-LAUZTJTB-ns4/svc4/tcp/p80 goto service-LAUZTJTB-ns4/svc4/tcp/p80
add element ip kube-proxy cluster-ips { 172.30.0.44 }
add element ip kube-proxy service-ips { 172.30.0.44 . tcp . 80 : goto service-LAUZTJTB-ns4/svc4/tcp/p80 }
add element ip kube-proxy service-ips { 192.168.99.33 . tcp . 80 : goto external-LAUZTJTB-ns4/svc4/tcp/p80 }
add element ip kube-proxy hairpin-connections { 10.180.0.4 . 10.180.0.4 . tcp . 80 }
add element ip kube-proxy hairpin-connections { 10.180.0.5 . 10.180.0.5 . tcp . 80 }
add set ip kube-proxy affinity-GTK6MW7G-ns5/svc5/tcp/p80__10.180.0.3/80 { type ipv4_addr ; flags dynamic,timeout ; timeout 10800s ; }
add chain ip kube-proxy service-HVFWP5L3-ns5/svc5/tcp/p80
add rule ip kube-proxy service-HVFWP5L3-ns5/svc5/tcp/p80 ip saddr @affinity-GTK6MW7G-ns5/svc5/tcp/p80__10.180.0.3/80 goto endpoint-GTK6MW7G-ns5/svc5/tcp/p80__10.180.0.3/80
add rule ip kube-proxy service-HVFWP5L3-ns5/svc5/tcp/p80 numgen random mod 1 vmap { 0 : goto endpoint-GTK6MW7G-ns5/svc5/tcp/p80__10.180.0.3/80 }
add chain ip kube-proxy external-HVFWP5L3-ns5/svc5/tcp/p80
add rule ip kube-proxy external-HVFWP5L3-ns5/svc5/tcp/p80 mark set mark or 0x4000
add rule ip kube-proxy external-HVFWP5L3-ns5/svc5/tcp/p80 goto service-HVFWP5L3-ns5/svc5/tcp/p80
add chain ip kube-proxy endpoint-GTK6MW7G-ns5/svc5/tcp/p80__10.180.0.3/80
add rule ip kube-proxy endpoint-GTK6MW7G-ns5/svc5/tcp/p80__10.180.0.3/80 update @affinity-GTK6MW7G-ns5/svc5/tcp/p80__10.180.0.3/80 { ip saddr }
add rule ip kube-proxy endpoint-GTK6MW7G-ns5/svc5/tcp/p80__10.180.0.3/80 meta l4proto tcp dnat to 10.180.0.3:80
add chain ip kube-proxy firewall-HVFWP5L3-ns5/svc5/tcp/p80
add rule ip kube-proxy firewall-HVFWP5L3-ns5/svc5/tcp/p80 ip saddr != { 203.0.113.0/25 } drop
add element ip kube-proxy cluster-ips { 172.30.0.45 }
add element ip kube-proxy service-ips { 172.30.0.45 . tcp . 80 : goto service-HVFWP5L3-ns5/svc5/tcp/p80 }
add element ip kube-proxy service-ips { 5.6.7.8 . tcp . 80 : goto external-HVFWP5L3-ns5/svc5/tcp/p80 }
add element ip kube-proxy service-nodeports { tcp . 3002 : goto external-HVFWP5L3-ns5/svc5/tcp/p80 }
add element ip kube-proxy firewall-ips { 5.6.7.8 . tcp . 80 : goto firewall-HVFWP5L3-ns5/svc5/tcp/p80 }
add element ip kube-proxy cluster-ips { 172.30.0.46 }
add element ip kube-proxy no-endpoint-services { 172.30.0.46 . tcp . 80 comment "ns6/svc6:p80" : goto reject-chain }
"""  # noqa: E501


def in_comparable_order(text: str) -> list[str]:
    """Return the commands, rules in the order of their chain and everything else sorted."""
    lines = [line for line in text.splitlines() if line]
    return sorted(lines, key=lambda line: (line.split()[:5], "" if line.startswith("add rule") else line))


def test_overall_rules() -> None:
    """Every object and rule of upstream's six Services, to the letter (TestOverallNFTablesRules)."""
    text = render_table(state_of(OVERALL_SERVICES, OVERALL_SLICES), nftables_settings())
    assert in_comparable_order(text) == in_comparable_order(BASE + OVERALL)


def test_no_services() -> None:
    """A node without Services has the table all the same."""
    assert in_comparable_order(render_table(state_of([], []), nftables_settings())) == in_comparable_order(BASE)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        (ServicePortName("ns1", "svc1", "p80", "TCP"), "ULMVA6XW-ns1/svc1/tcp/p80"),
        (ServicePortName("ns1", "svc1", "", "TCP"), "6KJ5P52A-ns1/svc1/tcp/"),
        (ServicePortName("ns4", "svc4", "p80", "TCP"), "LAUZTJTB-ns4/svc4/tcp/p80"),
    ],
)
def test_service_names(name: ServicePortName, base: str) -> None:
    """Upstream's examples (Test_servicePortChainNameBase); a port without a name leaves a slash at the end."""
    assert names.service_base(name) == base


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("10.180.0.1", "5OJB2KTY-ns1/svc1/tcp/p80__10.180.0.1/80"),
        ("fd00:10:180::1", "ZVRFLKHO-ns1/svc1/tcp/p80__fd00.10.180..1/80"),
    ],
)
def test_endpoint_names(address: str, base: str) -> None:
    """Upstream's examples (Test_servicePortEndpointChainNameBase); colons become dots."""
    assert names.endpoint_base(ServicePortName("ns1", "svc1", "p80", "TCP"), address, 80) == base


def test_long_names_are_cut() -> None:
    """Names end at 240 characters, and the hash keeps those apart that begin alike."""
    one, other = (
        names.endpoint_base(ServicePortName("n" * 63, "s" * 63, "p" * 63 + "x" * 40, "TCP"), a, 80)
        for a in ("10.0.0.1", "10.0.0.2")
    )
    assert len(one) == len(other) == 240 and one.endswith("...") and one[:8] != other[:8]


def test_long_comments_are_cut() -> None:
    """A comment keeps the 128 bytes that nft takes."""
    assert cut_comment("ns/" + "s" * 200) == "ns/" + "s" * 125
    assert cut_comment("ns/svc:p80") == "ns/svc:p80"


@pytest.mark.parametrize(
    ("config", "first_rule"),
    [
        pytest.param(
            {}, 'ip daddr @cluster-ips ip saddr != 10.0.0.0/8 mark set mark or 0x4000 comment "masquerade clusterIP '
            'traffic from outside cluster"', id="CIDR",
        ),
        pytest.param(
            {"nftables": {"masqueradeAll": True, "masqueradeBit": 20}},
            'ip daddr @cluster-ips mark set mark or 0x100000 comment "masquerade all clusterIP traffic"', id="all, another bit",
        ),
        pytest.param({"clusterCIDR": ""}, "ip daddr . meta l4proto . th dport vmap @service-ips", id="no detector"),
        pytest.param(
            {"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "cni0"}},
            'ip daddr @cluster-ips iifname != cni0 mark set mark or 0x4000 comment "masquerade clusterIP traffic from '
            'outside cluster"', id="bridge",
        ),
        pytest.param(
            {"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"interfaceNamePrefix": "veth"}},
            'ip daddr @cluster-ips iifname != "veth*" mark set mark or 0x4000 comment "masquerade clusterIP traffic from '
            'outside cluster"', id="prefix",
        ),
    ],
)  # fmt: skip
def test_who_is_masqueraded_on_the_way_to_a_cluster_ip(config: dict[str, Any], first_rule: str) -> None:
    """Whoever is not a pod, everybody, or nobody."""
    assert render_base(nftables_settings(config)).chains["services"].rules[0] == first_rule


@pytest.mark.parametrize(
    ("entries", "addresses"),
    [
        pytest.param([], {NODE_IP}, id="the primary address by default"),
        pytest.param(["primary"], {NODE_IP}, id="primary"),
        pytest.param(["192.168.0.0/24", "192.168.1.0/24"], {NODE_IP, "192.168.1.2"}, id="networks"),
        pytest.param(["127.0.0.0/8", "192.168.1.0/24"], {"192.168.1.2"}, id="never the loopback"),
        pytest.param(["203.0.113.0/24"], set(), id="none of ours"),
    ],
)
def test_node_port_addresses(entries: list[str], addresses: set[str]) -> None:
    """The set of addresses that take NodePorts (TestNodePorts)."""
    table = render_base(nftables_settings({"nodePortAddresses": entries}))
    assert {key for name, key in table.elements if name == "nodeport-ips"} == addresses
    assert (
        table.chains["services"].rules[-1] == "ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports"
    )


def test_node_ports_on_every_address() -> None:
    """With 0.0.0.0/0 there is no set: the kernel is asked whether the address is local."""
    table = render_base(nftables_settings({"nodePortAddresses": ["0.0.0.0/0"]}))
    assert "nodeport-ips" not in table.sets
    assert table.chains["services"].rules[-1] == (
        "fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports"
    )
    assert table.chains["nodeport-endpoints-check"].rules == (
        "ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @no-endpoint-nodeports",
    )


def test_source_ranges_with_the_node_let_the_balancers_address_in() -> None:
    """Packets of the node to a load balancer it stands in for come back with that address as their source."""
    svc = service(
        "svc1",
        "172.30.0.41",
        ingress=["1.2.3.4", "5.6.7.8"],
        loadBalancerSourceRanges=["192.168.0.0/24", " 203.0.113.0/25"],
    )
    text = render_table(state_of([svc], []), nftables_settings())
    assert "ip saddr != { 192.168.0.0/24 , 203.0.113.0/25 , 1.2.3.4 , 5.6.7.8 } drop\n" in text


def test_service_cidrs_unknown() -> None:
    """Nothing is dropped for being unallocated when nobody says what is allocated from."""
    rules = render_base(nftables_settings(service_cidrs=())).chains["cluster-ips-check"].rules
    assert rules == ('ip daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"',)


def test_first_service_by_name_has_a_contested_address() -> None:
    """Two Services with one external IP and port: the first by name has it, and the other takes over when it goes."""
    one, two = (service(n, f"172.30.0.{i}", externalIPs=["192.168.99.9"]) for i, n in enumerate(("a", "b"), 1))
    slices = [endpoint_slice("a", endpoint("10.180.0.1")), endpoint_slice("b", endpoint("10.180.0.2"))]
    tracker = ChangeTracker(NODE)
    tracker.replace_services([two, one])
    tracker.replace_slices(slices)
    renderer = NftablesRenderer(nftables_settings())
    renderer.partial(*tracker.take())
    key = ("service-ips", "192.168.99.9 . tcp . 80")
    assert renderer.wanted().elements[key].value.endswith("-ns/a/tcp/p80")
    tracker.delete_service("ns", "a")
    text = renderer.partial(*tracker.take()).text
    assert renderer.wanted().elements[key].value.endswith("-ns/b/tcp/p80")
    removed = text.index("delete element ip kube-proxy service-ips { 192.168.99.9 . tcp . 80 }")
    added = text.index("add element ip kube-proxy service-ips { 192.168.99.9 . tcp . 80 : goto external-")
    assert removed < added


class TestDifference:
    """What a change writes."""

    def setup_method(self) -> None:
        self.tracker = ChangeTracker(NODE)
        self.tracker.replace_services(OVERALL_SERVICES)
        self.tracker.replace_slices(OVERALL_SLICES)
        self.renderer = NftablesRenderer(nftables_settings())
        self.renderer.full(self.tracker.take()[0], None)

    def change(self) -> list[str]:
        return self.renderer.partial(*self.tracker.take()).text.splitlines()

    def test_nothing(self) -> None:
        """No change, no command; nor when an object is written again as it was."""
        assert self.change() == []
        self.tracker.set_service(dict(OVERALL_SERVICES[3]))
        assert self.change() == []

    def test_one_endpoint(self) -> None:
        """An endpoint that is replaced changes one chain and two elements, and nothing of the other Services."""
        self.tracker.set_slice(
            endpoint_slice("svc4", endpoint("10.180.0.4", "node2"), endpoint("10.180.0.6"), namespace="ns4")
        )
        assert self.change() == [
            "flush chain ip kube-proxy service-LAUZTJTB-ns4/svc4/tcp/p80",
            "delete element ip kube-proxy hairpin-connections { 10.180.0.5 . 10.180.0.5 . tcp . 80 }",
            "add rule ip kube-proxy service-LAUZTJTB-ns4/svc4/tcp/p80 meta l4proto tcp dnat ip addr . port to "
            "numgen random mod 2 map { 0 : 10.180.0.4 . 80 , 1 : 10.180.0.6 . 80 }",
            "add element ip kube-proxy hairpin-connections { 10.180.0.6 . 10.180.0.6 . tcp . 80 }",
        ]

    def test_last_endpoint_gone(self) -> None:
        """The Service changes from the map that serves to the one that refuses; its chain goes."""
        self.tracker.delete_slice("ns1", "svc1-x")
        assert self.change() == [
            "flush chain ip kube-proxy service-ULMVA6XW-ns1/svc1/tcp/p80",
            "delete element ip kube-proxy service-ips { 172.30.0.41 . tcp . 80 }",
            "delete element ip kube-proxy hairpin-connections { 10.180.0.1 . 10.180.0.1 . tcp . 80 }",
            'add element ip kube-proxy no-endpoint-services { 172.30.0.41 . tcp . 80 comment "ns1/svc1:p80" : goto '
            "reject-chain }",
            "delete chain ip kube-proxy service-ULMVA6XW-ns1/svc1/tcp/p80",
        ]

    def test_old_kernels_are_given_time(self) -> None:
        """Where a chain cannot be deleted at once, it is emptied, and named for later."""
        self.tracker.delete_service("ns1", "svc1")
        transaction = self.renderer.partial(*self.tracker.take(), delete_at_once=False)
        assert "delete chain" not in transaction.text
        assert transaction.stale_chains == ["service-ULMVA6XW-ns1/svc1/tcp/p80"]

    def test_shared_hairpin_stays(self) -> None:
        """svc3 and svc5 have one endpoint in common: what makes it see its peer stays until both are gone."""
        hairpin = "delete element ip kube-proxy hairpin-connections { 10.180.0.3 . 10.180.0.3 . tcp . 80 }"
        self.tracker.delete_service("ns3", "svc3")
        assert hairpin not in self.change()
        self.tracker.delete_service("ns5", "svc5")
        assert hairpin in self.change()

    def test_affinity_timeout(self) -> None:
        """Another timeout is another form of the same set; clients that are known stay known."""
        spec = {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}}
        old = OVERALL_SERVICES[4]
        self.tracker.set_service({**old, "spec": {**old["spec"], **spec}})
        assert self.change() == [
            "add set ip kube-proxy affinity-GTK6MW7G-ns5/svc5/tcp/p80__10.180.0.3/80 "
            "{ type ipv4_addr ; flags dynamic,timeout ; timeout 60s ; }"
        ]

    def test_metrics_follow(self) -> None:
        """Services whose external policy finds no endpoint here are counted, and discounted."""
        assert self.renderer.no_local_endpoints == (0, 1)
        self.tracker.set_slice(endpoint_slice("svc2", endpoint("10.180.0.2"), namespace="ns2"))
        self.change()
        assert self.renderer.no_local_endpoints == (0, 0)

    def test_any_order_ends_in_the_same_table(self) -> None:
        """Objects that come and go in any order leave the table that they make together."""
        whole = NftablesRenderer(nftables_settings())
        whole.full(state_of(OVERALL_SERVICES, OVERALL_SLICES), None)
        for seed in range(20):
            chance = random.Random(seed)
            tracker, renderer = ChangeTracker(NODE), NftablesRenderer(nftables_settings())
            steps = [(tracker.set_service, s) for s in OVERALL_SERVICES] + [
                (tracker.set_slice, s) for s in OVERALL_SLICES
            ]
            chance.shuffle(steps)
            for number, (step, obj) in enumerate(steps):
                step(obj)
                if chance.random() < 0.5:
                    meta = steps[chance.randrange(number + 1)][1]["metadata"]
                    gone = chance.choice([tracker.delete_service, tracker.delete_slice])
                    gone(meta["namespace"], meta["name"])
                renderer.partial(*tracker.take())
            for step, obj in steps:
                step(obj)
            renderer.partial(*tracker.take())
            assert renderer.wanted() == whole.wanted()
            assert renderer.no_local_endpoints == whole.no_local_endpoints


LISTING = """table ip kube-proxy {
    comment "rules for kube-proxy"
    set cluster-ips {
        type ipv4_addr
        comment "Active ClusterIPs"
        elements = { 172.30.0.41, 172.30.0.42,
                 172.30.0.43 }
    }

    map no-endpoint-services {
        type ipv4_addr . inet_proto . inet_service : verdict
        comment "vmap to drop or reject packets to services with no endpoints"
        elements = { 1.2.3.4 . tcp . 80 comment "ns2/svc2:p80" : drop,
                 172.30.0.46 . tcp . 80 comment "ns6/svc6:p80" : goto reject-chain }
    }

    set affinity-X {
        type ipv4_addr
        size 65535
        flags dynamic,timeout
        timeout 1h23m20s
        elements = { 203.0.113.2 expires 2h59m42s896ms }
    }

    chain filter-prerouting-pre-dnat {
        type filter hook prerouting priority dstnat - 10; policy accept;
        ct state new jump firewall-check
    }

    chain nat-output {
        type nat hook output priority -100; policy accept;
        jump services
    }

    chain reject-chain {
        comment "helper for @no-endpoint-services / @no-endpoint-nodeports"
        reject
    }

    chain empty {
    }
}
"""


def test_listing_is_read() -> None:
    """The text of ``nft list table``; who is remembered by affinity sets is not part of the table."""
    assert parse_listing(LISTING) == NftTable(
        comment="rules for kube-proxy",
        sets={
            "cluster-ips": SetSpec("set", "ipv4_addr", "Active ClusterIPs"),
            "no-endpoint-services": SetSpec(
                "map", "ipv4_addr . inet_proto . inet_service : verdict",
                "vmap to drop or reject packets to services with no endpoints",
            ),
            "affinity-X": SetSpec("set", "ipv4_addr", timeout_s=5000),
        },
        chains={
            "filter-prerouting-pre-dnat": Chain(("ct state new jump firewall-check",), Hook("filter", "prerouting", -110)),
            "nat-output": Chain(("jump services",), Hook("nat", "output", -100)),
            "reject-chain": Chain(("reject",), None, "helper for @no-endpoint-services / @no-endpoint-nodeports"),
            "empty": Chain(),
        },
        elements={
            **{("cluster-ips", f"172.30.0.{n}"): Element("cluster-ips", f"172.30.0.{n}") for n in (41, 42, 43)},
            ("no-endpoint-services", "1.2.3.4 . tcp . 80"): Element(
                "no-endpoint-services", "1.2.3.4 . tcp . 80", "drop", "ns2/svc2:p80"
            ),
            ("no-endpoint-services", "172.30.0.46 . tcp . 80"): Element(
                "no-endpoint-services", "172.30.0.46 . tcp . 80", "goto reject-chain", "ns6/svc6:p80"
            ),
        },
    )  # fmt: skip


@pytest.mark.parametrize(
    ("written", "listed"),
    [
        ("mark set mark or 0x4000", "meta mark set meta mark | 0x00004000"),
        ("mark and 0x4000 != 0 mark set mark xor 0x4000 masquerade fully-random",
         "meta mark & 0x00004000 != 0x00000000 meta mark set meta mark ^ 0x00004000 masquerade fully-random"),
        ("meta l4proto tcp dnat ip addr . port to numgen random mod 2 map { 0 : 10.0.0.1 . 80 , 1 : 10.0.0.2 . 80 }",
         "meta l4proto tcp dnat ip to numgen random mod 2 map { 0 : 10.0.0.1 . 80, 1 : 10.0.0.2 . 80 }"),
        ("iifname != cni0 mark set mark or 0x4000", 'iifname != "cni0" meta mark set meta mark | 0x00004000'),
        ('iifname "veth*" goto x', 'iifname "veth*" goto x'),
        ("ip saddr != { 203.0.113.0/25 } drop", "ip saddr != 203.0.113.0/25 drop"),
        ("ip saddr != { 203.0.113.0/25 , 10.0.0.0/8 , 1.2.3.4 , 10.1.0.0/16 } drop",
         "ip saddr != { 1.2.3.4, 10.0.0.0/8, 203.0.113.0/25 } drop"),
        ("ip saddr != { 10.0.0.128/25 , 10.0.0.0/25 } drop", "ip saddr != { 10.0.0.0/24 } drop"),
        ("update @affinity-x { ip saddr }", "update @affinity-x { ip saddr }"),
    ],
)  # fmt: skip
def test_rules_as_nft_prints_them(written: str, listed: str) -> None:
    """The kernel tests hold this against the real nft."""
    assert as_listed(written) == listed


def test_differences_are_told() -> None:
    """Each kind of damage is named."""
    wanted = parse_listing(LISTING)
    assert differences(wanted, parse_listing(LISTING)) == []
    damaged = parse_listing(
        LISTING.replace("172.30.0.42,", "172.30.0.99,").replace("        reject\n", "").replace("chain empty", "chain other")
        .replace("set affinity-X", "set affinity-Y")
    )  # fmt: skip
    assert differences(wanted, damaged) == [
        "set affinity-X is gone",
        "set affinity-Y is not ours",
        "chain reject-chain is changed",
        "chain empty is gone",
        "chain other is not ours",
        "element 172.30.0.42 of cluster-ips is gone",
        "element 172.30.0.99 of cluster-ips is not ours",
    ]


def test_table_of_another_shape_is_made_anew() -> None:
    """A set of another type, or a base chain at another place, cannot be changed: the whole table is replaced at once."""
    state, settings = state_of(OVERALL_SERVICES, OVERALL_SLICES), nftables_settings()
    table = parse_listing(
        'table ip kube-proxy {\n\tcomment "rules for kube-proxy"\n\tset cluster-ips {\n\t\ttype ipv6_addr\n\t}\n}\n'
    )
    text = NftablesRenderer(settings).full(state, table).text
    assert text == "add table ip kube-proxy\ndelete table ip kube-proxy\n" + render_table(state, settings)


def test_settings_come_from_the_nftables_section() -> None:
    """The iptables section has no part in this mode."""
    settings = nftables_settings({"iptables": {"masqueradeAll": True, "masqueradeBit": 2}})
    assert not settings.masquerade_all and settings.mark == "0x4000"
    assert settings.node_port_ips == (IPv4Address(NODE_IP),)
    assert settings.service_cidrs == (IPv4Network("172.30.0.0/16"),)
