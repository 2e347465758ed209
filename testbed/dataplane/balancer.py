"""Which endpoint a connection gets in userspace mode: turns, session affinity, and what follows a dial that failed.

Holds no socket and reads no clock: times are seconds that only grow, chance is an argument.

Source: kubernetes pkg/proxy/userspace/roundrobin.go, proxysocket.go (v1.17).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from testbed.model.service import Endpoint

#: A client's connection is tried so many times, each at the next endpoint, and waited for so long (EndpointDialTimeouts).
DIAL_TIMEOUTS_S: Final = (0.25, 0.5, 1.0, 2.0)
#: So many ports of portRange are drawn ahead (portsBufSize), and a port that was given back rests (nextFreePortCooldown).
_DRAWN_AHEAD: Final = 16
COOL_DOWN_S: Final = 0.5

Shuffle = Callable[[list[str]], None]


def balanced_endpoints(endpoints: Iterable[Endpoint]) -> tuple[str, ...]:
    """Return ``address:port`` of the endpoints that userspace mode uses: the ready ones, wherever they are.

    It knows neither traffic policies nor topology hints, and none that serve while they terminate.
    """
    return tuple(endpoint.text for endpoint in endpoints if endpoint.ready)


@dataclass(slots=True)
class _Stay:
    """A client's endpoint, and when it was last used."""

    endpoint: str
    used_s: float


@dataclass(slots=True)
class Rotation:
    """The endpoints of one service port, in an order drawn by chance each time they change, and the clients bound to them.

    ``affinity_s`` 0: no session affinity.
    """

    affinity_s: int = 0
    endpoints: tuple[str, ...] = ()
    _index: int = 0
    _stays: dict[str, _Stay] = field(default_factory=dict)

    def set_endpoints(self, endpoints: Collection[str], shuffle: Shuffle) -> None:
        """Take in a new list. The same ones again change nothing; clients of those that stay keep theirs."""
        if set(endpoints) == set(self.endpoints):
            return
        order = sorted(endpoints)
        shuffle(order)
        self.endpoints, self._index = tuple(order), 0
        for client in [client for client, stay in self._stays.items() if stay.endpoint not in endpoints]:
            del self._stays[client]

    def set_affinity(self, affinity_s: int) -> None:
        """Change how long a client stays after its latest connection; 0 forgets all."""
        self.affinity_s = affinity_s
        if not affinity_s:
            self._stays.clear()

    def next(self, client: str, now_s: float, *, reset: bool = False) -> str:
        """Return the endpoint for a connection of a client (its address), '' when there is none.

        Args:
            client: Its IP address.
            now_s: The time.
            reset: The endpoint that the client is bound to did not answer.
        """
        if not self.endpoints:
            return ""
        if self.affinity_s and not reset:
            stay = self._stays.get(client)
            if stay is not None and now_s - stay.used_s < self.affinity_s:
                stay.used_s = now_s
                return stay.endpoint
        endpoint = self.endpoints[self._index]
        self._index = (self._index + 1) % len(self.endpoints)
        if self.affinity_s:
            self._stays[client] = _Stay(endpoint, now_s)
        return endpoint

    def purge(self, now_s: float) -> None:
        """Forget the clients whose time is over."""
        for client in [c for c, stay in self._stays.items() if now_s - stay.used_s >= self.affinity_s]:
            del self._stays[client]

    @property
    def clients(self) -> tuple[str, ...]:
        """Who is bound to an endpoint."""
        return tuple(self._stays)


class Try(NamedTuple):
    """Whom to dial, and how long to wait for an answer."""

    endpoint: str
    timeout_s: float


class Dial:
    """The tries of one client's connection: four at most, the first as affinity has it, the others at the next endpoints."""

    __slots__ = ("_client", "_rotation", "_tries")

    def __init__(self, rotation: Rotation, client: str) -> None:
        self._rotation = rotation
        self._client = client
        self._tries = 0

    def next(self, now_s: float) -> Try | None:
        """Return the next try, None when there is nobody to dial, or all tries failed."""
        if self._tries == len(DIAL_TIMEOUTS_S):
            return None
        endpoint = self._rotation.next(self._client, now_s, reset=self._tries > 0)
        if not endpoint:
            return None
        self._tries += 1
        return Try(endpoint, DIAL_TIMEOUTS_S[self._tries - 1])


class PortPool:
    """The proxy ports of ``portRange``: 16 are drawn ahead by chance, and one that is given back rests for half a second.

    Args:
        first, last: The range, both included.
        choose: Returns one of the ports it is given.

    Source: kubernetes pkg/proxy/userspace/port_allocator.go (v1.17).
    """

    def __init__(self, first: int, last: int, choose: Callable[[Sequence[int]], int]) -> None:
        self._range = range(first, last + 1)
        self._choose = choose
        self._used: set[int] = set()  # drawn ahead, or given out
        self._resting: dict[int, float] = {}  # port -> until when
        self._drawn: deque[int] = deque()

    def __str__(self) -> str:
        return f"{self._range[0]}-{self._range[-1]}"

    def take(self, now_s: float) -> int | None:
        """Return a port that nobody has, None when there is none now (see `free_at_s`)."""
        while len(self._drawn) < _DRAWN_AHEAD:
            free = [p for p in self._range if p not in self._used and self._resting.get(p, now_s) <= now_s]
            if not free:
                break
            port = self._choose(free)
            self._used.add(port)
            self._resting.pop(port, None)
            self._drawn.append(port)
        return self._drawn.popleft() if self._drawn else None

    def give_back(self, port: int, now_s: float) -> None:
        """Take a port back."""
        self._used.discard(port)
        self._resting[port] = now_s + COOL_DOWN_S

    @property
    def free_at_s(self) -> float | None:
        """When the next port has rested; None when none rests."""
        return min(self._resting.values(), default=None)
