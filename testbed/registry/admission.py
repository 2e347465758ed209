"""Admission: the one place where a write can be changed or refused by something that is not the kind's own strategy.

::

    decode ─▶ mutators (change the object) ─▶ defaults, allocation, validation ─▶ validators, webhooks (refuse) ─▶ Store

Mutators and validators see every write. A *webhook* is what a real cluster would call over HTTPS: ours run in process,
under the webhook's name, and only while a stored ValidatingWebhookConfiguration names them and its rules match, so that
deleting the configuration switches the check off, as on a cluster. They are reached through the Service of their
clientConfig: while it has no ready endpoint, which is while no pod of the controller is ready, the call fails, and
failurePolicy says what that means. Configurations that name no webhook of ours are stored and do nothing.

Source: kubernetes apiserver pkg/admission/plugin/webhook (v1.30), pkg/util/webhook/error.go, pkg/util/proxy/proxy.go:
ResolveEndpoint (how an API server with --enable-aggregator-routing, as managed clusters have it, finds a webhook).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from testbed.errors import ApiError
from testbed.manifests.kinds.metadata import selector_matches
from testbed.model.objects import Object, Resource, labels_of
from testbed.store import Store

Operation = Literal["CREATE", "UPDATE", "DELETE"]
CONFIGURATIONS = "validatingwebhookconfigurations.admissionregistration.k8s.io"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRequest:
    """One write. ``object`` is None for DELETE, ``old`` is None for CREATE; only mutators may change ``object``."""

    operation: Operation
    resource: Resource
    namespace: str
    name: str
    object: Object | None
    old: Object | None
    subresource: str = ""
    dry_run: bool = False


#: Changes the object in place, or raises ApiError.
Mutator = Callable[[AdmissionRequest], None]
#: Raises ApiError.
Validator = Callable[[AdmissionRequest], None]


@dataclass(frozen=True, slots=True)
class Denial:
    """Why a webhook denies a request. Without a code of its own a webhook's denial is a 400 (ToStatusErr)."""

    message: str
    code: int = 400
    reason: str = "BadRequest"

    @classmethod
    def forbidden(cls, message: str) -> Denial:
        """Return the denial of a webhook made with controller-runtime: 403."""
        return cls(message, 403, "Forbidden")


#: Returns why the request is denied, or None.
Webhook = Callable[[AdmissionRequest], Denial | None]


class Admission:
    """What every write of a registry passes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.mutators: list[Mutator] = []
        self.validators: list[Validator] = []
        #: By the name of the webhook in its configuration, e.g. ``validate.nginx.ingress.kubernetes.io``.
        self.webhooks: dict[str, Webhook] = {}

    def mutate(self, request: AdmissionRequest) -> None:
        """Let mutators change the object."""
        for mutator in self.mutators:
            mutator(request)

    def validate(self, request: AdmissionRequest) -> None:
        """Raise ApiError when a validator or webhook refuses."""
        for validator in self.validators:
            validator(request)
        if not self.webhooks or request.resource.group == "admissionregistration.k8s.io":
            return  # webhooks are not asked about webhooks, as upstream
        for webhook in self._called(request):
            name = webhook["name"]
            if problem := self._unreachable(webhook):
                if webhook.get("failurePolicy") == "Ignore":
                    continue
                called = f'failed calling webhook "{name}": failed to call webhook: {problem}'
                raise ApiError(500, "InternalError", f"Internal error occurred: {called}")
            denial = self.webhooks[name](request)
            if denial is not None:
                text = f'admission webhook "{name}" denied the request: {denial.message}'
                raise ApiError(denial.code, denial.reason, text)

    def _called(self, request: AdmissionRequest) -> Iterator[Object]:
        for configuration in self._store.list(CONFIGURATIONS):
            for webhook in configuration.get("webhooks") or ():
                if webhook.get("name") in self.webhooks and self._matches(webhook, request):
                    yield webhook

    def _unreachable(self, webhook: Object) -> str:
        """Return why nobody answers at a webhook's Service, or "" when somebody does (by URL: always)."""
        client = webhook.get("clientConfig") or {}
        target = client.get("service")
        if target is None:
            return ""
        name, namespace, port = target["name"], target["namespace"], target.get("port") or 443
        reason = self._unresolved(namespace, name, port)
        if not reason:
            return ""
        path = str(target.get("path") or "/")
        path = path if path.startswith("/") else f"/{path}"
        timeout = webhook.get("timeoutSeconds") or 10
        return f'Post "https://{name}.{namespace}.svc:{port}{path}?timeout={timeout}s": {reason}'

    def _unresolved(self, namespace: str, name: str, port: int) -> str:
        service = self._store.get("services", namespace, name)
        if service is None:
            return f'service "{name}" not found'
        spec = service.get("spec") or {}
        if spec.get("type") == "ExternalName":
            return f'unsupported service type "{spec["type"]}"'
        found = next((one for one in spec.get("ports") or () if one["port"] == port), None)
        if found is None:
            return f'no service port {port} found for service "{name}"'
        for subset in (self._store.get("endpoints", namespace, name) or {}).get("subsets") or ():
            ports = subset.get("ports") or ()
            if subset.get("addresses") and any(one.get("name", "") == found.get("name", "") for one in ports):
                return ""
        return f'no endpoints available for service "{name}"'

    def _matches(self, webhook: Object, request: AdmissionRequest) -> bool:
        if not any(_rule_matches(rule, request) for rule in webhook.get("rules") or ()):
            return False
        shown = request.object or request.old or {"metadata": {}}
        if not selector_matches(webhook.get("objectSelector") or {}, labels_of(shown)):
            return False
        selector = webhook.get("namespaceSelector") or {}
        if not selector:
            return True
        name = request.name if request.resource.key == "namespaces" else request.namespace
        namespace = self._store.get("namespaces", "", name) if name else None
        return namespace is None or selector_matches(selector, labels_of(namespace))


def _rule_matches(rule: Object, request: AdmissionRequest) -> bool:
    resource = request.resource
    plural = f"{resource.plural}/{request.subresource}" if request.subresource else resource.plural
    names = {plural, "*/*"} | (
        {"*"} if not request.subresource else {f"*/{request.subresource}", f"{resource.plural}/*"}
    )
    scope = rule.get("scope") or "*"
    return (
        bool({request.operation, "*"} & set(rule.get("operations") or ()))
        and bool({resource.group, "*"} & set(rule.get("apiGroups") or ()))
        and bool({resource.version, "*"} & set(rule.get("apiVersions") or ()))
        and bool(names & set(rule.get("resources") or ()))
        and scope in ("*", "Namespaced" if resource.namespaced else "Cluster")
    )
