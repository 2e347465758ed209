"""Looks at a running lab for the doctor: its objects, each node from inside, its LAN and its DNS. Changes nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any, Protocol, TypeVar

import yaml

from testbed.dataplane.doctor import FLEETING, ArpSeen, ClusterSeen, DnsCount, DnsSeen, Finding, NodeSeen, diagnose
from testbed.dataplane.doctor.addresses import balancer_addresses
from testbed.dataplane.doctor.names import dns_pods
from testbed.errors import ApiError, TestbedError
from testbed.kernel.inspection import NodeQuestion, count_dns_answers, look_at_node
from testbed.kernel.pace import patient
from testbed.kernel.rtnetlink import mac_of
from testbed.model.objects import Object, name_of, namespace_of
from testbed.model.proxyconfig import KubeProxyConfig, parse_proxy_config
from testbed.model.topology import Topology
from testbed.probes.arp import ask_arp_for_all

T = TypeVar("T")

_RESOURCES = (
    "nodes", "services", "endpoints", "endpointslices.discovery.k8s.io", "pods", "events", "deployments.apps",
    "replicasets.apps", "daemonsets.apps", "ingresses.networking.k8s.io", "ingressclasses.networking.k8s.io",
    "servicecidrs.networking.k8s.io", "eips.network.kubesphere.io",
)  # fmt: skip
_LOOK_S = 30.0  # in one place
_ARP_S = 0.4  # answers come within milliseconds; a loaded machine takes its time
_AGAIN_AFTER_S = 1.0
_COUNT_OVER_S = 0.5  # at least: questions to DNS are counted over this long
_METRICS_PORT = 9153
_POD_BRIDGE = "cni0"


class Api(Protocol):
    """The part of `api.client.ApiClient` that is used."""

    def list(self, resource: str, namespace: str | None = None) -> tuple[list[Object], str]: ...

    def get(self, resource: str, namespace: str, name: str) -> Object: ...


class LabSeen(Protocol):
    """The part of a running lab that is used."""

    @property
    def api(self) -> Any: ...

    @property
    def topology(self) -> Topology: ...

    @property
    def iptables_backend(self) -> str: ...

    def call(self, where: str, function: Callable[..., T], *args: Any, timeout_s: float) -> T: ...


def examine(lab: LabSeen) -> tuple[tuple[Finding, ...], ClusterSeen]:
    """Return what is wrong with a lab, and what that was found in.

    What a change under way looks like too is looked at once more, a little later.

    Raises:
        TestbedError: the lab does not answer.
    """
    seen = observe(lab)
    found = diagnose(seen)
    if not any(finding.cause in FLEETING for finding in found):
        return found, seen
    time.sleep(patient(_AGAIN_AFTER_S))
    seen = observe(lab)
    before = {(finding.cause, finding.where) for finding in found}
    return tuple(f for f in diagnose(seen) if f.cause not in FLEETING or (f.cause, f.where) in before), seen


def observe(lab: LabSeen) -> ClusterSeen:
    """Look once at everything that the detectors want to know."""
    api: Api = lab.api
    pods = tuple(api.list("pods")[0])
    dns_first = {_full_name(pod): _count_dns(lab, pod) for pod in dns_pods(pods)}
    began = time.monotonic()
    # Nodes first and objects after: a rule that is there before its Service is listed is no fault, and is rare the other way.
    config = _proxy_config(api)
    nodes_seen = {node.name: _look_at(lab, node.name, config) for node in lab.topology.nodes}
    objects = {resource: _list(api, resource) for resource in _RESOURCES}
    arp_seen = _ask_lan(lab, balancer_addresses(objects["services"]))
    if dns_first:
        time.sleep(max(0.0, _COUNT_OVER_S - (time.monotonic() - began)))
    dns_seen = [_joined(dns_first[_full_name(pod)], _count_dns(lab, pod)) for pod in dns_pods(pods)]
    return ClusterSeen(
        topology=lab.topology, config=config, objects=objects, nodes_seen=nodes_seen, dns_seen=tuple(dns_seen),
        arp_seen=arp_seen,
    )  # fmt: skip


def _list(api: Api, resource: str) -> tuple[Object, ...]:
    try:
        return tuple(api.list(resource)[0])
    except ApiError as error:
        if error.code != 404:  # a kind that nobody has defined
            raise
        return ()


def _proxy_config(api: Api) -> KubeProxyConfig:
    """Return what kube-proxy's ConfigMap says now; a broken one counts as empty, as its pods say themselves."""
    text = ""
    with contextlib.suppress(ApiError):
        text = str((api.get("configmaps", "kube-system", "kube-proxy").get("data") or {}).get("config.conf") or "")
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError:
        document = None
    config, _ = parse_proxy_config(document if isinstance(document, dict) else {})
    return config


def _look_at(lab: LabSeen, node: str, config: KubeProxyConfig) -> NodeSeen:
    spec = lab.topology.node(node)
    question = NodeQuestion(
        interface=spec.interface, bridge=_POD_BRIDGE, mode=config.mode, iptables_backend=lab.iptables_backend,
        health=config.healthz_bind_address,
    )  # fmt: skip
    try:
        return lab.call(node, look_at_node, question, timeout_s=patient(_LOOK_S))
    except (TestbedError, OSError) as error:
        return NodeSeen(failure=str(error))


def _full_name(obj: Object) -> str:
    return f"{namespace_of(obj)}/{name_of(obj)}"


def _count_dns(lab: LabSeen, pod: Object) -> DnsSeen:
    """Ask a DNS pod for its counters, in the pod: what is wrong on the way to it is another fault."""
    name = _full_name(pod)
    try:
        count = lab.call(name, count_dns_answers, _METRICS_PORT, timeout_s=patient(_LOOK_S))
    except (TestbedError, OSError) as error:
        return DnsSeen(pod=name, failure=str(error))
    return DnsSeen(pod=name, counts=(count,))


def _joined(first: DnsSeen, last: DnsSeen) -> DnsSeen:
    counts: tuple[DnsCount, ...] = (*first.counts, *last.counts)
    return replace(last, counts=counts)


def _ask_lan(lab: LabSeen, addresses: Sequence[IPv4Address]) -> tuple[ArpSeen, ...]:
    """Ask for load-balancer addresses on each LAN that has some: an outside host does, or else a node."""
    topology, found = lab.topology, []
    names = {mac_of(machine.address): machine.name for machine in topology.machines}
    for network in topology.networks:
        wanted = [address for address in addresses if address in network.cidr]
        askers = [host.name for host in topology.hosts if host.network == network.name]
        askers += [node.name for node in topology.nodes if node.network == network.name]
        if not wanted or not askers:
            continue
        try:
            answers = lab.call(askers[0], ask_arp_for_all, wanted, patient(_ARP_S), timeout_s=patient(_LOOK_S))
        except (TestbedError, OSError):
            continue  # its link is down: nothing is known
        for address, said in answers.items():
            who = sorted({names.get(answer.mac, answer.mac) for answer in said})
            found.append(ArpSeen(address, tuple(who)))
    return tuple(found)
