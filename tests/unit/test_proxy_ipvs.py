"""The proxier of ipvs mode on a node in memory: what it changes, when it looks, and how real servers go."""

from __future__ import annotations

import pytest
from ipvs_support import FakeNode
from proxy_support import endpoint, endpoint_slice, node_object, service, state_of

from testbed.dataplane.ipvs import Balancing, IpvsSettings, VirtualServer
from testbed.dataplane.ipvs_rules import CHAINS, JUMPS, saved_rule
from testbed.dataplane.state import ProxyState
from testbed.errors import KernelError
from testbed.model.proxyconfig import parse_proxy_config
from testbed.model.service import parse_node
from testbed.programs.proxy_ipvs import CHECK_INTERVAL_S, IpvsProxier, IpvsSyncReport

WEB = VirtualServer("tcp", "172.30.0.41", 80)
LOCAL, REMOTE, THIRD = "10.180.0.1:80", "10.180.1.1:80", "10.180.1.2:80"


class FakeRules:
    """iptables that knows what was restored and prints it as iptables-save does."""

    def __init__(self) -> None:
        self.chains: dict[tuple[str, str], list[str]] = {}
        self.jumps: list[tuple[str, str]] = []
        self.payloads: list[str] = []

    def save(self, table: str = "") -> str:
        lines = []
        for name in CHAINS:
            lines += [f"*{name}", *(f":{chain} - [0:0]" for where, chain in self.chains if where == name)]
            lines += [line for where, line in self.jumps if where == name]
            lines += [line for (where, _), own in self.chains.items() if where == name for line in own]
        return "\n".join([*lines, "COMMIT"])

    def apply(self, payload: str) -> None:
        self.payloads.append(payload)
        table = ""
        for line in payload.splitlines():
            if line.startswith("*"):
                table = line[1:]
            elif line.startswith(":"):
                self.chains[table, line[1:].split()[0]] = []
            elif line.startswith("-A"):
                self.chains[table, line.split()[1]].append(saved_rule(line))
            elif line.startswith("-I"):
                self.jumps += [
                    (j.table, j.saved) for j in JUMPS if (j.table, f"-I {j.chain} {j.rule}") == (table, line)
                ]


class World:
    """A node in memory with a proxier, and Services to change."""

    def __init__(self, **config: object) -> None:
        self.now_s = 1000.0
        self.node, self.rules = FakeNode(), FakeRules()
        self.config, problems = parse_proxy_config({"clusterCIDR": "10.0.0.0/8", "mode": "ipvs", **config})
        assert not problems
        self.view = parse_node(node_object())
        self.proxier = IpvsProxier(self.node, self.rules, self.config.ipvs, clock=lambda: self.now_s)
        self._state = ProxyState(services={}, endpoints={})

    @property
    def settings(self) -> IpvsSettings:
        return self.proxier.make_settings(self.config, self.view)

    def sync(self, *endpoints: dict[str, object], **spec: object) -> IpvsSyncReport:
        """Sync Service web with these endpoints; nothing when there are none and no spec."""
        objects = [service("web", "172.30.0.41", **spec)] if endpoints or spec else []
        slices = [endpoint_slice("web", *endpoints, protocol=spec.get("protocol", "TCP"))] if endpoints else []
        state = state_of(objects, slices)
        changed = frozenset({*state.services, *self._state.services})
        self._state = state
        return self.proxier.sync(state, changed, self.settings)

    @property
    def real(self) -> dict[str, int]:
        """The real servers of the ClusterIP, with their weights."""
        return self.node.servers[WEB][1]


def both() -> tuple[dict[str, object], dict[str, object]]:
    return endpoint("10.180.0.1"), endpoint("10.180.1.1", "node2")


