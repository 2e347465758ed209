"""Packets tied into connections across translations, and what is told about each: packets and conntrack entries in, words out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from capture_support import key, port_unreachable, record, tcp, udp

from testbed.capture.journeys import ANSWER_WITHIN_NS, INBOUND, OUTBOUND, Connection, Sighting, Tracker
from testbed.capture.names import Directory
from testbed.capture.packets import ACK, RST, SYN, read_packet
from testbed.capture.points import Point
from testbed.capture.story import Storyteller
from testbed.manifests import find_topology, load_topology
from testbed.model.flows import ICMP, TCP, UDP, ConntrackEntry, read_key, reverse

CLIENT, NODE_PORT, MASQUERADED, POD = (
    "192.168.93.100:40000",
    "192.168.93.11:30888",
    "192.168.93.11:50000",
    "10.244.2.2:80",
)
POINTS = [Point(place=place, interface=interface) for place, interface in (
    ("client", "eth0"), ("node1", "eth0"), ("node2", "eth0"), ("node2", "cni0"), ("dev/web-1", "eth0"), ("node3", "eth0"),
)]  # fmt: skip
AT_CLIENT, AT_NODE1, AT_NODE2, AT_BRIDGE, AT_POD, AT_NODE3 = range(6)
PODS = [{
    "metadata": {"namespace": "dev", "name": "web-1"}, "spec": {"nodeName": "node2"},
    "status": {"phase": "Running", "podIP": "10.244.2.2"},
}]  # fmt: skip
SERVICES = [
    {
        "metadata": {"namespace": "dev", "name": "web"},
        "spec": {"clusterIP": "10.96.1.10", "ports": [{"name": "http", "port": 80, "nodePort": 30888}]},
    }
]  # fmt: skip
NODE1_ENTRY = ConntrackEntry(key(TCP, CLIENT, NODE_PORT), key(TCP, POD, MASQUERADED))
NODE2_ENTRY = ConntrackEntry(key(TCP, MASQUERADED, POD), key(TCP, POD, MASQUERADED))
S, SA = SYN, SYN | ACK


class Capture:
    """A tracker, and what its packets turned out to be."""

    def __init__(self) -> None:
        self.tracker = Tracker()
        self.sightings: list[Sighting | None] = []
        directory = Directory(load_topology(find_topology("three-nodes")), PODS, SERVICES)
        self.storyteller = Storyteller(POINTS, directory)

    def see(self, time_us: float, point: int, frame: bytes, direction: int = 0) -> Connection:
        sighting = self.tracker.see(record(time_us, point, frame), direction)
        self.sightings.append(sighting)
        assert sighting is not None
        return sighting.connection

    def way_there(self, start_us: float = 0.0, sequence: int = 1000, ip_id: int = 7) -> list[Connection]:
        """A SYN from the client to the NodePort of node1, on to the pod on node2."""
        before = tcp(CLIENT, NODE_PORT, S, sequence=sequence, ip_id=ip_id)
        after = tcp(MASQUERADED, POD, S, sequence=sequence, ip_id=ip_id)
        return [
            self.see(start_us + 0, AT_CLIENT, before, OUTBOUND), self.see(start_us + 10, AT_NODE1, before, INBOUND),
            self.see(start_us + 50, AT_NODE1, after, OUTBOUND), self.see(start_us + 60, AT_NODE2, after, INBOUND),
            self.see(start_us + 65, AT_BRIDGE, after, OUTBOUND), self.see(start_us + 70, AT_POD, after, INBOUND),
        ]  # fmt: skip

    def way_back(self, start_us: float = 100.0, sequence: int = 1000) -> list[Connection]:
        answer = {"flags": SA, "sequence": 5000, "acknowledged": sequence + 1, "ip_id": 0}
        before, after = tcp(POD, MASQUERADED, **answer), tcp(NODE_PORT, CLIENT, **answer)
        return [
            self.see(start_us + 0, AT_POD, before, OUTBOUND), self.see(start_us + 5, AT_BRIDGE, before, INBOUND),
            self.see(start_us + 10, AT_NODE2, before, OUTBOUND), self.see(start_us + 15, AT_NODE1, before, INBOUND),
            self.see(start_us + 20, AT_NODE1, after, OUTBOUND), self.see(start_us + 25, AT_CLIENT, after, INBOUND),
        ]  # fmt: skip

    def finished(self, now_us: float = 0.0) -> list[Connection]:
        return list(self.tracker.take_finished(round(now_us * 1000)))


@pytest.fixture
def capture() -> Capture:
    return Capture()


# ── one connection ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("nodes", [["node1", "node2"], ["node2", "node1"], ["node1"], []])
def test_a_translated_connection_is_one(capture: Capture, nodes: list[str]):
    """All sightings are one connection, whatever conntrack has told: of both nodes, of the translating one, or nothing.

    Without an entry the SYN is known by its sequence number, and the answer by what it acknowledges.
    """
    for node in nodes:
        capture.tracker.add_entry(node, NODE1_ENTRY if node == "node1" else NODE2_ENTRY)
    seen = {*capture.way_there(), *capture.way_back()}
    assert len(seen) == 1
    (connection,) = capture.finished()
    assert [(p.point, p.direction) for p in connection.way] == [
        (AT_CLIENT, OUTBOUND), (AT_NODE1, INBOUND), (AT_NODE1, OUTBOUND), (AT_NODE2, INBOUND), (AT_BRIDGE, OUTBOUND),
        (AT_POD, INBOUND),
    ]  # fmt: skip
    assert [p.point for p in connection.answer] == [AT_POD, AT_BRIDGE, AT_NODE2, AT_NODE1, AT_NODE1, AT_CLIENT]


def test_an_entry_that_comes_later_ties_what_was_two(capture: Capture):
    """A datagram without identification is tied as soon as conntrack says how it was translated."""
    first = capture.see(0, AT_CLIENT, udp(CLIENT, NODE_PORT, b"?", ip_id=0))
    second = capture.see(50, AT_NODE2, udp(MASQUERADED, POD, b"?", ip_id=0))
    assert first is not second
    capture.tracker.add_entry("node1", ConntrackEntry(key(UDP, CLIENT, NODE_PORT), key(UDP, POD, MASQUERADED)))
    assert capture.see(60, AT_NODE2, udp(MASQUERADED, POD, b"?", ip_id=0)) is first


def test_datagrams_are_tied_without_conntrack_by_what_translation_leaves(capture: Capture):
    """The same identification, length and payload at another point is the same datagram; another payload is not."""
    first = capture.see(0, AT_CLIENT, udp(CLIENT, NODE_PORT, b"question", ip_id=77))
    assert capture.see(50, AT_NODE2, udp(MASQUERADED, POD, b"question", ip_id=77)) is first
    assert capture.see(55, AT_NODE2, udp("192.168.93.11:50001", POD, b"other one", ip_id=77)) is not first


def test_a_port_that_is_used_again_is_another_connection(capture: Capture):
    """A SYN with another sequence number begins the next connection; with conntrack, once it has forgotten the first."""
    capture.tracker.add_entry("node1", NODE1_ENTRY)
    first = capture.way_there()[0]
    capture.way_back()
    capture.tracker.end_entry("node1", NODE1_ENTRY, 200_000)
    capture.tracker.add_entry("node1", NODE1_ENTRY)
    late = capture.see(300, AT_CLIENT, tcp(CLIENT, NODE_PORT, ACK, sequence=1001))
    assert late is first, "a packet that was held back belongs to the connection that has ended"
    second = {*capture.way_there(1000, sequence=9000), *capture.way_back(1100, sequence=9000)}
    assert len(second) == 1 and first not in second
    assert [connection.number for connection in capture.finished()] == [1, 2]


def test_a_syn_sent_again_does_not_make_the_way_longer(capture: Capture):
    """The way is that of the first packet; the others are counted."""
    capture.see(0, AT_CLIENT, tcp(CLIENT, NODE_PORT, S, ip_id=1))
    connection = capture.see(1_000_000, AT_CLIENT, tcp(CLIENT, NODE_PORT, S, ip_id=2))
    assert len(connection.way) == 1 and connection.resent == 1
    told = capture.finished(2_100_000)
    assert told == [connection]
    assert capture.storyteller.outcome(connection) == "no answer, sent 2 times: last seen at client:eth0"


def test_a_connection_is_told_once_when_its_answer_is_back_where_it_began(capture: Capture):
    """Not before, unless it stays without an answer for a second of packets' time."""
    capture.tracker.add_entry("node1", NODE1_ENTRY)
    capture.way_there()
    assert capture.finished(500) == []
    capture.way_back()
    assert len(capture.finished(500)) == 1
    assert capture.finished(ANSWER_WITHIN_NS) == []
    other = capture.see(0, AT_CLIENT, tcp("192.168.93.100:41000", NODE_PORT, S, sequence=3))
    assert capture.finished(ANSWER_WITHIN_NS / 1000 + 1) == [other]


