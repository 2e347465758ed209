"""What every namespace has, and the namespaces every cluster has."""

from __future__ import annotations

from collections.abc import Iterable

from testbed.controllers.status import delete_if_there
from testbed.errors import ApiError
from testbed.model.objects import Key, ResourceTable, is_terminating
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
        left = 0
        for resource in _in_order(registry.resources):
            for obj in registry.store.list(resource, key.name):
                if not is_terminating(obj):
                    delete_if_there(registry, resource, key.name, obj["metadata"]["name"])
            left += len(registry.store.list(resource, key.name))
        if left:
            return None  # pods that are ending, finalizers: the event of the last one's removal brings us back
        self._going.discard(key.name)
        if namespace is not None:
            registry.finalize_namespace(key.name)
        return None


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
