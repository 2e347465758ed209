"""kube-proxy in userspace mode as a process in a namespace, against the real API server and the real iptables."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from conftest import NodeNamespace
from machine import children_named
from proxy_support import endpoint, endpoint_slice, real_iptables, service, state_of, without_counters
from test_kube_proxy_process import events, save, start

from testbed.api.client import ApiClient
from testbed.dataplane.userspace import (
    UserspaceSettings,
    find_damage,
    parse_installed,
    render_cleanup,
    render_node,
    render_rules,
    stand_in_ports,
)
from testbed.kernel import linux
from testbed.kernel.iptables import Backend, Iptables

pytestmark = pytest.mark.root

Eventually = Callable[..., Any]
BOTH = pytest.mark.parametrize("backend", list(Backend), ids=lambda backend: backend.value)
USERSPACE = {"mode": "userspace"}
SETTINGS = UserspaceSettings(IPv4Address("192.168.0.2"), IPv4Address("0.0.0.0"))
HERE = "10.180.0.1"
_RECOVERY_S = 30.0

_SERVER = """
import socket, sys
name, address, kind = sys.argv[1:]
if kind == "udp":
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); server.bind((address, 80))
    sys.stdout.write("ready\\n"); sys.stdout.flush()
    while True:
        server.sendto(name.encode(), server.recvfrom(100)[1])
server = socket.create_server((address, 80))
sys.stdout.write("ready\\n"); sys.stdout.flush()
kept = []
while True:
    peer, _ = server.accept()
    peer.sendall(name.encode()); kept.append(peer)
