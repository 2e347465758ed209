"""A node with two endpoints, a pod and an outside client as network namespaces, for real packets through kube-proxy's rules.

::

    outside 192.168.0.100 ── 192.168.0.2 node 10.180.0.254 ── 10.180.0.1 pod1   the endpoint on this node
      also 203.0.113.2, .130              10.180.1.254 ── 10.180.1.1 pod2   the endpoint of "another node"
                                          10.180.2.254 ── 10.180.2.1 client a pod that is no endpoint
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from testbed.kernel.netns import inside_network
from testbed.kernel.pace import patient
from testbed.kernel.runner import SubprocessRunner

NODE_IP, OUTSIDE, BLOCKED = "192.168.0.2", "203.0.113.2", "203.0.113.130"
SILENCE_S = 0.7
"""How long to wait where no answer is expected."""
PODS = {"pod1": "10.180.0.1", "pod2": "10.180.1.1", "client": "10.180.2.1"}

_SERVER = """
import socket, sys, threading
name = sys.argv[1]
tcp = socket.create_server(("0.0.0.0", 80), backlog=256)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(("0.0.0.0", 80))
def answer():
    while True:
        _, peer = udp.recvfrom(100)
        udp.sendto(f"{name} {peer[0]}".encode(), peer)
threading.Thread(target=answer, daemon=True).start()
sys.stdout.write("ready\\n"); sys.stdout.flush()
while True:
    peer, address = tcp.accept()
    peer.sendall(f"{name} {address[0]}".encode()); peer.close()
"""

_CLIENT = """
import json, socket, sys
def ask(source, address, port, protocol, patience_s):
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as s:
        s.settimeout(patience_s)
        if source: s.bind((source, 0))
        try:
            s.connect((address, port))
            if protocol == "udp": s.send(b"?")
            return s.recv(100).decode()
        except ConnectionRefusedError: return "refused"
        except TimeoutError: return "timeout"
        except OSError as error: return f"error: {error.strerror}"
for line in sys.stdin:
    source, address, port, protocol, times, patience_s = json.loads(line)
    found = set()
    for _ in range(times):
        found.add(ask(source, address, port, protocol, patience_s))
        if found & {"timeout", "refused"}: break
    sys.stdout.write(json.dumps(sorted(found)) + "\\n"); sys.stdout.flush()
"""


@dataclass(frozen=True)
class World:
    """The namespaces, by name, as the pid of a process in each."""

    pids: dict[str, int]
    askers: dict[str, subprocess.Popen[str]]

    def runner(self, name: str = "node") -> SubprocessRunner:
        """Return what runs programs in a namespace."""
        return SubprocessRunner(prefix=["nsenter", f"--net=/proc/{self.pids[name]}/ns/net"])

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Have this thread be in a namespace: the sockets it opens meanwhile, and the threads it starts, stay there."""
        there = os.open(f"/proc/{self.pids[name]}/ns/net", os.O_RDONLY)
        try:
            with inside_network(there):
                yield
        finally:
            os.close(there)

    def ask(
        self,
        where: str,
        address: str,
        port: int,
        *,
        source: str = "",
        protocol: str = "tcp",
        times: int = 24,
        answered: bool = True,
    ) -> list[str]:
        """Return who answered in so many connections, as ``NAME SOURCE-IT-SAW``, or ``refused``, or ``timeout``.

        Args:
            answered: whether something is expected to come back; else it is not waited for as long.
        """
        asker = self.askers[where]
        patience_s = patient(10) if answered else SILENCE_S
        assert asker.stdin and asker.stdout
        asker.stdin.write(json.dumps([source, address, port, protocol, times, patience_s]) + "\n")
        asker.stdin.flush()
        return list(json.loads(asker.stdout.readline()))


@contextlib.contextmanager
def packet_world() -> Iterator[World]:
    """Make the namespaces, servers in the endpoints, and an asker in each."""
    with contextlib.ExitStack() as stack:
        pids = {name: hold_namespace(stack) for name in ("node", "outside", *PODS)}
        _connect(pids)
        for name in ("pod1", "pod2"):
            server = _start(stack, pids[name], _SERVER, name)
            assert server.stdout and server.stdout.readline() == "ready\n"
        askers = {name: _start(stack, pid, _CLIENT) for name, pid in pids.items()}
        yield World(pids, askers)


def hold_namespace(stack: contextlib.ExitStack) -> int:
    """Make a network namespace that lasts as long as the stack, and return the pid of a process in it."""
    holder = stack.enter_context(
        subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )
    stack.callback(holder.kill)
    assert holder.stdin and holder.stdout
    holder.stdin.write(b"x")
    holder.stdin.flush()
    holder.stdout.read(1)  # cat runs, so the namespace is there
    return holder.pid


def _start(stack: contextlib.ExitStack, pid: int, program: str, *words: str) -> subprocess.Popen[str]:
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-S", "-c", program, *words]
    process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    stack.callback(process.kill)
    return process


def _connect(pids: dict[str, int]) -> None:
    def run(name: str, batch: Sequence[str]) -> None:
        enter = ["nsenter", f"--net=/proc/{pids[name]}/ns/net"]
        subprocess.run([*enter, "ip", "-batch", "-"], input="\n".join(batch) + "\n", text=True, check=True)

    run("node", ["link set lo up", *(
        f"link add {name} type veth peer name eth0 netns {pids[name]}" for name in ("outside", *PODS)
    )])  # fmt: skip
    run("node", [
        f"addr add {NODE_IP}/24 dev outside", "link set outside up",
        *(f"addr add {ip.rpartition('.')[0]}.254/24 dev {name}" for name, ip in PODS.items()),
        *(f"link set {name} up" for name in PODS),
        "route add default via 192.168.0.100",
    ])  # fmt: skip
    outside = ("192.168.0.100/24", f"{OUTSIDE}/32", f"{BLOCKED}/32")
    run("outside", ["link set lo up", *(f"addr add {a} dev eth0" for a in outside), "link set eth0 up",
                    f"route add default via {NODE_IP}"])  # fmt: skip
    for name, ip in PODS.items():
        gateway = f"{ip.rpartition('.')[0]}.254"
        run(
            name,
            ["link set lo up", f"addr add {ip}/24 dev eth0", "link set eth0 up", f"route add default via {gateway}"],
        )
    settings = ["net.ipv4.ip_forward=1"]
    for interface in ("all", "default", "outside", *PODS):
        # a packet to itself goes back where it came from: no redirects, no second thoughts about its source
        settings += [f"net.ipv4.conf.{interface}.rp_filter=0", f"net.ipv4.conf.{interface}.send_redirects=0"]
    enter = ["nsenter", f"--net=/proc/{pids['node']}/ns/net"]
    subprocess.run([*enter, "sysctl", "-qw", *settings], check=True)
