"""Services: defaults, and the rules that need no cluster to check.

Source: kubernetes pkg/apis/core/v1/defaults.go, pkg/apis/core/validation/validation.go ValidateService (v1.30).
"""

from __future__ import annotations

from typing import Any

from testbed.manifests.kinds.causes import Causes, GoText, go_quote
from testbed.manifests.kinds.metadata import validate_labels
from testbed.manifests.kinds.names import (
    address_problems,
    dns1123_label_problems,
    dns1123_subdomain_problems,
    parse_address,
    parse_network,
    port_name_problems,
    port_number_problems,
    qualified_name_problems,
)
from testbed.model.objects import Object

TYPES = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
AFFINITIES = ("ClientIP", "None")
PROTOCOLS = ("SCTP", "TCP", "UDP")
POLICIES = ("Cluster", "Local")
FAMILIES = ("IPv4", "IPv6")
FAMILY_POLICIES = ("PreferDualStack", "RequireDualStack", "SingleStack")
#: 1.30 knows PreferClose; the other two came with 1.35, and a proxy that does not know them ignores them.
DISTRIBUTIONS = ("PreferClose", "PreferSameNode", "PreferSameZone")
DEFAULT_AFFINITY_TIMEOUT_S = 10800
MAX_AFFINITY_TIMEOUT_S = 86400
_SOURCE_RANGES_ANNOTATION = "service.beta.kubernetes.io/load-balancer-source-ranges"


def needs_cluster_ip(spec: Object) -> bool:
    return spec.get("type", "ClusterIP") in ("ClusterIP", "NodePort", "LoadBalancer")


def needs_node_port(spec: Object) -> bool:
    if spec.get("type") == "LoadBalancer":
        return spec.get("allocateLoadBalancerNodePorts") is not False
    return spec.get("type") == "NodePort"


def needs_health_check_port(spec: Object) -> bool:
    return spec.get("type") == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local"


def is_externally_accessible(spec: Object) -> bool:
    external_ips = bool(spec.get("externalIPs")) and spec.get("type") == "ClusterIP"
    return spec.get("type") in ("NodePort", "LoadBalancer") or external_ips


def is_headless(spec: Object) -> bool:
    return bool((spec.get("clusterIPs") or [spec.get("clusterIP")])[0] == "None")


def default_service(service: Object) -> None:
    """Fill in the defaults of a Service that depend on nothing but itself."""
    spec = service.setdefault("spec", {})
    spec["type"] = spec.get("type") or "ClusterIP"
    spec["sessionAffinity"] = spec.get("sessionAffinity") or "None"
    if spec["sessionAffinity"] == "None":
        spec.pop("sessionAffinityConfig", None)
    elif spec["sessionAffinity"] == "ClientIP":
        client = spec.get("sessionAffinityConfig", {}).get("clientIP", {})
        if "timeoutSeconds" not in client:
            spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": DEFAULT_AFFINITY_TIMEOUT_S}}
    for port in spec.get("ports") or []:
        port["protocol"] = port.get("protocol") or "TCP"
        if port.get("targetPort", 0) in (0, ""):
            port["targetPort"] = port.get("port", 0)
        for field, empty in (("nodePort", 0), ("name", "")):  # as Go's omitempty
            if port.get(field) == empty:
                port.pop(field, None)
    for field in ("clusterIP", "externalName", "externalTrafficPolicy", "loadBalancerIP"):
        if spec.get(field) == "":
            del spec[field]
    for field in ("clusterIPs", "externalIPs", "ipFamilies", "loadBalancerSourceRanges", "ports", "selector"):
        if field in spec and not spec[field]:
            del spec[field]
    if not spec.get("publishNotReadyAddresses", True):
        del spec["publishNotReadyAddresses"]
    if spec.get("healthCheckNodePort") == 0:
        del spec["healthCheckNodePort"]
    if is_externally_accessible(spec):
        spec.setdefault("externalTrafficPolicy", "Cluster")
    if needs_cluster_ip(spec):
        spec.setdefault("internalTrafficPolicy", "Cluster")
    if spec["type"] == "LoadBalancer":
        spec.setdefault("allocateLoadBalancerNodePorts", True)
    default_service_status(service)


