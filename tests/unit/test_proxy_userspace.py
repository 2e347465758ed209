"""kube-proxy's userspace mode: ports, claims and rules as Services come and go, on a node that holds state."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from typing import Any

import pytest
from proxy_support import FakeIptables, endpoint, endpoint_slice, node_object, service

from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.flows import UdpFlow, stale_udp_flows
from testbed.errors import CommandError
from testbed.kernel.iptables import Backend, Iptables
from testbed.model.proxyconfig import parse_proxy_config
from testbed.model.service import Protocol, ServicePortName, parse_node
from testbed.programs.kube_proxy import SERVICES, SLICES, Changed, Listed, ProxyLoop
from testbed.programs.proxy_status import ProxyHealth, ProxyMetrics
from testbed.programs.proxy_userspace import UserspaceProxier, UserspaceSyncReport, clean_up_userspace

NODE_IP = IPv4Address("192.168.0.2")
Object = dict[str, Any]


class FakeSockets:
    """Ports of one node: refuses to give one twice, as the kernel does."""

    def __init__(self) -> None:
        self.taken: dict[tuple[str, str, int], FakeSocket] = {}
        self.next = 50000
        self.refused: dict[int, int] = {}  # port -> errno

    def listen(self, protocol: Protocol, address: IPv4Address, port: int) -> Any:
        if not port:
            self.next += 1
            port = self.next
        return self._open(protocol, address, port)

    def claim(self, protocol: Protocol, address: IPv4Address, port: int) -> Any:
        return self._open(protocol, address, port)

    def _open(self, protocol: Protocol, address: IPv4Address, port: int) -> Any:
        key = (protocol.value, str(address), port)
        if key in self.taken or port in self.refused:
            raise OSError(self.refused.get(port, errno.EADDRINUSE), "Address already in use")
        self.taken[key] = FakeSocket(self, key)
        return self.taken[key]


class FakeSocket:
    def __init__(self, node: FakeSockets, key: tuple[str, str, int]) -> None:
        self.node, self.key = node, key

    def getsockname(self) -> tuple[str, int]:
        return self.key[1:]

    def close(self) -> None:
        self.node.taken.pop(self.key, None)


class FakeProcess:
    """Stands for the copying process: what it was told, which must make sense."""

    def __init__(self, iptables: FakeIptables) -> None:
        self.iptables = iptables
        self.ports: dict[str, int] = {}
        self.left: dict[str, int] = {}  # ports that are still served beside the new ones
        self.endpoints: dict[str, tuple[str, ...]] = {}
        self.affinity: dict[str, int] = {}
        self.is_running = False

    def start(self) -> None:
        assert not self.is_running
        self.is_running = True

    def stop(self) -> None:
        self.is_running = False

    def open(self, name: ServicePortName, listener: FakeSocket) -> None:
        if str(name) in self.ports:
            self.left[str(name)] = self.ports[str(name)]
        self.ports[str(name)] = listener.getsockname()[1]
        assert f"ports {self.ports[str(name)]}" not in rules(self.iptables), "a rule came before its port"

    def set(self, name: ServicePortName, endpoints: Sequence[str], affinity_s: int) -> None:
        assert str(name) in self.ports
        self.endpoints[str(name)], self.affinity[str(name)] = tuple(endpoints), affinity_s

    def leave(self, name: ServicePortName) -> None:
        assert f" {self.left.pop(str(name))} " not in rules(self.iptables) + " ", (
            "a port is closed before its rules are gone"
        )

    def close(self, name: ServicePortName) -> None:
        port = self.ports.pop(str(name))
        del self.endpoints[str(name)], self.affinity[str(name)]
        assert f" {port} " not in rules(self.iptables) + " ", "a port is closed before its rules are gone"

    def purge(self) -> None:
        pass


def rules(iptables: FakeIptables) -> str:
    """Return the rules of our chains, ports and all."""
    found = [
        f"{chain} {rule}"
        for chains in iptables.tables.values()
        for chain, own in chains.items()
        for rule in own
        if chain.startswith("KUBE-")
    ]
    return "\n".join(found)


class World:
    """A node in userspace mode, and the objects that its kube-proxy has heard of."""

    def __init__(self, **config: Any) -> None:
        self.iptables, self.sockets = FakeIptables(), FakeSockets()
        self.process = FakeProcess(self.iptables)
        parsed, problems = parse_proxy_config({"mode": "userspace", **config})
        assert not problems
        self.config, self.tracker, self.now_s = parsed, ChangeTracker("node1"), 0.0
        options: Any = {"sockets": self.sockets, "process": self.process}
        self.proxier = UserspaceProxier(
            Iptables(self.iptables, Backend.LEGACY), parsed, clock=lambda: self.now_s, sleep=self.sleep,
            local_addresses=lambda: [IPv4Address("127.0.0.1"), NODE_IP], choose=lambda free: free[0], **options,
        )  # fmt: skip

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def sync(self, *objects: Object, deleted: Sequence[str] = ()) -> UserspaceSyncReport:
        for obj in objects:
            (self.tracker.set_service if obj["kind"] == "Service" else self.tracker.set_slice)(obj)
        for name in deleted:
            self.tracker.delete_service("ns", name)
        self.state, changed = self.tracker.take()
        settings = self.proxier.make_settings(self.config, parse_node(node_object()), ())
        return self.proxier.sync(self.state, changed, settings)

    def chain(self, table: str, chain: str) -> list[str]:
        return self.iptables.tables[table][chain]


def test_a_service_comes_changes_and_goes() -> None:
    """A port before its rules, another one with the changed rules, and nothing left in the end."""
    world = World()
    report = world.sync(service("web", "172.30.0.1", node_port=30080), endpoint_slice("web", endpoint("10.180.0.1")))
    assert report.full and not report.refused and not report.unserved
    assert world.process.ports == {"ns/web:p80": 50001}
    assert world.process.endpoints == {"ns/web:p80": ("10.180.0.1:80",)}
    assert report.payload.rules == {"filter": 1, "nat": 4} == report.payload.written
    report = world.sync(service("web", "172.30.0.1", node_port=30081, ingress=["1.2.3.4"], sessionAffinity="ClientIP"))
    assert not report.full and world.process.ports == {"ns/web:p80": 50002} and world.process.left == {}
    assert world.process.affinity == {"ns/web:p80": 10800}
    assert [line.split()[0] for line in report.payload.text.splitlines() if line.startswith("-")] == [
        *["-D"], *["-A"], *["-D"] * 4, *["-A"] * 6,
    ]  # fmt: skip
    assert "--dport 30081" in world.chain("nat", "KUBE-NODEPORT-HOST")[0]
    assert "50001" not in rules(world.iptables)
    assert {port for _, _, port in world.sockets.taken} == {50002, 30081}
    world.sync(deleted=["web"])
    assert world.process.ports == {} == world.sockets.taken
    assert rules(world.iptables) == ""


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        ({"node_port": 30081}, True),
        ({"ingress": ["1.2.3.4"]}, True),
        ({"externalIPs": ["192.168.99.1"]}, True),
        ({"sessionAffinity": "ClientIP"}, True),
        ({"ip": "172.30.0.2"}, True),
        ({"internalTrafficPolicy": "Local"}, False),
        ({"externalTrafficPolicy": "Local"}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("port_range", ["", "50001-50001"])
def test_changes_that_move_a_service_to_another_proxy_port(
    change: dict[str, Any], moves: bool, port_range: str
) -> None:
    """Those that upstream's sameConfig sees. Where portRange has no port to spare, the old one is closed first and used again."""
    world = World(portRange=port_range)
    fields: dict[str, Any] = {"ip": "172.30.0.1", "node_port": 30080}

    def sync(**fields: Any) -> UserspaceSyncReport:
        return world.sync(service("web", fields.pop("ip"), **fields), endpoint_slice("web", endpoint("10.180.0.1")))

    sync(**fields)
    assert world.process.ports == {"ns/web:p80": 50001}
    report = sync(**{**fields, **change})
    assert not report.unserved and not report.refused
    port = 50002 if moves and not port_range else 50001
    assert world.process.ports == {"ns/web:p80": port}
    assert world.process.endpoints == {"ns/web:p80": ("10.180.0.1:80",)}
    assert f"{port}" in rules(world.iptables)
    world.proxier.require_full()
    assert world.sync().payload.text == ""


