"""Create, update, patch and delete objects as a Kubernetes API server does, on top of the `Store`.

::

    object ─▶ decode (types, copies) ─▶ prepare (system fields) ─▶ mutate ─▶ default ─▶ allocate ─▶ validate ─▶ Store
              └──────────── the kind's `Strategy` ────────────┘      │       └────────── Strategy ─────────┘
                                                                 `Admission` mutates, and refuses at the end
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

from testbed.errors import ApiError, Cause
from testbed.manifests import kinds
from testbed.manifests.kinds.names import NAME_ALPHABET
from testbed.model.cluster import ClusterConfig
from testbed.model.json_values import merge_patch
from testbed.model.objects import DEFINITIONS, Object, Resource, ResourceTable
from testbed.registry.admission import Admission, AdmissionRequest
from testbed.registry.customs import CustomResources, being_deleted
from testbed.registry.definitions import DefinitionStrategy
from testbed.registry.errors import bad_request, forbidden, invalid, undecodable
from testbed.registry.scale import scale_of, with_scale
from testbed.registry.services import ServiceStrategy
from testbed.registry.strategies import (
    DataStrategy,
    IngressClassStrategy,
    IngressStrategy,
    JobStrategy,
    NamespaceStrategy,
    NodeStrategy,
    PodStrategy,
    SliceStrategy,
    Strategy,
    WebhookStrategy,
    WorkloadStrategy,
    nothing,
)
from testbed.store import Store, already_exists, conflict, not_found

#: Upstream's NamespaceLifecycle admission refuses to delete these.
PROTECTED_NAMESPACES = frozenset({"default", "kube-system", "kube-public"})
_STRATEGIES: dict[str, type[Strategy]] = {
    "namespaces": NamespaceStrategy,
    "nodes": NodeStrategy,
    "pods": PodStrategy,
    "services": ServiceStrategy,
    "configmaps": DataStrategy,
    "secrets": DataStrategy,
    "endpointslices.discovery.k8s.io": SliceStrategy,
    "deployments.apps": WorkloadStrategy,
    "replicasets.apps": WorkloadStrategy,
    "daemonsets.apps": WorkloadStrategy,
    "jobs.batch": JobStrategy,
    "ingresses.networking.k8s.io": IngressStrategy,
    "ingressclasses.networking.k8s.io": IngressClassStrategy,
    "validatingwebhookconfigurations.admissionregistration.k8s.io": WebhookStrategy,
    "mutatingwebhookconfigurations.admissionregistration.k8s.io": WebhookStrategy,
}
Propagation = Literal["", "Background", "Foreground", "Orphan"]
_PROPAGATION_FINALIZERS: dict[str, str] = {"Foreground": "foregroundDeletion", "Orphan": "orphan"}
_MAX_GENERATED_PREFIX = 58  # names.go: 63 less the five characters that are added
_GENERATE_ATTEMPTS = 8


class Registry:
    """The objects of one cluster, and the rules for changing them.

    Args:
        now: The time as RFC 3339 with seconds.
        pick: ``pick(n)`` returns a number from 0 to n-1; chance for generated names and dynamic allocation.
    """

    def __init__(
        self,
        store: Store,
        config: ClusterConfig,
        *,
        now: Callable[[], str],
        new_uid: Callable[[], str],
        pick: Callable[[int], int],
    ) -> None:
        self.store = store
        self.config = config
        self.now = now
        self._new_uid = new_uid
        self._pick = pick
        self.resources = ResourceTable()
        self.admission = Admission(store)
        #: What has been told in Events -> the Event's name, by which a repetition is found and counted.
        self.told: dict[tuple[str, ...], str] = {}
        self._strategies: dict[str, Strategy] = {
            resource.key: _STRATEGIES.get(resource.key, Strategy)(resource, self.config, pick)
            for resource in self.resources.all()
        }
        definitions = self.resources.get(DEFINITIONS)
        assert definitions is not None
        self._strategies[DEFINITIONS] = DefinitionStrategy(definitions, config, pick, self.resources, now)
        self.customs = CustomResources(self.resources, self._strategies, config, pick)
        store.subscribe(self.customs.definition_changed, DEFINITIONS)

    # --- reading -----------------------------------------------------------------------------------------------------

    def get(self, resource: str, namespace: str, name: str) -> Object:
        """Return the stored object itself; raise ApiError 404 with Kubernetes' text."""
        found = self.store.get(self._known(resource).key, namespace, name)
        if found is None:
            raise not_found(resource, name)
        return found

    def list(self, resource: str, namespace: str | None = None) -> list[Object]:
        """Return the objects of one namespace, or of all, sorted by namespace and name."""
        return self.store.list(self._known(resource).key, namespace)

    # --- writing -----------------------------------------------------------------------------------------------------

    def create(self, resource: str, obj: Object, *, dry_run: bool = False) -> Object:
        """Store a new object and return it as stored: defaulted, with allocated addresses and system fields.

        Raises:
            ApiError: 400, 403, 404 (namespace), 409 or 422 with Kubernetes' text; then nothing is stored.
        """
        kind = self._known(resource)
        strategy = self._strategies[resource]
        new = self._decode(kind, obj)
        metadata = new["metadata"]
        for field in (
            "uid",
            "resourceVersion",
            "creationTimestamp",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "selfLink",
        ):
            metadata.pop(field, None)
        metadata.pop("managedFields", None)
        self._settle_namespace(kind, metadata)
        generated = not metadata.get("name") and bool(metadata.get("generateName"))
        if generated:
            metadata["name"] = self._generate_name(kind, metadata)
        self._check_namespace(kind, metadata)
        name, namespace = metadata.get("name", ""), metadata.get("namespace", "")
        if name and self.store.get(resource, namespace, name) is not None:
            raise already_exists(resource, name)
        strategy.default(new)
        if strategy.needs_uid:
            metadata["uid"] = self._new_uid()
        strategy.prepare_for_create(new)
        request = AdmissionRequest(
            operation="CREATE", resource=kind, namespace=namespace, name=name, object=new, old=None, dry_run=dry_run
        )
        if self.admission.mutators:
            self.admission.mutate(request)
            strategy.default(new)
        commit = strategy.allocate(None, new)
        _refuse_if(kind, name, [*strategy.validate(new), *strategy.validate_create(new)])
        self.admission.validate(request)
        new["apiVersion"] = kind.api_version
        if dry_run:
            return {**new, "metadata": {**metadata, "uid": self._new_uid(), "creationTimestamp": self.now()}}
        commit()
        return self.store.create(resource, new)

    def update(self, resource: str, obj: Object, *, subresource: str = "", dry_run: bool = False) -> Object:
        """Replace an object and return what is stored now.

        With subresource ``status`` only the status changes; with ``""`` everything but the status; ``finalize`` (of
        namespaces) sets spec.finalizers.

        Raises:
            ApiError: 400, 404, 409 (stale resourceVersion), 422 with Kubernetes' text; then nothing is stored.
        """
        kind = self._known(resource)
        strategy = self._strategies[resource]
        if subresource and subresource not in kind.subresources:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        asked_for = subresource
        if subresource == "scale":
            obj, subresource = self._scaled(kind, obj), ""
        new = self._decode(kind, obj)
        metadata = new["metadata"]
        self._settle_namespace(kind, metadata)
        name = metadata.get("name", "")
        current = self.get(resource, metadata.get("namespace", ""), name)
        was = current["metadata"]
        if metadata.get("resourceVersion") not in (None, "", was["resourceVersion"]):
            raise conflict(resource, name)
        if metadata.get("uid") not in (None, "", was["uid"]):
            raise _wrong_precondition(resource, name, "UID", metadata["uid"], was["uid"])
        if subresource == "status":
            new = _with_status_of(current, new)
        elif subresource == "finalize":
            new = {
                **current,
                "spec": {**current.get("spec", {}), "finalizers": new.get("spec", {}).get("finalizers", [])},
            }
        else:
            for field in (
                "creationTimestamp",
                "deletionTimestamp",
                "deletionGracePeriodSeconds",
                "generateName",
                "generation",
                "selfLink",
            ):
                metadata.pop(field, None)
                if field in was:
                    metadata[field] = was[field]
            metadata.pop("managedFields", None)
            metadata["uid"], metadata["resourceVersion"] = was["uid"], was["resourceVersion"]
            strategy.default(new)
            strategy.prepare_for_update(current, new)
        request = AdmissionRequest(
            operation="UPDATE", resource=kind, namespace=metadata.get("namespace", ""), name=name, object=new,
            old=current, subresource=asked_for, dry_run=dry_run,
        )  # fmt: skip
        self.admission.mutate(request)
        if subresource:
            kinds.default_status(new)
            _refuse_if(kind, name, strategy.validate_status(new))
            commit = nothing
        else:
            commit = strategy.allocate(current, new)
            step, state = strategy.validate_update(current, new), strategy.validate(new)
            _refuse_if(kind, name, [*state, *step] if strategy.judges_step_last else [*step, *state])
            strategy.settle_generation(current, new)
        self.admission.validate(request)
        new["apiVersion"] = kind.api_version
        if dry_run:
            return new
        commit()
        stored = self.store.update(resource, new)
        return self._finish_deletion(kind, stored)

    def patch(
        self, resource: str, namespace: str, name: str, patch: Object, *, subresource: str = "", dry_run: bool = False
    ) -> Object:
        """Apply a JSON merge patch (RFC 7386) and return what is stored now. Retries nothing."""
        if not isinstance(patch, dict):
            raise bad_request("json: cannot unmarshal the patch into a JSON object")
        return self.modify(
            resource,
            namespace,
            name,
            lambda current: merge_patch(current, patch),
            subresource=subresource,
            dry_run=dry_run,
        )

    def modify(
        self,
        resource: str,
        namespace: str,
        name: str,
        change: Callable[[Object], Object],
        *,
        subresource: str = "",
        dry_run: bool = False,
    ) -> Object:
        """Store what ``change`` makes of the object (of its Scale, for ``scale``) and return what is stored now.

        ``change`` gets the stored object itself, which it must not touch; nothing can come between it and the update.
        """
        kind = self._known(resource)
        current = self.get(resource, namespace, name)
        new = change(scale_of(current, kind) if subresource == "scale" else current)
        new_metadata = new.get("metadata")
        if not isinstance(new_metadata, dict) or new_metadata.get("name") != name:
            raise bad_request("the name of the object cannot be changed by a patch")
        if (new_metadata.get("namespace") or "") != namespace:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
        return self.update(resource, new, subresource=subresource, dry_run=dry_run)

    def unknown_fields(self, resource: str, obj: Object) -> Sequence[str]:
        """Return the paths of fields in ``obj``, as a client sent it, that its kind does not have."""
        return self._strategies[resource].unknown_fields(obj)

    def delete(
        self,
        resource: str,
        namespace: str,
        name: str,
        *,
        grace_s: int | None = None,
        uid: str = "",
        resource_version: str = "",
        propagation: Propagation = "",
        dry_run: bool = False,
    ) -> Object:
        """Delete an object, or begin to: a pod gets its grace period, a namespace and finalizers hold theirs back.

        ``propagation`` Foreground and Orphan add the finalizer that the garbage collector acts on, Background takes it
        off; without one the object's own finalizers decide.

        Returns:
            The last state if it is gone, else the state that says it is terminating.

        Raises:
            ApiError: 404; 409 when ``uid`` or ``resource_version`` is given and another; 403 for namespaces that stay.
        """
        kind = self._known(resource)
        current = self.get(resource, namespace, name)
        metadata = current["metadata"]
        for given, field, words in ((uid, "uid", "UID"), (resource_version, "resourceVersion", "ResourceVersion")):
            if given and given != metadata[field]:
                raise _wrong_precondition(resource, name, words, given, metadata[field])
        finalizers = _finalizers_for(metadata.get("finalizers") or [], propagation)
        if kind.key == "namespaces":
            if name in PROTECTED_NAMESPACES:
                raise forbidden(kind, name, "this namespace may not be deleted")
            held = bool(finalizers or current.get("spec", {}).get("finalizers"))
            grace = 0
        else:
            held = bool(finalizers)
            grace = _pod_grace_s(current, grace_s) if kind.key == "pods" else 0
        self.admission.validate(
            AdmissionRequest(
                operation="DELETE",
                resource=kind,
                namespace=namespace,
                name=name,
                object=None,
                old=current,
                dry_run=dry_run,
            )
        )
        already = metadata.get("deletionGracePeriodSeconds") if "deletionTimestamp" in metadata else None
        if dry_run:
            return current
        if not held and grace == 0:
            return self._remove(kind, current)
        if already is not None and already <= grace:  # it is on its way, and no sooner end was asked for
            if finalizers == (metadata.get("finalizers") or []):
                return current
            return self.store.update(resource, {**current, "metadata": {**metadata, "finalizers": finalizers}})
        when = (datetime.fromisoformat(self.now()) + timedelta(seconds=grace)).astimezone(UTC)
        terminating = {
            **current,
            "metadata": {
                **metadata,
                "deletionTimestamp": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "deletionGracePeriodSeconds": grace,
                **({"finalizers": finalizers} if finalizers else {}),
            },
        }
        if "generation" in metadata:
            terminating["metadata"]["generation"] = metadata["generation"] + 1
        if kind.key == "namespaces":
            terminating["status"] = {**current.get("status", {}), "phase": "Terminating"}
        return self.store.update(resource, terminating)

    def finalize_namespace(self, name: str) -> Object:
        """Let a terminating namespace go: the namespace controller calls this once the namespace is empty."""
        current = self.get("namespaces", "", name)
        spec = {**current.get("spec", {}), "finalizers": []}
        return self.update("namespaces", {**current, "spec": spec}, subresource="finalize")

    # --- the rules behind --------------------------------------------------------------------------------------------

    def _decode(self, kind: Resource, obj: Object) -> Object:
        if not isinstance(obj, dict):
            raise bad_request("the object provided is not a JSON object")
        if not isinstance(obj.get("metadata"), dict):
            obj = {**obj, "metadata": {}}
        strategy = self._strategies[kind.key]
        given = (obj.get("apiVersion") or kind.api_version, obj.get("kind") or kind.kind)
        if given != (kind.api_version, kind.kind):
            if not isinstance(given[0], str) or not strategy.accepts(given[0]):
                raise bad_request(
                    f"the API version in the data ({given[0]}) does not match the expected API version ({kind.api_version})"
                )
            if given[1] != kind.kind:
                raise bad_request(
                    f"{given[1]} in version {given[0]!r} cannot be handled as a {kind.kind}: the kind does not match"
                )
        try:
            new, problems = strategy.decode({**obj, "apiVersion": given[0], "kind": kind.kind})
        except RecursionError:
            raise bad_request("the object is nested too deeply") from None
        if problems:
            raise undecodable(kind, problems[0])
        return new

    def _scaled(self, kind: Resource, scale: Object) -> Object:
        metadata = scale.get("metadata") if isinstance(scale, dict) else None
        if not isinstance(metadata, dict):
            raise bad_request("the object provided is not a Scale")
        current = self.get(kind.key, str(metadata.get("namespace", "")), str(metadata.get("name", "")))
        return with_scale(current, scale, kind)

    @staticmethod
    def _settle_namespace(kind: Resource, metadata: Object) -> None:
        if not kind.namespaced:
            metadata.pop("namespace", None)
        elif not metadata.get("namespace"):
            metadata["namespace"] = "default"

    def _known(self, resource: str) -> Resource:
        kind = self.resources.get(resource)
        if kind is None:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        return kind

    def _check_namespace(self, kind: Resource, metadata: Object) -> None:
        if kind.is_custom:
            definition = self.store.get(DEFINITIONS, "", kind.key)
            if definition is None or "deletionTimestamp" in definition["metadata"]:
                raise being_deleted(kind)
        if not kind.namespaced:
            return
        namespace = metadata["namespace"]
        found = self.store.get("namespaces", "", namespace)
        if found is None:
            raise not_found("namespaces", namespace)
        if "deletionTimestamp" in found["metadata"]:
            because = f"unable to create new content in namespace {namespace} because it is being terminated"
            cause = Cause("metadata.namespace", f"namespace {namespace} is being terminated", "NamespaceTerminating")
            raise forbidden(kind, metadata.get("name", ""), because, [cause])

    def _generate_name(self, kind: Resource, metadata: Object) -> str:
        prefix = str(metadata["generateName"])[:_MAX_GENERATED_PREFIX]
        for _ in range(_GENERATE_ATTEMPTS):
            name = prefix + "".join(NAME_ALPHABET[self._pick(len(NAME_ALPHABET))] for _ in range(5))
            if self.store.get(kind.key, metadata.get("namespace", ""), name) is None:
                break
        return name

    def _remove(self, kind: Resource, current: Object) -> Object:
        metadata = current["metadata"]
        last = self.store.delete(kind.key, metadata.get("namespace", ""), metadata["name"])
        self._strategies[kind.key].release(last)
        return last

    def _finish_deletion(self, kind: Resource, stored: Object) -> Object:
        """Remove what was only waiting for its finalizers, now that the last one is gone."""
        metadata = stored["metadata"]
        waiting = (
            "deletionTimestamp" not in metadata
            or metadata.get("finalizers")
            or metadata.get("deletionGracePeriodSeconds")
            or (kind.key == "namespaces" and stored.get("spec", {}).get("finalizers"))
        )
        return stored if waiting else self._remove(kind, stored)


