"""Faults of load-balancer addresses: none given, nobody answers for one, or several do."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

from testbed.controllers.openelb.ipam import opts_in, wish_of
from testbed.controllers.openelb.names import EIPS, OPT_IN, OPT_IN_VALUE
from testbed.dataplane.doctor.finding import Finding, listed
from testbed.dataplane.doctor.observations import ArpSeen, ClusterSeen
from testbed.dataplane.doctor.services import service_name
from testbed.model.objects import Object, is_terminating, name_of, namespace_of
from testbed.model.service import parse_address

_ARP_IGNORE = "net/ipv4/conf/all/arp_ignore"


def balancer_addresses(services: tuple[Object, ...]) -> list[IPv4Address]:
    """Return the addresses that load balancers have given to Services."""
    found = (
        parse_address(entry.get("ip"))
        for service in services
        for entry in ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    )
    return sorted({address for address in found if address is not None})


def find_address_faults(seen: ClusterSeen) -> Iterator[Finding]:
    for service in seen.list("services"):
        is_balancer = (service.get("spec") or {}).get("type") == "LoadBalancer" and not is_terminating(service)
        if is_balancer and not balancer_addresses((service,)):
            yield _pending(seen, service)
    yield from (fault for arp in seen.arp_seen if (fault := _arp_fault(seen, arp)))


def _pending(seen: ClusterSeen, service: Object) -> Finding:
    name = service_name(service)
    where, about = f"svc {name}", (name,)
    if not opts_in(service):
        return Finding(
            cause="address-pending", where=where, about=about,
            what=f"EXTERNAL-IP is pending: without the annotation {OPT_IN}: {OPT_IN_VALUE} no controller gives it an address",
            do=f"kubectl -n {namespace_of(service)} annotate svc {name_of(service)} {OPT_IN}={OPT_IN_VALUE}, or another type",
        )  # fmt: skip
    wanted = wish_of(service).pool
    pools = [eip for eip in seen.list(EIPS) if not wanted or name_of(eip) == wanted]
    full = [eip for eip in pools if (status := eip.get("status") or {}).get("occupied") or _is_used_up(status)]
    if pools and len(full) == len(pools):
        shown = listed([f"{name_of(eip)} ({eip['spec'].get('address', '')})" for eip in full])
        return Finding(
            cause="pool-exhausted", where=where, about=about,
            what=f"EXTERNAL-IP is pending: every address of {shown} is taken",
            do="kubectl get eip, and svc -A; delete a Service that does not need its address, or make another Eip",
        )  # fmt: skip
    why = "is no Eip" + (f" {wanted!r}" if wanted else "") if not pools else "are addresses, and OpenELB gives none"
    return Finding(
        cause="address-pending", where=where, about=about, what=f"EXTERNAL-IP is pending: there {why}",
        do=f"kubectl get eip; kubectl -n {namespace_of(service)} describe svc {name_of(service)} shows OpenELB's events",
    )  # fmt: skip


def _is_used_up(status: Object) -> bool:
    size = int(status.get("poolSize") or 0)
    return bool(size) and int(status.get("usage") or 0) >= size


def _arp_fault(seen: ClusterSeen, arp: ArpSeen) -> Finding | None:
    of = tuple(
        service_name(service)
        for service in seen.list("services")
        if str(arp.address) in map(str, balancer_addresses((service,)))
    )
    where = f"address {arp.address}"
    if not arp.answered_by:
        return Finding(
            cause="arp-silent", where=where, about=of,
            what=f"nobody on the LAN answers ARP for the load-balancer address of {listed(of)}",
            do="kubectl -n openelb-system get pods -o wide: the speaker of the elected node announces it, with "
            "--enable-layer2=true",
        )  # fmt: skip
    if len(arp.answered_by) < 2:
        return None
    lax = [name for name in arp.answered_by if _answers_for_any(seen, name)]
    if seen.config.mode == "ipvs" and len(lax) > 1:
        configured = "is true, and kube-proxy has not been restarted" if seen.config.ipvs.strict_arp else "is false"
        return Finding(
            cause="strict-arp-off", where=where, about=of,
            what=f"{listed(arp.answered_by)} answer ARP for the load-balancer address of {listed(of)}: it is on every node's "
            f"kube-ipvs0, and ipvs.strictARP {configured}",
            do="kubectl -n kube-system edit configmap kube-proxy: ipvs.strictARP: true; then kubectl -n kube-system rollout "
            "restart daemonset kube-proxy",
        )  # fmt: skip
    return Finding(
        cause="arp-duplicate", where=where, about=of,
        what=f"{listed(arp.answered_by)} answer ARP for one load-balancer address ({listed(of)}): clients take the fastest",
        do="find who else has it: `ip -br address`, arping; an address is announced by one node only",
    )  # fmt: skip


def _answers_for_any(seen: ClusterSeen, name: str) -> bool:
    inside = seen.nodes_seen.get(name)
    return inside is not None and inside.sysctls.get(_ARP_IGNORE, "0") == "0"
