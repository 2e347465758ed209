"""Speakers on a pretended LAN, with a clock by hand: who announces what, when, and what happens as nodes come and go."""

# ruff: noqa: E501 (whole texts in one line)

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Interface
from typing import Any

import pytest
from openelb_support import eip, lb

from testbed.controllers.openelb.names import EIPS
from testbed.dataplane.arp import AddressFrames
from testbed.dataplane.membership import Heartbeat
from testbed.model.objects import Object
from testbed.programs.kube_proxy import Changed, Listed
from testbed.programs.openelb.flags import Settings, SpeakerFlags
from testbed.programs.openelb.gossip import Heard
from testbed.programs.openelb.speaker import (
    CONFIGMAPS,
    ENDPOINTS,
    NODES,
    PODS,
    RESOURCES,
    SERVICES,
    Built,
    Foreign,
    SpeakerLoop,
)

NAMES = ("openeuler-1", "openeuler-2", "openeuler-3")
LB = IPv4Address("192.168.93.231")  # openeuler-2's, then 3's, then 1's


class FakeResponder:
    """A table of announced addresses, and the gratuitous pairs that were sent."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.table: set[IPv4Address] = set()

    mac = property(lambda self: f"0a:58:c0:a8:5d:{10 + self._node.number:02x}")
    announced = property(lambda self: frozenset(self.table))

    def announce(self, address: IPv4Address, frames: AddressFrames) -> None:
        assert frames.reply == b"reply" and address not in self.table
        self.table.add(address)
        self.tell_everybody(address)

    def tell_everybody(self, address: IPv4Address) -> None:
        self._node.lan.gratuitous.append((round(self._node.lan.now_s, 3), self._node.name, address))

    def withdraw(self, address: IPv4Address) -> None:
        self.table.remove(address)

    def probe(self, address: IPv4Address) -> None:
        for mac in self._node.lan.answers(self._node, address):
            self._node.deliver(Foreign(address, mac))

    def close(self) -> None:
        self.table.clear()


class Node:
    """A node with a speaker on it. Its links are eth33 and lo; frames are built at once unless ``builds`` is False."""

    def __init__(self, lan: Lan, number: int, flags: dict[str, Any], links: dict[str, str]) -> None:
        self.lan, self.number, self.name = lan, number, f"openeuler-{number}"
        self.flags, self.links, self.builds = flags, links, True
        self.boots = 0
        self.is_up = self.is_linked = True
        self.start()

    def start(self) -> None:
        """Start a speaker, which knows nothing."""
        self.boots += 1
        self.responders: dict[str, FakeResponder] = {}
        self.inbox: list[Any] = []
        flags = SpeakerFlags(node=self.name, secret="s", **{"layer2_enabled": True, **self.flags})
        self.loop = SpeakerLoop(
            flags,
            self,
            boot=self.boots,
            send=self._send,
            tell=self._tell,
            log=self.lan.log.append,
            now_s=self.lan.now_s,
        )
        for resource in RESOURCES:
            self.deliver(Listed(resource, tuple(self.lan.objects[resource].values())))
        self.is_up = True

    # what the speaker asks of its node

    def addresses(self, link: str) -> tuple[IPv4Interface, ...]:
        return (IPv4Interface(self.links[link]),) if link in self.links else ()

    def towards(self, destination: IPv4Address) -> str:
        return next((link for link, at in self.links.items() if destination in IPv4Interface(at).network), "")

    def respond(self, link: str) -> FakeResponder:
        self.responders[link] = FakeResponder(self)
        return self.responders[link]

    def build(self, link: str, mac: str, addresses: tuple[IPv4Address, ...]) -> None:
        if self.builds:
            frames = AddressFrames(b"reply", (b"q", b"a"), b"probe")
            self.deliver(Built(link, {address.packed: frames for address in addresses}))

    def _send(self, heartbeat: Heartbeat, addresses: Iterable[str]) -> None:
        for address in addresses:
            self.lan.carry(self, heartbeat, address)

    def _tell(self, obj: Object, kind: str, reason: str, message: str) -> None:
        self.lan.events.append((f"{obj['kind']}/{obj['metadata']['name']}", kind, reason, message))

    # what happens to it

    @property
    def address(self) -> str:
        return f"192.168.93.{10 + self.number}"

    def deliver(self, message: Any) -> None:
        self.inbox.append(message)

    def turn(self) -> None:
        while self.inbox:
            self.loop.accept(self.inbox.pop(0), self.lan.now_s)
        self.loop.step(self.lan.now_s)

    @property
    def announces(self) -> set[IPv4Address]:
        return set().union(*(responder.table for responder in self.responders.values()))


class Lan:
    """Three nodes, the objects that all of them see, and the time."""

    def __init__(self, links: dict[int, dict[str, str]] | None = None, **flags: Any) -> None:
        self.now_s = 100.0
        self.log: list[str] = []
        self.events: list[tuple[str, str, str, str]] = []
        self.gratuitous: list[tuple[float, str, IPv4Address]] = []
        self.answers: Callable[[Node, IPv4Address], list[str]] = lambda _node, _address: []
        self.objects: dict[str, dict[str, Object]] = {resource: {} for resource in RESOURCES}
        for number in (1, 2, 3):
            self.objects[NODES][f"openeuler-{number}"] = {"metadata": {"name": f"openeuler-{number}"}}
            self.objects[PODS][f"speaker-{number}"] = {
                "metadata": {"name": f"speaker-{number}", "namespace": "openelb-system"},
                "spec": {"nodeName": f"openeuler-{number}"},
                "status": {"podIP": f"192.168.93.{10 + number}", "phase": "Running"},
            }
        given = links or {}
        self.nodes = {
            number: Node(self, number, flags, given.get(number, {"eth33": f"192.168.93.{10 + number}/24", "lo": "127.0.0.1/8"}))
            for number in (1, 2, 3)
        }  # fmt: skip

    def carry(self, sender: Node, heartbeat: Heartbeat, address: str) -> None:
        for node in self.nodes.values():
            if node.address == address and node.is_up and node.is_linked and sender.is_linked and node is not sender:
                node.deliver(Heard(heartbeat, sender.address))

    def put(self, resource: str, *objects: Object) -> None:
        """Create or change objects; every node that runs sees them."""
        for obj in objects:
            self.objects[resource][obj["metadata"]["name"]] = obj
            for node in self.nodes.values():
                node.deliver(Changed(resource, False, obj))

    def drop(self, resource: str, name: str) -> None:
        obj = self.objects[resource].pop(name)
        for node in self.nodes.values():
            node.deliver(Changed(resource, True, obj))

    def pass_time(self, seconds: float) -> None:
        """Let time pass in steps of 50 ms; nodes that are up take their turns."""
        for _ in range(round(seconds / 0.05)):
            self.now_s += 0.05
            for node in self.nodes.values():
                if node.is_up:
                    node.turn()
                    node.turn()

    def owners(self, address: IPv4Address = LB) -> str:
        """Return the numbers of the nodes that would answer for an address; those that nobody hears in brackets."""
        found = ""
        for number, node in self.nodes.items():
            if address in node.announces and node.is_up:
                found += str(number) if node.is_linked else f"({number})"
        return found

    def use(self, used: dict[str, str] | None = None, **spec: Any) -> None:
        """Create the pool, with these addresses used."""
        self.put(EIPS, {**eip(**spec), "status": {"used": used if used is not None else {str(LB): "dev/web"}}})

    def told(self, reason: str) -> list[str]:
        return [message for _, _, told, message in self.events if told == reason]


@pytest.fixture
def lan() -> Lan:
    """Three speakers that know each other, a Service, and its address."""
    made = Lan()
    made.pass_time(3.0)
    made.put(SERVICES, lb())
    made.use()
    made.pass_time(1.0)
    return made


def test_one_node_announces(lan: Lan) -> None:
    """The first by the formula, with one gratuitous pair; one event tells the candidates."""
    assert lan.owners() == "2"
    assert [name for _, name, _ in lan.gratuitous] == ["openeuler-2"]
    assert lan.told("SetBalancer") == ["success to add nexthops [openeuler-1, openeuler-2, openeuler-3]"]
    assert lan.told("ConfigSpeaker") == ["config openelb layer2 speaker successfully"] * 3


def test_addresses_are_shared_out(lan: Lan) -> None:
    """The eight addresses of the tutorial's pool are announced as upstream would."""
    lan.use({f"192.168.93.{number}": "dev/web" for number in range(231, 239)})
    lan.pass_time(0.1)
    assert "".join(lan.owners(IPv4Address(f"192.168.93.{number}")) for number in range(231, 239)) == "21211331"


