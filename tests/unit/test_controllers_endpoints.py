"""EndpointSlices and Endpoints: from selectors, from people, and how they follow the pods."""

from __future__ import annotations

import pytest
from controllers_world import World, deployment, service, template

from testbed.controllers.endpoints import endpoint_subsets
from testbed.controllers.slices import (
    MANAGED_BY,
    SERVICE_NAME,
    Endpoint,
    Group,
    Port,
    desired_endpoints,
    identity_of,
    plan_slices,
    resolve_port,
)
from testbed.model.objects import Object, is_terminating
from testbed.store import Event, EventType

SLICES = "endpointslices.discovery.k8s.io"
HTTP = Group("IPv4", (Port("", "TCP", 80),))


@pytest.fixture
def world() -> World:
    return World()


# --- decisions -------------------------------------------------------------------------------------------------------


def endpoints(*numbers: int, ready: bool = True) -> dict[tuple[str, str], Endpoint]:
    made = [
        {
            "addresses": [f"10.244.{number // 256}.{number % 256}"],
            "conditions": {"ready": ready},
            "targetRef": {"uid": f"u{number}"},
        }
        for number in numbers
    ]
    return {identity_of(one): one for one in made}


def stored(name: str, group: Group, held: dict[tuple[str, str], Endpoint]) -> Object:
    ports = [{"name": port.name, "port": port.port, "protocol": port.protocol} for port in group.ports]
    return {
        "metadata": {"name": name},
        "addressType": group.address_type,
        "ports": ports,
        "endpoints": list(held.values()),
    }


def shape(plan: list[Object]) -> list[tuple[str, int]]:
    return [(one.get("metadata", {}).get("name", ""), len(one["endpoints"])) for one in plan]


def test_new_endpoints_fill_slices_of_a_hundred() -> None:
    """250 endpoints make three slices."""
    plan = plan_slices([], {HTTP: endpoints(*range(250))})
    assert shape(plan.create) == [("", 100), ("", 100), ("", 50)]
    assert not plan.update
    assert not plan.delete


def test_what_is_right_is_left_alone() -> None:
    """The same endpoints again are no change."""
    plan = plan_slices([stored("a", HTTP, endpoints(1, 2))], {HTTP: endpoints(1, 2)})
    assert (plan.create, plan.update, plan.delete) == ([], [], [])


def test_a_readiness_flip_changes_one_slice_in_place() -> None:
    """An endpoint stays in its slice when its conditions change."""
    have = [stored("a", HTTP, endpoints(*range(100))), stored("b", HTTP, endpoints(*range(100, 150)))]
    plan = plan_slices(have, {HTTP: {**endpoints(*range(150)), **endpoints(7, ready=False)}})
    assert shape(plan.update) == [("a", 100)]
    assert plan.update[0]["endpoints"][7]["conditions"] == {"ready": False}
    assert not plan.create
    assert not plan.delete


def test_new_endpoints_go_where_something_changes_anyway() -> None:
    """One slice is written, not two."""
    have = [stored("a", HTTP, endpoints(*range(50))), stored("b", HTTP, endpoints(*range(50, 80)))]
    plan = plan_slices(have, {HTTP: endpoints(*range(1, 80), 200)})
    assert shape(plan.update) == [("a", 50)]


def test_else_into_the_fullest_slice_with_room() -> None:
    """Nothing changes but the addition: the fullest slice takes it, unless it is full."""
    have = [
        stored("few", HTTP, endpoints(*range(10))),
        stored("many", HTTP, endpoints(*range(10, 80))),
        stored("full", HTTP, endpoints(*range(100, 200))),
    ]
    plan = plan_slices(have, {HTTP: endpoints(*range(80), *range(100, 200), 300)})
    assert shape(plan.update) == [("many", 71)]


def test_a_full_slice_gets_a_neighbour() -> None:
    """The 101st endpoint makes a second slice."""
    plan = plan_slices([stored("a", HTTP, endpoints(*range(100)))], {HTTP: endpoints(*range(101))})
    assert shape(plan.create) == [("", 1)]
    assert not plan.update


