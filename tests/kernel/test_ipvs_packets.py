"""Real packets through IPVS: the table of the other modes with the differences of this one; servers that die and drain."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ipvs_support import network_namespace
from packet_world import NODE_IP, OUTSIDE, PODS, World, packet_world
from proxy_support import POD_CIDR, endpoint, endpoint_slice, node_object, service
from test_packets import FLOWS, HERE, POD, SERVICES, SLICES, THERE

from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.ipvs import IpvsRenderer
from testbed.dataplane.trace import Node, Packet, Verdict
from testbed.dataplane.trace_ipvs import IpvsTracer
from testbed.kernel.iptables import Backend, Iptables
from testbed.kernel.ipvs_node import IpvsNode
from testbed.kernel.runner import SubprocessRunner
from testbed.model.proxyconfig import parse_proxy_config
from testbed.model.service import parse_node
from testbed.programs.proxy_ipvs import CHECK_INTERVAL_S, IpvsProxier

pytestmark = [pytest.mark.root, pytest.mark.ipvs]

#: Where this mode differs: what comes back, and why.
DIFFERENCES = {
    # The virtual server of an external address has the local endpoints only, whoever asks.
    "policy Local: pod to load balancer": (f"pod1 {POD}",),
    # … and what comes from the node is not masqueraded.
    "policy Local: node to load balancer": (f"pod1 {NODE_IP}",),
    # Without a local endpoint the others serve. Here their answers pass the node; in a cluster they would not.
    "policy Local, none here: outside": (f"pod2 {OUTSIDE}",),
    "policy Local, none here: outside to NodePort": (f"pod2 {OUTSIDE}",),
    "policy Local, none here: node": (f"pod2 {NODE_IP}",),
}

_ECHO = """
import socket, sys, threading
server = socket.create_server(("0.0.0.0", 8080), backlog=64)
sys.stdout.write("ready\\n"); sys.stdout.flush()
def serve(peer):
    while data := peer.recv(100): peer.sendall(sys.argv[1].encode())
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
_TALKER = """
import json, socket, sys
held = socket.create_connection((sys.argv[1], 80), timeout=5)
for line in sys.stdin:
    try:
        held.sendall(b"?"); answer = held.recv(100).decode() or "closed"
    except OSError as error: answer = type(error).__name__
    sys.stdout.write(json.dumps(answer) + "\\n"); sys.stdout.flush()
"""
_FROM_ONE_PORT = """
import json, socket, sys
for address in sys.argv[2:]:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.settimeout(3)
        s.bind(("", int(sys.argv[1])))
        try:
            s.connect((address, 80)); answer = s.recv(100).decode()
        except OSError as error: answer = type(error).__name__
    sys.stdout.write(json.dumps(answer) + "\\n"); sys.stdout.flush()
"""


