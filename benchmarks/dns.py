#!/usr/bin/env python3
"""Cluster DNS under load, and how soon it knows of a change: from one pod, at the Service's address.

Starts a lab of its own and prints, for RATE questions a second over SECONDS: how many were lost and how long answers took,
for names that dnsmasq has itself (A), for those of the responder behind it (AAAA, SRV), and while Services come and go; the
most questions a second that were answered; and the time from an API write to the first right answer of every server, with
few names, with 2,000 Services, and with 20,000 endpoints behind them. ``--json`` prints the same for machines. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import socket
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TOPOLOGY = "three-nodes"
RATE = 5000
SECONDS = 4.0
SOCKETS = 16  # each is a flow of its own, so both servers are asked
CHANGES = 15
DNS = ("10.96.0.10", 53)
NAME = "web.dev.svc.cluster.local"
SRV_NAME = f"_http._tcp.{NAME}"


def flood(name: str, kind: str, rate: float, seconds: float) -> dict[str, float]:
    """Ask at a rate for a while (0: as soon as an answer frees a place); return what came of it. Runs in a pod."""
    from dnslib import DNSRecord

    poll = select.epoll()
    sockets = {}
    for _ in range(SOCKETS):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        made.connect(DNS)
        sockets[made.fileno()] = made
        poll.register(made.fileno(), select.EPOLLIN)
    files = list(sockets)
    body = bytes(DNSRecord.question(name, kind).pack())[2:]
    sent: dict[int, float] = {}
    took: list[float] = []
    number = 0
    began = time.monotonic()
    end = began + seconds
    most_open = 64 if rate == 0 else 1 << 16
    while True:
        now = time.monotonic()
        if now > end + 2 or (now > end and not sent):
            break
        due = len(sent) < most_open if rate == 0 else number < (now - began) * rate
        while now < end and due:
            fd = files[number % SOCKETS]
            key = (number // SOCKETS & 0xFFFF) << 16 | fd
            sent[key] = time.monotonic()
            with contextlib.suppress(OSError):  # an ICMP error: the question counts as lost unless it is answered
                sockets[fd].send((number // SOCKETS & 0xFFFF).to_bytes(2, "big") + body)
            number += 1
            due = len(sent) < most_open if rate == 0 else number < (time.monotonic() - began) * rate
        for fd, _ in poll.poll(0.001):
            while True:
                try:
                    reply = sockets[fd].recv(4096)
                except OSError:
                    break
                at = sent.pop(int.from_bytes(reply[:2], "big") << 16 | fd, None)
                if at is not None:
                    took.append(time.monotonic() - at)
    spent = min(time.monotonic(), end) - began
    took.sort()
    return {
        "asked": number,
        "lost": len(sent),
        "answered_per_s": round(len(took) / spent),
        "median_ms": round(took[len(took) // 2] * 1000, 2),
        "p99_ms": round(took[len(took) * 99 // 100] * 1000, 2),
    }


def watch_name(servers: list[str], name: str, wanted: bool, timeout_s: float) -> float:
    """Return when every server has (or no longer has) a name, on the machine's monotonic clock. Runs on a node."""
    from dnslib import DNSRecord

    query = bytes(DNSRecord.question(name).pack())
    left = list(servers)
    end = time.monotonic() + timeout_s
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.settimeout(0.25)
        while left and time.monotonic() < end:
            made.sendto(query, (left[0], 53))
            try:
                has = DNSRecord.parse(made.recv(4096)).header.a > 0
            except OSError:
                continue
            if has is wanted:
                left.pop(0)
            else:
                time.sleep(0.001)
    if left:
        raise TimeoutError(f"{name}: {left} did not know within {timeout_s} s")
    return time.monotonic()


def service(name: str, address: str) -> dict[str, Any]:
    ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
    metadata = {"name": name, "namespace": "dev"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"clusterIP": address, "ports": ports}}


def endpoint_slice(name: str, number: int, endpoints: int) -> dict[str, Any]:
    metadata = {"name": f"{name}-1", "namespace": "dev", "labels": {"kubernetes.io/service-name": name}}
    first = number * endpoints
    return {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata, "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [
            {"addresses": [f"10.{128 + n // 62500}.{n // 250 % 250}.{n % 250 + 1}"], "conditions": {"ready": True}}
            for n in range(first, first + endpoints)
        ],
    }  # fmt: skip