def test_no_endpoints_leave_a_placeholder() -> None:
    """A Service without pods has one slice without endpoints and ports, and it is kept."""
    plan = plan_slices([], {}, ["IPv4"])
    assert [(one["addressType"], one["endpoints"], one["ports"]) for one in plan.create] == [("IPv4", [], [])]
    kept = stored("p", Group("IPv4", ()), {})
    again = plan_slices([kept], {}, ["IPv4"])
    assert (again.create, again.update, again.delete) == ([], [], [])
    # The first endpoint turns it into a slice with ports.
    first = plan_slices([kept], {HTTP: endpoints(1)}, ["IPv4"])
    assert shape(first.update) == [("p", 1)]
    assert first.update[0]["ports"] == [{"name": "", "port": 80, "protocol": "TCP"}]


@pytest.mark.parametrize("rounds", range(5))
def test_any_change_ends_with_each_endpoint_once(rounds: int) -> None:
    """Whatever comes and goes, the slices hold every endpoint exactly once and none is over 100."""
    slices: list[Object] = []
    number = 7 + rounds
    for step in range(30):
        number = (number * 1103515245 + 12345) % 2**31
        wanted = endpoints(*[i for i in range(number % 400) if (i * 2654435761 + step * number) % 7])
        plan = plan_slices(slices, {HTTP: wanted}, ["IPv4"])
        gone = {one["metadata"]["name"] for one in (*plan.delete, *plan.update)}
        slices = [one for one in slices if one["metadata"]["name"] not in gone] + plan.update
        slices += [{**one, "metadata": {"name": f"{step}-{i}"}} for i, one in enumerate(plan.create)]
        held = [identity_of(one) for each in slices for one in each["endpoints"]]
        assert sorted(held) == sorted(wanted)
        assert all(len(one["endpoints"]) <= 100 for one in slices)


@pytest.mark.parametrize(
    ("target", "protocol", "found"),
    [(8080, "TCP", 8080), ("http", "TCP", 80), ("dns", "UDP", 53), ("dns", "TCP", 5353), ("nope", "TCP", None)],
)
def test_target_ports_are_looked_up_by_name_and_protocol(target: int | str, protocol: str, found: int | None) -> None:
    """A number is itself; a name is a container port of that protocol."""
    ports = [
        {"name": "http", "containerPort": 80},
        {"name": "dns", "containerPort": 53, "protocol": "UDP"},
        {"name": "dns", "containerPort": 5353},
    ]
    assert resolve_port({"spec": {"containers": [{"ports": []}, {"ports": ports}]}}, target, protocol) == found


def pod(
    name: str,
    ip: str = "10.244.1.5",
    *,
    ready: bool = True,
    going: bool = False,
    phase: str = "Running",
    **spec: object,
) -> Object:
    metadata = {"name": name, "namespace": "default", "uid": f"uid-{name}"}
    return {
        "metadata": {**metadata, "deletionTimestamp": "2024-01-01T00:00:00Z"} if going else metadata,
        "spec": {"nodeName": "node1", "containers": [], **spec},
        "status": {"phase": phase, "podIP": ip, "conditions": [{"type": "Ready", "status": str(ready)}]},
    }


@pytest.mark.parametrize(
    ("one", "publish", "conditions"),
    [
        pytest.param(pod("a"), False, (True, True, False), id="ready"),
        pytest.param(pod("a", ready=False), False, (False, False, False), id="not ready"),
        pytest.param(pod("a", going=True), False, (False, True, True), id="terminating and still serving"),
        pytest.param(pod("a", ready=False, going=True), False, (False, False, True), id="terminating"),
        pytest.param(pod("a", ready=False), True, (True, False, False), id="published before it is ready"),
        pytest.param(pod("a", ip=""), False, None, id="no address yet"),
        pytest.param(pod("a", phase="Succeeded"), False, None, id="finished"),
        pytest.param(pod("a", phase="Failed"), True, None, id="failed"),
    ],
)
def test_conditions_of_an_endpoint(one: Object, publish: bool, conditions: tuple[bool, bool, bool] | None) -> None:
    """Ready, serving and terminating follow the pod as in Kubernetes."""
    found = desired_endpoints(service(publishNotReadyAddresses=publish), [one], lambda _node: "")
    seen = [
        tuple(each["conditions"][name] for name in ("ready", "serving", "terminating"))
        for group in found.values()
        for each in group.values()
    ]
    assert seen == ([] if conditions is None else [conditions])


