"""`testbed capture` in real labs: files, lines and journeys, and how it ends when something goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from capture_support import CaptureFile, read_pcapng

from testbed.kernel.pace import patient
from testbed.kernel.proxy_pairs import PairTable
from testbed.lab.folder import list_records
from testbed.lab.handle import Lab

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

TESTBED = [sys.executable, "-m", "testbed"]
WEB = """
apiVersion: v1
kind: Namespace
metadata: {name: dev}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: dev, labels: {app: web}}
spec: {nodeName: node2, containers: [{name: web, image: nginx}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: dev}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{name: http, port: 80, nodePort: 30888}]
"""
CURL = ["curl", "-sS", "-m", "5", "-o", "/dev/null", "http://192.168.93.11:30888/"]


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TESTBED, *argv], capture_output=True, text=True, timeout=patient(120), check=False)


@contextlib.contextmanager
def a_lab(name: str, folder: Path, *options: str) -> Iterator[Lab]:
    """A lab with one web server on node2 behind a NodePort, which answers."""
    manifest = folder / "web.yaml"
    manifest.write_text(WEB)
    name = f"{name}-{os.getpid()}"
    done = command("up", name, "-f", str(manifest), *options)
    assert done.returncode == 0, done.stderr
    try:
        with Lab.find(name) as lab:
            end = time.monotonic() + patient(60)
            while lab.run("client", CURL, timeout_s=20).status:
                assert time.monotonic() < end, "the Service does not answer"
            yield lab
    finally:
        if any(record.name == name for record in list_records()):
            command("down", name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab that the tests of this file share."""
    with a_lab("capture", tmp_path_factory.mktemp("lab")) as made:
        yield made


@pytest.fixture(autouse=True)
def end_what_failed() -> Iterator[None]:
    """A test that fails leaves no capture behind."""
    yield
    while Capturing.started:
        Capturing.started.pop().close()