def _with_status_of(current: Object, new: Object) -> Object:
    kept = {field: value for field, value in current.items() if field != "status"}
    return {**kept, "status": new["status"]} if "status" in new else kept


def _finalizers_for(finalizers: list[str], propagation: Propagation) -> list[str]:
    """Source: registry/generic/registry/store.go, deletionFinalizersForGarbageCollection (v1.30)."""
    if not propagation:
        return list(finalizers)
    others = [one for one in finalizers if one not in _PROPAGATION_FINALIZERS.values()]
    wanted = _PROPAGATION_FINALIZERS.get(propagation)
    return [*others, wanted] if wanted else others


def _wrong_precondition(resource: str, name: str, what: str, given: str, have: str) -> ApiError:
    return conflict(
        resource, name, f"Precondition failed: {what} in precondition: {given}, {what} in object meta: {have}"
    )


def _pod_grace_s(pod: Object, asked: int | None) -> int:
    """Return how long a pod may take to end. One that no kubelet runs, or that has ended, needs no time.

    Source: kubernetes pkg/registry/core/pod/strategy.go, CheckGracefulDelete (v1.30).
    """
    if not pod.get("spec", {}).get("nodeName") or pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return 0
    if asked is not None:
        return max(asked, 0)
    return int(pod["spec"].get("terminationGracePeriodSeconds", 30))


def _refuse_if(kind: Resource, name: str, causes: Sequence[Cause]) -> None:
    if causes:
        raise invalid(kind, name, causes)