def test_a_port_that_could_not_be_left_is_left_later() -> None:
    """The tool fails when the rules are to lead to another port: the next sync makes them, and closes the old port."""
    world = World()
    world.sync(service("web", "172.30.0.1"))
    world.iptables.failing = CommandError(["iptables-restore"], 4, "busy")
    with pytest.raises(CommandError):
        world.sync(service("web", "172.30.0.9"))
    assert {port for _, _, port in world.sockets.taken} == {50001, 50002}
    world.iptables.failing = None
    assert world.sync().full
    assert {port for _, _, port in world.sockets.taken} == {50002}
    assert "172.30.0.9/32" in rules(world.iptables) and "172.30.0.1/32" not in rules(world.iptables)


def test_nothing_changed_writes_nothing() -> None:
    """Neither a sync without changes nor one for endpoints alone touches a rule; the endpoints are told."""
    world = World()
    world.sync(service("web", "172.30.0.1"), endpoint_slice("web", endpoint("10.180.0.1")))
    payloads = len(world.iptables.payloads)
    assert world.sync(endpoint_slice("web", endpoint("10.180.0.2"))).payload.text == ""
    assert world.process.endpoints == {"ns/web:p80": ("10.180.0.2:80",)}
    assert len(world.iptables.payloads) == payloads


