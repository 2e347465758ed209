"""ARP frames: what scapy builds for an address, and what becomes of each frame that arrives."""

from __future__ import annotations

import random
from ipaddress import IPv4Address

import pytest

from testbed.dataplane.arp import Fate, judge_frame
from testbed.programs.openelb.frames import build_frames, request_frames
from testbed.programs.openelb.responder import ArpResponder
from testbed.programs.proxy_status import ProxyMetrics

OWN = "0a:58:c0:a8:5d:0c"
CLIENT = "0a:58:c0:a8:5d:64"
LB = IPv4Address("192.168.93.231")
TABLE = build_frames(OWN, [LB])
ANYBODY = "ff:ff:ff:ff:ff:ff"


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def frame(
    op: int = 1, *, to: str = ANYBODY, source: str = CLIENT, sender: str = CLIENT, ip: str = "192.168.93.100",
    target: str = str(LB), target_mac: str = "00:00:00:00:00:00", header: str = "0001080006" + "04",
) -> bytes:  # fmt: skip
    """Return an ARP frame, by default the client's request for the address."""
    return b"".join(
        (
            mac(to), mac(source), b"\x08\x06", bytes.fromhex(header), op.to_bytes(2, "big"),
            mac(sender), IPv4Address(ip).packed, mac(target_mac), IPv4Address(target).packed,
        )
    )  # fmt: skip


def test_the_frames_of_an_address() -> None:
    """The pair of a takeover has the fields of upstream's; the probe's sender is 0.0.0.0."""
    frames = TABLE[LB.packed]
    request, reply = frames.gratuitous
    pair = {"source": OWN, "sender": OWN, "ip": str(LB), "target": str(LB), "target_mac": ANYBODY}
    assert request == frame(1, to=ANYBODY, **pair)  # type: ignore[arg-type]
    assert reply == frame(2, to=ANYBODY, **pair)  # type: ignore[arg-type]
    assert frames.probe == frame(1, source=OWN, sender=OWN, ip="0.0.0.0")


def test_another_process_builds_the_same_frames() -> None:
    """What the speaker has built for it is what scapy builds here."""
    addresses = [LB, IPv4Address("192.168.93.232")]
    assert request_frames(OWN, addresses) == build_frames(OWN, addresses)


@pytest.mark.parametrize(
    ("asked", "to", "ip"),
    [
        pytest.param(frame(), CLIENT, "192.168.93.100", id="a broadcast request"),
        pytest.param(frame(to=OWN), CLIENT, "192.168.93.100", id="a unicast request"),
        pytest.param(frame(ip="0.0.0.0"), CLIENT, "0.0.0.0", id="a probe (RFC 5227)"),
        pytest.param(frame(ip="10.9.9.9"), CLIENT, "10.9.9.9", id="from another network"),
        pytest.param(frame() + b"\0" * 18, CLIENT, "192.168.93.100", id="padded to Ethernet's 60 bytes"),
    ],
)
def test_what_is_answered(asked: bytes, to: str, ip: str) -> None:
    """The answer goes to the requester, from the link's MAC, and says that the address is there."""
    found = judge_frame(asked, TABLE, mac(OWN))
    assert (found.fate, found.address) == (Fate.ANSWERED, LB.packed)
    assert found.reply == frame(2, to=to, source=OWN, sender=OWN, ip=str(LB), target_mac=to, target=ip)


OTHER = "0a:58:c0:a8:5d:0d"


