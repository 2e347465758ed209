"""Ingress, IngressClass, Lease, Event and webhook configurations: defaults, and rules that need no cluster to check.

Source: kubernetes pkg/apis/{networking,coordination,admissionregistration,core}/validation, and v1/defaults.go (v1.30).
"""

from __future__ import annotations

import re

from testbed.manifests.kinds.causes import Causes, GoText
from testbed.manifests.kinds.metadata import validate_selector
from testbed.manifests.kinds.names import (
    dns1035_label_problems,
    dns1123_subdomain_problems,
    parse_address,
    port_name_problems,
    port_number_problems,
)
from testbed.model.objects import Object

PATH_TYPES = ("Exact", "ImplementationSpecific", "Prefix")
INGRESS_CLASS_ANNOTATION = "kubernetes.io/ingress.class"
_INVALID_IN_PATHS = ("//", "/./", "/../", "%2f", "%2F")
_INVALID_AT_END = ("/..", "/.")
_WILDCARD = re.compile(r"\*(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)+")
_MAX_CONTROLLER = 250


# --- Ingress -----------------------------------------------------------------------------------------------------------


def validate_ingress(obj: Object, causes: Causes) -> None:
    """Check an Ingress."""
    spec = obj.get("spec") or {}
    rules = spec.get("rules") or []
    if not rules and spec.get("defaultBackend") is None:
        causes.invalid(
            "spec", GoText("[]networking.IngressRule(nil)"), "either `defaultBackend` or `rules` must be specified"
        )
    if spec.get("defaultBackend") is not None:
        _validate_backend(spec["defaultBackend"], "spec.defaultBackend", causes)
    for index, rule in enumerate(rules):
        where = f"spec.rules[{index}]"
        if rule.get("host"):
            if parse_address(rule["host"]) is not None:
                causes.invalid(f"{where}.host", rule["host"], "must be a DNS name, not an IP address")
            _validate_host(rule["host"], f"{where}.host", causes)
        if rule.get("http") is not None:
            paths = rule["http"].get("paths") or []
            if not paths:
                causes.required(f"{where}.http.paths")
            for number, path in enumerate(paths):
                _validate_path(path, f"{where}.http.paths[{number}]", causes)
    for index, tls in enumerate(spec.get("tls") or []):
        for number, host in enumerate(tls.get("hosts") or []):
            _validate_host(host, f"spec.tls[{index}].hosts[{number}]", causes)
        if tls.get("secretName"):
            problems = dns1123_subdomain_problems(tls["secretName"])
            causes.invalid_each(f"spec.tls[{index}].secretName", tls["secretName"], problems)
    if spec.get("ingressClassName") is not None:
        problems = dns1123_subdomain_problems(spec["ingressClassName"])
        causes.invalid_each("spec.ingressClassName", spec["ingressClassName"], problems)


def _validate_host(host: str, where: str, causes: Causes) -> None:
    if "*" not in host:
        causes.invalid_each(where, host, dns1123_subdomain_problems(host))
    elif not _WILDCARD.fullmatch(host) or len(host) > 253:
        causes.invalid(
            where, host, "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain, which must "
            "consist of lower case alphanumeric characters, '-' or '.' and end with an alphanumeric character (e.g. "
            "'*.example.com', regex used for validation is '\\*\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?"
            "(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')",
        )  # fmt: skip


def _validate_path(path: Object, where: str, causes: Causes) -> None:
    kind, text = path.get("pathType"), path.get("path") or ""
    if kind is None:
        causes.required(f"{where}.pathType", "pathType must be specified")
    elif kind not in PATH_TYPES:
        causes.unsupported(f"{where}.pathType", kind, PATH_TYPES)
    elif kind == "ImplementationSpecific":
        if text and not text.startswith("/"):
            causes.invalid(f"{where}.path", text, "must be an absolute path")
    else:
        if not text.startswith("/"):
            causes.invalid(f"{where}.path", text, "must be an absolute path")
        for bad in _INVALID_IN_PATHS:
            if bad in text:
                causes.invalid(f"{where}.path", text, f"must not contain '{bad}'")
        for bad in _INVALID_AT_END:
            if text.endswith(bad):
                causes.invalid(f"{where}.path", text, f"cannot end with '{bad}'")
    _validate_backend(path.get("backend") or {}, f"{where}.backend", causes)


