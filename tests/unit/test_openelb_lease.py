"""Leader election of OpenELB's controllers: one leads, the next one when the first is silent or has gone."""

from __future__ import annotations

from datetime import datetime

from registry_support import make_registry

from testbed.errors import LabError
from testbed.model.objects import Object
from testbed.programs.lease import LEASES, Leadership
from testbed.registry import Registry

NAME = "openelb-controller"


class LeaseApi:
    """`ApiClient`'s methods for Leases, on a registry; ``is_gone`` cuts it off."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.is_gone = False

    def get(self, resource: str, namespace: str, name: str) -> Object:
        if self.is_gone:
            raise LabError("no route to host")
        return self._registry.get(resource, namespace, name)

    def create(self, obj: Object) -> Object:
        return self._registry.create(LEASES, obj)

    def update(self, obj: Object, *, subresource: str = "") -> Object:
        return self._registry.update(LEASES, obj)


def two() -> tuple[Registry, LeaseApi, Leadership, Leadership]:
    registry = make_registry()
    first = LeaseApi(registry)
    leaders = [
        Leadership(api, "dev", NAME, name, lambda _line: None)
        for api, name in ((first, "a"), (LeaseApi(registry), "b"))
    ]
    return registry, first, leaders[0], leaders[1]


def leads(*leaderships: Leadership) -> list[bool]:
    return [one.is_leader.is_set() for one in leaderships]


def test_the_first_one_leads() -> None:
    """It makes the Lease, and keeps it by renewing; the other one waits."""
    registry, _, a, b = two()
    for second in range(0, 60, 2):
        a.try_once(second)
        b.try_once(second)
        assert leads(a, b) == [True, False]
    spec = registry.get(LEASES, "dev", NAME)["spec"]
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("a", 15, 0)
    assert datetime.fromisoformat(spec["renewTime"]) >= datetime.fromisoformat(spec["acquireTime"])


def test_who_falls_silent_is_replaced() -> None:
    """After the Lease's duration, measured by who waits; cut off, the old one gives up before that."""
    registry, api, a, b = two()
    a.try_once(0)
    api.is_gone = True
    for second in range(1, 18):
        a.try_once(second)
        b.try_once(second)
        assert leads(a, b).count(True) <= 1
    assert leads(a, b) == [False, True]
    api.is_gone = False
    a.try_once(20)
    assert leads(a, b) == [False, True] and registry.get(LEASES, "dev", NAME)["spec"]["leaseTransitions"] == 1


def test_who_ends_gives_it_back() -> None:
    """The next one need not wait."""
    _, _, a, b = two()
    a.try_once(0)
    b.try_once(0)
    a.release()
    a.try_once(0.5)  # its thread goes on while the process ends
    b.try_once(1)
    assert b.is_leader.is_set()


def test_a_container_that_is_started_again_goes_on() -> None:
    """Its identity is its pod's: the Lease is still its own."""
    registry, api, a, _ = two()
    a.try_once(0)
    again = Leadership(api, "dev", NAME, "a", lambda _line: None)
    again.try_once(1)
    assert again.is_leader.is_set() and registry.get(LEASES, "dev", NAME)["spec"]["leaseTransitions"] == 0
