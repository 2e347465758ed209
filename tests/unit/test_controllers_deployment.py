"""Deployments and ReplicaSets, from a manifest to pods and back."""

from __future__ import annotations

import re

import pytest
from controllers_world import World, deployment, template

from testbed.controllers.pods import is_ready
from testbed.controllers.replicaset import pods_to_delete
from testbed.controllers.rolling import (
    Bounds,
    ReplicaCount,
    plan_rolling_update,
    plan_scaling,
    rolling_bounds,
    scaled_value,
)
from testbed.controllers.template_hash import encode_safely, fnv_32a, template_hash
from testbed.model.objects import Object, is_terminating
from testbed.store import Event, EventType


@pytest.fixture
def world() -> World:
    return World()


def names(objects: list[Object]) -> list[str]:
    return [obj["metadata"]["name"] for obj in objects]


def conditions(obj: Object) -> dict[str, tuple[str, str]]:
    return {one["type"]: (one["status"], one["reason"]) for one in obj["status"]["conditions"]}


def images(world: World) -> list[str]:
    return [pod["spec"]["containers"][0]["image"] for pod in world.pods()]


# --- decisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "total", "up", "down"),
    [("25%", 3, 1, 0), ("25%", 4, 1, 1), ("25%", 10, 3, 2), ("100%", 7, 7, 7), ("0%", 5, 0, 0), (2, 1, 2, 2)],
)
def test_percentages_are_rounded_as_kubernetes_does(value: int | str, total: int, up: int, down: int) -> None:
    """Surge is rounded up, unavailability down."""
    assert scaled_value(value, total, round_up=True) == up
    assert scaled_value(value, total, round_up=False) == down


def test_bounds_always_leave_room_to_move() -> None:
    """When both percentages come to nothing, one pod may be unavailable."""
    assert rolling_bounds(3, "0%", "25%") == Bounds(3, 0, 1)
    assert rolling_bounds(3, "25%", "25%") == Bounds(3, 1, 0)


def sets(*counts: tuple[int, int]) -> list[ReplicaCount]:
    return [ReplicaCount(name=f"old{i}", wanted=wanted, available=ok) for i, (wanted, ok) in enumerate(counts)]


@pytest.mark.parametrize(
    ("new", "old", "bounds", "plan"),
    [
        pytest.param((0, 0), [(4, 4)], Bounds(4, 1, 1), {"new": 1}, id="grows by the surge first"),
        pytest.param((1, 0), [(4, 4)], Bounds(4, 1, 1), {"old0": 3}, id="then shrinks the old to the floor"),
        pytest.param((1, 0), [(3, 3)], Bounds(4, 1, 1), {"new": 2}, id="room again"),
        pytest.param((2, 0), [(3, 3)], Bounds(4, 1, 1), {}, id="waits for the new to become available"),
        pytest.param((2, 1), [(3, 3)], Bounds(4, 1, 1), {"old0": 2}, id="one available, one goes"),
        pytest.param((1, 0), [(4, 1)], Bounds(4, 1, 2), {"old0": 2}, id="broken old ones go first"),
        pytest.param((3, 3), [(0, 0)], Bounds(3, 1, 0), {}, id="done"),
        pytest.param((5, 5), [], Bounds(3, 1, 0), {"new": 3}, id="too many of the new"),
        pytest.param((1, 1), [(1, 1), (2, 2)], Bounds(3, 1, 0), {"old0": 0}, id="the oldest set goes first"),
        pytest.param((1, 0), [(3, 9)], Bounds(3, 1, 0), {}, id="a status that is behind counts no more than is wanted"),
    ],
)
def test_next_step_of_a_rolling_update(
    new: tuple[int, int], old: list[tuple[int, int]], bounds: Bounds, plan: dict[str, int]
) -> None:
    """Each step keeps between the floor of available pods and the ceiling of all."""
    assert plan_rolling_update(ReplicaCount(name="new", wanted=new[0], available=new[1]), sets(*old), bounds) == plan


