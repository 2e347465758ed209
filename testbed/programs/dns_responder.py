"""The responder behind dnsmasq: DNS messages in, the zone's answers out, on loopback of the pod.

::

    dnsmasq :53 ──UDP, TCP──▶ responder 127.0.0.1:5355 ──▶ Zone.answer
                                              └── names outside the cluster ──▶ the Corefile's servers

One thread answers UDP; what has to wait (TCP, questions to others) is done by a few more. Answers are kept as bytes until
the zone changes, because packing a message takes longer than everything else.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from dnslib import (
    AAAA,
    CNAME,
    EDNS0,
    NS,
    PTR,
    QTYPE,
    RD,
    RR,
    SOA,
    SRV,
    TXT,
    A,
    BimapError,
    BufferError,
    DNSError,
    DNSLabelError,
    DNSRecord,
)

from testbed.dataplane.corefile import DnsConfig, Upstream
from testbed.dataplane.dns import Zone
from testbed.model.dns import Answer, Rcode, Record, RecordType

T = TypeVar("T")

_NOT_SYNCED: Final = Answer(rcode=Rcode.SERVFAIL)
_NOT_PACKABLE: Final = Answer(rcode=Rcode.SERVFAIL)
_CLASSIC_BYTES: Final = 512  # RFC 1035: a UDP answer to a question that does not say more
_MOST_UDP_BYTES: Final = 1232
_TCP_BYTES: Final = 65535
_WAITING_BYTES: Final = 1 << 20  # of questions while the zone changes; the kernel gives what it allows
_KEPT_ANSWERS: Final = 8192
_KEPT_ORDERS: Final = 16  # orders of one answer; more addresses than this share them unevenly by a hair
_UPSTREAM_TIMEOUT_S: Final = 2.0
_CLIENT_TIMEOUT_S: Final = 5.0
_WORKERS: Final = 8

MALFORMED: Final = (BimapError, BufferError, DNSError, DNSLabelError, ValueError, struct.error)
"""What dnslib raises for bytes that are no message, or one that cannot be answered."""

_DATA: Final[Mapping[RecordType, Callable[[str], RD]]] = {
    RecordType.A: A,
    RecordType.AAAA: AAAA,
    RecordType.CNAME: CNAME,
    RecordType.NS: NS,
    RecordType.PTR: PTR,
    RecordType.TXT: TXT,
}


class _Kept:
    """The ways one answer may be ordered, as bytes without the message's number; each is given in turn."""

    __slots__ = ("next", "orders")

    def __init__(self, orders: Sequence[bytes]) -> None:
        self.orders = orders
        self.next = 0

    def take(self) -> bytes:
        self.next = (self.next + 1) % len(self.orders)
        return self.orders[self.next - 1]


