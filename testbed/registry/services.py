"""Services: addresses and node ports taken, kept and given back; what a change of type keeps and clears.

Source: kubernetes pkg/registry/core/service/storage/{storage,alloc}.go, strategy.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address

from testbed.errors import ApiError, Cause, PoolExhausted
from testbed.manifests.kinds.causes import Causes
from testbed.manifests.kinds.service import (
    is_headless,
    needs_cluster_ip,
    needs_health_check_port,
    needs_node_port,
    validate_cluster_ips,
)
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Object, Resource
from testbed.registry.allocators import (
    AlreadyAllocated,
    Claim,
    OutOfRange,
    address_text,
    cluster_ip_pool,
    node_port_pool,
)
from testbed.registry.errors import invalid
from testbed.registry.strategies import Strategy


class ServiceStrategy(Strategy):
    """The one kind with allocated fields."""

    def __init__(self, resource: Resource, config: ClusterConfig, pick: Callable[[int], int]) -> None:
        super().__init__(resource, config, pick)
        self._addresses = cluster_ip_pool(config.service_cidr, pick)
        self._ports = node_port_pool(config.node_port_range, pick)

    # --- fields that follow the type ---------------------------------------------------------------------------------

    def prepare_for_create(self, new: Object) -> None:
        super().prepare_for_create(new)
        new["status"] = {"loadBalancer": {}}
        spec = new["spec"]
        if spec.get("clusterIP") and not spec.get("clusterIPs"):
            spec["clusterIPs"] = [spec["clusterIP"]]

    def prepare_for_update(self, old: Object, new: Object) -> None:
        super().prepare_for_update(old, new)
        was, now = old["spec"], new["spec"]
        _keep_allocated(was, now)
        _settle_cluster_ips(was, now)
        _drop_what_the_type_has_not(was, now)
        if was.get("type") == "LoadBalancer" != now.get("type"):
            # Upstream leaves this to the cloud's controller; there is none here that could.
            new["status"] = {**new.get("status", {}), "loadBalancer": {}}

    def validate_update(self, old: Object, new: Object) -> list[Cause]:
        causes = Causes()
        was, now = old["spec"], new["spec"]
        if "ExternalName" not in (was.get("type"), now.get("type")) and not (is_headless(was) and is_headless(now)):
            _validate_kept(was.get("clusterIPs") or [], now.get("clusterIPs") or [], "clusterIPs", "clusterIP", causes)
            _validate_kept(was.get("ipFamilies") or [], now.get("ipFamilies") or [], "ipFamilies", "ipFamily", causes)
        both_balanced = was.get("type") == now.get("type") == "LoadBalancer"
        if both_balanced and was.get("loadBalancerClass") != now.get("loadBalancerClass"):
            causes.invalid("spec.loadBalancerClass", now.get("loadBalancerClass"), "may not change once set")
        both_checked = needs_health_check_port(was) and needs_health_check_port(now)
        if both_checked and was.get("healthCheckNodePort") != now.get("healthCheckNodePort"):
            causes.forbidden("spec.healthCheckNodePort", "field is immutable")
        return causes

    # --- allocation --------------------------------------------------------------------------------------------------

    def allocate(self, old: Object | None, new: Object) -> Callable[[], None]:
        """Take what ``new`` needs and ``old`` had not. The allocator's refusals come before any other (as upstream)."""
        name = str(new["metadata"].get("name", ""))
        was, now = old["spec"] if old else {"type": "ExternalName"}, new["spec"]
        self._settle_families(was, now, name)
        addresses, ports = Claim(self._addresses), Claim(self._ports)
        self._allocate_addresses(was, now, name, addresses)
        self._allocate_node_ports(was, now, name, ports)
        self._allocate_health_port(was, now, name, ports)

        def commit() -> None:
            addresses.commit()
            ports.commit()

        return commit

    def release(self, last: Object) -> None:
        spec = last["spec"]
        self._addresses.used -= set(_addresses_of(spec))
        self._ports.used -= {*_node_ports_of(spec), spec.get("healthCheckNodePort", 0)}

    def _settle_families(self, was: Object, now: Object, name: str) -> None:
        """Fill ipFamilyPolicy and ipFamilies, on a cluster that has IPv4. Source: initIPFamilyFields."""
        if not needs_cluster_ip(now):
            return
        selectorless = is_headless(now) and not now.get("selector")
        if "ipFamilyPolicy" not in now:
            now["ipFamilyPolicy"] = was.get("ipFamilyPolicy") or ("RequireDualStack" if selectorless else "SingleStack")
        causes = Causes()
        validate_cluster_ips(now, causes)
        self._refuse(name, causes)
        families = list(now.get("ipFamilies") or [])
        addresses = now.get("clusterIPs") or []
        if now["ipFamilyPolicy"] == "SingleStack":
            for many, what in ((addresses, "cluster IPs"), (families, "IP families")):
                if len(many) == 2:
                    detail = f"must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified"
                    causes.invalid("spec.ipFamilyPolicy", "SingleStack", detail)
        for index, address in enumerate(addresses):
            if address != "None" and index >= len(families):
                if ":" in address:
                    causes.invalid(f"spec.clusterIPs[{index}]", addresses, "IPv6 is not configured on this cluster")
                else:
                    families.append("IPv4")
        self._refuse(name, causes)
        if selectorless:
            # Nothing is allocated, so a cluster of one family may list both.
            families = families or ["IPv4"]
            if len(families) < 2 and now["ipFamilyPolicy"] != "SingleStack":
                families.append("IPv6" if families[0] == "IPv4" else "IPv4")
        else:
            if now["ipFamilyPolicy"] == "RequireDualStack":
                detail = "this cluster is not configured for dual-stack services"
                causes.invalid("spec.ipFamilyPolicy", now["ipFamilyPolicy"], detail)
            for index, family in enumerate(families):
                if family != "IPv4":
                    causes.invalid(f"spec.ipFamilies[{index}]", family, "not configured on this cluster")
            self._refuse(name, causes)
            families = families or ["IPv4"]
        now["ipFamilies"] = families

    def _allocate_addresses(self, was: Object, now: Object, name: str, claim: Claim) -> None:
        if not needs_cluster_ip(now):
            for address in _addresses_of(was):
                claim.free(address)
            return
        if needs_cluster_ip(was) or is_headless(now):
            return  # it has its address, or wants none
        asked = (now.get("clusterIPs") or [""])[0]
        if not asked:
            try:
                asked = address_text(claim.take_any())
            except PoolExhausted as error:
                raise internal_error(f"failed to allocate a serviceIP: {error}") from error
        else:
            why = ""
            try:
                claim.take(int(IPv4Address(asked)))
            except AlreadyAllocated:
                why = "provided IP is already allocated"
            except OutOfRange:
                why = f"the provided IP ({asked}) is not in the valid range. The range of valid IPs is {self.config.service_cidr}"
            if why:
                causes = Causes()
                causes.invalid("spec.clusterIPs", now["clusterIPs"], f"failed to allocate IP {asked}: {why}")
                self._refuse(name, causes)
        now["clusterIP"], now["clusterIPs"] = asked, [asked]

    def _allocate_node_ports(self, was: Object, now: Object, name: str, claim: Claim) -> None:
        """Give every port of a NodePort or LoadBalancer Service its node port.

        Ports of one number and several protocols share theirs. Source: initNodePorts, updateNodePorts.
        """
        held = set(_node_ports_of(was))
        wants = now.get("type") in ("NodePort", "LoadBalancer")
        ports = now.get("ports") or [] if wants else []
        chosen: dict[int, int] = {}  # port number -> node port
        mine = set(held)
        for port in ports:
            if port.get("nodePort"):
                chosen.setdefault(port.get("port", 0), port["nodePort"])
        for index, port in enumerate(ports):
            node_port = port.get("nodePort") or 0
            if node_port:
                if node_port not in mine:
                    self._take_port(node_port, f"spec.ports[{index}].nodePort", name, claim)
                    mine.add(node_port)
            elif needs_node_port(now):
                node_port = chosen.get(port.get("port", 0), 0)
                if not node_port:
                    node_port = self._any_port("a nodePort", claim)
                    mine.add(node_port)
                    chosen[port.get("port", 0)] = node_port
                port["nodePort"] = node_port
        for node_port in held - {port.get("nodePort") for port in ports}:
            claim.free(node_port)

    def _allocate_health_port(self, was: Object, now: Object, name: str, claim: Claim) -> None:
        had = was.get("healthCheckNodePort", 0)
        if not needs_health_check_port(now):
            if had:
                claim.free(had)
        elif not needs_health_check_port(was):
            asked = now.get("healthCheckNodePort", 0)
            if asked:
                self._take_port(asked, "spec.healthCheckNodePort", name, claim)
            else:
                now["healthCheckNodePort"] = self._any_port("a HealthCheck NodePort", claim)

    def _take_port(self, number: int, path: str, name: str, claim: Claim) -> None:
        low, high = self.config.node_port_range
        why = ""
        try:
            claim.take(number)
        except AlreadyAllocated:
            why = "provided port is already allocated"
        except OutOfRange:
            why = f"provided port is not in the valid range. The range of valid ports is {low}-{high}"
        if why:
            causes = Causes()
            causes.invalid(path, number, why)
            self._refuse(name, causes)

    @staticmethod
    def _any_port(what: str, claim: Claim) -> int:
        try:
            return claim.take_any()
        except PoolExhausted as error:
            raise internal_error(f"failed to allocate {what}: {error}") from error

    def _refuse(self, name: str, causes: Causes) -> None:
        if causes:
            raise invalid(self.resource, name, causes)