@pytest.mark.parametrize(
    ("active", "bounds", "plan"),
    [
        pytest.param([("a", 8, 13), ("b", 5, 13)], Bounds(20, 6, 5), {"a": 16, "b": 10}, id="up, in proportion"),
        pytest.param([("a", 8, 13), ("b", 5, 13)], Bounds(0, 0, 0), {"a": 0, "b": 0}, id="to nothing"),
        pytest.param([("a", 5, 10), ("b", 5, 10)], Bounds(5, 2, 1), {"a": 3, "b": 4}, id="down, the rest to the first"),
    ],
)
def test_scaling_during_a_rollout_is_shared(
    active: list[tuple[str, int, int]], bounds: Bounds, plan: dict[str, int]
) -> None:
    """Every ReplicaSet takes part in proportion to its size, and the sum is what the Deployment allows."""
    counts = [ReplicaCount(name=name, wanted=wanted, max_replicas=most) for name, wanted, most in active]
    assert plan_scaling(counts, bounds) == plan


def test_hash_is_fnv_in_the_alphabet_of_names() -> None:
    """The hash is FNV-32a, and decimal digits become ten safe characters."""
    assert fnv_32a(b"") == 2166136261
    assert fnv_32a(b"foobar") == 0xBF9CF968  # published test vector of FNV-1a
    assert encode_safely("0123456789") == "456789bcdf"
    assert re.fullmatch("[456789bcdf]{8,10}", template_hash(template({"app": "web"})))


def test_hash_ignores_the_order_of_fields() -> None:
    """The same template has the same hash however it was written down."""
    assert template_hash({"a": 1, "b": {"c": 2, "d": 3}}) == template_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert template_hash({"a": 1}) != template_hash({"a": 2})


def pod(name: str, *, node: str = "n1", phase: str = "Running", ready_at: str = "", **extra: object) -> Object:
    readiness = {"type": "Ready", "status": "True" if ready_at else "False", "lastTransitionTime": ready_at or None}
    return {
        "metadata": {"name": name, "creationTimestamp": "2024-01-01T00:00:00Z", **extra},
        "spec": {"nodeName": node} if node else {},
        "status": {"phase": phase, "conditions": [readiness]},
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(pod("a", node=""), pod("b"), id="not assigned"),
        pytest.param(pod("a", phase="Pending"), pod("b"), id="pending"),
        pytest.param(pod("a"), pod("b", ready_at="2024-01-01T00:00:09Z"), id="not ready"),
        pytest.param(
            pod("a", ready_at="2024-01-01T00:00:01Z", annotations={"controller.kubernetes.io/pod-deletion-cost": "-1"}),
            pod("b", ready_at="2024-01-01T00:00:09Z"),
            id="cheaper",
        ),
        pytest.param(
            pod("a", node="full", ready_at="2024-01-01T00:00:01Z"),
            pod("b", node="n1", ready_at="2024-01-01T00:00:09Z"),
            id="on the fuller node",
        ),
        pytest.param(
            pod("a", ready_at="2024-01-01T00:00:09Z"),
            pod("b", ready_at="2024-01-01T00:00:01Z"),
            id="ready for less time",
        ),
        pytest.param(pod("a", creationTimestamp="2024-01-01T00:00:09Z"), pod("b"), id="younger"),
    ],
)
def test_which_pod_goes_first(first: Object, second: Object) -> None:
    """Pods go in Kubernetes' order, whatever order they are given in."""
    load = {"full": 2, "n1": 1}
    for pods in ([first, second], [second, first]):
        assert names(pods_to_delete(pods, 1, load.__getitem__)) == ["a"]


# --- with store and registry -----------------------------------------------------------------------------------------