"""


class Node:
    """A namespace with endpoints on its loopback, entered by this thread: what it connects to is the node's."""

    def __init__(self, node: NodeNamespace) -> None:
        self.node = node
        self._servers: list[subprocess.Popen[str]] = []
        # a route for ClusterIPs, as a node's default route is one
        node.run("ip", "address", "add", "192.168.0.2/24", "dev", "lo")
        node.run("ip", "route", "add", "default", "dev", "lo")

    def add_server(self, name: str, address: str, kind: str = "tcp") -> None:
        if address not in self.node.run("ip", "address", "show", "lo"):
            self.node.run("ip", "address", "add", f"{address}/32", "dev", "lo")
        server = subprocess.Popen(
            [*self.node.enter, sys.executable, "-S", "-c", _SERVER, name, address, kind],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._servers.append(server)
        assert server.stdout and server.stdout.readline() == "ready\n"

    def connect(self, address: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        own, there = (
            os.open("/proc/self/ns/net", os.O_RDONLY),
            os.open(self.node.enter[1].partition("=")[2], os.O_RDONLY),
        )
        linux.setns(there, linux.CLONE_NEWNET)
        try:
            made = socket.socket(socket.AF_INET, kind)
            made.settimeout(5)
        finally:
            linux.setns(own, linux.CLONE_NEWNET)
            os.close(own)
            os.close(there)
        try:
            made.connect((address, port))
        except BaseException:
            made.close()
            raise
        return made

    def ask(self, address: str, port: int) -> str:
        """Return the name that a connection brings, or how it fails."""
        try:
            with self.connect(address, port) as client:
                return client.recv(100).decode()
        except OSError as error:
            return type(error).__name__

    def close(self) -> None:
        for server in self._servers:
            server.kill()
            server.communicate()


@pytest.fixture
def here(node: NodeNamespace) -> Iterator[Node]:
    made = Node(node)
    try:
        made.add_server("one", HERE)
        yield made
    finally:
        made.close()


def web(**fields: Any) -> dict[str, Any]:
    return service("web", "172.30.0.41", node_port=30080, **fields)


@BOTH
def test_rules_are_saved_as_written(backend: Backend, tmp_path: Path) -> None:
    """What we compare with is what iptables-save prints, on both backends; the clean-up leaves an empty node."""
    services = [
        service("all", "172.30.0.1", node_port=30001, ingress=["1.2.3.4"], externalIPs=["192.168.99.1"]),
        service("dns", "172.30.0.2", node_port=30002, protocol="UDP", port_name=""),
    ]
    state = state_of(services, [])
    ports = stand_in_ports(state, 40001)
    with real_iptables(backend, tmp_path) as runner:
        iptables = Iptables(runner, backend)
        iptables.apply(render_node(state, SETTINGS, ports))
        wanted = [rule for name, port in ports.items() for rule in render_rules(state.services[name], port, SETTINGS)]
        assert find_damage(wanted, parse_installed(iptables.save())) == ""
        iptables.apply(render_cleanup(parse_installed(iptables.save())))
        assert "KUBE" not in iptables.save()


@BOTH
def test_services_are_served(
    api: ApiClient, node: NodeNamespace, here: Node, eventually: Eventually, backend: Backend
) -> None:
    """ClusterIP and NodePort answer as Services come, endpoints change and go; an old connection outlives its Service."""
    proxy = start(node, backend, eventually, config=USERSPACE)
    here.add_server("two", "10.180.0.2")
    api.create(web())
    api.create(endpoint_slice("web", endpoint(HERE), endpoint("10.180.0.2", "node2")))
    eventually(lambda: here.ask("172.30.0.41", 80) in ("one", "two"))
    answers = [here.ask("172.30.0.41", 80) for _ in range(6)]
    assert sorted(answers[:2]) == ["one", "two"] and answers == answers[:2] * 3
    for address in ("192.168.0.2", "127.0.0.1"):
        assert here.ask(address, 30080) in ("one", "two")
    assert node.run("curl", "-sS", "http://127.0.0.1:10249/proxyMode") == "userspace"
    assert '"nodeEligible": true' in node.run("curl", "-sS", "http://127.0.0.1:10256/healthz")
    assert 'kubeproxy_sync_proxy_rules_iptables_total{table="nat"} 4' in node.run(
        "curl", "-sS", "http://127.0.0.1:10249/metrics"
    )
    api.update({**api.get("endpointslices.discovery.k8s.io", "ns", "web-x"), "endpoints": []})
    eventually(lambda: here.ask("172.30.0.41", 80) == "")
    api.update({**api.get("endpointslices.discovery.k8s.io", "ns", "web-x"), "endpoints": [endpoint(HERE)]})
    eventually(lambda: here.ask("172.30.0.41", 80) == "one")
    with here.connect("172.30.0.41", 80) as old:
        assert old.recv(10) == b"one"
        api.delete("services", "ns", "web")
        eventually(lambda: "30080" not in save(node, backend))
        old.settimeout(0.3)
        with pytest.raises(TimeoutError):
            old.recv(10)  # open still
    assert "172.30.0.41" not in save(node, backend)
    proxy.terminate()
    assert proxy.wait(10) == 0


def test_killed_and_started_again(api: ApiClient, node: NodeNamespace, here: Node, eventually: Eventually) -> None:
    """kill -9: connections break; rules lead to no dead port from the next one's start on, and new connections work at once."""
    proxy = start(node, Backend.LEGACY, eventually, config=USERSPACE)
    api.create(web())
    api.create(endpoint_slice("web", endpoint(HERE)))
    eventually(lambda: here.ask("172.30.0.41", 80) == "one")
    old = here.connect("172.30.0.41", 80)
    assert old.recv(10) == b"one"
    proxy.send_signal(signal.SIGKILL)
    proxy.wait(10)
    with old, contextlib.suppress(ConnectionResetError):
        assert old.recv(10) == b""
    eventually(lambda: here.ask("172.30.0.41", 80) == "ConnectionRefusedError")  # the copying process ended with it
    dead = save(node, Backend.LEGACY).split("--to-ports ", 1)[1].split()[0]
    node.ready_file.unlink()
    start(node, Backend.LEGACY, eventually, config=USERSPACE)
    assert here.ask("172.30.0.41", 80) == "one"  # ready means that the rules lead to its own ports
    assert f"--to-ports {dead}" not in save(node, Backend.LEGACY)


def test_the_copying_process_is_killed(api: ApiClient, node: NodeNamespace, here: Node, eventually: Eventually) -> None:
    """kube-proxy starts another one, its ports stay open meanwhile, and the node has an event."""
    proxy = start(node, Backend.LEGACY, eventually, config=USERSPACE)
    api.create(web())
    api.create(endpoint_slice("web", endpoint(HERE)))
    eventually(lambda: here.ask("172.30.0.41", 80) == "one")
    rules = save(node, Backend.LEGACY)
    [child] = children_named("userspace-proxy", proxy.pid)
    os.kill(child, signal.SIGKILL)
    assert here.ask("172.30.0.41", 80) == "one"  # waited for the next one
    assert save(node, Backend.LEGACY) == rules
    [(kind, name, message)] = eventually(lambda: events(api, "UserspaceProxyDied"))
    assert (kind, name) == ("Node", "node1") and "killed by signal 9" in message


def test_flushed_rules_come_back(api: ApiClient, node: NodeNamespace, here: Node, eventually: Eventually) -> None:
    """Within syncPeriod, with an event, and at the same ports."""
    start(node, Backend.NFT, eventually, config=USERSPACE)
    api.create(web())
    api.create(endpoint_slice("web", endpoint(HERE)))
    eventually(lambda: here.ask("172.30.0.41", 80) == "one")
    before = save(node, Backend.NFT)
    node.run("iptables-nft", "-t", "nat", "-F")
    eventually(
        lambda: sorted(save(node, Backend.NFT).splitlines()) == sorted(before.splitlines()), within_s=_RECOVERY_S
    )
    assert here.ask("172.30.0.41", 80) == "one"
    assert eventually(lambda: events(api, "ProxyRulesChanged"))[0][:2] == ("Node", "node1")


def test_what_cannot_be_served(api: ApiClient, node: NodeNamespace, here: Node, eventually: Eventually) -> None:
    """SCTP, and an address that another Service has: events on the Services; kube-proxy is healthy, others are served."""
    start(node, Backend.LEGACY, eventually, config={**USERSPACE, "portRange": "41000-41020"})
    api.create(service("phone", "172.30.0.42", protocol="SCTP"))
    api.create(web(externalIPs=["192.168.0.2"]))
    api.create(endpoint_slice("web", endpoint(HERE)))
    eventually(lambda: here.ask("192.168.0.2", 80) == "one")
    api.create(service("second", "172.30.0.43", externalIPs=["192.168.0.2"]))
    [(kind, name, message)] = eventually(lambda: events(api, "PortConflict"))
    assert (kind, name) == ("Service", "second") and "192.168.0.2:80/TCP" in message and "ns/web:p80 already" in message
    [(kind, name, message)] = eventually(lambda: events(api, "ProtocolNotSupported"))
    assert (kind, name) == ("Service", "phone")
    ports = {int(word) for word in save(node, Backend.LEGACY).split() if word.isdigit() and word.startswith("41")}
    assert ports and ports <= set(range(41000, 41021))
    assert '"refused"' not in node.run("curl", "-sS", "http://127.0.0.1:10256/healthz")


def test_udp_and_its_flows(api: ApiClient, node: NodeNamespace, here: Node, eventually: Eventually) -> None:
    """Datagrams are answered; flows of a UDP Service stay while it changes, and go with it."""
    start(node, Backend.LEGACY, eventually, config=USERSPACE)
    here.add_server("dns", HERE, "udp")
    api.create(service("dns", "172.30.0.10", protocol="UDP"))
    api.create(endpoint_slice("dns", endpoint(HERE), protocol="UDP"))

    def ask(client: socket.socket) -> bytes:
        client.settimeout(0.5)
        try:
            client.send(b"?")
            return client.recv(100)
        except OSError:
            return b""

    def flows() -> str:
        return node.run("conntrack", "-L", "-p", "udp", "--orig-dst", "172.30.0.10")

    with here.connect("172.30.0.10", 80, socket.SOCK_DGRAM) as client:
        eventually(lambda: ask(client) == b"dns")
        api.update(
            {
                **api.get("endpointslices.discovery.k8s.io", "ns", "dns-x"),
                "endpoints": [endpoint(HERE), endpoint("10.9.9.9")],
            }
        )
        api.create(service("later", "172.30.0.11", protocol="UDP"))
        eventually(lambda: "172.30.0.11" in save(node, Backend.LEGACY))
        assert "dst=172.30.0.10" in flows()
        api.delete("services", "ns", "dns")
        # Within the 30 s after which the kernel would forget it by itself.
        eventually(lambda: "dst=172.30.0.10" not in flows(), within_s=15)


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_modes_follow_each_other(
    api: ApiClient, node: NodeNamespace, here: Node, eventually: Eventually, mode: str
) -> None:
    """Another mode's start removes the portals, which would lead to dead ports; userspace mode's removes the other's rules."""
    api.create(web())
    api.create(endpoint_slice("web", endpoint(HERE)))

    def run(config: dict[str, Any], sign: str, command: list[str]) -> str:
        node.ready_file.unlink(missing_ok=True)
        proxy = start(node, Backend.LEGACY, eventually, config=config)
        eventually(lambda: sign in node.run(*command))
        assert here.ask("172.30.0.41", 80) == "one"
        proxy.terminate()
        assert proxy.wait(10) == 0
        return without_counters(node.run("iptables-legacy-save")) + node.run("nft", "list", "tables")

    iptables, nft = ["iptables-legacy-save"], ["nft", "list", "table", "ip", "kube-proxy"]
    assert "KUBE-PORTALS" in run(USERSPACE, "--to-ports", iptables)
    other = run({"mode": mode}, "172.30.0.41", nft if mode == "nftables" else iptables)
    assert "KUBE-PORTALS" not in other and "KUBE-NODEPORT-" not in other
    back = run(USERSPACE, "--to-ports", iptables)
    assert "KUBE-SERVICES" not in back and "kube-proxy" not in back
