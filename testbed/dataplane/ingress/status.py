"""What an Ingress shows as its address. Pure.

Source: kubernetes/ingress-nginx internal/ingress/status/status.go (v1.10).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from testbed.dataplane.ingress.settings import Options
from testbed.dataplane.ingress.world import Name
from testbed.manifests.kinds.names import parse_address
from testbed.model.objects import Object

Address = dict[str, Any]


def needs_nodes(options: Options) -> bool:
    """Say whether the addresses are those of the nodes with a controller."""
    return not options.publish_status_address and not options.publish_service


def published_addresses(
    options: Options, services: Mapping[Name, Object], pods: Iterable[Object] = (), nodes: Iterable[Object] = ()
) -> list[Address]:
    """Return ``status.loadBalancer.ingress`` for every Ingress: addresses first, then names, each sorted.

    Args:
        pods: those of this controller.
        nodes: all; those of running and ready pods count.
    """
    if options.publish_status_address:
        return _entries(text.strip() for text in options.publish_status_address.split(","))
    if options.publish_service:
        namespace, _, name = options.publish_service.partition("/")
        service = services.get((namespace, name))
        return _entries(_service_addresses(service)) if service else []
    by_name = {node["metadata"]["name"]: node for node in nodes}
    found = (by_name.get((pod.get("spec") or {}).get("nodeName", "")) for pod in pods if is_ready(pod))
    return _entries(_node_address(node, options) for node in found if node is not None)


def _service_addresses(service: Object) -> list[str]:
    spec = service.get("spec") or {}
    external = [str(one) for one in spec.get("externalIPs") or ()]
    match spec.get("type", "ClusterIP"):
        case "ExternalName":
            return [str(spec.get("externalName") or "")]
        case "ClusterIP":
            return [str(spec.get("clusterIP") or "")]
        case "NodePort":
            return external or [str(spec.get("clusterIP") or "")]
    balancers = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    return [str(one.get("ip") or one.get("hostname") or "") for one in balancers] + external


def is_ready(pod: Object) -> bool:
    """Say whether a pod runs and is ready, and is not on its way out."""
    status = pod.get("status") or {}
    conditions = status.get("conditions") or ()
    return (
        status.get("phase") == "Running"
        and "deletionTimestamp" not in pod["metadata"]
        and any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)
    )


def _node_address(node: Object, options: Options) -> str:
    addresses = {one.get("type"): one.get("address") for one in (node.get("status") or {}).get("addresses") or ()}
    order = ("InternalIP",) if options.report_node_internal_ip_address else ("ExternalIP", "InternalIP")
    return next((str(addresses[kind]) for kind in order if addresses.get(kind)), "")


def _entries(texts: Iterable[str]) -> list[Address]:
    distinct = sorted({text for text in texts if text and text != "None"})
    addresses = [{"ip": text} for text in distinct if parse_address(text) is not None]
    return addresses + [{"hostname": text} for text in distinct if parse_address(text) is None]
