"""What the generator reads: the objects that matter to it, by name, and what belongs to whom."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address
from typing import Final

from testbed.dataplane.ingress.model import Backend, IngressKey
from testbed.dataplane.ingress.settings import Options, Settings, parse_settings
from testbed.dataplane.ingress.values import object_name
from testbed.manifests.kinds.names import parse_address
from testbed.manifests.kinds.networking import INGRESS_CLASS_ANNOTATION
from testbed.model.objects import Object, labels_of, name_of, namespace_of

INGRESSES: Final = "ingresses.networking.k8s.io"
CLASSES: Final = "ingressclasses.networking.k8s.io"
SERVICES: Final = "services"
SLICES: Final = "endpointslices.discovery.k8s.io"
SECRETS: Final = "secrets"
CONFIGMAPS: Final = "configmaps"
SERVICE_NAME_LABEL: Final = "kubernetes.io/service-name"

Name = tuple[str, str]
"""Namespace and name."""


@dataclass(slots=True)
class World:
    """The objects, by namespace and name. Whoever changes one puts a new object in its place."""

    ingresses: dict[Name, Object] = field(default_factory=dict)
    classes: dict[Name, Object] = field(default_factory=dict)
    services: dict[Name, Object] = field(default_factory=dict)
    slices: dict[Name, Object] = field(default_factory=dict)
    secrets: dict[Name, Object] = field(default_factory=dict)
    configmaps: dict[Name, Object] = field(default_factory=dict)

    @classmethod
    def of(cls, objects: Iterable[Object]) -> World:
        """Return a world of these objects; kinds that do not matter are left out."""
        world = cls()
        for obj in objects:
            table = world.table(_RESOURCES.get(obj.get("kind", ""), ""))
            if table is not None:
                table[(namespace_of(obj), name_of(obj))] = obj
        return world

    def table(self, resource: str) -> dict[Name, Object] | None:
        """Return the objects of a `Resource.key`."""
        return {
            INGRESSES: self.ingresses, CLASSES: self.classes, SERVICES: self.services, SLICES: self.slices,
            SECRETS: self.secrets, CONFIGMAPS: self.configmaps,
        }.get(resource)  # fmt: skip

    def settings(self, options: Options) -> tuple[Settings, tuple[str, ...]]:
        """Return what the controller's ConfigMap says; one that is not there says nothing."""
        namespace, _, name = options.configmap.partition("/")
        found = self.configmaps.get((namespace, name)) or {}
        return parse_settings(found.get("data") or {})

    def slices_by_service(self, only: Collection[Name] | None = None) -> dict[Name, list[Object]]:
        """Return EndpointSlices by namespace and Service (``only``: of these)."""
        found: dict[Name, list[Object]] = {}
        for (namespace, _), one in self.slices.items():
            service = labels_of(one).get(SERVICE_NAME_LABEL)
            if service and (only is None or (namespace, service) in only):
                found.setdefault((namespace, service), []).append(one)
        return found


_RESOURCES: Final = {
    "Ingress": INGRESSES,
    "IngressClass": CLASSES,
    "Service": SERVICES,
    "EndpointSlice": SLICES,
    "Secret": SECRETS,
    "ConfigMap": CONFIGMAPS,
}


@lru_cache(maxsize=65536)
def _is_object_name(text: str) -> bool:
    try:
        return bool(object_name(text))
    except ValueError:
        return False


def key_of(ingress: Object) -> IngressKey:
    return IngressKey(namespace_of(ingress), name_of(ingress))


def is_ours(ingress: Object, classes: Mapping[Name, Object], options: Options) -> bool:
    """Say whether an Ingress is for this controller (upstream: store.go, GetIngressClass, v1.10)."""
    wanted = (ingress.get("spec") or {}).get("ingressClassName")
    annotation = (ingress["metadata"].get("annotations") or {}).get(INGRESS_CLASS_ANNOTATION)
    if options.watch_namespace and namespace_of(ingress) != options.watch_namespace:
        return False
    if wanted is None:
        return bool(annotation == options.ingress_class) if annotation else options.watch_ingress_without_class
    found = classes.get(("", wanted))
    if found is not None and (found.get("spec") or {}).get("controller") == options.controller_class:
        return True
    return options.ingress_class_by_name and bool(wanted == options.ingress_class)


def our_ingresses(world: World, options: Options) -> list[Object]:
    """Return our Ingresses, oldest first, then by namespace and name: who comes first wins a conflict.

    One with a name that the API would not have taken is nobody's.
    """
    return sorted(
        (
            one
            for (namespace, name), one in world.ingresses.items()
            if is_ours(one, world.classes, options) and _is_object_name(namespace) and _is_object_name(name)
        ),
        key=lambda one: (one["metadata"].get("creationTimestamp") or "", namespace_of(one), name_of(one)),
    )


def secret_data(secret: Object | None, *keys: str) -> bytes | None:
    """Return the decoded value of the first of these keys that a Secret has."""
    data = (secret or {}).get("data") or {}
    for key in keys:
        if key in data:
            try:
                return base64.b64decode(data[key], validate=True)
            except (binascii.Error, ValueError, TypeError):
                return None
    return None


