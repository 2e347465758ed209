"""Pods speak to the API as a ServiceAccount: admission gives each pod its account, and the volume with the token.

Source: kubernetes plugin/pkg/admission/serviceaccount/admission.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Callable

from testbed.manifests.kinds.names import NAME_ALPHABET
from testbed.model.objects import Object
from testbed.registry.admission import AdmissionRequest
from testbed.registry.errors import forbidden
from testbed.store import Store

MOUNT_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"
_EXPIRATION_SECONDS = 3607


class ServiceAccountAdmission:
    """A mutator of pods.

    Args:
        pick: ``pick(n)`` returns a number from 0 to n-1; chance for the volume's name.
    """

    def __init__(self, store: Store, pick: Callable[[int], int]) -> None:
        self._store = store
        self._pick = pick

    def __call__(self, request: AdmissionRequest) -> None:
        """Give a new pod its account and its token; 403 when there is no such account."""
        pod = request.object
        if request.resource.key != "pods" or request.operation != "CREATE" or pod is None:
            return
        spec = pod.get("spec") or {}
        name = spec.get("serviceAccountName") or spec.get("serviceAccount") or "default"
        account = self._store.get("serviceaccounts", request.namespace, name)
        if account is None:
            why = f'error looking up service account {request.namespace}/{name}: serviceaccount "{name}" not found'
            raise forbidden(request.resource, request.name, why)
        spec["serviceAccountName"] = spec["serviceAccount"] = name
        if account.get("imagePullSecrets") and not spec.get("imagePullSecrets"):
            spec["imagePullSecrets"] = account["imagePullSecrets"]
        wanted = spec.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True))
        if wanted:
            self._mount_token(spec)

    def _mount_token(self, spec: Object) -> None:
        suffix = "".join(NAME_ALPHABET[self._pick(len(NAME_ALPHABET))] for _ in range(5))
        volume = f"kube-api-access-{suffix}"
        mount = {"name": volume, "readOnly": True, "mountPath": MOUNT_PATH}
        is_needed = False
        for container in [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]:
            mounts = container.get("volumeMounts") or []
            if not any(one.get("mountPath") == MOUNT_PATH for one in mounts):
                container["volumeMounts"] = [*mounts, dict(mount)]
                is_needed = True
        if is_needed:
            spec["volumes"] = [*(spec.get("volumes") or ()), {"name": volume, "projected": _projected()}]


def _projected() -> Object:
    namespace = {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}
    return {
        "defaultMode": 420,
        "sources": [
            {"serviceAccountToken": {"expirationSeconds": _EXPIRATION_SECONDS, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [namespace]}},
        ],
    }
