"""What each kind of object may hold: field names and types, defaults, and rules that need no cluster to check.

::

    obj ─▶ decode ─▶ default_in_place ─▶ validate_decoded        (the registry, with allocation in between)
           default_object · validate_object · unknown_fields      (`testbed validate`: each takes what the user wrote)
"""

from __future__ import annotations

from collections.abc import Callable

from testbed.errors import Cause
from testbed.manifests.kinds import cluster, pod, service, workloads
from testbed.manifests.kinds.causes import Causes
from testbed.manifests.kinds.metadata import validate_metadata
from testbed.manifests.kinds.schema import decode_object, find_unknown, known_fields
from testbed.model.objects import BY_KIND, Object, Resource

__all__ = [
    "decode",
    "default_in_place",
    "default_object",
    "default_status",
    "known_fields",
    "unknown_fields",
    "validate_decoded",
    "validate_object",
    "validate_status",
]

_DEFAULTS: dict[str, Callable[[Object], None]] = {
    "namespaces": cluster.default_namespace,
    "endpoints": cluster.default_endpoints,
    "endpointslices.discovery.k8s.io": cluster.default_slice,
    "secrets": cluster.default_secret,
    "services": service.default_service,
    "pods": pod.default_pod,
    "deployments.apps": workloads.default_deployment,
    "replicasets.apps": workloads.default_replica_set,
    "daemonsets.apps": workloads.default_daemon_set,
    "jobs.batch": workloads.default_job,
}
_RULES: dict[str, Callable[[Object, Causes], None]] = {
    "nodes": cluster.validate_node,
    "endpoints": cluster.validate_endpoints,
    "endpointslices.discovery.k8s.io": cluster.validate_slice,
    "servicecidrs.networking.k8s.io": cluster.validate_service_cidr,
    "configmaps": cluster.validate_config_map,
    "secrets": cluster.validate_secret,
    "services": service.validate_service,
    "pods": lambda obj, causes: pod.validate_pod_spec(obj.get("spec") or {}, "spec", causes),
    "deployments.apps": workloads.validate_deployment,
    "replicasets.apps": workloads.validate_replica_set,
    "daemonsets.apps": workloads.validate_daemon_set,
    "jobs.batch": workloads.validate_job,
}


def _resource_of(obj: Object) -> Resource | None:
    api_version, kind = obj.get("apiVersion"), obj.get("kind")
    return BY_KIND.get((api_version, kind)) if isinstance(api_version, str) and isinstance(kind, str) else None


def decode(obj: Object) -> tuple[Object, list[str]]:
    """Return a copy without nulls and unknown fields, and what does not fit the kind's types, as Kubernetes' decoder says it."""
    return decode_object(obj)


def default_in_place(obj: Object) -> None:
    """Fill in the defaults of a decoded object."""
    resource = _resource_of(obj)
    if resource is not None and resource.key in _DEFAULTS:
        _DEFAULTS[resource.key](obj)


def validate_decoded(obj: Object) -> list[Cause]:
    """Return the problems of a decoded and defaulted object."""
    causes = Causes()
    resource = _resource_of(obj)
    validate_metadata(resource, obj["metadata"], causes)
    if resource is not None and resource.key in _RULES:
        _RULES[resource.key](obj, causes)
    return causes


def default_status(obj: Object) -> None:
    """Fill in the defaults of a decoded object's status, and touch nothing else of it."""
    if obj.get("kind") == "Service":
        service.default_service_status(obj)


def validate_status(obj: Object) -> list[Cause]:
    """Return the problems of the status of a decoded object."""
    causes = Causes()
    if obj.get("kind") == "Service":
        service.validate_service_status(obj, causes)
    return causes


def default_object(obj: Object) -> Object:
    """Return a copy with the defaults filled in."""
    new, _ = decode_object(obj)
    default_in_place(new)
    return new


def validate_object(obj: Object) -> list[Cause]:
    """Return every problem of an object, as the user wrote it, that can be seen without a cluster.

    Wrong types come alone: they have no field path, and the rest of the object cannot be judged with them in it.
    """
    new, problems = decode_object(obj)
    if problems:
        return [Cause("", problem, "FieldValueTypeInvalid") for problem in problems]
    default_in_place(new)
    return validate_decoded(new)


def unknown_fields(obj: Object) -> list[str]:
    """Return the paths of fields that the kind does not have, like ``spec.ports[0].foo``."""
    return list(find_unknown(obj))
