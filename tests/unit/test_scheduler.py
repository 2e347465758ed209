"""Where pods go, and what is said when they can go nowhere."""

from __future__ import annotations

from typing import Any

import pytest
from controllers_world import World

from testbed.controllers.placement import (
    AFFINITY,
    FULL,
    PORTS,
    UNSCHEDULABLE,
    HostPort,
    best_node,
    failure_message,
    host_ports,
    matches_affinity,
    node_taints,
    obstacle,
    tolerates,
)
from testbed.model.objects import Object

CONTROL_PLANE = {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}


def node(name: str = "n1", *, labels: dict[str, str] | None = None, ready: str | None = "True", **spec: Any) -> Object:
    conditions = [] if ready is None else [{"type": "Ready", "status": ready}]
    return {"metadata": {"name": name, "labels": labels or {}}, "spec": spec, "status": {"conditions": conditions}}


def node_for(pods: int) -> Object:
    """Return a node that takes so many pods."""
    there = node()
    return {**there, "status": {**there["status"], "allocatable": {"pods": str(pods)}}}


def pod(name: str = "p", **spec: Any) -> Object:
    spec.setdefault("containers", [{"name": "c", "image": "nginx"}])
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": spec,
    }


def with_port(host_port: int, name: str = "p", **port: Any) -> Object:
    ports = [{"containerPort": 80, "hostPort": host_port, **port}]
    return pod(name, containers=[{"name": "c", "image": "nginx", "ports": ports}])


def requires(*expressions: Object, field: str = "matchExpressions") -> Object:
    terms = [{field: [one]} for one in expressions]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


@pytest.mark.parametrize(
    ("toleration", "taint", "tolerated"),
    [
        pytest.param({"key": "k", "value": "v", "effect": "NoSchedule"}, ("k", "v", "NoSchedule"), True, id="equal"),
        pytest.param(
            {"key": "k", "operator": "Equal", "value": "x"}, ("k", "v", "NoSchedule"), False, id="other value"
        ),
        pytest.param({"key": "k", "operator": "Exists"}, ("k", "v", "NoExecute"), True, id="exists, any effect"),
        pytest.param(
            {"key": "k", "operator": "Exists", "effect": "NoExecute"}, ("k", "", "NoSchedule"), False, id="effect"
        ),
        pytest.param({"operator": "Exists"}, ("k", "v", "NoExecute"), True, id="tolerates all"),
        pytest.param(
            {"operator": "Exists", "effect": "NoSchedule"}, ("k", "", "NoExecute"), False, id="all of an effect"
        ),
        pytest.param({"key": "other", "operator": "Exists"}, ("k", "", "NoSchedule"), False, id="other key"),
        pytest.param({"key": "k"}, ("k", "", "NoSchedule"), True, id="no value on either side"),
        pytest.param({}, ("k", "", "NoSchedule"), False, id="an empty toleration tolerates nothing"),
    ],
)
def test_which_taints_are_tolerated(toleration: Object, taint: tuple[str, str, str], tolerated: bool) -> None:
    """Operator, key, value and effect decide as in Kubernetes."""
    key, value, effect = taint
    assert tolerates([toleration], {"key": key, "value": value, "effect": effect}) is tolerated


@pytest.mark.parametrize(
    ("operator", "values", "matching"),
    [
        ("In", ["a", "b"], {"one"}),
        ("NotIn", ["a", "b"], {"two", "none"}),
        ("Exists", [], {"one", "two"}),
        ("DoesNotExist", [], {"none"}),
        ("Gt", ["5"], {"two"}),
        ("Lt", ["50"], {"two"}),
        ("Gt", ["9"], set()),
    ],
)
def test_required_node_affinity(operator: str, values: list[str], matching: set[str]) -> None:
    """Each operator selects the nodes it selects in Kubernetes; a label that is no number is not compared."""
    labels = {"one": {"k": "a"}, "two": {"k": "9"}, "none": {}}
    spec = {"affinity": requires({"key": "k", "operator": operator, "values": values})}
    assert {name for name, own in labels.items() if matches_affinity(spec, node(name, labels=own))} == matching


def test_terms_are_alternatives_and_the_selector_is_not() -> None:
    """One of the terms must hold, and all of nodeSelector."""
    either = requires({"key": "a", "operator": "Exists"}, {"key": "b", "operator": "Exists"})
    spec = {"affinity": either, "nodeSelector": {"disk": "ssd"}}
    assert matches_affinity(spec, node(labels={"b": "", "disk": "ssd"}))
    assert not matches_affinity(spec, node(labels={"b": ""}))
    assert not matches_affinity(spec, node(labels={"disk": "ssd"}))
    by_name = requires({"key": "metadata.name", "operator": "In", "values": ["n2"]}, field="matchFields")
    assert matches_affinity({"affinity": by_name}, node("n2"))
    assert not matches_affinity({"affinity": by_name}, node("n1"))
    assert not matches_affinity({"affinity": requires()}, node())