@pytest.mark.parametrize("failure", ["process stops", "link is cut"])
def test_the_announcing_node_fails(lan: Lan, failure: str) -> None:
    """The next one takes over within 2 s, with one gratuitous pair; nothing else changes."""
    failed, began_s = lan.nodes[2], lan.now_s
    failed.is_up, failed.is_linked = failure != "process stops", failure != "link is cut"
    lan.pass_time(2.0)
    assert lan.owners() in ("3", "(2)3")
    ((when_s, name, _),) = lan.gratuitous[1:]
    assert name == "openeuler-3" and when_s - began_s <= 2.0
    assert lan.told("SetBalancer")[-1] == "success to add nexthops [openeuler-1, openeuler-3]"


def test_another_node_fails(lan: Lan) -> None:
    """An address whose node lives stays where it is, and no frame is sent for it."""
    lan.nodes[1].is_up = False
    lan.pass_time(5.0)
    assert lan.owners() == "2" and len(lan.gratuitous) == 1


def test_a_cut_off_node_comes_back(lan: Lan) -> None:
    """Alone it thinks that it owns everything; heard again, it is the only owner within 2 s, and tells the LAN so."""
    lan.nodes[2].is_linked = False
    lan.pass_time(10.0)
    assert lan.owners() == "(2)3"
    lan.nodes[2].is_linked = True
    sent = len(lan.gratuitous)
    lan.pass_time(2.0)
    assert lan.owners() == "2"
    assert "openeuler-2" in [name for _, name, _ in lan.gratuitous[sent:]], "clients still have the other's MAC"


