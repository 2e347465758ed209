#!/usr/bin/env python3
"""How long a change takes from the API to the kernels of all three nodes, with 100 Services and minSyncPeriod 0.

Starts a lab, changes one endpoint at a time, and prints milliseconds from before the write to the API until the slowest
node's restore has ended (its ``sync_proxy_rules_last_timestamp_seconds``), per backend: median and most of CHANGES.
``--json`` prints a list of rows: backend, services, median_ms, most_ms. Needs root.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SERVICES = 100
CHANGES = 20
NAMESPACE = "bench"


def last_sync(_: None = None) -> tuple[float, float]:
    """Runs in a node: return when the last sync ended, and how many endpoint changes kube-proxy has heard of."""
    import urllib.request

    with urllib.request.urlopen("http://127.0.0.1:10249/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return (
        float(values["kubeproxy_sync_proxy_rules_last_timestamp_seconds"]),
        float(values.get("kubeproxy_sync_proxy_rules_endpoint_changes_total", 0)),
    )


def service(number: int) -> Any:
    return {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": f"s{number}", "namespace": NAMESPACE},
        "spec": {"ports": [{"name": "http", "port": 80}]},
    }  # fmt: skip


def endpoint_slice(number: int, generation: int = 0) -> Any:
    labels = {"kubernetes.io/service-name": f"s{number}"}
    return {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": f"s{number}-x", "namespace": NAMESPACE, "labels": labels},
        "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
        "endpoints": [
            {"addresses": [f"10.250.{number}.{tail}"], "conditions": {"ready": True}} for tail in (1, 2, 3 + generation)
        ],
    }  # fmt: skip


def measure(backend: str) -> dict[str, Any]:
    from testbed.lab.start import start_lab
    from testbed.manifests import find_topology, load_topology

    topology = load_topology(find_topology("three-nodes"))
    proxy = {**topology.kube_proxy, "iptables": {"minSyncPeriod": "0s"}}
    topology = dataclasses.replace(topology, kube_proxy=proxy)
    nodes = [node.name for node in topology.nodes]
    took = []
    name = f"bench-change-{backend}"
    with start_lab(topology, name=name, proxy_mode="iptables", iptables_backend=backend, attached=True) as lab:
        lab.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        for number in range(SERVICES):
            lab.api.create(service(number))
            lab.api.create(endpoint_slice(number))
        time.sleep(1)  # until all is quiet
        for generation in range(1, CHANGES + 1):
            heard = {node: lab.call(node, last_sync, None, timeout_s=10)[1] for node in nodes}
            started = time.time()
            lab.api.update(endpoint_slice(generation, generation))
            time.sleep(0.3)  # looking would cost the processor that the nodes need
            ended = []
            for node in nodes:
                deadline = time.time() + 10
                while (seen := lab.call(node, last_sync, None, timeout_s=10))[1] == heard[node] or seen[0] < started:
                    if time.time() > deadline:
                        raise SystemExit(f"{node} has not heard of a change after 10 s")
                ended.append(seen[0])
            took.append(1000 * (max(ended) - started))
    row = {"backend": backend, "services": SERVICES}
    return {**row, "median_ms": round(statistics.median(took), 1), "most_ms": round(max(took), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(backend) for backend in ("legacy", "nft")]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            f"iptables-{row['backend']}, {row['services']} Services, three nodes: from the API to the last kernel "
            f"{row['median_ms']} ms (median), {row['most_ms']} ms (most)"
        )


if __name__ == "__main__":
    main()
