"""Tables of Services, endpoints and ingresses."""

from __future__ import annotations

from typing import Any

from testbed.api.printers.cells import (
    AGE,
    NAME,
    NONE,
    Printer,
    age,
    columns,
    first_few,
    labels_text,
    name_of,
    selector_text,
    spec_of,
    status_of,
)
from testbed.model.objects import Object


def _service(service: Object, now: float) -> list[Any]:
    spec = spec_of(service)
    ports = [
        f"{port.get('port')}{':' + str(port['nodePort']) if port.get('nodePort') else ''}/{port.get('protocol', 'TCP')}"
        for port in spec.get("ports") or ()
    ]
    addresses = spec.get("clusterIPs") or [spec.get("clusterIP") or NONE]
    return [
        name_of(service),
        spec.get("type", ""),
        addresses[0] or NONE,
        _external(service),
        ",".join(ports) or NONE,
        age(service, now),
        labels_text(spec.get("selector")),
    ]


def _external(service: Object) -> str:
    spec = spec_of(service)
    external = spec.get("externalIPs") or []
    match spec.get("type"):
        case "ExternalName":
            return str(spec.get("externalName", ""))
        case "LoadBalancer":
            balanced = _balancer(status_of(service))
            return ",".join([*([balanced] if balanced else []), *external]) or "<pending>"
    return ",".join(external) or NONE


def _balancer(status: Object) -> str:
    found = {
        one.get("ip") or one.get("hostname") or "" for one in (status.get("loadBalancer") or {}).get("ingress") or ()
    }
    return ",".join(sorted(found - {""}))


def _endpoints(endpoints: Object, now: float) -> list[Any]:
    found: list[str] = []
    for subset in endpoints.get("subsets") or ():
        addresses = [one.get("ip", "") for one in subset.get("addresses") or ()]
        ports = subset.get("ports") or ()
        found += [f"{ip}:{port.get('port')}" for port in ports for ip in addresses] if ports else addresses
    # with subsets of which none is ready the cell is empty, as upstream's formatEndpoints
    return [name_of(endpoints), first_few(found, empty="" if endpoints.get("subsets") else NONE), age(endpoints, now)]


def _slice(slice_: Object, now: float) -> list[Any]:
    ports = [str(port.get("port") or port.get("name") or "*") for port in slice_.get("ports") or ()]
    addresses = [address for one in slice_.get("endpoints") or () for address in one.get("addresses") or ()]
    return [
        name_of(slice_), slice_.get("addressType", ""), first_few(ports, empty="<unset>"),
        first_few(addresses, empty="<unset>"), age(slice_, now),
    ]  # fmt: skip


def _ingress(ingress: Object, now: float) -> list[Any]:
    spec = spec_of(ingress)
    class_ = spec.get("ingressClassName") or (ingress["metadata"].get("annotations") or {}).get(
        "kubernetes.io/ingress.class"
    )
    hosts = [rule["host"] for rule in spec.get("rules") or () if rule.get("host")]
    ports = "80, 443" if spec.get("tls") else "80"
    return [
        name_of(ingress), class_ or NONE, first_few(hosts, empty="*"), _balancer(status_of(ingress)), ports,
        age(ingress, now),
    ]  # fmt: skip


def _ingress_class(class_: Object, now: float) -> list[Any]:
    spec = spec_of(class_)
    reference = spec.get("parameters")
    shown = NONE
    if reference:
        kind, group = reference.get("kind", ""), reference.get("apiGroup") or ""
        shown = f"{kind}.{group}/{reference.get('name', '')}" if group else f"{kind}/{reference.get('name', '')}"
    return [name_of(class_), spec.get("controller", ""), shown, age(class_, now)]


def _policy(policy: Object, now: float) -> list[Any]:
    return [name_of(policy), selector_text(spec_of(policy).get("podSelector")), age(policy, now)]


PRINTERS: dict[str, Printer] = {
    "services": Printer(columns(NAME, "Type", "Cluster-IP", "External-IP", "Port(s)", AGE, "!Selector"), _service),
    "endpoints": Printer(columns(NAME, "Endpoints", AGE), _endpoints),
    "endpointslices.discovery.k8s.io": Printer(columns(NAME, "AddressType", "Ports", "Endpoints", AGE), _slice),
    "ingresses.networking.k8s.io": Printer(columns(NAME, "Class", "Hosts", "Address", "Ports", AGE), _ingress),
    "ingressclasses.networking.k8s.io": Printer(columns(NAME, "Controller", "Parameters", AGE), _ingress_class),
    "networkpolicies.networking.k8s.io": Printer(columns(NAME, "Pod-Selector", AGE), _policy),
}
