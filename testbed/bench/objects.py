"""The objects that a benchmark makes: a client, servers, the Services that are asked, and those that are there to be many. Pure.

::

    client (outside) ─▶ node1: NodePort, LoadBalancer      node2: pod far  (nginx :80, iperf3 :5201)
                        pod client ─▶ ClusterIP far ──────────────▲
                        pod near ◀─── ClusterIP near
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from testbed.model.benchmark import Position
from testbed.model.objects import Object

NAMESPACE = "bench"
HTTP_PORT, IPERF_PORT = 80, 5201
HTTP_NODE_PORT, IPERF_NODE_PORT = 31080, 31521
INGRESS_NODE_PORT = 30080  # as in scenarios/ingress
BALANCER_ADDRESS = IPv4Address("198.51.100.10")  # TEST-NET-2, RFC 5737
CLIENT, NEAR, FAR = "client", "near", "far"
INGRESS_HOST = "bench.example"
_NOBODY = IPv4Network("10.128.0.0/9")  # endpoints without a pod behind them
_SLICE_PORT = "http"

_NGINX_CONF = """\
worker_processes 1;
error_log /dev/stderr warn;
pid /run/nginx.pid;
worker_rlimit_nofile 65536;
events { worker_connections 16384; }
http {
    access_log off;                 # what is written per request would be measured as well
    keepalive_requests 1000000000;
    keepalive_timeout 300;
    server {
        listen 80 backlog=8192 reuseport;
        location / { return 200 "ok\\n"; }
    }
}
"""


def base_objects(client_node: str, server_node: str, *, balanced: bool) -> list[Object]:
    """Return the namespace, the pods and the Services that are asked.

    Args:
        balanced: the far Service is of type LoadBalancer; somebody must give it `BALANCER_ADDRESS`.
    """
    config = {"nginx.conf": _NGINX_CONF}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _named("nginx"), "data": config},
        _client(client_node),
        _server(NEAR, client_node),
        _server(FAR, server_node),
        _service(NEAR, "ClusterIP"),
        _service(FAR, "LoadBalancer" if balanced else "NodePort"),
    ]


def _named(name: str, **labels: str) -> dict[str, Any]:
    return {"name": name, "namespace": NAMESPACE, **({"labels": labels} if labels else {})}


def _client(node: str) -> Object:
    spec = {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [{"name": "client", "image": "client"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": _named(CLIENT), "spec": spec}


def _server(name: str, node: str) -> Object:
    nginx = ["nginx", "-c", "/etc/bench/nginx.conf", "-g", "daemon off;"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _named(name, app=name),
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "volumes": [{"name": "conf", "configMap": {"name": "nginx"}}],
            "containers": [
                {
                    "name": "http", "image": "nginx", "command": nginx,
                    "volumeMounts": [{"name": "conf", "mountPath": "/etc/bench"}],
                    "readinessProbe": {"httpGet": {"port": HTTP_PORT}, "periodSeconds": 1},
                },
                {"name": "iperf3", "image": "iperf3", "args": ["-s"]},
            ],
        },
    }  # fmt: skip


def _service(name: str, kind: str) -> Object:
    ports = [
        {"name": "http", "port": HTTP_PORT, "protocol": "TCP"},
        {"name": "iperf3-tcp", "port": IPERF_PORT, "protocol": "TCP"},
        {"name": "iperf3-udp", "port": IPERF_PORT, "protocol": "UDP"},
    ]
    if kind != "ClusterIP":  # iperf3 wants its TCP and UDP ports to be one number
        for port, number in zip(ports, (HTTP_NODE_PORT, IPERF_NODE_PORT, IPERF_NODE_PORT), strict=True):
            port["nodePort"] = number
    spec = {"type": kind, "selector": {"app": name}, "ports": ports}
    return {"apiVersion": "v1", "kind": "Service", "metadata": _named(name), "spec": spec}


def filler_name(number: int) -> str:
    return f"s-{number:05}"


def filler_service(number: int) -> Object:
    """Return one of many Services; it has no selector, so its slice is ours to write."""
    ports = [{"name": _SLICE_PORT, "port": HTTP_PORT, "protocol": "TCP"}]
    metadata = _named(filler_name(number))
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": ports}}


def filler_slice(number: int, addresses: Sequence[str], generation: int = 0) -> Object:
    """Return the EndpointSlice of `filler_service` with these addresses; ``generation`` only makes it another one."""
    name = filler_name(number)
    labels = {"kubernetes.io/service-name": name, "endpointslice.kubernetes.io/managed-by": "testbed-bench"}
    metadata = {"name": f"{name}-x", "namespace": NAMESPACE, "labels": labels}
    if generation:
        metadata["annotations"] = {"testbed/generation": str(generation)}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "addressType": "IPv4",
        "metadata": metadata,
        "ports": [{"name": _SLICE_PORT, "port": HTTP_PORT, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
    }


def nobody(number: int, endpoints: int, generation: int = 0) -> list[str]:
    """Return addresses that no pod has, other ones for each Service; the last one depends on the generation."""
    first = number * (endpoints + 1)
    tails = [*range(first, first + endpoints - 1), first + endpoints - 1 + generation % 2]
    return [str(_NOBODY[tail + 1]) for tail in tails]


def ingress_object() -> Object:
    backend = {"service": {"name": FAR, "port": {"number": HTTP_PORT}}}
    path = {"path": "/", "pathType": "Prefix", "backend": backend}
    spec = {"ingressClassName": "nginx", "rules": [{"host": INGRESS_HOST, "http": {"paths": [path]}}]}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": _named("far"), "spec": spec}


@dataclass(frozen=True, slots=True)
class Target:
    """Where a client connects to. ``host``: for HTTP's Host header, when it is not the address."""

    address: str
    http_port: int = HTTP_PORT
    iperf_port: int = IPERF_PORT
    host: str = ""


def pick_positions(order: Sequence[str], positions: Sequence[Position]) -> dict[Position, str]:
    """Return the Service at each position of an order."""
    if not order:
        return {}
    places = {Position.FIRST: 0, Position.MIDDLE: len(order) // 2, Position.LAST: len(order) - 1}
    return {position: order[places[position]] for position in positions}