@pytest.mark.parametrize(
    ("ready", "taint"),
    [
        ("True", None),
        ("False", "node.kubernetes.io/not-ready"),
        ("Unknown", "node.kubernetes.io/unreachable"),
        (None, "node.kubernetes.io/not-ready"),
    ],
)
def test_a_node_that_is_not_ready_counts_as_tainted(ready: str | None, taint: str | None) -> None:
    """Kubernetes' node controller would taint it."""
    assert [one["key"] for one in node_taints(node(ready=ready))] == ([taint] if taint else [])


@pytest.mark.parametrize(
    ("one", "there", "found"),
    [
        pytest.param(pod(), node(), None, id="nothing in the way"),
        pytest.param(pod(), node(unschedulable=True), UNSCHEDULABLE, id="cordoned"),
        pytest.param(
            pod(tolerations=[{"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}]),
            node(unschedulable=True),
            None,
            id="cordon tolerated",
        ),
        pytest.param(
            pod(),
            node(taints=[CONTROL_PLANE]),
            "node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }",
            id="taint",
        ),
        pytest.param(
            pod(),
            node(taints=[{"key": "k", "value": "v", "effect": "NoExecute"}]),
            "node(s) had untolerated taint {k: v}",
            id="taint with value",
        ),
        pytest.param(pod(), node(taints=[{"key": "k", "effect": "PreferNoSchedule"}]), None, id="only preferred"),
        pytest.param(pod(nodeSelector={"a": "b"}), node(), AFFINITY, id="label missing"),
        pytest.param(with_port(8080), node(), PORTS, id="port taken"),
        pytest.param(with_port(8081), node(), None, id="other port"),
        pytest.param(with_port(8080, protocol="UDP"), node(), None, id="other protocol"),
        pytest.param(pod(), node_for(1), FULL, id="full"),
        pytest.param(pod(), node_for(2), None, id="room for one more"),
    ],
)
def test_what_keeps_a_pod_from_a_node(one: Object, there: Object, found: str | None) -> None:
    """The obstacle is named in the scheduler's words."""
    assert obstacle(one, there, lambda: [with_port(8080, "other")], lambda: 1) == found


def test_host_ports() -> None:
    """hostNetwork takes every container port; addresses conflict when equal or when one means all."""
    ports = [{"containerPort": 80}, {"containerPort": 53, "protocol": "UDP"}]
    host = pod(hostNetwork=True, containers=[{"name": "c", "image": "i", "ports": ports}])
    assert host_ports(host) == [HostPort("TCP", "0.0.0.0", 80), HostPort("UDP", "0.0.0.0", 53)]
    assert host_ports(pod(containers=[{"name": "c", "image": "i", "ports": ports}])) == []
    local, any_address = HostPort("TCP", "127.0.0.1", 80), HostPort("TCP", "0.0.0.0", 80)
    assert local.conflicts(any_address)
    assert not local.conflicts(HostPort("TCP", "10.0.0.1", 80))


def test_failure_messages() -> None:
    """Reasons are counted and sorted as the scheduler prints them."""
    taint = "node(s) had untolerated taint {a: }"
    assert failure_message([AFFINITY, taint, AFFINITY]) == (
        "0/3 nodes are available: 1 node(s) had untolerated taint {a: }, "
        "2 node(s) didn't match Pod's node affinity/selector. "
        "preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling."
    )
    assert failure_message([]) == "no nodes available to schedule pods"


@pytest.mark.parametrize(
    ("own", "total", "chosen"),
    [
        pytest.param({"a": 1}, {"a": 1, "b": 5, "c": 5}, "b", id="fewest of the same owner first"),
        pytest.param({}, {"a": 2, "b": 1, "c": 1}, "b", id="then fewest pods, then the name"),
    ],
)
def test_spread(own: dict[str, int], total: dict[str, int], chosen: str) -> None:
    """Pods of one owner spread first, then all pods."""
    nodes = [node(name) for name in "cba"]
    best = best_node(pod(), nodes, lambda name: own.get(name, 0), lambda name: total.get(name, 0))
    assert best["metadata"]["name"] == chosen


def test_preferences_come_before_spread() -> None:
    """A PreferNoSchedule taint repels, a preferred node affinity attracts."""
    shunned = node("a", taints=[{"key": "k", "effect": "PreferNoSchedule"}])
    assert best_node(pod(), [shunned, node("b")], lambda _: 0, lambda name: name == "b")["metadata"]["name"] == "b"
    preferred = {"weight": 5, "preference": {"matchExpressions": [{"key": "fast", "operator": "Exists"}]}}
    wants = pod(affinity={"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]}})
    fast = node("z", labels={"fast": ""})
    assert best_node(wants, [node("a"), fast], lambda _: 0, lambda _: 0)["metadata"]["name"] == "z"


# --- with store and registry -----------------------------------------------------------------------------------------


@pytest.fixture
def world() -> World:
    return World(nodes=0)


def placed(world: World, name: str = "p") -> str:
    return str(world.get("pods", name)["spec"].get("nodeName", ""))


def scheduled(world: World, name: str = "p") -> Object:
    return next(one for one in world.get("pods", name)["status"]["conditions"] if one["type"] == "PodScheduled")


def test_a_pod_is_bound_and_told_so(world: World) -> None:
    """Binding sets the node, the condition and an event."""
    world.add_node("n1")
    world.create("pods", pod())
    world.settle()
    assert placed(world) == "n1"
    assert scheduled(world)["status"] == "True"
    assert world.messages("Scheduled") == ["Successfully assigned default/p to n1"]


@pytest.mark.parametrize(
    ("cure", "why"),
    [
        pytest.param(
            lambda world: world.registry.patch("nodes", "", "n1", {"metadata": {"labels": {"disk": "ssd"}}}),
            "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.",
            id="a label is added",
        ),
        pytest.param(
            lambda world: world.add_node("n2", labels={"disk": "ssd"}),
            "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.",
            id="a node is added",
        ),
    ],
)
def test_an_unplaced_pod_is_retried_when_nodes_change(world: World, cure: Any, why: str) -> None:
    """A pod that fits nowhere says why, and is placed as soon as it fits."""
    world.add_node("n1")
    world.create("pods", pod(nodeSelector={"disk": "ssd"}))
    world.settle()
    assert placed(world) == ""
    assert world.messages("FailedScheduling")[0].startswith(why)
    assert (scheduled(world)["status"], scheduled(world)["reason"]) == ("False", "Unschedulable")
    cure(world)
    world.settle()
    assert placed(world)
    assert scheduled(world)["status"] == "True"


def test_a_full_node_takes_no_more(world: World) -> None:
    """A node has as many pods as its kubelet allows; the next one waits until one of them has gone."""
    full = world.add_node("n1")
    status = {**full["status"], "allocatable": {"pods": "1"}}
    world.registry.update("nodes", {**full, "status": status}, subresource="status")
    for name in ("first", "second"):
        world.create("pods", pod(name))
        world.settle()
    assert (placed(world, "first"), placed(world, "second")) == ("n1", "")
    assert world.messages("FailedScheduling") == [
        "0/1 nodes are available: 1 Too many pods. "
        "preemption: 0/1 nodes are available: 1 No preemption victims found for incoming pod."
    ]
    world.registry.delete("pods", "default", "first")
    world.settle()
    assert placed(world, "second") == "n1"


def test_a_freed_port_places_the_next_pod(world: World) -> None:
    """Two pods with one host port share no node; when the first is gone the second is placed."""
    world.add_node("n1")
    world.create("pods", with_port(8080, "first"))
    world.create("pods", with_port(8080, "second"))
    world.settle()
    assert (placed(world, "first"), placed(world, "second")) == ("n1", "")
    assert world.messages("FailedScheduling")[0].startswith(
        "0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports."
    )
    world.registry.delete("pods", "default", "first")
    world.settle()
    assert placed(world, "second") == "n1"


def test_a_node_that_becomes_ready_takes_pods(world: World) -> None:
    """Pods wait for the first node to be ready; its heartbeats alone do not retry them."""
    unready = world.add_node("n1", ready=False)
    world.create("pods", pod())
    world.settle()
    assert world.messages("FailedScheduling")[0].startswith(
        "0/1 nodes are available: 1 node(s) had untolerated taint {node.kubernetes.io/not-ready: }."
    )
    unready = world.get("nodes", "n1", "")
    beat = {**unready["status"]["conditions"][0], "lastHeartbeatTime": "2024-01-01T00:00:10Z"}
    world.registry.update("nodes", {**unready, "status": {"conditions": [beat]}}, subresource="status")
    world.settle()
    (event,) = [one for one in world.store.list("events") if one["reason"] == "FailedScheduling"]
    assert event["count"] == 1
    ready = {**beat, "status": "True"}
    world.registry.patch("nodes", "", "n1", {"status": {"conditions": [ready]}}, subresource="status")
    world.settle()
    assert placed(world) == "n1"


def test_pods_of_others_are_left_alone(world: World) -> None:
    """A pod with a node, another scheduler or a scheduling gate is not bound."""
    world.add_node("n1")
    world.create("pods", pod("mine", nodeName="n1"))
    world.create("pods", pod("other", schedulerName="other"))
    world.create("pods", pod("gated", schedulingGates=[{"name": "wait"}]))
    world.settle()
    assert (placed(world, "mine"), placed(world, "other"), placed(world, "gated")) == ("n1", "", "")
    assert world.messages("Scheduled") == []
