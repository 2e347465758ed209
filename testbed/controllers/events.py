"""Events that tell people what controllers and kubelets did: ``kubectl describe`` shows them."""

from __future__ import annotations

from datetime import datetime

from testbed.errors import ApiError
from testbed.model.events import event_namespace, make_event
from testbed.model.objects import Object
from testbed.registry import Registry

_MAX_NAME = 253 - 17  # of the object: a dot and sixteen characters follow
_MAX_TOLD = 8192


def event_name(obj: Object, now: str, revision: int) -> str:
    """Return ``NAME.`` and sixteen hexadecimal digits: the time in nanoseconds, as upstream has it.

    Our clock has whole seconds; the store's revision stands for the rest, so that names sort in the order of telling.
    """
    moment = int(datetime.fromisoformat(now).timestamp()) * 10**9 + revision % 10**9
    return f"{obj['metadata']['name'][:_MAX_NAME]}.{moment:016x}"


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
    now = registry.now()
    told = (str(obj["metadata"].get("uid", "")), kind, reason, message, component, field_path)
    known = registry.store.get("events", event_namespace(obj), registry.told.get(told, ""))
    try:
        if known is not None:
            count = int(known.get("count", 1)) + 1
            registry.update("events", {**known, "count": count, "lastTimestamp": now})
            return
        name = event_name(obj, now, registry.store.revision)
        event = make_event(
            obj, kind, reason, message, component, now=now, name=name, host=host, field_path=field_path
        )  # fmt: skip
        if len(registry.told) >= _MAX_TOLD:  # the oldest half: of what is told again now and then, one is soon back
            registry.told = dict(list(registry.told.items())[_MAX_TOLD // 2 :])
        registry.told[told] = registry.create("events", event)["metadata"]["name"]
    except ApiError:
        return  # its namespace is going, or someone deleted it: telling must not fail what is told about