@pytest.mark.parametrize(
    ("arrived", "fate"),
    [
        pytest.param(frame(target="192.168.93.232"), Fate.OTHER_ADDRESS, id="for an address that is not announced"),
        pytest.param(frame(2, to=OWN), Fate.OTHER_ADDRESS, id="an answer about somebody else"),
        pytest.param(b"", Fate.MALFORMED, id="empty"),
        pytest.param(frame()[:41], Fate.MALFORMED, id="cut off"),
        pytest.param(frame(header="000608000604"), Fate.MALFORMED, id="not Ethernet"),
        pytest.param(frame(header="000186dd0604"), Fate.MALFORMED, id="not IPv4"),
        pytest.param(frame(header="000108000610"), Fate.MALFORMED, id="wrong length of addresses"),
        pytest.param(frame(3), Fate.MALFORMED, id="RARP's operation"),
        pytest.param(frame(0), Fate.MALFORMED, id="no operation"),
        pytest.param(frame(sender=OTHER), Fate.SPOOFED, id="two different senders"),
        pytest.param(frame(source=ANYBODY, sender=ANYBODY), Fate.SPOOFED, id="everybody is nobody"),
        pytest.param(
            frame(source="01:00:5e:00:00:01", sender="01:00:5e:00:00:01"), Fate.SPOOFED, id="a group as sender"
        ),
        pytest.param(frame(source="00:00:00:00:00:00", sender="00:00:00:00:00:00"), Fate.SPOOFED, id="no MAC at all"),
        pytest.param(frame(ip="127.0.0.1"), Fate.SPOOFED, id="a loopback address as sender"),
        pytest.param(frame(ip="224.0.0.1"), Fate.SPOOFED, id="a group's address as sender"),
        pytest.param(frame(ip="255.255.255.255"), Fate.SPOOFED, id="the broadcast address as sender"),
        pytest.param(frame(ip=str(LB)), Fate.FOREIGN, id="somebody announces our address"),
        pytest.param(
            frame(2, to=OWN, source=OTHER, sender=OTHER, ip=str(LB)), Fate.FOREIGN, id="somebody answers for it"
        ),
        pytest.param(frame(source=OWN, sender=OWN, ip=str(LB)), Fate.OTHER_ADDRESS, id="our own frame comes back"),
    ],
)
def test_what_is_not_answered(arrived: bytes, fate: Fate) -> None:
    """Nothing is sent back, whatever else it is."""
    found = judge_frame(arrived, TABLE, mac(OWN))
    assert (found.fate, found.reply) == (fate, b"")


def test_random_frames_break_nothing() -> None:
    """20,000 frames of noise, and of requests with some bytes changed: each has a fate, and only requests for us are answered."""
    chance = random.Random(1)
    for _ in range(20_000):
        data = bytearray(frame()) if chance.random() < 0.5 else bytearray(chance.randbytes(chance.randrange(0, 80)))
        for _ in range(chance.randrange(4)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        found = judge_frame(bytes(data), TABLE, mac(OWN))
        assert bool(found.reply) == (found.fate is Fate.ANSWERED)
        if found.reply:
            assert data[38:42] == LB.packed and data[20:22] == b"\0\1" and found.reply[0:6] == data[22:28]


class Unsent(ArpResponder):
    """A responder without a socket: what it would send is kept."""

    def __init__(self) -> None:
        self.interface, self.sent, self.foreign = "eth33", [], []
        self._metrics, self._table, self._mac, self._is_closed = ProxyMetrics(""), {}, mac(OWN), False
        self._on_foreign = lambda address, who: self.foreign.append((address, who))

    def _send(self, frame: bytes) -> None:
        self.sent.append(frame)


def test_a_responder_counts() -> None:
    """Requests and answers by address, the takeover once, and what is ignored by reason; a withdrawn address is forgotten."""
    responder = Unsent()
    responder.take(frame())
    responder.announce(LB, TABLE[LB.packed])
    assert responder.sent == list(TABLE[LB.packed].gratuitous) and responder.announced == {LB}
    for arrived in (
        frame(),
        frame(),
        frame()[:20],
        frame(sender=OTHER),
        frame(2, source=OTHER, sender=OTHER, ip=str(LB)),
    ):
        responder.take(arrived)
    assert len(responder.sent) == 4 and responder.foreign == [(LB, OTHER)]
    text = responder._metrics.render().splitlines()
    for line in (
        'requests_received{ip="192.168.93.231"} 2', 'responses_sent{ip="192.168.93.231"} 2',
        'gratuitous_sent{ip="192.168.93.231"} 1', 'arp_frames_ignored{reason="malformed"} 1',
        'arp_frames_ignored{reason="spoofed"} 1', 'arp_frames_ignored{reason="foreign"} 1',
    ):  # fmt: skip
        assert line in text
    responder.withdraw(LB)
    responder.take(frame())
    assert len(responder.sent) == 4 and "requests_received{" not in responder._metrics.render()
