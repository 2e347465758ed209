"""OpenELB's validating webhook for Eips. Source: openelb v0.6 api/v1alpha2/eip_webhook.go."""

from __future__ import annotations

from collections.abc import Iterable

from testbed.controllers.openelb.names import EIPS, LAYER2, VIP
from testbed.controllers.openelb.pools import is_default, parse_pool, parse_range
from testbed.model.objects import Object, name_of
from testbed.registry.admission import AdmissionRequest, Denial
from testbed.store import Store


class EipWebhook:
    """Denies Eips that make no sense; deleting one is always allowed."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __call__(self, request: AdmissionRequest) -> Denial | None:
        """Return why an Eip is not to be stored, as controller-runtime answers: 403."""
        if request.resource.key != EIPS or request.object is None or request.operation not in ("CREATE", "UPDATE"):
            return None
        others = [eip for eip in self._store.list(EIPS) if name_of(eip) != request.name]
        reason = why_denied(request.object, request.old, others)
        return Denial.forbidden(reason) if reason else None


def why_denied(eip: Object, old: Object | None, others: Iterable[Object]) -> str:
    """Return why an Eip is refused, or ''. ``old`` is None for a new one."""
    spec = eip.get("spec") or {}
    others = list(others)
    if old is not None and spec.get("address") != (old.get("spec") or {}).get("address"):
        return "the address field is not allowed to be modified"
    if old is None:
        try:
            wanted = parse_range(str(spec.get("address") or ""))
        except ValueError:
            return "invalid eip address format"
        for other in others:
            pool = parse_pool(other)
            if pool is not None and pool.range.overlaps(wanted):
                return f"eip address overlap with {pool.name}"
    if spec.get("protocol") in (LAYER2, VIP) and not spec.get("interface"):
        return "if protocol is layer2 or vip, interface should not be empty"
    becomes_default = is_default(eip) and (old is None or _annotations(old) != _annotations(eip))
    if becomes_default and any(map(is_default, others)):
        return "already exists a default EIP"
    return ""


def _annotations(obj: Object) -> Object:
    return obj["metadata"].get("annotations") or {}