def test_a_loser_is_cut_off_and_comes_back(lan: Lan) -> None:
    """Alone it announces what is not its own; heard again, it withdraws."""
    lan.nodes[1].is_linked = False
    lan.pass_time(5.0)
    assert lan.owners() == "(1)2"
    lan.nodes[1].is_linked = True
    lan.pass_time(2.0)
    assert lan.owners() == "2"


def test_a_speaker_that_was_stopped_goes_on(lan: Lan) -> None:
    """To the others it was dead: it tells the LAN again that the address is its own, and is the only one that answers."""
    lan.nodes[2].is_up = False
    lan.pass_time(10.0)
    assert lan.owners() == "3"
    lan.nodes[2].is_up = True
    sent = len(lan.gratuitous)
    lan.pass_time(2.0)
    assert lan.owners() == "2" and "openeuler-2" in [name for _, name, _ in lan.gratuitous[sent:]]


def test_a_new_speaker_waits_for_the_others(lan: Lan) -> None:
    """Started anew it knows nobody, and would win everything: it announces only what is its own, and only when it can."""
    lan.nodes[1].start()
    lan.pass_time(0.1)
    assert lan.owners() == "2"
    lan.pass_time(3.0)
    assert lan.owners() == "2" and len(lan.gratuitous) == 1


def test_a_speaker_that_starts_again_is_no_candidate_yet(lan: Lan) -> None:
    """It says so: as long as it has no frames to announce with, the next one does."""
    lan.nodes[2].builds = False
    lan.nodes[2].start()
    lan.pass_time(1.0)
    assert lan.owners() == "3"
    lan.nodes[2].builds = True
    lan.nodes[2].build("eth33", "", (LB,))
    lan.pass_time(1.0)
    assert lan.owners() == "2"


def test_a_released_address(lan: Lan) -> None:
    """Nobody answers any more; an event says so."""
    lan.use({})
    lan.pass_time(0.1)
    assert lan.owners() == "" and lan.told("DelBalancer") == ["success to withdraw announcement for service"]


@pytest.mark.parametrize("end", ["deleted", "being deleted"])
def test_a_pool_that_goes(lan: Lan, end: str) -> None:
    """Its addresses are withdrawn everywhere, and the links are let go."""
    if end == "deleted":
        lan.drop(EIPS, "eip-pool")
    else:
        dying = eip()
        dying["metadata"]["deletionTimestamp"] = "2024-01-01T00:00:00Z"
        lan.put(EIPS, {**dying, "status": {"used": {str(LB): "dev/web"}}})
    lan.pass_time(0.1)
    assert lan.owners() == ""


def endpoints(*nodes: int) -> Object:
    addresses = [{"ip": f"10.0.0.{number}", "nodeName": f"openeuler-{number}"} for number in nodes]
    subsets = [{"addresses": addresses}] if nodes else []
    return {"metadata": {"name": "web", "namespace": "dev"}, "subsets": subsets}


def test_local_traffic_policy(lan: Lan) -> None:
    """The owner is always a node with a ready pod; it moves with the pod; without pods nobody answers, and an event says so."""
    lan.put(SERVICES, lb(externalTrafficPolicy="Local"))
    lan.pass_time(0.1)
    assert lan.owners() == ""
    assert lan.told("SetBalancer")[-1] == "no available nodes for service ip 192.168.93.231:dev/web"
    for nodes, owner in (((1,), "1"), ((1, 3), "3"), ((3,), "3"), ((2, 3), "2"), ((), "")):
        lan.put(ENDPOINTS, endpoints(*nodes))
        lan.pass_time(0.1)
        assert lan.owners() == owner
    lan.put(SERVICES, lb())
    lan.pass_time(0.1)
    assert lan.owners() == "2"