def test_packets_of_no_flow_are_left_alone(capture: Capture):
    """ARP, later fragments and cut frames belong to nobody."""
    arp = b"\xff" * 6 + b"\2" * 6 + b"\x08\x06" + bytes(28)
    fragment = bytearray(udp(CLIENT, POD, b"rest"))
    fragment[20:22] = b"\0\x10"
    for data in (arp, bytes(fragment), udp(CLIENT, POD, b"")[:30], b""):
        assert capture.tracker.see(record(0, 0, data), 0) is None


def test_what_has_ended_is_forgotten_after_a_while(capture: Capture):
    """A tracker that runs for hours holds the keys of living connections only."""
    for number in range(100):
        entry = ConntrackEntry(key(TCP, f"10.0.0.1:{number + 1}", POD), key(TCP, POD, f"10.0.0.1:{number + 1}"))
        capture.tracker.add_entry("node1", entry)
        capture.tracker.end_entry("node1", entry, 0)
    capture.tracker.forget_ended(60 * 10**9)
    assert not capture.tracker._by_key


# ── what is told ────────────────────────────────────────────────────────────────────────────────────────────────────

TOLD = """\
connection 1 (TCP): client → NodePort 30888 of dev/web:http at node1 → dev/web-1 on node2
  answered in 125.0 µs
  SYN
          0.0 µs             client:eth0     out  192.168.93.100:40000 → 192.168.93.11:30888
         10.0 µs   +10.0 µs  node1:eth0       in  192.168.93.100:40000 → 192.168.93.11:30888
                             node1:               DNAT to 10.244.2.2:80 (dev/web-1), masqueraded as 192.168.93.11:50000
         50.0 µs   +40.0 µs  node1:eth0      out  192.168.93.11:50000 → 10.244.2.2:80
         60.0 µs   +10.0 µs  node2:eth0       in  192.168.93.11:50000 → 10.244.2.2:80
         65.0 µs    +5.0 µs  node2:cni0      out  192.168.93.11:50000 → 10.244.2.2:80
         70.0 µs    +5.0 µs  dev/web-1:eth0   in  192.168.93.11:50000 → 10.244.2.2:80
  SYN-ACK (answer)
        100.0 µs             dev/web-1:eth0  out  10.244.2.2:80 → 192.168.93.11:50000
        105.0 µs    +5.0 µs  node2:cni0       in  10.244.2.2:80 → 192.168.93.11:50000
        110.0 µs    +5.0 µs  node2:eth0      out  10.244.2.2:80 → 192.168.93.11:50000
        115.0 µs    +5.0 µs  node1:eth0       in  10.244.2.2:80 → 192.168.93.11:50000
                             node1:               source back to 192.168.93.11:30888, destination back to 192.168.93.100:40000
        120.0 µs    +5.0 µs  node1:eth0      out  192.168.93.11:30888 → 192.168.93.100:40000
        125.0 µs    +5.0 µs  client:eth0      in  192.168.93.11:30888 → 192.168.93.100:40000"""