class Bench:
    def __init__(self, lab: Any) -> None:
        self.lab = lab
        self.servers = [
            pod["status"]["podIP"] for pod in lab.api.list("pods", "kube-system", label_selector="k8s-app=kube-dns")[0]
        ]

    def prepare(self) -> None:
        api = self.lab.api
        api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "dev"}})
        api.create(service("web", "10.96.1.1"))
        container = {"name": "c", "image": "client"}
        pod = {"metadata": {"name": "client", "namespace": "dev"}, "spec": {"containers": [container]}}
        api.create({"apiVersion": "v1", "kind": "Pod", **pod})
        while (api.get("pods", "dev", "client").get("status") or {}).get("phase") != "Running":
            time.sleep(0.02)
        self.wait("web", True)

    def wait(self, name: str, wanted: bool) -> float:
        return float(
            self.lab.call(
                "node1", watch_name, self.servers, f"{name}.dev.svc.cluster.local", wanted, 30.0, timeout_s=60
            )
        )

    def flood(self, name: str, kind: str, rate: float = RATE) -> dict[str, float]:
        return dict(self.lab.call("dev/client", flood, name, kind, rate, SECONDS, timeout_s=60))

    def flood_while_changing(self) -> dict[str, float]:
        stop = threading.Event()

        def change() -> None:
            while not stop.wait(0.1):
                self.lab.api.create(service("passing", "10.96.1.8"))
                self.lab.api.delete("services", "dev", "passing")

        thread = threading.Thread(target=change)
        thread.start()
        try:
            return self.flood(NAME, "A")
        finally:
            stop.set()
            thread.join()

    def reload_ms(self) -> float:
        """Return how long a server took to read its hosts file the last time, from its metrics."""
        url = f"http://{self.servers[0]}:9153/metrics"
        text = self.lab.run("node1", ["curl", "-sS", "-m", "5", url], timeout_s=10).stdout.decode()
        line = next(line for line in text.splitlines() if line.startswith("coredns_hosts_reload_seconds"))
        return round(float(line.split()[1]) * 1000, 1)

    def change_ms(self) -> dict[str, float]:
        """Return how long both servers took to know of a Service that is made, and to forget it."""
        known, forgotten = [], []
        for _ in range(CHANGES):
            began = time.monotonic()
            self.lab.api.create(service("probe", "10.96.1.9"))
            known.append((self.wait("probe", True) - began) * 1000)
            began = time.monotonic()
            self.lab.api.delete("services", "dev", "probe")
            forgotten.append((self.wait("probe", False) - began) * 1000)
        return {
            "known_ms": round(statistics.median(known), 1),
            "forgotten_ms": round(statistics.median(forgotten), 1),
            "worst_ms": round(max(*known, *forgotten), 1),
            "reload_ms": self.reload_ms(),
        }

    def fill(self, services: int, endpoints: int) -> None:
        """Have so many headless Services with endpoints written by hand, which concern nobody but DNS."""

        def make(number: int) -> None:
            self.lab.api.create(service(f"s{number}", "None"))
            self.lab.api.create(endpoint_slice(f"s{number}", number, endpoints))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(make, range(services)))
        self.wait(f"s{services - 1}", True)

    def widen(self, services: int, endpoints: int) -> None:
        def change(number: int) -> None:
            found = endpoint_slice(f"s{number}", number, endpoints)
            patch = {"endpoints": found["endpoints"]}
            self.lab.api.patch("endpointslices.discovery.k8s.io", "dev", f"s{number}-1", patch)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(change, range(services)))
        last = endpoint_slice("x", services - 1, endpoints)["endpoints"][-1]["addresses"][0].replace(".", "-")
        self.wait(f"{last}.s{services - 1}", True)


def measure() -> dict[str, dict[str, float]]:
    from testbed.lab.start import start_lab
    from testbed.manifests.topology import find_topology, load_topology

    topology = load_topology(find_topology(TOPOLOGY))
    with start_lab(topology, name=f"bench-dns-{os.getpid()}", proxy_mode="iptables", attached=True) as lab:
        bench = Bench(lab)
        bench.prepare()
        result = {
            "A": bench.flood(NAME, "A"),
            "AAAA": bench.flood(NAME, "AAAA"),
            "SRV": bench.flood(SRV_NAME, "SRV"),
            "A, changing": bench.flood_while_changing(),
            "A, at most": bench.flood(NAME, "A", 0),
            "AAAA, at most": bench.flood(NAME, "AAAA", 0),
            "change, few names": bench.change_ms(),
        }
        bench.fill(2000, 1)
        result["change, 2,000 names"] = bench.change_ms()
        bench.widen(2000, 10)
        result["change, 20,000 names"] = bench.change_ms()
        result["A, 20,000 names, changing"] = bench.flood_while_changing()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("benchmarks/dns.py needs root: it starts a lab")
    result = measure()
    if options.json:
        print(json.dumps(result))
        return
    print(f"{RATE} questions a second from one pod for {SECONDS:g} s; changes seen by both servers")
    for what, figures in result.items():
        print(f"  {what:26}", ", ".join(f"{name} {value:g}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