def _validate_backend(backend: Object, where: str, causes: Causes) -> None:
    resource, service = backend.get("resource"), backend.get("service")
    if resource is not None and service is not None:
        causes.invalid(where, "", "cannot set both resource and service backends")
    elif resource is not None:
        for field in ("kind", "name"):
            if not resource.get(field):
                causes.required(f"{where}.resource.{field}")
    elif service is not None:
        name, port = service.get("name") or "", service.get("port") or {}
        if not name:
            causes.required(f"{where}.service.name")
        else:
            causes.invalid_each(f"{where}.service.name", name, dns1035_label_problems(name))
        if port.get("name") and port.get("number"):
            causes.invalid(where, "", "cannot set both port name & port number")
        elif port.get("name"):
            causes.invalid_each(f"{where}.service.port.name", port["name"], port_name_problems(port["name"]))
        elif port.get("number"):
            causes.invalid_each(f"{where}.service.port.number", port["number"], port_number_problems(port["number"]))
        else:
            causes.required(where, "port name or number is required")
    else:
        causes.invalid(where, "", "resource or service backend is required")


def validate_ingress_class(obj: Object, causes: Causes) -> None:
    """Check an IngressClass."""
    controller = (obj.get("spec") or {}).get("controller") or ""
    if len(controller) > _MAX_CONTROLLER:
        causes.too_long("spec.controller", _MAX_CONTROLLER)
    domain, slash, path = controller.partition("/")
    if not controller:
        causes.required("spec.controller")
    elif not slash or not domain or not path:
        causes.invalid("spec.controller", controller, 'must be a domain-prefixed path (such as "acme.io/foo")')
    else:
        causes.invalid_each("spec.controller", domain, dns1123_subdomain_problems(domain))


# --- Lease, Event ------------------------------------------------------------------------------------------------------


def validate_lease(obj: Object, causes: Causes) -> None:
    """Check a Lease."""
    spec = obj.get("spec") or {}
    if spec.get("leaseDurationSeconds") is not None and spec["leaseDurationSeconds"] <= 0:
        causes.invalid("spec.leaseDurationSeconds", spec["leaseDurationSeconds"], "must be greater than 0")
    if spec.get("leaseTransitions") is not None and spec["leaseTransitions"] < 0:
        causes.invalid("spec.leaseTransitions", spec["leaseTransitions"], "must be greater than or equal to 0")


def validate_event(obj: Object, causes: Causes) -> None:
    """Check that an Event is in the namespace of what it is about; one about a cluster-wide object is in default."""
    about = (obj.get("involvedObject") or {}).get("namespace", "")
    namespace = obj["metadata"].get("namespace", "")
    if about and about != namespace:
        causes.invalid("involvedObject.namespace", about, "does not match event.namespace")


# --- webhook configurations ----------------------------------------------------------------------------------------------


def default_webhooks(obj: Object) -> None:
    """Fill in the defaults of a Validating- or MutatingWebhookConfiguration."""
    for webhook in obj.get("webhooks") or []:
        for field, value in (("failurePolicy", "Fail"), ("matchPolicy", "Equivalent"), ("timeoutSeconds", 10)):
            webhook.setdefault(field, value)
        for field in ("namespaceSelector", "objectSelector"):
            webhook.setdefault(field, {})
        if obj.get("kind") == "MutatingWebhookConfiguration":
            webhook.setdefault("reinvocationPolicy", "Never")
        for rule in webhook.get("rules") or []:
            rule.setdefault("scope", "*")
        service = (webhook.get("clientConfig") or {}).get("service")
        if service is not None:
            service.setdefault("port", 443)


