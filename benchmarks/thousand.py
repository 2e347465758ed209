"""A lab with 1,000 echo pods on three nodes behind one Service: seconds until each has answered, and memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

PODS = 1000
NAMESPACE = "bench"


def objects() -> list[dict[str, Any]]:
    labels = {"app": "echo"}
    container = {"name": "echo", "image": "echo", "ports": [{"containerPort": 8080}]}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "echo", "namespace": NAMESPACE},
            "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "echo", "namespace": NAMESPACE},
            "spec": {
                "replicas": PODS,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
            },
        },
    ]


def memory_used_mib() -> float:
    """Return what the machine uses without caches, but with the lab's tmpfs (Shmem counts as cache)."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    values = {name: int(text.split()[0]) for name, text in fields.items()}
    return (values["MemTotal"] - values["MemAvailable"]) / 1024


def ask_each(addresses: list[str]) -> int:
    """Runs in a node: return how many of the addresses answered an HTTP request with the name of a pod."""
    import socket

    answered = 0
    for address in addresses:
        with socket.create_connection((address, 8080), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            data = b""
            while chunk := connection.recv(4096):
                data += chunk
            answered += b"X-Served-By: bench/" in data
    return answered


def ask_service(address: str, times: int) -> int:
    """Runs in a node: return how many different pods answered through the Service."""
    import socket

    seen = set()
    for _ in range(times):
        with socket.create_connection((address, 80), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            data = b""
            while chunk := connection.recv(4096):
                data += chunk
        seen.add(next(line for line in data.split(b"\r\n") if line.startswith(b"X-Served-By:")))
    return len(seen)


def thousand_pods() -> dict[str, float]:
    """Start a lab of topologies/big.yaml, make the pods, and return seconds and MiB."""
    from testbed.lab.start import start_lab
    from testbed.manifests import find_topology, load_topology

    topology = load_topology(find_topology("big"))
    before = memory_used_mib()
    with start_lab(topology, name="bench-thousand", proxy_mode="iptables", attached=True) as lab:
        started = time.monotonic()
        for obj in objects():
            lab.api.create(obj)
        deadline = started + 120
        while True:
            status = lab.api.get("deployments.apps", NAMESPACE, "echo").get("status", {})
            if status.get("availableReplicas") == PODS:
                break
            if time.monotonic() > deadline:
                raise SystemExit(f"only {status.get('availableReplicas')} of {PODS} pods were available after 120 s")
            time.sleep(0.1)
        available = time.monotonic() - started
        pods, _ = lab.api.list("pods", NAMESPACE)
        answered = lab.call("node1", ask_each, [pod["status"]["podIP"] for pod in pods], timeout_s=60)
        if answered != PODS:
            raise SystemExit(f"only {answered} of {PODS} pods answered")
        ready = time.monotonic() - started
        service = lab.api.get("services", NAMESPACE, "echo")["spec"]["clusterIP"]
        through = lab.call("node1", ask_service, service, 500, timeout_s=60)
        memory = memory_used_mib() - before
    return {
        "thousand_available_s": round(available, 1),
        "thousand_ready_s": round(ready, 1),
        "thousand_mib": round(memory),
        "thousand_seen_in_500_requests": through,
    }