def test_start_empties_the_chains() -> None:
    """Rules of the kube-proxy before lead to ports that are closed: they go before anything else is known."""
    world = World()
    world.sync(service("web", "172.30.0.1"))
    again = World()
    again.proxier._iptables, again.process.iptables = Iptables(world.iptables, Backend.LEGACY), world.iptables
    again.proxier.start()
    assert rules(world.iptables) == "" and again.process.is_running
    again.sockets.next = 51000
    again.sync(service("web", "172.30.0.1"))
    assert "--to-ports 51001" in rules(world.iptables) and "50001" not in rules(world.iptables)
    assert len(world.chain("nat", "PREROUTING")) == 2  # no jump is made twice


def test_sctp_is_not_served() -> None:
    """It is said, once for all ports, and others are served."""
    world = World()
    report = world.sync(service("phone", "172.30.0.1", protocol="SCTP"), service("web", "172.30.0.2"))
    [(name, problem)] = report.unserved.items()
    assert (str(name), problem.reason) == ("ns/phone:p80", "ProtocolNotSupported")
    assert "SCTP needs iptables, ipvs or nftables mode" in problem.message
    assert world.process.ports.keys() == {"ns/web:p80"}


def test_two_services_claim_one_address() -> None:
    """The second has no rules there, is told who has it, keeps the rest, and gets it when the first is gone."""
    world = World()
    world.sync(service("a", "172.30.0.1", externalIPs=[str(NODE_IP)]))
    report = world.sync(service("b", "172.30.0.2", externalIPs=[str(NODE_IP)]))
    [problem] = report.unserved.values()
    assert problem.reason == "PortConflict"
    assert problem.message == "192.168.0.2:80/TCP, an address of this node, is claimed by Service ns/a:p80 already"
    assert "172.30.0.2/32" in rules(world.iptables)
    assert rules(world.iptables).count("-d 192.168.0.2/32") == 3
    assert not world.sync(deleted=["a"]).unserved
    assert "50001" not in rules(world.iptables) and rules(world.iptables).count("-d 192.168.0.2/32") == 3


def test_another_process_has_the_node_port() -> None:
    """It is named as what it is, and tried again at each sync."""
    world = World()
    world.sockets.refused[30080] = errno.EADDRINUSE
    report = world.sync(service("web", "172.30.0.1", node_port=30080))
    [problem] = report.unserved.values()
    assert problem.message == "NodePort 30080/TCP cannot be claimed on this node: Address already in use"
    assert world.chain("nat", "KUBE-NODEPORT-HOST") == []
    world.sockets.refused.clear()
    assert not world.sync().unserved
    assert len(world.chain("nat", "KUBE-NODEPORT-HOST")) == 1


def test_port_range() -> None:
    """Ports are of the range; one in use by others is passed over; a freed one is used again after its rest."""
    world = World(portRange="40000-40002")
    world.sockets.refused[40001] = errno.EADDRINUSE
    report = world.sync(service("a", "172.30.0.1"), service("b", "172.30.0.2"), service("c", "172.30.0.3"))
    assert world.process.ports == {"ns/a:p80": 40000, "ns/b:p80": 40002}
    [problem] = report.unserved.values()
    assert problem.reason == "NoProxyPort" and "of portRange 40000-40002" in problem.message
    before_s = world.now_s
    assert not world.sync(deleted=["a"]).unserved or not world.sync().unserved
    assert world.process.ports == {"ns/b:p80": 40002, "ns/c:p80": 40000}
    assert world.now_s >= before_s


