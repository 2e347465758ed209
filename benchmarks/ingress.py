#!/usr/bin/env python3
"""The ingress controller: how fast requests pass, and how soon a change is served.

Starts a lab of its own. First wrk from the outside client through a load balancer's address, in turns against the controller
and against the same nginx with a plain reverse proxy's configuration in front of the same pods (proxy_buffering off, as
ingress-nginx has it; no log, no headers, no variables): requests a second, p99, and their ratio (bar: 0.8). Then, with
INGRESSES Ingresses of three paths and Services of their own, from the API write to the first right answer: a new Ingress
(generated, tested, reloaded; bar: 3 s), and a changed endpoint (bar: 0.5 s). ``--json`` prints the same for machines. Needs
root, and an otherwise idle machine for the times.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

INGRESSES = 500
ROUNDS = 5
SECONDS = 4
CHANGES = 7
ADDRESSES = {"ingress": "192.168.93.232", "plain": "192.168.93.233"}
PLAIN = """
worker_processes auto;
error_log /dev/stderr;
events { worker_connections 16384; }
http {
    access_log off;
    proxy_buffering off;
    keepalive_requests 1000;
    upstream web { server web.dev.svc.cluster.local:80; keepalive 320; keepalive_requests 10000; }
    server {
        listen 80;
        location / { proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host; proxy_pass http://web; }
    }
}
"""


def pod(name: str, node: str, container: dict[str, Any], **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "dev", "labels": {"app": name.rstrip("0123456789-")}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"nodeName": node, "containers": [container], **spec},
    }


def load_balancer(name: str, namespace: str, selector: dict[str, str]) -> dict[str, Any]:
    spec = {"type": "LoadBalancer", "selector": selector, "ports": [{"name": "http", "port": 80, "targetPort": 80}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def answer(host: str, path: str, address: str) -> str:
    """Return the body of an answer, or '' for any other status; runs at the client."""
    connection = http.client.HTTPConnection(address, 80, timeout=5)
    try:
        connection.request("GET", path, headers={"Host": host})
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
        return f"{response.headers.get('X-Served-By', '')} {text}" if response.status == 200 else ""
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def time_until(host: str, path: str, address: str, wanted: str, began: float) -> float:
    """Return the seconds from ``began`` (monotonic, the machine's) to the first answer that holds a text; at the client."""
    while time.monotonic() - began < 60:
        if wanted in answer(host, path, address):
            return time.monotonic() - began
        time.sleep(0.005)
    return float("nan")


def wait(check: Callable[[], Any], within_s: float = 90) -> Any:
    deadline = time.monotonic() + within_s
    while not (seen := check()):
        if time.monotonic() > deadline:
            raise SystemExit(f"did not happen within {within_s:g} s; last seen: {seen!r}")
        time.sleep(0.1)
    return seen


def wrk(lab: Any, address: str) -> tuple[float, float]:
    """Return requests a second and p99 in milliseconds."""
    argv = ["wrk", "-t2", "-c32", f"-d{SECONDS}s", "--latency", "-H", "Host: bench.example.com", f"http://{address}/"]
    text = lab.run("client", argv, timeout_s=SECONDS + 30).stdout.decode()
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", text)
    if not rate or not p99 or "Non-2xx" in text:
        raise SystemExit(f"wrk against {address} says:\n{text}")
    return float(rate[1]), float(p99[1]) * {"us": 0.001, "ms": 1, "s": 1000}[p99[2]]


def set_up(lab: Any) -> None:
    import yaml
    from ingress_objects import ingress

    for obj in yaml.safe_load_all((ROOT / "scenarios/ingress/ingress-nginx.yaml").read_text()):
        if obj["kind"] not in ("ValidatingWebhookConfiguration", "Service"):
            lab.api.create(obj)
    for obj in yaml.safe_load_all((ROOT / "scenarios/ingress/nodeport.yaml").read_text()):
        if obj["kind"] == "Deployment":
            obj["spec"]["template"]["spec"]["nodeName"] = "node1"
            obj["spec"]["template"]["spec"]["containers"][0]["args"].append("--enable-metrics=false")
            lab.api.create(obj)
    selector = {"app.kubernetes.io/component": "controller"}
    lab.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "dev"}})
    lab.api.create(load_balancer("ingress-nginx-controller", "ingress-nginx", selector))
    for number in (1, 2):
        lab.api.create(pod(f"web-{number}", "node1", {"name": "web", "image": "nginx"}))
    web = {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}], "clusterIP": "None"}
    lab.api.create(
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "dev"}, "spec": web}
    )
    wait(lambda: len(ready(lab, "web")) == 2)
    data = {"nginx.conf": PLAIN}
    lab.api.create(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "plain", "namespace": "dev"}, "data": data}
    )
    mount = {"name": "conf", "mountPath": "/etc/nginx/nginx.conf", "subPath": "nginx.conf"}
    container = {"name": "plain", "image": "nginx", "volumeMounts": [mount]}
    lab.api.create(pod("plain", "node1", container, volumes=[{"name": "conf", "configMap": {"name": "plain"}}]))
    lab.api.create(load_balancer("plain", "dev", {"app": "plain"}))
    lab.api.create(ingress("bench", {"bench.example.com": [("/", "Prefix", "web")]}))
    for (name, namespace), address in zip(
        (("ingress-nginx-controller", "ingress-nginx"), ("plain", "dev")), ADDRESSES.values(), strict=True
    ):
        status = {"status": {"loadBalancer": {"ingress": [{"ip": address}]}}}
        lab.api.patch("services", namespace, name, status, subresource="status")
        # Nobody announces the addresses in this lab: node1, which has everything, is the way to them.
        lab.run("client", ["ip", "route", "add", address, "via", "192.168.93.11"], timeout_s=5)
        wait(lambda address=address: lab.call("client", answer, "bench.example.com", "/", address, timeout_s=20))  # type: ignore[misc]


