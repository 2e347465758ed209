"""Namespaces, Nodes, Endpoints, EndpointSlices, ConfigMaps, Secrets, Events: defaults and rules.

Source: kubernetes pkg/apis/core/{v1/defaults.go,validation}, pkg/apis/discovery/{v1/defaults.go,validation} (v1.30).
"""

from __future__ import annotations

import base64

from testbed.manifests.kinds.causes import Causes
from testbed.manifests.kinds.metadata import validate_labels
from testbed.manifests.kinds.names import (
    address_problems,
    config_key_problems,
    dns1123_label_problems,
    dns1123_subdomain_problems,
    label_value_problems,
    parse_address,
    parse_network,
    port_number_problems,
    qualified_name_problems,
)
from testbed.manifests.kinds.pod import TAINT_EFFECTS
from testbed.manifests.kinds.service import PROTOCOLS, validate_non_special
from testbed.model.objects import Object

MAX_CONFIG_BYTES = 1024 * 1024
MAX_SLICE_ENDPOINTS = 1000
MAX_SLICE_PORTS = 20000
_ADDRESS_TYPES = ("FQDN", "IPv4", "IPv6")


def default_namespace(obj: Object) -> None:
    """Give a Namespace the label with its own name, and the finalizer that keeps it until it is empty."""
    metadata = obj["metadata"]
    if metadata.get("name"):
        metadata["labels"] = {**(metadata.get("labels") or {}), "kubernetes.io/metadata.name": metadata["name"]}
    obj.setdefault("status", {}).setdefault("phase", "Active")


def default_endpoints(obj: Object) -> None:
    """Fill in the protocol of ports."""
    for subset in obj.get("subsets") or []:
        for port in subset.get("ports") or []:
            port["protocol"] = port.get("protocol") or "TCP"


def default_slice(obj: Object) -> None:
    """Fill in name and protocol of ports."""
    for port in obj.get("ports") or []:
        port["protocol"] = port.get("protocol") or "TCP"
        port.setdefault("name", "")


def default_secret(obj: Object) -> None:
    """Move stringData into data, and name the type."""
    obj["type"] = obj.get("type") or "Opaque"
    texts = obj.pop("stringData", None)
    if texts:
        encoded = {key: base64.b64encode(text.encode()).decode() for key, text in texts.items()}
        obj["data"] = {**(obj.get("data") or {}), **encoded}


def validate_node(obj: Object, causes: Causes) -> None:
    """Check a Node."""
    spec = obj.get("spec") or {}
    seen: set[tuple[str, str]] = set()
    for index, taint in enumerate(spec.get("taints") or []):
        where = f"spec.taints[{index}]"
        key, effect = taint.get("key", ""), taint.get("effect", "")
        causes.invalid_each(f"{where}.key", key, qualified_name_problems(key))
        causes.invalid_each(f"{where}.value", taint.get("value", ""), label_value_problems(taint.get("value", "")))
        causes.one_of(f"{where}.effect", effect, TAINT_EFFECTS)
        if (key, effect) in seen:
            causes.duplicate(where, f"{key}:{effect}")
        seen.add((key, effect))
    cidrs = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
    for index, cidr in enumerate(cidrs):
        if parse_network(cidr) is None:
            causes.invalid(
                f"spec.podCIDRs[{index}]", cidr, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
            )
    if spec.get("podCIDR") and cidrs[0] != spec["podCIDR"]:
        causes.invalid("spec.podCIDR", spec["podCIDR"], "must match the first of podCIDRs")


def validate_endpoints(obj: Object, causes: Causes) -> None:
    """Check manual or computed Endpoints."""
    for index, subset in enumerate(obj.get("subsets") or []):
        where = f"subsets[{index}]"
        ready, not_ready = subset.get("addresses") or [], subset.get("notReadyAddresses") or []
        if not ready and not not_ready:
            causes.required(where, "must specify `addresses` or `notReadyAddresses`")
        for field, addresses in (("addresses", ready), ("notReadyAddresses", not_ready)):
            for number, address in enumerate(addresses):
                _validate_address(address, f"{where}.{field}[{number}]", causes)
        ports = subset.get("ports") or []
        for number, port in enumerate(ports):
            _validate_endpoint_port(port, f"{where}.ports[{number}]", len(ports) > 1, causes)


def _validate_address(address: Object, where: str, causes: Causes) -> None:
    text = address.get("ip", "")
    problems = address_problems(text)
    causes.invalid_each(f"{where}.ip", text, problems)
    if not problems:
        validate_non_special(text, f"{where}.ip", causes)
    if address.get("hostname"):
        causes.invalid_each(f"{where}.hostname", address["hostname"], dns1123_label_problems(address["hostname"]))
    if address.get("nodeName"):
        causes.invalid_each(f"{where}.nodeName", address["nodeName"], dns1123_subdomain_problems(address["nodeName"]))


