"""The controller on a real registry: what Services and Eips become, write by write, and which events tell it."""

# ruff: noqa: E501 (whole texts in one line)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from openelb_support import EIPS, RegistryApi, define_eips, eip, lb
from registry_support import make_registry

from testbed.controllers.openelb.names import BGP_CONFS, EIP_FINALIZER, EIP_NAME, OPT_IN, SERVICE_FINALIZER
from testbed.errors import ApiError
from testbed.model.objects import Object
from testbed.programs.kube_proxy import Changed, Listed
from testbed.programs.openelb.controller import NAMESPACES, SERVICES, ControllerLoop, with_kind
from testbed.store import Event, EventType


class Cluster:
    """A registry, and a controller that sees every change of it as its watches would show it."""

    def __init__(self) -> None:
        self.registry = make_registry()
        define_eips(self.registry)
        self.events: list[tuple[str, str, str, str]] = []
        self.log: list[str] = []
        self.now_s = 0.0
        self.api = RegistryApi(self.registry)
        self.loop = self.restart()
        for resource in (EIPS, SERVICES, NAMESPACES):
            self.registry.store.subscribe(self._changed, resource)

    def restart(self) -> ControllerLoop:
        """Start another controller, which knows nothing."""
        self.loop = ControllerLoop(self.api, self._tell, self.log.append)
        for resource in (EIPS, SERVICES, NAMESPACES):
            objects = [with_kind(resource, obj) for obj in self.registry.list(resource)]
            self.loop.accept(Listed(resource, tuple(objects)), self.now_s)
        return self.loop

    def _tell(self, obj: Object, kind: str, reason: str, message: str) -> None:
        self.events.append((f"{obj['kind']}/{obj['metadata']['name']}", kind, reason, message))

    def _changed(self, event: Event) -> None:
        obj = with_kind(event.key.resource, event.object)
        self.loop.accept(Changed(event.key.resource, event.type is EventType.DELETED, obj), self.now_s)

    def settle(self, seconds: float = 0.0) -> None:
        """Let the controller work, until nothing is due within so many seconds."""
        end_s = self.now_s + seconds
        for _ in range(500):
            self.loop.step(self.now_s)
            wait_s = self.loop.wait_s(self.now_s)
            if self.now_s + wait_s > end_s:
                self.now_s = end_s
                return
            self.now_s += wait_s
        raise AssertionError("the controller does not come to rest")

    def make(self, *objects: Object) -> None:
        """Create objects one after the other, with time to work in between."""
        for obj in objects:
            self.registry.create(EIPS if obj["kind"] == "Eip" else SERVICES, obj)
            self.settle()

    def change(self, name: str, patch: Object, *, seconds: float = 0.0) -> None:
        self.registry.patch(SERVICES, "dev", name, patch)
        self.settle(seconds)

    def service(self, name: str) -> Object:
        return self.registry.get(SERVICES, "dev", name)

    def ip(self, name: str) -> str:
        """Return a Service's external address, '' while it is pending."""
        return ",".join(one["ip"] for one in self.service(name)["status"].get("loadBalancer", {}).get("ingress") or ())

    def status(self, name: str = "eip-pool") -> Object:
        status: Object = self.registry.get(EIPS, "", name).get("status") or {}
        return status

    def told(self, name: str) -> list[tuple[str, str, str]]:
        return [told for about, *told in self.events if about == f"Service/{name}"]  # type: ignore[misc]


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_a_new_pool_gets_its_status_and_finalizer(cluster: Cluster) -> None:
    """firstIP, lastIP, poolSize and v4; usage, used and occupied are absent while nobody has an address."""
    cluster.make(eip())
    stored = cluster.registry.get(EIPS, "", "eip-pool")
    assert stored["status"] == {"firstIP": "192.168.93.231", "lastIP": "192.168.93.238", "poolSize": 8, "v4": True}
    assert stored["metadata"]["finalizers"] == [EIP_FINALIZER]