def test_hostname_zone_and_hints() -> None:
    """A hostname shows for the pod's own subdomain, the zone comes from the node, hints only when asked for."""
    one = pod("a", hostname="db-0", subdomain="web")
    (plain,) = desired_endpoints(service(), [one], lambda _node: "z1")[Group("IPv4", (Port("", "TCP", 80),))].values()
    assert (plain["hostname"], plain["zone"], plain["nodeName"], "hints" in plain) == ("db-0", "z1", "node1", False)
    near = service(trafficDistribution="PreferClose")
    (hinted,) = next(iter(desired_endpoints(near, [one], lambda _node: "z1").values())).values()
    assert hinted["hints"] == {"forZones": [{"name": "z1"}]}
    (elsewhere,) = next(iter(desired_endpoints(service("other"), [one], lambda _node: "").values())).values()
    assert "hostname" not in elsewhere
    assert "zone" not in elsewhere


def test_endpoints_are_sorted_and_limited() -> None:
    """Addresses are sorted as numbers, at most 1000, and ready ones are kept."""
    pods = [pod(f"p{i}", f"10.244.{i // 250}.{i % 250 + 1}", ready=i != 3) for i in range(1001)]
    subsets, truncated = endpoint_subsets(service(), list(reversed(pods)))
    (subset,) = subsets
    assert truncated
    assert [one["ip"] for one in subset["addresses"][:3]] == ["10.244.0.1", "10.244.0.2", "10.244.0.3"]
    assert len(subset["addresses"]) == 1000
    assert "notReadyAddresses" not in subset


# --- with store and registry -----------------------------------------------------------------------------------------


def slices(world: World, name: str = "web") -> list[Object]:
    return [one for one in world.store.list(SLICES, "default") if one["metadata"]["labels"][SERVICE_NAME] == name]


def addresses(world: World, name: str = "web") -> dict[str, tuple[bool, bool, bool]]:
    return {
        one["addresses"][0]: (
            one["conditions"]["ready"],
            one["conditions"]["serving"],
            one["conditions"]["terminating"],
        )
        for each in slices(world, name)
        for one in each["endpoints"]
    }


def subsets(world: World, name: str = "web") -> list[Object]:
    found = world.store.get("endpoints", "default", name)
    return found.get("subsets") or [] if found else []


def pod_ips(world: World) -> list[str]:
    return [one["status"]["podIP"] for one in world.pods()]


UP = (True, True, False)


@pytest.mark.parametrize("service_first", [True, False])
def test_service_and_pods_in_either_order(world: World, service_first: bool) -> None:
    """The endpoints are the ready pods, whichever was made first; when all is deleted nothing is left."""
    steps = [("services", service()), ("deployments.apps", deployment(replicas=3))]
    for resource, obj in steps if service_first else reversed(steps):
        world.create(resource, obj)
        world.settle()
    assert addresses(world) == dict.fromkeys(pod_ips(world), UP)
    (one,) = slices(world)
    assert one["metadata"]["name"].startswith("web-")
    assert one["metadata"]["labels"] == {SERVICE_NAME: "web", MANAGED_BY: "endpointslice-controller.k8s.io"}
    assert one["metadata"]["ownerReferences"][0]["kind"] == "Service"
    assert one["ports"] == [{"name": "", "port": 80, "protocol": "TCP"}]
    assert [each["ip"] for each in subsets(world)[0]["addresses"]] == sorted(pod_ips(world))
    for resource, obj in reversed(steps) if service_first else steps:
        world.registry.delete(resource, "default", obj["metadata"]["name"])
        world.settle()
    assert world.left("default") == []
    assert not world.errors


def test_readiness_moves_an_endpoint(world: World) -> None:
    """A pod that is no longer ready stays listed, as not ready, in the same slice; and comes back."""
    world.create("services", service())
    world.create("deployments.apps", deployment(replicas=3))
    world.settle()
    one = world.pods()[1]
    (before,) = slices(world)
    world.kubelet.set_ready(one, False)
    world.settle()
    assert addresses(world)[one["status"]["podIP"]] == (False, False, False)
    assert [each["ip"] for each in subsets(world)[0]["notReadyAddresses"]] == [one["status"]["podIP"]]
    assert [each["metadata"]["name"] for each in slices(world)] == [before["metadata"]["name"]]
    world.kubelet.set_ready(one, True)
    world.settle()
    assert addresses(world) == dict.fromkeys(pod_ips(world), UP)


