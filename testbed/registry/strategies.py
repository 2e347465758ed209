"""What a kind adds to creating, updating and deleting. Upstream calls this a strategy, too (pkg/registry).

A strategy changes only the decoded copy it is given, never a stored object.
"""

from __future__ import annotations

from collections.abc import Callable

from testbed.errors import Cause
from testbed.manifests import kinds
from testbed.manifests.kinds.causes import Causes, GoText
from testbed.manifests.kinds.networking import INGRESS_CLASS_ANNOTATION
from testbed.manifests.kinds.workloads import go_selector
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Object, Resource


def nothing() -> None:
    """Commit nothing: nothing was allocated."""


class Strategy:
    """The rules that all kinds share; a kind with more has a class of its own."""

    #: A change of spec makes a new generation.
    has_generation = False
    #: Something in the object is made from its uid, which it must have before the defaults.
    needs_uid = False
    #: Problems of the step from old to new come after those of the new object.
    judges_step_last = False

    def __init__(self, resource: Resource, config: ClusterConfig, pick: Callable[[int], int]) -> None:
        self.resource = resource
        self.config = config

    def accepts(self, api_version: str) -> bool:
        """Say whether objects may be written with this apiVersion."""
        return api_version == self.resource.api_version

    def decode(self, obj: Object) -> tuple[Object, list[str]]:
        """Return a copy that fits the types of the kind, and what did not fit."""
        return kinds.decode(obj)

    def default(self, new: Object) -> None:
        """Fill in the defaults of a decoded object."""
        kinds.default_in_place(new)

    def unknown_fields(self, obj: Object) -> list[str]:
        """Return the paths of fields that the kind does not have."""
        return kinds.unknown_fields(obj)

    def validate(self, new: Object) -> list[Cause]:
        """Return the problems of a decoded and defaulted object."""
        return kinds.validate_decoded(new)

    def validate_status(self, new: Object) -> list[Cause]:
        """Return the problems of an object whose status was written."""
        return kinds.validate_status(new)

    def prepare_for_create(self, new: Object) -> None:
        """Clear and set the fields that are not the client's to write."""
        if "status" in self.resource.subresources:
            new.pop("status", None)
        if self.has_generation:
            new["metadata"]["generation"] = 1

    def prepare_for_update(self, old: Object, new: Object) -> None:
        """Keep the fields that are not the client's to write."""
        if "status" in self.resource.subresources:
            new.pop("status", None)
            if "status" in old:
                new["status"] = old["status"]

    def settle_generation(self, old: Object, new: Object) -> None:
        """Count a change of the spec."""
        if self.has_generation and new.get("spec") != old.get("spec"):
            new["metadata"]["generation"] = old["metadata"].get("generation", 0) + 1

    def validate_create(self, new: Object) -> list[Cause]:
        """Return problems that only a new object can have."""
        return []

    def validate_update(self, old: Object, new: Object) -> list[Cause]:
        """Return problems of the step from old to new."""
        return []

    def allocate(self, old: Object | None, new: Object) -> Callable[[], None]:
        """Fill allocated fields of ``new``; return what makes the allocation count. Until it is called, nothing does."""
        return nothing

    def release(self, last: Object) -> None:
        """Give back what a removed object held."""


class NamespaceStrategy(Strategy):
    """Namespaces hold a finalizer of their own in spec, which only /finalize changes."""

    def prepare_for_create(self, new: Object) -> None:
        super().prepare_for_create(new)
        new["spec"] = {"finalizers": ["kubernetes"]}
        new["status"] = {"phase": "Active"}

    def prepare_for_update(self, old: Object, new: Object) -> None:
        super().prepare_for_update(old, new)
        if "spec" in old:
            new["spec"] = old["spec"]


class PodStrategy(Strategy):
    """Pods start Pending, and hardly anything of their spec may change."""

    def prepare_for_create(self, new: Object) -> None:
        qos = (new.get("status") or {}).get("qosClass", "BestEffort")
        super().prepare_for_create(new)
        new["status"] = {"phase": "Pending", "qosClass": qos}

    def validate_update(self, old: Object, new: Object) -> list[Cause]:
        causes = Causes()
        was, now = old["spec"], new["spec"]
        if len(was.get("containers") or []) != len(now.get("containers") or []):
            causes.forbidden("spec.containers", "pod updates may not add or remove containers")
            return causes
        if len(was.get("initContainers") or []) != len(now.get("initContainers") or []):
            causes.forbidden("spec.initContainers", "pod updates may not add or remove containers")
            return causes
        if was != now and _frozen_part(was, now) != _frozen_part(now, now):
            causes.forbidden("spec", POD_UPDATE_FORBIDDEN)
        if not _keeps_tolerations(was.get("tolerations") or [], now.get("tolerations") or []):
            causes.forbidden("spec.tolerations", "existing toleration can not be modified except its tolerationSeconds")
        return causes


POD_UPDATE_FORBIDDEN = (
    "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
    "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
    "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
)


def _frozen_part(spec: Object, other: Object) -> Object:
    """Return a pod's spec without what may change; ``other`` is the spec it would become.

    A node is given once: the scheduler (or whoever plays it) writes nodeName where there was none.
    """
    frozen = {key: value for key, value in spec.items() if key not in ("activeDeadlineSeconds", "tolerations")}
    for kind in ("containers", "initContainers"):
        frozen[kind] = [{**container, "image": ""} for container in spec.get(kind) or []]
    if not spec.get("nodeName"):
        frozen["nodeName"] = other.get("nodeName")
    return frozen


