#!/usr/bin/env python3
"""Many labs at once, and many nodes in one: seconds and memory.

1. LABS labs of three nodes are started together, each with a pod of its own behind a NodePort; the outside client of each is
   answered by that pod and by no other lab's; all are stopped together, and nothing is left.
2. One lab of NODES nodes with PODS echo pods for each, in Deployments of 50 or fewer, each behind a Service; every pod asks
   every Service.

``--labs N``, ``--nodes N``, ``--pods N`` say how many; 0 labs or nodes leave that part out. ``--proxy-mode`` is of the
second. ``--json`` prints an object. Ends with a message and status 1 when something is missing. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from echo_pods import ask, deployment_and_service, memory_used_mib, served_by, until

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TESTBED = [sys.executable, "-m", "testbed"]
SPACE = "scale"
NODE_PORT = 30080
AT_MOST_S = 600.0
A_DEPLOYMENT = 50  # replicas


# ── many labs ───────────────────────────────────────────────────────────────────────────────────────────────────────


def together(commands: list[list[str]]) -> float:
    """Run `testbed` with each of these words at the same time; return how long all took."""
    started = time.monotonic()
    running = [
        subprocess.Popen([*TESTBED, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for words in commands
    ]
    for words, process in zip(commands, running, strict=True):
        said, _ = process.communicate(timeout=AT_MOST_S)
        if process.returncode:
            raise SystemExit(f"testbed {' '.join(words)} ended with status {process.returncode}:\n{said}")
    return time.monotonic() - started


def own_pod(lab: str) -> list[dict[str, Any]]:
    """Return a pod that is called after its lab, and a NodePort that is the same in all labs."""
    labels = {"app": "who"}
    container = {"name": "echo", "image": "echo", "ports": [{"containerPort": 8080}]}
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": lab, "labels": labels}, "spec": {"containers": [container]}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "who"},
            "spec": {
                "type": "NodePort",
                "selector": labels,
                "ports": [{"port": 80, "targetPort": 8080, "nodePort": NODE_PORT}],
            },
        },
    ]  # fmt: skip


def who_answers(lab_name: str) -> str:
    """Return the pod that answers a lab's outside client, NAMESPACE/NAME; '' while none does."""
    from testbed.lab.handle import Lab

    url = f"http://192.168.93.11:{NODE_PORT}/"
    with Lab.find(lab_name) as lab:
        done = lab.run("client", ["curl", "-sSi", "-m", "5", url], timeout_s=30)
    return served_by(done.stdout)


def labs_at_once(count: int) -> dict[str, float]:
    from testbed.lab.folder import list_records

    names = [f"scale-{os.getpid()}-{number}" for number in range(count)]
    before = memory_used_mib()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(end_all, names)
        for name in names:
            Path(folder, f"{name}.json").write_text("\n---\n".join(map(json.dumps, own_pod(name))))
        started = time.monotonic()
        ready_s = together([["up", name, "-t", "three-nodes", "-f", f"{folder}/{name}.json"] for name in names])
        for name in names:
            until(
                lambda name=name: bool(who_answers(name)), lambda name=name: f"nobody answers in lab {name}", AT_MOST_S
            )
        answered_s = time.monotonic() - started
        for name in names:
            if (who := who_answers(name)) != f"default/{name}":
                raise SystemExit(f"in lab {name} {who} has answered")
        memory_mib = memory_used_mib() - before
        down_s = together([["down", name] for name in names])
        if left := {record.name for record in list_records()} & set(names):
            raise SystemExit(f"still there: {', '.join(sorted(left))}")
    return {
        "labs": count,
        "labs_ready_s": round(ready_s, 1),
        "labs_answered_s": round(answered_s, 1),
        "labs_mib": round(memory_mib),
        "labs_down_s": round(down_s, 1),
    }


def end_all(names: list[str]) -> None:
    """End those that still run."""
    from testbed.lab.folder import list_records
    from testbed.lab.start import stop_lab

    for record in list_records():
        if record.name in names:
            stop_lab(record.name)


# ── many nodes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def topology_text(nodes: int, pods: int) -> str:
    """Return a topology of so many nodes, each with room for its pods and those of the cluster."""
    lines = [
        f"- {{name: node{n}, network: lan, address: 192.168.93.{10 + n}, podCIDR: 10.244.{n}.0/24, maxPods: {pods + 10}}}"
        for n in range(1, nodes + 1)
    ]
    return "\n".join(
        [
            "apiVersion: testbed/v1", "kind: Topology", f"metadata: {{name: nodes-{nodes}}}", "spec:",
            "  networks: [{name: lan, cidr: 192.168.93.0/24}]",
            "  nodes:", *(f"    {line}" for line in lines),
            "  cluster: {podCIDR: 10.244.0.0/16, serviceCIDR: 10.96.0.0/16}",
        ]
    )  # fmt: skip