class Responder:
    """Answers questions from a `Zone` and asks others where that says so. `update` may be called from any thread."""

    def __init__(self, zone: Zone, config: DnsConfig) -> None:
        self._zone = zone
        self._config = config
        self._lock = threading.Lock()
        self._is_synced = False
        self._kept: dict[object, _Kept] = {}  # by bytes of the question, and by what matters of it
        self._rcodes = [0] * 16
        self._workers = ThreadPoolExecutor(_WORKERS, "dns")

    def update(self, change: Callable[[Zone], None], *, synced: bool = False, config: DnsConfig | None = None) -> None:
        """Change the zone; questions wait meanwhile. ``synced``: from now on it is whole."""
        with self._lock:
            change(self._zone)
            self._config = config or self._config
            self._is_synced = self._is_synced or synced
            self._kept.clear()

    def read(self, look: Callable[[Zone], T]) -> T:
        """Return what ``look`` finds in the zone, which does not change meanwhile."""
        with self._lock:
            return look(self._zone)

    def count_replies(self, rcode: Rcode) -> int:
        """Return how many replies had this code, since the start."""
        return self._rcodes[int(rcode)]

    def _count(self, reply: bytes) -> bytes:
        self._rcodes[reply[3] & 0x0F] += 1  # RFC 1035, 4.1.1; a count lost between threads is of no matter
        return reply

    # -- serving ---------------------------------------------------------------------------------------------------

    def start(self, host: str, port: int) -> int:
        """Listen for UDP and TCP, on threads of its own; return the port.

        Raises:
            OSError: the port is taken.
        """
        streams = socket.create_server((host, port), backlog=64)
        port = streams.getsockname()[1]
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WAITING_BYTES)
        try:
            datagrams.bind((host, port))
        except OSError:
            datagrams.close()
            streams.close()
            raise
        threading.Thread(target=self._serve_datagrams, args=(datagrams,), name="dns-udp", daemon=True).start()
        threading.Thread(target=self._serve_streams, args=(streams,), name="dns-tcp", daemon=True).start()
        return int(port)

    def _serve_datagrams(self, datagrams: socket.socket) -> None:
        while True:
            query, client = datagrams.recvfrom(4096)
            kept = self._kept.get(query[2:])
            # Rubbish gets no reply, and whoever asked may be gone.
            with contextlib.suppress(OSError, *MALFORMED):
                reply = query[:2] + kept.take() if kept is not None else self._reply(query, datagrams, client)
                if reply is not None:
                    datagrams.sendto(self._count(reply), client)

    def _reply(self, query: bytes, datagrams: socket.socket, client: tuple[str, int]) -> bytes | None:
        """Return the reply, or None when there will be one later, or never."""
        message = DNSRecord.parse(query)
        if message.header.qr or len(message.questions) != 1:
            return None
        limit = _udp_limit(message)
        question = message.questions[0]
        has_options = any(rr.rtype == QTYPE.OPT for rr in message.ar)
        key = (message.header.bitmap, str(question.qname), question.qtype, question.qclass, has_options, limit)
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                answer = self._find(message)
            if kept is None and not (answer.outside or answer.falls_through):
                kept = _Kept([_pack(message, order, limit)[2:] for order in _orders(answer)])
                if len(self._kept) >= _KEPT_ANSWERS:
                    self._kept.clear()
                self._kept[key] = kept
            if kept is not None:
                # Cookies (dig sends them) differ from question to question, so such bytes would never come again.
                if all(not rr.rdata for rr in message.ar):
                    self._kept[query[2:]] = kept
                return query[:2] + kept.take()

        def later() -> None:
            with contextlib.suppress(OSError, *MALFORMED):
                datagrams.sendto(self._count(self._completed(message, query, answer, limit)), client)

        self._workers.submit(later)
        return None

    def _serve_streams(self, streams: socket.socket) -> None:
        while True:
            try:
                connection, _ = streams.accept()
            except OSError:
                return
            threading.Thread(target=self._serve_stream, args=(connection,), daemon=True).start()

    def _serve_stream(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError, *MALFORMED):
            connection.settimeout(_CLIENT_TIMEOUT_S)
            while True:
                query = _read_message(connection)
                message = DNSRecord.parse(query)
                if message.header.qr or len(message.questions) != 1:
                    return
                with self._lock:
                    answer = self._find(message)
                reply = self._count(self._completed(message, query, answer, _TCP_BYTES))
                connection.sendall(struct.pack("!H", len(reply)) + reply)

    def _find(self, message: DNSRecord) -> Answer:
        if not self._is_synced:
            return _NOT_SYNCED
        question = message.questions[0]
        return self._zone.answer(str(question.qname), question.qtype)

    def _completed(self, message: DNSRecord, query: bytes, answer: Answer, limit: int) -> bytes:
        """Return the reply with what others say."""
        if answer.falls_through:
            relayed = self._ask(str(message.questions[0].qname), query, limit)
            return relayed or _pack(message, answer, limit)
        if not answer.outside:
            return _pack(message, answer, limit)
        question = DNSRecord.question(answer.outside, QTYPE[message.questions[0].qtype])
        relayed = self._ask(answer.outside, bytes(question.pack()), _TCP_BYTES)
        more: list[RR] = []
        if relayed:
            with contextlib.suppress(*MALFORMED):
                more = list(DNSRecord.parse(relayed).rr)
        return _pack(message, answer, limit, more)

    # -- asking others ---------------------------------------------------------------------------------------------

    def _ask(self, name: str, query: bytes, limit: int) -> bytes:
        """Return what the first server says that answers at all, b'' when there is none."""
        for upstream in self._config.upstreams(name):
            with contextlib.suppress(OSError, EOFError):
                reply = _ask_by_udp(upstream, query)
                is_truncated = bool(reply[2] & 0x02)
                return _ask_by_tcp(upstream, query) if is_truncated and limit == _TCP_BYTES else reply
        return b""


