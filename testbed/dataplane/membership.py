"""Who is alive among the speakers: heartbeats in, members out. Pure; time is an argument.

Every speaker tells every other one that it lives, a few times a second, signed with the secret that they share. Who has
not been heard for long enough is dead until heard again. (Upstream gossips with hashicorp/memberlist, which asks one
member a second; `Timings.upstream` is as late as that.)

A heartbeat on the wire: ``testbed-speaker/1 HMAC-SHA256 JSON``, JSON with the sender's name, when it started (``boot``), a
counter that only grows (``beat``), the pools that it cannot announce, and whether it wants an answer.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MAGIC = b"testbed-speaker/1"
MAX_BYTES = 60_000  # of a datagram


@dataclass(frozen=True, slots=True)
class Timings:
    """How often a speaker tells that it lives, and for how long one that says nothing is believed to."""

    heartbeat_s: float = 0.4
    dead_after_s: float = 1.6  # four heartbeats: one that is late, or two that are lost, kill nobody

    @classmethod
    def upstream(cls, members: int) -> Timings:
        """Return memberlist's LAN defaults: a probe a second, a suspicion of 4 x max(1, log10 N) probes.

        A member is asked once in N seconds, and again through others: half of that is added.
        """
        suspicion_s = 4 * max(1.0, math.log10(max(1, members)))
        return cls(heartbeat_s=1.0, dead_after_s=1.0 + suspicion_s + max(1, members) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What one speaker says. ``cannot``: names of Eips that it cannot announce on its node."""

    node: str
    boot: int
    beat: int
    cannot: frozenset[str] = frozenset()
    wants_answer: bool = False


class BadHeartbeat(ValueError):
    """Not a heartbeat of somebody who knows the secret."""


def encode_heartbeat(heartbeat: Heartbeat, secret: bytes) -> bytes:
    """Return a signed datagram."""
    text = json.dumps(
        {
            "node": heartbeat.node,
            "boot": heartbeat.boot,
            "beat": heartbeat.beat,
            "cannot": sorted(heartbeat.cannot),
            "answer": heartbeat.wants_answer,
        },
        separators=(",", ":"),
    ).encode()
    return b" ".join((_MAGIC, _signature(text, secret), text))


def decode_heartbeat(datagram: bytes, secret: bytes) -> Heartbeat:
    """Return what a datagram says.

    Raises:
        BadHeartbeat: it is none, or is not signed with the secret.
    """
    parts = datagram.split(b" ", 2)
    if len(parts) != 3 or parts[0] != _MAGIC:
        raise BadHeartbeat("not a heartbeat")
    if not hmac.compare_digest(parts[1], _signature(parts[2], secret)):
        raise BadHeartbeat("signed with another secret")
    try:  # signed, and so written by a speaker, but of which version?
        said: Mapping[str, Any] = json.loads(parts[2])
        return Heartbeat(
            node=str(said["node"]),
            boot=int(said["boot"]),
            beat=int(said["beat"]),
            cannot=frozenset(map(str, said["cannot"])),
            wants_answer=bool(said["answer"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BadHeartbeat(f"cannot be read: {error!r}") from error


def _signature(text: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, text, hashlib.sha256).hex().encode()


@dataclass(slots=True)
class _Member:
    last: Heartbeat
    heard_s: float
    is_alive: bool = True


@dataclass(frozen=True, slots=True)
class Change:
    """What became of the membership: who came (for the first time, or ``back`` from the dead), who went, who said what."""

    came: frozenset[str] = frozenset()
    back: frozenset[str] = frozenset()
    went: frozenset[str] = frozenset()
    said: bool = False  # somebody can now announce other pools

    def __bool__(self) -> bool:
        return bool(self.came or self.went or self.said)


@dataclass(slots=True)
class Membership:
    """The speakers that one speaker believes to live, itself always among them."""

    node: str
    timings: Timings
    cannot: frozenset[str] = frozenset()  # our own
    _members: dict[str, _Member] = field(default_factory=dict)

    def alive(self) -> dict[str, frozenset[str]]:
        """Return the live members, each with the Eips that it cannot announce."""
        others = {name: member.last.cannot for name, member in self._members.items() if member.is_alive}
        return {**others, self.node: self.cannot}

    def hear(self, heartbeat: Heartbeat, now_s: float) -> Change | None:
        """Take a heartbeat in; None for one that is ours, or old: a repetition brings nobody back to life."""
        if heartbeat.node == self.node:
            return None
        known = self._members.get(heartbeat.node)
        if known is None:
            self._members[heartbeat.node] = _Member(heartbeat, now_s)
            return Change(came=frozenset({heartbeat.node}))
        if (heartbeat.boot, heartbeat.beat) <= (known.last.boot, known.last.beat):
            return None
        was_alive, said = known.is_alive, heartbeat.cannot != known.last.cannot
        self._members[heartbeat.node] = _Member(heartbeat, now_s)
        came = frozenset() if was_alive else frozenset({heartbeat.node})
        return Change(came=came, back=came, said=said)

    def expire(self, now_s: float) -> Change:
        """Declare dead who has been silent for too long."""
        silent = {
            name
            for name, member in self._members.items()
            if member.is_alive and now_s >= member.heard_s + self.timings.dead_after_s
        }
        for name in silent:
            self._members[name].is_alive = False
        return Change(went=frozenset(silent))

    def next_expiry_s(self) -> float:
        """Return when somebody will be dead who is not heard by then; infinity when nobody else lives."""
        living = (member.heard_s for member in self._members.values() if member.is_alive)
        return min(living, default=math.inf) + self.timings.dead_after_s