def ready(lab: Any, app: str) -> list[Any]:
    pods = lab.api.list("pods", "dev", label_selector=f"app={app}")[0]
    return [
        one
        for one in pods
        if any(c["type"] == "Ready" and c["status"] == "True" for c in one["status"].get("conditions", ()))
    ]


def measure_throughput(lab: Any) -> dict[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in ADDRESSES}
    tails: dict[str, list[float]] = {name: [] for name in ADDRESSES}
    for _ in range(ROUNDS):  # in turns, so that whatever else the machine does meets both
        for name, address in ADDRESSES.items():
            rate, p99 = wrk(lab, address)
            rates[name].append(rate)
            tails[name].append(p99)
    ratios = [ours / plain for ours, plain in zip(rates["ingress"], rates["plain"], strict=True)]
    return {
        "ingress_requests_per_s": statistics.median(rates["ingress"]),
        "plain_requests_per_s": statistics.median(rates["plain"]),
        "ratio": statistics.median(ratios),
        "ingress_p99_ms": statistics.median(tails["ingress"]),
        "plain_p99_ms": statistics.median(tails["plain"]),
    }


def measure_changes(lab: Any, count: int) -> dict[str, float]:
    from ingress_objects import ingress, service, slices

    addresses = [one["status"]["podIP"] for one in ready(lab, "web")]
    names = [f"dev/{one['metadata']['name']} " for one in ready(lab, "web")]
    for number in range(count):
        for path in range(3):
            name = f"s{number}-{path}"
            lab.api.create(service(name, clusterIP="None", selector=None))
            lab.api.create(slices(name, addresses[0], port=80))
        paths = [(f"/p{path}", "Prefix", f"s{number}-{path}") for path in range(3)]
        lab.api.create(ingress(f"i{number}", {f"h{number}.example.com": paths}, {"rewrite-target": "/"}))
    target = ADDRESSES["ingress"]
    last = f"h{count - 1}.example.com"
    lab.call("client", time_until, last, "/p2", target, "nginx", time.monotonic(), timeout_s=90)
    added, changed = [], []
    for number in range(CHANGES):
        began = time.monotonic()
        lab.api.create(ingress(f"new{number}", {f"new{number}.example.com": [("/", "Prefix", "web")]}))
        host = f"new{number}.example.com"
        added.append(lab.call("client", time_until, host, "/", target, "nginx", began, timeout_s=90))
        time.sleep(0.5)
        other = (number + 1) % 2
        began = time.monotonic()
        patch = {"endpoints": slices("x", addresses[other])["endpoints"]}
        lab.api.patch("endpointslices.discovery.k8s.io", "dev", "s0-0-1", patch)
        changed.append(
            lab.call("client", time_until, "h0.example.com", "/p0", target, names[other], began, timeout_s=90)
        )
        time.sleep(0.5)
    return {"ingresses": count, "new_ingress_s": statistics.median(added), "endpoint_change_s": statistics.median(changed),
            "new_ingress_worst_s": max(added), "endpoint_change_worst_s": max(changed)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ingresses", type=int, default=INGRESSES)
    arguments = parser.parse_args()
    from testbed.lab.start import start_lab
    from testbed.manifests.topology import load_topology

    topology = load_topology(ROOT / "topologies/three-nodes.yaml")
    with start_lab(topology, name=f"bench-ingress-{os.getpid()}", proxy_mode="iptables", attached=True) as lab:
        set_up(lab)
        found = measure_throughput(lab)
        found |= measure_changes(lab, arguments.ingresses)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"wrk, 32 connections      requests/s     p99 ms     ratio {found['ratio']:.2f} (bar 0.80)")
    for name in ADDRESSES:
        print(f"  {name:<20}{found[f'{name}_requests_per_s']:>14.0f}{found[f'{name}_p99_ms']:>11.2f}")
    print(f"with {found['ingresses']:.0f} Ingresses of 3 paths          median s    worst s")
    print(
        f"  a new Ingress is served    {found['new_ingress_s']:>13.3f}{found['new_ingress_worst_s']:>11.3f}   (bar 3)"
    )
    print(
        f"  a changed endpoint is      {found['endpoint_change_s']:>13.3f}{found['endpoint_change_worst_s']:>11.3f}   (bar 0.5)"
    )


if __name__ == "__main__":
    main()