def _ask_by_udp(upstream: Upstream, query: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.settimeout(_UPSTREAM_TIMEOUT_S)
        made.connect((upstream.address, upstream.port))
        made.send(query)
        while True:
            reply = made.recv(65535)
            if len(reply) >= 12 and reply[:2] == query[:2]:
                return reply


def _ask_by_tcp(upstream: Upstream, query: bytes) -> bytes:
    with socket.create_connection((upstream.address, upstream.port), timeout=_UPSTREAM_TIMEOUT_S) as made:
        made.sendall(struct.pack("!H", len(query)) + query)
        return _read_message(made)


def _read_message(connection: socket.socket) -> bytes:
    (length,) = struct.unpack("!H", _read(connection, 2))
    return _read(connection, length)


def _read(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise EOFError
        data += part
    return data


# -- messages ----------------------------------------------------------------------------------------------------------


def _udp_limit(message: DNSRecord) -> int:
    sizes = [rr.edns_len for rr in message.ar if rr.rtype == QTYPE.OPT]
    return max(_CLASSIC_BYTES, min(_MOST_UDP_BYTES, sizes[0])) if sizes else _CLASSIC_BYTES


def _orders(answer: Answer) -> list[Answer]:
    """Return an answer in each order that its records take in turn, as dnsmasq rotates those of a hosts file."""
    records = answer.records
    if len(records) < 2 or records[0].type is RecordType.CNAME:
        return [answer]
    return [
        Answer(records=records[start:] + records[:start], additional=answer.additional)
        for start in range(min(len(records), _KEPT_ORDERS))
    ]


def _pack(message: DNSRecord, answer: Answer, limit: int, more: Sequence[RR] = ()) -> bytes:
    """Return a reply as bytes, with as many records as fit and marked as truncated when that is not all.

    A record with a name that no message can hold (parts of it may be long, and there may be many) fails the question.
    """
    try:
        return _packed(message, answer, limit, more)
    except DNSLabelError:
        return _packed(message, _NOT_PACKABLE, limit, ())


def _packed(message: DNSRecord, answer: Answer, limit: int, more: Sequence[RR]) -> bytes:
    reply = message.reply(ra=1, aa=1)
    reply.header.rcode = int(answer.rcode)
    for record in answer.records:
        reply.add_answer(_rr(record))
    for rr in more:
        reply.add_answer(rr)
    for record in answer.authority:
        reply.add_auth(_rr(record))
    for record in answer.additional:
        reply.add_ar(_rr(record))
    if any(rr.rtype == QTYPE.OPT for rr in message.ar):
        reply.add_ar(EDNS0(udp_len=_MOST_UDP_BYTES))
    packed = bytes(reply.pack())
    if len(packed) <= limit:
        return packed
    # Records beside the answer are not missed (RFC 2181, 9); what is missing of the answer itself is told.
    reply.ar = [rr for rr in reply.ar if rr.rtype == QTYPE.OPT]
    records, low, high = reply.rr, 0, len(reply.rr) + 1
    while high - low > 1:  # the first `low` records fit, the first `high` do not
        middle = (low + high) // 2
        reply.rr = records[:middle]
        if len(reply.pack()) <= limit:
            low = middle
        else:
            high = middle
    reply.rr = records[:low]
    reply.header.tc = int(low < len(records))
    return bytes(reply.pack())


def _rr(record: Record) -> RR:
    value = record.value
    if isinstance(value, str):
        data: RD = _DATA[record.type](value)
    elif record.type is RecordType.SRV:
        data = SRV(*value)
    else:
        data = SOA(value[0], value[1], value[2:])
    return RR(record.name, int(record.type), rdata=data, ttl=record.ttl)
