#!/usr/bin/env python3
"""How long a pod takes: its network alone beside stock Mininet's, in one run; a whole pod; a thousand pods.

Prints milliseconds per pod network (namespace, veth pair, bridge port, address, route, neighbour) for HOSTS hosts on
stock Mininet (Host + LinuxBridge + Link) and here, interleaved in rounds, and the ratio. ``--json`` prints
``{"mininet_ms": …, "testbed_ms": …}``. ``--whole`` adds whole pods, ``--thousand`` 1,000 echo pods behind one Service.
Needs root. Everything lives in namespaces of child processes and goes with them.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

HOSTS = 100
ROUNDS = 2


def in_namespaces(work: Callable[[str], Any]) -> Any:
    """Return ``work(folder)`` from a child in network, mount, UTS and PID namespaces of its own."""
    from testbed.kernel import linux

    reading, writing = os.pipe()
    folder = tempfile.mkdtemp(prefix="testbed-bench-")
    outer = os.fork()
    if outer == 0:
        linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWNS | linux.CLONE_NEWUTS | linux.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            try:
                linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
                linux.mount("proc", "/proc", "proc")
                linux.mount("sysfs", "/sys", "sysfs")
                linux.mount("tmpfs", folder, "tmpfs")
                answer = (True, work(folder))
            except BaseException as error:
                import traceback

                traceback.print_exc()
                answer = (False, repr(error))
            os.write(writing, pickle.dumps(answer))
            os._exit(0)
        os.waitpid(pid, 0)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        packed = file.read()
    os.waitpid(outer, 0)
    os.rmdir(folder)
    succeeded, value = pickle.loads(packed)
    if not succeeded:
        raise SystemExit(f"the measurement failed: {value}")
    return value


def stock_mininet(_folder: str) -> float:
    """Return ms per host on stock Mininet. Its start-up work is left out; so is its rewriting of host sysctls."""
    # mnexec -c loops over every possible descriptor: leaving a high limit would flatter us
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    from mininet.link import Link
    from mininet.node import Host
    from mininet.nodelib import LinuxBridge

    from testbed.underlay.stock import Mininet  # also marks Mininet.init as done

    network = Mininet(topo=None, switch=LinuxBridge, host=Host, link=Link, controller=None, build=False)
    switch = network.addSwitch("s1")
    hosts = []
    started = time.perf_counter()
    for number in range(HOSTS):
        host = network.addHost(f"h{number}", ip=f"10.0.0.{number + 2}/24", defaultRoute="via 10.0.0.1")
        network.addLink(host, switch)
        hosts.append(host)
    for host in hosts:
        host.configDefault()
    switch.start([])
    return (time.perf_counter() - started) * 1000 / HOSTS


def one_node(pod_cidr: str = "10.244.0.0/22") -> Any:
    from testbed.model.topology import Network, NodeSpec, Topology

    lan = Network(name="lan", cidr=IPv4Network("192.168.93.0/24"), gateway=IPv4Address("192.168.93.1"))
    node = NodeSpec(
        name="node1", network="lan", address=IPv4Address("192.168.93.11"), pod_cidr=IPv4Network(pod_cidr)
    )  # fmt: skip
    return Topology(name="bench", networks=(lan,), nodes=(node,))


def our_networks(folder: str) -> float:
    """Return ms per pod network here."""
    from testbed.underlay.network import LabNetwork

    network = LabNetwork(one_node(), folder, folder)
    network.build_topology()
    cidr = IPv4Network("10.244.0.0/22")
    started = time.perf_counter()
    for number in range(HOSTS):
        network.add_pod(
            f"dev/p{number}",
            f"veth{number:08x}",
            node="node1",
            hostname=f"p{number}",
            address=cidr[number + 2],
            network=cidr,
        )
    return (time.perf_counter() - started) * 1000 / HOSTS


def whole_pods(folder: str) -> float:
    """Return ms per pod with namespaces, overlay and a running echo server, asked for one after another."""
    import asyncio
    import socket

    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        from testbed.lab.forker import start_forker

        ours.close()
        forker = start_forker()
        from testbed.lab.spawner import Spawner

        os.mkdir(f"{folder}/lab")
        spawner = Spawner(one_node(), f"{folder}/lab", theirs, forker)
        spawner.network.build_topology()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{folder}/socket")
        listener.listen()
        spawner.serve(listener)
        os._exit(0)
    theirs.close()

    async def measure() -> float:
        from testbed.kubelet.logs import ContainerLog
        from testbed.kubelet.runtime import ContainerSpec, SandboxSpec
        from testbed.lab.runtime import SpawnerRuntime

        runtime = SpawnerRuntime(ours)
        cidr = IPv4Network("10.244.0.0/22")
        await runtime.remove_sandbox("none")  # answers when the network stands
        started = time.perf_counter()
        for number in range(HOSTS):
            sandbox = SandboxSpec(
                pod_uid=f"u{number}", namespace="dev", pod_name=f"p{number}", node="node1", hostname=f"p{number}",
                address=cidr[number + 2], network=cidr, etc_files={"hosts": "127.0.0.1 localhost\n"},
            )  # fmt: skip
            await runtime.create_sandbox(sandbox)
            arguments = {"ports": [["TCP", 8080]], "identity": {"pod": f"p{number}", "namespace": "dev"}}
            await runtime.start_container(
                ContainerSpec(
                    container_id=f"c{number}", pod_uid=f"u{number}", name="echo", builtin="echo", builtin_args=arguments
                ),
                ContainerLog(time.time_ns),
            )
        return (time.perf_counter() - started) * 1000 / HOSTS

    return asyncio.run(measure())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--whole", action="store_true", help="whole pods as well")
    parser.add_argument("--thousand", action="store_true", help="1,000 echo pods behind one Service, in a lab")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("benchmarks/pods.py needs root: it makes network namespaces")
    mininet, ours = [], []
    for _ in range(ROUNDS):
        mininet.append(in_namespaces(stock_mininet))
        ours.append(in_namespaces(our_networks))
    result = {"mininet_ms": round(statistics.median(mininet), 2), "testbed_ms": round(statistics.median(ours), 2)}
    if options.whole:
        result["whole_pod_ms"] = round(in_namespaces(whole_pods), 2)
    if options.thousand:
        from thousand import thousand_pods

        result.update(thousand_pods())
    if options.json:
        print(json.dumps(result))
        return
    print(f"{HOSTS} hosts, median of {ROUNDS} interleaved rounds")
    print(f"  stock Mininet  {result['mininet_ms']:7.2f} ms per host and link")
    print(f"  testbed        {result['testbed_ms']:7.2f} ms per pod network    budget 5 ms")
    print(f"  ratio          {result['mininet_ms'] / result['testbed_ms']:7.1f} ×                     budget 8 ×")
    if options.whole:
        print(f"  whole pod      {result['whole_pod_ms']:7.2f} ms                        budget 12 ms")
    if options.thousand:
        print(
            f"  1,000 pods     {result['thousand_ready_s']:7.1f} s until every one answers, {result['thousand_mib']:.0f} MiB"
        )


if __name__ == "__main__":
    main()