def _validate_endpoint_port(port: Object, where: str, needs_name: bool, causes: Causes) -> None:
    name = port.get("name", "")
    if needs_name and not name:
        causes.required(f"{where}.name")
    elif name:
        causes.invalid_each(f"{where}.name", name, dns1123_label_problems(name))
    number = port.get("port", 0)
    causes.invalid_each(f"{where}.port", number, port_number_problems(number))
    causes.one_of(f"{where}.protocol", port.get("protocol"), PROTOCOLS)
    if port.get("appProtocol"):
        causes.invalid_each(f"{where}.appProtocol", port["appProtocol"], qualified_name_problems(port["appProtocol"]))


def validate_slice(obj: Object, causes: Causes) -> None:
    """Check an EndpointSlice."""
    type_ = obj.get("addressType", "")
    causes.one_of("addressType", type_, _ADDRESS_TYPES)
    endpoints, ports = obj.get("endpoints") or [], obj.get("ports") or []
    if len(endpoints) > MAX_SLICE_ENDPOINTS:
        causes.too_many("endpoints", len(endpoints), MAX_SLICE_ENDPOINTS)
        return
    for index, endpoint in enumerate(endpoints):
        _validate_slice_endpoint(endpoint, type_, f"endpoints[{index}]", causes)
    if len(ports) > MAX_SLICE_PORTS:
        causes.too_many("ports", len(ports), MAX_SLICE_PORTS)
        return
    names: set[str] = set()
    for index, port in enumerate(ports):
        where = f"ports[{index}]"
        name = port.get("name", "")
        if name:
            causes.invalid_each(f"{where}.name", name, dns1123_label_problems(name))
        if name in names:
            causes.duplicate(f"{where}.name", name)
        names.add(name)
        if "port" in port:
            causes.invalid_each(f"{where}.port", port["port"], port_number_problems(port["port"]))
        causes.one_of(f"{where}.protocol", port.get("protocol"), PROTOCOLS)
        if port.get("appProtocol"):
            causes.invalid_each(
                f"{where}.appProtocol", port["appProtocol"], qualified_name_problems(port["appProtocol"])
            )


def _validate_slice_endpoint(endpoint: Object, type_: str, where: str, causes: Causes) -> None:
    addresses = endpoint.get("addresses") or []
    if not addresses:
        causes.required(f"{where}.addresses", "must contain at least 1 address")
    if len(addresses) > 100:
        causes.too_many(f"{where}.addresses", len(addresses), 100)
    for number, text in enumerate(addresses):
        here = f"{where}.addresses[{number}]"
        if type_ == "FQDN":
            causes.invalid_each(here, text, dns1123_subdomain_problems(text))
            continue
        parsed = parse_address(text)
        if parsed is None or f"IPv{parsed.version}" != type_:
            causes.invalid(here, text, f"must be a valid {type_} address")
        else:
            validate_non_special(text, here, causes)
    if endpoint.get("nodeName"):
        causes.invalid_each(f"{where}.nodeName", endpoint["nodeName"], dns1123_subdomain_problems(endpoint["nodeName"]))
    if endpoint.get("hostname"):
        causes.invalid_each(f"{where}.hostname", endpoint["hostname"], dns1123_label_problems(endpoint["hostname"]))
    validate_labels(endpoint.get("deprecatedTopology"), f"{where}.deprecatedTopology", causes)


def validate_service_cidr(obj: Object, causes: Causes) -> None:
    """Check a ServiceCIDR: one network of each family at most."""
    cidrs = (obj.get("spec") or {}).get("cidrs") or []
    if not cidrs:
        causes.required("spec.cidrs", "at least one CIDR required")
    if len(cidrs) > 2:
        causes.invalid("spec.cidrs", cidrs, "may only hold up to 2 values")
    for index, cidr in enumerate(cidrs):
        if parse_network(cidr) is None:
            causes.invalid(
                f"spec.cidrs[{index}]", cidr, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
            )


def validate_config_map(obj: Object, causes: Causes) -> None:
    """Check the keys of a ConfigMap, which become file names, and its size."""
    data, binary = obj.get("data") or {}, obj.get("binaryData") or {}
    for field, entries in (("data", data), ("binaryData", binary)):
        for key in sorted(entries):
            causes.invalid_each(f"{field}[{key}]", key, config_key_problems(key))
    for key in sorted(data.keys() & binary.keys()):
        causes.invalid(f"data[{key}]", key, "duplicate of key present in binaryData")
    if sum(len(value.encode()) for value in (*data.values(), *binary.values())) > MAX_CONFIG_BYTES:
        causes.too_long("", MAX_CONFIG_BYTES)


def validate_secret(obj: Object, causes: Causes) -> None:
    """Check the keys of a Secret, and that its type has the keys it stands for."""
    data = obj.get("data") or {}
    for key in sorted(data):
        causes.invalid_each(f"data[{key}]", key, config_key_problems(key))
    if sum(len(value) for value in data.values()) > MAX_CONFIG_BYTES * 4 // 3:
        causes.too_long("data", MAX_CONFIG_BYTES)
    if obj.get("type") == "kubernetes.io/tls":
        for key in ("tls.crt", "tls.key"):
            if key not in data:
                causes.required(f"data[{key}]")
