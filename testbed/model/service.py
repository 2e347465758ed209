"""Services and endpoints as a proxy sees them: one `ServicePort` per Service, port and IP family, and its `Endpoint` list.

Decodes the JSON of Service and EndpointSlice objects. Everything that a proxy ignores (headless Services, ExternalName,
addresses of another family, load-balancer entries that ask to be bypassed) is left out here, so no backend meets it.

Source: kubernetes pkg/proxy/{serviceport,endpoint,servicechangetracker,endpointslicecache}.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, NetmaskValueError
from typing import Any, NamedTuple, NewType

from testbed.model.objects import Object, labels_of, name_of, namespace_of

NodeName = NewType("NodeName", str)

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
#: What kube-proxy puts on its list and watch requests for Services and EndpointSlices.
PROXIED_SELECTOR = f"!{PROXY_NAME_LABEL},!{HEADLESS_LABEL}"

DEFAULT_AFFINITY_TIMEOUT_S = 10800


class Protocol(StrEnum):
    """Transport protocol of a Service port; the value is the API's spelling."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"

    @property
    def tool_name(self) -> str:
        """The spelling of iptables, nft, ipvsadm and conntrack."""
        return self.value.lower()


class TrafficPolicy(StrEnum):
    """Which endpoints may serve: all of the cluster, or those of the node that received the packet."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


class ServicePortName(NamedTuple):
    """The key of a service port everywhere; its text is what comments, logs and errors show.

    A tuple, because ten thousand of them are sorted and looked up in every full sync.
    """

    namespace: str
    name: str
    port: str
    protocol: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}:{self.port}" if self.port else f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePort:
    """One port of one Service, in one IP family."""

    name: ServicePortName
    cluster_ip: IPv4Address
    port: int
    protocol: Protocol = Protocol.TCP
    node_port: int = 0  # 0: none
    external_ips: tuple[IPv4Address, ...] = ()
    load_balancer_ips: tuple[IPv4Address, ...] = ()
    source_ranges: tuple[IPv4Network, ...] = ()
    external_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    internal_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    affinity_timeout_s: int = 0  # 0: no session affinity
    health_check_node_port: int = 0  # 0: none
    topology_mode: str = ""  # the annotation's value

    @property
    def is_externally_accessible(self) -> bool:
        return bool(self.node_port or self.load_balancer_ips or self.external_ips)

    @property
    def uses_cluster_endpoints(self) -> bool:
        """Some traffic may go to any node: internal traffic, or pods and the node itself using an external address."""
        return self.internal_policy is not TrafficPolicy.LOCAL or self.is_externally_accessible

    @property
    def uses_local_endpoints(self) -> bool:
        if self.internal_policy is TrafficPolicy.LOCAL:
            return True
        return self.external_policy is TrafficPolicy.LOCAL and self.is_externally_accessible


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One address behind a Service port, with its EndpointSlice conditions."""

    address: IPv4Address
    port: int
    node: str = ""
    is_local: bool = False
    ready: bool = True
    serving: bool = True  # ready, if termination is left out of account
    terminating: bool = False
    zone_hints: frozenset[str] = frozenset()
    node_hints: frozenset[str] = frozenset()
    text: str = field(default="", compare=False)  # 'address:port', what chain names hash and DNAT rules name

    def __post_init__(self) -> None:
        if not self.text:
            object.__setattr__(self, "text", f"{self.address}:{self.port}")

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """What a proxy needs to know of its own node."""

    name: NodeName
    labels: Mapping[str, str] = field(default_factory=dict)
    internal_ip: IPv4Address | None = None
    pod_cidr: str = ""
    is_deleting: bool = False
    taints: frozenset[str] = frozenset()


def parse_address(text: object) -> IPv4Address | None:
    """Return an IPv4 address, or None for another family or nonsense.

    Leading zeros are read as decimal, because kube-proxy reads stored objects as Go's old parser did (ParseIPSloppy).
    """
    parts = text.split(".") if isinstance(text, str) else ()
    if len(parts) != 4:
        return None
    number = 0
    for part in parts:
        if not (part.isdigit() and part.isascii()) or int(part) > 255:
            return None
        number = number << 8 | int(part)
    return IPv4Address(number)


