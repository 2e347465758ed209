"""Who else answers for the addresses of one link: when to ask, and when the answers are worth telling.

::

    announced ── 2 s ──▶ probe ── 1 s ──▶ answers ── the same twice ──▶ told, once; asked again 10 s later
                           ▲                 └─────── another ───────▶ 2 s ─┐
                           └────────────────────────────────────────────────┘

While members come and go addresses change hands, and two may answer for a moment: then everything starts over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final

AFTER_S: Final = 2.0
ANSWERS_S: Final = 1.0
EVERY_S: Final = 10.0
NOBODY: Final[frozenset[str]] = frozenset()


@dataclass(slots=True)
class _Watched:
    at_s: float
    answers: set[str] | None = None  # to the probe that is out
    before: frozenset[str] | None = None  # to the one before it
    told: frozenset[str] = NOBODY


@dataclass(slots=True)
class Rivals:
    """The MACs that answer for announced addresses beside our own."""

    _watched: dict[IPv4Address, _Watched] = field(default_factory=dict)

    def watch(self, address: IPv4Address, now_s: float) -> None:
        """Begin with an address that is announced from now on."""
        self._watched[address] = _Watched(now_s + AFTER_S)

    def forget(self, address: IPv4Address) -> None:
        self._watched.pop(address, None)

    def saw(self, address: IPv4Address, mac: str, now_s: float) -> None:
        """Take in that somebody has said that he has an address: as an answer, or unasked, which brings the probe forward."""
        watched = self._watched.get(address)
        if watched is None:
            return
        if watched.answers is not None:
            watched.answers.add(mac)
        else:
            watched.at_s = min(watched.at_s, now_s + AFTER_S)

    def wait(self, now_s: float) -> None:
        """Start over: what is out or was answered may be of two that hand over an address."""
        for watched in self._watched.values():
            watched.answers = watched.before = None
            watched.at_s = now_s + AFTER_S

    def due_s(self) -> float:
        """Return when there is something to do next; infinity for never."""
        return min((watched.at_s for watched in self._watched.values()), default=math.inf)

    def to_probe(self, now_s: float) -> list[IPv4Address]:
        """Return the addresses that are to be asked for now; the answers are waited for."""
        found = []
        for address, watched in self._watched.items():
            if now_s >= watched.at_s and watched.answers is None:
                watched.answers, watched.at_s = set(), now_s + ANSWERS_S
                found.append(address)
        return found

    def news(self, now_s: float) -> list[tuple[IPv4Address, frozenset[str]]]:
        """Return the addresses for which other MACs answer than was told before, or none any more."""
        found = []
        for address, watched in self._watched.items():
            if watched.answers is None or now_s < watched.at_s:
                continue
            macs = frozenset(watched.answers)
            is_sure = macs == (watched.told if watched.before is None else watched.before)
            watched.answers, watched.before = None, macs
            watched.at_s = now_s + (EVERY_S if is_sure else AFTER_S)
            if is_sure and macs != watched.told:
                watched.told = macs
                found.append((address, macs))
        return found