class Backends:
    """Resolves what rules name, each once; keeps the names of upstreams apart.

    ``dev-a`` + ``b`` and ``dev`` + ``a-b`` would both be called ``dev-a-b-80``; the second to come gets a number.
    """

    def __init__(self, world: World, options: Options) -> None:
        self._world = world
        self._options = options
        self._slices = world.slices_by_service()
        self._found: dict[tuple[str, str, str, bool], Backend] = {}
        self._names: dict[str, tuple[str, str, str]] = {}

    @property
    def referenced(self) -> frozenset[Name]:
        """Every Service that was asked for."""
        return frozenset((namespace, service) for namespace, service, _, _ in self._found)

    def find(self, namespace: str, reference: Object | None, *, cluster_ip: bool = False) -> Backend:
        """Return the backend of a rule's ``backend``: its ``service``, with name and port."""
        service = (reference or {}).get("service") or {}
        name = str(service.get("name") or "")
        wanted = service.get("port") or {}
        port = str(wanted.get("number") or wanted.get("name") or "")
        if not _is_object_name(name) or not _is_object_name(port):
            return Backend(name=f"{namespace}-INVALID", namespace=namespace, service="", port="", is_missing=True)
        return self.named(namespace, name, port, cluster_ip=cluster_ip)

    def first_port(self, namespace: str, name: str) -> Backend:
        """Return the backend for a Service's first port: default backends name no port."""
        ports = ((self._world.services.get((namespace, name)) or {}).get("spec") or {}).get("ports") or [{}]
        return self.named(namespace, name, str(ports[0].get("port", "")))

    def named(self, namespace: str, name: str, port: str, *, cluster_ip: bool = False) -> Backend:
        key = (namespace, name, port, cluster_ip)
        if key not in self._found:
            self._found[key] = self._resolve(namespace, name, port, cluster_ip)
        return self._found[key]

    def _resolve(self, namespace: str, name: str, port: str, cluster_ip: bool) -> Backend:
        shown = self._name(namespace, name, port)
        missing = Backend(name=shown, namespace=namespace, service=name, port=port, is_missing=True)
        service = self._world.services.get((namespace, name))
        if service is None:
            return missing
        spec = service.get("spec") or {}
        if spec.get("type") == "ExternalName":
            return self._external(missing, spec, port)
        found = service_port(spec.get("ports") or (), port)
        if found is None:
            return missing
        if cluster_ip:
            address = spec.get("clusterIP")
            servers: tuple[str, ...] = (f"{address}:{found['port']}",) if address not in (None, "", "None") else ()
        else:
            servers = endpoint_addresses(self._slices.get((namespace, name), ()), found)
        return Backend(name=shown, namespace=namespace, service=name, port=port, servers=servers)

    def _external(self, missing: Backend, spec: Object, port: str) -> Backend:
        target = str(spec.get("externalName") or "").rstrip(".").lower()
        number = int(port) if port.isdigit() else 0
        for one in spec.get("ports") or ():
            if one.get("name") == port:
                number = int(one["port"])
        if self._options.disable_svc_external_name or not number or target in ("", "localhost"):
            return missing
        fields = {name: getattr(missing, name) for name in ("name", "namespace", "service", "port")}
        address = parse_address(target)
        if address is not None:
            if address.is_loopback or address.version != 4:
                return missing
            return Backend(**fields, servers=(f"{address}:{number}",))
        if target.endswith(".localhost") or not _is_object_name(target):
            return missing
        return Backend(**fields, external=(target, number))

    def _name(self, namespace: str, name: str, port: str) -> str:
        key, plain = (namespace, name, port), f"{namespace}-{name}-{port}"
        shown, number = plain, 1
        while self._names.setdefault(shown, key) != key:
            number += 1
            shown = f"{plain}-{number}"
        return shown


def service_port(ports: Iterable[Object], wanted: str) -> Object | None:
    """Return the TCP port that a rule means: by number, targetPort or name, the first that fits in the Service's order."""
    for port in ports:
        if wanted in (str(port.get("port")), str(port.get("targetPort", "")), port.get("name")):
            return port if port.get("protocol", "TCP") == "TCP" else None
    return None


def endpoint_addresses(slices: Iterable[Object], port: Object) -> tuple[str, ...]:
    """Return the ready endpoints of a Service's port as ``ADDRESS:PORT``, sorted, each once.

    Terminating ones are left out at once, also when no other is left (upstream has no fallback as kube-proxy has).
    """
    found: set[tuple[IPv4Address, int]] = set()
    for one in slices:
        if one.get("addressType") != "IPv4":
            continue
        numbers = [
            each["port"]
            for each in one.get("ports") or ()
            if (each.get("name") or "") == (port.get("name") or "")
            and each.get("port")
            and each.get("protocol", "TCP") == "TCP"
        ]
        for endpoint in one.get("endpoints") or ():
            if (endpoint.get("conditions") or {}).get("ready") is False:
                continue
            for address in endpoint.get("addresses") or ():
                parsed = parse_address(str(address))
                if isinstance(parsed, IPv4Address):
                    found.update((parsed, int(number)) for number in numbers)
    return tuple(f"{address}:{number}" for address, number in sorted(found))
