"""Faults of Services that their objects show: nobody behind them, or nobody where the traffic comes in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from testbed.dataplane.doctor.finding import Finding, listed
from testbed.dataplane.doctor.names import is_cluster_dns
from testbed.dataplane.doctor.nodes import lost_nodes
from testbed.dataplane.doctor.observations import ClusterSeen
from testbed.manifests.text import closest
from testbed.model.objects import Object, is_terminating, labels_of, matches_labels, name_of, namespace_of
from testbed.model.service import SERVICE_NAME_LABEL, is_proxied

_OVER = ("Succeeded", "Failed")
_WORKLOADS = ("deployments.apps", "replicasets.apps", "daemonsets.apps")


def find_service_faults(seen: ClusterSeen) -> Iterator[Finding]:
    """Go through the Services, and the pods that they select."""
    lost = lost_nodes(seen)
    reported: set[str] = set()
    for service in seen.list("services"):
        if (
            is_terminating(service)
            or (service.get("spec") or {}).get("type") == "ExternalName"
            or is_cluster_dns(service)
        ):
            continue
        selector = service["spec"].get("selector") or {}
        slices = [one for one in seen.list("endpointslices.discovery.k8s.io") if _owner(one) == service_name(service)]
        if selector:
            pods = _pods_of(seen, service)
            if not pods:
                yield _nobody_selected(seen, service)
                continue
            sick = [pod for pod in pods if not _is_ready(pod) and (pod["spec"].get("nodeName") or "") not in lost]
            yield from (_not_ready(seen, pod) for pod in sick if _full_name(pod) not in reported)
            reported.update(map(_full_name, sick))
            if any(map(_is_ready, pods)) and not _ready_nodes(slices):
                yield from _no_port(service, pods)
        elif not any(one.get("endpoints") for one in slices) and not _has_endpoints(seen, service):
            yield Finding(
                cause="no-endpoints", where=f"svc {service_name(service)}",
                what="has no selector, and nobody has made Endpoints or an EndpointSlice for it: who asks is refused",
                do="give it a selector, or an EndpointSlice with the label kubernetes.io/service-name",
                about=(service_name(service),),
            )  # fmt: skip
        yield from _local_faults(seen, service, slices, lost)


def service_name(service: Object) -> str:
    return f"{namespace_of(service)}/{name_of(service)}"


def _full_name(obj: Object) -> str:
    return f"{namespace_of(obj)}/{name_of(obj)}"


def _owner(one: Object) -> str:
    return f"{namespace_of(one)}/{labels_of(one).get(SERVICE_NAME_LABEL, '')}"


def _has_endpoints(seen: ClusterSeen, service: Object) -> bool:
    return any(
        _full_name(one) == service_name(service) and any(part.get("addresses") for part in one.get("subsets") or ())
        for one in seen.list("endpoints")
    )


def _pods_of(seen: ClusterSeen, service: Object) -> list[Object]:
    return [
        pod
        for pod in seen.list("pods")
        if namespace_of(pod) == namespace_of(service)
        and matches_labels(service["spec"]["selector"], labels_of(pod))
        and not is_terminating(pod)
        and (pod.get("status") or {}).get("phase") not in _OVER
    ]


def _is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)


# -- nobody there ------------------------------------------------------------------------------------------------------


def _nobody_selected(seen: ClusterSeen, service: Object) -> Finding:
    name, selector = service_name(service), service["spec"]["selector"]
    shown = ",".join(f"{key}={value}" for key, value in sorted(selector.items()))
    workloads = [
        workload
        for resource in _WORKLOADS
        for workload in seen.list(resource)
        if namespace_of(workload) == namespace_of(service)
    ]
    idle = [w for w in workloads if matches_labels(selector, labels_of(w["spec"].get("template") or {"metadata": {}}))]
    if idle:
        first = idle[0]
        what = f"the selector {shown} matches no pod: {first.get('kind', 'workload')} {name_of(first)} has none"
        do = f"kubectl -n {namespace_of(service)} scale deployment {name_of(first)} --replicas=1, or see its events"
    else:
        meant = _meant(seen, service, workloads)
        what = f"the selector {shown} matches no pod of {namespace_of(service)}" + (
            f"; pods have {meant}" if meant else ""
        )
        fixed = f", for example to {meant}" if meant else ""
        do = f"correct spec.selector{fixed}: kubectl -n {namespace_of(service)} edit svc {name_of(service)}"
    return Finding(
        cause="no-endpoints", where=f"svc {name}", what=f"{what}: it has no endpoints, and who asks is refused", do=do,
        about=(name,),
    )  # fmt: skip


def _meant(seen: ClusterSeen, service: Object, workloads: Sequence[Object]) -> str:
    """Return the labels that look most like the selector, as text; '' when none do."""
    pods = [labels_of(pod) for pod in seen.list("pods") if namespace_of(pod) == namespace_of(service)]
    templates = [labels_of(w["spec"].get("template") or {"metadata": {}}) for w in workloads]
    known = {f"{key}={value}" for labels in (*pods, *templates) for key, value in labels.items()}
    found = []
    for key, value in sorted(service["spec"]["selector"].items()):
        pair = f"{key}={value}"
        if pair not in known and (close := closest(pair, sorted(known))):
            found.append(close)
    return ",".join(found)


def _not_ready(seen: ClusterSeen, pod: Object) -> Finding:
    name = _full_name(pod)
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    waiting = [state["waiting"] for one in statuses if (state := one.get("state") or {}).get("waiting")]
    unhealthy = [
        event.get("message", "")
        for event in seen.list("events")
        if (event.get("involvedObject") or {}).get("name") == name_of(pod)
        and (event.get("involvedObject") or {}).get("namespace") == namespace_of(pod)
        and event.get("reason") in ("Unhealthy", "FailedScheduling", "Failed")
    ]
    if waiting:
        why = f"a container waits: {waiting[0].get('reason', '')} {waiting[0].get('message', '')}".strip()
    elif not pod["spec"].get("nodeName"):
        why = "it is on no node"
    else:
        why = "it runs, and is not ready"
    said = f" ({_one_line(unhealthy[-1])})" if unhealthy else ""
    services = tuple(
        service_name(service)
        for service in seen.list("services")
        if namespace_of(service) == namespace_of(pod)
        and (selector := (service.get("spec") or {}).get("selector"))
        and matches_labels(selector, labels_of(pod))
    )
    return Finding(
        cause="not-ready", where=f"pod {name}",
        what=f"{why}{said}: it is no endpoint of {listed(services)}",
        do=f"kubectl -n {namespace_of(pod)} describe pod {name_of(pod)}: correct the readiness probe, or what it asks",
        about=services,
    )  # fmt: skip


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:160]}…"


def _no_port(service: Object, pods: Sequence[Object]) -> Iterator[Finding]:
    """Ready pods, and yet no endpoint: a targetPort by a name that no container has."""
    names = {
        port.get("name")
        for pod in pods
        for container in pod["spec"]["containers"]
        for port in container.get("ports") or ()
    }
    unknown = [
        str(port["targetPort"])
        for port in service["spec"].get("ports") or ()
        if isinstance(port.get("targetPort"), str) and port["targetPort"] not in names
    ]
    if unknown:
        yield Finding(
            cause="no-endpoints", where=f"svc {service_name(service)}",
            what=f"no container of its pods has a port called {listed(unknown)}; they have {listed(sorted(filter(None, names)))}",
            do=f"correct targetPort: kubectl -n {namespace_of(service)} edit svc {name_of(service)}",
            about=(service_name(service),),
        )  # fmt: skip


# -- nobody here -------------------------------------------------------------------------------------------------------


def _ready_nodes(slices: Sequence[Object]) -> set[str]:
    """Return the nodes of the ready endpoints; '' for those of no node."""
    return {
        str(endpoint.get("nodeName") or "")
        for one in slices
        if one.get("ports")
        for endpoint in one.get("endpoints") or ()
        if (endpoint.get("conditions") or {}).get("ready") is not False
    }


def _local_faults(
    seen: ClusterSeen, service: Object, slices: Sequence[Object], lost: frozenset[str]
) -> Iterator[Finding]:  # fmt: skip
    """With policy Local a node without an endpoint drops what comes from outside; a load balancer knows, a NodePort not."""
    spec, name = service["spec"], service_name(service)
    with_endpoints = _ready_nodes(slices)
    knows_policies = seen.config.mode != "userspace"
    if spec.get("externalTrafficPolicy") != "Local" or not (with_endpoints and is_proxied(service) and knows_policies):
        return
    without = [node.name for node in seen.topology.nodes if node.name not in with_endpoints | lost]
    entrances = {
        who
        for entry in ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
        for arp in seen.arp_seen
        if str(arp.address) == entry.get("ip")
        for who in arp.answered_by
    }
    if spec.get("type") == "LoadBalancer":
        without = [node for node in without if node in entrances]
    if without:
        yield Finding(
            cause="local-without-endpoints", where=f"svc {name}",
            what=f"externalTrafficPolicy is Local, and {listed(without)} {'has' if len(without) == 1 else 'have'} no endpoint "
            f"of it (those are on {listed(sorted(with_endpoints))}): what comes in there from outside is dropped",
            do=f"ask {listed(sorted(with_endpoints))} only, run a pod on every node (a DaemonSet), or externalTrafficPolicy: "
            "Cluster, which hides the client's address",
            about=(name,),
        )  # fmt: skip