def deployments(pods: int) -> list[int]:
    """Return the replicas of each Deployment."""
    whole, rest = divmod(pods, A_DEPLOYMENT)
    return [A_DEPLOYMENT] * whole + ([rest] if rest else [])


def ask_from(network_fd: int, addresses: list[str]) -> list[str]:
    """Return who answered at each address, as asked from a network namespace."""
    from testbed.kernel.netns import inside_network

    with inside_network(network_fd):
        return [ask(address, 80) for address in addresses]


def many_nodes(nodes: int, pods_each: int, mode: str) -> dict[str, float]:
    from testbed.lab.doctor import examine
    from testbed.lab.start import start_lab
    from testbed.manifests import load_topology

    pods = nodes * pods_each
    sizes = deployments(pods)
    before = memory_used_mib()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "topology.yaml")
        file.write_text(topology_text(nodes, pods_each))
        topology = load_topology(file)
    started = time.monotonic()
    with start_lab(topology, name=f"scale-{os.getpid()}", proxy_mode=mode, attached=True) as lab:
        up_s = time.monotonic() - started
        started = time.monotonic()
        lab.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}})
        for number, replicas in enumerate(sizes):
            for obj in deployment_and_service(f"app-{number}", SPACE, replicas):
                lab.api.create(obj)

        def available() -> int:
            found, _ = lab.api.list("deployments.apps", SPACE)
            return sum((each.get("status") or {}).get("availableReplicas", 0) for each in found)

        until(lambda: available() == pods, lambda: f"{available()} of {pods} pods are available", AT_MOST_S)
        pods_s = time.monotonic() - started
        found, _ = lab.api.list("pods", SPACE)
        names = sorted(f"{SPACE}/{pod['metadata']['name']}" for pod in found)
        services, _ = lab.api.list("services", SPACE)
        addresses = [service["spec"]["clusterIP"] for service in services]
        until(lambda: not examine(lab)[0], lambda: f"the doctor finds {examine(lab)[0]}", AT_MOST_S)
        ready_s = time.monotonic() - started
        asked = time.monotonic()
        seen: set[str] = set()
        for name in names:
            fd = lab.network(name)
            try:
                answers = ask_from(fd, addresses)
            except OSError as error:
                raise SystemExit(f"from {name}: {error}") from error
            finally:
                os.close(fd)
            if missing := [address for address, who in zip(addresses, answers, strict=True) if not who]:
                raise SystemExit(f"{name} had no answer from {', '.join(missing)}")
            seen.update(answers)
        reach_s = time.monotonic() - asked
        memory_mib = memory_used_mib() - before
        started = time.monotonic()
    return {
        "nodes": nodes,
        "pods": pods,
        "services": len(addresses),
        "nodes_up_s": round(up_s, 1),
        "pods_available_s": round(pods_s, 1),
        "rules_ready_s": round(ready_s, 1),
        "requests": pods * len(addresses),
        "requests_s": round(reach_s, 1),
        "pods_that_answered": len(seen),
        "nodes_mib": round(memory_mib),
        "nodes_down_s": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--labs", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--pods", type=int, default=50, help="on each node")
    parser.add_argument("--proxy-mode", default="iptables")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("benchmarks/scale.py needs root: it starts labs")
    result: dict[str, float] = {}
    if options.labs:
        result |= labs_at_once(options.labs)
    if options.nodes:
        result |= many_nodes(options.nodes, options.pods, options.proxy_mode)
    if options.json:
        print(json.dumps(result))
        return
    if options.labs:
        print(f"{options.labs} labs started together")
        print(f"  ready     {result['labs_ready_s']:7.1f} s")
        print(f"  answered  {result['labs_answered_s']:7.1f} s until the client of each was, by its own pod")
        print(f"  memory    {result['labs_mib']:7.0f} MiB together")
        print(f"  down      {result['labs_down_s']:7.1f} s, stopped together")
    if options.nodes:
        print(f"{options.nodes} nodes, {result['pods']:.0f} pods, {result['services']:.0f} Services")
        print(f"  up        {result['nodes_up_s']:7.1f} s")
        print(f"  pods      {result['pods_available_s']:7.1f} s until all are available")
        print(f"  rules     {result['rules_ready_s']:7.1f} s until the doctor finds nothing wrong on any node")
        print(
            f"  requests  {result['requests_s']:7.1f} s for {result['requests']:.0f}, from every pod to every Service;"
        )
        print(f"                      {result['pods_that_answered']:.0f} pods have answered one")
        print(f"  memory    {result['nodes_mib']:7.0f} MiB")
        print(f"  down      {result['nodes_down_s']:7.1f} s")


if __name__ == "__main__":
    main()
