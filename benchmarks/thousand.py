"""A lab with 1,000 echo pods on three nodes behind one Service: seconds until each has answered, and memory."""

from __future__ import annotations

import time

from echo_pods import ask, deployment_and_service, memory_used_mib, until

PODS = 1000
NAMESPACE = "bench"
AT_MOST_S = 120.0


def ask_each(addresses: list[str]) -> int:
    """Runs in a node: return how many of the addresses answered an HTTP request with the name of a pod."""
    return sum(ask(address, 8080, timeout_s=5).startswith(f"{NAMESPACE}/") for address in addresses)


def ask_service(address: str, times: int) -> int:
    """Runs in a node: return how many different pods answered through the Service."""
    return len({ask(address, 80, timeout_s=5) for _ in range(times)})


def thousand_pods() -> dict[str, float]:
    """Start a lab of topologies/big.yaml, make the pods, and return seconds and MiB."""
    from testbed.lab.start import start_lab
    from testbed.manifests import find_topology, load_topology

    topology = load_topology(find_topology("big"))
    before = memory_used_mib()
    with start_lab(topology, name="bench-thousand", proxy_mode="iptables", attached=True) as lab:
        started = time.monotonic()
        lab.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        for obj in deployment_and_service("echo", NAMESPACE, PODS):
            lab.api.create(obj)

        def available() -> int:
            status = lab.api.get("deployments.apps", NAMESPACE, "echo").get("status", {})
            return int(status.get("availableReplicas", 0))

        until(lambda: available() == PODS, lambda: f"{available()} of {PODS} pods are available", AT_MOST_S)
        available_s = time.monotonic() - started
        pods, _ = lab.api.list("pods", NAMESPACE)
        answered = lab.call("node1", ask_each, [pod["status"]["podIP"] for pod in pods], timeout_s=60)
        if answered != PODS:
            raise SystemExit(f"only {answered} of {PODS} pods answered")
        ready = time.monotonic() - started
        service = lab.api.get("services", NAMESPACE, "echo")["spec"]["clusterIP"]
        through = lab.call("node1", ask_service, service, 500, timeout_s=60)
        memory = memory_used_mib() - before
    return {
        "thousand_available_s": round(available_s, 1),
        "thousand_ready_s": round(ready, 1),
        "thousand_mib": round(memory),
        "thousand_seen_in_500_requests": through,
    }