def _keeps_tolerations(old: list[Object], new: list[Object]) -> bool:
    def without_time(toleration: Object) -> Object:
        return {key: value for key, value in toleration.items() if key != "tolerationSeconds"}

    kept = [without_time(toleration) for toleration in new]
    return all(without_time(toleration) in kept for toleration in old)


class WorkloadStrategy(Strategy):
    """Deployments, ReplicaSets and DaemonSets: counted generations, a selector for life."""

    has_generation = True
    judges_step_last = True

    def validate_update(self, old: Object, new: Object) -> list[Cause]:
        causes = Causes()
        was, now = old.get("spec", {}).get("selector"), new.get("spec", {}).get("selector")
        if was != now:
            causes.invalid("spec.selector", GoText(go_selector(now)), "field is immutable")
        return causes


class JobStrategy(WorkloadStrategy):
    """Jobs: a selector by uid, made for them; the template is for life, too.

    Source: kubernetes pkg/registry/batch/job/strategy.go, generateSelector (v1.30).
    """

    needs_uid = True

    def prepare_for_create(self, new: Object) -> None:
        super().prepare_for_create(new)
        spec = new.get("spec", {})
        if spec.get("manualSelector") or "template" not in spec:
            return
        name, uid = new["metadata"].get("name", ""), new["metadata"]["uid"]
        metadata = spec["template"].setdefault("metadata", {})
        metadata["labels"] = {
            **(metadata.get("labels") or {}),
            "job-name": name,
            "controller-uid": uid,
            "batch.kubernetes.io/job-name": name,
            "batch.kubernetes.io/controller-uid": uid,
        }
        spec.setdefault("selector", {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}})

    def validate_update(self, old: Object, new: Object) -> list[Cause]:
        causes = Causes(super().validate_update(old, new))
        if old.get("spec", {}).get("template") != new.get("spec", {}).get("template"):
            causes.invalid("spec.template", GoText("core.PodTemplateSpec{…}"), "field is immutable")
        return causes


class DataStrategy(Strategy):
    """ConfigMaps and Secrets: ``immutable: true`` freezes the data for good."""

    def validate_update(self, old: Object, new: Object) -> list[Cause]:
        causes = Causes()
        if old.get("immutable"):
            if not new.get("immutable"):
                causes.forbidden("immutable", "field is immutable when `immutable` is set")
            for field in ("data", "binaryData"):
                if (old.get(field) or {}) != (new.get(field) or {}):
                    causes.forbidden(field, "field is immutable when `immutable` is set")
        if self.resource.key == "secrets" and old.get("type") != new.get("type"):
            causes.invalid("type", new.get("type", ""), "field is immutable")
        return causes


class IngressStrategy(Strategy):
    """Ingresses: counted generations, and one way to name the class."""

    has_generation = True

    def validate_create(self, new: Object) -> list[Cause]:
        causes = Causes()
        annotation = (new["metadata"].get("annotations") or {}).get(INGRESS_CLASS_ANNOTATION)
        if annotation is not None and (new.get("spec") or {}).get("ingressClassName") is not None:
            where = f"annotations.{INGRESS_CLASS_ANNOTATION}"
            causes.invalid(where, annotation, "can not be set when the class field is also set")
        return causes


class IngressClassStrategy(Strategy):
    """IngressClasses: counted generations, a controller for life."""

    has_generation = True

    def validate_update(self, old: Object, new: Object) -> list[Cause]:
        causes = Causes()
        if (old.get("spec") or {}).get("controller") != (new.get("spec") or {}).get("controller"):
            causes.invalid("spec.controller", (new.get("spec") or {}).get("controller", ""), "field is immutable")
        return causes


class WebhookStrategy(Strategy):
    """Webhook configurations: a change of the webhooks makes a new generation."""

    has_generation = True

    def settle_generation(self, old: Object, new: Object) -> None:
        if old.get("webhooks") != new.get("webhooks"):
            new["metadata"]["generation"] = old["metadata"].get("generation", 0) + 1


class SliceStrategy(Strategy):
    """EndpointSlices: counted generations, an address type for life."""

    has_generation = True

    def settle_generation(self, old: Object, new: Object) -> None:
        if any(old.get(field) != new.get(field) for field in ("endpoints", "ports", "addressType")):
            new["metadata"]["generation"] = old["metadata"].get("generation", 0) + 1

    def validate_update(self, old: Object, new: Object) -> list[Cause]:
        causes = Causes()
        if old.get("addressType") != new.get("addressType"):
            causes.invalid("addressType", new.get("addressType", ""), "field is immutable")
        return causes


class NodeStrategy(Strategy):
    """Nodes: a pod range is given once. The kubelet that registers a node says its status in the same write."""

    def prepare_for_create(self, new: Object) -> None:
        status = new.get("status")
        super().prepare_for_create(new)
        if status is not None:
            new["status"] = status

    def validate_update(self, old: Object, new: Object) -> list[Cause]:
        causes = Causes()
        was, now = old.get("spec") or {}, new.get("spec") or {}
        for field in ("podCIDR", "podCIDRs", "providerID"):
            if was.get(field) and was[field] != now.get(field):
                causes.forbidden("spec", "node updates may only change labels, taints, or capacity")
                break
        return causes
