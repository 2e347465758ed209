"""ClusterIPs and node ports: who may have which, in two bands each.

::

    first … offset-1 | offset … last        asked for by hand: either band
        lower band   |   upper band         given out: the upper band from a random point on, then the lower

The bands keep automatic choices out of the way of people's (KEP-3070, KEP-3668). An allocator only records; a
`Claim` gathers what one request takes and frees, and nothing counts until the request is committed.

Source: kubernetes pkg/registry/core/service/{ipallocator,portallocator}, allocator/bitmap.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network

from testbed.errors import PoolExhausted

_MIN_BAND = 16


class AlreadyAllocated(Exception):
    """The number asked for is taken."""


class OutOfRange(Exception):
    """The number asked for is not in the range."""


def band_offset(size: int, step: int, largest: int) -> int:
    """Return how many numbers at the start of a range are kept for requests by hand: none of a tiny range."""
    return 0 if size <= _MIN_BAND else min(max(_MIN_BAND, size // step), largest)


class Pool:
    """The numbers ``first`` … ``first + size - 1``; ``offset`` of them at the start are the lower band."""

    def __init__(self, first: int, size: int, offset: int, pick: Callable[[int], int]) -> None:
        self.first = first
        self.size = size
        self._offset = offset
        self._pick = pick
        self.used: set[int] = set()

    def choose(self, taken: set[int]) -> int:
        """Return a free number that is not in ``taken`` either."""
        for start, length in ((self.first + self._offset, self.size - self._offset), (self.first, self._offset)):
            if length <= 0:
                continue
            at = self._pick(length)
            for step in range(length):
                number = start + (at + step) % length
                if number not in self.used and number not in taken:
                    return number
        raise PoolExhausted("range is full")

    def check(self, number: int, taken: set[int]) -> None:
        """Raise OutOfRange or AlreadyAllocated for a number that cannot be had."""
        if not self.first <= number < self.first + self.size:
            raise OutOfRange
        if number in self.used or number in taken:
            raise AlreadyAllocated


class Claim:
    """What one request takes from a pool and gives back to it, once it is committed."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._taken: set[int] = set()
        self._freed: set[int] = set()

    def take(self, number: int) -> None:
        """Claim this number. Raises OutOfRange or AlreadyAllocated."""
        self._pool.check(number, self._taken)
        self._taken.add(number)

    def take_any(self) -> int:
        """Claim a free number and return it. Raises PoolExhausted."""
        number = self._pool.choose(self._taken)
        self._taken.add(number)
        return number

    def free(self, number: int) -> None:
        """Give a number back."""
        self._freed.add(number)

    def commit(self) -> None:
        """Make it count."""
        self._pool.used -= self._freed
        self._pool.used |= self._taken


def cluster_ip_pool(network: IPv4Network, pick: Callable[[int], int]) -> Pool:
    """Return the pool of a Service range; its network and broadcast addresses are not used."""
    size = network.num_addresses
    return Pool(int(network.network_address) + 1, max(size - 2, 0), band_offset(size, 16, 256), pick)


def node_port_pool(ports: tuple[int, int], pick: Callable[[int], int]) -> Pool:
    """Return the pool of a node port range; both ends belong to it."""
    size = ports[1] - ports[0] + 1
    return Pool(ports[0], size, band_offset(size, 32, 128), pick)


def address_text(number: int) -> str:
    return str(IPv4Address(number))