def parse_network(text: object) -> IPv4Network | None:
    """Return an IPv4 network with its host bits cleared, or None for another family or nonsense."""
    if not isinstance(text, str):
        return None
    address, _, length = text.strip().partition("/")
    parsed = parse_address(address)
    if parsed is None or not length.isdigit():
        return None
    try:
        return IPv4Network(f"{parsed}/{length}", strict=False)
    except NetmaskValueError:
        return None


def is_proxied(obj: Object) -> bool:
    """Say whether a Service or EndpointSlice is kube-proxy's business: see `PROXIED_SELECTOR`."""
    labels = labels_of(obj)
    return PROXY_NAME_LABEL not in labels and HEADLESS_LABEL not in labels


def parse_service(obj: Object) -> tuple[ServicePort, ...]:
    """Return the service ports of a Service, in the order of its ports; none when a proxy ignores it."""
    spec: Mapping[str, Any] = obj.get("spec") or {}
    if spec.get("type") == "ExternalName" or not is_proxied(obj):
        return ()
    candidates = spec.get("clusterIPs") or [spec.get("clusterIP")]
    cluster_ip = next((ip for ip in map(parse_address, candidates) if ip is not None), None)
    if cluster_ip is None:  # headless, not allocated yet, or of the other family
        return ()
    kind = spec.get("type") or "ClusterIP"
    external_ips = _addresses(spec.get("externalIPs") or ())
    takes_outside = kind in ("NodePort", "LoadBalancer") or (kind == "ClusterIP" and spec.get("externalIPs"))
    external_local = bool(takes_outside) and spec.get("externalTrafficPolicy") == "Local"
    annotations = obj["metadata"].get("annotations") or {}
    topology_mode = annotations.get("service.kubernetes.io/topology-aware-hints") or annotations.get(
        "service.kubernetes.io/topology-mode", ""
    )
    namespace, name = namespace_of(obj), name_of(obj)
    ports = []
    for port in spec.get("ports") or ():
        protocol = Protocol(port.get("protocol") or "TCP")
        ports.append(
            ServicePort(
                name=ServicePortName(namespace, name, port.get("name") or "", protocol.value),
                cluster_ip=cluster_ip,
                port=port["port"],
                protocol=protocol,
                node_port=port.get("nodePort") or 0,
                external_ips=external_ips,
                load_balancer_ips=_load_balancer_ips(obj),
                source_ranges=_networks(spec.get("loadBalancerSourceRanges") or ()),
                external_policy=TrafficPolicy.LOCAL if external_local else TrafficPolicy.CLUSTER,
                internal_policy=TrafficPolicy(spec.get("internalTrafficPolicy") or "Cluster"),
                affinity_timeout_s=_affinity_timeout_s(spec),
                health_check_node_port=(
                    (spec.get("healthCheckNodePort") or 0) if kind == "LoadBalancer" and external_local else 0
                ),
                topology_mode=topology_mode,
            )
        )
    return tuple(ports)


def _addresses(texts: Iterable[object]) -> tuple[IPv4Address, ...]:
    return tuple(address for address in map(parse_address, texts) if address is not None)


def _networks(texts: Iterable[object]) -> tuple[IPv4Network, ...]:
    return tuple(network for network in map(parse_network, texts) if network is not None)