def test_a_link_that_one_node_does_not_have() -> None:
    """It says why, the others know within moments, and the address is announced by a node that can."""
    lan = Lan(links={2: {"eth0": "192.168.93.12/24"}})
    lan.put(SERVICES, lb())
    lan.use()
    lan.pass_time(3.0)
    assert lan.owners() == "3"
    assert lan.told("ConfigSpeakerFailed") == ["openeuler-2: route ip+net: no such network interface: eth33"]
    lan.nodes[2].links["eth33"] = "192.168.93.12/24"
    lan.pass_time(3.0)
    assert lan.owners() == "2", "a link that appears is found"


def test_a_link_that_only_one_node_has() -> None:
    """That node announces, whatever the formula says; when it is gone nobody does, and nobody takes over in vain."""
    lan = Lan(links={1: {"eth0": "192.168.93.11/24"}, 2: {"eth0": "192.168.93.12/24"}})
    lan.put(SERVICES, lb())
    lan.use()
    lan.pass_time(3.0)
    assert lan.owners() == "3" and len(lan.told("ConfigSpeakerFailed")) == 2
    lan.nodes[3].is_up = False
    lan.pass_time(3.0)
    assert lan.owners() == ""
    assert lan.told("SetBalancer")[-1] == "no available nodes for service ip 192.168.93.231:dev/web"


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        pytest.param({"address": "10.9.9.0/29"}, "eth33's ip and the eip[10.9.9.0-10.9.9.7] are not in the same network segment", id="outside the subnet"),
        pytest.param({"address": "192.168.93.250-192.168.94.2"}, "eth33's ip and the eip[192.168.93.250-192.168.94.2] are not in the same network segment", id="one end outside"),
        pytest.param({"interface": "eth9"}, "route ip+net: no such network interface: eth9", id="no such link"),
        pytest.param({"interface": "lo"}, "invalid interface lo", id="lo"),
        pytest.param({"interface": "can_reach:127.0.0.9"}, "invalid interface lo", id="a route over lo"),
        pytest.param({"interface": "can_reach:8.8.8.8"}, "no route to 8.8.8.8", id="no route"),
        pytest.param({"interface": "can_reach:x"}, "Expected 4 octets in 'x'", id="no address"),
        pytest.param({"interface": "via:1.2.3.4"}, "invalid interface string, now only support can_reach", id="another method"),
        pytest.param({"address": "fd00::1"}, "this speaker announces IPv4 addresses only, by ARP; NDP is not there yet", id="IPv6"),
    ],
)  # fmt: skip
def test_pools_that_cannot_be_announced(spec: dict[str, Any], text: str) -> None:
    """Each node says why, once, on the Eip; nobody answers."""
    lan = Lan()
    lan.put(SERVICES, lb())
    lan.use({str(spec.get("address", LB)).split("-")[0].split("/")[0]: "dev/web"}, **spec)
    lan.pass_time(6.0)
    assert sorted(lan.told("ConfigSpeakerFailed")) == [f"{name}: {text}" for name in NAMES]
    assert all(node.announces == set() for node in lan.nodes.values())


def test_can_reach() -> None:
    """The link of the route to an address."""
    lan = Lan()
    lan.put(SERVICES, lb())
    lan.use(interface="can_reach:192.168.93.100")
    lan.pass_time(3.0)
    assert lan.owners() == "2" and set(lan.nodes[2].responders) == {"eth33"}


def test_layer2_that_is_switched_off() -> None:
    """Announced all the same, with a warning on the Eip; strictUpstream shows what 0.6 does, and can be taken back."""
    lan = Lan(layer2_enabled=False)
    lan.put(SERVICES, lb())
    lan.use()
    lan.pass_time(3.0)
    assert lan.owners() == "2"
    (warning,) = set(lan.told("Layer2Disabled"))
    assert (
        "--enable-layer2=false" in warning
        and 'strictUpstream: "true" in ConfigMap openelb-system/openelb-testbed' in warning
    )
    lan.put(CONFIGMAPS, settings(strictUpstream="true"))
    lan.pass_time(0.1)
    assert lan.owners() == "" and "no registered speaker:[layer2] eip:[eip-pool]" not in lan.events
    lan.drop(CONFIGMAPS, "openelb-testbed")
    lan.pass_time(0.1)
    assert lan.owners() == "2"


def settings(**values: str) -> Object:
    return {"metadata": {"name": "openelb-testbed", "namespace": "openelb-system"}, "data": values}


