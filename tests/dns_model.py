"""What DNS must say of a set of objects, by looking at all of them for each question; and random sets of objects.

The rules are those of the Kubernetes DNS specification 1.1.0, and CoreDNS' where that is silent (see dataplane/dns.py). No index,
no state: slow and plain on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from hypothesis import strategies as st

Object = dict[str, Any]
DOMAIN = "cluster.local"
TTL = 30


@dataclass(frozen=True)
class Cluster:
    namespaces: tuple[Object, ...]
    services: tuple[Object, ...]
    slices: tuple[Object, ...]

    def listed(self) -> dict[str, tuple[Object, ...]]:
        return {
            "namespaces": self.namespaces,
            "services": self.services,
            "endpointslices.discovery.k8s.io": self.slices,
        }


# -- making objects ----------------------------------------------------------------------------------------------------


def namespace(name: str) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def service(name: str, *, namespace: str = "dev", **spec: Any) -> Object:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def endpoint(address: str, *, hostname: str = "", ready: bool | None = True) -> Object:
    found: Object = {"addresses": [address], "conditions": {} if ready is None else {"ready": ready}}
    return {**found, "hostname": hostname} if hostname else found


def endpoint_slice(
    service: str, *endpoints: Object, ports: list[Object] | None = None, namespace: str = "dev", suffix: str = "1"
) -> Object:  # fmt: skip
    metadata = {
        "name": f"{service}-{suffix}",
        "namespace": namespace,
        "labels": {"kubernetes.io/service-name": service},
    }
    return {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata, "addressType": "IPv4",
        "ports": [port("http", 8080)] if ports is None else ports, "endpoints": list(endpoints),
    }  # fmt: skip


def port(name: str, number: int, protocol: str = "TCP") -> Object:
    return {"name": name, "port": number, "protocol": protocol}


# -- the model ---------------------------------------------------------------------------------------------------------


def _key(obj: Object) -> tuple[str, str]:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _fqdn(obj: Object) -> str:
    return f"{obj['metadata']['name']}.{obj['metadata']['namespace']}.svc.{DOMAIN}"


def _ready(cluster: Cluster, key: tuple[str, str]) -> list[tuple[str, str, list[Object]]]:
    """Return (address, first label, ports) of each ready endpoint of a Service, slice by slice."""
    found = []
    for one in sorted(cluster.slices, key=_key):
        owner = one["metadata"]["namespace"], one["metadata"]["labels"]["kubernetes.io/service-name"]
        for raw in one["endpoints"]:
            if owner == key and raw["conditions"].get("ready") is not False:
                address = raw["addresses"][0]
                found.append((address, raw.get("hostname") or address.replace(".", "-"), one["ports"]))
    return found


def _pointers(cluster: Cluster, address: str) -> set[str]:
    for obj in cluster.services:
        if address in (obj["spec"].get("clusterIPs") or [obj["spec"].get("clusterIP")]):
            return {_fqdn(obj)}
    owners = {
        (one["metadata"]["namespace"], one["metadata"]["labels"]["kubernetes.io/service-name"])
        for one in cluster.slices
    }
    return {
        f"{label}.{name}.{space}.svc.{DOMAIN}"
        for space, name in owners
        for found, label, _ in _ready(cluster, (space, name))
        if found == address
    }


def _targets(cluster: Cluster, obj: Object, labels: list[str]) -> list[tuple[str, str, int | None]]:
    """Return (name, address, port) of what the labels before a Service's name mean; LookupError for no such name."""
    spec, base = obj["spec"], _fqdn(obj)
    wanted = [label.removeprefix("_") for label in labels] if len(labels) == 2 else None
    found: list[tuple[str, str, int | None]] = []
    if spec.get("clusterIP") == "None" or len(labels) == 1:
        for address, label, ports in _ready(cluster, _key(obj)):
            if len(labels) == 1 and labels[0] != label:
                continue
            for one in ports or [None]:
                if wanted is None or (one and [one["name"], one["protocol"].lower()] == wanted):
                    found.append((f"{label}.{base}", address, one["port"] if one else None))
    else:
        for one in spec["ports"]:
            if wanted is None or [one.get("name") or "", one["protocol"].lower()] == wanted:
                found.append((base, spec["clusterIP"], one["port"]))
    if not found:
        raise LookupError
    return found


def expected(cluster: Cluster, question: str, kind: str, *, depth: int = 0) -> tuple[str, set[str]]:
    """Return rcode and values of the records of that type (SRV without weights); a CNAME's value stands for itself."""
    name = question.lower().removesuffix(".")
    try:
        return "NOERROR", _found(cluster, name, kind, (name,))
    except LookupError:
        return "NXDOMAIN", set()


