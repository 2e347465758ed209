#!/usr/bin/env python3
"""What a capture loses, and what it costs the traffic that it watches.

Starts a lab of its own: a client pod on one node, a server pod on another, and captures at the six points between them.

1. Loss: PACKETS datagrams and as many answers at several rates (both directions together); at each of the six points every one
   of them must be in the file. Printed: packets a second that were reached, how many of 6 × 2 × PACKETS are missing, and
   how many tcpdump says are lost. Once with comments that tie packets to connections, once without.
2. Cost: TCP throughput (iperf3) and HTTP requests (wrk) through a Service without and with a capture of the six points, as
   ratios within this run.

``--json`` prints the same for machines, ``--quick`` fewer packets and shorter runs. Needs root, iperf3 and wrk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

PACKETS = 10_000
RATES = (10_000, 25_000, 50_000, 100_000, 0)
PORT = 9000
SO_RCVBUFFORCE = 33
PAYLOAD = b"x" * 64
TESTBED = [sys.executable, "-m", "testbed"]


def send_all(local_port: int, address: str, port: int, packets: int, rate: float, waits: bool) -> float:
    """Send datagrams at a rate (0: as fast as it goes); return how many a second it was. Runs in a pod.

    Nobody reads what comes: what a socket throws away was on the wire. ``waits``: until the first has come. The senders go
    before everything else on the machine: it is the capture that must keep up.
    """
    os.setpriority(os.PRIO_PROCESS, 0, -15)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("", local_port))
        made.settimeout(10.0)
        if waits:
            made.connect(made.recvfrom(2048)[1])
        else:
            made.connect((address, port))
            made.send(PAYLOAD)  # opens the connection; counted, as is every other
        send, began = made.send, time.perf_counter()
        for number in range(packets if waits else packets - 1):
            if rate:
                while time.perf_counter() < began + number / rate:
                    pass
            try:
                send(PAYLOAD)
            except ConnectionRefusedError:  # the other side has done; this one was not sent
                send(PAYLOAD)
        return packets / (time.perf_counter() - began)


class Bench:
    """The lab, its two pods and the six points between them."""

    def __init__(self, lab: Any, folder: Path) -> None:
        self.lab = lab
        self.folder = folder
        self.make_pods()
        self.points = self.find_points()

    def make_pods(self) -> None:
        api = self.lab.api
        api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "dev"}})
        for name, node, image in (("client", "node1", "client"), ("server", "node2", "nginx")):
            container = {"name": "c", "image": image}
            metadata = {"name": name, "namespace": "dev", "labels": {"app": name}}
            spec = {"containers": [container], "nodeName": node}
            api.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        ports = [{"name": "http", "port": 80}, {"name": "iperf", "port": 5201}]
        ports.append({"name": "udp", "port": PORT, "protocol": "UDP"})  # type: ignore[dict-item]
        spec = {"clusterIP": "10.96.1.1", "selector": {"app": "server"}, "ports": ports}
        api.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "dev"}, "spec": spec})
        while any(
            (api.get("pods", "dev", n).get("status") or {}).get("phase") != "Running" for n in ("client", "server")
        ):
            time.sleep(0.02)
        end = time.monotonic() + 20
        while self.lab.run("dev/client", ["curl", "-so/dev/null", "-m1", "http://10.96.1.1/"], timeout_s=10).status:
            assert time.monotonic() < end, "the Service does not answer"

    def find_points(self) -> list[str]:
        from testbed.kubelet.runtime import pod_link_name

        links = {n: pod_link_name(self.lab.api.get("pods", "dev", n)["metadata"]["uid"]) for n in ("client", "server")}
        return [
            "dev/client", f"node1:{links['client']}", "node1:eth0", "node2:eth0", f"node2:{links['server']}", "dev/server",
        ]  # fmt: skip

    @contextmanager
    def capture(self, *options: str) -> Iterator[subprocess.Popen[str]]:
        """Run a capture at the six points; it listens."""
        argv = [*TESTBED, "capture", "-l", self.lab.name, *self.points, *options]
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert process.stderr
        line = process.stderr.readline()
        assert line.startswith("listening"), line
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)

    # -- loss ------------------------------------------------------------------------------------------------------

    def loss(self, rate: float, packets: int, *options: str) -> dict[str, Any]:
        file = self.folder / "loss.pcapng"
        with self.capture("-w", str(file), "--filter", f"udp port {PORT}", *options) as capture:
            there = self.beside(
                lambda: (self.folder / "rate").write_text(
                    str(self.lab.call("dev/server", send_all, PORT, "", 0, packets, rate / 2, True, timeout_s=60))
                )
            )
            while not self.listens():
                time.sleep(0.01)
            here = self.lab.call(
                "dev/client", send_all, PORT + 1, "10.96.1.1", PORT, packets, rate / 2, False, timeout_s=60
            )
            os.waitpid(there, 0)
            capture.send_signal(signal.SIGINT)
            told = capture.communicate(timeout=120)[1]
        expected = 2 * packets
        found = self.count(file)
        lost = re.search(r"; (\d+|none) lost", told)
        assert lost is not None, told
        return {
            "rate": round(here + float((self.folder / "rate").read_text())),
            "expected": expected * len(self.points),
            "missing": sum(expected - found.get(number, 0) for number in range(len(self.points))),
            "told_lost": 0 if lost[1] == "none" else int(lost[1]),
        }

    @staticmethod
    def beside(act: Callable[[], object]) -> int:
        """Do something in a child, whose pid is returned."""
        pid = os.fork()
        if pid == 0:
            try:
                act()
            finally:
                os._exit(0)
        return pid

    def listens(self) -> bool:
        return f":{PORT}" in self.lab.run("dev/server", ["ss", "-Hlun"], timeout_s=10).stdout.decode()

    @staticmethod
    def count(file: Path) -> Counter[int]:
        from capture_support import read_pcapng

        return Counter(packet.interface for packet in read_pcapng(file.read_bytes()).packets)

    # -- cost ------------------------------------------------------------------------------------------------------

    def throughput(self, seconds: int) -> float:
        """Return TCP's Gbit/s through the Service."""
        server = self.beside(lambda: self.lab.run("dev/server", ["iperf3", "-s", "-1"], timeout_s=60))
        while ":5201" not in self.lab.run("dev/server", ["ss", "-Hltn"], timeout_s=10).stdout.decode():
            time.sleep(0.01)
        argv = ["iperf3", "-c", "10.96.1.1", "-t", str(seconds), "-J"]
        done = self.lab.run("dev/client", argv, timeout_s=60)
        os.waitpid(server, 0)
        return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9

    def requests(self, seconds: int) -> float:
        """Return HTTP requests a second through the Service."""
        argv = ["wrk", "-t1", "-c8", f"-d{seconds}s", "http://10.96.1.1/"]
        text = self.lab.run("dev/client", argv, timeout_s=60).stdout.decode()
        return float(re.search(r"Requests/sec:\s+([0-9.]+)", text)[1])  # type: ignore[index]

    def cost(self, seconds: int, rounds: int) -> dict[str, Any]:
        file = self.folder / "cost.pcapng"
        found: dict[str, list[float]] = {}
        for _ in range(rounds):  # alternately: what the machine does besides hits both
            for name, options in (
                ("none", None),
                ("whole packets", ["-w", str(file)]),
                ("96 bytes", ["-w", str(file), "--snaplen", "96"]),
                ("another port", ["-w", str(file), "--filter", "tcp port 9"]),
            ):
                for what, measure in (("tcp", self.throughput), ("http", self.requests)):
                    if options is None:
                        value = measure(seconds)
                    else:
                        with self.capture(*options):
                            value = measure(seconds)
                    found.setdefault(f"{what}, {name}", []).append(value)
        medians = {name: statistics.median(values) for name, values in found.items()}
        return {
            name: {"value": round(value, 2), "ratio": round(value / medians[f"{name.split(',')[0]}, none"], 2)}
            for name, value in medians.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    from testbed.lab.start import start_lab
    from testbed.manifests import find_topology, load_topology

    packets = 2_000 if options.quick else PACKETS
    topology = load_topology(find_topology("three-nodes"))
    results: dict[str, Any] = {"packets": packets, "loss": {}, "cost": {}}
    with (
        tempfile.TemporaryDirectory() as folder,
        start_lab(topology, name=f"bench-{os.getpid()}", proxy_mode="iptables", attached=True) as lab,
    ):
        bench = Bench(lab, Path(folder))
        for label, extra in (("with comments", ()), ("without", ("--no-comments",))):
            results["loss"][label] = [bench.loss(rate, packets, *extra) for rate in RATES]
        results["cost"] = bench.cost(1 if options.quick else 3, 1 if options.quick else 3)
    if options.json:
        print(json.dumps(results))
        return
    print(f"capture at 6 points of 2 × {packets} packets, both directions together")
    for label, rows in results["loss"].items():
        for row in rows:
            print(
                f"  {label:14} {row['rate']:>7} packets/s: {row['missing']:>6} of {row['expected']} missing, "
                f"{row['told_lost']} told as lost"
            )
    print("throughput beside a capture of 6 points (ratio to none)")
    for name, row in results["cost"].items():
        unit = "Gbit/s" if name.startswith("tcp") else "requests/s"
        print(f"  {name:24} {row['value']:>9} {unit:10} × {row['ratio']}")


if __name__ == "__main__":
    main()
