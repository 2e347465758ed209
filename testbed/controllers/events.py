"""Events that tell people what controllers and kubelets did: ``kubectl describe`` shows them."""

from __future__ import annotations

from hashlib import blake2b

from testbed.errors import ApiError
from testbed.model.objects import Object
from testbed.registry import Registry

_MAX_NAME = 253 - 17  # of the object: a dot and sixteen characters follow


def event_name(obj: Object, kind: str, reason: str, message: str, component: str) -> str:
    """Return ``NAME.`` and sixteen hexadecimal digits, the same for the same event.

    Upstream puts the time there and finds repetitions in a cache; here the name itself finds them.
    """
    told = "\0".join((str(obj["metadata"].get("uid", "")), kind, reason, message, component))
    return f"{obj['metadata']['name'][:_MAX_NAME]}.{blake2b(told.encode(), digest_size=8).hexdigest()}"


def record_event(
    registry: Registry,
    obj: Object,
    kind: str,
    reason: str,
    message: str,
    component: str,
    *,
    host: str = "",
    field_path: str = "",
) -> None:
    """Write an Event about an object, or count the one that says the same up. One that is refused is dropped.

    Args:
        kind: ``Normal`` or ``Warning``.
        component: Who says it: ``deployment-controller``, ``kubelet``.
        host: The node that the component works for.
        field_path: The part of the object: ``spec.containers{web}``.
    """
    metadata = obj["metadata"]
    namespace = metadata.get("namespace") or "default"  # of Nodes and the like, as upstream
    name = event_name(obj, kind, reason, message + "\0" + field_path, component)
    now = registry.now()
    known = registry.store.get("events", namespace, name)
    try:
        if known is not None:
            count = int(known.get("count", 1)) + 1
            registry.update("events", {**known, "count": count, "lastTimestamp": now})
            return
        involved = {
            "kind": obj.get("kind", ""),
            "apiVersion": obj.get("apiVersion", ""),
            "name": metadata["name"],
            "uid": metadata.get("uid", ""),
            "resourceVersion": metadata.get("resourceVersion", ""),
        }
        if metadata.get("namespace"):
            involved["namespace"] = metadata["namespace"]
        if field_path:
            involved["fieldPath"] = field_path
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": involved,
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": component, **({"host": host} if host else {})},
            "reportingComponent": component,
            "reportingInstance": host,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        registry.create("events", event)
    except ApiError:
        return  # its namespace is going, or someone deleted it: telling must not fail what is told about
