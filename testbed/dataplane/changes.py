"""What a proxy knows of Services and EndpointSlices, and which service ports changed since it last looked.

Decoding is per object and kept, so a change costs what changed. Identity is meaningful: a service port or an endpoint
tuple that did not change stays the same object, which is what renderers use to keep their output.

Source: kubernetes pkg/proxy/{servicechangetracker,endpointschangetracker}.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from testbed.dataplane.state import ProxyState
from testbed.model.objects import Object, name_of, namespace_of
from testbed.model.service import (
    Endpoint,
    ServicePort,
    ServicePortName,
    SliceEndpoints,
    merge_endpoints,
    parse_endpoint_slice,
    parse_service,
    service_of_slice,
)

#: When a slice's change happened: the endpointslice controller notes it, network_programming_duration starts there.
TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"

_Name = tuple[str, str]
_T = TypeVar("_T")


class ChangeTracker:
    """Services and EndpointSlices as last heard of, on behalf of one node."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._services: dict[_Name, Object] = {}
        self._slices: dict[_Name, dict[_Name, Object]] = {}  # service -> slice -> object
        self._slice_owner: dict[_Name, _Name] = {}
        self._parsed: dict[_Name, SliceEndpoints] = {}  # of slices that did not change since they were last looked at
        self._parsed_services: dict[_Name, tuple[ServicePort, ...]] = {}
        self._triggers: list[str] = []
        self._dirty_services: set[_Name] = set()
        self._dirty_endpoints: set[_Name] = set()
        self._ports_of: dict[_Name, dict[ServicePortName, ServicePort]] = {}
        self._endpoints_of: dict[_Name, dict[ServicePortName, tuple[Endpoint, ...]]] = {}
        self._all_ports: dict[ServicePortName, ServicePort] = {}
        self._all_endpoints: dict[ServicePortName, tuple[Endpoint, ...]] = {}

    @property
    def has_changes(self) -> bool:
        return bool(self._dirty_services or self._dirty_endpoints)

    @property
    def pending(self) -> tuple[int, int]:
        """Services and endpoint lists waiting to be taken in."""
        return len(self._dirty_services), len(self._dirty_endpoints)

    def service(self, namespace: str, name: str) -> Object | None:
        """Return a Service as last heard of."""
        return self._services.get((namespace, name))

    def take_trigger_times(self) -> list[str]:
        """Return when the changes happened that the slices heard of since the last call report (RFC 3339)."""
        found, self._triggers = self._triggers, []
        return found

    def set_service(self, obj: Object) -> None:
        name = (namespace_of(obj), name_of(obj))
        self._services[name] = obj
        self._parsed_services.pop(name, None)
        self._dirty_services.add(name)

    def delete_service(self, namespace: str, name: str) -> None:
        if self._services.pop((namespace, name), None) is not None:
            self._parsed_services.pop((namespace, name), None)
            self._dirty_services.add((namespace, name))

    def set_slice(self, obj: Object) -> None:
        name, owner = (namespace_of(obj), name_of(obj)), service_of_slice(obj)
        if self._slice_owner.get(name) != owner:
            self.delete_slice(*name)  # its service-name label changed
        if owner is None:
            return
        self._slice_owner[name] = owner
        self._parsed.pop(name, None)
        if TRIGGER_TIME in (annotations := obj["metadata"].get("annotations") or {}):
            self._triggers.append(annotations[TRIGGER_TIME])
        self._slices.setdefault(owner, {})[name] = obj
        self._dirty_endpoints.add(owner)

    def delete_slice(self, namespace: str, name: str) -> None:
        owner = self._slice_owner.pop((namespace, name), None)
        if owner is not None:
            self._parsed.pop((namespace, name), None)
            del self._slices[owner][namespace, name]
            if not self._slices[owner]:
                del self._slices[owner]
            self._dirty_endpoints.add(owner)

    def replace_services(self, objects: Iterable[Object]) -> None:
        """Take a complete list: what is not in it is gone."""
        listed = {(namespace_of(obj), name_of(obj)): obj for obj in objects}
        for name in self._services.keys() - listed.keys():
            self.delete_service(*name)
        for name, obj in listed.items():
            if self._services.get(name) != obj:
                self.set_service(obj)
                self._parsed_services[name] = parse_service(obj)

    def replace_slices(self, objects: Iterable[Object]) -> None:
        """Take a complete list: what is not in it is gone."""
        listed = {(namespace_of(obj), name_of(obj)): obj for obj in objects}
        for name in self._slice_owner.keys() - listed.keys():
            self.delete_slice(*name)
        for name, obj in listed.items():
            owner = self._slice_owner.get(name)
            if owner is None or self._slices[owner].get(name) != obj:
                self.set_slice(obj)
                # Lists are decoded as they come, changes when they are taken: of several of one slice only the last counts.
                self._parsed[name] = parse_endpoint_slice(obj, self._node)

    def take(self) -> tuple[ProxyState, frozenset[ServicePortName]]:
        """Return the state now and the service ports whose Service or endpoints changed since the last call."""
        changed: set[ServicePortName] = set()
        for owner in self._dirty_services:
            service, ports = self._services.get(owner), self._parsed_services.pop(owner, None)
            if ports is None:
                ports = parse_service(service) if service is not None else ()
            after = {port.name: port for port in ports}
            _merge(self._ports_of, self._all_ports, owner, after, changed)
        for owner in self._dirty_endpoints:
            slices = self._slices.get(owner, {})
            for name, obj in slices.items():
                if name not in self._parsed:
                    self._parsed[name] = parse_endpoint_slice(obj, self._node)
            found = merge_endpoints(self._parsed[name] for name in sorted(slices))
            _merge(self._endpoints_of, self._all_endpoints, owner, found, changed)
        self._dirty_services.clear()
        self._dirty_endpoints.clear()
        state = ProxyState(services=dict(self._all_ports), endpoints=dict(self._all_endpoints))
        return state, frozenset(changed)


def _merge(
    per_owner: dict[_Name, dict[ServicePortName, _T]],
    together: dict[ServicePortName, _T],
    owner: _Name,
    after: dict[ServicePortName, _T],
    changed: set[ServicePortName],
) -> None:
    """Replace what one Service contributes, keeping the objects that are equal to their predecessors."""
    before = per_owner.pop(owner, {})
    for name in before.keys() - after.keys():
        del together[name]
        changed.add(name)
    for name, value in after.items():
        if name in before and before[name] == value:
            after[name] = before[name]
        else:
            together[name] = value
            changed.add(name)
    if after:
        per_owner[owner] = after