def test_an_address_is_given_out(cluster: Cluster) -> None:
    """The first one: on the Service's status, with label, finalizer and event, and in the Eip's status."""
    cluster.make(eip(), lb(pool="eip-pool"))
    service = cluster.service("web")
    assert cluster.ip("web") == "192.168.93.231"
    assert service["metadata"]["labels"] == {EIP_NAME: "eip-pool"}
    assert service["metadata"]["finalizers"] == [SERVICE_FINALIZER]
    assert cluster.status()["used"] == {"192.168.93.231": "dev/web"}
    assert cluster.status()["usage"] == 1
    assert cluster.told("web") == [["Normal", "AssignIP", "success to assign ip: 192.168.93.231"]]


def test_addresses_in_order_and_the_lowest_again(cluster: Cluster) -> None:
    """First, next; the first is deleted, and a third Service gets its address."""
    cluster.make(eip(), lb("a", pool="eip-pool"), lb("b", pool="eip-pool"))
    assert (cluster.ip("a"), cluster.ip("b")) == ("192.168.93.231", "192.168.93.232")
    cluster.registry.delete(SERVICES, "dev", "a")
    cluster.settle()
    assert cluster.registry.store.get(SERVICES, "dev", "a") is None
    assert ["Normal", "ReleaseIP", "success to release ip: 192.168.93.231"] in cluster.told("a")
    cluster.make(lb("c", pool="eip-pool"))
    assert cluster.ip("c") == "192.168.93.231"


def test_two_services_at_once_get_two_addresses(cluster: Cluster) -> None:
    """Created before the controller looks, they are served one after the other."""
    cluster.make(eip())
    for name in ("b", "a"):
        cluster.registry.create(SERVICES, lb(name, pool="eip-pool"))
    cluster.settle()
    assert {cluster.ip("a"), cluster.ip("b")} == {"192.168.93.231", "192.168.93.232"}
    assert cluster.status()["usage"] == 2


@pytest.mark.parametrize("opt_in", [None, "metallb"])
def test_without_the_annotation_nothing_happens(cluster: Cluster, opt_in: str | None) -> None:
    """Without it, or with another value, a Service stays pending; with it, it gets an address as it is."""
    cluster.make(eip(default=True), lb(opt_in=opt_in))
    assert cluster.ip("web") == "" and cluster.events == []
    assert "finalizers" not in cluster.service("web")["metadata"]
    cluster.change("web", {"metadata": {"annotations": {OPT_IN: "openelb"}}})
    assert cluster.ip("web") == "192.168.93.231"


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        pytest.param(lb(ip="192.168.93.235"), "192.168.93.235", id="by annotation"),
        pytest.param(lb(loadBalancerIP="192.168.93.236"), "192.168.93.236", id="by loadBalancerIP"),
        pytest.param(
            lb(ip="192.168.93.235", loadBalancerIP="192.168.93.236"), "192.168.93.235", id="the annotation wins"
        ),
        pytest.param(lb(ip="192.168.93.235", pool="eip-pool"), "192.168.93.235", id="with the pool's name"),
    ],
)
def test_fixed_addresses(cluster: Cluster, service: Object, expected: str) -> None:
    """A Service may name its address."""
    cluster.make(eip(), service)
    assert cluster.ip("web") == expected


@pytest.mark.parametrize(
    ("service", "reason", "text"),
    [
        pytest.param(lb(ip="192.168.93.99", pool="eip-pool"), "AssignIPFailed",
                     "no avliable eip, err:the specified ip:192.168.93.99 is beyond the range of eip[eip-pool:192.168.93.231-192.168.93.238]", id="outside the named pool"),
        pytest.param(lb(ip="192.168.93.99"), "ConstructRequest",
                     "failed to construct allocate request: no available eip was found containing the ip:[192.168.93.99]", id="in no pool"),
        pytest.param(lb(), "ConstructRequest", "failed to construct allocate request: no available default eip found", id="no default"),
        pytest.param(lb(pool="nopool"), "AssignIPFailed", 'Eip.network.kubesphere.io "nopool" not found', id="no such pool"),
        pytest.param(lb(pool="off"), "AssignIPFailed", "no avliable eip, err:eip:off is disabled", id="disabled"),
        pytest.param(lb(pool="six"), "AssignIPFailed", "service can't use different family eip", id="another family"),
    ],
)  # fmt: skip
def test_why_a_service_stays_pending(cluster: Cluster, service: Object, reason: str, text: str) -> None:
    """One event with OpenELB's text, told again with growing pauses; no marks on the Service."""
    cluster.make(eip(), eip("off", "10.0.0.1", disable=True), eip("six", "fd00::1"), service)
    assert cluster.told("web") == [["Warning", reason, text]]
    assert cluster.ip("web") == "" and "finalizers" not in cluster.service("web")["metadata"]
    cluster.settle(10.0)
    assert 2 < len(cluster.told("web")) < 8