def test_strict_upstream_has_two_owners() -> None:
    """As 0.6: who has announced an address once never withdraws it while it is used; the first comes back, and both answer."""
    lan = Lan(settings=Settings(is_strict=True))
    lan.put(SERVICES, lb())
    lan.use()
    lan.pass_time(3.0)
    lan.nodes[2].is_linked = False
    lan.pass_time(3.0)
    lan.nodes[2].is_linked = True
    lan.pass_time(3.0)
    assert lan.owners() == "23"
    lan.use({})
    lan.pass_time(0.1)
    assert lan.owners() == ""


def test_strict_upstream_elects_who_cannot() -> None:
    """As 0.6: the node without the link wins, and nobody answers."""
    lan = Lan(links={2: {"eth0": "192.168.93.12/24"}}, settings=Settings(is_strict=True))
    lan.put(SERVICES, lb())
    lan.use()
    lan.pass_time(5.0)
    assert lan.owners() == ""


def test_upstreams_timings() -> None:
    """A failed node is noticed after 5 to 8 s, as with memberlist."""
    lan = Lan(settings=Settings(timings=None))
    lan.put(SERVICES, lb())
    lan.use()
    lan.pass_time(3.0)
    began_s = lan.now_s
    lan.nodes[2].is_up = False
    lan.pass_time(10.0)
    assert lan.owners() == "3" and 5.0 <= lan.gratuitous[-1][0] - began_s <= 8.0


def test_timings_can_be_set(lan: Lan) -> None:
    """By the ConfigMap, while the speakers run; what makes no sense is told and changes nothing."""
    lan.put(CONFIGMAPS, settings(heartbeatInterval="1s", deadAfter="10s"))
    lan.pass_time(3.0)
    lan.nodes[2].is_up = False
    lan.pass_time(8.0)
    assert lan.owners() == ""
    lan.pass_time(3.0)
    assert lan.owners() == "3"
    lan.put(CONFIGMAPS, settings(deadAfter="soon"))
    lan.pass_time(0.1)
    assert (
        lan.told("InvalidSettings")[0]
        == "deadAfter: 'soon' is not a duration such as 500ms, 5s or 1m; everything stays as it was"
    )


def test_who_else_answers(lan: Lan) -> None:
    """The owner asks now and then; MACs that answer beside it are named in one event, until they are others."""
    lan.answers = lambda node, _address: [
        f"0a:58:c0:a8:5d:{10 + number:02x}" for number in (1, 3) if number != node.number
    ]
    lan.pass_time(30.0)
    (text,) = set(lan.told("ForeignARP"))
    assert (
        "192.168.93.231, which openeuler-2 (0a:58:c0:a8:5d:0c) announces, are answered by 0a:58:c0:a8:5d:0b and 0a:58:c0:a8:5d:0d too"
        in text
    )
    assert "ipvs.strictARP" in text and len(lan.told("ForeignARP")) == 1
    lan.answers = lambda _node, _address: []
    lan.pass_time(40.0)
    assert "192.168.93.231: nobody else answers any more" in lan.log
    assert len(lan.told("ForeignARP")) == 1


def test_an_address_that_changes_hands_is_no_fault(lan: Lan) -> None:
    """While a node comes back two may answer for a moment; nobody is told."""
    lan.answers = lambda node, address: [
        other.responders["eth33"].mac for other in lan.nodes.values()
        if other is not node and other.is_linked and node.is_linked and address in other.announces
    ]  # fmt: skip
    for _ in range(3):
        lan.nodes[2].is_linked = False
        lan.pass_time(7.0)
        lan.nodes[2].is_linked = True
        lan.pass_time(7.0)
    assert lan.told("ForeignARP") == [] and lan.owners() == "2"


def test_random_failures_end_with_one_owner() -> None:
    """Whatever fails and comes back in whichever order: 3 s after the last change each address has its one right owner."""
    import random

    chance = random.Random(3)
    lan = Lan()
    lan.put(SERVICES, lb())
    lan.use({f"192.168.93.{number}": "dev/web" for number in range(231, 239)})
    lan.pass_time(3.0)
    for _ in range(40):
        node = lan.nodes[chance.choice((1, 2, 3))]
        match chance.randrange(4):
            case 0:
                node.is_linked = not node.is_linked
            case 1:
                node.is_up = not node.is_up
            case 2:
                node.start()
            case 3:
                lan.pass_time(chance.random() * 4)
    for node in lan.nodes.values():
        node.is_linked = node.is_up = True
    lan.pass_time(3.0)
    assert "".join(lan.owners(IPv4Address(f"192.168.93.{number}")) for number in range(231, 239)) == "21211331"