def default_service_status(service: Object) -> None:
    """Fill in the defaults of a Service's status."""
    service["status"] = {"loadBalancer": {}, **(service.get("status") or {})}
    for ingress in service["status"]["loadBalancer"].get("ingress") or []:
        if ingress.get("ip"):
            ingress.setdefault("ipMode", "VIP")


def validate_service(service: Object, causes: Causes) -> None:
    """Check a defaulted Service."""
    spec = service.get("spec", {})
    type_ = spec.get("type", "")
    ports = spec.get("ports") or []
    if not ports and not is_headless(spec) and type_ != "ExternalName":
        causes.required("spec.ports")
    if type_ in ("LoadBalancer", "NodePort") and is_headless(spec):
        causes.invalid("spec.clusterIPs[0]", "None", f"may not be set to 'None' for {type_} services")
    if type_ == "ExternalName":
        for field in ("clusterIPs", "ipFamilies", "ipFamilyPolicy"):
            if spec.get(field) or (field == "clusterIPs" and spec.get("clusterIP")):
                causes.forbidden(f"spec.{field}", "may not be set for ExternalName services")
        name = spec.get("externalName", "").removesuffix(".")
        if name:
            causes.invalid_each("spec.externalName", name, dns1123_subdomain_problems(name))
        else:
            causes.required("spec.externalName")
    names: set[str] = set()
    for index, port in enumerate(ports):
        _validate_port(port, f"spec.ports[{index}]", len(ports) > 1, names, causes)
    validate_labels(spec.get("selector"), "spec.selector", causes)
    _validate_affinity(spec, causes)
    if type_ != "ExternalName":
        validate_cluster_ips(spec, causes)
    for index, address in enumerate(spec.get("externalIPs") or []):
        path = f"spec.externalIPs[{index}]"
        if address_problems(address):
            causes.invalid_each(path, address, address_problems(address))
        else:
            validate_non_special(address, path, causes)
    causes.one_of("spec.type", type_, TYPES)
    _validate_port_pairs(type_, ports, causes)
    _validate_source_ranges(service, causes)
    if "allocateLoadBalancerNodePorts" in spec and type_ != "LoadBalancer":
        causes.forbidden("spec.allocateLoadBalancerNodePorts", "may only be used when `type` is 'LoadBalancer'")
    if "loadBalancerClass" in spec:
        if type_ == "LoadBalancer":
            causes.invalid_each(
                "spec.loadBalancerClass", spec["loadBalancerClass"], qualified_name_problems(spec["loadBalancerClass"])
            )
        else:
            causes.forbidden("spec.loadBalancerClass", "may only be used when `type` is 'LoadBalancer'")
    _validate_policies(spec, causes)


def _validate_port(port: Object, path: str, needs_name: bool, names: set[str], causes: Causes) -> None:
    name = port.get("name", "")
    if not name and needs_name:
        causes.required(f"{path}.name")
    elif name:
        causes.invalid_each(f"{path}.name", name, dns1123_label_problems(name))
        if name in names:
            causes.duplicate(f"{path}.name", name)
        names.add(name)
    number = port.get("port", 0)
    causes.invalid_each(f"{path}.port", number, port_number_problems(number))
    causes.one_of(f"{path}.protocol", port.get("protocol"), PROTOCOLS)
    validate_port_reference(port.get("targetPort", 0), f"{path}.targetPort", causes)
    if "appProtocol" in port:
        causes.invalid_each(f"{path}.appProtocol", port["appProtocol"], qualified_name_problems(port["appProtocol"]))


def validate_port_reference(value: int | str, path: str, causes: Causes) -> None:
    """Check a port given by number or by name."""
    causes.invalid_each(
        path, value, port_name_problems(value) if isinstance(value, str) else port_number_problems(value)
    )


