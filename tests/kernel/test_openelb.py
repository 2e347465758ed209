"""OpenELB in a running lab: real frames, real failures, and what a client on the LAN sees of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import scapy.layers.l2  # noqa: F401  # here, so that each probe need not import it anew

from testbed.kernel.rtnetlink import mac_of
from testbed.lab.handle import Lab
from testbed.lab.kubectl import find_kubectl
from testbed.lab.start import start_lab
from testbed.manifests import load_objects
from testbed.manifests.topology import load_topology
from testbed.probes import ArpAnswer, ask_arp

Object = dict[str, Any]
Eventually = Callable[..., Any]

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
FILES = ROOT / "scenarios" / "openelb-failover"
LB = IPv4Address("192.168.93.231")
FIRST, SECOND = "openeuler-2", "openeuler-3"  # by sha256(node#192.168.93.231)
MACS = {f"openeuler-{number}": mac_of(IPv4Address(f"192.168.93.{10 + number}")) for number in (1, 2, 3)}
MOST_INTERRUPTION_S = 3.0
STALLED_S = 0.2  # what takes this long although nothing has failed for it waits for the machine
ETH_P_ARP = 0x0806


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """The tutorial's cluster with OpenELB, and a Service with two pods on openeuler-3 at 192.168.93.231."""
    name = f"elb-{os.getpid()}"
    topology = load_topology(ROOT / "topologies/tutorial.yaml")
    with start_lab(topology, name=name, proxy_mode="iptables", attached=True) as made:
        apply(made, FILES / "openelb.yaml")
        wait(lambda: ready(made, "deployments.apps", "openelb-controller", "readyReplicas") == 1, 60)
        wait(lambda: ready(made, "daemonsets.apps", "openelb-speaker", "numberReady") == 3, 60)
        apply(made, FILES / "ip-pool.yaml", FILES / "web.yaml")
        wait(lambda: answered_by(made) == {FIRST}, 30)
        wait(lambda: all(keep_asking_once(made) for _ in range(3)), 30)
        yield made


def apply(lab: Lab, *files: Path) -> None:
    for file in files:
        for source in load_objects(file):
            lab.api.apply(source.object)


def ready(lab: Lab, resource: str, name: str, field: str) -> int:
    return int((lab.api.get(resource, "openelb-system", name).get("status") or {}).get(field, 0))


def wait(check: Callable[[], Any], within_s: float) -> None:
    end = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < end, "the lab does not become ready"
        time.sleep(0.1)


