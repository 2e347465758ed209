"""Nodes that fall silent, their taints, and what becomes of their pods."""

from __future__ import annotations

import pytest

from testbed.controllers.nodes import seconds_to_stay, wanted_taints
from testbed.model.objects import Object
from tests.controllers_world import World, deployment, service


@pytest.fixture
def world() -> World:
    """Two nodes that have said once that they are alive; a Deployment of two pods, one on each, behind a Service."""
    made = World(nodes=2, grace_s=40)
    for name in ("node1", "node2"):
        made.beat(name)
    made.create("deployments.apps", deployment(replicas=2))
    made.create("services", service())
    made.settle()
    made.kubelet.holds = lambda pod: pod["spec"].get("nodeName") == "node2"  # from here on it is dead
    return made


def live(world: World, seconds: int) -> None:
    """Let time pass in which node1's kubelet renews its Lease."""
    for _ in range(seconds // 10):
        world.beat("node1")
        world.advance(10)


def ready(world: World, node: str) -> tuple[str, str, str]:
    conditions = world.get("nodes", node, "")["status"]["conditions"]
    one = next(one for one in conditions if one["type"] == "Ready")
    return one["status"], one.get("reason", ""), one.get("message", "")


def taints(world: World, node: str) -> list[str]:
    return [f"{one['key']}:{one['effect']}" for one in world.get("nodes", node, "")["spec"].get("taints") or []]


def ready_endpoints(world: World) -> list[str]:
    (found,) = world.store.list("endpointslices.discovery.k8s.io", "default")
    return [one["nodeName"] for one in found["endpoints"] if one["conditions"]["ready"]]


def test_a_silent_node_is_marked_after_the_grace_period(world: World) -> None:
    """Its conditions become unknown, it is tainted, its pods and endpoints are not ready; others are left alone."""
    live(world, 30)
    assert ready(world, "node2")[0] == "True"
    assert sorted(ready_endpoints(world)) == ["node1", "node2"]
    live(world, 20)
    assert ready(world, "node2") == ("Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.")
    assert taints(world, "node2") == [
        "node.kubernetes.io/unreachable:NoSchedule",
        "node.kubernetes.io/unreachable:NoExecute",
    ]
    assert ready_endpoints(world) == ["node1"]
    assert sorted(world.messages("NodeNotReady")) == ["Node is not ready", "Node node2 status is now: NodeNotReady"]
    assert ready(world, "node1")[0] == "True"
    assert taints(world, "node1") == []
    assert world.errors == []


def test_its_pods_leave_after_five_minutes(world: World) -> None:
    """They are deleted when the toleration that every pod is given ends; nobody carries it out; others replace them."""
    live(world, 50)
    (pod,) = [one for one in world.pods() if one["spec"]["nodeName"] == "node2"]
    live(world, 280)
    assert "deletionTimestamp" not in world.get("pods", pod["metadata"]["name"])["metadata"]
    live(world, 30)
    gone = world.get("pods", pod["metadata"]["name"])
    assert "deletionTimestamp" in gone["metadata"]
    assert [one["reason"] for one in gone["status"]["conditions"] if one["type"] == "DisruptionTarget"] == [
        "DeletionByTaintManager"
    ]
    assert world.messages("TaintManagerEviction") == [f"Marking for deletion Pod default/{pod['metadata']['name']}"]
    assert [one["spec"]["nodeName"] for one in world.pods()] == ["node1", "node1"]


def test_a_node_that_comes_back_in_time_keeps_its_pods(world: World) -> None:
    """The taints go with the condition, and the deletion that was due is called off."""
    live(world, 100)
    names = {one["metadata"]["name"] for one in world.pods()}
    for _ in range(40):
        world.beat("node2")
        live(world, 10)
    assert taints(world, "node2") == []
    assert {one["metadata"]["name"] for one in world.pods()} == names
    assert world.messages("TaintManagerEviction")[0].startswith("Cancelling deletion of Pod default/web-")


def test_the_pods_of_a_deleted_node(world: World) -> None:
    """They are removed when their node has been missing for forty seconds, since no kubelet will ever do it."""
    world.registry.delete("nodes", "", "node2")
    live(world, 30)
    assert any(one["spec"]["nodeName"] == "node2" for one in world.pods())
    live(world, 20)
    assert all(one["spec"]["nodeName"] == "node1" for one in world.pods())


def test_a_node_says_that_it_is_not_ready(world: World) -> None:
    """Its taint is another one than that of a node which says nothing."""
    world.beat("node2", ready=False)
    world.settle()
    assert taints(world, "node2") == [
        "node.kubernetes.io/not-ready:NoSchedule",
        "node.kubernetes.io/not-ready:NoExecute",
    ]


def test_cordon_and_other_peoples_taints(world: World) -> None:
    """spec.unschedulable becomes a taint and back; taints of other keys stay as they are."""
    world.registry.patch("nodes", "", "node1", {"spec": {"taints": [{"key": "mine", "effect": "NoSchedule"}]}})
    world.change("nodes", "node1", namespace="", unschedulable=True)
    world.settle()
    assert taints(world, "node1") == ["mine:NoSchedule", "node.kubernetes.io/unschedulable:NoSchedule"]
    world.change("nodes", "node1", namespace="", unschedulable=None)
    world.settle()
    assert taints(world, "node1") == ["mine:NoSchedule"]


NOW, LATER = "2024-01-01T00:00:00Z", "2024-01-01T00:01:40Z"


@pytest.mark.parametrize(
    ("tolerations", "seconds"),
    [
        pytest.param([], 0.0, id="none: at once"),
        pytest.param([{"operator": "Exists"}], None, id="all, for ever"),
        pytest.param([{"key": "k", "operator": "Exists", "tolerationSeconds": 300}], 200.0, id="for a while"),
        pytest.param([{"key": "k", "operator": "Exists", "tolerationSeconds": 50}], 0.0, id="not any more"),
        pytest.param([{"key": "other", "operator": "Exists"}], 0.0, id="another taint"),
    ],
)
def test_how_long_a_pod_stays(tolerations: list[Object], seconds: float | None) -> None:
    """Counted from when the taint was added."""
    pod = {"spec": {"tolerations": tolerations}}
    assert seconds_to_stay(pod, [{"key": "k", "effect": "NoExecute", "timeAdded": NOW}], LATER) == seconds
    assert seconds_to_stay(pod, [{"key": "k", "effect": "NoSchedule"}], LATER) is None


def test_a_taint_keeps_the_time_when_it_was_added() -> None:
    """Looking again changes nothing."""
    node = {"metadata": {"name": "n"}, "spec": {}, "status": {"conditions": [{"type": "Ready", "status": "False"}]}}
    first = wanted_taints(node, NOW)
    assert wanted_taints({**node, "spec": {"taints": first}}, LATER) == first
