"""Events that tell people what controllers and kubelets did: ``kubectl describe`` shows them."""

from __future__ import annotations

from testbed.errors import ApiError
from testbed.model.events import event_namespace, make_event
from testbed.model.objects import Object
from testbed.registry import Registry


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
    event = make_event(
        obj, kind, reason, message, component, now=registry.now(), host=host, field_path=field_path
    )  # fmt: skip
    known = registry.store.get("events", event_namespace(obj), event["metadata"]["name"])
    try:
        if known is not None:
            count = int(known.get("count", 1)) + 1
            registry.update("events", {**known, "count": count, "lastTimestamp": event["lastTimestamp"]})
        else:
            registry.create("events", event)
    except ApiError:
        return  # its namespace is going, or someone deleted it: telling must not fail what is told about