def _found(cluster: Cluster, name: str, kind: str, before: tuple[str, ...]) -> set[str]:
    if name.endswith(".in-addr.arpa"):
        address = ".".join(reversed(name.removesuffix(".in-addr.arpa").split(".")))
        pointers = _pointers(cluster, address) if kind == "PTR" else set()
        if not pointers:
            raise LookupError
        return pointers
    if kind == "TXT":
        return {'"1.1.0"'} if name == f"dns-version.{DOMAIN}" else set()
    labels = name.removesuffix(DOMAIN).rstrip(".").split(".")
    labels = [label for label in labels if label]
    if not labels:
        return set()
    branch = labels.pop()
    if branch not in ("svc", "pod"):
        raise LookupError
    if not labels:
        return set()
    space = labels.pop()
    if space not in {obj["metadata"]["name"] for obj in cluster.namespaces}:
        raise LookupError
    if not labels:
        return set()
    subject = labels.pop()
    if len(labels) > 2:
        raise LookupError
    if branch == "pod":
        try:
            address = str(IPv4Address(subject.replace("-", ".")))
        except ValueError:
            raise LookupError from None
        return {address} if kind == "A" else set()
    obj = next((one for one in cluster.services if _key(one) == (space, subject)), None)
    if obj is None:
        raise LookupError
    if obj["spec"].get("type") == "ExternalName":
        if len(labels) == 1:
            raise LookupError
        target = obj["spec"]["externalName"]
        if kind == "CNAME":
            return {target}
        if kind not in ("A", "AAAA") or not target.endswith(DOMAIN) or target in before or len(before) > 7:
            return set()
        try:
            return _found(cluster, target, kind, (*before, target))
        except LookupError:
            return set()
    targets = _targets(cluster, obj, labels)
    if kind == "A":
        return {address for _, address, _ in targets}
    if kind == "SRV":
        return {f"{number} {target}" for target, _, number in targets if number is not None}
    return set()


def questions(cluster: Cluster) -> list[tuple[str, str]]:
    """Return what is worth asking about a cluster: its names with all types, and names beside them."""
    names = [
        DOMAIN,
        f"svc.{DOMAIN}",
        f"pod.{DOMAIN}",
        f"dns-version.{DOMAIN}",
        f"other.{DOMAIN}",
        f"nowhere.svc.{DOMAIN}",
    ]
    for space in ("dev", "prod"):
        names += [f"{space}.svc.{DOMAIN}", f"10-244-0-1.{space}.pod.{DOMAIN}", f"no-address.{space}.pod.{DOMAIN}"]
    for obj in cluster.services:
        base = _fqdn(obj)
        names += [base, base.upper(), f"nothing.{base}", f"_http._tcp.{base}", f"_http._udp.{base}", f"_tcp.{base}"]
        names += [f"{label}.{base}" for _, label, _ in _ready(cluster, _key(obj))]
        names.append(f"a.b.c.{base}")
    found = [(name, kind) for name in dict.fromkeys(names) for kind in ("A", "SRV", "AAAA", "TXT", "CNAME")]
    return found + [(f"{last}.0.{middle}.10.in-addr.arpa", "PTR") for middle in (96, 244) for last in range(6)]


# -- random sets -------------------------------------------------------------------------------------------------------

_SPACES = ("dev", "prod")
_NAMES = ("web", "db", "x")
_PORTS = st.lists(
    st.sampled_from([port("http", 80), port("", 81), port("dns", 53, "UDP"), port("dns", 53)]),
    min_size=1, max_size=3, unique_by=lambda one: (one["name"], one["protocol"]),
)  # fmt: skip
_TARGETS = st.sampled_from(
    [f"{name}.{space}.svc.{DOMAIN}" for name in _NAMES for space in _SPACES] + ["nothing.example.com"]
)


@st.composite
def _services(draw: st.DrawFn) -> tuple[Object, ...]:
    keys = draw(st.lists(st.tuples(st.sampled_from(_NAMES), st.sampled_from(_SPACES)), unique=True, max_size=6))
    found = []
    for number, (name, space) in enumerate(keys):
        kind = draw(st.sampled_from(["cluster", "headless", "headless", "external"]))
        if kind == "external":
            spec: Object = {"type": "ExternalName", "externalName": draw(_TARGETS)}
        else:
            address = "None" if kind == "headless" else f"10.96.0.{number}"
            spec = {"clusterIP": address, "clusterIPs": [address], "ports": draw(_PORTS)}
        found.append(service(name, namespace=space, **spec))
    return tuple(found)


@st.composite
def _slices(draw: st.DrawFn) -> tuple[Object, ...]:
    places = st.tuples(st.sampled_from(_NAMES), st.sampled_from(_SPACES), st.sampled_from("12"))
    found = []
    for name, space, suffix in draw(st.lists(places, unique=True, max_size=6)):
        endpoints = draw(
            st.lists(
                st.builds(
                    endpoint,
                    st.sampled_from([f"10.244.0.{last}" for last in range(5)]),
                    hostname=st.sampled_from(["", "", "db-0", "db-1"]),
                    ready=st.sampled_from([True, True, None, False]),
                ),
                max_size=3,
            )
        )
        ports = draw(st.one_of(_PORTS, st.just([])))
        found.append(endpoint_slice(name, *endpoints, ports=ports, namespace=space, suffix=suffix))
    return tuple(found)


clusters = st.builds(
    Cluster,
    namespaces=st.sampled_from([("dev", "prod"), ("dev", "prod"), ("prod",)]).map(lambda names: tuple(map(namespace, names))),
    services=_services(),
    slices=_slices(),
)  # fmt: skip
