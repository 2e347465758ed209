"""Kubernetes objects as JSON values, and the resources they belong to.

Objects stay plain dicts, because a cluster stores fields that we do not know. Once stored they are never changed in
place: whoever wants a change copies first (`copy.deepcopy`, or a new dict along the changed path).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Object = dict[str, Any]


class Key(NamedTuple):
    """Which object: ``resource`` is a `Resource.key`; ``namespace`` is '' for cluster-wide kinds."""

    resource: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.resource} {self.namespace}/{self.name}" if self.namespace else f"{self.resource} {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One kind of object in one version, as API discovery describes it."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    singular: str = ""  # '': the kind in lower case
    list_kind: str = ""  # '': the kind with List
    is_custom: bool = False  # defined by a CustomResourceDefinition
    #: Where /scale finds replicas wanted, replicas there are, and the selector as text ('': spec.selector.matchLabels).
    scale_paths: tuple[str, str, str] = (".spec.replicas", ".status.replicas", "")

    @property
    def singular_name(self) -> str:
        return self.singular or self.kind.lower()

    @property
    def list_name(self) -> str:
        return self.list_kind or f"{self.kind}List"

    @property
    def key(self) -> str:
        """The name used in `Key.resource`, error texts and URLs' ``details.kind``: ``services``, ``deployments.apps``."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified_kind(self) -> str:
        """The kind as kubectl's messages and Invalid errors name it: ``Service``, ``Deployment.apps``."""
        return f"{self.kind}.{self.group}" if self.group else self.kind


def _core(
    plural: str, kind: str, *short: str,
    subresources: tuple[str, ...] = (), namespaced: bool = True, all_: bool = False,
) -> Resource:  # fmt: skip
    return Resource(
        group="", version="v1", plural=plural, kind=kind, namespaced=namespaced, short_names=short,
        subresources=subresources, categories=("all",) if all_ else (),
    )  # fmt: skip


def _apps(plural: str, kind: str, short: str, *subresources: str) -> Resource:
    return Resource(
        group="apps", version="v1", plural=plural, kind=kind, short_names=(short,), categories=("all",),
        subresources=subresources,
    )  # fmt: skip


def _rbac(plural: str, kind: str, namespaced: bool) -> Resource:
    return Resource(group="rbac.authorization.k8s.io", version="v1", plural=plural, kind=kind, namespaced=namespaced)


def _stored(
    group: str, version: str, plural: str, kind: str, *short: str, namespaced: bool = True,
    subresources: tuple[str, ...] = (), all_: bool = False,
) -> Resource:  # fmt: skip
    return Resource(
        group=group, version=version, plural=plural, kind=kind, namespaced=namespaced, short_names=short,
        subresources=subresources, categories=("all",) if all_ else (),
    )  # fmt: skip


_STATUS = ("status",)
_SCALED = ("status", "scale")
_ADMISSION = "admissionregistration.k8s.io"

RESOURCES: tuple[Resource, ...] = (
    _core("namespaces", "Namespace", "ns", subresources=("status", "finalize"), namespaced=False),
    _core("nodes", "Node", "no", subresources=("status",), namespaced=False),
    _core("pods", "Pod", "po", subresources=("status", "log", "exec", "attach", "portforward", "binding", "eviction"), all_=True),
    _core("services", "Service", "svc", subresources=("status",), all_=True),
    _core("endpoints", "Endpoints", "ep"),
    _core("configmaps", "ConfigMap", "cm"),
    _core("secrets", "Secret"),
    _core("serviceaccounts", "ServiceAccount", "sa", subresources=("token",)),
    _core("events", "Event", "ev"),
    _apps("deployments", "Deployment", "deploy", "status", "scale"),
    _apps("replicasets", "ReplicaSet", "rs", "status", "scale"),
    _apps("daemonsets", "DaemonSet", "ds", "status"),
    Resource(group="discovery.k8s.io", version="v1", plural="endpointslices", kind="EndpointSlice"),
    Resource(
        group="batch", version="v1", plural="jobs", kind="Job", categories=("all",), subresources=("status",),
    ),
    Resource(
        group="networking.k8s.io", version="v1", plural="ingresses", kind="Ingress", short_names=("ing",),
        subresources=("status",),
    ),
    Resource(group="networking.k8s.io", version="v1", plural="ingressclasses", kind="IngressClass", namespaced=False),
    Resource(group="coordination.k8s.io", version="v1", plural="leases", kind="Lease"),
    _rbac("roles", "Role", True),
    _rbac("rolebindings", "RoleBinding", True),
    _rbac("clusterroles", "ClusterRole", False),
    _rbac("clusterrolebindings", "ClusterRoleBinding", False),
    # Stored and listed, so that manifests made for a real cluster apply; nothing acts on them.
    _stored("", "v1", "persistentvolumes", "PersistentVolume", "pv", namespaced=False, subresources=_STATUS),
    _stored("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", "pvc", subresources=_STATUS),
    _stored("", "v1", "replicationcontrollers", "ReplicationController", "rc", subresources=_SCALED, all_=True),
    _stored("", "v1", "resourcequotas", "ResourceQuota", "quota", subresources=_STATUS),
    _stored("", "v1", "limitranges", "LimitRange", "limits"),
    _stored("", "v1", "podtemplates", "PodTemplate"),
    _stored("apps", "v1", "statefulsets", "StatefulSet", "sts", subresources=_SCALED, all_=True),
    _stored("apps", "v1", "controllerrevisions", "ControllerRevision"),
    _stored("batch", "v1", "cronjobs", "CronJob", "cj", subresources=_STATUS, all_=True),
    _stored(
        "autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", "hpa", subresources=_STATUS, all_=True
    ),
    _stored("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", "pdb", subresources=_STATUS),
    _stored("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", "netpol"),
    _stored("networking.k8s.io", "v1", "servicecidrs", "ServiceCIDR", namespaced=False),
    _stored("storage.k8s.io", "v1", "storageclasses", "StorageClass", "sc", namespaced=False),
    _stored("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", "pc", namespaced=False),
    _stored("node.k8s.io", "v1", "runtimeclasses", "RuntimeClass", namespaced=False),
    _stored(_ADMISSION, "v1", "validatingwebhookconfigurations", "ValidatingWebhookConfiguration", namespaced=False),
    _stored(_ADMISSION, "v1", "mutatingwebhookconfigurations", "MutatingWebhookConfiguration", namespaced=False),
    Resource(
        group="apiextensions.k8s.io", version="v1", plural="customresourcedefinitions", kind="CustomResourceDefinition",
        namespaced=False, short_names=("crd", "crds"), categories=("api-extensions",), subresources=_STATUS,
    ),
)  # fmt: skip