def test_a_shared_address(cluster: Cluster) -> None:
    """Two Services with one address share it; equal ports are warned about; who leaves leaves it to the other."""
    cluster.make(
        eip(),
        lb("a", ip="192.168.93.235"),
        lb("b", ip="192.168.93.235", ports=(81,)),
        lb("c", ip="192.168.93.235", ports=(80, 81)),
    )
    assert cluster.status()["used"] == {"192.168.93.235": "dev/a;dev/b;dev/c"} and cluster.status()["usage"] == 1
    assert [told[1] for told in cluster.told("b")] == ["AssignIP"]
    assert [told[2] for told in cluster.told("c") if told[1] == "PortConflict"] == [
        "address 192.168.93.235 is shared with dev/a, and so is port 80/TCP: only one of them is reached",
        "address 192.168.93.235 is shared with dev/b, and so is port 81/TCP: only one of them is reached",
    ]
    cluster.registry.delete(SERVICES, "dev", "a")
    cluster.settle()
    assert cluster.status()["used"] == {"192.168.93.235": "dev/b;dev/c"}
    assert cluster.ip("b") == "192.168.93.235"


def test_a_pool_that_runs_out(cluster: Cluster) -> None:
    """The ninth Service waits, with an event; an address that is released is its own at once."""
    cluster.make(eip(), *(lb(f"s{number}", pool="eip-pool") for number in range(9)))
    assert cluster.ip("s7") == "192.168.93.238" and cluster.ip("s8") == ""
    assert cluster.status()["occupied"] is True and cluster.status()["usage"] == 8
    assert ["Warning", "AssignIPFailed", "no avliable eip, err:no suitable ip to allocate"] in cluster.told("s8")
    cluster.registry.delete(SERVICES, "dev", "s3")
    cluster.settle()
    assert cluster.ip("s8") == "192.168.93.234"


@pytest.mark.parametrize(
    "patch",
    [
        pytest.param({"spec": {"type": "ClusterIP"}}, id="another type"),
        pytest.param({"metadata": {"annotations": {OPT_IN: None}}}, id="annotation removed"),
        pytest.param({"metadata": {"annotations": {OPT_IN: "other"}}}, id="annotation changed"),
    ],
)
def test_what_releases_an_address(cluster: Cluster, patch: Object) -> None:
    """Address, label and finalizer go; the Eip's status is as at the beginning."""
    cluster.make(eip(), lb(pool="eip-pool"))
    cluster.change("web", patch)
    metadata = cluster.service("web")["metadata"]
    assert EIP_NAME not in (metadata.get("labels") or {}) and not metadata.get("finalizers")
    assert cluster.ip("web") == "" and "used" not in cluster.status() and "usage" not in cluster.status()
    assert cluster.told("web")[-1] == ["Normal", "ReleaseIP", "success to release ip: 192.168.93.231"]


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        pytest.param({"eip.openelb.kubesphere.io/v1alpha2": "other"}, "10.0.0.1", id="another pool"),
        pytest.param({"eip.openelb.kubesphere.io/v1alpha1": "192.168.93.237"}, "192.168.93.237", id="another address"),
    ],
)
def test_a_changed_wish_moves_a_service(cluster: Cluster, annotations: Object, expected: str) -> None:
    """The old address is released and the new one assigned in one go."""
    cluster.make(eip(), eip("other", "10.0.0.1-10.0.0.2"), lb(pool="eip-pool"))
    cluster.change("web", {"metadata": {"annotations": annotations}})
    assert cluster.ip("web") == expected
    assert [told[1] for told in cluster.told("web")] == ["AssignIP", "ReleaseIP", "AssignIP"]
    assert [told[2] for told in cluster.told("web")][1:] == [
        "success to release ip: 192.168.93.231",
        f"success to assign ip: {expected}",
    ]
    used = [set(cluster.status(name).get("used") or ()) for name in ("eip-pool", "other")]
    assert set.union(*used) == {expected}