def internal_error(message: str) -> ApiError:
    """Return the 500 that upstream answers when a range is full."""
    return ApiError(500, "InternalError", f"Internal error occurred: {message}")


def _addresses_of(spec: Object) -> list[int]:
    return [int(IPv4Address(text)) for text in spec.get("clusterIPs") or [] if text != "None" and ":" not in text]


def _node_ports_of(spec: Object) -> list[int]:
    return [port["nodePort"] for port in spec.get("ports") or [] if port.get("nodePort")]


def _keep_allocated(was: Object, now: Object) -> None:
    """Put back allocated values that a client left out. Source: patchAllocatedValues."""
    if needs_cluster_ip(was) and needs_cluster_ip(now):
        if not now.get("clusterIP") and was.get("clusterIP"):
            now["clusterIP"] = was["clusterIP"]
        if not now.get("clusterIPs") and now.get("clusterIP") == was.get("clusterIP") and was.get("clusterIPs"):
            now["clusterIPs"] = list(was["clusterIPs"])
    if needs_node_port(was) and needs_node_port(now):
        used = set(_node_ports_of(was)) & set(_node_ports_of(now))
        by_name = {port.get("name", ""): port.get("nodePort", 0) for port in was.get("ports") or []}
        for port in now.get("ports") or []:
            kept = by_name.get(port.get("name", ""), 0)
            if not port.get("nodePort") and kept and kept not in used:
                port["nodePort"] = kept
    if needs_health_check_port(was) and needs_health_check_port(now) and not now.get("healthCheckNodePort"):
        now["healthCheckNodePort"] = was["healthCheckNodePort"]