def test_first_sync_makes_everything() -> None:
    """Address, virtual server, real servers, set members, rules and settings are there after one sync."""
    world = World()
    report = world.sync(*both())
    assert report.full and not report.refused
    assert world.node.bound == {"172.30.0.41"}
    assert world.node.servers == {WEB: (Balancing("rr"), {LOCAL: 1, REMOTE: 1})}
    assert ("KUBE-CLUSTER-IP", "172.30.0.41,tcp:80") in world.node.members
    assert world.node.settings["vs/conntrack"] == "1" and "conf/all/arp_ignore" not in world.node.settings
    assert world.proxier.find_damage() == ""


def test_a_change_costs_what_changed() -> None:
    """A new endpoint is one real server: nothing is listed, no rule is written, nothing else is touched."""
    world = World()
    world.sync(*both())
    lists, payloads = world.node.lists, len(world.rules.payloads)
    report = world.sync(*both(), endpoint("10.180.1.2", "node2"))
    assert not report.full
    assert world.node.changes[-1].add_real == ((WEB, THIRD),)
    assert (len(world.node.changes[-1]), world.node.lists, len(world.rules.payloads)) == (1, lists, payloads)


def test_rules_are_written_when_a_set_gets_its_first_member() -> None:
    """The first NodePort brings its rule, the last one's removal takes it away."""
    world = World()
    world.sync(*both())
    assert "KUBE-NODE-PORT-TCP" not in world.rules.save()
    world.sync(*both(), node_port=30080)
    assert "--match-set KUBE-NODE-PORT-TCP dst" in world.rules.save()
    world.sync(*both())
    assert "KUBE-NODE-PORT-TCP" not in world.rules.save()


def test_removal_leaves_nothing() -> None:
    """When the last Service is deleted no address, server or member is left."""
    world = World()
    world.sync(*both(), node_port=30080, ingress=["5.6.7.8"], externalIPs=["192.168.99.1"])
    assert len(world.node.servers) == 4
    world.sync()
    assert (world.node.bound, world.node.servers, world.node.members) == (set(), {}, set())


def test_tcp_server_with_connections_goes_when_they_have_ended() -> None:
    """It gets weight 0 at once, is looked at every minute, and is deleted when its last connection has ended."""
    world = World()
    world.sync(*both())
    world.node.connections[WEB, REMOTE] = 2
    world.sync(endpoint("10.180.0.1"))
    assert world.real == {LOCAL: 1, REMOTE: 0}
    assert world.proxier.find_damage() == ""
    assert world.proxier.tend() == pytest.approx(CHECK_INTERVAL_S)
    world.now_s += CHECK_INTERVAL_S
    assert world.proxier.tend() == pytest.approx(CHECK_INTERVAL_S)
    assert world.real == {LOCAL: 1, REMOTE: 0}
    world.node.connections[WEB, REMOTE] = 0
    world.now_s += CHECK_INTERVAL_S
    assert world.proxier.tend() == float("inf")
    assert world.real == {LOCAL: 1} and world.proxier.retiring == ()


def test_tcp_server_without_connections_goes_at_once() -> None:
    """There is nothing to wait for."""
    world = World()
    world.sync(*both())
    world.sync(endpoint("10.180.0.1"))
    assert world.real == {LOCAL: 1}
    assert world.proxier.tend() == float("inf")


def test_udp_server_goes_at_once() -> None:
    """Its flows are no connections that could end."""
    world = World()
    world.sync(*both(), protocol="UDP")
    key = VirtualServer("udp", "172.30.0.41", 80)
    world.node.connections[key, REMOTE] = 7
    world.sync(endpoint("10.180.0.1"), protocol="UDP")
    assert world.node.servers[key][1] == {LOCAL: 1}


def test_endpoint_comes_back_while_it_drains() -> None:
    """It is deleted and added anew, with weight 1, and does not go later."""
    world = World()
    world.sync(*both())
    world.node.connections[WEB, REMOTE] = 2
    world.sync(endpoint("10.180.0.1"))
    world.sync(*both())
    assert world.node.changes[-1].renew_real == ((WEB, REMOTE),)
    assert world.real == {LOCAL: 1, REMOTE: 1}
    world.now_s += 3 * CHECK_INTERVAL_S
    world.node.connections.clear()
    world.proxier.tend()
    assert world.real == {LOCAL: 1, REMOTE: 1}


