"""Unit tests meet no network but a loopback of their own: nothing they do can change this machine's rules or settings."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator

import pytest

from testbed.kernel import linux

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1  # linux/sockios.h, linux/if.h


@pytest.fixture(scope="module", autouse=True)
def own_network() -> Iterator[None]:
    """A network namespace for the tests of a module. Who is not root has none, and cannot change the machine's either."""
    if os.geteuid() != 0:
        yield
        return
    outside = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.unshare(linux.CLONE_NEWNET)
    except OSError:  # root in a container that may not
        os.close(outside)
        yield
        return
    try:
        _set_up("lo")
        yield
    finally:
        linux.setns(outside, linux.CLONE_NEWNET)
        os.close(outside)


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """The command line ends deaf to signals, as its process does; this one goes on."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.unraisablehook = hook


def _set_up(link: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", link.encode(), 0)
        flags = struct.unpack_from("16xh", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[0]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", link.encode(), flags | _IFF_UP))