def _load_balancer_ips(obj: Object) -> tuple[IPv4Address, ...]:
    ingress = ((obj.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    return _addresses(entry.get("ip") for entry in ingress if (entry.get("ipMode") or "VIP") == "VIP")


def _affinity_timeout_s(spec: Mapping[str, Any]) -> int:
    if spec.get("sessionAffinity") != "ClientIP":
        return 0
    client_ip = (spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}
    return int(client_ip.get("timeoutSeconds") or DEFAULT_AFFINITY_TIMEOUT_S)


def service_of_slice(obj: Object) -> tuple[str, str] | None:
    """Return (namespace, name) of the Service a slice belongs to, or None when a proxy ignores the slice."""
    service = labels_of(obj).get(SERVICE_NAME_LABEL)
    if not service or not is_proxied(obj) or obj.get("addressType", "IPv4") != "IPv4":
        return None
    return namespace_of(obj), service


SliceEndpoints = Mapping[ServicePortName, tuple[Endpoint, ...]]


def parse_endpoint_slice(obj: Object, node: str) -> SliceEndpoints:
    """Return the endpoints of each service port that one slice names, in its order, as the node ``node`` sees them."""
    service = service_of_slice(obj)
    if service is None:
        return {}
    found: dict[ServicePortName, tuple[Endpoint, ...]] = {}
    for port in obj.get("ports") or ():
        number = port.get("port")
        if not number:
            continue
        # A port without a name is stored with the name "" (the API server's default), so that is what it means here.
        name = ServicePortName(*service, port.get("name") or "", port.get("protocol") or "TCP")
        parsed = (_parse_endpoint(raw, number, node) for raw in obj.get("endpoints") or ())
        found[name] = (*found.get(name, ()), *(endpoint for endpoint in parsed if endpoint is not None))
    return found


def merge_endpoints(slices: Iterable[SliceEndpoints]) -> dict[ServicePortName, tuple[Endpoint, ...]]:
    """Return the endpoints of every service port over all slices of a service.

    Of two endpoints with the same address and port, one on this node wins. Each list is sorted by the text
    ``address:port`` (10.0.0.10:80 comes before 10.0.0.9:80).
    """
    found: dict[ServicePortName, dict[str, Endpoint]] = {}
    for parsed in slices:
        for name, endpoints in parsed.items():
            merged = found.setdefault(name, {})
            for endpoint in endpoints:
                known = merged.get(endpoint.text)
                if known is None or not known.is_local:
                    merged[endpoint.text] = endpoint
    return {name: tuple(merged[text] for text in sorted(merged)) for name, merged in found.items()}


def parse_endpoint_slices(slices: Iterable[Object], node: str) -> dict[ServicePortName, tuple[Endpoint, ...]]:
    """Return the endpoints of every service port named by the slices, as the node ``node`` sees them."""
    return merge_endpoints(parse_endpoint_slice(obj, node) for obj in slices)


_NO_HINTS: frozenset[str] = frozenset()


def _parse_endpoint(raw: Mapping[str, Any], port: int, node: str) -> Endpoint | None:
    addresses = raw.get("addresses") or ("",)
    address = parse_address(addresses[0])  # the API defines the others as meaning the same
    if address is None:
        return None
    conditions = raw.get("conditions") or {}
    hints = raw.get("hints")
    node_name = raw.get("nodeName") or ""
    return Endpoint(
        address=address,
        port=port,
        node=node_name,
        is_local=bool(node) and node_name == node,
        ready=conditions.get("ready") is not False,
        serving=conditions.get("serving") is not False,
        terminating=conditions.get("terminating") is True,
        zone_hints=frozenset(zone["name"] for zone in hints.get("forZones") or ()) if hints else _NO_HINTS,
        node_hints=frozenset(hint["name"] for hint in hints.get("forNodes") or ()) if hints else _NO_HINTS,
        text=f"{str(address) if addresses[0][0] == '0' or '.0' in addresses[0] else addresses[0]}:{port}",
    )


def parse_node(obj: Object) -> NodeView:
    """Return what a proxy needs of a Node object."""
    spec = obj.get("spec") or {}
    addresses = (obj.get("status") or {}).get("addresses") or ()
    by_type = {entry.get("type"): parse_address(entry.get("address")) for entry in reversed(addresses)}
    return NodeView(
        name=NodeName(name_of(obj)),
        labels=dict(labels_of(obj)),
        internal_ip=by_type.get("InternalIP") or by_type.get("ExternalIP"),
        pod_cidr=spec.get("podCIDR") or "",
        is_deleting="deletionTimestamp" in obj["metadata"],
        taints=frozenset(taint.get("key", "") for taint in spec.get("taints") or ()),
    )


def parse_service_cidr(obj: Object) -> tuple[IPv4Network, ...]:
    """Return the IPv4 networks of a ServiceCIDR object: what ClusterIPs are allocated from."""
    return _networks((obj.get("spec") or {}).get("cidrs") or ())