class Capturing:
    """A `testbed capture` that listens."""

    started: ClassVar[list[Capturing]] = []

    def __init__(self, lab: Lab, *argv: str) -> None:
        self.process = subprocess.Popen(
            [*TESTBED, "capture", "-l", lab.name, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        self.started.append(self)
        assert self.process.stderr
        self.first = self.process.stderr.readline().decode()
        assert self.first.startswith("listening at"), self.first + self.process.stderr.read().decode()
        self.out = self.err = ""

    def end(self, number: int = signal.SIGINT) -> int:
        """Send a signal and wait; return the exit status."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        out, err = self.process.communicate(timeout=patient(60))
        self.out, self.err = (out or b"").decode(errors="replace"), err.decode()
        return self.process.returncode

    def close(self) -> None:
        """End it, if the test has not."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def tcpdumps(self) -> list[int]:
        """Return the pids of its tcpdumps."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(
                    self.process.pid
                ):
                    found.append(int(entry.name))
        return found


def ping(lab: Lab, count: int, *options: str) -> None:
    done = lab.run("client", ["ping", "-qc", str(count), *options, "192.168.93.11"], timeout_s=60)
    assert done.status == 0, done.stdout


def read(file: Path) -> CaptureFile:
    return read_pcapng(file.read_bytes())


# ── what is captured ────────────────────────────────────────────────────────────────────────────────────────────────

NODE_PORT_WAY = [
    ("client:eth0", "out"), ("node1:eth0", "in"), ("node1", "translated"), ("node1:eth0", "out"), ("node2:eth0", "in"),
    ("node2:cni0", "out"), ("node2:veth", "out"), ("dev/web:eth0", "in"),
]  # fmt: skip


def ways(told: dict[str, Any], which: str) -> list[tuple[str, str]]:
    """Return the steps of a way: a point (of a pod's link without its number) and direction, or a node and 'translated'."""
    steps: list[tuple[str, str]] = []
    for step in told[which]["steps"]:
        if "node" in step:
            steps.append((step["node"], "translated"))
        else:
            steps.append((re.sub(r"veth\w+", "veth", step["point"]), step["direction"]))
    return steps


@pytest.mark.parametrize("mode", ["iptables", "nftables", pytest.param("ipvs", marks=pytest.mark.ipvs)])
def test_a_nodeport_on_a_node_without_a_pod_is_one_journey(
    mode: str, request: pytest.FixtureRequest, tmp_path: Path
):  # fmt: skip
    """Seven points on the way there, in order, with the translation where node1 did it, and the same way back."""
    with contextlib.ExitStack() as stack:
        if mode == "iptables":
            used: Lab = request.getfixturevalue("lab")
        else:
            used = stack.enter_context(a_lab(mode, tmp_path, "--proxy-mode", mode))
        file = tmp_path / "c.pcapng"
        capturing = Capturing(used, "svc/dev/web", "-w", str(file), "-o", "json")
        assert used.run("client", CURL, timeout_s=20).status == 0
        assert capturing.end() == 0, capturing.err
    told = next(c for c in json.loads(capturing.out)["connections"] if c["from"]["name"] == "client")
    assert told["to"]["name"] == "NodePort 30888 of dev/web:http at node1"
    assert told["endpoint"] == "dev/web on node2" and told["outcome"].startswith("answered in")
    assert ways(told, "way") == NODE_PORT_WAY
    back = [(where, {"in": "out", "out": "in"}.get(how, how)) for where, how in reversed(NODE_PORT_WAY)]
    assert ways(told, "answer") == back
    translation = told["way"]["steps"][2]["translation"]
    assert translation.startswith("DNAT to 10.244.2.") and "masqueraded as 192.168.93.11:" in translation
    found = read(file)
    comments = [packet.comments for packet in found.packets if packet.comments]
    mine = [c for c in comments if c[0].startswith(f"connection {told['number']}: client → NodePort 30888")]
    assert len(mine) > 20 and any("node1: DNAT to" in text for c in mine for text in c[1:])
    times = [packet.time_ns for packet in found.packets]
    assert times == sorted(times)


def test_tools_read_the_file(lab: Lab, tmp_path: Path):
    """tcpdump reads it, and capinfos and tshark where they are installed: points, nanoseconds, every packet."""
    file = tmp_path / "c.pcapng"
    capturing = Capturing(lab, "client", "node1:eth0", "-w", str(file), "--filter", "icmp")
    ping(lab, 3)
    assert capturing.end() == 0
    assert "12 packets at 2 points" in capturing.err and "none lost" in capturing.err
    assert Counter(packet.interface for packet in read(file).packets) == {0: 6, 1: 6}
    listed = subprocess.run(["tcpdump", "-nr", str(file)], capture_output=True, text=True, check=True, timeout=30)
    assert listed.stdout.count("ICMP echo reply") == 6
    if shutil.which("capinfos") is None or shutil.which("tshark") is None:
        pytest.skip("capinfos and tshark are not installed (apt-get install tshark)")
    told = subprocess.run(["capinfos", str(file)], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "Number of packets:   12" in told and "nanoseconds (9)" in told and "Name = node1:eth0" in told
    fields = ["-e", "frame.interface_name", "-e", "frame.comment"]
    rows = subprocess.run(
        ["tshark", "-r", str(file), "-T", "fields", *fields], capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    assert rows[0].startswith("client:eth0\tconnection 1: client → node1")


def test_lines_are_tcpdump_s_with_the_point_before_them(lab: Lab):
    """Without -w each packet is a line: time, point, direction, and what tcpdump says."""
    capturing = Capturing(lab, "client", "node1:eth0", "--filter", "icmp", "--count", "4")
    ping(lab, 1)
    assert capturing.wait() == 0
    # by their time stamps: on a busy machine one may come too late to be in order
    lines = sorted(capturing.out.splitlines())
    assert [line.split()[1:3] for line in lines] == [
        ["client:eth0", "out"], ["node1:eth0", "in"], ["node1:eth0", "out"], ["client:eth0", "in"],
    ]  # fmt: skip
    assert "IP 192.168.93.100 > 192.168.93.11: ICMP echo request" in lines[0] and "\033" not in capturing.out


def test_a_stream_can_be_read_while_it_grows(lab: Lab, eventually: Callable[..., Any]):
    """`-w - | wireshark -k -i -`: blocks come whole, while the capture goes on."""
    capturing = Capturing(lab, "client", "-w", "-", "--filter", "icmp")
    ping(lab, 2)
    assert capturing.process.stdout
    os.set_blocking(capturing.process.stdout.fileno(), False)
    data = b""

    def packets() -> int:
        nonlocal data
        with contextlib.suppress(BlockingIOError):
            data += os.read(capturing.process.stdout.fileno(), 1 << 16)  # type: ignore[union-attr]
        return len(read_pcapng(data).packets)

    eventually(lambda: packets() == 4, within_s=20)
    assert capturing.end() == 0


def test_no_packet_of_a_burst_is_lost(lab: Lab, tmp_path: Path):
    """Every packet of a flood is in the file once for each point it passes (benchmarks/capture.py has the long form)."""
    file = tmp_path / "c.pcapng"
    capturing = Capturing(lab, "client", "node1:eth0", "-w", str(file), "--filter", "icmp")
    ping(lab, 2000, "-f")
    assert capturing.end() == 0
    assert Counter(packet.interface for packet in read(file).packets) == {0: 4000, 1: 4000}, capturing.err


def send_datagrams(count: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        for _ in range(count):
            made.sendto(bytes(1400), ("192.168.93.1", 9))


def test_what_is_lost_is_counted(lab: Lab, tmp_path: Path):
    """With a tcpdump that is held up, the kernel's buffer overflows: how much is said, and is in the file's statistics."""
    file = tmp_path / "c.pcapng"
    capturing = Capturing(lab, "client", "-w", str(file), "--buffer", "1MiB", "--filter", "udp port 9")
    (tcpdump,) = capturing.tcpdumps()
    os.kill(tcpdump, signal.SIGSTOP)
    lab.call("client", send_datagrams, 4000, timeout_s=30)
    os.kill(tcpdump, signal.SIGCONT)
    assert capturing.end() == 0
    found = read(file)
    lost = 4000 - len(found.packets)
    assert lost > 0
    assert f"client:eth0: {lost} of 4000 lost" in capturing.err
    assert found.statistics[0] == {4: 4000, 5: lost, 7: lost, 8: 4000 - lost}


def test_userspace_mode_is_told_as_two_connections(tmp_path: Path):
    """The client's ends at node1's proxy, which goes on with another one to the pod; its own table says so."""
    with a_lab("userspace", tmp_path, "--proxy-mode", "userspace") as lab:
        capturing = Capturing(lab, "svc/dev/web", "-o", "json")
        assert lab.run("client", CURL, timeout_s=20).status == 0
        assert capturing.end() == 0
    connections = json.loads(capturing.out)["connections"]
    front = next(c for c in connections if c["from"]["name"] == "client")
    back = next(c for c in connections if c["number"] == front["continues_as"])
    assert front["endpoint"] == "dev/web on node2" and ways(front, "way") == NODE_PORT_WAY[:3]
    assert "redirected to its own 192.168.93.11:" in front["way"]["steps"][2]["translation"]
    assert ways(back, "way") == NODE_PORT_WAY[3:]


def carry(ready: int, release: int) -> None:
    """Be a proxy of userspace mode on node1 for one connection, with its table. Runs there."""
    with socket.create_server(("192.168.93.11", 40001)) as listener, contextlib.closing(PairTable()) as table:
        os.write(ready, b"x")
        client, _ = listener.accept()
        table.accept()
        with client, socket.create_connection(("192.168.93.12", 10256), timeout=10) as backend:
            pair = table.add(client, backend)
            client.send(b"y")
            os.read(release, 1)
            table.remove(pair)


def connect_and_wait() -> bytes:
    with socket.create_connection(("192.168.93.11", 40001), timeout=10) as made:
        return made.recv(1)


def test_a_proxy_s_own_table_ties_its_two_connections(lab: Lab):
    """The client's connection to a userspace proxy goes on as the one that the proxy opened for it."""
    (ready, tell), (wait, release) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            lab.call("node1", carry, tell, wait, timeout_s=60)
        os._exit(0)
    try:
        os.read(ready, 1)
        capturing = Capturing(
            lab, "client", "node1:eth0", "node2:eth0", "-o", "json", "--filter", "port 40001 or port 10256"
        )
        assert lab.call("client", connect_and_wait, timeout_s=30) == b"y"
        os.write(release, b"x")
        assert capturing.end() == 0
    finally:
        os.write(release, b"x")
        os.waitpid(child, 0)
        for fd in (ready, tell, wait, release):
            os.close(fd)
    connections = json.loads(capturing.out)["connections"]
    front = next(c for c in connections if c["to"]["address"] == "192.168.93.11:40001")
    back = next(c for c in connections if c["number"] == front["continues_as"])
    assert back["to"]["address"] == "192.168.93.12:10256" and back["from"]["name"] == "node1"
    assert front["endpoint"] == "node2"


# ── bad input, and ends ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nod1"], "there is no point 'nod1'"),
        (["node1:eth7"], "node1 has no interface 'eth7' (did you mean \"eth0\"?)"),
        (["client", "--filter", "tcp prt 80"], "--filter 'tcp prt 80': can't parse filter expression: syntax error"),
        (["client", "-w", "/nowhere/c.pcapng"], "cannot write the capture into '/nowhere/c.pcapng': No such file"),
        (["client", "-w", "/tmp"], "cannot write the capture into '/tmp': it is a folder"),
        (["client", "--duration", "soon"], "--duration: 'soon' is not a duration"),
        (["client", "--buffer", "3"], "--buffer: '3' is not a size from 64KiB to 4GiB"),
        (["client", "--keep", "1MiB"], "--keep says how much of the file is kept: name the file with -w FILE"),
        (["client", "-w", "-", "-o", "json"], "-w - and -o json both write to standard output"),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_anything_starts(lab: Lab, argv: list[str], message: str):
    """Exit status 2 and one message; nothing listens."""
    done = command("capture", "-l", lab.name, *argv)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr and "listening" not in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_filter_leaves_the_file_alone(lab: Lab, tmp_path: Path):
    """What was captured before is not emptied by a command that captures nothing."""
    file = tmp_path / "c.pcapng"
    file.write_bytes(b"precious")
    assert command("capture", "-l", lab.name, "client", "-w", str(file), "--filter", "nonsense ((").returncode == 2
    assert file.read_bytes() == b"precious"


def test_a_full_disk_ends_the_capture_with_a_valid_file(lab: Lab, tmp_path: Path):
    """The message says so and how far the file goes; the file is valid to its last byte; exit status 3."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=True)
    try:
        capturing = Capturing(lab, "client", "-w", str(disk / "c.pcapng"), "--filter", "icmp")
        ping(lab, 200, "-f", "-s", "1000")
        assert capturing.wait() == 3
        assert "c.pcapng: No space left on device after" in capturing.err
        assert 10 < len(read(disk / "c.pcapng").packets) < 400
        assert not capturing.tcpdumps()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_point_that_disappears_is_told_and_the_others_go_on(lab: Lab, tmp_path: Path, eventually: Callable[..., Any]):
    """A pod that is deleted takes its two points along; its network is not kept alive by being watched."""
    lab.api.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "passing", "namespace": "dev"},
            "spec": {"nodeName": "node1", "containers": [{"name": "c", "image": "client"}]},
        }
    )
    eventually(lambda: lab.api.get("pods", "dev", "passing").get("status", {}).get("phase") == "Running", within_s=20)
    file = tmp_path / "c.pcapng"
    capturing = Capturing(lab, "dev/passing", "client", "-w", str(file))
    lab.api.delete("pods", "dev", "passing", 0)
    eventually(lambda: len(capturing.tcpdumps()) == 1, within_s=20)
    ping(lab, 1)
    assert capturing.end() == 0
    assert "dev/passing:eth0 is gone: its link was removed; the other one goes on" in capturing.err
    assert any(packet.interface == 1 for packet in read(file).packets)


def test_nothing_is_left_of_a_capture_that_is_killed(lab: Lab, eventually: Callable[..., Any]):
    """With kill -9 the kernel ends every tcpdump of it."""
    capturing = Capturing(lab, "client", "node1")
    pids = capturing.tcpdumps()
    assert len(pids) >= 4
    assert capturing.end(signal.SIGKILL) == -signal.SIGKILL
    eventually(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids), within_s=10)


def test_a_reader_that_goes_away_ends_the_capture(lab: Lab):
    """Closing Wireshark ends it, with a shell's status of a broken pipe."""
    capturing = Capturing(lab, "client", "-w", "-", "--filter", "icmp")
    assert capturing.process.stdout
    capturing.process.stdout.close()
    capturing.process.stdout = None
    ping(lab, 1)
    assert capturing.wait() == 141
    assert not capturing.tcpdumps()


def test_a_lab_that_ends_takes_its_captures_along(tmp_path: Path):
    """The file is valid, the message names the lab, and `down` is not held up."""
    file = tmp_path / "c.pcapng"
    with a_lab("ending", tmp_path) as lab:
        capturing = Capturing(lab, "client", "dev/web", "-w", str(file))
        assert command("down", lab.name).returncode == 0
        assert capturing.wait() == 3
    assert f"lab '{lab.name}' ended, and the capture with it" in capturing.err
    assert read(file).interfaces


# ── scenarios ───────────────────────────────────────────────────────────────────────────────────────────────────────

SCENARIO = """
apiVersion: testbed/v1
kind: Scenario
metadata: {name: packets}
spec:
  topology: three-nodes
  steps:
    - apply: web.yaml
    - wait: {service: dev/web, for: endpoints, within: 20s}
    - capture: [svc/dev/web, dev/app=web, "node1:eth0"]
      expect: {from: client, get: "http://192.168.93.11:30888/"}
    - expect: {from: client, tcp: "192.168.93.11:30889", within: 500ms}
"""


def test_a_scenario_keeps_packets(tmp_path: Path):
    """Of the step that asks for it, and of the step that fails; the reports name the files."""
    (tmp_path / "web.yaml").write_text(WEB)
    (tmp_path / "scenario.yaml").write_text(SCENARIO)
    report = tmp_path / "report"
    done = command("run", str(tmp_path), "--report", str(report), "-o", "json")
    assert done.returncode == 1, done.stderr
    steps = json.loads(done.stdout)["results"][0]["steps"]
    assert [step["captures"] for step in steps] == [
        [], [], ["packets-iptables-step-3.pcapng"], ["packets-iptables-step-4-failed.pcapng"],
    ]  # fmt: skip
    asked, failed = (read(report / step["captures"][0]) for step in steps[2:])
    assert any("NodePort 30888 of dev/web:http" in text for packet in asked.packets for text in packet.comments)
    ports = {int.from_bytes(packet.data[36:38], "big") for packet in failed.packets if packet.data[23:24] == b"\6"}
    assert 30889 in ports and 30888 not in ports, "the flight recorder forgets what was before the step"
    assert sorted(file.name for file in report.iterdir()) == [
        "junit.xml", "observations.json", "packets-iptables-step-3.pcapng", "packets-iptables-step-4-failed.pcapng",
        "scenario.json",
    ]  # fmt: skip