def validate_webhooks(obj: Object, causes: Causes) -> None:
    """Check a defaulted webhook configuration."""
    seen: set[str] = set()
    for index, webhook in enumerate(obj.get("webhooks") or []):
        where, name = f"webhooks[{index}]", webhook.get("name") or ""
        _validate_webhook_name(name, f"{where}.name", causes)
        if name in seen:
            causes.duplicate(f"{where}.name", name)
        seen.add(name)
        if not webhook.get("admissionReviewVersions"):
            causes.required(f"{where}.admissionReviewVersions", "must specify one of v1, v1beta1")
        for number, rule in enumerate(webhook.get("rules") or []):
            _validate_rule(rule, f"{where}.rules[{number}]", causes)
        for field, supported in (("failurePolicy", ("Fail", "Ignore")), ("matchPolicy", ("Equivalent", "Exact"))):
            if webhook[field] not in supported:
                causes.unsupported(f"{where}.{field}", webhook[field], supported)
        if not webhook.get("sideEffects"):
            causes.required(f"{where}.sideEffects", "must specify one of None, NoneOnDryRun")
        elif webhook["sideEffects"] not in ("None", "NoneOnDryRun"):
            causes.unsupported(f"{where}.sideEffects", webhook["sideEffects"], ("None", "NoneOnDryRun"))
        if not 1 <= webhook["timeoutSeconds"] <= 30:
            words = "the timeout value must be between 1 and 30 seconds"
            causes.invalid(f"{where}.timeoutSeconds", webhook["timeoutSeconds"], words)
        for field in ("namespaceSelector", "objectSelector"):
            validate_selector(webhook[field], f"{where}.{field}", causes)
        _validate_client(webhook.get("clientConfig") or {}, f"{where}.clientConfig", causes)


def _validate_webhook_name(name: str, where: str, causes: Causes) -> None:
    if not name:
        causes.required(where)
        return
    problems = dns1123_subdomain_problems(name)
    causes.invalid_each(where, name, problems)
    if not problems and name.count(".") < 2:
        causes.invalid(where, name, "should be a domain with at least three segments separated by dots")


def _validate_rule(rule: Object, where: str, causes: Causes) -> None:
    for field in ("operations", "apiGroups", "apiVersions", "resources"):
        values = rule.get(field) or []
        if not values:
            causes.required(f"{where}.{field}")
        elif field != "resources" and "*" in values and len(values) > 1:
            shown = GoText("[]string{" + ", ".join(f'"{value}"' for value in values) + "}")
            causes.invalid(f"{where}.{field}", shown, "if '*' is present, must not specify other " + _THINGS[field])
        if field == "operations":
            for number, value in enumerate(values):
                if value not in ("*", "CONNECT", "CREATE", "DELETE", "UPDATE"):
                    supported = ("*", "CONNECT", "CREATE", "DELETE", "UPDATE")
                    causes.unsupported(f"{where}.operations[{number}]", value, supported)
    if rule.get("scope") not in ("*", "Cluster", "Namespaced"):
        causes.unsupported(f"{where}.scope", rule.get("scope"), ("*", "Cluster", "Namespaced"))


_THINGS = {"operations": "operations", "apiGroups": "API groups", "apiVersions": "API versions"}


def _validate_client(client: Object, where: str, causes: Causes) -> None:
    url, service = client.get("url"), client.get("service")
    if (url is None) == (service is None):
        causes.required(where, "exactly one of url or service is required")
    elif service is not None:
        for field in ("name", "namespace"):
            if not service.get(field):
                causes.required(f"{where}.service.{field}", f"service {field} is required")
        causes.invalid_each(f"{where}.service.port", service["port"], port_number_problems(service["port"]))
    elif not str(url).startswith("https://"):
        causes.invalid(
            f"{where}.url", url, "'https' is the only allowed URL scheme; desired format: https://host[/path]"
        )