def _validate_port_pairs(type_: str, ports: list[Object], causes: Causes) -> None:
    seen: set[tuple[str, Any]] = set()
    for index, port in enumerate(ports):
        node_port = port.get("nodePort", 0)
        if node_port and type_ == "ClusterIP":
            causes.forbidden(f"spec.ports[{index}].nodePort", "may not be used when `type` is 'ClusterIP'")
    for index, port in enumerate(ports):
        node_port = port.get("nodePort", 0)
        pair = (str(port.get("protocol")), node_port)
        if node_port and pair in seen:
            causes.duplicate(f"spec.ports[{index}].nodePort", node_port)
        seen.add(pair)
    seen.clear()
    for index, port in enumerate(ports):
        pair = (str(port.get("protocol")), port.get("port", 0))
        if pair in seen:
            # Upstream compares a ServicePort with only these two fields set, and prints that.
            shown = (
                f'core.ServicePort{{Name:"", Protocol:{go_quote(pair[0])}, AppProtocol:(*string)(nil), Port:{pair[1]}, '
                'TargetPort:intstr.IntOrString{Type:0, IntVal:0, StrVal:""}, NodePort:0}'
            )
            causes.duplicate(f"spec.ports[{index}]", GoText(shown))
        seen.add(pair)


def _validate_affinity(spec: Object, causes: Causes) -> None:
    affinity = spec.get("sessionAffinity", "")
    causes.one_of("spec.sessionAffinity", affinity, AFFINITIES)
    if affinity == "ClientIP":
        timeout = spec.get("sessionAffinityConfig", {}).get("clientIP", {}).get("timeoutSeconds", 0)
        if not 0 < timeout <= MAX_AFFINITY_TIMEOUT_S:
            path = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
            causes.invalid(path, timeout, f"must be greater than 0 and less than {MAX_AFFINITY_TIMEOUT_S}")
    elif affinity == "None" and "sessionAffinityConfig" in spec:
        causes.forbidden("spec.sessionAffinityConfig", "must not be set when session affinity is None")


def validate_cluster_ips(spec: Object, causes: Causes) -> None:
    """Check clusterIP, clusterIPs, ipFamilies and ipFamilyPolicy against each other.

    Source: ValidateServiceClusterIPsRelatedFields.
    """
    address, addresses = spec.get("clusterIP", ""), spec.get("clusterIPs") or []
    if address and addresses and addresses[0] != address:
        causes.invalid("spec.clusterIPs", addresses, "first value must match `clusterIP`")
    elif addresses and not address:
        causes.invalid("spec.clusterIPs", addresses, "must be empty when `clusterIP` is not specified")
    addresses = addresses or ([address] if address else [])
    if "ipFamilyPolicy" in spec:
        causes.one_of("spec.ipFamilyPolicy", spec["ipFamilyPolicy"], FAMILY_POLICIES)
    families = spec.get("ipFamilies") or []
    for index, family in enumerate(families):
        if family not in FAMILIES:
            causes.unsupported(f"spec.ipFamilies[{index}]", family, FAMILIES)
        elif family in families[:index]:
            causes.duplicate(f"spec.ipFamilies[{index}]", family)
    if len(families) > 2:
        causes.invalid("spec.ipFamilies", families, "may only hold up to 2 values")
    if addresses and addresses[0] == "None":
        if len(addresses) > 1:
            causes.invalid("spec.clusterIPs", addresses, "'None' must be the first and only value")
        return
    for index, item in enumerate(addresses):
        path = f"spec.clusterIPs[{index}]"
        problems = address_problems(item)
        causes.invalid_each(path, item, problems)
        if problems:
            continue
        family = "IPv6" if ":" in item else "IPv4"
        if index < len(families) and families[index] in FAMILIES and families[index] != family:
            causes.invalid(path, item, f"expected an {families[index]} value as indicated by `ipFamilies[{index}]`")
    if len(addresses) > 2:
        causes.invalid("spec.clusterIPs", addresses, "may only hold up to 2 values")


