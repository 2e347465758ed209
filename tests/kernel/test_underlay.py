"""The underlay on a real kernel: each test builds a network in namespaces of a child process, which takes it all away."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import KernelError, MissingFeature
from testbed.kernel import linux
from testbed.model.topology import HostSpec, LinkSpec, Network, NodeSpec, Topology

pytestmark = pytest.mark.root


def node(number: int, **changes: Any) -> NodeSpec:
    fields: dict[str, Any] = {
        "name": f"node{number}",
        "network": "lan",
        "address": IPv4Address(f"192.168.93.1{number}"),
        "interface": "eth0",
        "pod_cidr": IPv4Network(f"10.244.{number}.0/24"),
    }
    return NodeSpec(**{**fields, **changes})


LAN = Network(name="lan", cidr=IPv4Network("192.168.93.0/24"), gateway=IPv4Address("192.168.93.1"))
FAR = Network(name="far", cidr=IPv4Network("172.30.0.0/24"), gateway=IPv4Address("172.30.0.1"))
CLIENT = HostSpec(name="client", network="lan", address=IPv4Address("192.168.93.100"), gateway=LAN.gateway)
TOPOLOGY = Topology(name="t", networks=(LAN,), nodes=(node(1), node(2)), hosts=(CLIENT,))


def in_lab(topology: Topology, test: Callable[[Any], Any]) -> Any:
    """Return ``test(network)`` for a running network, from a child in namespaces of its own; exceptions come back."""
    reading, writing = os.pipe()
    folder = tempfile.mkdtemp(prefix="testbed-underlay-")
    pid = os.fork()
    if pid == 0:
        try:
            linux.set_parent_death_signal(signal.SIGKILL)  # of a pytest that is killed
            linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWNS | linux.CLONE_NEWUTS)
            linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
            from testbed.underlay.network import LabNetwork, make_private_folder

            private = make_private_folder(folder)
            linux.mount("tmpfs", private, "tmpfs")
            network = LabNetwork(topology, folder, private)
            try:
                network.build_topology()
                answer = (True, test(network))
            finally:
                for host in network.hosts:
                    host.terminate()
        except BaseException as error:
            answer = (False, error)
        os.write(writing, pickle.dumps(answer))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        packed = file.read()
    os.waitpid(pid, 0)
    shutil.rmtree(folder)
    succeeded, value = pickle.loads(packed)
    if not succeeded:
        raise value
    return value


def output(host: Any, *argv: str) -> str:
    done = host.popen(list(argv), stderr=subprocess.STDOUT)
    return done.communicate(timeout=20)[0].decode()


def reaches(host: Any, address: str) -> bool:
    """Say whether one of five packets is answered: a busy kernel opens a new port of a bridge a moment after its link is up."""
    said = output(host, "ping", "-c5", "-i0.3", "-W2", address)
    return " received" in said and " 0 received" not in said


def add_pod(network: Any, name: str, node_number: int, address: str) -> Any:
    cidr = IPv4Network(f"10.244.{node_number}.0/24")
    link = f"veth{address.replace('.', '')[-8:]}"
    return network.add_pod(
        f"dev/{name}", link, node=f"node{node_number}", hostname=name, address=IPv4Address(address), network=cidr
    )


def test_packets_reach_pods_on_both_nodes_and_outside_hosts() -> None:
    """A pod reaches a pod of its own node, one of another node, and the outside host; the client reaches a node."""

    def test(network: Any) -> list[bool]:
        web, other, far = (
            add_pod(network, "web", 1, "10.244.1.2"),
            add_pod(network, "other", 1, "10.244.1.3"),
            add_pod(network, "far", 2, "10.244.2.2"),
        )
        return [
            reaches(web, "10.244.1.3"),
            reaches(other, "10.244.2.2"),
            reaches(far, "192.168.93.100"),
            reaches(network["client"], "192.168.93.12"),
        ]

    assert in_lab(TOPOLOGY, test) == [True, True, True, True]


def test_node_port_by_a_hand_written_rule() -> None:
    """A connection from the outside client to a node's port is answered by a pod, through one DNAT rule."""

    def test(network: Any) -> str:
        web = add_pod(network, "web", 1, "10.244.1.2")
        server = web.popen(["python3", "-c", SERVER])
        server.stdout.readline()
        rule = ["-A", "PREROUTING", "-p", "tcp", "--dport", "30080", "-j", "DNAT", "--to-destination", "10.244.1.2:80"]
        output(network["node1"], "iptables", "-t", "nat", *rule)
        client = [
            "python3",
            "-c",
            "import socket; print(socket.create_connection(('192.168.93.11', 30080), 5).recv(99))",
        ]
        return output(network["client"], *client)

    assert in_lab(TOPOLOGY, test).strip() == "b'hello 192.168.93.100 from web'"


