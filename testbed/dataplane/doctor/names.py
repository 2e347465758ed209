"""Faults of cluster DNS: nobody answers, or everybody asks four times."""

from __future__ import annotations

from collections.abc import Iterator

from testbed.dataplane.doctor.finding import Finding, listed
from testbed.dataplane.doctor.nodes import lost_nodes
from testbed.dataplane.doctor.observations import ClusterSeen
from testbed.model.objects import Object, is_terminating, labels_of, name_of, namespace_of

_NAMESPACE, _LABEL, _NAME = "kube-system", "k8s-app", "kube-dns"
#: A storm: so many answers in a second say that there is no such name, and they are most of all answers.
STORM_PER_S = 20.0
STORM_SHARE = 0.6


def is_cluster_dns(service: Object) -> bool:
    return (namespace_of(service), name_of(service)) == (_NAMESPACE, _NAME)


def dns_pods(pods: tuple[Object, ...]) -> list[Object]:
    """Return cluster DNS's pods."""
    return [
        pod
        for pod in pods
        if namespace_of(pod) == _NAMESPACE and labels_of(pod).get(_LABEL) == _NAME and not is_terminating(pod)
    ]


def find_dns_faults(seen: ClusterSeen) -> Iterator[Finding]:
    """Say whether cluster DNS is there, and what it is asked."""
    if not any(is_cluster_dns(service) for service in seen.list("services")):
        return
    pods = dns_pods(seen.list("pods"))
    away = lost_nodes(seen)  # that theirs do not answer is no other fault
    blamed = {f"{namespace_of(pod)}/{name_of(pod)}" for pod in pods if (pod["spec"].get("nodeName") or "") not in away}
    answering = [one for one in seen.dns_seen if not one.failure]
    silent = [f"{one.pod} ({one.failure})" for one in seen.dns_seen if one.failure and one.pod in blamed]
    if not pods or (silent and not answering):
        what = f"no pod of it answers: {listed(silent)}" if pods else "it has no pods"
        yield Finding(
            cause="dns-down", where="svc kube-system/kube-dns",
            what=f"{what}: no pod can resolve a name, addresses work as before",
            do="kubectl -n kube-system get deploy,pods -l k8s-app=kube-dns; scale deployment coredns --replicas=2, or see "
            "its logs",
        )  # fmt: skip
    elif silent:
        yield Finding(
            cause="dns-degraded", where="svc kube-system/kube-dns",
            what=f"{len(silent)} of {len(seen.dns_seen)} pods do not answer: {listed(silent)}; until they are not ready any "
            "more, some questions wait for their time-out",
            do="kubectl -n kube-system get pods -l k8s-app=kube-dns, and delete those",
        )  # fmt: skip
    yield from _storm(seen)


def _storm(seen: ClusterSeen) -> Iterator[Finding]:
    answered = not_found = 0
    per_s = 0.0
    for one in seen.dns_seen:
        if len(one.counts) < 2:
            continue
        first, last = one.counts[0], one.counts[-1]
        new = last.not_found - first.not_found
        answered += last.answered - first.answered
        not_found += new
        per_s += new / max(last.after_s - first.after_s, 0.001)
    if per_s >= STORM_PER_S and not_found >= STORM_SHARE * (answered + not_found):
        share = 100 * not_found / (answered + not_found)
        yield Finding(
            cause="ndots-storm", where="svc kube-system/kube-dns",
            what=f"{per_s:.0f} answers a second are NXDOMAIN, {share:.0f} % of all: with ndots:5 and a search list an outside "
            "name of fewer than five dots is asked for with each suffix first",
            do="write outside names with a final dot, or give those pods dnsConfig: {options: [{name: ndots, value: '1'}]}; "
            "`testbed capture` or tcpdump -n port 53 on a node shows who asks",
        )  # fmt: skip