def test_the_journey_in_words(capture: Capture):
    """Point by point with the time between them; where it was translated, and to whom."""
    capture.tracker.add_entry("node1", NODE1_ENTRY)
    capture.way_there()
    (connection,) = {*capture.way_back()}
    assert capture.storyteller.text(connection) == TOLD


def test_the_journey_as_json_and_mermaid(capture: Capture):
    """The same for programs and for documents."""
    capture.tracker.add_entry("node1", NODE1_ENTRY)
    capture.way_there()
    (connection,) = {*capture.way_back()}
    told: dict[str, Any] = json.loads(json.dumps(capture.storyteller.as_dict(connection)))
    assert told["from"] == {"address": CLIENT, "name": "client"}
    assert told["to"] == {"address": NODE_PORT, "name": "NodePort 30888 of dev/web:http at node1"}
    assert told["endpoint"] == "dev/web-1 on node2" and told["outcome"] == "answered in 125.0 µs"
    assert told["way"]["packet"] == "SYN" and len(told["way"]["steps"]) == 7 and len(told["answer"]["steps"]) == 7
    assert told["way"]["steps"][2] == {
        "node": "node1", "translation": "DNAT to 10.244.2.2:80 (dev/web-1), masqueraded as 192.168.93.11:50000",
        "before": [CLIENT, NODE_PORT], "after": [MASQUERADED, POD],
    }  # fmt: skip
    assert told["way"]["steps"][1]["microseconds"] == 10.0
    lines = capture.storyteller.mermaid(connection).splitlines()
    assert lines[0] == "sequenceDiagram" and lines[2] == "    participant p0 as client:eth0"
    assert f"    p0->>p1: SYN {CLIENT} → {NODE_PORT} (+10.0 µs)" in lines
    assert f"    p1-->>p0: SYN-ACK {NODE_PORT} → {CLIENT} (+5.0 µs)" in lines