def test_a_pod_that_ends_is_terminating_then_gone(world: World) -> None:
    """While its program drains a pod is serving and terminating; Endpoints drop it at once."""
    world.create("services", service())
    world.create("deployments.apps", deployment(replicas=2))
    world.settle()
    victim = world.pods()[0]
    ip = victim["status"]["podIP"]
    world.kubelet.holds = is_terminating
    world.registry.delete("pods", "default", victim["metadata"]["name"])
    world.settle()
    assert addresses(world)[ip] == (False, True, True)
    assert ip not in [one["ip"] for one in subsets(world)[0]["addresses"]]
    world.kubelet.holds = lambda _pod: False
    world.settle()
    assert ip not in addresses(world)
    assert len(addresses(world)) == 2


def test_named_ports_that_differ_make_two_slices(world: World) -> None:
    """Pods that give a name to different ports are in different slices and subsets."""
    for name, port in (("old", 8080), ("new", 9090)):
        ports = [{"name": "http", "containerPort": port}]
        labels = {"app": "web", "version": name}
        spec = deployment(name, replicas=2, template=template(labels, ports=ports))
        spec["spec"]["selector"] = {"matchLabels": labels}
        world.create("deployments.apps", spec)
    world.create("services", service(ports=[{"name": "www", "port": 80, "targetPort": "http"}]))
    world.settle()
    assert sorted((one["ports"][0]["port"], len(one["endpoints"])) for one in slices(world)) == [(8080, 2), (9090, 2)]
    assert [one["ports"][0]["port"] for one in subsets(world)] == [8080, 9090]
    assert all(one["ports"][0]["name"] == "www" for one in slices(world))


def test_250_pods_make_three_slices(world: World) -> None:
    """Pods that become ready a few at a time end up in as few slices as can be."""
    world.kubelet.at_once = 20
    world.create("services", service())
    world.create("deployments.apps", deployment(replicas=250))
    world.settle()
    assert sorted(len(one["endpoints"]) for one in slices(world)) == [50, 100, 100]
    assert set(addresses(world)) == set(pod_ips(world))


def test_endpoints_by_hand_are_mirrored(world: World) -> None:
    """Endpoints of a Service without selector become slices, follow changes, and go with the Service."""
    manual = {
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": {"name": "db", "namespace": "default", "labels": {"team": "a"}},
        "subsets": [
            {"addresses": [{"ip": "192.168.93.100"}, {"ip": "192.168.93.101"}], "ports": [{"port": 5432}]},
            {"notReadyAddresses": [{"ip": "192.168.93.102"}], "ports": [{"port": 5433}]},
        ],
    }
    world.create("endpoints", manual)
    world.settle()
    assert world.store.list(SLICES) == []
    world.create("services", service("db", selector={}, ports=[{"port": 5432}]))
    world.settle()
    assert sorted((one["ports"][0]["port"], len(one["endpoints"])) for one in slices(world, "db")) == [
        (5432, 2),
        (5433, 1),
    ]
    one = slices(world, "db")[0]
    assert one["metadata"]["labels"] == {
        "team": "a",
        SERVICE_NAME: "db",
        MANAGED_BY: "endpointslicemirroring-controller.k8s.io",
    }
    world.registry.patch("endpoints", "default", "db", {"subsets": manual["subsets"][:1]})
    world.settle()
    assert [len(each["endpoints"]) for each in slices(world, "db")] == [2]
    world.registry.patch(
        "endpoints", "default", "db", {"metadata": {"labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}}}
    )
    world.settle()
    assert slices(world, "db") == []
    world.registry.patch(
        "endpoints", "default", "db", {"metadata": {"labels": {"endpointslice.kubernetes.io/skip-mirror": None}}}
    )
    world.settle()
    assert len(slices(world, "db")) == 1
    world.registry.delete("services", "default", "db")
    world.settle()
    assert world.left("default") == []


def test_slices_by_hand_are_left_alone(world: World) -> None:
    """A slice that a user wrote for a Service is neither changed nor deleted."""
    world.create("services", service("db", selector={}, ports=[{"port": 80}]))
    manual = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "mine", "namespace": "default", "labels": {SERVICE_NAME: "db"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["192.168.93.100"], "conditions": {}}],
        "ports": [{"name": "", "port": 80, "protocol": "TCP"}],
    }
    created = world.create(SLICES, manual)
    world.settle()
    assert world.get(SLICES, "mine") == created