def test_restart_gives_kept_servers_their_weight_back() -> None:
    """What a killed kube-proxy left at weight 0 serves again if it is wanted, and goes on draining if not."""
    world = World()
    world.sync(*both())
    world.node.servers[WEB][1].update({LOCAL: 0, REMOTE: 0})
    world.node.connections[WEB, REMOTE] = 1
    world.proxier = IpvsProxier(world.node, world.rules, clock=lambda: world.now_s)
    world.sync(endpoint("10.180.0.1"))
    assert world.real == {LOCAL: 1, REMOTE: 0}
    assert world.proxier.retiring == ((WEB, REMOTE),)


def test_deleted_service_does_not_wait_for_connections() -> None:
    """Its virtual server goes with all real servers; nothing is left to look after."""
    world = World()
    world.sync(*both())
    world.node.connections[WEB, REMOTE] = 2
    world.sync(endpoint("10.180.0.1"))
    world.sync()
    assert world.node.servers == {} and world.proxier.retiring == ()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        pytest.param(lambda n, r: n.servers.clear(), "the virtual server tcp 172.30.0.41:80 is gone", id="ipvsadm -C"),
        pytest.param(lambda n, r: n.flush(["KUBE-CLUSTER-IP"]), "is gone from the set KUBE-CLUSTER-IP", id="ipset flush"),
        pytest.param(lambda n, r: n.sets.pop("KUBE-LOOP-BACK"), "the set KUBE-LOOP-BACK is gone", id="ipset destroy"),
        pytest.param(lambda n, r: n.bound.clear(), "172.30.0.41 is gone from kube-ipvs0", id="ip addr del"),
        pytest.param(lambda n, r: setattr(n, "bound", None), "the link kube-ipvs0 is gone", id="ip link del"),
        pytest.param(lambda n, r: n.servers[WEB][1].pop(LOCAL), f"real server {LOCAL} of tcp", id="ipvsadm -d"),
        pytest.param(lambda n, r: n.servers[WEB][1].update({LOCAL: 5}), "has another weight", id="ipvsadm -e -w 5"),
        pytest.param(lambda n, r: n.servers.update({WEB: (Balancing("lc"), n.servers[WEB][1])}), "another sch", id="ipvsadm -E"),
        pytest.param(lambda n, r: n.members.add(("KUBE-IPVS-IPS", "1.2.3.4")), "has 1.2.3.4", id="ipset add"),
        pytest.param(lambda n, r: r.chains["nat", "KUBE-SERVICES"].clear(), "KUBE-SERVICES of nat has 0 rules", id="iptables -F"),
        pytest.param(lambda n, r: r.jumps.clear(), "a jump is gone from nat", id="iptables -D"),
        pytest.param(lambda n, r: n.settings.update({"vs/conntrack": "0"}), "vs/conntrack is not 1", id="sysctl"),
    ],
)  # fmt: skip
def test_damage_is_seen_and_repaired(harm: object, words: str) -> None:
    """Whatever of ours somebody takes away is noticed, named, and back after the next full sync; the second time as well."""
    world = World()
    world.sync(*both())
    for _ in range(2):
        harm(world.node, world.rules)  # type: ignore[operator]
        assert words in world.proxier.find_damage()
        world.proxier.require_full()
        world.sync(*both())
        assert world.proxier.find_damage() == ""
        assert world.real == {LOCAL: 1, REMOTE: 1}


def test_new_address_of_the_node_gets_its_node_ports() -> None:
    """NodePorts answer on every address; one that appears is noticed with the next look."""
    world = World()
    world.sync(*both(), node_port=30080)
    new = parse_node(node_object()).internal_ip
    assert new is not None
    world.node.local |= {new + 7}
    assert f"addresses changed ({new + 7})" in world.proxier.find_damage()
    world.sync(*both(), node_port=30080)
    assert VirtualServer("tcp", str(new + 7), 30080) in world.node.servers


