"""Heartbeats between speakers: who is believed to live, and which datagrams are believed at all."""

from __future__ import annotations

import pytest

from testbed.dataplane.membership import (
    BadHeartbeat,
    Change,
    Heartbeat,
    Membership,
    Timings,
    decode_heartbeat,
    encode_heartbeat,
)

SECRET = b"openelb-speakers"
NOBODY: frozenset[str] = frozenset()


def beat(node: str = "b", beat: int = 1, boot: int = 1, **fields: object) -> Heartbeat:
    return Heartbeat(node=node, boot=boot, beat=beat, **fields)  # type: ignore[arg-type]


def test_a_heartbeat_arrives_as_it_was_sent() -> None:
    """Encoding and decoding with one secret."""
    sent = beat(cannot=frozenset({"x", "y"}), wants_answer=True)
    assert decode_heartbeat(encode_heartbeat(sent, SECRET), SECRET) == sent


@pytest.mark.parametrize(
    "datagram",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff" * 1400, id="noise"),
        pytest.param(b"testbed-speaker/1 0000 {}", id="wrong signature"),
        pytest.param(encode_heartbeat(beat(), b"another secret"), id="another secret"),
        pytest.param(encode_heartbeat(beat(), b""), id="no secret"),
        pytest.param(encode_heartbeat(beat(), SECRET).replace(b'"b"', b'"c"'), id="another name"),
        pytest.param(encode_heartbeat(beat(), SECRET)[:-1], id="cut off"),
        pytest.param(encode_heartbeat(beat(), SECRET).replace(b"/1 ", b"/2 "), id="another version"),
    ],
)
def test_what_is_not_believed(datagram: bytes) -> None:
    """Only what somebody has signed who knows the secret of Secret memberlist."""
    with pytest.raises(BadHeartbeat):
        decode_heartbeat(datagram, SECRET)


def test_life_and_death() -> None:
    """Who is heard lives; who is silent for dead_after is dead, and lives again when heard."""
    members = Membership("a", Timings(heartbeat_s=0.4, dead_after_s=1.6))
    assert members.alive() == {"a": NOBODY}
    assert members.hear(beat(), 10.0) == Change(came=frozenset({"b"}))
    assert not members.hear(beat(beat=2), 10.4)
    assert members.next_expiry_s() == pytest.approx(12.0)
    assert not members.expire(11.9)
    assert members.expire(12.0) == Change(went=frozenset({"b"})) and members.alive() == {"a": NOBODY}
    assert not members.expire(20.0)
    assert members.hear(beat(beat=3), 21.0) == Change(came=frozenset({"b"}), back=frozenset({"b"}))


def test_a_repetition_brings_nobody_back() -> None:
    """A recorded heartbeat is old: of an earlier beat, or of an earlier start of the speaker."""
    members = Membership("a", Timings(0.4, 1.6))
    members.hear(beat(beat=7, boot=5), 0.0)
    members.expire(9.0)
    for old in (beat(beat=7, boot=5), beat(beat=6, boot=5), beat(beat=99, boot=4), beat("a", beat=99, boot=99)):
        assert members.hear(old, 9.0) is None
    assert members.alive() == {"a": NOBODY}
    assert members.hear(beat(beat=1, boot=6), 9.0)


def test_what_a_member_cannot_is_news() -> None:
    """A change of what it cannot announce is told, once."""
    members = Membership("a", Timings(0.4, 1.6))
    members.hear(beat(), 0.0)
    assert members.hear(beat(beat=2, cannot=frozenset({"p"})), 0.1) == Change(said=True)
    assert not members.hear(beat(beat=3, cannot=frozenset({"p"})), 0.2)
    assert members.alive()["b"] == {"p"}


def test_default_and_upstream_timings() -> None:
    """By default a death is noticed within 2 s; memberlist needs 5 to 8 for clusters of up to ten nodes."""
    assert Timings().dead_after_s <= 2.0 - Timings().heartbeat_s / 2 + 0.01
    for members in (1, 3, 5):
        assert 5.0 <= Timings.upstream(members).dead_after_s <= 8.0
    assert Timings.upstream(100).dead_after_s > 8
