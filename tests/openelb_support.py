"""Objects and stand-ins for tests of OpenELB: Eips, annotated Services, and its API as the programs see it."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from testbed.controllers.openelb.names import EIP_NAME, EIPS, FIXED_IP, IS_DEFAULT, OPT_IN
from testbed.model.objects import Object
from testbed.registry import Registry

MANIFEST = Path(__file__).parents[1] / "scenarios" / "openelb" / "openelb.yaml"


def eip(
    name: str = "eip-pool", address: str = "192.168.93.231-192.168.93.238", *, default: bool = False, **spec: Any
) -> Object:
    """Return an Eip; layer2 on eth33 unless ``spec`` says otherwise (None leaves a field out)."""
    fields = {"address": address, "protocol": "layer2", "interface": "eth33", **spec}
    annotations = {IS_DEFAULT: "true"} if default else {}
    return {
        "apiVersion": "network.kubesphere.io/v1alpha2",
        "kind": "Eip",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {key: value for key, value in fields.items() if value is not None},
    }


def lb(
    name: str = "web", *, namespace: str = "dev", opt_in: str | None = "openelb", pool: str = "", ip: str = "",
    ports: tuple[int, ...] = (80,), **spec: Any,
) -> Object:  # fmt: skip
    """Return a LoadBalancer Service with OpenELB's annotations."""
    annotations = {
        **({OPT_IN: opt_in} if opt_in else {}),
        **({EIP_NAME: pool} if pool else {}),
        **({FIXED_IP: ip} if ip else {}),
    }
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "annotations": annotations},
        "spec": {"type": "LoadBalancer", "ports": [{"name": f"p{port}", "port": port} for port in ports], **spec},
    }


@cache
def _manifest() -> tuple[Object, ...]:
    return tuple(yaml.load_all(MANIFEST.read_text(), yaml.CSafeLoader))


def manifest_objects(*kinds: str) -> list[Object]:
    """Return the objects of these kinds of our OpenELB manifest."""
    return [deepcopy(obj) for obj in _manifest() if obj["kind"] in kinds]


def define_eips(registry: Registry) -> None:
    """Store OpenELB's definitions."""
    for definition in manifest_objects("CustomResourceDefinition"):
        registry.create("customresourcedefinitions.apiextensions.k8s.io", definition)


class RegistryApi:
    """`ApiClient`'s methods on a registry; refuses what the registry refuses."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def get(self, resource: str, namespace: str, name: str) -> Object:
        return self._registry.get(resource, namespace, name)

    def update(self, obj: Object, *, subresource: str = "") -> Object:
        assert obj["kind"] == "Eip"
        return self._registry.update(EIPS, obj, subresource=subresource)

    def patch(self, resource: str, namespace: str, name: str, patch: Object, *, subresource: str = "") -> Object:
        return self._registry.patch(resource, namespace, name, patch, subresource=subresource)


__all__ = ["EIPS", "RegistryApi", "define_eips", "eip", "lb", "manifest_objects"]