def test_excluded_virtual_servers_of_others_stay() -> None:
    """excludeCIDRs protects what nobody wants; without it a full sync deletes it, as upstream does."""
    theirs = VirtualServer("tcp", "198.51.100.9", 25)
    for excluded, stays in (["198.51.100.0/24"], True), ([], False):
        world = World(ipvs={"excludeCIDRs": excluded})
        world.node.servers[theirs] = (Balancing("wlc"), {"10.9.9.9:25": 3})
        world.sync(*both())
        assert (theirs in world.node.servers) is stays


def test_refused_service_port_leaves_others_alone() -> None:
    """A full set keeps one service port from its member: it is named with the reason, and tried again with the next sync."""
    world = World()
    world.node.broken.add(("KUBE-CLUSTER-IP", "172.30.0.41,tcp:80"))
    report = world.sync(*both())
    assert {str(name): reason for name, reason in report.refused.items()} == {
        "ns/web:p80": "could not add 172.30.0.41,tcp:80 to set KUBE-CLUSTER-IP: the set is full"
    }
    assert world.real == {LOCAL: 1, REMOTE: 1}
    world.node.broken.clear()
    assert world.sync(*both()).refused == {}
    assert world.proxier.find_damage() == ""


def test_partial_sync_that_fails_is_followed_by_a_full_one() -> None:
    """Somebody deleted the virtual server meanwhile: one look, and all is as it should be."""
    world = World()
    world.sync(*both())
    world.node.servers.clear()
    report = world.sync(*both(), endpoint("10.180.1.2", "node2"))
    assert report.full and report.partial_failed
    assert world.real == {LOCAL: 1, REMOTE: 1, THIRD: 1}


def test_failure_is_an_error_and_the_next_sync_is_full() -> None:
    """When the rules cannot be written nothing is lost: the next sync writes what is missing."""
    world = World()
    works, world.rules.apply = world.rules.apply, _refuse  # type: ignore[method-assign]
    with pytest.raises(KernelError, match="the lock is held"):
        world.sync(*both())
    world.rules.apply = works  # type: ignore[method-assign]
    assert world.sync(*both()).full
    assert world.proxier.find_damage() == ""


def _refuse(payload: str) -> None:
    raise KernelError("the lock is held")


def test_timeouts_and_strict_arp_come_from_the_configuration() -> None:
    """They are set with the first sync."""
    options = {"strictARP": True, "tcpTimeout": "10m", "udpTimeout": "5s", "scheduler": "mh"}
    world = World(ipvs=options)
    world.sync(*both())
    assert world.node.timeouts == (600, 0, 5)
    assert (world.node.settings["conf/all/arp_ignore"], world.node.settings["conf/all/arp_announce"]) == ("1", "2")
    assert world.node.servers[WEB][0] == Balancing("mh", 0, True)


def test_source_range_of_everything_is_two_halves() -> None:
    """A set cannot hold 0.0.0.0/0."""
    world = World()
    world.sync(*both(), ingress=["5.6.7.8"], loadBalancerSourceRanges=["0.0.0.0/0"])
    halves = {entry for name, entry in world.node.members if name == "KUBE-LOAD-BALANCER-SOURCE-CIDR"}
    assert halves == {"5.6.7.8,tcp:80,0.0.0.0/1", "5.6.7.8,tcp:80,128.0.0.0/1"}


def test_shared_address_stays_until_its_last_port_goes() -> None:
    """A ClusterIP with two ports is bound once, and unbound with the second."""
    world = World()
    ports = [service("web", "172.30.0.41"), service("other", "172.30.0.41", port=81)]
    state = state_of(ports, [])
    world.proxier.sync(state, frozenset(state.services), world.settings)
    fewer = state_of(ports[:1], [])
    world.proxier.sync(fewer, frozenset(state.services), world.settings)
    assert world.node.bound == {"172.30.0.41"}
    world.proxier.sync(state_of([], []), frozenset(state.services), world.settings)
    assert world.node.bound == set()
