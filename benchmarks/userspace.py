#!/usr/bin/env python3
"""Userspace mode against the direct path and iptables mode: one client, one node, one server, in one run.

::

    client 10.0.1.2 ── 10.0.1.1 node 10.0.2.1 ── 10.0.2.2 server (iperf3, nginx)

Prints per path: Gbit/s of one TCP stream to the server and back, of eight, requests per second over new connections (wrk),
processor seconds per gigabyte (of the whole machine; of the process that copies), and each as a ratio of the direct path.
Rounds alternate between the paths; the median counts. ``--json`` prints rows. Needs root, iperf3, wrk and nginx.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SERVER, IPERF_PORT, WEB_PORT = "10.0.2.2", 5201, 80
PATHS = ("direct", "iptables", "userspace")
_CLIENTS = 50


class World:
    """Three namespaces and the servers in them."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.pids = {name: self._namespace() for name in ("client", "node", "server")}
        self._connect()
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        config = Path(folder) / "nginx.conf"
        config.write_text(
            f"daemon off; worker_processes 1; pid {folder}/pid; error_log /dev/null;\nevents {{ worker_connections 8192; }}\n"
            "http { access_log off; server { listen 80 backlog=4096; location / { return 200 'ok'; } } }\n"
        )
        self.start("server", "iperf3", "-s", "-p", str(IPERF_PORT))
        self.start("server", "nginx", "-c", str(config))
        time.sleep(0.5)  # neither says when it listens

    def _namespace(self) -> int:
        holder = self.stack.enter_context(
            subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        self.stack.callback(holder.kill)
        assert holder.stdin and holder.stdout
        holder.stdin.write(b"x")
        holder.stdin.flush()
        holder.stdout.read(1)
        return holder.pid

    def enter(self, name: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.pids[name]}/ns/net"]

    def start(self, name: str, *argv: str) -> None:
        process = subprocess.Popen([*self.enter(name), *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.stack.callback(process.wait)
        self.stack.callback(process.terminate)

    def run(self, name: str, *argv: str, text: str = "") -> str:
        done = subprocess.run(
            [*self.enter(name), *argv], input=text, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(argv)}: {done.stderr or done.stdout}")
        return done.stdout

    def _connect(self) -> None:
        for name, number in (("client", 1), ("server", 2)):
            self.run("node", "ip", "-batch", "-", text=(
                f"link set lo up\nlink add {name} type veth peer name eth0 netns {self.pids[name]}\n"
                f"addr add 10.0.{number}.1/24 dev {name}\nlink set {name} up\n"))  # fmt: skip
            self.run(name, "ip", "-batch", "-", text=(
                f"link set lo up\naddr add 10.0.{number}.2/24 dev eth0\nlink set eth0 up\n"
                f"route add default via 10.0.{number}.1\n"))  # fmt: skip
        self.run("node", "sysctl", "-qw", "net.ipv4.ip_forward=1")

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Have this thread, and the threads it starts, be in a namespace."""
        from testbed.kernel.netns import inside_network

        there = os.open(f"/proc/{self.pids[name]}/ns/net", os.O_RDONLY)
        try:
            with inside_network(there):
                yield
        finally:
            os.close(there)


def objects(cluster_ip: str) -> tuple[Any, Any]:
    """Return a Service with a port for iperf3 and one for nginx, and its endpoint."""
    ports = [
        {"name": "iperf", "port": IPERF_PORT, "protocol": "TCP"},
        {"name": "web", "port": WEB_PORT, "protocol": "TCP"},
    ]
    meta = {"name": "bench", "namespace": "default"}
    labels = {"kubernetes.io/service-name": "bench"}
    service = {"metadata": meta, "spec": {"type": "ClusterIP", "clusterIP": cluster_ip, "ports": ports}}
    slice_ = {
        "metadata": {**meta, "labels": labels}, "addressType": "IPv4", "ports": ports,
        "endpoints": [{"addresses": [SERVER], "conditions": {"ready": True}}],
    }  # fmt: skip
    return service, slice_


def program(world: World) -> tuple[dict[str, str], int]:
    """Have the node serve a ClusterIP in each mode; return the address of each path, and the copying process.

    Both modes' rules can be there at once, as they are for different ClusterIPs.
    """
    from ipaddress import IPv4Address

    from testbed.dataplane.changes import ChangeTracker
    from testbed.kernel.runner import SubprocessRunner
    from testbed.model.proxyconfig import parse_proxy_config
    from testbed.model.service import NodeName, NodeView
    from testbed.programs.proxy_modes import make_proxier

    addresses, pid = {"direct": SERVER}, 0
    for number, mode in enumerate(PATHS[1:], start=1):
        addresses[mode] = f"172.30.0.{number}"
        config, problems = parse_proxy_config({"mode": mode})
        assert not problems
        tracker = ChangeTracker("node")
        service, slice_ = objects(addresses[mode])
        tracker.replace_services([service])
        tracker.replace_slices([slice_])
        with world.inside("node"):
            proxier: Any = make_proxier(config, SubprocessRunner(), own_namespace=True)
            node = NodeView(name=NodeName("node"), internal_ip=IPv4Address("10.0.1.1"))
            proxier.sync(*tracker.take(), proxier.make_settings(config, node, ()))
        if mode == "userspace":
            pid = proxier.pid
            world.stack.callback(proxier.stop)
    return addresses, pid


def busy_s() -> float:
    """Return the processor seconds that this machine has spent so far."""
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def process_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stream(world: World, address: str, seconds: int, *options: str) -> tuple[float, float]:
    """Return Gbit/s and gigabytes that iperf3's receivers saw."""
    out = world.run("client", "iperf3", "-c", address, "-p", str(IPERF_PORT), "-t", str(seconds), "-J", *options)
    seen = json.loads(out)["end"]["sum_received"]
    return seen["bits_per_second"] / 1e9, seen["bytes"] / 1e9


def connections(world: World, address: str, seconds: int) -> tuple[float, int]:
    """Return requests per second with a new connection for each, and how many failed."""
    out = world.run("client", "wrk", "-t1", f"-c{_CLIENTS}", f"-d{seconds}", "-H", "Connection: close",
                    f"http://{address}:{WEB_PORT}/")  # fmt: skip
    lines = {line.split(":", 1)[0].strip(): line.split(":", 1)[1] for line in out.splitlines() if ":" in line}
    errors = sum(int(word.strip(",")) for word in lines.get("Socket errors", "").split() if word.strip(",").isdigit())
    return float(lines["Requests/sec"]), errors


def measure(world: World, address: str, pid: int, seconds: int) -> dict[str, float]:
    machine_s, copying_s = busy_s(), process_s(pid)
    to_server, gigabytes = stream(world, address, seconds)
    machine_s, copying_s = busy_s() - machine_s, process_s(pid) - copying_s
    return {
        "to_server_gbit": to_server,
        "machine_s_per_gb": machine_s / gigabytes,
        "copying_s_per_gb": copying_s / gigabytes,
        "from_server_gbit": stream(world, address, seconds, "-R")[0],
        "eight_streams_gbit": stream(world, address, seconds, "-P", "8")[0],
        "connections_per_s": (found := connections(world, address, seconds))[0],
        "failed_connections": float(found[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {path: [] for path in PATHS}
    with contextlib.ExitStack() as stack:
        world = World(stack)
        addresses, pid = program(world)
        for number in range(options.rounds):
            for path in PATHS:
                print(f"round {number + 1}: {path}", file=sys.stderr)
                rows[path].append(measure(world, addresses[path], pid, options.seconds))
    medians = {
        path: {key: statistics.median(row[key] for row in found) for key in found[0]} for path, found in rows.items()
    }
    if options.json:
        print(json.dumps([{"path": path, **values} for path, values in medians.items()], indent=2))
        return
    columns = {
        "to_server_gbit": "Gbit/s to", "from_server_gbit": "from", "eight_streams_gbit": "8 streams",
        "connections_per_s": "new conn/s", "machine_s_per_gb": "CPU s/GB", "copying_s_per_gb": "copying s/GB",
    }  # fmt: skip
    print(f"{'path':<10}" + "".join(f"{title:>20}" for title in columns.values()) + f"{'failed':>8}")
    for path, values in medians.items():
        cells = []
        for key in columns:
            base = medians["direct"][key]
            ratio = f" ({values[key] / base:.2f}x)" if base else ""
            cells.append(f"{values[key]:.2f}{ratio}".rjust(20))
        print(f"{path:<10}" + "".join(cells) + f"{values['failed_connections']:>8.0f}")


if __name__ == "__main__":
    main()