def test_comments_say_which_connection_and_which_step(capture: Capture):
    """Each packet names its connection; those of the way also where on it they are."""
    capture.tracker.add_entry("node1", NODE1_ENTRY)
    connection = capture.way_there()[0]
    assert [sighting.step for sighting in capture.sightings if sighting] == [0, 1, 2, 3, 4, 5]
    assert capture.storyteller.comment(connection, True) == (
        "connection 1: client → NodePort 30888 of dev/web:http at node1 → dev/web-1 on node2"
    )
    assert capture.storyteller.step_comment(connection, 2, answer=False) == (
        "SYN, point 3: node1:eth0 out, +40.0 µs; node1: DNAT to 10.244.2.2:80 (dev/web-1), masqueraded as 192.168.93.11:50000"
    )


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        pytest.param(
            port_unreachable("192.168.93.11", tcp(CLIENT, NODE_PORT, S)),
            "refused (ICMP port unreachable), first seen at node1", id="REJECT",
        ),
        pytest.param(tcp(NODE_PORT, CLIENT, RST | ACK, acknowledged=1001), "refused (RST), first seen at node1", id="RST"),
        pytest.param(None, "no answer: last seen at node1:eth0 going in", id="DROP"),
    ],
)  # fmt: skip
def test_where_a_connection_was_refused(capture: Capture, answer: bytes | None, outcome: str):
    """A refusal names the machine where it was seen first, silence the point where the packet was seen last."""
    capture.see(0, AT_CLIENT, tcp(CLIENT, NODE_PORT, S), OUTBOUND)
    connection = capture.see(10, AT_NODE1, tcp(CLIENT, NODE_PORT, S), INBOUND)
    if answer is not None:
        assert capture.see(20, AT_NODE1, answer, OUTBOUND) is connection
        assert capture.see(30, AT_CLIENT, answer, INBOUND) is connection
    capture.finished(5_000_000)
    assert capture.storyteller.outcome(connection) == outcome


