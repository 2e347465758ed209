"""Which nodes a pod may run on, and why not on the others. Pure.

Source: kubernetes component-helpers/scheduling/corev1, pkg/scheduler/framework/plugins (v1.30).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from testbed.controllers.pods import condition_of
from testbed.model.objects import Object, labels_of

UNSCHEDULABLE = "node(s) were unschedulable"
AFFINITY = "node(s) didn't match Pod's node affinity/selector"
PORTS = "node(s) didn't have free ports for the requested pod ports"
FULL = "Too many pods"
_UNSCHEDULABLE_TAINT = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}


@dataclass(frozen=True, slots=True)
class HostPort:
    """A port that a pod takes of its node. Address ``0.0.0.0`` is every address."""

    protocol: str
    address: str
    port: int

    def conflicts(self, other: HostPort) -> bool:
        if (self.protocol, self.port) != (other.protocol, other.port):
            return False
        return "0.0.0.0" in (self.address, other.address) or self.address == other.address


def node_taints(node: Object) -> list[Object]:
    """Return a node's taints, and those that Kubernetes' node controller would derive from its conditions.

    A node that has not said yet that it is ready counts as not ready.
    """
    taints = list(node.get("spec", {}).get("taints") or ())
    ready = (condition_of(node, "Ready") or {}).get("status", "False")
    if ready != "True":
        kind = "unreachable" if ready == "Unknown" else "not-ready"
        taints.append({"key": f"node.kubernetes.io/{kind}", "effect": "NoSchedule"})
    if (condition_of(node, "NetworkUnavailable") or {}).get("status") == "True":
        taints.append({"key": "node.kubernetes.io/network-unavailable", "effect": "NoSchedule"})
    for pressure, key in (("MemoryPressure", "memory"), ("DiskPressure", "disk"), ("PIDPressure", "pid")):
        if (condition_of(node, pressure) or {}).get("status") == "True":
            taints.append({"key": f"node.kubernetes.io/{key}-pressure", "effect": "NoSchedule"})
    return taints


def tolerates(tolerations: Iterable[Object], taint: Object) -> bool:
    """Say whether one of the tolerations covers a taint. An empty key with Exists covers all, an empty effect any."""
    return any(_covers(toleration, taint) for toleration in tolerations)


def _covers(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") and toleration["effect"] != taint.get("effect"):
        return False
    if toleration.get("key") and toleration["key"] != taint["key"]:
        return False
    operator = toleration.get("operator") or "Equal"
    if operator == "Exists":
        return True
    # An empty key is only allowed with Exists.
    return bool(toleration.get("key")) and (toleration.get("value") or "") == (taint.get("value") or "")


def untolerated(taints: Iterable[Object], tolerations: Sequence[Object], effects: Iterable[str]) -> Object | None:
    """Return the first taint of one of the effects that is not tolerated."""
    wanted = tuple(effects)
    return next((one for one in taints if one.get("effect") in wanted and not tolerates(tolerations, one)), None)


def matches_affinity(pod_spec: Object, node: Object) -> bool:
    """Say whether a node has the labels of nodeSelector and meets the required node affinity."""
    labels = labels_of(node)
    if any(labels.get(label) != value for label, value in (pod_spec.get("nodeSelector") or {}).items()):
        return False
    affinity = (pod_spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    return required is None or any(_meets_term(term, node) for term in required.get("nodeSelectorTerms") or ())


def preference(pod_spec: Object, node: Object) -> int:
    """Return the sum of the weights of the preferred node affinities that a node meets."""
    affinity = (pod_spec.get("affinity") or {}).get("nodeAffinity") or {}
    return sum(
        preferred.get("weight", 1)
        for preferred in affinity.get("preferredDuringSchedulingIgnoredDuringExecution") or ()
        if _meets_term(preferred.get("preference") or {}, node)
    )


def _meets_term(term: Object, node: Object) -> bool:
    expressions, fields = term.get("matchExpressions") or (), term.get("matchFields") or ()
    if not expressions and not fields:
        return False  # upstream: a term that says nothing selects nothing
    by_field = {"metadata.name": node["metadata"]["name"]}
    return all(_meets(one, labels_of(node)) for one in expressions) and all(_meets(one, by_field) for one in fields)


def _meets(expression: Object, values: dict[str, str]) -> bool:
    have = values.get(expression["key"])
    operator = expression["operator"]
    wanted: list[str] = expression.get("values") or []
    if operator == "In":
        return have is not None and have in wanted
    if operator == "NotIn":
        return have is None or have not in wanted
    if operator in ("Exists", "DoesNotExist"):
        return bool((have is not None) == (operator == "Exists"))
    try:
        value, bound = int(have or ""), int(wanted[0])
    except (ValueError, IndexError):
        return False
    return value > bound if operator == "Gt" else value < bound


def host_ports(pod: Object) -> list[HostPort]:
    """Return the ports that a pod takes of its node; with hostNetwork, all that its containers name."""
    spec = pod.get("spec", {})
    return [
        HostPort(port.get("protocol") or "TCP", port.get("hostIP") or "0.0.0.0", number)
        for container in spec.get("containers") or ()
        for port in container.get("ports") or ()
        if (number := port.get("hostPort") or (port["containerPort"] if spec.get("hostNetwork") else 0))
    ]


def obstacle(
    pod: Object, node: Object, pods_there: Callable[[], Iterable[Object]], count_there: Callable[[], int]
) -> str | None:
    """Return why a pod cannot run on a node, in the scheduler's words, or None.

    Args:
        pods_there: Returns the node's unfinished pods; called when the pod wants ports of the node.
        count_there: Returns how many these are.
    """
    spec = pod.get("spec", {})
    tolerations = spec.get("tolerations") or ()
    if node.get("spec", {}).get("unschedulable") and not tolerates(tolerations, _UNSCHEDULABLE_TAINT):
        return UNSCHEDULABLE
    taint = untolerated(node_taints(node), tolerations, ("NoSchedule", "NoExecute"))
    if taint is not None:
        return f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value') or ''}}}"
    if not matches_affinity(spec, node):
        return AFFINITY
    wanted = host_ports(pod)
    if wanted:
        taken = [port for other in pods_there() for port in host_ports(other)]
        if any(mine.conflicts(theirs) for mine in wanted for theirs in taken):
            return PORTS
    allowed = str((node.get("status", {}).get("allocatable") or {}).get("pods", ""))
    # Kubelets say it in digits; a Node that somebody made by hand may not say it.
    return FULL if allowed.isdigit() and count_there() >= int(allowed) else None


def failure_message(obstacles: Sequence[str]) -> str:
    """Return what the event FailedScheduling says, given the obstacle of every node.

    >>> failure_message([AFFINITY, AFFINITY])
    "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector. preemption: 0/2 nodes are available: \
2 Preemption is not helpful for scheduling."
    """
    if not obstacles:
        return "no nodes available to schedule pods"
    # Evicting other pods would free ports and room, and nothing else; we evict nobody.
    freeable = sum(one in (PORTS, FULL) for one in obstacles)
    preemption = {
        "No preemption victims found for incoming pod": freeable,
        "Preemption is not helpful for scheduling": len(obstacles) - freeable,
    }
    none = f"0/{len(obstacles)} nodes are available"
    return f"{none}: {_counted(Counter(obstacles))}. preemption: {none}: {_counted(preemption)}."


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(sorted(f"{count} {reason}" for reason, count in reasons.items() if count))


def best_node(
    pod: Object, nodes: Sequence[Object], same_owner: Callable[[str], int], all_pods: Callable[[str], int]
) -> Object:
    """Return the node to take among those that are possible.

    Fewest PreferNoSchedule taints that the pod does not tolerate, most preferred by its node affinity, fewest pods of
    the same owner, fewest pods, first by name.
    """

    def rank(node: Object) -> tuple[int, int, int, int, str]:
        spec, name = pod.get("spec", {}), node["metadata"]["name"]
        shunned = [
            taint for taint in node.get("spec", {}).get("taints") or () if taint.get("effect") == "PreferNoSchedule"
        ]
        repelling = sum(not tolerates(spec.get("tolerations") or (), taint) for taint in shunned)
        return repelling, -preference(spec, node), same_owner(name), all_pods(name), name

    return min(nodes, key=rank)
