"""What every namespace has, and the namespaces every cluster has."""

from __future__ import annotations

from collections.abc import Iterable

from testbed.controllers.pods import condition_of
from testbed.controllers.status import delete_if_there, write_status
from testbed.errors import ApiError
from testbed.model.objects import Key, Object, ResourceTable, is_terminating
from testbed.registry import Registry
from testbed.store import Event, EventType

SYSTEM_NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")


def _in_order(resources: ResourceTable) -> list[str]:
    """Return what can be in a namespace. What makes other objects goes first, and events go last: deleting makes some."""
    return sorted(
        dict.fromkeys(resource.key for resource in resources.all() if resource.namespaced),
        key=lambda key: (key == "events", key == "pods", key not in ("deployments.apps", "daemonsets.apps")),
    )


def ensure_system_namespaces(registry: Registry) -> None:
    """Create the namespaces that a new cluster has, unless they are there."""
    for name in SYSTEM_NAMESPACES:
        if registry.store.get("namespaces", "", name) is None:
            registry.create("namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})


class NamespaceController:
    """Empties namespaces that are being deleted, and lets them go when nothing is left in them."""

    watches: frozenset[str] | None = None

    def __init__(self) -> None:
        self._going: set[str] = set()

    def keys(self, event: Event) -> Iterable[Key]:
        """Return a namespace that is going, when something happened to it or left it."""
        resource, namespace, name = event.key
        if resource == "namespaces":
            if not is_terminating(event.object):
                self._going.discard(name)
                return ()
            self._going.add(name)
            return [event.key]
        if namespace in self._going and event.type is EventType.DELETED:
            return [Key("namespaces", "", namespace)]
        return ()

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Delete what is in the namespace; finalize it once that is nothing."""
        namespace = registry.store.get(*key)
        if namespace is not None and not is_terminating(namespace):
            return None
        left: dict[str, list[Object]] = {}
        for resource in _in_order(registry.resources):
            for obj in registry.store.list(resource, key.name):
                if not is_terminating(obj):
                    delete_if_there(registry, resource, key.name, obj["metadata"]["name"])
            remaining = registry.store.list(resource, key.name)
            if remaining:
                left[resource] = remaining
        if left:  # pods that are ending, finalizers: the event of the last one's removal brings us back
            if namespace is not None:
                status = namespace.get("status") or {}
                conditions = deletion_conditions(status.get("conditions") or [], left, registry.now())
                write_status(registry, key, {**status, "conditions": conditions})
            return None
        self._going.discard(key.name)
        if namespace is not None:
            registry.finalize_namespace(key.name)
        return None


def deletion_conditions(before: list[Object], left: dict[str, list[Object]], now: str) -> list[Object]:
    """Return the conditions of a namespace that cannot go yet: what is left in it, and whose finalizers hold it.

    Args:
        left: objects by resource, as `Key.resource` has it.

    Source: kubernetes pkg/controller/namespace/deletion/status_condition_utils.go (v1.30).
    """
    held: dict[str, int] = {}
    for objects in left.values():
        for obj in objects:
            for finalizer in obj["metadata"].get("finalizers") or ():
                held[finalizer] = held.get(finalizer, 0) + 1
    # "pods." is upstream's: the group follows the dot, and the core group is ''
    names = {key if "." in key else f"{key}.": len(objects) for key, objects in left.items()}
    remaining = ", ".join(f"{name} has {count} resource instances" for name, count in sorted(names.items()))
    holding = ", ".join(f"{name} in {count} resource instances" for name, count in sorted(held.items()))
    wanted = [
        ("NamespaceDeletionDiscoveryFailure", False, "ResourcesDiscovered", "All resources successfully discovered"),
        (
            "NamespaceDeletionGroupVersionParsingFailure", False, "ParsedGroupVersions",
            "All legacy kube types successfully parsed",
        ),
        (
            "NamespaceDeletionContentFailure", False, "ContentDeleted",
            "All content successfully deleted, may be waiting on finalization",
        ),
        ("NamespaceContentRemaining", True, "SomeResourcesRemain", f"Some resources are remaining: {remaining}"),
        (
            "NamespaceFinalizersRemaining", bool(held),
            "SomeFinalizersRemain" if held else "ContentHasNoFinalizers",
            f"Some content in the namespace has finalizers remaining: {holding}"
            if held
            else "All content-preserving finalizers finished",
        ),
    ]  # fmt: skip
    conditions = []
    for kind, is_true, reason, message in wanted:
        new = {"type": kind, "status": str(is_true), "reason": reason, "message": message}
        known = condition_of({"status": {"conditions": before}}, kind)
        same = known is not None and known.get("status") == new["status"]
        conditions.append({**new, "lastTransitionTime": known["lastTransitionTime"] if same and known else now})
    return conditions


class ServiceAccountController:
    """Sees to it that every namespace has the ServiceAccount ``default``, which pods name."""

    watches: frozenset[str] | None = frozenset({"namespaces", "serviceaccounts"})

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the ServiceAccount that a new namespace lacks, or that was deleted."""
        if event.key.resource == "namespaces":
            return [Key("serviceaccounts", event.key.name, "default")]
        return [event.key] if event.key.name == "default" and event.type is EventType.DELETED else ()

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Create it, unless it is there or its namespace is going."""
        namespace = registry.store.get("namespaces", "", key.namespace)
        if namespace is None or is_terminating(namespace) or registry.store.get(*key) is not None:
            return None
        metadata = {"name": key.name, "namespace": key.namespace}
        try:
            registry.create(key.resource, {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        return None


ROOT_CERTIFICATES = "kube-root-ca.crt"


class RootCertificatePublisher:
    """Sees to it that every namespace has the ConfigMap with the certificate of the cluster's authority.

    Source: kubernetes pkg/controller/certificates/rootcacertpublisher (v1.30).
    """

    watches: frozenset[str] | None = frozenset({"namespaces", "configmaps"})

    def __init__(self, authority: str) -> None:
        self._authority = authority

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the ConfigMap that a new namespace lacks, or that somebody changed or deleted."""
        if event.key.resource == "namespaces":
            return [Key("configmaps", event.key.name, ROOT_CERTIFICATES)]
        return [event.key] if event.key.name == ROOT_CERTIFICATES else ()

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Create or restore it, unless its namespace is going."""
        namespace = registry.store.get("namespaces", "", key.namespace)
        if namespace is None or is_terminating(namespace):
            return None
        data = {"ca.crt": self._authority}
        current = registry.store.get(*key)
        if current is not None:
            if current.get("data") != data:
                registry.update(key.resource, {**current, "data": data})
            return None
        metadata = {
            "name": key.name,
            "namespace": key.namespace,
            "annotations": {
                "kubernetes.io/description": "Contains a CA bundle that can be used to verify the kube-apiserver when "
                "using internal endpoints such as the internal service IP or kubernetes.default.svc. No other usage is "
                "guaranteed across distributions of Kubernetes clusters."
            },
        }
        registry.create(key.resource, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
        return None