SERVER = """
import socket
with socket.create_server(("", 80)) as server:
    print("listening", flush=True)
    connection, peer = server.accept()
    connection.sendall(f"hello {peer[0]} from {socket.gethostname()}".encode())
"""


def test_a_pod_reaches_itself_through_its_node() -> None:
    """Hairpin: a rule that sends a pod's packet back to it works, which needs the bridge port's hairpin mode."""

    def test(network: Any) -> str:
        web = add_pod(network, "web", 1, "10.244.1.2")
        server = web.popen(["python3", "-c", SERVER])
        server.stdout.readline()
        iptables = ["iptables", "-t", "nat"]
        dnat = ["-A", "PREROUTING", "-d", "10.96.0.1", "-p", "tcp", "-j", "DNAT", "--to-destination", "10.244.1.2:80"]
        output(network["node1"], *iptables, *dnat)
        output(
            network["node1"], *iptables, "-A", "POSTROUTING", "-s", "10.244.1.2", "-d", "10.244.1.2", "-j", "MASQUERADE"
        )
        client = ["python3", "-c", "import socket; print(socket.create_connection(('10.96.0.1', 80), 5).recv(99))"]
        return output(web, *client)

    assert in_lab(TOPOLOGY, test).strip() == "b'hello 10.244.1.1 from web'"


def test_nodes_have_their_own_names_and_files() -> None:
    """A node has its own hostname, /run, /etc and network devices in /sys; writing to them changes no other place."""

    def test(network: Any) -> list[str]:
        node1 = network["node1"]
        output(
            node1, "sh", "-c", "echo mine > /etc/hostname; echo mine > /run/mine; echo nameserver > /etc/resolv.conf"
        )
        return [
            output(node1, "hostname").strip(),
            output(node1, "cat", "/run/mine", "/etc/resolv.conf"),
            output(network["node2"], "sh", "-c", "cat /etc/hostname; ls /run/mine 2>&1"),
            output(node1, "ls", "/sys/class/net").strip(),
            output(node1, "sh", "-c", "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/bridge/bridge-nf-call-iptables"),
        ]

    hostname_before = Path("/etc/hostname").read_text()
    assert in_lab(TOPOLOGY, test) == [
        "node1",
        "mine\nnameserver\n",
        "node2\nls: cannot access '/run/mine': No such file or directory\n",
        "cni0\neth0\nlo",
        "1\n1\n",
    ]
    assert Path("/etc/hostname").read_text() == hostname_before


