"""strictARP: who answers ARP for an address that three nodes have bound. No IPVS is needed for that."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import time
from collections.abc import Iterator

import pytest
from ipvs_support import network_namespace
from packet_world import hold_namespace

from testbed.dataplane.ipvs import make_ipvs_settings, render_sysctls
from testbed.kernel.ipvs_node import BoundAddresses
from testbed.kernel.pace import patient
from testbed.kernel.rtnetlink import RtnetlinkSocket
from testbed.kernel.sysctl import apply_sysctls
from testbed.model.proxyconfig import parse_proxy_config
from testbed.model.service import NodeName, NodeView

pytestmark = pytest.mark.root

BALANCER, CLIENT = "192.168.93.231", "192.168.93.100"
NODES = 3
_ARP = 0x0806
_ANSWER_S, _SILENCE_S, _ANOTHER_S = 10.0, 1.0, 0.5


def _run(*lines: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input="".join(f"{line}\n" for line in lines), text=True, check=True)


@contextlib.contextmanager
def lan() -> Iterator[list[int]]:
    """Be in a namespace with a bridge, and give a process in each of three nodes' namespaces that hang on it."""
    with network_namespace(), contextlib.ExitStack() as stack:
        _run("link add lan type bridge forward_delay 0", f"addr add {CLIENT}/24 dev lan", "link set lan up")
        pids = []
        for number in range(1, NODES + 1):
            pid = hold_namespace(stack)
            _run(f"link add n{number} master lan type veth peer name eth0 netns {pid}", f"link set n{number} up")
            with network_namespace(pid):
                _run("link set lo up", f"addr add 192.168.93.1{number}/24 dev eth0", "link set eth0 up")
            pids.append(pid)
        yield pids


def program(pid: int, kind: str, strict: bool) -> None:
    """Do in a node what a sync in ipvs mode does about a load balancer address, but for IPVS itself."""
    config, problems = parse_proxy_config({"mode": "ipvs", "ipvs": {"strictARP": strict}})
    assert not problems
    settings = make_ipvs_settings(config, NodeView(name=NodeName("node")), [])
    sysctls = {name: value for name, value in render_sysctls(settings).items() if not name.startswith("vs/")}
    with network_namespace(pid), RtnetlinkSocket("node") as links:
        # a namespace begins with the settings of the first one
        apply_sysctls({"net/ipv4/conf/all/arp_ignore": "0", "net/ipv4/conf/all/arp_announce": "0"}, "node")
        device = BoundAddresses(links, kind)
        device.ensure()
        links.send([request for _, request in device.binds([BALANCER])])
        apply_sysctls({f"net/ipv4/{name}": value for name, value in sysctls.items()}, "node")


def who_has(address: str, *, expected: int) -> set[bytes]:
    """Return the hardware addresses that answer an ARP request in this namespace.

    Args:
        expected: how many; so many are waited for, and then for another one that should not be.
    """
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ARP)) as wire:
        wire.bind(("lan", _ARP))
        own = wire.getsockname()[4]
        request = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + own + socket.inet_aton(CLIENT) + bytes(6)
        wire.send(b"\xff" * 6 + own + struct.pack(">H", _ARP) + request + socket.inet_aton(address))
        found: set[bytes] = set()
        deadline = time.monotonic() + (patient(_ANSWER_S) if expected else _SILENCE_S)
        while (left := deadline - time.monotonic()) > 0 and len(found) < NODES:
            wire.settimeout(left)
            with contextlib.suppress(TimeoutError):
                frame = wire.recv(100)
                if frame[20:22] == b"\0\2" and frame[28:32] == socket.inet_aton(address):
                    found.add(frame[22:28])
                    if len(found) == expected:
                        deadline = time.monotonic() + _ANOTHER_S
        return found


@pytest.mark.parametrize(
    "kind",
    [
        # a bridge that is down holds addresses as a dummy link does, on kernels without those
        pytest.param("bridge", id="stand-in"),
        pytest.param("dummy", marks=pytest.mark.ipvs, id="dummy"),
    ],
)
def test_who_answers_for_a_bound_address(kind: str) -> None:
    """Without strictARP every node that has bound an address answers for it; with it none does, and all for their own."""
    with lan() as pids:
        for pid in pids:
            program(pid, kind, strict=False)
        assert len(who_has(BALANCER, expected=NODES)) == NODES
        for pid in pids:
            program(pid, kind, strict=True)
        assert who_has(BALANCER, expected=0) == set()
        assert all(len(who_has(f"192.168.93.1{number}", expected=1)) == 1 for number in range(1, NODES + 1))
