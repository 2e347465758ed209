"""Which lists of the built-in kinds a strategic merge patch merges, and by which field of their elements.

By struct, as `manifests.kinds.fields` names them; '' is a set of plain values. Lists that are not here are replaced.
Source: the ``patchStrategy`` and ``patchMergeKey`` tags of kubernetes staging/src/k8s.io/api (v1.30).
"""

from __future__ import annotations

_CONDITIONS = {"conditions": "type"}

MERGE_KEYS: dict[str, dict[str, str]] = {
    "ObjectMeta": {"finalizers": "", "ownerReferences": "uid"},
    "PodSpec": {
        "containers": "name",
        "ephemeralContainers": "name",
        "hostAliases": "ip",
        "imagePullSecrets": "name",
        "initContainers": "name",
        "resourceClaims": "name",
        "schedulingGates": "name",
        "topologySpreadConstraints": "topologyKey",
        "volumes": "name",
    },
    "PodStatus": {"conditions": "type", "hostIPs": "ip", "podIPs": "ip"},
    "Container": {"env": "name", "ports": "containerPort", "volumeDevices": "devicePath", "volumeMounts": "mountPath"},
    "EphemeralContainer": {
        "env": "name",
        "ports": "containerPort",
        "volumeDevices": "devicePath",
        "volumeMounts": "mountPath",
    },
    "ServiceSpec": {"ports": "port"},
    "ServiceStatus": _CONDITIONS,
    "ServiceAccount": {"secrets": "name"},
    "NodeSpec": {"podCIDRs": ""},
    "NodeStatus": {"addresses": "type", "conditions": "type"},
    "NamespaceStatus": _CONDITIONS,
    "PersistentVolumeClaimStatus": _CONDITIONS,
    "ReplicationControllerStatus": _CONDITIONS,
    "DeploymentStatus": _CONDITIONS,
    "ReplicaSetStatus": _CONDITIONS,
    "DaemonSetStatus": _CONDITIONS,
    "StatefulSetStatus": _CONDITIONS,
    "JobStatus": _CONDITIONS,
    "HorizontalPodAutoscalerStatus": _CONDITIONS,
    "PodDisruptionBudgetStatus": _CONDITIONS,
    "ValidatingWebhookConfiguration": {"webhooks": "name"},
    "MutatingWebhookConfiguration": {"webhooks": "name"},
}
#: Objects that a patch replaces whole.
REPLACED: frozenset[tuple[str, str]] = frozenset({("PodDisruptionBudgetSpec", "selector")})
#: Objects of which only one field may be set: kubectl sends ``$retainKeys`` with them.
RETAINED: frozenset[tuple[str, str]] = frozenset({("DeploymentSpec", "strategy"), ("PodSpec", "volumes")})
