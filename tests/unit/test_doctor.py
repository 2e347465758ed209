"""The doctor's detectors: a healthy cluster with one thing changed, and what is said of it. No root, no lab."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from doctor_world import CLASSES, EIPS, INGRESSES, NODES, SLICES, World, node, pod
from proxy_support import FakeIptables, endpoint, endpoint_slice, service

from testbed.cli.doctor import concerning, parse_service_argument, text_report
from testbed.dataplane.doctor import ArpSeen, DnsCount, DnsSeen, LinkSeen, RouteSeen, RulesSeen
from testbed.dataplane.doctor.rules import proxy_state
from testbed.dataplane.flows import UdpFlow
from testbed.errors import InputError
from testbed.kernel.iptables import Backend, Iptables
from testbed.model.doctor import CAUSES
from testbed.model.service import ServicePortName, parse_node
from testbed.programs.proxy_iptables import IptablesProxier

ADDRESS = IPv4Address("192.168.93.231")
CLIENT = IPv4Address("192.168.93.100")
NODE1 = IPv4Address("192.168.93.11")


def _flow(endpoint_address: str) -> UdpFlow:
    return UdpFlow(CLIENT, 40000, NODE1, 30053, IPv4Address(endpoint_address), 53)


def _node_lost(world: World) -> None:
    world.objects["nodes"][1] = node("node2", "Unknown", "Kubelet stopped posting node status.")
    world.objects["pods"][1]["status"]["conditions"][0]["status"] = "False"
    world.dns[1] = DnsSeen(pod="kube-system/coredns-2", failure="gone")
    world.change(
        "node2", failure="no answer", proxy_answer="refused", rules=replace(world.nodes["node2"].rules, iptables="")
    )


def _link_down(world: World) -> None:
    world.change("node3", links={"eth0": LinkSeen(1500, False)})


def _strict_filter(world: World) -> None:
    world.set("node2", net__ipv4__conf__eth0__rp_filter="1")
    routes = (*world.nodes["node2"].routes, RouteSeen(IPv4Network("10.244.1.0/24"), "tunnel"))
    world.change("node2", routes=tuple(r for r in routes if r != RouteSeen(IPv4Network("10.244.1.0/24"), "eth0")))


def _proxy_dead(world: World) -> None:
    world.objects["services"].append(service("late", "10.96.0.99"))
    world.objects[SLICES].append(endpoint_slice("late", endpoint("10.244.1.5", "node1")))
    world.service("late")["spec"]["selector"] = {"app": "web"}
    world.write_rules("node1", "node3")
    world.change("node2", proxy_answer="refused: nobody listens")


def _flushed(world: World) -> None:
    rules = world.nodes["node1"].rules
    kept = [line for line in rules.iptables.splitlines() if "-A KUBE-SVC" not in line]
    world.change("node1", rules=replace(rules, iptables="\n".join(kept)))


def _typo(world: World) -> None:
    world.objects["services"].append(service("shop", "10.96.0.90", selector={"app": "wbe"}))
    world.write_rules()


def _scaled_down(world: World) -> None:
    world.objects["services"].append(service("shop", "10.96.0.90", selector={"app": "shop"}))
    template = {"metadata": {"labels": {"app": "shop"}}}
    world.objects["deployments.apps"] = [
        {"metadata": {"name": "shop", "namespace": "ns"}, "spec": {"template": template}}
    ]
    world.write_rules()


def _no_such_port(world: World) -> None:
    world.objects["services"].append(service("shop", "10.96.0.90", selector={"app": "web"}))
    world.service("shop")["spec"]["ports"][0]["targetPort"] = "htpp"
    world.objects[SLICES].append({**endpoint_slice("shop", endpoint("10.244.1.5")), "ports": []})
    world.write_rules()


def _nobody_made_endpoints(world: World) -> None:
    world.objects["services"].append(service("shop", "10.96.0.90"))
    world.write_rules()


def _probe_fails(world: World) -> None:
    world.objects["pods"][0] = pod("web-1", ready=False, app="web")
    world.objects["events"] = [
        {
            "involvedObject": {"name": "web-1", "namespace": "ns"},
            "reason": "Unhealthy",
            "message": "HTTP 404",
            "metadata": {},
        }
    ]


def _local(world: World) -> None:
    world.service("web")["spec"]["externalTrafficPolicy"] = "Local"
    world.write_rules()


def _balancer(world: World, *, local: bool = False) -> None:
    lb = service("lb", "10.96.0.91", ingress=[str(ADDRESS)], selector={"app": "web"})
    world.objects["services"].append(lb)
    world.objects[SLICES].append(endpoint_slice("lb", endpoint("10.244.1.5", "node1")))
    if local:
        lb["spec"]["externalTrafficPolicy"] = "Local"
    world.write_rules()


def _announced_where_nobody_is(world: World) -> None:
    _balancer(world, local=True)
    world.arp = [ArpSeen(ADDRESS, ("node2",))]


def _silent(world: World) -> None:
    _balancer(world)
    world.arp = [ArpSeen(ADDRESS, ())]


def _two_answer(world: World) -> None:
    _balancer(world)
    world.arp = [ArpSeen(ADDRESS, ("node1", "0a:00:00:00:00:01"))]


def _wants_address(world: World, *, pools: bool, annotated: bool = True) -> None:
    annotations = {"lb.kubesphere.io/v1alpha1": "openelb"} if annotated else {}
    lb = service("lb", "10.96.0.91", selector={"app": "web"}, annotations=annotations)
    lb["spec"]["type"] = "LoadBalancer"
    world.objects["services"].append(lb)
    world.objects[SLICES].append(endpoint_slice("lb", endpoint("10.244.1.5", "node1")))
    status = {"poolSize": 1, "usage": 1, "occupied": True}
    if pools:
        world.objects[EIPS] = [{"metadata": {"name": "pool"}, "spec": {"address": str(ADDRESS)}, "status": status}]
    world.write_rules()


def _ingress(world: World, *, name: str = "", backend: str = "web", default: bool = False) -> None:
    annotations = {"ingressclass.kubernetes.io/is-default-class": "true"} if default else {}
    world.objects[CLASSES] = [{"metadata": {"name": "nginx", "annotations": annotations}}]
    paths = [{"backend": {"service": {"name": backend}}}]
    spec = {"rules": [{"http": {"paths": paths}}], **({"ingressClassName": name} if name else {})}
    world.objects[INGRESSES] = [{"metadata": {"name": "site", "namespace": "ns"}, "spec": spec}]


def _storm(world: World) -> None:
    counts = (DnsCount(1.0, 100, 300), DnsCount(2.0, 120, 360))
    world.dns[0] = DnsSeen(pod="kube-system/coredns-1", counts=counts)


def _dns_silent(world: World) -> None:
    world.dns = [DnsSeen(pod=one.pod, failure="refused: nobody listens") for one in world.dns]


def _dns_gone(world: World) -> None:
    world.objects["pods"] = world.objects["pods"][:2]
    world.dns = []


def _one_dns_silent(world: World) -> None:
    world.dns[1] = DnsSeen(pod="kube-system/coredns-2", failure="no answer")


FAULTS: dict[str, tuple[Callable[[World], None], str, str, str]] = {
    # what happened: how, cause, where, a part of what is said
    "a node does not report": (_node_lost, "node-lost", "node node2", "Kubelet stopped posting"),
    "a cable is pulled": (_link_down, "link-down", "node node3", "no carrier"),
    "a node cannot be looked at": (lambda w: w.change("node1", failure="x"), "node-unseen", "node node1", "x"),
    "bridged frames pass iptables by": (
        lambda w: w.set("node1", net__bridge__bridge__nf__call__iptables="1") or w.change(
            "node1", sysctls={**w.nodes["node1"].sysctls, "net/bridge/bridge-nf-call-iptables": "0"}),
        "br-netfilter-off", "node node1", "bridge-nf-call-iptables is 0"),
    "nothing is handed on": (lambda w: w.set("node1", net__ipv4__ip_forward="0"), "ip-forward-off", "node node1", "ip_forward"),
    "a bridge port without hairpin mode": (
        lambda w: w.change("node1", bridge_ports={"a": True, "b": False}), "hairpin-off", "node node1", "1 of 2 ports"),
    "strict filter, asymmetric route": (_strict_filter, "rp-filter", "node node2", "10.244.1.0/24 (node1) by tunnel"),
    "a LAN link of another MTU": (
        lambda w: w.change("node2", links={"eth0": LinkSeen(1300, True)}), "mtu-mismatch", "node node2", "MTU of 1300"),
    "a full table": (lambda w: w.change("node1", conntrack_count=990), "conntrack-full", "node node1", "990 of 1000"),
    "a full table drops our own question": (
        lambda w: w.change("node1", conntrack_count=1000, proxy_answer="no answer"), "conntrack-full", "node node1", "1000"),
    "a UDP flow to a dead endpoint": (
        lambda w: w.change("node1", udp_flows=(_flow("10.244.1.5"), _flow("10.244.9.9"))),
        "stale-conntrack", "node node1", "a UDP flow goes on"),
    "kube-proxy dead, and a Service came": (_proxy_dead, "kube-proxy-down", "node node2", "ns/late"),
    "kube-proxy dead, and nothing came": (
        lambda w: w.change("node2", proxy_answer="refused"), "kube-proxy-down", "node node2", "still right"),
    "somebody flushed rules": (_flushed, "rules-differ", "node node1", "ns/web"),
    "a program has the nodePort": (
        lambda w: w.change("node1", listening=frozenset({("tcp", 30080)})), "node-port-taken", "node node1", "30080/tcp"),
    "DNS pods do not answer": (_dns_silent, "dns-down", "svc kube-system/kube-dns", "coredns-1"),
    "no DNS pods": (_dns_gone, "dns-down", "svc kube-system/kube-dns", "it has no pods"),
    "one DNS pod does not answer": (_one_dns_silent, "dns-degraded", "svc kube-system/kube-dns", "1 of 2"),
    "many names that are not there": (_storm, "ndots-storm", "svc kube-system/kube-dns", "61 answers a second"),
    "a selector with a typo": (_typo, "no-endpoints", "svc ns/shop", "pods have app=web"),
    "a Deployment without replicas": (_scaled_down, "no-endpoints", "svc ns/shop", "shop has none"),
    "a targetPort that no container has": (_no_such_port, "no-endpoints", "svc ns/shop", "htpp"),
    "neither selector nor endpoints": (_nobody_made_endpoints, "no-endpoints", "svc ns/shop", "no selector"),
    "a readiness probe fails": (_probe_fails, "not-ready", "pod ns/web-1", "HTTP 404"),
    "policy Local, a node without endpoint": (_local, "local-without-endpoints", "svc ns/web", "node3 has no endpoint"),
    "policy Local, announced by the wrong node": (
        _announced_where_nobody_is, "local-without-endpoints", "svc ns/lb", "node2 has no endpoint"),
    "nobody announces the address": (_silent, "arp-silent", "address 192.168.93.231", "ns/lb"),
    "two have the address": (_two_answer, "arp-duplicate", "address 192.168.93.231", "0a:00:00:00:00:01"),
    "a pool without free addresses": (lambda w: _wants_address(w, pools=True), "pool-exhausted", "svc ns/lb", "pool"),
    "no pool at all": (lambda w: _wants_address(w, pools=False), "address-pending", "svc ns/lb", "there is no Eip"),
    "a load balancer that nobody is told of": (
        lambda w: _wants_address(w, pools=True, annotated=False), "address-pending", "svc ns/lb", "without the annotation"),
    "an Ingress without a class": (_ingress, "ingress-without-class", "ingress ns/site", "no IngressClass is the default"),
    "an Ingress of an unknown class": (
        lambda w: _ingress(w, name="nginks"), "ingress-class-unknown", "ingress ns/site", "nginks"),
    "an Ingress to a Service that is not there": (
        lambda w: _ingress(w, name="nginx", backend="gone"), "ingress-backend-missing", "ingress ns/site", "gone"),
}  # fmt: skip

HARMLESS: dict[str, Callable[[World], object]] = {
    "nothing": lambda w: None,
    "a strict filter with symmetric routes": lambda w: w.set("node2", net__ipv4__conf__all__rp_filter="1"),
    "a loose filter with asymmetric routes": lambda w: (
        _strict_filter(w), w.set("node2", net__ipv4__conf__eth0__rp_filter="2")),
    "a UDP flow to a living endpoint": lambda w: w.change("node1", udp_flows=(_flow("10.244.1.5"),)),
    "a UDP flow that is no Service's": lambda w: w.change(
        "node1", udp_flows=(UdpFlow(CLIENT, 1, NODE1, 5353, NODE1, 5353),)),
    "DNS that was asked much, once": lambda w: w.dns.__setitem__(
        0, DnsSeen(pod="kube-system/coredns-1", counts=(DnsCount(1.0, 9, 99999), DnsCount(2.0, 9, 99999)))),
    "names that mostly are there": lambda w: w.dns.__setitem__(
        0, DnsSeen(pod="kube-system/coredns-1", counts=(DnsCount(1.0, 0, 0), DnsCount(2.0, 200, 50)))),
    "an Ingress of the default class": lambda w: _ingress(w, default=True),
    "a balancer with policy Local, announced where its endpoint is": lambda w: (
        _balancer(w, local=True), w.arp.append(ArpSeen(ADDRESS, ("node1",)))),
    "a pod that has ended": lambda w: w.objects["pods"].append(
        {**pod("job", ready=False, app="web"), "status": {"phase": "Succeeded"}}),
    "an ExternalName": lambda w: w.objects["services"].append(
        {"metadata": {"name": "out", "namespace": "ns"}, "spec": {"type": "ExternalName", "externalName": "a.b"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name: str) -> None:
    """With one fault the doctor names exactly that cause, at the right place, and says what to do."""
    break_it, cause, where, part = FAULTS[name]
    world = World()
    break_it(world)
    (finding,) = world.findings()
    assert (finding.cause, finding.where) == (cause, where)
    assert part in finding.what
    assert finding.do


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_no_fault(name: str) -> None:
    """Of what only looks like a fault nothing is said."""
    world = World()
    HARMLESS[name](world)
    assert world.findings() == ()


def test_a_cluster_that_has_grown_large() -> None:
    """Past 1,000 endpoints kube-proxy writes rules without comments; those that it has not touched since keep theirs."""
    world = World()
    written = {name: Written(world, name) for name in NODES}
    world.objects["services"].append(service("many", "10.96.0.90"))
    many = [endpoint(f"10.244.{3 + number // 250}.{number % 250 + 1}", "node3") for number in range(1001)]
    world.objects[SLICES].append(endpoint_slice("many", *many))
    for name in NODES:
        world.change(name, rules=written[name].sync())
    saved = world.nodes["node1"].rules.iptables
    assert "-> 10.244.1.5:80" in saved
    assert "-> 10.244.3.1:80" not in saved
    assert "rules-differ" not in {finding.cause for finding in world.findings()}
    damaged = saved.replace("--to-destination 10.244.1.5:80", "--to-destination 10.244.1.6:80")
    world.change("node1", rules=RulesSeen(iptables=damaged))
    (found,) = [finding for finding in world.findings() if finding.cause == "rules-differ"]
    assert found.where == "node node1"


class Written:
    """The rules of a node whose kube-proxy runs on: it writes what has changed."""

    def __init__(self, world: World, node_name: str) -> None:
        self._world, self._node = world, node_name
        self._tools = Iptables(FakeIptables(), Backend.LEGACY)
        self._proxier = IptablesProxier(self._tools)
        self._known: frozenset[ServicePortName] = frozenset()
        self.sync()

    def sync(self) -> RulesSeen:
        seen = self._world.seen
        state = proxy_state(seen, self._node)
        names = frozenset(state.services)
        settings = self._proxier.make_settings(seen.config, parse_node(node(self._node)), ())
        self._proxier.sync(state, names - self._known, settings)
        self._known = names
        return RulesSeen(iptables=self._tools.save())


@pytest.mark.parametrize("mode", ["iptables", "nftables", "ipvs", "userspace"])
def test_rules_of_every_mode_are_compared(mode: str) -> None:
    """Rules as kube-proxy wrote them are right; those of before a change are not, and a dead kube-proxy is the cause."""
    world = World(mode=mode, strict_arp=True)
    assert world.findings() == ()
    world.objects["services"].append(service("late", "10.96.0.99", selector={"app": "web"}))
    world.objects[SLICES].append(endpoint_slice("late", endpoint("10.244.1.5", "node1")))
    assert {(f.cause, f.where) for f in world.findings()} == {("rules-differ", f"node {name}") for name in world.nodes}
    world.write_rules("node1", "node2")
    world.change("node3", proxy_answer="refused")
    (finding,) = world.findings()
    assert (finding.cause, finding.where) == ("kube-proxy-down", "node node3")
    assert "behind" in finding.what


@pytest.mark.parametrize(
    ("strict", "restarted", "said"),
    [(False, False, "strictARP is false"), (True, False, "has not been restarted"), (True, True, "")],
)
def test_strict_arp(strict: bool, restarted: bool, said: str) -> None:
    """In ipvs mode every node answers for a load-balancer address unless kube-proxy was started with strictARP."""
    world = World(mode="ipvs", strict_arp=strict)
    _balancer(world)
    for name in world.nodes:
        world.set(name, net__ipv4__conf__all__arp_ignore="1" if restarted else "0")
    world.arp = [ArpSeen(ADDRESS, ("node1",) if restarted else ("node1", "node2", "node3"))]
    found = world.findings()
    assert [finding.cause for finding in found] == (["strict-arp-off"] if said else [])
    assert all(said in finding.what for finding in found)


def test_userspace_mode_listens_itself() -> None:
    """There kube-proxy has the nodePorts, flows end in it, and policy Local is not known: none of that is a fault."""
    world = World(mode="userspace")
    world.service("web")["spec"]["externalTrafficPolicy"] = "Local"
    world.write_rules()
    world.change("node1", listening=frozenset({("tcp", 30080)}), udp_flows=(_flow("192.168.93.11"),))
    assert world.findings() == ()


def test_every_cause_is_found_by_a_test_and_explained() -> None:
    """Each cause that there is can be produced above, and docs/doctor.md has a line for it."""
    assert {cause for _, cause, _, _ in FAULTS.values()} | {"strict-arp-off"} == set(CAUSES)
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    assert [cause for cause in CAUSES if f"`{cause}`" not in page] == []


def test_one_service_only() -> None:
    """Asked about a Service the doctor says what is about it and what is about no Service in particular."""
    world = World()
    _typo(world)
    world.change("node1", bridge_ports={"a": False})
    assert [f.cause for f in concerning(world.findings(), "ns/shop")] == ["hairpin-off", "no-endpoints"]
    assert [f.cause for f in concerning(world.findings(), "ns/web")] == ["hairpin-off"]


@pytest.mark.parametrize("text", ["web", "svc/web", "svc/a/b/c", "pod/a/b", "svc//b"])
def test_what_is_no_service_is_refused(text: str) -> None:
    """An argument of another form is refused with an example of the right one."""
    with pytest.raises(InputError, match="svc/NAMESPACE/NAME, like"):
        parse_service_argument(text)


def test_the_report() -> None:
    """People read one line when all is well, and cause, place, what was seen and what to do of each fault."""
    world = World()
    assert text_report("lab1", "", (), world.seen, 0.72) == "lab lab1: all is well (3 nodes, 3 Services, 4 pods; 0.7 s)"
    _typo(world)
    lines = text_report("lab1", "", world.findings(), world.seen, 0.72).splitlines()
    assert lines[0] == "lab lab1: 1 fault (3 nodes, 4 Services, 4 pods; 0.7 s)"
    assert lines[2] == "  ✗ no-endpoints  svc ns/shop"
    assert lines[3].startswith("      seen  the selector app=wbe matches no pod of ns; pods have app=web")
    assert lines[4].startswith("      do    correct spec.selector, for example to app=web")
