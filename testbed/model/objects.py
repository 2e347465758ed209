"""Kubernetes objects as JSON values, and the resources they belong to.

Objects stay plain dicts, because a cluster stores fields that we do not know. Once stored they are never changed in
place: whoever wants a change copies first (`copy.deepcopy`, or a new dict along the changed path).
"""

from __future__ import annotations

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
    """One kind of object, as API discovery describes it."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()

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


def _stored(group: str, version: str, plural: str, kind: str, *short: str, namespaced: bool = True) -> Resource:
    return Resource(group=group, version=version, plural=plural, kind=kind, namespaced=namespaced, short_names=short)


_ADMISSION = "admissionregistration.k8s.io"

RESOURCES: tuple[Resource, ...] = (
    _core("namespaces", "Namespace", "ns", subresources=("status", "finalize"), namespaced=False),
    _core("nodes", "Node", "no", subresources=("status",), namespaced=False),
    _core("pods", "Pod", "po", subresources=("status", "log", "exec", "binding"), all_=True),
    _core("services", "Service", "svc", subresources=("status",), all_=True),
    _core("endpoints", "Endpoints", "ep"),
    _core("configmaps", "ConfigMap", "cm"),
    _core("secrets", "Secret"),
    _core("serviceaccounts", "ServiceAccount", "sa"),
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
    _stored("", "v1", "persistentvolumes", "PersistentVolume", "pv", namespaced=False),
    _stored("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", "pvc"),
    _stored("", "v1", "replicationcontrollers", "ReplicationController", "rc"),
    _stored("", "v1", "resourcequotas", "ResourceQuota", "quota"),
    _stored("", "v1", "limitranges", "LimitRange", "limits"),
    _stored("", "v1", "podtemplates", "PodTemplate"),
    _stored("apps", "v1", "statefulsets", "StatefulSet", "sts"),
    _stored("apps", "v1", "controllerrevisions", "ControllerRevision"),
    _stored("batch", "v1", "cronjobs", "CronJob", "cj"),
    _stored("autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", "hpa"),
    _stored("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", "pdb"),
    _stored("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", "netpol"),
    _stored("networking.k8s.io", "v1", "servicecidrs", "ServiceCIDR", namespaced=False),
    _stored("storage.k8s.io", "v1", "storageclasses", "StorageClass", "sc", namespaced=False),
    _stored("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", "pc", namespaced=False),
    _stored("node.k8s.io", "v1", "runtimeclasses", "RuntimeClass", namespaced=False),
    _stored(_ADMISSION, "v1", "validatingwebhookconfigurations", "ValidatingWebhookConfiguration", namespaced=False),
    _stored(_ADMISSION, "v1", "mutatingwebhookconfigurations", "MutatingWebhookConfiguration", namespaced=False),
)  # fmt: skip

BY_KEY: dict[str, Resource] = {resource.key: resource for resource in RESOURCES}
BY_KIND: dict[tuple[str, str], Resource] = {(resource.api_version, resource.kind): resource for resource in RESOURCES}


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
