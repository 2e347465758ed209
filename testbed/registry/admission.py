"""Admission: the one place where a write can be changed or refused by something that is not the kind's own strategy.

::

    decode ─▶ mutators (change the object) ─▶ defaults, allocation, validation ─▶ validators, webhooks (refuse) ─▶ Store

Mutators and validators see every write. A *webhook* is what a real cluster would call over HTTPS: ours run in process,
under the webhook's name, and only while a stored ValidatingWebhookConfiguration names them and its rules match, so that
deleting the configuration switches the check off, as on a cluster. Configurations that name no webhook of ours are
stored and do nothing.
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
#: Returns why the request is denied, or None.
Webhook = Callable[[AdmissionRequest], str | None]


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
        for name in self._called(request):
            reason = self.webhooks[name](request)
            if reason is not None:
                text = f'admission webhook "{name}" denied the request: {reason}'
                raise ApiError(400, "BadRequest", text)

    def _called(self, request: AdmissionRequest) -> Iterator[str]:
        for configuration in self._store.list(CONFIGURATIONS):
            for webhook in configuration.get("webhooks") or ():
                if webhook.get("name") in self.webhooks and self._matches(webhook, request):
                    yield webhook["name"]

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
