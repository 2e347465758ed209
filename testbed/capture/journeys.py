"""Which packets of a capture belong to one connection, and the way of each connection's first packet and first answer. Pure.

Translation changes a packet's key on its way. Conntrack of the node that did it says both keys (`ConntrackEntry`), so keys
are tied into connections before any packet is looked at; where an entry is missing (the kernel lost an event, the packet was
dropped before it was confirmed), the first packets are tied by what no translation changes: the initial sequence number of
TCP, and the identification, length and checksum of a datagram.

The way is the list of `Passage` of one packet, in the order of time: the same packet at another point, or at the same point
with another key (a node's uplink sees a packet come in, and go out translated).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from testbed.capture.merge import Record
from testbed.capture.packets import ACK, RST, SYN, Packet, read_packet
from testbed.model.flows import TCP, ConntrackEntry, FlowKey, reverse

INBOUND, OUTBOUND = 1, 2
ANSWER_WITHIN_NS = 1_000_000_000
"""A connection whose first packet has no answer for so long (of packets' time) is told as it is."""
_SAME_PACKET_NS = 3_000_000_000
"""Two first packets that look the same are one only if they are this close: a packet is not under way for longer."""
_TIES_KEPT = 10_000
_FORGET_NS = 10_000_000_000
"""How long the keys of a connection that has ended are kept, for packets that are still held back."""


class Passage(NamedTuple):
    """A packet at a point."""

    time_ns: int
    point: int
    direction: int  # INBOUND, OUTBOUND, or 0
    key: FlowKey


class NodeEntry(NamedTuple):
    """What a node tracks of a connection."""

    node: str
    entry: ConntrackEntry


@dataclass(slots=True, eq=False)
class Connection:
    """One connection, with every key that its packets have anywhere."""

    number: int = 0  # from 1, in the order of first packets; 0: none was seen
    forward: set[FlowKey] = field(default_factory=set)
    backward: set[FlowKey] = field(default_factory=set)
    entries: list[NodeEntry] = field(default_factory=list)
    way: list[Passage] = field(default_factory=list)
    answer: list[Passage] = field(default_factory=list)
    way_label: str = ""
    answer_label: str = ""
    way_identity: tuple[int, ...] = ()
    answer_identity: tuple[int, ...] = ()
    initial_sequence: int = -1
    told: bool = False
    previous: Connection | None = None  # an ended one with the same key, whose packets may still be held back
    continues: Connection | None = None  # a proxy's: the connection to the endpoint that it opened for this one
    sightings: int = 0  # packets, each counted at every point
    packets: int = 0  # at the first point of the way, both directions
    first_ns: int = 0
    last_ns: int = 0
    resent: int = 0  # first packets that were sent again
    reset: bool = False
    ended_ns: int = 0  # when conntrack forgot it; 0: it has not
    options: dict[object, bytes] = field(default_factory=dict)  # whoever writes packets keeps what he writes here

    @property
    def origin(self) -> Passage:
        return self.way[0]


class Sighting(NamedTuple):
    """What a packet turned out to be. ``step``: its place in the way or the answer, from 0; -1 when it is in neither."""

    connection: Connection
    is_forward: bool
    step: int


class Tracker:
    """Takes conntrack's entries as they come and packets in order, and ties them."""

    def __init__(self) -> None:
        self._by_key: dict[FlowKey, tuple[Connection, bool]] = {}  # bool: it is a key of the forward direction
        self._by_sequence: dict[int, Connection] = {}
        self._by_datagram: dict[tuple[int, ...], Connection] = {}
        self._open: dict[int, Connection] = {}  # number -> not told yet
        self._ended: list[Connection] = []
        self._ties: list[tuple[FlowKey, FlowKey]] = []  # of which not both sides are known yet
        self._numbers = 0
        self._finished: list[Connection] = []

    # -- conntrack -------------------------------------------------------------------------------------------------

    def add_entry(self, node: str, entry: ConntrackEntry) -> Connection:
        """Tie the keys of an entry together."""
        forward, backward = {entry.original, entry.sent_on}, {entry.reply, entry.handed_back}
        known = [found for key in (entry.original, entry.sent_on) if (found := self._living(key, node, entry))]
        connection = known[0] if known else Connection(previous=self._by_key.get(entry.original, (None,))[0])
        for other in known[1:]:
            if other is not connection:
                connection = self._merge(connection, other)
        if NodeEntry(node, entry) not in connection.entries:
            connection.entries.append(NodeEntry(node, entry))
            connection.options.clear()
        self._put(connection, forward, backward)
        return connection

    def _living(self, key: FlowKey, node: str, entry: ConntrackEntry) -> Connection | None:
        """Return the connection of a key, unless that is one that has ended and this entry begins the next with the key."""
        connection, is_forward = self._by_key.get(key, (None, True))
        if connection is None or not is_forward:
            return None
        if connection.ended_ns and any(known.node == node for known in connection.entries):
            return None
        # An entry of the same node for another original: two clients whose packets are sent on with one key cannot be.
        clash = any(
            known.node == node and known.entry.original != entry.original and known.entry.sent_on == entry.sent_on
            for known in connection.entries
        )
        return None if clash else connection

    def end_entry(self, node: str, entry: ConntrackEntry, now_ns: int) -> None:
        """A node has forgotten an entry: when its key comes again, that is another connection."""
        connection, _ = self._by_key.get(entry.original, (None, True))
        if connection is not None and not connection.ended_ns and NodeEntry(node, entry) in connection.entries:
            connection.ended_ns = now_ns
            self._ended.append(connection)

    def forget_ended(self, now_ns: int) -> None:
        """Drop the keys of connections that ended a while ago."""
        kept = []
        for connection in self._ended:
            if connection.ended_ns > now_ns - _FORGET_NS or connection.number in self._open:
                kept.append(connection)
                continue
            for key in connection.forward | connection.backward:
                if self._by_key.get(key, (None,))[0] is connection:
                    del self._by_key[key]
            if self._by_sequence.get(connection.initial_sequence) is connection:
                del self._by_sequence[connection.initial_sequence]
        self._ended = kept
        self._by_datagram = {k: c for k, c in self._by_datagram.items() if c.last_ns > now_ns - _FORGET_NS}

    def tie(self, front: FlowKey, back: FlowKey) -> None:
        """A proxy opened ``back`` for ``front``: one connection goes on as another, as soon as both are known."""
        self._ties.append((front, back))
        self._tie_known()

    def _tie_known(self) -> None:
        waiting = []
        for front, back in self._ties:
            first, second = (self._by_key.get(key, (None, True))[0] for key in (front, back))
            if first is None or second is None:
                waiting.append((front, back))
            elif first is not second:
                first.continues = second
                first.options.clear()
        self._ties = waiting[-_TIES_KEPT:]

    def _merge(self, kept: Connection, other: Connection) -> Connection:
        if other.number and (not kept.number or other.number < kept.number):
            kept, other = other, kept
        kept.entries += [entry for entry in other.entries if entry not in kept.entries]
        kept.way = sorted({*kept.way, *(other.way if other.way_identity == kept.way_identity else ())})
        kept.answer = sorted({*kept.answer, *(other.answer if other.answer_identity == kept.answer_identity else ())})
        kept.sightings += other.sightings
        self._open.pop(other.number, None)
        kept.options.clear()
        self._put(kept, other.forward, other.backward)
        return kept

    def _put(self, connection: Connection, forward: Iterable[FlowKey], backward: Iterable[FlowKey]) -> None:
        for keys, mine, is_forward in ((forward, connection.forward, True), (backward, connection.backward, False)):
            for key in keys:
                mine.add(key)
                self._by_key[key] = (connection, is_forward)

    # -- packets ---------------------------------------------------------------------------------------------------

    def see(self, record: Record, direction: int) -> Sighting | None:
        """Say which connection a packet belongs to; None for a packet of no flow. Packets come in the order of time."""
        data = record.data
        # The usual case with two slices: IPv4 without options, not a fragment, TCP or UDP.
        if data[12:15] == b"\x08\x00\x45" and data[23] in (6, 17) and not (data[20] & 0x3F or data[21]):
            key = FlowKey(data[23:24] + data[26:38])
            found = self._by_key.get(key)
            if found is not None and found[0].told and (data[23] != TCP or not data[47] & (SYN | RST)):
                connection, is_forward = found
                connection.sightings += 1
                connection.last_ns = record.time_ns
                if connection.way and record.point == connection.way[0].point:
                    self._count(connection, key)
                return Sighting(connection, is_forward, -1)
        packet = read_packet(data)
        return None if packet is None else self._look_at(packet, record, direction)

    @staticmethod
    def _count(connection: Connection, key: FlowKey) -> None:
        if key == connection.way[0].key or key == reverse(connection.way[0].key):
            connection.packets += 1

    def _look_at(self, packet: Packet, record: Record, direction: int) -> Sighting:
        connection, is_forward = self._find(packet, record.time_ns)
        connection.sightings += 1
        connection.last_ns = max(connection.last_ns, record.time_ns)
        if not connection.number:
            self._numbers += 1
            connection.number = self._numbers
            connection.first_ns = record.time_ns
            self._open[connection.number] = connection
        passage = Passage(record.time_ns, record.point, direction, packet.key)
        step = self._go(connection, passage, packet) if is_forward else self._come_back(connection, passage, packet)
        if connection.way and record.point == connection.way[0].point:
            self._count(connection, packet.key)
        if packet.tcp_flags & RST:
            connection.reset = True
        return Sighting(connection, is_forward, step)

    def _find(self, packet: Packet, time_ns: int) -> tuple[Connection, bool]:
        found = self._by_key.get(packet.key)
        if found is not None and not (packet.opens and self._is_next(found[0], packet)):
            before = found[0].previous
            if before is not None and not found[0].number and packet.key[0] == TCP and not packet.tcp_flags & SYN:
                return before, found[1]
            return found
        connection = self._look_alike(packet, time_ns)
        if connection is not None:
            is_forward = packet.opens or packet.tcp_flags & (SYN | ACK) != SYN | ACK
        else:
            is_forward = packet.tcp_flags & (SYN | ACK) != SYN | ACK and packet.about is None
            connection = Connection()
        keys, back = {packet.key}, {reverse(packet.key)}
        self._put(connection, *((keys, back) if is_forward else (back, keys)))
        if packet.opens:
            connection.initial_sequence = packet.sequence
            self._by_sequence[packet.sequence] = connection
        return connection, is_forward

    @staticmethod
    def _is_next(connection: Connection, packet: Packet) -> bool:
        """A SYN with another sequence number on the key of a connection that has begun: the port is used again."""
        return connection.initial_sequence not in (-1, packet.sequence)

    def _look_alike(self, packet: Packet, time_ns: int) -> Connection | None:
        """Return the connection that a packet with an unknown key belongs to, by what translation does not change."""
        if packet.opens:
            found = self._by_sequence.get(packet.sequence)
        elif packet.tcp_flags & SYN:
            found = self._by_sequence.get((packet.acknowledged - 1) & 0xFFFFFFFF)
        elif packet.tcp_flags or packet.about is not None or not packet.identity[0]:
            return None
        else:
            signature = (packet.key[0], *packet.identity)
            found = self._by_datagram.setdefault(signature, Connection())
            if not found.number:  # the first of its kind: whoever sees it again finds it here
                found.last_ns = time_ns
                return found
        return found if found is not None and time_ns - found.first_ns < _SAME_PACKET_NS else None

    def _go(self, connection: Connection, passage: Passage, packet: Packet) -> int:
        if not connection.way:
            connection.way_identity, connection.way_label = packet.identity, packet.label
            if packet.opens:
                connection.initial_sequence = packet.sequence
                self._by_sequence[packet.sequence] = connection
        if connection.told:
            return -1
        if packet.identity != connection.way_identity:
            origin = connection.way[0]
            if packet.opens and (passage.point, passage.key) == (origin.point, origin.key):
                connection.resent += 1
            return -1
        return _append(connection.way, passage)

    def _come_back(self, connection: Connection, passage: Passage, packet: Packet) -> int:
        if not connection.answer:
            connection.answer_identity, connection.answer_label = packet.identity, packet.label
        if connection.told or packet.identity != connection.answer_identity:
            return -1
        step = _append(connection.answer, passage)
        if connection.way and step >= 0:
            origin = connection.way[0]
            if passage.point == origin.point and passage.key == reverse(origin.key):
                self._tell(connection)
        return step

    # -- telling ---------------------------------------------------------------------------------------------------

    def _tell(self, connection: Connection) -> None:
        connection.told = True
        if self._open.pop(connection.number, None) is not None:
            self._finished.append(connection)

    def take_finished(self, now_ns: int) -> Sequence[Connection]:
        """Return the connections that can be told: answered, or silent for longer than ``ANSWER_WITHIN_NS``."""
        if self._ties:
            self._tie_known()
        for connection in list(self._open.values()):
            if connection.first_ns > now_ns - ANSWER_WITHIN_NS:
                break
            if connection.way or connection.answer:
                self._tell(connection)
        # What a proxy goes on with comes later than its answer to the client: it is told with its number.
        late = now_ns - ANSWER_WITHIN_NS
        waiting = [c for c in self._finished if c.continues and not c.continues.number and c.first_ns > late]
        finished, self._finished = [c for c in self._finished if c not in waiting], waiting
        return finished

    def take_all(self) -> Sequence[Connection]:
        """Return what is left, at the end."""
        for connection in list(self._open.values()):
            self._tell(connection)
        finished, self._finished = self._finished, []
        return finished


def _append(way: list[Passage], passage: Passage) -> int:
    """Add a passage unless the packet has been here already with this key and direction; return its place, or -1."""
    if any(known[1:] == passage[1:] for known in way):
        return -1
    way.append(passage)
    return len(way) - 1