def test_no_endpoints_for_an_external_name(world: World) -> None:
    """A Service of type ExternalName has neither Endpoints nor slices, even with a selector."""
    world.create("deployments.apps", deployment())
    world.create("services", service(type="ExternalName", externalName="example.com"))
    world.settle()
    assert slices(world) == []
    assert world.store.get("endpoints", "default", "web") is None


def test_a_headless_service_says_so(world: World) -> None:
    """Slices and Endpoints of a headless Service carry its label."""
    world.create("deployments.apps", deployment(replicas=1))
    world.create("services", service(clusterIP="None"))
    world.settle()
    assert slices(world)[0]["metadata"]["labels"]["service.kubernetes.io/headless"] == ""
    assert world.get("endpoints", "web")["metadata"]["labels"] == {"service.kubernetes.io/headless": ""}


def test_a_changed_service_changes_its_endpoints(world: World) -> None:
    """A new target port or selector shows in the same slice, without a moment in which there is none."""
    world.create("deployments.apps", deployment(replicas=2))
    world.create("services", service())
    world.settle()
    counts: list[int] = []
    world.store.subscribe(lambda _event: counts.append(len(slices(world))), SLICES)
    world.change("services", "web", ports=[{"port": 80, "protocol": "TCP", "targetPort": 8080}])
    world.settle()
    assert [one["ports"][0]["port"] for one in slices(world)] == [8080]
    assert counts == [1]
    world.change("services", "web", selector={"app": "nobody"})
    world.settle()
    assert [(one["endpoints"], one["ports"]) for one in slices(world)] == [([], [])]


def test_a_slice_that_someone_deletes_or_edits_is_repaired(world: World) -> None:
    """The slices of a Service with selector are the controller's."""
    world.create("deployments.apps", deployment(replicas=2))
    world.create("services", service())
    world.settle()
    (one,) = slices(world)
    world.registry.delete(SLICES, "default", one["metadata"]["name"])
    world.registry.delete("endpoints", "default", "web")
    world.settle()
    assert len(addresses(world)) == 2
    assert len(subsets(world)[0]["addresses"]) == 2
    (one,) = slices(world)
    world.registry.update(SLICES, {**one, "endpoints": one["endpoints"][:1]})
    world.settle()
    assert len(addresses(world)) == 2


def test_a_recreated_service_gets_slices_of_its_own(world: World) -> None:
    """Slices of a Service that was deleted do not stay with the next one of its name."""
    world.create("deployments.apps", deployment(replicas=2))
    world.create("services", service())
    world.settle()
    world.registry.delete("services", "default", "web")
    new = world.create("services", service())
    world.settle()
    owners = {ref["uid"] for one in slices(world) for ref in one["metadata"]["ownerReferences"]}
    assert owners == {new["metadata"]["uid"]}
    assert len(addresses(world)) == 2
    assert len(subsets(world)[0]["addresses"]) == 2


def test_the_zone_of_a_node_is_the_zone_of_its_endpoints(world: World) -> None:
    """Labelling a node changes the endpoints on it."""
    world.create("deployments.apps", deployment(replicas=3))
    world.create("services", service())
    world.settle()
    world.registry.patch("nodes", "", "node2", {"metadata": {"labels": {"topology.kubernetes.io/zone": "east"}}})
    world.settle()
    zones = {one["nodeName"]: one.get("zone") for each in slices(world) for one in each["endpoints"]}
    assert zones == {"node1": None, "node2": "east", "node3": None}


def test_status_updates_that_endpoints_do_not_show_cost_nothing(world: World) -> None:
    """Writing a pod's status without a change of address or readiness leaves slices and Endpoints alone."""
    world.create("deployments.apps", deployment(replicas=2))
    world.create("services", service())
    world.settle()
    seen: list[Event] = []
    world.store.subscribe(seen.append)
    world.kubelet.set_ready(world.pods()[0], True, startTime="2024-01-01T00:00:00Z")
    world.settle()
    assert [(one.type, one.key.resource) for one in seen] == [(EventType.MODIFIED, "pods")]