BY_KEY: dict[str, Resource] = {resource.key: resource for resource in RESOURCES}
BY_KIND: dict[tuple[str, str], Resource] = {(resource.api_version, resource.kind): resource for resource in RESOURCES}

DEFINITIONS = "customresourcedefinitions.apiextensions.k8s.io"


class ResourceTable:
    """The resources of one cluster: those that every cluster has, and those that users have defined.

    A custom resource may be served in several versions; it is stored in one, which `get` returns.
    """

    def __init__(self) -> None:
        self._by_key = dict(BY_KEY)
        self._versions: dict[str, dict[str, Resource]] = {key: {one.version: one} for key, one in BY_KEY.items()}
        #: Counts changes; whoever keeps something that follows from the table compares it.
        self.changes = 0

    def get(self, key: str) -> Resource | None:
        """Return a resource in the version that is stored."""
        return self._by_key.get(key)

    def find(self, group: str, version: str, plural: str) -> Resource | None:
        """Return what a URL names."""
        return self._versions.get(f"{plural}.{group}" if group else plural, {}).get(version)

    def of_kind(self, api_version: str, kind: str) -> Resource | None:
        """Return the resource of an object."""
        built_in = BY_KIND.get((api_version, kind))
        if built_in is not None:
            return built_in
        return next((one for one in self.all() if one.api_version == api_version and one.kind == kind), None)

    def versions(self, key: str) -> tuple[Resource, ...]:
        """Return a resource in every version that is served, the preferred one first."""
        return tuple(self._versions.get(key, {}).values())

    def all(self) -> Iterator[Resource]:
        """Yield every resource in every version that is served."""
        for versions in self._versions.values():
            yield from versions.values()

    def keys(self) -> tuple[str, ...]:
        return tuple(self._by_key)

    def add(self, stored: Resource, served: Sequence[Resource]) -> None:
        """Add or replace a custom resource. ``served`` may be without ``stored``."""
        self._by_key[stored.key] = stored
        self._versions[stored.key] = {one.version: one for one in served}
        self.changes += 1

    def remove(self, key: str) -> None:
        """Forget a custom resource."""
        if self._by_key.pop(key, None) is not None:
            del self._versions[key]
            self.changes += 1


def name_of(obj: Object) -> str:
    return str(obj["metadata"]["name"])


def namespace_of(obj: Object) -> str:
    return str(obj["metadata"].get("namespace", ""))


def labels_of(obj: Object) -> dict[str, str]:
    return obj["metadata"].get("labels") or {}


def matches_labels(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Say whether every pair of an equality selector is among the labels. An empty selector matches everything."""
    return all(labels.get(key) == value for key, value in selector.items())


def is_terminating(obj: Object) -> bool:
    return "deletionTimestamp" in obj["metadata"]


def owner_uid(obj: Object) -> str:
    """Return the uid of the controlling owner, or ''."""
    return next((str(ref["uid"]) for ref in obj["metadata"].get("ownerReferences") or () if ref.get("controller")), "")
