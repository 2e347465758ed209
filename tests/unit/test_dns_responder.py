"""The responder behind dnsmasq, asked over real sockets of this machine: orders, sizes, others, and rubbish."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator

import pytest
from dns_model import endpoint, endpoint_slice, namespace, port, service
from dnslib import EDNS0, QTYPE, RCODE, RR, DNSRecord

from testbed.dataplane.corefile import DnsConfig, Upstream
from testbed.dataplane.dns import Zone
from testbed.model.dns import PodMode, ZoneSettings
from testbed.programs.dns_responder import Responder

HOST = "127.0.0.1"
SLICES = "endpointslices.discovery.k8s.io"


class OutsideServer:
    """A DNS server of the world: knows one name, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((HOST, 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(4096)
            if not query:
                return
            message = DNSRecord.parse(query)
            self.asked.append(str(message.q.qname))
            reply = message.reply()
            if str(message.q.qname) == "shop.example.com." and message.q.qtype == QTYPE.A:
                reply.add_answer(*RR.fromZone("shop.example.com 60 A 192.0.2.80"))
            elif not str(message.q.qname).startswith("shop."):
                reply.header.rcode = RCODE.NXDOMAIN
            self._socket.sendto(reply.pack(), client)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bell:
            while self._thread.is_alive():
                bell.sendto(b"", (HOST, self.port))
                self._thread.join(0.05)
        self._socket.close()


@pytest.fixture
def outside() -> Iterator[OutsideServer]:
    server = OutsideServer()
    yield server
    server.close()


class Asker:
    """A responder, and a way to ask it as dnsmasq does."""

    def __init__(self, forwards: dict[str, tuple[Upstream, ...]]) -> None:
        settings = ZoneSettings(ttl=30, pods=PodMode.INSECURE, fallthrough=("in-addr.arpa",))
        self.responder = Responder(Zone(settings), DnsConfig(zone=settings, forwards=forwards))
        self.port = self._start()

    def _start(self) -> int:
        for _ in range(20):
            with contextlib.suppress(OSError):  # the port that is free for TCP may be somebody's for UDP
                return self.responder.start(HOST, 0)
        raise AssertionError("no port is free for both")

    def put(self, resource: str, *objects: dict[str, object]) -> None:
        def change(zone: Zone) -> None:
            for obj in objects:
                zone.put(resource, obj)

        self.responder.update(change, synced=True)

    def ask(self, name: str, kind: str = "A", *, tcp: bool = False, edns: int = 0, cookie: bool = False) -> DNSRecord:
        query = DNSRecord.question(name, kind)
        if edns or cookie:
            query.add_ar(EDNS0(udp_len=edns or 1232))
        return DNSRecord.parse(query.send(HOST, self.port, tcp=tcp, timeout=5))

    def addresses(self, name: str, **how: object) -> list[str]:
        return [str(rr.rdata) for rr in self.ask(name, **how).rr]  # type: ignore[arg-type]


@pytest.fixture
def asker(outside: OutsideServer) -> Asker:
    found = Asker({"": (Upstream(HOST, outside.port),)})
    found.put("namespaces", namespace("dev"))
    return found


def many(count: int) -> dict[str, object]:
    endpoints = [endpoint(f"10.244.{n // 250}.{n % 250 + 1}") for n in range(count)]
    return endpoint_slice("db", *endpoints, ports=[port("http", 8080)])


def put_headless(asker: Asker, count: int) -> None:
    asker.put("services", service("db", clusterIP="None", clusterIPs=["None"], ports=[port("http", 80)]))
    asker.put(SLICES, many(count))


def test_before_the_first_list_it_does_not_know() -> None:
    """Until all objects were listed once, a missing name means nothing: SERVFAIL, as from CoreDNS."""
    asker = Asker({})
    assert asker.ask("web.dev.svc.cluster.local").header.rcode == RCODE.SERVFAIL
    asker.put("namespaces", namespace("dev"))
    assert asker.ask("web.dev.svc.cluster.local").header.rcode == RCODE.NXDOMAIN


def test_answers_are_authoritative_and_keep_the_question(asker: Asker) -> None:
    """The reply has the question as it was written, AA and RA set, and EDNS when the question had it."""
    put_headless(asker, 1)
    reply = asker.ask("DB.dev.svc.Cluster.local", edns=1232)
    assert str(reply.q.qname) == str(reply.rr[0].rname) == "DB.dev.svc.Cluster.local."
    assert (reply.header.aa, reply.header.ra, reply.header.tc) == (1, 1, 0)
    assert [rr.rtype for rr in reply.ar] == [QTYPE.OPT]
    assert asker.ask("db.dev.svc.cluster.local").ar == []


def test_addresses_take_turns(asker: Asker) -> None:
    """Of 3 × N answers each address is first in N: exactly even, whatever the question looks like."""
    put_headless(asker, 4)
    for edns in (0, 1232):
        firsts = [asker.addresses("db.dev.svc.cluster.local", edns=edns)[0] for _ in range(12)]
        assert {first: firsts.count(first) for first in set(firsts)} == {f"10.244.0.{n}": 3 for n in range(1, 5)}


def test_a_change_is_in_the_next_answer(asker: Asker) -> None:
    """Answers that are kept are dropped with the first change."""
    put_headless(asker, 2)
    assert len(asker.addresses("db.dev.svc.cluster.local")) == 2
    asker.put(SLICES, many(3))
    assert len(asker.addresses("db.dev.svc.cluster.local")) == 3


def test_large_answers(asker: Asker) -> None:
    """120 addresses: cut at 512 bytes or at what the question allows, marked, and whole over TCP."""
    put_headless(asker, 120)
    plain = asker.ask("db.dev.svc.cluster.local")
    assert plain.header.tc == 1
    assert len(plain.rr) == 29
    assert len(plain.pack()) <= 512
    larger = asker.ask("db.dev.svc.cluster.local", edns=1232)
    assert larger.header.tc == 1
    assert 70 < len(larger.rr) < 120
    whole = asker.ask("db.dev.svc.cluster.local", tcp=True)
    assert whole.header.tc == 0
    assert len(whole.rr) == 120


def test_records_beside_the_answer_make_room_first(asker: Asker) -> None:
    """SRV answers lose the addresses of their targets before they are cut themselves."""
    put_headless(asker, 8)
    reply = asker.ask("_http._tcp.db.dev.svc.cluster.local", "SRV")
    assert (reply.header.tc, len(reply.rr), len(reply.ar)) == (0, 8, 0)
    assert len(asker.ask("_http._tcp.db.dev.svc.cluster.local", "SRV", tcp=True).ar) == 8


@pytest.mark.parametrize("tcp", [False, True])
def test_aliases_of_outside_names(asker: Asker, outside: OutsideServer, tcp: bool) -> None:
    """The alias comes with what the outside server says of its target; of a missing one it comes alone."""
    asker.put("services", service("shop", type="ExternalName", externalName="shop.example.com"))
    asker.put("services", service("gone", type="ExternalName", externalName="gone.example.com"))
    answer = asker.ask("shop.dev.svc.cluster.local", tcp=tcp)
    assert [str(rr.rdata) for rr in answer.rr] == ["shop.example.com.", "192.0.2.80"]
    assert [str(rr.rdata) for rr in asker.ask("shop.dev.svc.cluster.local", "AAAA", tcp=tcp).rr] == [
        "shop.example.com."
    ]
    gone = asker.ask("gone.dev.svc.cluster.local", tcp=tcp)
    assert (gone.header.rcode, [str(rr.rdata) for rr in gone.rr]) == (RCODE.NOERROR, ["gone.example.com."])
    asker.put("services", service("shop", type="ExternalName", externalName="gone.example.com"))
    assert [str(rr.rdata) for rr in asker.ask("shop.dev.svc.cluster.local", tcp=tcp).rr] == ["gone.example.com."]
    assert "shop.example.com." in outside.asked


def test_reverse_names_fall_through(asker: Asker, outside: OutsideServer) -> None:
    """A reverse name that is not the cluster's is the outside server's to answer."""
    assert asker.ask("4.3.2.1.in-addr.arpa", "PTR").header.rcode == RCODE.NXDOMAIN
    assert outside.asked == ["4.3.2.1.in-addr.arpa."]


def test_nobody_to_ask() -> None:
    """Without an outside server names of the world fail at once; reverse names are not there."""
    asker = Asker({})
    asker.put("namespaces", namespace("dev"))
    assert asker.ask("www.example.com").header.rcode == RCODE.SERVFAIL
    assert asker.ask("4.3.2.1.in-addr.arpa", "PTR").header.rcode == RCODE.NXDOMAIN


def test_a_target_that_fits_in_no_message(asker: Asker) -> None:
    """A name that is too long as a whole fails the question instead of leaving it without a reply."""
    label, name, space = "h" * 63, "s" * 63, "n" * 63
    asker.responder.update(lambda zone: zone.configure(ZoneSettings(domain=f"{'d' * 60}.local")))
    asker.put("namespaces", namespace(space))
    asker.put(
        "services", service(name, namespace=space, clusterIP="None", clusterIPs=["None"], ports=[port("http", 80)])
    )
    asker.put(SLICES, endpoint_slice(name, endpoint("10.244.0.1", hostname=label), namespace=space))
    question = f"{name}.{space}.svc.{'d' * 60}.local"
    assert asker.addresses(question) == ["10.244.0.1"]
    assert asker.ask(question, "SRV").header.rcode == RCODE.SERVFAIL


@pytest.mark.parametrize("tcp", [False, True])
def test_rubbish(asker: Asker, tcp: bool) -> None:
    """Whatever bytes come, the responder goes on answering."""
    put_headless(asker, 1)
    chance = random.Random(7)
    good = DNSRecord.question("db.dev.svc.cluster.local").pack()
    for _ in range(300):
        rubbish = bytearray(good) if chance.random() < 0.7 else bytearray(chance.randbytes(chance.randrange(40)))
        for _ in range(chance.randrange(4)):
            if rubbish:
                rubbish[chance.randrange(len(rubbish))] = chance.randrange(256)
        if not tcp:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
                made.sendto(rubbish, (HOST, asker.port))
        elif chance.random() < 0.2:
            with socket.create_connection((HOST, asker.port)) as made:
                made.sendall(len(rubbish).to_bytes(2, "big") + rubbish)
    # Its queue may have been full, so that a question is lost: who asks tries again, as resolvers do.
    for _ in range(5):
        with contextlib.suppress(TimeoutError):
            assert asker.addresses("db.dev.svc.cluster.local", tcp=tcp) == ["10.244.0.1"]
            return
    pytest.fail("no answer any more")


def test_types_that_nobody_knows(asker: Asker) -> None:
    """A type without a name is NODATA where the name is, and NXDOMAIN where it is not."""
    put_headless(asker, 1)
    for name, rcode in (("db.dev.svc.cluster.local", RCODE.NOERROR), ("no.dev.svc.cluster.local", RCODE.NXDOMAIN)):
        query = DNSRecord.question(name)
        query.questions[0].qtype = 4711
        reply = DNSRecord.parse(query.send(HOST, asker.port, timeout=5))
        assert (reply.header.rcode, reply.rr) == (rcode, [])