def kubectl(lab: Lab, *argv: str) -> str:
    done = subprocess.run(
        [find_kubectl(), "--kubeconfig", str(lab.kubeconfig), *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


def speaker_on(lab: Lab, node: str) -> str:
    pods, _ = lab.api.list("pods", "openelb-system", label_selector="component=speaker")
    return str(next(pod["metadata"]["name"] for pod in pods if pod["spec"].get("nodeName") == node))


def answered_by(lab: Lab, address: IPv4Address = LB, patience_s: float = 0.3) -> set[str]:
    """Return which machines answer the client's ARP request; others by their MAC."""
    names = {mac: node for node, mac in MACS.items()}
    answers: tuple[ArpAnswer, ...] = lab.call("client", ask_arp, address, patience_s, timeout_s=30)
    return {names.get(answer.mac, answer.mac) for answer in answers}


def first_answers(lab: Lab, patience_s: float = 0.3) -> bool:
    """Say whether the elected node answers already; nobody else may."""
    seen = answered_by(lab, patience_s=patience_s)
    assert seen <= {FIRST}
    return bool(seen)


def node_port(lab: Lab) -> tuple[str, int]:
    """Return where the pods' own node answers for the Service, whoever has its address."""
    port: int = lab.api.get("services", "dev", "svc-lb")["spec"]["ports"][0]["nodePort"]
    return "192.168.93.13", port


# -- run inside a machine's namespaces ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request: when it ended, whether well, and how long the next thing took that no failure concerns."""

    when_s: float
    is_answered: bool
    stalled_s: float


def request_once(timeout_s: float, where: tuple[str, int] = (str(LB), 80)) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(where, timeout=timeout_s) as made:
        made.sendall(b"GET / HTTP/1.0\r\nHost: lb\r\n\r\n")
        return bool(made.recv(100))
    return False


def keep_asking(seconds: float, timeout_s: float, control: tuple[str, int]) -> list[Asked]:
    """Send requests one after the other, each on a connection of its own, for so long and until one is answered.

    Args:
        control: is asked in between; that it takes long says that the machine is busy.
    """
    seen: list[Asked] = []
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end or (now < end + 30 and not seen[-1].is_answered):
        is_answered = request_once(timeout_s)
        when_s = time.monotonic()
        assert request_once(20.0, control)
        time.sleep(0.02)
        seen.append(Asked(when_s, is_answered, stalled_s=time.monotonic() - when_s))
    return seen


def capture(interface: str, seconds: float) -> list[bytes]:
    """Return the ARP frames that arrive on a link for a while."""
    frames = []
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as made:
        made.bind((interface, ETH_P_ARP))
        end = time.monotonic() + seconds
        while (left_s := end - time.monotonic()) > 0:
            made.settimeout(left_s)
            with contextlib.suppress(TimeoutError):
                frame, (_, _, kind, *_) = made.recvfrom(2048)
                if kind != socket.PACKET_OUTGOING:
                    frames.append(frame)
    return frames


def capture_announcements(interface: str, address: bytes, count: int) -> list[bytes]:
    """Return the ARP frames to everybody about an address: so many are waited for, and then for a quiet second."""
    frames: list[bytes] = []
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as made:
        made.bind((interface, ETH_P_ARP))
        end = time.monotonic() + 60
        while (left_s := end - time.monotonic()) > 0:
            made.settimeout(left_s)
            with contextlib.suppress(TimeoutError):
                frame, (_, _, kind, *_) = made.recvfrom(2048)
                if kind != socket.PACKET_OUTGOING and frame[:6] == b"\xff" * 6 and frame[28:32] == address:
                    frames.append(frame)
                    if len(frames) >= count:
                        end = time.monotonic() + 1
    return frames


def send_frames(interface: str, frames: list[bytes]) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as made:
        made.bind((interface, ETH_P_ARP))
        for frame in frames:
            made.send(frame)


def send_datagrams(where: tuple[str, int], datagrams: list[bytes]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        for datagram in datagrams:
            made.sendto(datagram, where)


def keep_asking_once(lab: Lab) -> bool:
    return bool(lab.call("client", request_once, 1.0, timeout_s=20))


class Background:
    """Something that runs in the client while a test does something else; the block's end waits for it."""

    def __init__(self, lab: Lab, function: Callable[..., Any], *args: Any) -> None:
        self.result: Any = None

        def run() -> None:
            self.result = lab.call("client", function, *args, timeout_s=120)

        self._thread = threading.Thread(target=run)

    def __enter__(self) -> Background:
        self._thread.start()
        time.sleep(0.3)  # it has begun before anything fails
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


def longest_gap_s(seen: list[Asked]) -> float:
    """Return the longest time between two answers, but for those in which what needs no failover waited as well."""
    good = [number for number, asked in enumerate(seen) if asked.is_answered]
    assert len(good) >= 2
    return max(
        (
            seen[after].when_s - seen[before].when_s
            for before, after in itertools.pairwise(good)
            if max(asked.stalled_s for asked in seen[before:after]) < STALLED_S
        ),
        default=0.0,
    )


# -- tests -------------------------------------------------------------------------------------------------------------


def test_what_kubectl_prints(lab: Lab) -> None:
    """Eips as in the tutorial: CIDR, USAGE (blank while unused) and TOTAL, no AGE; the Service with its address."""
    apply_eip(lab, "unused", "192.168.93.240/30")
    assert kubectl(lab, "get", "eip").splitlines() == [
        "NAME       CIDR                            USAGE   TOTAL",
        "eip-pool   192.168.93.231-192.168.93.238   1       8",
        "unused     192.168.93.240/30                       4",
    ]
    lab.api.delete("eips.network.kubesphere.io", "", "unused")
    assert "192.168.93.231   80:" in kubectl(lab, "get", "svc", "-n", "dev")
    assert "success to assign ip: 192.168.93.231" in kubectl(lab, "describe", "svc", "svc-lb", "-n", "dev")


def apply_eip(lab: Lab, name: str, address: str) -> None:
    metadata = {"name": name}
    spec = {"address": address, "protocol": "layer2", "interface": "eth33"}
    lab.api.apply({"apiVersion": "network.kubesphere.io/v1alpha2", "kind": "Eip", "metadata": metadata, "spec": spec})
    wait(lambda: lab.api.get("eips.network.kubesphere.io", "", name).get("status", {}).get("poolSize"), 10)


def test_a_denial_as_kubectl_shows_it(lab: Lab, tmp_path: Path) -> None:
    """Error from server (Forbidden), with the file's name and the webhook's."""
    done = subprocess.run(
        [find_kubectl(), "--kubeconfig", str(lab.kubeconfig), "create", "-f", "overlapping-pool.yaml"],
        cwd=ROOT / "scenarios/openelb", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr.strip() == (
        'Error from server (Forbidden): error when creating "overlapping-pool.yaml": admission webhook '
        '"validate.eip.network.kubesphere.io" denied the request: eip address overlap with eip-pool'
    )


def test_one_mac_answers(lab: Lab, eventually: Eventually) -> None:
    """Exactly one, that of the elected node's link, to each kind of question; for a free address nobody does."""
    eventually(lambda: first_answers(lab, patience_s=1.0))
    assert answered_by(lab, IPv4Address("192.168.93.238")) == set()
    probes = lab.run("client", ["arping", "-D", "-c", "1", "-w", "2", "-I", "eth0", str(LB)], timeout_s=20)
    if probes.status not in (126, 127):  # not installed
        assert MACS[FIRST].upper() in probes.stdout.decode().upper()


def test_icmp_is_not_the_speakers_business(lab: Lab) -> None:
    """In iptables mode the address is on no interface: a ping gets no reply, though ARP and HTTP do."""
    done = lab.run("client", ["ping", "-c", "1", "-W", "1", str(LB)], timeout_s=20)
    assert done.status == 1 and b"100% packet loss" in done.stdout


def test_a_takeover_sends_one_gratuitous_pair(lab: Lab, eventually: Eventually) -> None:
    """The announcing node's speaker hangs: the next one sends one request and one reply, to everybody, about itself."""
    own, address, everybody = (bytes.fromhex(MACS[SECOND].replace(":", "")), LB.packed, b"\xff" * 6)
    with Background(lab, capture_announcements, "eth0", address, 2) as background:
        lab.signal_pod("openelb-system", speaker_on(lab, FIRST), signal.SIGSTOP)
    lab.signal_pod("openelb-system", speaker_on(lab, FIRST), signal.SIGCONT)
    header = everybody + own + b"\x08\x06" + bytes.fromhex("0001080006" + "04")
    assert [frame[:42] for frame in background.result] == [
        header + op + own + address + everybody + address for op in (b"\0\1", b"\0\2")
    ]  # fmt: skip
    eventually(lambda: answered_by(lab) == {FIRST}, within_s=15)


def kill_speaker(lab: Lab, node: str) -> None:
    lab.signal_pod("openelb-system", speaker_on(lab, node), signal.SIGKILL)


FAILURES: dict[str, tuple[Callable[[Lab, str], None], Callable[[Lab, str], None]]] = {
    "process killed": (lambda lab, node: kill_speaker(lab, node), lambda *_: None),
    "link down": (lambda lab, node: lab.set_link(node, False), lambda lab, node: lab.set_link(node, True)),
    "node removed": (lambda lab, node: lab.set_power(node, False), lambda lab, node: lab.set_power(node, True)),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_the_announcing_node_fails(lab: Lab, failure: str, eventually: Eventually) -> None:
    """A client that keeps asking is without an answer for 3 s at most; when the node is back it alone answers."""
    fail, mend = FAILURES[failure]
    with Background(lab, keep_asking, 5.0, 0.5, node_port(lab)) as background:
        fail(lab, FIRST)
    assert longest_gap_s(background.result) <= MOST_INTERRUPTION_S
    assert background.result[-1].is_answered, "the client is answered again"
    if failure != "process killed":
        eventually(lambda: answered_by(lab) == {SECOND}, within_s=10)
    mend(lab, FIRST)
    if failure == "link down":  # the speaker has been there all along: the election is a heartbeat away
        eventually(lambda: answered_by(lab) == {FIRST}, within_s=8)
    eventually(lambda: answered_by(lab) == {FIRST}, within_s=30)
    eventually(lambda: keep_asking_once(lab), within_s=10)


@pytest.mark.parametrize("failure", FAILURES)
def test_another_node_fails(lab: Lab, failure: str, eventually: Eventually) -> None:
    """Every request is answered, and no gratuitous frame is sent: the address does not move."""
    fail, mend = FAILURES[failure]
    asking = Background(lab, keep_asking, 3.0, 10.0, node_port(lab))
    with Background(lab, capture, "eth0", 3.5) as frames, asking as background:
        fail(lab, "openeuler-1")
    assert all(asked.is_answered for asked in background.result)
    assert [frame for frame in frames.result if frame[28:32] == LB.packed and frame[0:6] == b"\xff" * 6] == []
    mend(lab, "openeuler-1")
    eventually(lambda: ready(lab, "daemonsets.apps", "openelb-speaker", "numberReady") == 3, within_s=60)
    eventually(lambda: answered_by(lab) == {FIRST}, within_s=20)


def metrics(lab: Lab, node: str = FIRST, port: int = 50053) -> dict[str, float]:
    """Return the samples that a node's speaker shows."""
    done = lab.run(node, ["curl", "-s", "-m", "5", f"http://127.0.0.1:{port}/metrics"], timeout_s=20)
    lines = [line.rsplit(" ", 1) for line in done.stdout.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_malformed_and_spoofed_frames(lab: Lab, eventually: Eventually) -> None:
    """They get no answer and are counted; the next right question is answered as ever."""
    client = bytes.fromhex(mac_of(IPv4Address("192.168.93.100")).replace(":", ""))
    request = (
        b"\xff" * 6 + client + b"\x08\x06" + bytes.fromhex("000108000604" + "0001")
        + client + IPv4Address("192.168.93.100").packed + bytes(6) + LB.packed
    )  # fmt: skip
    strange = bytes.fromhex("020000000001")
    malformed = [request[:30], request[:14] + b"\0\6" + request[16:], request[:20] + b"\0\x09" + request[22:]]
    # Sender fields that contradict each other, and a sender that no host on a LAN can be.
    spoofed = [
        request[:22] + strange + request[28:],
        request[:28] + IPv4Address("127.0.0.1").packed + request[32:],
    ]
    before = metrics(lab)
    with Background(lab, capture, "eth0", 1.5) as background:
        lab.call("client", send_frames, "eth0", malformed + spoofed, timeout_s=20)
    # A gratuitous pair, as when a node comes back, is no answer: that goes to who has asked.
    assert [frame for frame in background.result if frame[28:32] == LB.packed and frame[0:6] != b"\xff" * 6] == []

    def grown(reason: str) -> float:
        name = f'arp_frames_ignored{{reason="{reason}"}}'
        return metrics(lab).get(name, 0) - before.get(name, 0)

    assert (eventually(lambda: grown("malformed")), eventually(lambda: grown("spoofed"))) == (3, 2)
    eventually(lambda: first_answers(lab))
    assert metrics(lab)[f'requests_received{{ip="{LB}"}}'] > before[f'requests_received{{ip="{LB}"}}']


def test_spoofed_heartbeats(lab: Lab, eventually: Eventually) -> None:
    """A datagram without the secret's signature changes nothing; it is counted."""
    before = metrics(lab).get("heartbeats_ignored", 0)
    lies = [
        b"",
        b"hello",
        b"testbed-speaker/1 " + b"0" * 64 + b' {"node":"openeuler-9","boot":9,"beat":9,"cannot":[],"answer":true}',
    ]
    lab.call("client", send_datagrams, ("192.168.93.12", 7946), lies, timeout_s=20)
    eventually(lambda: metrics(lab).get("heartbeats_ignored", 0) >= before + 2)
    eventually(lambda: first_answers(lab))


def test_health_and_metrics(lab: Lab) -> None:
    """Controller on 50052, speaker on 50053."""
    pods, _ = lab.api.list("pods", "openelb-system", label_selector="component=controller")
    address = pods[0]["status"]["podIP"]
    healthy = lab.run(FIRST, ["curl", "-s", "-m", "5", f"http://{address}:50052/healthz"], timeout_s=20)
    shown = lab.run(FIRST, ["curl", "-s", "-m", "5", f"http://{address}:50052/metrics"], timeout_s=20)
    assert healthy.stdout == b"ok"
    assert b'addresses_in_use_total{eipName="eip-pool"} 1' in shown.stdout
    assert metrics(lab)[f'gratuitous_sent{{ip="{LB}"}}'] >= 1


def test_a_controller_that_is_killed(lab: Lab, eventually: Eventually) -> None:
    """What is given out stays; the next Service gets its address from the container that is started again."""
    pods, _ = lab.api.list("pods", "openelb-system", label_selector="component=controller")
    lab.signal_pod("openelb-system", pods[0]["metadata"]["name"], signal.SIGKILL)
    annotations = {"lb.kubesphere.io/v1alpha1": "openelb", "eip.openelb.kubesphere.io/v1alpha2": "eip-pool"}
    second = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "second", "namespace": "dev", "annotations": annotations},
        "spec": {"type": "LoadBalancer", "selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }  # fmt: skip
    lab.api.create(second)

    def ip(name: str) -> str:
        status = lab.api.get("services", "dev", name).get("status") or {}
        return ",".join(one["ip"] for one in (status.get("loadBalancer") or {}).get("ingress") or ())

    eventually(lambda: ip("second") == "192.168.93.232", within_s=30)
    eventually(lambda: answered_by(lab, IPv4Address("192.168.93.232")) == {"openeuler-1"}, within_s=10)
    assert ip("svc-lb") == str(LB)
    lab.api.delete("services", "dev", "second")
    eventually(lambda: answered_by(lab, IPv4Address("192.168.93.232")) == set(), within_s=10)