def test_pools_of_a_namespace(cluster: Cluster) -> None:
    """Bound by name or label, by priority, occupied ones last; without any, the default one."""
    cluster.registry.patch(NAMESPACES, "", "dev", {"metadata": {"labels": {"team": "a"}}})
    cluster.make(
        eip("default-pool", "10.0.9.0/29", default=True),
        eip("second", "10.0.2.1", namespaces=["dev"], priority=20),
        eip("first", "10.0.1.1", namespaceSelector={"team": "a"}, priority=10),
        lb("a"), lb("b"), lb("c", namespace="default"),
    )  # fmt: skip
    assert (cluster.ip("a"), cluster.ip("b")) == ("10.0.1.1", "10.0.2.1")
    assert cluster.registry.get(SERVICES, "default", "c")["status"]["loadBalancer"]["ingress"][0]["ip"] == "10.0.9.0"
    cluster.make(lb("d"))
    assert cluster.told("d")[0][2] == "no avliable eip, err:no suitable ip to allocate", (
        "bound pools are full: the default one is no way out"
    )


def test_a_service_with_an_address_keeps_it(cluster: Cluster) -> None:
    """A better pool, a disabled pool, or one that is the default no more moves nobody."""
    cluster.make(eip("one", "10.0.1.1-10.0.1.9", default=True), lb())
    cluster.registry.patch(EIPS, "", "one", {"spec": {"disable": True}, "metadata": {"annotations": None}})
    cluster.settle()
    cluster.make(eip("two", "10.0.2.1-10.0.2.9", namespaces=["dev"]))
    cluster.change("web", {"metadata": {"labels": {"touched": "yes"}}})
    assert cluster.ip("web") == "10.0.1.1"


def test_a_pool_that_is_deleted_in_use(cluster: Cluster) -> None:
    """Its Services lose their address before it is gone, and get another when there is a pool again."""
    cluster.make(eip(), lb(pool="eip-pool"))
    cluster.registry.delete(EIPS, "", "eip-pool")
    cluster.settle()
    assert cluster.registry.store.get(EIPS, "", "eip-pool") is None
    assert cluster.ip("web") == "" and EIP_NAME not in (cluster.service("web")["metadata"].get("labels") or {})
    assert ["Normal", "ReleaseIP", "success to release ip: 192.168.93.231"] in cluster.told("web")
    assert any(told[1] == "AssignIPFailed" for told in cluster.told("web"))
    cluster.make(eip())
    assert cluster.ip("web") == "192.168.93.231"


def test_a_service_can_be_deleted_without_its_pool(cluster: Cluster) -> None:
    """The finalizer does not hold a Service whose Eip is gone."""
    cluster.make(eip(), lb(pool="eip-pool"))
    cluster.registry.delete(EIPS, "", "eip-pool")
    cluster.settle()
    cluster.registry.delete(SERVICES, "dev", "web")
    cluster.settle()
    assert cluster.registry.store.get(SERVICES, "dev", "web") is None