def test_settings_do_not_depend_on_the_machine() -> None:
    """With strict rp_filter in the namespace that a lab inherits from, nodes and pods have it off all the same."""

    def test(network: Any) -> list[str]:
        web = add_pod(network, "web", 1, "10.244.1.2")
        show = ["sh", "-c", "cd /proc/sys/net/ipv4/conf; cat all/rp_filter eth0/rp_filter"]
        return [output(network["node1"], *show), output(web, *show)]

    settings = [Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter") for name in ("all", "default")]
    before = [setting.read_text() for setting in settings]
    # the values of the namespace that the child unshares from; put back below
    for setting in settings:
        setting.write_text("2")
    try:
        assert in_lab(TOPOLOGY, test) == ["0\n0\n", "0\n0\n"]
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.write_text(value)


def test_outside_host_on_another_lan() -> None:
    """A host on another LAN reaches the nodes, and nodes on different LANs reach each other's pods, through the gateways."""
    stranger = HostSpec(name="stranger", network="far", address=IPv4Address("172.30.0.9"), gateway=FAR.gateway)
    far_node = node(2, network="far", address=IPv4Address("172.30.0.12"))
    topology = Topology(name="t", networks=(LAN, FAR), nodes=(node(1), far_node), hosts=(stranger,))

    def test(network: Any) -> list[bool]:
        near = add_pod(network, "near", 1, "10.244.1.2")
        add_pod(network, "far", 2, "10.244.2.2")
        return [reaches(network["stranger"], "192.168.93.11"), reaches(near, "10.244.2.2")]

    assert in_lab(topology, test) == [True, True]


def test_a_deleted_pod_leaves_room_for_the_next_with_its_address() -> None:
    """After deletion the address is unreachable at once, and another pod can have it."""

    def test(network: Any) -> list[bool]:
        client = add_pod(network, "client", 1, "10.244.1.9")
        add_pod(network, "first", 1, "10.244.1.2")
        seen = [reaches(client, "10.244.1.2")]
        network.delete_pod("dev/first")
        seen.append(reaches(client, "10.244.1.2"))
        network.delete_pod("dev/first")
        network.add_pod(
            "dev/second", "vethsecond", node="node1", hostname="second", address=IPv4Address("10.244.1.2"),
            network=IPv4Network("10.244.1.0/24"),
        )  # fmt: skip
        seen.append(reaches(client, "10.244.1.2"))
        return seen

    assert in_lab(TOPOLOGY, test) == [True, False, True]


def test_a_failed_pod_leaves_nothing() -> None:
    """When the kernel refuses a pod's link, the error names it, and its namespaces are gone."""

    def test(network: Any) -> list[str]:
        add_pod(network, "web", 1, "10.244.1.2")
        try:
            network.add_pod(
                "dev/twin", "veth02441.12"[:15], node="node1", hostname="twin", address=IPv4Address("10.244.1.3"),
                network=IPv4Network("10.244.1.0/24"),
            )  # fmt: skip
            network.add_pod(
                "dev/third", "veth02441.12"[:15], node="node1", hostname="third", address=IPv4Address("10.244.1.4"),
                network=IPv4Network("10.244.1.0/24"),
            )  # fmt: skip
        except KernelError as error:
            return [str(error), str("dev/third" in network.nameToNode)]
        return []

    wanted = "node1: could not add veth veth02441.12 with peer eth0: File exists (EEXIST)"
    assert in_lab(TOPOLOGY, test) == [wanted, "False"]


def test_link_down_and_up() -> None:
    """Unplugging a node cuts it off, plugging it in brings it back."""

    def test(network: Any) -> list[bool]:
        seen = []
        for up in (False, True):
            network.set_link("node1", up=up)
            seen.append(reaches(network["client"], "192.168.93.11"))
        return seen

    assert in_lab(TOPOLOGY, test) == [False, True]


def test_rate_limit_holds() -> None:
    """A link of 20 Mbit/s carries no more than that, and not far less."""
    topology = Topology(
        name="t",
        networks=(LAN,),
        nodes=(node(1),),
        hosts=(CLIENT,),
        links=(LinkSpec(between=("client", "lan"), rate_mbit=20),),
    )

    def test(network: Any) -> float:
        server = network["node1"].popen(["iperf3", "-s", "-1", "--forceflush"])
        while b"listening" not in server.stdout.readline():
            pass
        done = output(network["client"], "iperf3", "-c", "192.168.93.11", "-t", "2", "-f", "m")
        received = next(line for line in done.splitlines() if "receiver" in line)
        return float(received.split("Mbits/sec")[0].split()[-1])

    if shutil.which("iperf3") is None:
        pytest.skip("no iperf3 (Debian package iperf3)")
    assert 12 < in_lab(topology, test) <= 22


def test_delay_needs_netem() -> None:
    """Delay is applied where the kernel has netem, and otherwise refused by name."""
    topology = Topology(
        name="t",
        networks=(LAN,),
        nodes=(node(1),),
        hosts=(CLIENT,),
        links=(LinkSpec(between=("client", "lan"), delay_ms=30),),
    )

    def test(network: Any) -> float:
        reply = output(network["client"], "ping", "-c2", "-W2", "192.168.93.11")
        return float(reply.rsplit("=", 1)[1].split("/")[0])

    try:
        assert in_lab(topology, test) >= 60  # both directions
    except MissingFeature as error:
        assert "client: link client-lan: delay and loss need the kernel's netem (sch_netem)" in str(error)


def test_mininet_shell_starts_on_first_use() -> None:
    """No shell runs until `cmd` is called; then it runs inside the host's namespaces."""

    def test(network: Any) -> list[Any]:
        before = network["node1"].shell
        return [before, network["node1"].cmd("hostname").strip(), network["node2"].shell]

    assert in_lab(TOPOLOGY, test) == [None, "node1", None]
