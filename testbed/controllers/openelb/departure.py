"""OpenELB is deleted: what it has given out goes back.

Upstream's finalizers on Eips and Services are taken off by its controller, and by nobody else: deleted with its manifest in
one go, it is gone before them, and CRD and Services stay for ever. Here the cluster itself releases them, as soon as the
definition of Eips is going (or gone) and there is no controller that would do it.
"""

from __future__ import annotations

from collections.abc import Iterable

from testbed.controllers.events import record_event
from testbed.controllers.openelb.names import EIP_FINALIZER, EIP_NAME, EIPS, SERVICE_FINALIZER, SYSTEM_NAMESPACE
from testbed.errors import ApiError
from testbed.model.objects import DEFINITIONS, Key, Object, is_terminating, labels_of, name_of, namespace_of
from testbed.registry import Registry
from testbed.store import Event, EventType

CONTROLLER = "openelb-controller"
_KEY = Key(DEFINITIONS, "", EIPS)
_COMPONENT = "testbed"
_AGAIN_S = 0.5


class OpenElbDeparture:
    """Releases what a deleted OpenELB leaves behind."""

    watches: frozenset[str] | None = frozenset({DEFINITIONS, "deployments.apps", "namespaces", EIPS})

    def __init__(self) -> None:
        self._was_there = False

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the definition of Eips when it is going, or when the controller may be."""
        if event.key == _KEY:
            self._was_there = True
        if not self._was_there:
            return []
        going = event.type is EventType.DELETED or is_terminating(event.object)
        return [_KEY] if going else []

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Take finalizers, labels and addresses off when nobody else will."""
        definition = registry.store.get(*_KEY)
        if definition is not None and not is_terminating(definition):
            return None
        if _controller_lives(registry):
            return _AGAIN_S
        for eip in registry.store.list(EIPS):
            finalizers = eip["metadata"].get("finalizers") or []
            if EIP_FINALIZER in finalizers:
                kept = [one for one in finalizers if one != EIP_FINALIZER]
                _write(registry, EIPS, {**eip, "metadata": {**eip["metadata"], "finalizers": kept}})
        for service in registry.store.list("services"):
            if EIP_NAME in labels_of(service) or SERVICE_FINALIZER in (service["metadata"].get("finalizers") or ()):
                _release(registry, service)
        return None


def _controller_lives(registry: Registry) -> bool:
    deployment = registry.store.get("deployments.apps", SYSTEM_NAMESPACE, CONTROLLER)
    namespace = registry.store.get("namespaces", "", SYSTEM_NAMESPACE)
    return (
        deployment is not None
        and not is_terminating(deployment)
        and namespace is not None
        and not is_terminating(namespace)
    )


def _release(registry: Registry, service: Object) -> None:
    metadata = service["metadata"]
    labels = {key: value for key, value in labels_of(service).items() if key != EIP_NAME}
    kept = [one for one in metadata.get("finalizers") or () if one != SERVICE_FINALIZER]
    given = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    if given:
        _write(registry, "services", {**service, "status": {**service["status"], "loadBalancer": {}}}, "status")
        record_event(
            registry, service, "Normal", "ReleaseIP", f"success to release ip: {given[0].get('ip', '')}", _COMPONENT
        )
    current = registry.store.get("services", namespace_of(service), name_of(service))
    if current is not None:
        changed = {**current["metadata"], "labels": labels, "finalizers": kept}
        _write(registry, "services", {**current, "metadata": changed})


def _write(registry: Registry, resource: str, obj: Object, subresource: str = "") -> None:
    try:
        registry.update(resource, obj, subresource=subresource)
    except ApiError as error:
        if error.code not in (404, 409):
            raise
