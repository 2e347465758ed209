"""What one reconcile of the controller does: for a Service, and for an Eip.

An allocated Service keeps its address as long as nothing names another one: neither a pool that becomes the better choice
nor a pool that is disabled moves it. (Upstream chooses again at each reconcile.)

Source: openelb v0.6 pkg/controllers/{lb,ipam}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from testbed.controllers.openelb.names import (
    EIP_FINALIZER,
    EIP_NAME,
    EIPS,
    FIXED_IP,
    GROUP,
    OPT_IN,
    OPT_IN_VALUE,
    SERVICE_FINALIZER,
)
from testbed.controllers.openelb.pools import (
    NotAllocated,
    Pool,
    Wish,
    allocate_address,
    choose_pool,
    keep_services,
    parse_pool,
    release_address,
    status_of,
)
from testbed.model.objects import Object, is_terminating, labels_of, name_of, namespace_of


@dataclass(frozen=True, slots=True)
class Told:
    """An event: ``kind`` is Normal or Warning."""

    kind: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePlan:
    """What is to be written, in this order: the Eips' statuses, the Service's metadata, its ingress, events.

    ``metadata`` is a merge patch of metadata, ``ingress`` the new status.loadBalancer.ingress; None: they stay as they are.
    With ``retry`` it is to be tried again although nothing changed.
    """

    pools: tuple[Pool, ...] = ()
    metadata: Object | None = None
    ingress: list[Object] | None = None
    events: tuple[Told, ...] = ()
    retry: bool = False

    @property
    def is_empty(self) -> bool:
        return not (self.pools or self.metadata or self.ingress is not None or self.events or self.retry)


def key_of(service: Object) -> str:
    """Return a Service as Eip.status.used names it."""
    return f"{namespace_of(service)}/{name_of(service)}"


def opts_in(service: Object) -> bool:
    """Say whether a Service is to have an address of OpenELB."""
    annotations = service["metadata"].get("annotations") or {}
    return (
        service.get("spec", {}).get("type") == "LoadBalancer"
        and annotations.get(OPT_IN) == OPT_IN_VALUE
        and not is_terminating(service)
    )


def is_ours(service: Object) -> bool:
    """Say whether the controller has anything to do with a Service: it opts in, or it carries our marks."""
    metadata = service["metadata"]
    has_marks = EIP_NAME in labels_of(service) or SERVICE_FINALIZER in (metadata.get("finalizers") or ())
    return opts_in(service) or has_marks


def wish_of(service: Object) -> Wish:
    """Return what a Service asks for. The annotation overrides spec.loadBalancerIP."""
    annotations = service["metadata"].get("annotations") or {}
    spec = service["spec"]
    return Wish(
        service=key_of(service),
        pool=annotations.get(EIP_NAME) or "",
        address=annotations.get(FIXED_IP, spec.get("loadBalancerIP") or ""),
        families=tuple(spec.get("ipFamilies") or ("IPv4",)),
    )


def plan_service(service: Object, eips: Sequence[Object], namespaces: Mapping[str, Object]) -> ServicePlan:
    """Return what makes a Service have the address that it should have, or none.

    Args:
        eips: all there are, sorted by name.
        namespaces: by name.
    """
    key = key_of(service)
    pools = [pool for eip in eips if (pool := parse_pool(eip)) is not None]
    held = [pool for pool in pools if not pool.is_deleting and pool.address_of(key)]
    if not opts_in(service):
        return _release(service, held)
    wish = wish_of(service)
    namespace = namespace_of(service)
    current = held[0] if len(held) == 1 else None
    if current is not None and _is_served(wish, current, key):
        return _complete(service, current, current.address_of(key))
    released = [release_address(key, pool) for pool in held]
    events = [_released(pool.address_of(key)) for pool in held]
    if not held and (stale := _ingress_of(service)):  # its Eip is gone
        events.append(_released(stale))
    without = {pool.name: pool for pool in released}
    pools = [without.get(pool.name, pool) for pool in pools]
    try:
        labels = labels_of(namespaces.get(namespace, {"metadata": {}}))
        name = choose_pool(wish, pools, namespace, labels)
    except NotAllocated as error:
        text = f"failed to construct allocate request: {error}"
        return _without_address(service, released, (*events, Told("Warning", "ConstructRequest", text)))
    try:
        chosen = next((pool for pool in pools if pool.name == name), None)
        if chosen is None:
            raise NotAllocated(f'Eip.{GROUP} "{name}" not found')
        address, taken = allocate_address(wish, chosen)
    except NotAllocated as error:
        return _without_address(service, released, (*events, Told("Warning", "AssignIPFailed", str(error))))
    changed = tuple({**without, taken.name: taken}.values())
    events.append(Told("Normal", "AssignIP", f"success to assign ip: {address}"))
    return ServicePlan(
        pools=changed, metadata=_marks(service, taken.name), ingress=_new_ingress(service, address), events=tuple(events)
    )  # fmt: skip


def _is_served(wish: Wish, pool: Pool, key: str) -> bool:
    return wish.pool in ("", pool.name) and wish.address in ("", pool.address_of(key))


def _complete(service: Object, pool: Pool, address: str) -> ServicePlan:
    """Return what is missing of an allocation that was recorded: its writer was interrupted, or somebody changed things."""
    metadata, ingress = _marks(service, pool.name), _new_ingress(service, address)
    if metadata is None and ingress is None:
        return ServicePlan()
    return ServicePlan(
        metadata=metadata, ingress=ingress, events=(Told("Normal", "AssignIP", f"success to assign ip: {address}"),)
    )


def _release(service: Object, held: Sequence[Pool]) -> ServicePlan:
    key, given = key_of(service), _ingress_of(service)
    addresses = [pool.address_of(key) for pool in held] or ([given] if given and is_ours(service) else [])
    return ServicePlan(
        pools=tuple(release_address(key, pool) for pool in held),
        metadata=_no_marks(service),
        ingress=[] if given and is_ours(service) else None,
        events=tuple(map(_released, addresses)),
    )


def _without_address(service: Object, released: Sequence[Pool], events: Iterable[Told]) -> ServicePlan:
    return ServicePlan(
        pools=tuple(released),
        metadata=_no_marks(service),
        ingress=[] if _ingress_of(service) else None,
        events=tuple(events),
        retry=True,
    )


def _released(address: str) -> Told:
    return Told("Normal", "ReleaseIP", f"success to release ip: {address}")


def _ingress_of(service: Object) -> str:
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    return ";".join(one.get("ip") or one.get("hostname") or "" for one in ingress)


def _new_ingress(service: Object, address: str) -> list[Object] | None:
    return None if _ingress_of(service) == address else [{"ip": address}]


def _marks(service: Object, pool: str) -> Object | None:
    """Return the merge patch that puts label and finalizer on a Service, or None when they are there."""
    finalizers = list(service["metadata"].get("finalizers") or ())
    if labels_of(service).get(EIP_NAME) == pool and SERVICE_FINALIZER in finalizers:
        return None
    return {"labels": {EIP_NAME: pool}, "finalizers": [*finalizers, *({SERVICE_FINALIZER} - set(finalizers))]}


def _no_marks(service: Object) -> Object | None:
    finalizers = list(service["metadata"].get("finalizers") or ())
    if EIP_NAME not in labels_of(service) and SERVICE_FINALIZER not in finalizers:
        return None
    return {"labels": {EIP_NAME: None}, "finalizers": [one for one in finalizers if one != SERVICE_FINALIZER]}


# --- Eips ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EipPlan:
    """What is to be written: the finalizers, and the status; None: they stay as they are. Then ``services`` are due."""

    finalizers: list[str] | None = None
    status: Object | None = None
    services: tuple[str, ...] = ()
    events: tuple[Told, ...] = ()


def plan_eip(eip: Object, services: Mapping[str, Object]) -> EipPlan:
    """Return what makes an Eip ready for use, or lets one go that is being deleted.

    Args:
        services: by NAMESPACE/NAME.
    """
    finalizers = list(eip["metadata"].get("finalizers") or ())
    if is_terminating(eip):
        remaining = [one for one in finalizers if one != EIP_FINALIZER]
        # Its Services lose their address before it is gone, so that nobody else can be given it meanwhile.
        users = [key for key, service in services.items() if labels_of(service).get(EIP_NAME) == name_of(eip)]
        holds = EIP_FINALIZER in finalizers
        return EipPlan(finalizers=remaining if holds else None, services=tuple(sorted(users)) if holds else ())
    added = [*finalizers, EIP_FINALIZER] if EIP_FINALIZER not in finalizers else None
    pool = parse_pool(eip)
    if pool is None:
        text = f"invalid eip address format: {(eip.get('spec') or {}).get('address')!r}; it gives out nothing"
        return EipPlan(finalizers=added, events=(Told("Warning", "add/update eip", text),))
    status = status_of(keep_services(pool, services))
    return EipPlan(finalizers=added, status=status if status != (eip.get("status") or {}) else None)


def waiting_services(services: Mapping[str, Object]) -> list[str]:
    """Return the Services that want an address and have none: those to look at when a pool has changed."""
    return sorted(key for key, service in services.items() if opts_in(service) and not _ingress_of(service))


def port_conflicts(service: Object, eips: Iterable[Object], services: Mapping[str, Object]) -> list[Told]:
    """Return warnings about ports that a Service shares with others at the same address: only one of them is reached."""
    key, found = key_of(service), []
    for pool in filter(None, map(parse_pool, eips)):
        address = pool.address_of(key)
        for other_key in pool.used.get(address, ()):
            other = services.get(other_key)
            if other is None or other_key == key:
                continue
            shared = sorted(_ports(service) & _ports(other))
            ports = ", ".join(f"{port}/{protocol}" for port, protocol in shared)
            if shared:
                text = (
                    f"address {address} is shared with {other_key}, and so is port {ports}: only one of them is reached"
                )
                found.append(Told("Warning", "PortConflict", text))
    return found


def _ports(service: Object) -> set[tuple[int, str]]:
    return {(one["port"], one.get("protocol", "TCP")) for one in service["spec"].get("ports") or ()}


__all__ = ["EIPS", "EipPlan", "ServicePlan", "Told", "key_of", "plan_eip", "plan_service", "port_conflicts"]