def test_a_refused_rule_takes_out_its_service_only() -> None:
    """The kernel does not take one Service's rules: it is named, the others' are in place, and it is tried again."""
    world = World()
    world.iptables.refused = "physdev"
    report = world.sync(service("a", "172.30.0.1"), service("b", "172.30.0.2", externalIPs=["192.168.99.1"]))
    assert {str(name) for name in report.refused} == {"ns/b:p80"}
    assert "172.30.0.1/32" in rules(world.iptables) and "192.168.99.1" not in rules(world.iptables)
    world.iptables.refused = ""
    assert not world.sync().refused
    assert "192.168.99.1" in rules(world.iptables)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tables: tables["nat"]["KUBE-PORTALS-HOST"].clear(),
        lambda tables: tables["nat"]["PREROUTING"].clear(),
        lambda tables: tables["filter"].pop("KUBE-NODEPORT-NON-LOCAL") and tables["filter"]["INPUT"].clear(),
        lambda tables: tables["nat"]["KUBE-PORTALS-CONTAINER"].append("-j RETURN"),
    ],
)  # fmt: skip
def test_damage_is_found_and_repaired(damage: Callable[[Any], object]) -> None:
    """What others take away or put in is seen, and a full sync makes the rules what they were."""
    world = World()
    world.sync(service("web", "172.30.0.1", node_port=30080))
    before = {table: {c: sorted(r) for c, r in chains.items()} for table, chains in world.iptables.tables.items()}
    assert world.proxier.find_damage() == ""
    damage(world.iptables.tables)
    assert world.proxier.find_damage()
    world.proxier.require_full()
    assert world.sync().full
    assert {
        table: {c: sorted(r) for c, r in chains.items()} for table, chains in world.iptables.tables.items()
    } == before
    assert world.proxier.find_damage() == "" and world.process.ports == {"ns/web:p80": 50001}


def test_a_change_that_no_longer_fits_makes_a_full_sync() -> None:
    """A rule to be deleted is gone already: all is looked at, and written as wanted."""
    world = World()
    world.sync(service("web", "172.30.0.1"), service("b", "172.30.0.2"))
    world.iptables.tables["nat"]["KUBE-PORTALS-HOST"].clear()
    report = world.sync(deleted=["web"])
    assert report.partial_failed and report.full
    assert [rule.split()[1] for rule in world.chain("nat", "KUBE-PORTALS-HOST")] == ["172.30.0.2/32"]


def test_the_lock_is_held() -> None:
    """Nothing is lost: the next sync is a full one."""
    world = World()
    world.sync()
    world.iptables.failing = CommandError(["iptables-restore"], 4, "busy")
    with pytest.raises(CommandError):
        world.sync(service("web", "172.30.0.1"))
    world.iptables.failing = None
    assert world.sync().full
    assert "172.30.0.1/32" in rules(world.iptables)


def test_clean_up() -> None:
    """--cleanup, or another mode's start, leaves nothing."""
    world = World()
    world.sync(service("web", "172.30.0.1", node_port=30080))
    clean_up_userspace(Iptables(world.iptables, Backend.LEGACY))
    assert "KUBE-" not in str(world.iptables.tables)
    clean_up_userspace(Iptables(world.iptables, Backend.LEGACY))


def test_udp_flows() -> None:
    """A flow to a deleted UDP Service is stale, one to a proxy port is not, one to the port of a kube-proxy before is."""
    world = World()
    world.sync(service("dns", "172.30.0.10", protocol="UDP"))
    [old] = world.state.services.values()

    def flow(port: int) -> UdpFlow:
        return UdpFlow(IPv4Address("10.180.0.9"), 999, IPv4Address("172.30.0.10"), 80, NODE_IP, port)

    flows = [flow(50001), flow(44444)]
    assert stale_udp_flows(flows, world.proxier.answering(world.state)) == [flow(44444)]
    world.sync(deleted=["dns"])
    assert stale_udp_flows(flows, world.proxier.answering(world.state), [old]) == flows


def test_the_loop_tells_what_is_not_served() -> None:
    """One event on the Service, while kube-proxy stays healthy and tries again every syncPeriod."""
    world, told = World(), []
    health = ProxyHealth(60)
    loop = ProxyLoop(
        world.config, "node1", world.proxier, health=health, metrics=ProxyMetrics(), flows=Flows(), links=Links(),
        tell=lambda obj, kind, reason, message: told.append((obj["metadata"]["name"], kind, reason, message)),
        answering=world.proxier.answering,
    )  # fmt: skip
    for resource in (SERVICES, SLICES):
        loop.accept(Listed(resource, ()), 0)
    loop.accept(Listed("nodes", (node_object(),)), 0)
    loop.step(0)
    loop.accept(Changed(SERVICES, False, service("phone", "172.30.0.1", protocol="SCTP")), 1)
    loop.step(1)
    [(name, kind, reason, message)] = told
    assert (name, kind, reason) == ("phone", "Warning", "ProtocolNotSupported")
    assert message.startswith("node node1, port ns/phone:p80: userspace mode copies TCP and UDP only")
    for now_s in (31, 62, 93):
        assert loop.wait_s(now_s) == 0
        loop.step(now_s)
        assert health.is_healthy(now_s + 1)
    assert len(told) == 1


class Flows:
    """A node without UDP flows."""

    def list(self) -> list[UdpFlow]:
        return []

    def delete(self, flows: object) -> int:
        return 0


class Links:
    """A node without links."""

    def index(self, name: str) -> int:
        return 0

    def name(self, index: int) -> str:
        return ""