def validate_non_special(text: str, path: str, causes: Causes) -> None:
    """Check that an address is one that can be routed to. Source: ValidateNonSpecialIP."""
    address = parse_address(text)
    assert address is not None, text
    if address.is_unspecified:
        causes.invalid(path, text, f"may not be unspecified ({text})")
    if address.is_loopback:
        causes.invalid(path, text, "may not be in the loopback range (127.0.0.0/8, ::1/128)")
    if address.is_link_local:
        causes.invalid(path, text, "may not be in the link-local range (169.254.0.0/16, fe80::/10)")
    link_local_multicast = parse_network("ff02::/16" if address.version == 6 else "224.0.0.0/24")
    if link_local_multicast is not None and address in link_local_multicast:
        causes.invalid(path, text, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)")


def _validate_source_ranges(service: Object, causes: Causes) -> None:
    spec = service["spec"]
    path = "spec.LoadBalancerSourceRanges"  # upstream's spelling
    entries = [(f"{path}[{index}]", text) for index, text in enumerate(spec.get("loadBalancerSourceRanges") or [])]
    if not entries:
        annotation = (service["metadata"].get("annotations") or {}).get(_SOURCE_RANGES_ANNOTATION)
        if annotation is None:
            return
        path = f"metadata.annotations[{_SOURCE_RANGES_ANNOTATION}]"
        entries = [(path, text) for text in annotation.split(",") if annotation.strip()]
    if spec.get("type") != "LoadBalancer":
        causes.forbidden(path, "may only be used when `type` is 'LoadBalancer'")
    for where, text in entries:
        if parse_network(text.strip()) is None:
            causes.invalid(where, text.strip(), "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)")


def _validate_policies(spec: Object, causes: Causes) -> None:
    policy = spec.get("externalTrafficPolicy", "")
    if is_externally_accessible(spec):
        causes.one_of("spec.externalTrafficPolicy", policy, POLICIES)
    elif policy:
        causes.invalid("spec.externalTrafficPolicy", policy, "may only be set for externally-accessible services")
    health_port = spec.get("healthCheckNodePort", 0)
    if health_port and not needs_health_check_port(spec):
        detail = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
        causes.invalid("spec.healthCheckNodePort", health_port, detail)
    elif health_port:
        causes.invalid_each("spec.healthCheckNodePort", health_port, port_number_problems(health_port))
    if needs_cluster_ip(spec) or "internalTrafficPolicy" in spec:
        causes.one_of("spec.internalTrafficPolicy", spec.get("internalTrafficPolicy"), POLICIES)
    if "trafficDistribution" in spec and spec["trafficDistribution"] not in DISTRIBUTIONS:
        causes.unsupported("spec.trafficDistribution", spec["trafficDistribution"], DISTRIBUTIONS)


def validate_service_status(service: Object, causes: Causes) -> None:
    """Check the status of a Service. Source: ValidateLoadBalancerStatus."""
    ingresses = (service.get("status") or {}).get("loadBalancer", {}).get("ingress") or []
    if ingresses and service.get("spec", {}).get("type") != "LoadBalancer":
        causes.forbidden("status.loadBalancer.ingress", "may only be used when `spec.type` is 'LoadBalancer'")
        return
    for index, ingress in enumerate(ingresses):
        path = f"status.loadBalancer.ingress[{index}]"
        if ingress.get("ip") and address_problems(ingress["ip"]):
            causes.invalid(f"{path}.ip", ingress["ip"], "must be a valid IP address")
        if "ipMode" in ingress and not ingress.get("ip"):
            causes.forbidden(f"{path}.ipMode", "may not be specified when `ip` is not set")
        elif "ipMode" in ingress:
            causes.one_of(f"{path}.ipMode", ingress["ipMode"], ("Proxy", "VIP"))
        if ingress.get("hostname"):
            causes.invalid_each(
                f"{path}.hostname", ingress["hostname"], dns1123_subdomain_problems(ingress["hostname"])
            )
            if parse_address(ingress["hostname"]) is not None:
                causes.invalid(f"{path}.hostname", ingress["hostname"], "must be a DNS name, not an IP address")