class Programmed:
    """A world whose node is programmed by a proxier of its own, whose clock is ours."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.now_s = 0.0
        config, problems = parse_proxy_config({"clusterCIDR": POD_CIDR, "mode": "ipvs"})
        assert not problems
        self._config, self._tracker = config, ChangeTracker("node1")
        runner = SubprocessRunner({"XTABLES_LOCKFILE": str(folder / "lock")})
        with self.inside():
            node = IpvsNode(runner, "node1")
            self.proxier = IpvsProxier(node, Iptables(runner, Backend.LEGACY), clock=lambda: self.now_s)

    def inside(self) -> contextlib.AbstractContextManager[None]:
        return network_namespace(self.world.pids["node"])

    def sync(self, services: list[dict[str, Any]], slices: list[dict[str, Any]]) -> None:
        self._tracker.replace_services(services)
        self._tracker.replace_slices(slices)
        with self.inside():
            settings = self.proxier.make_settings(self._config, parse_node(node_object()))
            assert self.proxier.sync(*self._tracker.take(), settings).refused == {}
        self._settings = settings

    def tend(self, after_s: float) -> None:
        self.now_s += after_s
        with self.inside():
            self.proxier.tend()

    def servers(self) -> str:
        with self.inside():
            return SubprocessRunner().run(["ipvsadm", "-Ln"])

    def tracer(self, state: Any) -> IpvsTracer:
        renderer = IpvsRenderer(self._settings)
        renderer.update(state)
        return IpvsTracer(renderer, Node.of(NODE_IP, *(f"{ip.rpartition('.')[0]}.254" for ip in PODS.values())))


@pytest.fixture(scope="module")
def programmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programmed]:
    with packet_world() as world:
        made = Programmed(world, tmp_path_factory.mktemp("node"))
        try:
            made.sync(SERVICES, SLICES)
            yield made
        finally:
            made.proxier.close()


def test_flows(programmed: Programmed) -> None:
    """Packets get where the table of the other modes says, but for the named differences; the interpreter agrees."""
    tracker = ChangeTracker("node1")
    tracker.replace_services(SERVICES)
    tracker.replace_slices(SLICES)
    tracer = programmed.tracer(tracker.take()[0])
    wrong = []
    for name, where, source, address, port, answers in FLOWS:
        protocol = "udp" if port == 30008 or address == "172.30.0.8" else "tcp"
        wanted = sorted(DIFFERENCES.get(name, answers))
        # they take turns: a few requests meet all of them
        found = programmed.world.ask(
            where, address, port, source=source, protocol=protocol, times=6, answered=wanted != ["timeout"]
        )
        sender = source or {"client": POD, "pod1": HERE}[where]
        fate = tracer.trace(Packet(sender, address, port, protocol))
        names = {HERE: "pod1", THERE: "pod2"}
        traced = {names[e.partition(":")[0]] for e in fate.endpoints} or {
            {Verdict.DROP: "timeout", Verdict.REJECT: "refused"}[fate.verdict]
        }
        if found != wanted or traced != {answer.split()[0] for answer in wanted}:
            wrong.append((name, found, wanted, traced))
    assert wrong == []


def test_turns_affinity_and_other_ports(programmed: Programmed) -> None:
    """Connections take turns exactly; a client with affinity stays; a port that no Service has is refused."""
    world = programmed.world
    assert len(world.ask("client", "172.30.0.1", 80, times=2)) == 2
    assert len(world.ask("client", "172.30.0.9", 80, times=6)) == 1
    assert world.ask("client", "172.30.0.1", 81, times=1) == ["refused"]


def test_a_closed_connection_is_remembered(programmed: Programmed) -> None:
    """A connection straight to a pod, from the port of one through a Service to it, is taken for that one: its answer is lost."""
    for port, addresses, answers in (
        (33_001, (HERE, "172.30.0.7"), [f"pod1 {POD}"] * 2),
        (33_002, ("172.30.0.7", HERE), [f"pod1 {POD}", "TimeoutError"]),
        (33_003, ("172.30.0.7", THERE), [f"pod1 {POD}", f"pod2 {POD}"]),
    ):
        with program(programmed.world, "client", _FROM_ONE_PORT, str(port), *addresses) as client:
            assert client.stdout
            assert [json.loads(client.stdout.readline()) for _ in addresses] == answers, (port, addresses)


@contextlib.contextmanager
def program(world: World, where: str, text: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a namespace; kill it in the end."""
    command = ["nsenter", f"--net=/proc/{world.pids[where]}/ns/net", sys.executable, "-S", "-c", text, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _talk(talker: subprocess.Popen[str]) -> str:
    assert talker.stdin and talker.stdout
    talker.stdin.write("\n")
    talker.stdin.flush()
    return str(json.loads(talker.stdout.readline()))


def test_open_connection_outlives_its_endpoint(programmed: Programmed, eventually: Callable[..., Any]) -> None:
    """A connection goes on while its server drains; new ones go elsewhere; the server goes when the connection has ended."""
    world = programmed.world
    held = service("held", "172.30.0.20")
    both = [endpoint(HERE), endpoint(THERE, "node2")]
    with program(world, "pod1", _ECHO, "pod1") as one, program(world, "pod2", _ECHO, "pod2") as other:
        assert (
            one.stdout and other.stdout and (one.stdout.readline(), other.stdout.readline()) == ("ready\n", "ready\n")
        )
        programmed.sync([held], [endpoint_slice("held", *both[:1], port=8080)])
        with program(world, "client", _TALKER, "172.30.0.20") as talker:
            assert _talk(talker) == "pod1"
            programmed.sync([held], [endpoint_slice("held", *both, port=8080)])
            programmed.sync([held], [endpoint_slice("held", both[1], port=8080)])
            assert f"{HERE}:8080" in programmed.servers() and len(programmed.proxier.retiring) == 1
            programmed.tend(CHECK_INTERVAL_S)
            assert _talk(talker) == "pod1"
            with program(world, "client", _TALKER, "172.30.0.20") as second:
                assert _talk(second) == "pod2"
        # closed connections are remembered for a while; with that shortened, the next look finds none
        with programmed.inside():
            SubprocessRunner().run(["ipvsadm", "--set", "1", "1", "1"])

        def is_gone() -> bool:
            programmed.tend(CHECK_INTERVAL_S)
            return f"{HERE}:8080" not in programmed.servers()

        # the timeout of a state is taken when it is entered: TIME_WAIT's was 2 minutes then
        with programmed.inside():
            SubprocessRunner().run(["ipvsadm", "--set", "900", "120", "300"])
            listed = SubprocessRunner().run(["ipvsadm", "-Lnc"])
        if f"{HERE}:8080" in listed:
            assert not is_gone()  # it waits for what the kernel still counts
        programmed.sync([], [])
        eventually(is_gone)
        assert programmed.proxier.retiring == ()


def test_server_that_dies_under_load(programmed: Programmed) -> None:
    """Its clients are refused until its endpoint is gone from the slice; then none is, and nobody meets it any more."""
    world = programmed.world
    load = service("load", "172.30.0.21")
    both = [endpoint(HERE), endpoint(THERE, "node2")]
    with program(world, "pod1", _ECHO, "pod1") as one, program(world, "pod2", _ECHO, "pod2") as other:
        assert (
            one.stdout and other.stdout and (one.stdout.readline(), other.stdout.readline()) == ("ready\n", "ready\n")
        )
        programmed.sync([load], [endpoint_slice("load", *both, port=8080)])
        talks = []
        for _ in range(4):
            with program(world, "client", _TALKER, "172.30.0.21") as talker:
                talks.append(_talk(talker))
        assert sorted(talks) == ["pod1", "pod1", "pod2", "pod2"]
        one.kill()
        one.wait()
        refused = 0
        for _ in range(4):
            with program(world, "client", _TALKER, "172.30.0.21") as talker:
                assert talker.stdout
                refused += talker.wait(30) != 0 if not _is_connected(talker) else 0
        assert refused == 2
        programmed.sync([load], [endpoint_slice("load", both[1], port=8080)])
        for _ in range(3):
            with program(world, "client", _TALKER, "172.30.0.21") as talker:
                assert _talk(talker) == "pod2"


def _is_connected(talker: subprocess.Popen[str]) -> bool:
    try:
        return _talk(talker) == "pod2"
    except (ValueError, OSError):  # it ended before it answered
        return False
