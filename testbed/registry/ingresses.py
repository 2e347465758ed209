"""Ingresses without a class get the cluster's default one.

Source: kubernetes plugin/pkg/admission/network/defaultingressclass/admission.go (v1.30).
"""

from __future__ import annotations

from testbed.manifests.kinds.networking import INGRESS_CLASS_ANNOTATION
from testbed.model.objects import Object
from testbed.registry.admission import AdmissionRequest
from testbed.store import Store

IS_DEFAULT = "ingressclass.kubernetes.io/is-default-class"


class DefaultIngressClass:
    """A mutator of Ingresses."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __call__(self, request: AdmissionRequest) -> None:
        """Name the default class in a new Ingress that names none; of several, the newest, then the first by name."""
        ingress = request.object
        if request.resource.key != "ingresses.networking.k8s.io" or request.operation != "CREATE" or ingress is None:
            return
        annotations = ingress["metadata"].get("annotations") or {}
        if (ingress.get("spec") or {}).get("ingressClassName") is not None or INGRESS_CLASS_ANNOTATION in annotations:
            return
        defaults = [one for one in self._store.list("ingressclasses.networking.k8s.io") if _is_default(one)]
        if defaults:
            newest = max(one["metadata"]["creationTimestamp"] for one in defaults)
            chosen = next(one for one in defaults if one["metadata"]["creationTimestamp"] == newest)
            ingress.setdefault("spec", {})["ingressClassName"] = chosen["metadata"]["name"]


def _is_default(ingress_class: Object) -> bool:
    return (ingress_class["metadata"].get("annotations") or {}).get(IS_DEFAULT) == "true"
