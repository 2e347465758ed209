"""Random clusters through the real tools: accepted by both backends, nothing written twice, no trace of the order of events."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxy_support import NODE, endpoint, endpoint_slice, real_iptables, service, settings_of, without_counters

from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.iptables import IptablesSettings
from testbed.kernel.iptables import Backend, Iptables
from testbed.programs.proxy_iptables import IptablesProxier

pytestmark = pytest.mark.root

SEEDS = range(6)
Object = dict[str, Any]


def random_settings(chance: random.Random) -> IptablesSettings:
    return settings_of(
        {
            "clusterCIDR": chance.choice(["10.0.0.0/8", ""]),
            "iptables": {"masqueradeAll": chance.random() < 0.3, "localhostNodePorts": chance.random() < 0.7},
            "nodePortAddresses": chance.choice([[], ["primary"], ["192.168.0.0/24", "127.0.0.0/8"]]),
            "conntrack": {"tcpBeLiberal": chance.random() < 0.3},
        }
    )


def random_service(chance: random.Random, number: int) -> Object:
    """Return a Service of any kind; its name and addresses follow from its number."""
    outside = chance.random() < 0.6
    fields: Object = {"protocol": chance.choice(["TCP", "TCP", "UDP", "SCTP"]), "port_name": chance.choice(["p80", ""])}
    if outside:
        fields["node_port"] = 30000 + number
        fields["externalTrafficPolicy"] = chance.choice(["Cluster", "Local"])
        if chance.random() < 0.5:
            fields["ingress"] = [f"1.2.{number}.{tail}" for tail in range(1, chance.randint(2, 3))]
            if chance.random() < 0.5:
                fields["loadBalancerSourceRanges"] = chance.sample(
                    ["0.0.0.0/0", "203.0.113.0/25", "192.168.0.0/24", "10.1.2.3/32"], chance.randint(1, 3)
                )
            if fields["externalTrafficPolicy"] == "Local":
                fields["healthCheckNodePort"] = 32000 + number
    if chance.random() < 0.3:
        fields["externalIPs"] = [f"192.168.99.{number + 1}"]
    if chance.random() < 0.3:
        fields["sessionAffinity"] = "ClientIP"
    fields["internalTrafficPolicy"] = chance.choice(["Cluster", "Local"])
    return service(f"s{number}", f"172.30.2.{number + 1}", **fields)


def random_slice(chance: random.Random, obj: Object) -> Object:
    [port] = obj["spec"]["ports"]
    number = int(obj["metadata"]["name"][1:])
    found = []
    for tail in range(chance.randint(0, 4)):
        ready = chance.random() < 0.7
        serving, terminating = ready or chance.random() < 0.5, not ready and chance.random() < 0.5
        address, where = f"10.180.{number}.{tail + 1}", chance.choice([NODE, "node2"])
        found.append(endpoint(address, where, ready=ready, serving=serving, terminating=terminating))
    return endpoint_slice(f"s{number}", *found, port_name=port["name"], protocol=port["protocol"])


def comparable(saved: str) -> dict[tuple[str, str], list[str]]:
    """Return the rules of every chain. The order of rules between service ports is taken out: it has no meaning."""
    found: dict[tuple[str, str], list[str]] = {}
    table = ""
    for line in without_counters(saved).splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            found[table, line[1:].split(" ")[0]] = []
        elif line.startswith("-A"):
            found[table, line.split(" ")[1]].append(line)
    for (_, chain), rules in found.items():
        if chain in ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-EXTERNAL-SERVICES", "KUBE-PROXY-FIREWALL"):
            last = [rule for rule in rules if "must be the last rule" in rule]
            assert rules[len(rules) - len(last) :] == last
            rules.sort()
    return found


class World:
    """A kube-proxy without an API on a node of its own, and the objects it has heard of."""

    def __init__(self, iptables: Iptables, settings: IptablesSettings) -> None:
        self.iptables = iptables
        self.settings = settings
        self.tracker = ChangeTracker(NODE)
        self.proxier = IptablesProxier(iptables)

    def sync(self) -> str:
        """Return what was written."""
        state, changed = self.tracker.take()
        report = self.proxier.sync(state, changed, self.settings)
        assert report.refused == {}
        assert not report.partial_failed
        return report.payload.text


@pytest.fixture(params=list(Backend), ids=lambda backend: backend.value)
def two_nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Iptables, Iptables]]:
    """The tools of one backend in two namespaces."""
    with real_iptables(request.param, tmp_path) as one, real_iptables(request.param, tmp_path) as two:
        yield Iptables(one, request.param), Iptables(two, request.param)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_clusters(two_nodes: tuple[Iptables, Iptables], seed: int) -> None:
    """After any order of events the rules are those of a node that met the objects at once; syncing again writes nothing."""
    chance = random.Random(seed)
    settings = random_settings(chance)
    services = [random_service(chance, number) for number in range(12)]
    slices = [random_slice(chance, obj) for obj in services]
    busy, fresh = World(two_nodes[0], settings), World(two_nodes[1], settings)
    events: list[Any] = [(busy.tracker.set_service, obj) for obj in services]
    events += [(busy.tracker.set_slice, obj) for obj in slices]
    chance.shuffle(events)
    for event, obj in events:
        event(obj)
        if chance.random() < 0.3:
            busy.sync()
    for number in chance.sample(range(len(services)), 5):  # gone, or another for a while, and back again
        if chance.random() < 0.5:
            busy.tracker.delete_service("ns", f"s{number}")
        else:
            busy.tracker.set_service(random_service(chance, number))
        busy.tracker.set_slice(random_slice(chance, services[number]))
        if chance.random() < 0.7:
            busy.sync()
        busy.tracker.set_service(services[number])
        busy.tracker.set_slice(slices[number])
    busy.sync()
    fresh.tracker.replace_services(services)
    fresh.tracker.replace_slices(slices)
    assert fresh.sync() != ""
    assert comparable(busy.iptables.save()) == comparable(fresh.iptables.save())
    for world in (busy, fresh):
        assert world.sync() == ""
        assert world.proxier.find_damage() == ""
        world.proxier.require_full()
        assert world.sync() == ""
    # A kube-proxy that starts anew on this node finds nothing to do either.
    again = World(busy.iptables, settings)
    again.tracker.replace_services(services)
    again.tracker.replace_slices(slices)
    assert again.sync() == ""
    for obj in services:
        busy.tracker.delete_service("ns", obj["metadata"]["name"])
    busy.sync()
    assert " ns/s" not in busy.iptables.save() and "KUBE-SVC-" not in busy.iptables.save()


def test_hundreds_of_services_come_and_go_at_once(two_nodes: tuple[Iptables, Iptables]) -> None:
    """So many that they take several transactions: the rules are the same, and all of them go again."""
    chance = random.Random(7)
    world = World(two_nodes[0], settings_of())
    keep = [random_service(chance, number) for number in range(3)]
    world.tracker.replace_services(keep)
    world.tracker.replace_slices([])
    world.sync()
    before = comparable(world.iptables.save())
    many = [service(f"m{number}", f"172.30.{3 + number // 200}.{number % 200 + 1}") for number in range(350)]
    for number, obj in enumerate(many):
        world.tracker.set_service(obj)
        world.tracker.set_slice(endpoint_slice(f"m{number}", endpoint(f"10.9.{number // 200}.{number % 200 + 1}")))
    world.sync()
    assert sum(chain.startswith("KUBE-SEP-") for _, chain in comparable(world.iptables.save())) == 350
    assert world.proxier.find_damage() == ""
    for number in range(len(many)):
        world.tracker.delete_service("ns", f"m{number}")
        world.tracker.delete_slice("ns", f"m{number}-x")
    world.sync()
    assert comparable(world.iptables.save()) == before
    assert world.proxier.find_damage() == ""