def test_a_controller_that_starts_again_changes_nothing(cluster: Cluster) -> None:
    """What is recorded stands; what was left behind of deleted Services is cleared."""
    cluster.make(eip(), lb("a", pool="eip-pool"), lb("b", pool="eip-pool"))
    registry = cluster.registry
    broken = registry.get(EIPS, "", "eip-pool")
    used = {**broken["status"]["used"], "192.168.93.238": "dev/gone"}
    registry.update(EIPS, {**broken, "status": {**broken["status"], "used": used, "usage": 3}}, subresource="status")
    before, events = registry.store.revision, len(cluster.events)
    cluster.restart()
    cluster.settle()
    assert cluster.status()["used"] == {"192.168.93.231": "dev/a", "192.168.93.232": "dev/b"}
    assert registry.store.revision == before + 1 and len(cluster.events) == events


def test_an_interrupted_allocation_is_completed(cluster: Cluster) -> None:
    """Recorded in the Eip but not on the Service: the next controller writes the rest, with the same address."""
    cluster.make(eip(), lb("a", pool="eip-pool"))
    cluster.registry.patch(SERVICES, "dev", "a", {"status": {"loadBalancer": {"ingress": None}}}, subresource="status")
    cluster.restart()
    cluster.settle()
    assert cluster.ip("a") == "192.168.93.231" and cluster.status()["usage"] == 1


def test_refused_writes_are_tried_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conflicts and errors of the API leave nothing half done: in the end there is one address for each."""
    patch: Callable[..., Object] = cluster.api.patch
    failures = iter(
        [ApiError(409, "Conflict", "stale"), ApiError(500, "InternalError", "no"), OSError("gone"), *[None] * 100]
    )

    def faulty(*arguments: Any, **keywords: Any) -> Object:
        error = next(failures)
        if error is not None:
            raise error
        return patch(*arguments, **keywords)

    monkeypatch.setattr(cluster.api, "patch", faulty)
    cluster.make(eip(), lb("a", pool="eip-pool"))
    cluster.settle(20.0)
    assert cluster.ip("a") == "192.168.93.231" and cluster.status()["used"] == {"192.168.93.231": "dev/a"}


def test_what_is_not_announced_is_said(cluster: Cluster) -> None:
    """Pools of protocol bgp and vip, and BGP's own objects, are accepted; one event says what that is worth."""
    cluster.make(
        eip("b", "10.1.0.0/29", protocol="bgp", interface=None),
        eip("v", "10.2.0.0/29", protocol="vip"),
        eip("u", "10.3.0.0/29", protocol=None),
    )
    conf = {
        "apiVersion": "network.kubesphere.io/v1alpha2",
        "kind": "BgpConf",
        "metadata": {"name": "default", "uid": "u1"},
    }
    for _ in range(2):
        cluster.loop.accept(Changed(BGP_CONFS, False, conf), 0.0)
    cluster.settle()
    said = {
        about: message
        for about, kind, reason, message in cluster.events
        if (kind, reason) == ("Warning", "NotAnnounced")
    }
    assert set(said) == {"Eip/b", "Eip/v", "Eip/u", "BgpConf/default"} and len(cluster.events) == 4
    assert "not by BGP yet" in said["Eip/u"] and "not by VIP (keepalived) yet" in said["Eip/v"]
    cluster.make(lb(pool="b"))
    assert cluster.ip("web") == "10.1.0.0"


def test_a_pool_without_sense_gives_out_nothing(cluster: Cluster) -> None:
    """Made while no webhook was there: an event, and no crash."""
    cluster.make(eip(address="10-5"), lb(pool="eip-pool"))
    assert (
        "Eip/eip-pool",
        "Warning",
        "add/update eip",
        "invalid eip address format: '10-5'; it gives out nothing",
    ) in cluster.events
    assert cluster.ip("web") == ""


def test_metrics(cluster: Cluster) -> None:
    """Addresses and Services of each pool, under upstream's names."""
    cluster.make(eip(), lb("a", ip="192.168.93.235"), lb("b", ip="192.168.93.235", ports=(81,)))
    lines = cluster.loop.metrics.render().splitlines()
    assert 'addresses_total{eipName="eip-pool"} 8' in lines
    assert 'addresses_in_use_total{eipName="eip-pool"} 1' in lines
    assert 'services_allocated_total{eipName="eip-pool"} 2' in lines
