"""Real packets through kube-proxy's rules, in each mode: who answers, and whose address the endpoint sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from nft_support import real_nft
from packet_world import BLOCKED, NODE_IP, OUTSIDE, PODS, World, packet_world
from proxy_support import POD_CIDR, endpoint, endpoint_slice, node_object, service

from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.nft_table import parse_listing
from testbed.dataplane.trace import Node, Packet, Verdict, parse_rules, trace
from testbed.dataplane.trace_nftables import trace_nftables
from testbed.dataplane.userspace import trace_userspace
from testbed.kernel.conntrack import delete_udp_flows, list_udp_flows
from testbed.model.proxyconfig import parse_proxy_config
from testbed.model.service import parse_network, parse_node
from testbed.programs.proxy_modes import clean_up_other_modes, make_proxier
from testbed.programs.proxy_userspace import UserspaceProxier

pytestmark = pytest.mark.root

HERE, THERE = PODS["pod1"], PODS["pod2"]
BOTH = (endpoint(HERE), endpoint(THERE, "node2"))
SERVICES = [
    service("plain", "172.30.0.1", node_port=30001, ingress=["1.2.3.1"], externalIPs=["192.168.99.1"]),
    service("local", "172.30.0.2", node_port=30002, ingress=["1.2.3.2"], externalTrafficPolicy="Local"),
    service("inside", "172.30.0.3", node_port=30003, internalTrafficPolicy="Local"),
    service("ranges", "172.30.0.4", node_port=30004, ingress=["1.2.3.4"], loadBalancerSourceRanges=["203.0.113.0/25"]),
    service("nobody", "172.30.0.5", node_port=30005, ingress=["1.2.3.5"]),
    service("elsewhere", "172.30.0.6", node_port=30006, ingress=["1.2.3.6"], externalTrafficPolicy="Local"),
    service("alone", "172.30.0.7"),
    service("udp", "172.30.0.8", node_port=30008, protocol="UDP"),
    service("sticky", "172.30.0.9", sessionAffinity="ClientIP"),
]
SLICES = [
    *(endpoint_slice(name, *BOTH) for name in ("plain", "local", "inside", "ranges", "sticky")),
    endpoint_slice("elsewhere", endpoint(THERE, "node2")),
    endpoint_slice("alone", endpoint(HERE)),
    endpoint_slice("udp", *BOTH, protocol="UDP"),
]
# where from (a namespace, perhaps an address of it), where to, what comes back: NAME SOURCE for each endpoint
HIDDEN_1, HIDDEN_2 = "pod1 10.180.0.254", "pod2 10.180.1.254"
POD = PODS["client"]
KEPT_POD = (f"pod1 {POD}", f"pod2 {POD}")
FLOWS: list[tuple[str, str, str, str, int, tuple[str, ...]]] = [
    ("pod to ClusterIP", "client", "", "172.30.0.1", 80, KEPT_POD),
    ("node to ClusterIP", "node", NODE_IP, "172.30.0.1", 80, (HIDDEN_1, HIDDEN_2)),
    ("outside to ClusterIP", "outside", OUTSIDE, "172.30.0.1", 80, (HIDDEN_1, HIDDEN_2)),
    ("pod to NodePort", "client", "", NODE_IP, 30001, (HIDDEN_1, HIDDEN_2)),
    ("node to NodePort", "node", NODE_IP, NODE_IP, 30001, (HIDDEN_1, HIDDEN_2)),
    ("outside to NodePort", "outside", OUTSIDE, NODE_IP, 30001, (HIDDEN_1, HIDDEN_2)),
    ("outside to external IP", "outside", OUTSIDE, "192.168.99.1", 80, (HIDDEN_1, HIDDEN_2)),
    ("outside to load balancer", "outside", OUTSIDE, "1.2.3.1", 80, (HIDDEN_1, HIDDEN_2)),
    ("pod to load balancer", "client", "", "1.2.3.1", 80, (HIDDEN_1, HIDDEN_2)),
    ("policy Local: outside to NodePort", "outside", OUTSIDE, NODE_IP, 30002, (f"pod1 {OUTSIDE}",)),
    ("policy Local: outside to load balancer", "outside", OUTSIDE, "1.2.3.2", 80, (f"pod1 {OUTSIDE}",)),
    ("policy Local: pod to load balancer", "client", "", "1.2.3.2", 80, KEPT_POD),
    ("policy Local: node to load balancer", "node", NODE_IP, "1.2.3.2", 80, (HIDDEN_1, HIDDEN_2)),
    ("policy Local, none here: outside", "outside", OUTSIDE, "1.2.3.6", 80, ("timeout",)),
    ("policy Local, none here: outside to NodePort", "outside", OUTSIDE, NODE_IP, 30006, ("timeout",)),
    ("policy Local, none here: pod", "client", "", "1.2.3.6", 80, (f"pod2 {POD}",)),
    ("policy Local, none here: node", "node", NODE_IP, "1.2.3.6", 80, (HIDDEN_2,)),
    ("internal policy Local: pod", "client", "", "172.30.0.3", 80, (f"pod1 {POD}",)),
    ("internal policy Local: outside to NodePort", "outside", OUTSIDE, NODE_IP, 30003, (HIDDEN_1, HIDDEN_2)),
    ("ranges: allowed", "outside", OUTSIDE, "1.2.3.4", 80, (HIDDEN_1, HIDDEN_2)),
    ("ranges: blocked", "outside", BLOCKED, "1.2.3.4", 80, ("timeout",)),
    ("ranges: a pod is not among them", "client", "", "1.2.3.4", 80, ("timeout",)),
    ("ranges do not guard NodePorts", "outside", BLOCKED, NODE_IP, 30004, (HIDDEN_1, HIDDEN_2)),
    ("no endpoints: pod to ClusterIP", "client", "", "172.30.0.5", 80, ("refused",)),
    ("no endpoints: node to ClusterIP", "node", NODE_IP, "172.30.0.5", 80, ("refused",)),
    ("no endpoints: outside to NodePort", "outside", OUTSIDE, NODE_IP, 30005, ("refused",)),
    ("no endpoints: outside to load balancer", "outside", OUTSIDE, "1.2.3.5", 80, ("refused",)),
    ("pod to itself", "pod1", "", "172.30.0.7", 80, (HIDDEN_1,)),
    ("endpoint to its Service", "pod1", "", "172.30.0.1", 80, (HIDDEN_1, f"pod2 {HERE}")),
    ("UDP: pod to ClusterIP", "client", "", "172.30.0.8", 80, KEPT_POD),
    ("UDP: outside to NodePort", "outside", OUTSIDE, NODE_IP, 30008, (HIDDEN_1, HIDDEN_2)),
]  # fmt: skip


#: Userspace mode knows neither traffic policies nor source ranges, and does not refuse where there is nobody; otherwise the
#: same endpoints answer. They see an address of the node, whoever asks.
IN_USERSPACE: dict[str, tuple[str, ...]] = {
    "policy Local: outside to NodePort": (HIDDEN_1, HIDDEN_2),
    "policy Local: outside to load balancer": (HIDDEN_1, HIDDEN_2),
    "policy Local, none here: outside": (HIDDEN_2,),
    "policy Local, none here: outside to NodePort": (HIDDEN_2,),
    "internal policy Local: pod": (HIDDEN_1, HIDDEN_2),
    "ranges: blocked": (HIDDEN_1, HIDDEN_2),
    "ranges: a pod is not among them": (HIDDEN_1, HIDDEN_2),
    **dict.fromkeys((flow[0] for flow in FLOWS if flow[0].startswith("no endpoints: ")), ("",)),
}


def expected(mode: str, flow: str, answers: tuple[str, ...]) -> tuple[str, ...]:
    """Return who answers in a mode, and whose address that one sees; '' is a connection that is closed at once."""
    if mode != "userspace":
        return answers
    hidden = {"pod1": HIDDEN_1, "pod2": HIDDEN_2}
    return IN_USERSPACE.get(flow) or tuple(hidden[answer.split()[0]] for answer in answers)


class Programmed:
    """A world whose node kube-proxy has programmed in one mode, and the rules as the kernel has them."""

    def __init__(self, world: World, mode: str) -> None:
        self.world, self.mode = world, mode
        config, problems = parse_proxy_config({"clusterCIDR": POD_CIDR, "mode": mode})
        assert not problems
        runner, tracker = world.runner(), ChangeTracker("node1")
        tracker.replace_services(SERVICES)
        tracker.replace_slices(SLICES)
        cidr = parse_network("172.30.0.0/16")
        assert cidr is not None
        clean_up_other_modes(config, runner, "legacy")
        proxier = make_proxier(config, runner, "legacy", own_namespace=False)
        settings = proxier.make_settings(config, parse_node(node_object()), (), [cidr])
        state, changed = tracker.take()
        with world.inside("node"):  # userspace mode opens ports there
            assert proxier.sync(state, changed, settings).refused == {}
            # a client's port that the mode before has seen would still be sent where that one sent it
            delete_udp_flows(list_udp_flows())
        self._userspace = proxier if isinstance(proxier, UserspaceProxier) else None
        self._state = state
        self._listing = runner.run(
            ["nft", "list", "table", "ip", "kube-proxy"] if mode == "nftables" else ["iptables-legacy-save"]
        )

    def fate(self, packet: Packet) -> set[str]:
        """Return what the interpreter says comes back, in the words of `FLOWS` but for sources."""
        here = Node.of(NODE_IP, *(f"{ip.rpartition('.')[0]}.254" for ip in PODS.values()))
        if self._userspace is not None:
            names = {port: name for name, port in self._userspace.ports.items()}
            fate = trace_userspace(parse_rules(self._listing), packet, here, self._state, names)
        elif self.mode == "nftables":
            fate = trace_nftables(parse_listing(self._listing), packet, here)
        else:
            fate = trace(parse_rules(self._listing), packet, here)
        if fate.verdict is Verdict.ENDPOINT:
            return {{HERE: "pod1", THERE: "pod2"}[e.partition(":")[0]] for e in fate.endpoints}
        return {{Verdict.DROP: "timeout", Verdict.REJECT: "refused", Verdict.CLOSED: ""}[fate.verdict]}

    def close(self) -> None:
        if self._userspace is not None:
            self._userspace.stop()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with real_nft(), packet_world() as world:
        yield world


@pytest.fixture(scope="module", params=["iptables", "nftables", "userspace"])  # ipvs: test_ipvs_packets.py
def programmed(request: pytest.FixtureRequest, world: World) -> Iterator[Programmed]:
    """The node in one mode after the other: each removes what the other wrote."""
    programmed = Programmed(world, request.param)
    yield programmed
    programmed.close()


@pytest.mark.parametrize(
    ("flow", "where", "source", "address", "port", "answers"), [pytest.param(*flow, id=flow[0]) for flow in FLOWS]
)
def test_flow(
    programmed: Programmed, flow: str, where: str, source: str, address: str, port: int, answers: tuple[str, ...]
) -> None:
    """The packets get where the table says, and the interpreter says so too."""
    answers = expected(programmed.mode, flow, answers)
    protocol = "udp" if port == 30008 or address == "172.30.0.8" else "tcp"
    answered = answers != ("timeout",)
    found = programmed.world.ask(where, address, port, source=source, protocol=protocol, answered=answered)
    assert found == sorted(answers)
    sender = source or {"client": POD, "pod1": HERE}[where]
    assert programmed.fate(Packet(sender, address, port, protocol)) == {answer.partition(" ")[0] for answer in answers}


def test_affinity(programmed: Programmed) -> None:
    """A client stays where it was sent first, from whatever port."""
    assert len(programmed.world.ask("client", "172.30.0.9", 80)) == 1


def test_node_port_on_the_loopback(programmed: Programmed) -> None:
    """A node reaches a NodePort at 127.0.0.1 in the modes that say so (docs/proxy-modes.md)."""
    wanted = {"userspace": sorted((HIDDEN_1, HIDDEN_2)), "nftables": ["refused"]}
    answers = programmed.world.ask("node", "127.0.0.1", 30001, times=6, answered=programmed.mode in wanted)
    if programmed.mode in wanted:
        assert answers == wanted[programmed.mode]


def test_cluster_ips_are_looked_after(programmed: Programmed) -> None:
    """nftables mode refuses a port that the Service does not have; iptables mode lets the packet go to the default gateway."""
    refuses = programmed.mode == "nftables"
    answer = programmed.world.ask("client", "172.30.0.1", 81, times=1, answered=refuses)
    assert (answer == ["refused"]) == refuses