def test_a_translation_is_told_although_nobody_saw_the_packet_after_it(capture: Capture):
    """Captured at the client alone, conntrack still says where the packet went."""
    capture.tracker.add_entry("node1", NODE1_ENTRY)
    connection = capture.see(0, AT_CLIENT, tcp(CLIENT, NODE_PORT, S))
    assert "node1: " in capture.storyteller.text(connection)
    assert capture.storyteller.headline(connection).endswith("→ dev/web-1 on node2")


def test_a_proxy_s_two_connections_are_told_as_going_on(capture: Capture):
    """In userspace mode the proxy says which connection it opened for which."""
    front = capture.see(0, AT_NODE1, tcp(CLIENT, NODE_PORT, S, sequence=1))
    back = capture.see(50, AT_NODE1, tcp(MASQUERADED, POD, S, sequence=2))
    assert front is not back
    capture.tracker.tie(key(TCP, CLIENT, NODE_PORT), key(TCP, MASQUERADED, POD))
    assert capture.storyteller.endpoint(front) == "dev/web-1 on node2"
    assert "  the proxy goes on with it as connection 2" in capture.storyteller.text(front).splitlines()


def test_a_proxy_may_tell_before_its_connections_are_known(capture: Capture):
    """Its word, conntrack's events and packets come by different ways: a tie waits until both sides are known."""
    capture.tracker.tie(key(TCP, CLIENT, "192.168.93.11:40001"), key(TCP, MASQUERADED, POD))
    redirected = ConntrackEntry(key(TCP, CLIENT, NODE_PORT), key(TCP, "192.168.93.11:40001", CLIENT))
    capture.tracker.add_entry("node1", redirected)
    front = capture.see(0, AT_NODE1, tcp(CLIENT, NODE_PORT, S, sequence=1), INBOUND)
    back = capture.see(50, AT_NODE1, tcp(MASQUERADED, POD, S, sequence=2), OUTBOUND)
    assert capture.finished() == []
    assert front.continues is back
    assert "redirected to its own 192.168.93.11:40001" in capture.storyteller.text(front)


def test_what_goes_on_is_told_with_the_number_of_what_it_goes_on_as(capture: Capture):
    """The proxy answers its client before the packets of its own connection have come: the telling waits for them."""
    capture.tracker.add_entry("node1", ConntrackEntry(key(TCP, MASQUERADED, POD), key(TCP, POD, MASQUERADED)))
    front = capture.see(0, AT_NODE1, tcp(CLIENT, NODE_PORT, S, sequence=1))
    capture.tracker.tie(key(TCP, CLIENT, NODE_PORT), key(TCP, MASQUERADED, POD))
    capture.see(10, AT_NODE1, tcp(NODE_PORT, CLIENT, SA, acknowledged=2))
    assert capture.finished(100) == []
    back = capture.see(150, AT_NODE1, tcp(MASQUERADED, POD, S, sequence=2))
    assert capture.finished(200) == [front] and front.continues is back


# ── packets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("frame", "label"),
    [
        (tcp(CLIENT, POD, S), "SYN"),
        (tcp(CLIENT, POD, SA), "SYN-ACK"),
        (tcp(CLIENT, POD, ACK), "ACK"),
        (tcp(CLIENT, POD, ACK, payload=b"GET"), "data, 3 bytes"),
        (tcp(CLIENT, POD, ACK | 1), "FIN"),
        (tcp(CLIENT, POD, RST | ACK), "RST"),
        (udp(CLIENT, POD, b"x"), "datagram, 1 byte"),
        (port_unreachable("10.0.0.1", udp(CLIENT, POD, b"x")), "ICMP port unreachable"),
    ],
)
def test_packets_in_words(frame: bytes, label: str):
    """A packet is called what people call it."""
    packet = read_packet(frame)
    assert packet is not None and packet.label == label


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_keys_can_be_read_and_turned_round(protocol: int):
    """A key is what an IPv4 header has in a row; turned twice it is itself."""
    made = key(protocol, CLIENT, POD)
    assert reverse(reverse(made)) == made
    assert read_key(made)[1:] == (read_key(reverse(made)).destination, 40000, read_key(reverse(made)).source, 80)
