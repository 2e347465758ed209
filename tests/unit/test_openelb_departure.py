"""OpenELB is deleted with its manifest: what it has given out goes back, although nobody of it is left to do that."""

from __future__ import annotations

import pytest
from controllers_world import World
from openelb_support import EIPS, define_eips, eip, lb, manifest_objects

from testbed.controllers.openelb.names import EIP_FINALIZER, EIP_NAME, SERVICE_FINALIZER

DEFINITION = "customresourcedefinitions.apiextensions.k8s.io"


@pytest.fixture
def world() -> World:
    """A cluster in which OpenELB has given an address to dev/web; its controller is there, but does nothing."""
    made = World()
    registry = made.registry
    for name in ("dev", "openelb-system"):
        registry.create("namespaces", {"metadata": {"name": name}})
    define_eips(registry)
    for obj in manifest_objects("Deployment"):
        registry.create("deployments.apps", obj)
    pool = eip()
    pool["metadata"]["finalizers"] = [EIP_FINALIZER]
    stored = registry.create(EIPS, pool)
    registry.update(
        EIPS, {**stored, "status": {"used": {"192.168.93.231": "dev/web"}, "usage": 1}}, subresource="status"
    )
    service = lb()
    service["metadata"] |= {
        "labels": {EIP_NAME: "eip-pool", "app": "web"},
        "finalizers": [SERVICE_FINALIZER, "example.com/other"],
    }
    registry.create("services", service)
    status = {"loadBalancer": {"ingress": [{"ip": "192.168.93.231"}]}}
    registry.patch("services", "dev", "web", {"status": status}, subresource="status")
    made.settle()
    return made


def test_all_of_it_is_deleted(world: World) -> None:
    """Namespace and definitions go, with the Eips; the Service is pending, and keeps what is not OpenELB's."""
    world.registry.delete("namespaces", "", "openelb-system")
    world.registry.delete(DEFINITION, "", EIPS)
    world.settle()
    world.advance(5)
    assert world.registry.store.get(DEFINITION, "", EIPS) is None and world.registry.store.list(EIPS) == []
    service = world.registry.get("services", "dev", "web")
    assert service["status"]["loadBalancer"] == {}
    assert service["metadata"]["labels"] == {"app": "web"} and service["metadata"]["finalizers"] == [
        "example.com/other"
    ]
    told = [event["message"] for event in world.registry.list("events", "dev") if event["reason"] == "ReleaseIP"]
    assert told == ["success to release ip: 192.168.93.231"]


def test_the_definition_alone_is_deleted(world: World) -> None:
    """The controller is there and will do it: nobody else interferes, until it is deleted as well."""
    world.registry.delete(DEFINITION, "", EIPS)
    world.settle()
    world.advance(5)
    assert len(world.registry.list(EIPS)) == 1
    world.registry.delete("deployments.apps", "openelb-system", "openelb-controller")
    world.settle()
    world.advance(5)
    assert world.registry.store.get(DEFINITION, "", EIPS) is None
    assert world.registry.get("services", "dev", "web")["status"]["loadBalancer"] == {}


def test_the_controller_alone_is_deleted(world: World) -> None:
    """As on a cluster: what it has given out stays as it is."""
    world.registry.delete("deployments.apps", "openelb-system", "openelb-controller")
    world.settle()
    world.advance(5)
    assert world.registry.get("services", "dev", "web")["metadata"]["labels"][EIP_NAME] == "eip-pool"
    assert world.registry.get(EIPS, "", "eip-pool")["metadata"]["finalizers"] == [EIP_FINALIZER]