def _settle_cluster_ips(was: Object, now: Object) -> None:
    """Let clients that know only clusterIP change it, and take clusterIPs along. Source: NormalizeClusterIPs."""
    same_list = (was.get("clusterIPs") or []) == (now.get("clusterIPs") or [])
    if now.get("clusterIP") and not now.get("clusterIPs"):
        now["clusterIPs"] = [now["clusterIP"]]
    elif same_list and was.get("clusterIP") != now.get("clusterIP"):
        if now.get("clusterIP"):
            now["clusterIPs"] = [now["clusterIP"]]
        else:
            now.pop("clusterIPs", None)


def _drop_what_the_type_has_not(was: Object, now: Object) -> None:
    """Clear what the former type needed, this one does not, and the client did not touch. Source: dropTypeDependentFields."""
    dropped: list[str] = []
    if needs_cluster_ip(was) and not needs_cluster_ip(now):
        if was.get("clusterIPs") == now.get("clusterIPs"):
            dropped += ["clusterIP", "clusterIPs"]
        dropped += [field for field in ("ipFamilies", "ipFamilyPolicy") if was.get(field) == now.get(field)]
    if needs_node_port(was) and not needs_node_port(now) and set(_node_ports_of(was)) == set(_node_ports_of(now)):
        for port in now.get("ports") or []:
            port.pop("nodePort", None)
    same = [
        (needs_health_check_port(was) and not needs_health_check_port(now), "healthCheckNodePort"),
        (_is_balanced(was) and not _is_balanced(now), "allocateLoadBalancerNodePorts"),
        (_is_balanced(was) and not _is_balanced(now), "loadBalancerClass"),
        (_has_policy(was) and not _has_policy(now), "externalTrafficPolicy"),
    ]
    dropped += [field for lost, field in same if lost and was.get(field) == now.get(field)]
    for field in dropped:
        now.pop(field, None)


def _is_balanced(spec: Object) -> bool:
    return spec.get("type") == "LoadBalancer"


def _has_policy(spec: Object) -> bool:
    return spec.get("type") in ("NodePort", "LoadBalancer") or bool(spec.get("externalIPs"))


def _validate_kept(was: list[str], now: list[str], field: str, word: str, causes: Causes) -> None:
    """Check that the first value stays. Source: validateUpgradeDowngradeClusterIPs and …IPFamilies."""
    if len(was) == len(now):
        for index, value in enumerate(was):
            if value != now[index]:
                causes.invalid(f"spec.{field}[{index}]", now, "may not change once set")
    elif not now:
        causes.invalid(f"spec.{field}[0]", now, f"primary {word} can not be unset")
    elif was and was[0] != now[0]:
        causes.invalid(f"spec.{field}[0]", now, "may not change once set")
