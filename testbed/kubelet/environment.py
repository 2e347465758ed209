"""A container's environment, and ``$(NAME)`` in its command and arguments. Pure.

Sources: kubelet_pods.go (makeEnvironmentVariables), third_party/forked/golang/expansion, envvars.go.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from testbed.model.objects import Object, labels_of, name_of, namespace_of

Find = Callable[[str, str], Object | None]
"""Returns an object of the pod's namespace: ``find("configmaps", "settings")``."""

_REFERENCE = re.compile(r"\$(\$|\([^()]*\))")
_MAP_KEY = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")


class MissingReference(LookupError):
    """A ConfigMap, Secret or key of one that the pod needs is not there; the message is the kubelet's."""


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace ``$(NAME)`` by its value, leave unknown names as they are, and make ``$$`` a ``$``."""

    def replace(found: re.Match[str]) -> str:
        inner = found[1]
        return "$" if inner == "$" else values.get(inner[1:-1], found[0])

    return _REFERENCE.sub(replace, text)


def service_variables(services: Sequence[Object], namespace: str) -> dict[str, str]:
    """Return the NAME_SERVICE_HOST family for the Services that a pod of this namespace is told about.

    Those of its own namespace, and default/kubernetes; headless ones have no address to tell.
    """
    variables: dict[str, str] = {}
    for service in services:
        is_master = (namespace_of(service), name_of(service)) == ("default", "kubernetes")
        address = service["spec"].get("clusterIP") or "None"
        if address == "None" or not (is_master or namespace_of(service) == namespace):
            continue
        prefix = name_of(service).upper().replace("-", "_")
        ports = service["spec"].get("ports") or []
        variables[f"{prefix}_SERVICE_HOST"] = address
        if ports:
            variables[f"{prefix}_SERVICE_PORT"] = str(ports[0]["port"])
            first = f"{ports[0].get('protocol', 'TCP').lower()}://{address}:{ports[0]['port']}"
            variables[f"{prefix}_PORT"] = first
        for port in ports:
            protocol = port.get("protocol", "TCP")
            if port.get("name"):
                variables[f"{prefix}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = str(port["port"])
            base = f"{prefix}_PORT_{port['port']}_{protocol}"
            variables[base] = f"{protocol.lower()}://{address}:{port['port']}"
            variables[f"{base}_PROTO"] = protocol.lower()
            variables[f"{base}_PORT"] = str(port["port"])
            variables[f"{base}_ADDR"] = address
    return variables


def container_environment(
    container: Mapping[str, Any], pod: Object, *, find: Find, base: Mapping[str, str], pod_ip: str, host_ip: str
) -> dict[str, str]:  # fmt: skip
    """Return a container's variables: ``base`` (image, Services), then envFrom, then env, each expanding earlier ones.

    Raises:
        MissingReference: something it names is not there and is not optional.
    """
    values = dict(base)
    for source in container.get("envFrom") or ():
        prefix = source.get("prefix") or ""
        for key, value in _all_of(source, find).items():
            if _is_env_name(prefix + key):
                values[prefix + key] = value
    for variable in container.get("env") or ():
        found = _value_of(variable, pod, find, pod_ip, host_ip)
        if found is not None:
            values[variable["name"]] = expand(found, values) if "value" in variable else found
    return values


def skipped_variables(container: Mapping[str, Any], namespace: str, *, find: Find) -> list[str]:
    """Return the kubelet's words for each envFrom with keys that cannot be names of variables.

    Names with '-' and '.' can be, one that begins with a digit cannot; Kubernetes 1.34 takes every name without '='.
    """
    messages = []
    for source in container.get("envFrom") or ():
        prefix = source.get("prefix") or ""
        skipped = sorted(prefix + key for key in _all_of(source, find) if not _is_env_name(prefix + key))
        if skipped:
            kind, field = ("configMap", "configMapRef") if source.get("configMapRef") else ("secret", "secretRef")
            messages.append(
                f"Keys [{', '.join(skipped)}] from the EnvFrom {kind} {namespace}/{source[field]['name']} were skipped "
                "since they are considered invalid environment variable names."
            )
    return messages


def _is_env_name(text: str) -> bool:
    """Source: apimachinery validation.go, IsEnvVarName (v1.30)."""
    return _ENV_NAME.fullmatch(text) is not None and text != "." and not text.startswith("..")


def _all_of(source: Mapping[str, Any], find: Find) -> Mapping[str, str]:
    for field, resource in (("configMapRef", "configmaps"), ("secretRef", "secrets")):
        reference = source.get(field)
        if reference is not None:
            return data_of(find, resource, reference["name"], optional=bool(reference.get("optional")))
    return {}


def data_of(find: Find, resource: str, name: str, *, optional: bool) -> Mapping[str, str]:
    """Return the decoded data of a ConfigMap or Secret; {} when it is optional and not there."""
    obj = find(resource, name)
    if obj is None:
        if optional:
            return {}
        raise MissingReference(f'{resource.removesuffix("s")} "{name}" not found')
    texts = dict(obj.get("data") or {})
    if resource == "secrets":
        return {key: base64.b64decode(value).decode(errors="surrogateescape") for key, value in texts.items()}
    binary = obj.get("binaryData") or {}
    return texts | {k: base64.b64decode(v).decode(errors="surrogateescape") for k, v in binary.items()}


def _value_of(variable: Mapping[str, Any], pod: Object, find: Find, pod_ip: str, host_ip: str) -> str | None:
    source = variable.get("valueFrom")
    if not source:
        return str(variable.get("value") or "")
    for field, resource in (("configMapKeyRef", "configmaps"), ("secretKeyRef", "secrets")):
        reference = source.get(field)
        if reference is not None:
            optional = bool(reference.get("optional"))
            data = data_of(find, resource, reference["name"], optional=optional)
            if reference["key"] in data:
                return data[reference["key"]]
            if optional:
                return None
            kind = "ConfigMap" if resource == "configmaps" else "Secret"
            raise MissingReference(
                f"couldn't find key {reference['key']} in {kind} {namespace_of(pod)}/{reference['name']}"
            )
    if "fieldRef" in source:
        return downward_value(source["fieldRef"]["fieldPath"], pod, pod_ip=pod_ip, host_ip=host_ip)
    return "0"  # resourceFieldRef: nothing is limited here


def downward_value(path: str, pod: Object, *, pod_ip: str, host_ip: str) -> str:
    """Return what the downward API gives for a field of the pod; '' for a field without a value."""
    found = _MAP_KEY.fullmatch(path)
    if found:
        return str((pod["metadata"].get(found[1]) or {}).get(found[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        pairs = labels_of(pod) if path.endswith("labels") else pod["metadata"].get("annotations") or {}
        return "\n".join(f'{key}="{value}"' for key, value in sorted(pairs.items()))
    simple = {
        "metadata.name": name_of(pod),
        "metadata.namespace": namespace_of(pod),
        "metadata.uid": pod["metadata"].get("uid", ""),
        "spec.nodeName": pod["spec"].get("nodeName", ""),
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", "default"),
        "status.podIP": pod_ip,
        "status.podIPs": pod_ip,
        "status.hostIP": host_ip,
        "status.hostIPs": host_ip,
    }
    return str(simple.get(path, ""))