def test_a_deployment_has_as_many_pods_as_it_asks_for(world: World) -> None:
    """Scaling up and down ends with exactly the pods asked for, ready and counted in the status."""
    world.create("deployments.apps", deployment(replicas=0))
    for replicas in (0, 3, 5, 1, 0):
        world.change("deployments.apps", "web", replicas=replicas)
        world.settle()
        assert len(world.pods(terminating=True)) == replicas
        status = world.get("deployments.apps", "web")["status"]
        assert [status.get(field, 0) for field in ("replicas", "readyReplicas", "availableReplicas")] == [replicas] * 3
    assert not world.errors


def test_names_labels_and_owners(world: World) -> None:
    """Deployment, ReplicaSet and pods are named and linked as in Kubernetes."""
    world.create("deployments.apps", deployment(replicas=1))
    world.settle()
    (replica_set,) = world.store.list("replicasets.apps")
    (one,) = world.pods()
    chosen = replica_set["metadata"]["labels"]["pod-template-hash"]
    assert replica_set["metadata"]["name"] == f"web-{chosen}"
    assert replica_set["spec"]["selector"]["matchLabels"] == {"app": "web", "pod-template-hash": chosen}
    assert re.fullmatch(f"web-{chosen}-[bcdfghjklmnpqrstvwxz2456789]{{5}}", one["metadata"]["name"])
    assert one["metadata"]["ownerReferences"][0] == {
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "name": replica_set["metadata"]["name"],
        "uid": replica_set["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    assert world.messages("ScalingReplicaSet") == [f"Scaled up replica set web-{chosen} to 1"]
    assert world.messages("SuccessfulCreate") == [f"Created pod: {one['metadata']['name']}"]


def test_conditions_tell_the_rollout(world: World) -> None:
    """Available and Progressing follow the pods."""
    world.kubelet.holds = lambda _pod: True
    world.create("deployments.apps", deployment(replicas=2))
    world.settle()
    assert conditions(world.get("deployments.apps", "web")) == {
        "Available": ("False", "MinimumReplicasUnavailable"),
        "Progressing": ("True", "ReplicaSetUpdated"),
    }
    assert world.get("deployments.apps", "web")["status"]["unavailableReplicas"] == 2
    world.kubelet.holds = lambda _pod: False
    world.settle()
    done = world.get("deployments.apps", "web")
    assert conditions(done) == {
        "Available": ("True", "MinimumReplicasAvailable"),
        "Progressing": ("True", "NewReplicaSetAvailable"),
    }
    assert done["status"]["observedGeneration"] == done["metadata"]["generation"]
    assert "unavailableReplicas" not in done["status"]


def test_a_rollout_that_is_stuck_says_so(world: World) -> None:
    """After progressDeadlineSeconds without progress the condition turns False."""
    world.kubelet.holds = lambda _pod: True
    world.create("deployments.apps", deployment(replicas=1, progressDeadlineSeconds=60))
    world.advance(58)
    assert conditions(world.get("deployments.apps", "web"))["Progressing"] == ("True", "ReplicaSetUpdated")
    world.advance(5)
    assert conditions(world.get("deployments.apps", "web"))["Progressing"] == ("False", "ProgressDeadlineExceeded")


@pytest.mark.parametrize(
    ("replicas", "surge", "unavailable", "ceiling", "floor"),
    [(4, "25%", "25%", 5, 3), (3, "25%", "25%", 4, 3), (3, 0, 1, 3, 2), (6, 2, 2, 8, 4), (5, "100%", 0, 10, 5)],
)
def test_a_rolling_update_stays_within_its_bounds(
    world: World, replicas: int, surge: int | str, unavailable: int | str, ceiling: int, floor: int
) -> None:
    """At every change in the store there are enough available pods and not too many in all."""
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}
    world.create("deployments.apps", deployment(replicas=replicas, strategy=strategy))
    world.settle()
    seen: list[tuple[int, int]] = []

    def look(_event: Event) -> None:
        pods = world.pods()
        seen.append((len(pods), sum(is_ready(pod) for pod in pods)))

    world.store.subscribe(look, "pods")
    world.change("deployments.apps", "web", template=template({"app": "web"}, image="nginx:2"))
    world.settle()
    assert images(world) == ["nginx:2"] * replicas
    assert max(total for total, _ in seen) == ceiling
    assert min(ready for _, ready in seen) == floor


def test_a_broken_version_leaves_the_old_one_serving(world: World) -> None:
    """When new pods never become ready, the update stops with the floor of old ones still there."""
    world.create("deployments.apps", deployment(replicas=4))
    world.settle()
    world.kubelet.holds = lambda one: one["spec"]["containers"][0]["image"] == "broken"
    world.change("deployments.apps", "web", template=template({"app": "web"}, image="broken"))
    world.settle()
    assert sorted(images(world)) == ["broken", "broken", "nginx", "nginx", "nginx"]
    world.change("deployments.apps", "web", template=template({"app": "web"}, image="nginx:2"))
    world.settle()
    assert images(world) == ["nginx:2"] * 4


def test_recreate_never_has_two_versions(world: World) -> None:
    """With Recreate the last old pod is gone before the first new one is made."""
    world.create("deployments.apps", deployment(replicas=3, strategy={"type": "Recreate"}))
    world.settle()
    seen: set[frozenset[str]] = set()
    world.store.subscribe(
        lambda _event: seen.add(
            frozenset(one["spec"]["containers"][0]["image"] for one in world.pods(terminating=True))
        ),
        "pods",
    )
    world.change("deployments.apps", "web", template=template({"app": "web"}, image="nginx:2"))
    world.settle()
    assert images(world) == ["nginx:2"] * 3
    assert frozenset({"nginx", "nginx:2"}) not in seen


def test_rolling_back_uses_the_old_replica_set_again(world: World) -> None:
    """The same template again means the same ReplicaSet, with the next revision."""
    world.create("deployments.apps", deployment(replicas=1))
    world.settle()
    (first,) = world.store.list("replicasets.apps")
    world.change("deployments.apps", "web", template=template({"app": "web"}, image="nginx:2"))
    world.settle()
    assert world.get("deployments.apps", "web")["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "2"
    world.change("deployments.apps", "web", template=template({"app": "web"}))
    world.settle()
    assert len(world.store.list("replicasets.apps")) == 2
    again = world.get("replicasets.apps", first["metadata"]["name"])
    assert again["spec"]["replicas"] == 1
    assert again["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "3"
    assert again["metadata"]["annotations"]["deployment.kubernetes.io/revision-history"] == "1"


def test_old_replica_sets_are_forgotten(world: World) -> None:
    """No more than revisionHistoryLimit old ReplicaSets stay, the newest ones."""
    world.create("deployments.apps", deployment(replicas=1, revisionHistoryLimit=2))
    for version in range(2, 7):
        world.settle()
        world.change("deployments.apps", "web", template=template({"app": "web"}, image=f"nginx:{version}"))
    world.settle()
    kept = [one["spec"]["template"]["spec"]["containers"][0]["image"] for one in world.store.list("replicasets.apps")]
    assert sorted(kept) == ["nginx:4", "nginx:5", "nginx:6"]


def test_a_paused_deployment_scales_but_does_not_roll(world: World) -> None:
    """Pausing holds back a new template, not a new size."""
    world.create("deployments.apps", deployment(replicas=2))
    world.settle()
    world.change("deployments.apps", "web", paused=True, template=template({"app": "web"}, image="nginx:2"))
    world.change("deployments.apps", "web", replicas=4)
    world.settle()
    assert images(world) == ["nginx"] * 4
    assert conditions(world.get("deployments.apps", "web"))["Progressing"] == ("Unknown", "DeploymentPaused")
    world.change("deployments.apps", "web", paused=None)
    world.settle()
    assert images(world) == ["nginx:2"] * 4


def test_scaling_in_the_middle_of_a_rollout_ends_well(world: World) -> None:
    """A new size during a rolling update is reached with the new version only."""
    world.create("deployments.apps", deployment(replicas=6))
    world.settle()
    world.kubelet.holds = lambda one: one["spec"]["containers"][0]["image"] == "nginx:2"
    world.change("deployments.apps", "web", template=template({"app": "web"}, image="nginx:2"))
    world.settle()
    world.change("deployments.apps", "web", replicas=10)
    world.settle()
    assert len(set(images(world))) == 2
    world.kubelet.holds = lambda _pod: False
    world.settle()
    assert images(world) == ["nginx:2"] * 10


def test_a_lost_pod_is_replaced(world: World) -> None:
    """Deleting a pod brings a new one at once, while the old one still ends."""
    world.create("deployments.apps", deployment(replicas=2))
    world.settle()
    victim = world.pods()[0]
    world.kubelet.holds = is_terminating
    world.registry.delete("pods", "default", victim["metadata"]["name"])
    world.settle()
    assert len(world.pods()) == 2
    assert len(world.pods(terminating=True)) == 3


def test_labels_decide_who_owns_a_pod(world: World) -> None:
    """A pod whose labels are changed is released and replaced; one that matches and has no owner is adopted."""
    world.create("deployments.apps", deployment(replicas=1))
    world.settle()
    (one,) = world.pods()
    labels = one["metadata"]["labels"]
    world.registry.patch("pods", "default", one["metadata"]["name"], {"metadata": {"labels": {"app": "debug"}}})
    world.settle()
    assert len(world.pods()) == 2
    released = world.get("pods", one["metadata"]["name"])
    assert not released["metadata"].get("ownerReferences")
    world.registry.patch("pods", "default", one["metadata"]["name"], {"metadata": {"labels": labels}})
    world.settle()
    assert len(world.pods()) == 1  # adopted, and one of the two was then too many


def test_deleting_a_deployment_leaves_nothing(world: World) -> None:
    """ReplicaSets and pods go with the Deployment; a ReplicaSet that is deleted comes back."""
    world.create("deployments.apps", deployment(replicas=3))
    world.settle()
    (replica_set,) = world.store.list("replicasets.apps")
    world.registry.delete("replicasets.apps", "default", replica_set["metadata"]["name"])
    world.settle()
    assert len(world.store.list("replicasets.apps")) == 1
    assert len(world.pods()) == 3
    world.registry.delete("deployments.apps", "default", "web")
    world.settle()
    assert world.left("default") == []
    assert not world.errors


def test_min_ready_seconds_delay_availability(world: World) -> None:
    """A pod counts as available only after minReadySeconds, without anything else happening."""
    world.create("deployments.apps", deployment(replicas=1, minReadySeconds=10))
    world.advance(9)
    assert "availableReplicas" not in world.get("deployments.apps", "web")["status"]
    world.advance(3)
    assert world.get("deployments.apps", "web")["status"]["availableReplicas"] == 1


def test_pods_spread_over_nodes(world: World) -> None:
    """Each node gets as many pods of a Deployment as the others."""
    world.create("deployments.apps", deployment(replicas=6))
    world.settle()
    nodes = [one["spec"]["nodeName"] for one in world.pods()]
    assert {node: nodes.count(node) for node in set(nodes)} == {"node1": 2, "node2": 2, "node3": 2}


def test_the_hash_is_stable_over_labs() -> None:
    """The same manifest gives the same ReplicaSet name in every lab."""
    found = set()
    for _ in range(2):
        world = World()
        world.create("deployments.apps", deployment())
        world.settle()
        found.update(names(world.store.list("replicasets.apps")))
    assert len(found) == 1


def test_a_settled_deployment_writes_nothing(world: World) -> None:
    """Reconciling again what is right changes nothing."""
    world.create("deployments.apps", deployment())
    world.settle()
    events: list[Event] = []
    world.store.subscribe(events.append)
    world.advance(3600)
    assert [event for event in events if event.type is not EventType.ADDED] == []
