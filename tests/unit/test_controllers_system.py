"""DaemonSets, namespaces, garbage, events, and the driver that runs them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from controllers_world import FakeTimers, World, deployment, service, template

from testbed.controllers import ControllerDriver, record_event
from testbed.controllers.pods import is_ready
from testbed.errors import ApiError
from testbed.model.objects import Key, Object, is_terminating
from testbed.registry import Registry
from testbed.store import Event


@pytest.fixture
def world() -> World:
    return World()


# --- DaemonSets ------------------------------------------------------------------------------------------------------


def daemon_set(*, image: str = "nginx", **spec: Any) -> Object:
    update = spec.pop("updateStrategy", {"type": "RollingUpdate"})
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "agent", "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": {"app": "agent"}},
            "template": template({"app": "agent"}, image=image, **spec),
            "updateStrategy": update,
        },
    }


def nodes_with_pod(world: World) -> list[str]:
    return sorted(pod["spec"].get("nodeName", "") for pod in world.pods())


def daemon_status(world: World) -> Object:
    status: Object = world.get("daemonsets.apps", "agent")["status"]
    return status


def test_a_daemon_on_every_node_that_may_have_it(world: World) -> None:
    """Labels and taints choose the nodes; a new node gets its pod, a removed label takes it away."""
    world.add_node("tainted", taints=[{"key": "k", "effect": "NoSchedule"}])
    world.create("daemonsets.apps", daemon_set())
    world.settle()
    assert nodes_with_pod(world) == ["node1", "node2", "node3"]
    assert daemon_status(world)["desiredNumberScheduled"] == daemon_status(world)["numberReady"] == 3
    world.add_node("node4")
    world.settle()
    assert nodes_with_pod(world) == ["node1", "node2", "node3", "node4"]
    world.change("daemonsets.apps", "agent", template=template({"app": "agent"}, nodeSelector={"disk": "ssd"}))
    world.registry.patch("nodes", "", "node2", {"metadata": {"labels": {"disk": "ssd"}}})
    world.settle()
    assert nodes_with_pod(world) == ["node2"]
    world.registry.patch("nodes", "", "node2", {"metadata": {"labels": {"disk": None}}})
    world.settle()
    assert nodes_with_pod(world) == []
    assert not world.errors


def test_daemons_tolerate_what_daemons_tolerate(world: World) -> None:
    """A cordoned node gets its daemon, and a NoExecute taint drives it away unless it is tolerated."""
    world.registry.patch("nodes", "", "node1", {"spec": {"unschedulable": True}})
    world.create("daemonsets.apps", daemon_set())
    world.settle()
    assert nodes_with_pod(world) == ["node1", "node2", "node3"]
    world.registry.patch("nodes", "", "node2", {"spec": {"taints": [{"key": "k", "effect": "NoExecute"}]}})
    world.settle()
    assert nodes_with_pod(world) == ["node1", "node3"]
    everywhere = template({"app": "agent"}, tolerations=[{"operator": "Exists"}])
    world.change("daemonsets.apps", "agent", template=everywhere)
    world.settle()
    assert nodes_with_pod(world) == ["node1", "node2", "node3"]


def test_daemons_are_replaced_one_by_one(world: World) -> None:
    """A rolling update has at most one node without a ready pod, and never two pods on one."""
    world.create("daemonsets.apps", daemon_set())
    world.settle()
    ready: list[int] = []
    crowded: list[bool] = []

    def look(_event: Event) -> None:
        pods = world.pods(terminating=True)
        ready.append(sum(is_ready(pod) and not is_terminating(pod) for pod in pods))
        crowded.append(len(pods) > 3)

    world.store.subscribe(look, "pods")
    world.change("daemonsets.apps", "agent", template=template({"app": "agent"}, image="nginx:2"))
    world.settle()
    assert [pod["spec"]["containers"][0]["image"] for pod in world.pods()] == ["nginx:2"] * 3
    assert min(ready) == 2
    assert not any(crowded)
    hashes = {pod["metadata"]["labels"]["controller-revision-hash"] for pod in world.pods()}
    assert len(hashes) == 1
    assert daemon_status(world)["updatedNumberScheduled"] == 3


def test_on_delete_waits_for_the_user(world: World) -> None:
    """With OnDelete a pod is replaced when someone deletes it."""
    world.create("daemonsets.apps", daemon_set(updateStrategy={"type": "OnDelete"}))
    world.settle()
    world.change("daemonsets.apps", "agent", template=template({"app": "agent"}, image="nginx:2"))
    world.settle()
    assert {pod["spec"]["containers"][0]["image"] for pod in world.pods()} == {"nginx"}
    world.registry.delete("pods", "default", world.pods()[0]["metadata"]["name"])
    world.settle()
    assert sorted(pod["spec"]["containers"][0]["image"] for pod in world.pods()) == ["nginx", "nginx", "nginx:2"]


def test_a_failed_daemon_is_made_anew(world: World) -> None:
    """A pod in phase Failed is deleted and replaced, with an event."""
    world.create("daemonsets.apps", daemon_set())
    world.settle()
    victim = world.pods()[0]
    world.kubelet.set_ready(victim, False, phase="Failed")
    world.settle()
    assert len(world.pods()) == 3
    assert victim["metadata"]["name"] not in [pod["metadata"]["name"] for pod in world.pods()]
    assert world.messages("FailedDaemonPod")


# --- namespaces ------------------------------------------------------------------------------------------------------


def test_system_namespaces_and_their_service_accounts(world: World) -> None:
    """A new cluster has four namespaces, each with the ServiceAccount default, which comes back when deleted."""
    world.settle()
    wanted = ["default", "kube-node-lease", "kube-public", "kube-system"]
    assert [one["metadata"]["name"] for one in world.store.list("namespaces")] == wanted
    assert [one["metadata"]["namespace"] for one in world.store.list("serviceaccounts")] == wanted
    world.registry.delete("serviceaccounts", "default", "default")
    world.settle()
    assert len(world.store.list("serviceaccounts")) == 4


def test_deleting_a_namespace_takes_all_with_it(world: World) -> None:
    """The namespace is Terminating until its pods have ended, then it and all in it are gone."""
    world.create("namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "dev"}})
    for resource, obj in (("services", service()), ("deployments.apps", deployment(replicas=3))):
        world.create(resource, {**obj, "metadata": {**obj["metadata"], "namespace": "dev"}})
    world.create("configmaps", {"metadata": {"name": "settings", "namespace": "dev"}, "data": {"a": "b"}})
    world.settle()
    assert len(world.pods("dev")) == 3
    world.kubelet.holds = is_terminating
    world.registry.delete("namespaces", "", "dev")
    world.settle()
    assert world.registry.get("namespaces", "", "dev")["status"]["phase"] == "Terminating"
    assert {one.partition("/")[0] for one in world.left("dev", but=())} == {"pods"}
    conditions = world.registry.get("namespaces", "", "dev")["status"]["conditions"]
    said = {one["type"]: one["message"] for one in conditions}
    assert said["NamespaceContentRemaining"] == "Some resources are remaining: pods. has 3 resource instances"
    assert said["NamespaceFinalizersRemaining"] == "All content-preserving finalizers finished"
    world.kubelet.holds = lambda _pod: False
    world.settle()
    assert world.store.get("namespaces", "", "dev") is None
    assert world.left("dev", but=()) == []
    assert not world.errors


def test_an_empty_namespace_goes_at_once(world: World) -> None:
    """Nothing but its ServiceAccount holds it."""
    world.create("namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "dev"}})
    world.settle()
    world.registry.delete("namespaces", "", "dev")
    world.settle()
    assert world.store.get("namespaces", "", "dev") is None
    assert world.left("dev", but=()) == []


# --- garbage ---------------------------------------------------------------------------------------------------------


def config_map(name: str, *owners: Object, **metadata: Any) -> Object:
    references = [
        {"apiVersion": one["apiVersion"], "kind": one["kind"], **{k: one["metadata"][k] for k in ("name", "uid")}}
        for one in owners
    ]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": "default", "ownerReferences": references, **metadata},
    }


def test_dependents_go_with_their_last_owner(world: World) -> None:
    """An object with two owners stays while one of them is there."""
    first, second = (world.create("configmaps", config_map(name)) for name in ("first", "second"))
    world.create("configmaps", config_map("child", first, second))
    world.registry.delete("configmaps", "default", "first")
    world.settle()
    child = world.get("configmaps", "child")
    assert [ref["name"] for ref in child["metadata"]["ownerReferences"]] == ["second"]
    world.registry.delete("configmaps", "default", "second")
    world.settle()
    assert world.store.get("configmaps", "default", "child") is None


def test_an_owner_that_never_was_takes_its_dependents(world: World) -> None:
    """A wrong uid is an owner that is gone; a kind that nobody stores cannot be said to be gone."""
    ghost = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "ghost", "uid": "nobody"}}
    foreign = {"apiVersion": "example.com/v1", "kind": "Foo", "metadata": {"name": "foo", "uid": "nobody"}}
    world.create("configmaps", config_map("orphan", ghost))
    world.create("configmaps", config_map("kept", foreign))
    world.settle()
    assert world.store.get("configmaps", "default", "orphan") is None
    assert world.get("configmaps", "kept")


def test_finalizers_of_propagation(world: World) -> None:
    """orphan leaves the dependents behind without owner; foregroundDeletion waits until they are gone."""
    owner = world.create("configmaps", config_map("owner", finalizers=["orphan"]))
    world.create("configmaps", config_map("child", owner))
    world.registry.delete("configmaps", "default", "owner")
    world.settle()
    assert world.store.get("configmaps", "default", "owner") is None
    assert not world.get("configmaps", "child")["metadata"].get("ownerReferences")

    held = deployment(replicas=2)
    held["metadata"]["finalizers"] = ["foregroundDeletion"]
    world.create("deployments.apps", held)
    world.settle()
    world.registry.delete("deployments.apps", "default", "web")
    world.settle()
    assert world.store.get("deployments.apps", "default", "web") is None
    assert world.left("default", but=("events", "serviceaccounts", "configmaps")) == []


# --- events ----------------------------------------------------------------------------------------------------------


def test_the_same_event_is_counted(world: World) -> None:
    """Saying the same again raises the count and the time; saying something else is another event."""
    obj = world.create("configmaps", config_map("a"))
    record_event(world.registry, obj, "Warning", "Bad", "it is bad", "tester")
    world.advance(60)
    record_event(world.registry, obj, "Warning", "Bad", "it is bad", "tester")
    record_event(world.registry, obj, "Warning", "Bad", "it is worse", "tester")
    first, second = sorted(
        (one for one in world.store.list("events") if one["reason"] == "Bad"), key=lambda one: -one["count"]
    )
    assert (first["count"], second["count"]) == (2, 1)
    assert (first["firstTimestamp"], first["lastTimestamp"]) == ("2024-01-01T00:00:00Z", "2024-01-01T00:01:00Z")
    assert first["involvedObject"]["uid"] == obj["metadata"]["uid"]
    assert first["metadata"]["name"].startswith("a.")


def test_an_event_that_cannot_be_written_fails_nothing(world: World) -> None:
    """Events about objects of a namespace that is gone are dropped."""
    gone = {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "p", "namespace": "nowhere", "uid": "u"}}
    record_event(world.registry, gone, "Normal", "Ended", "bye", "tester")
    assert not any(one["reason"] == "Ended" for one in world.store.list("events"))


# --- the driver ------------------------------------------------------------------------------------------------------


class Recorder:
    """A controller that notes what it is asked to do, and fails as told."""

    watches: frozenset[str] | None = frozenset({"configmaps"})

    def __init__(self, clock: list[float]) -> None:
        self.calls: list[tuple[float, str]] = []
        self.failures: dict[str, list[Exception]] = {}
        self.again: dict[str, float] = {}
        self.writes: dict[str, Callable[[], object]] = {}
        self.cost_s = 0.0
        self._clock = clock

    def keys(self, event: Event) -> Iterable[Key]:
        return [event.key]

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        self.calls.append((self._clock[0], key.name))
        self._clock[0] += self.cost_s
        if key.name in self.writes:
            self.writes.pop(key.name)()
        if self.failures.get(key.name):
            raise self.failures[key.name].pop(0)
        return self.again.pop(key.name, None)


class Bench:
    """A driver with one recording controller and a clock by hand."""

    def __init__(self, world: World) -> None:
        self.clock = [0.0]
        self.timers = FakeTimers(lambda: self.clock[0])
        self.errors: list[str] = []
        self.recorder = Recorder(self.clock)
        self.world = world
        self.driver = ControllerDriver(
            world.registry,
            [self.recorder],
            now_s=lambda: self.clock[0],
            call_later=self.timers.call_later,
            on_error=lambda _key, error: self.errors.append(str(error)),
        )
        self.driver.start()

    def write(self, name: str, text: str = "") -> None:
        obj = {"metadata": {"name": name, "namespace": "default"}, "data": {"text": text}}
        known = self.world.store.get("configmaps", "default", name)
        (self.world.registry.update if known else self.world.registry.create)("configmaps", obj)

    def pass_time(self, seconds: float) -> None:
        end = self.clock[0] + seconds
        while (due := self.timers.next_s) is not None and due <= end:
            self.clock[0] = max(self.clock[0], due)
            self.timers.ring_next(due)
        self.clock[0] = end


@pytest.fixture
def bench(world: World) -> Bench:
    return Bench(world)


def test_changes_of_one_object_are_one_reconcile(bench: Bench) -> None:
    """A key that is dirty already is not queued again."""
    for text in "abc":
        bench.write("one", text)
    bench.write("two")
    assert bench.driver.run_pending() == 2
    assert [name for _, name in bench.recorder.calls] == ["one", "two"]


def test_what_was_there_before_is_reconciled(world: World) -> None:
    """Starting takes notice of all objects in the store."""
    world.create("configmaps", config_map("old"))
    bench = Bench(world)
    bench.driver.run_pending()
    assert [name for _, name in bench.recorder.calls] == ["old"]


def test_a_failure_is_reported_and_tried_again_later_and_later(bench: Bench) -> None:
    """One key that fails does not hold up the others, and comes back at growing intervals."""
    bench.recorder.failures["bad"] = [RuntimeError(str(i)) for i in range(3)]
    bench.write("bad")
    bench.write("good")
    bench.driver.run_pending()
    bench.pass_time(10)
    assert bench.errors == ["0", "1", "2"]
    assert [name for _, name in bench.recorder.calls] == ["bad", "good", "bad", "bad", "bad"]
    times = [at for at, name in bench.recorder.calls if name == "bad"]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert waits == sorted(waits)
    assert waits[-1] > waits[0] > 0


def test_a_conflict_is_tried_again_at_once(bench: Bench) -> None:
    """A write that was based on an older state is no error."""
    bench.recorder.failures["one"] = [ApiError(409, "Conflict", "the object has been modified")]
    bench.write("one")
    bench.driver.run_pending()
    assert len(bench.recorder.calls) == 2
    assert bench.errors == []


def test_a_controller_can_ask_to_be_called_again(bench: Bench) -> None:
    """After the seconds that it returned, once."""
    bench.recorder.again["one"] = 7.0
    bench.write("one")
    bench.driver.run_pending()
    bench.pass_time(100)
    assert bench.recorder.calls == [(0.0, "one"), (7.0, "one")]


def test_what_is_past_is_forgotten(bench: Bench) -> None:
    """A key has one timer, however often it asks for one, and none when it is gone; rests end with their time."""
    bench.recorder.cost_s = 0.01
    for number in range(1000):
        bench.recorder.again[f"map-{number}"] = 600.0
        bench.write(f"map-{number}")
        bench.driver.run_pending()
        bench.pass_time(0.1)
        bench.write(f"map-{number}", "again")
        bench.driver.run_pending()
        bench.pass_time(0.1)
        bench.world.registry.delete("configmaps", "default", f"map-{number}")
        bench.driver.run_pending()
        bench.pass_time(0.1)
        assert len(bench.timers) == 0
    assert len(bench.driver._rests) < 200  # what is not seen from outside, but for the memory of weeks


def test_a_costly_object_rests(bench: Bench) -> None:
    """An object that takes 100 ms and changes all the time gets a fifth of the time, and its last state is seen."""
    bench.recorder.cost_s = 0.1
    for number in range(100):
        bench.write("big", str(number))
        bench.driver.run_pending()
        bench.pass_time(0.02)
    bench.pass_time(1)
    assert 3 <= len(bench.recorder.calls) <= 8


def test_much_work_is_done_in_turns(bench: Bench) -> None:
    """Others on the thread get in between, at the latest every 50 ms or so; new changes do not lengthen a turn."""
    bench.recorder.cost_s = 0.02
    names = [f"map-{number}" for number in range(7)]
    for name in names:
        bench.write(name)
    assert bench.driver.run_pending() == 3
    assert bench.driver.run_pending() == 0  # woken by somebody else's write: it is not its turn
    assert len(bench.timers) == 1
    assert bench.timers.ring_next(bench.clock[0])
    assert [name for _, name in bench.recorder.calls] == names[:6]
    bench.pass_time(0)
    assert [name for _, name in bench.recorder.calls] == names


def test_inside_a_store_callback_no_controller_works_on_old_news(bench: Bench) -> None:
    """There a controller's own write reaches the others only later, so the driver stops after it and comes back."""
    ran: list[int] = []
    bench.recorder.writes["one"] = lambda: bench.world.create("configmaps", config_map("child"))
    bench.write("one")
    bench.write("two")
    inside = bench.world.store.subscribe(lambda _event: ran.append(bench.driver.run_pending()))
    bench.write("three")
    inside.cancel()
    assert ran[0] == 1
    bench.pass_time(0)
    assert [name for _, name in bench.recorder.calls] == ["one", "two", "three", "child"]


def test_a_thousand_pods_come_up_in_seconds() -> None:
    """1,000 replicas behind a Service, made ready one by one: no work that grows with the square, whoever else works here."""
    world = World(clock=time.monotonic)
    began_s = time.process_time()
    world.create("services", service())
    world.create("deployments.apps", deployment(replicas=1000))
    while world.get("deployments.apps", "web").get("status", {}).get("availableReplicas") != 1000:
        world.settle()
        assert time.process_time() - began_s < 20  # 3.5 s of a processor; a square would take minutes
        time.sleep(0.005)
    while True:
        world.settle()
        slices = world.store.list("endpointslices.discovery.k8s.io")
        if sum(len(one["endpoints"]) for one in slices) == 1000:
            break
        assert time.process_time() - began_s < 20
        time.sleep(0.005)
    assert not world.errors


def test_a_foreground_deletion_waits_for_everything_below(world: World) -> None:
    """A Deployment stays until its ReplicaSet is gone, which stays until its pods are."""
    world.create("deployments.apps", deployment())
    world.settle()
    world.kubelet.holds = lambda _pod: True
    world.registry.delete("deployments.apps", "default", "web", propagation="Foreground")
    world.settle()
    (replica_set,) = world.store.list("replicasets.apps", "default")
    assert replica_set["metadata"]["finalizers"] == ["foregroundDeletion"]
    assert world.get("deployments.apps", "web")["metadata"]["finalizers"] == ["foregroundDeletion"]
    assert all("deletionTimestamp" in pod["metadata"] for pod in world.pods(terminating=True))
    world.kubelet.holds = lambda _pod: False
    world.kubelet._todo.update(
        {Key("pods", "default", pod["metadata"]["name"]): None for pod in world.pods(terminating=True)}
    )
    world.settle()
    assert world.left("default") == []
    assert world.errors == []


def test_an_orphan_deletion_leaves_everything_below(world: World) -> None:
    """The ReplicaSet and its pods live on without an owner, and a new Deployment of the same selector adopts them."""
    world.create("deployments.apps", deployment())
    world.settle()
    names = {pod["metadata"]["name"] for pod in world.pods()}
    world.registry.delete("deployments.apps", "default", "web", propagation="Orphan")
    world.settle()
    (replica_set,) = world.store.list("replicasets.apps", "default")
    assert not replica_set["metadata"].get("ownerReferences")
    world.create("deployments.apps", deployment())
    world.settle()
    assert {pod["metadata"]["name"] for pod in world.pods()} == names


def test_what_has_two_owners_stays_with_the_other(world: World) -> None:
    """A foreground deletion of one owner takes its reference off, and nothing else."""
    owners = [world.create("configmaps", config_map(name)) for name in ("a", "b")]
    references = [
        {"apiVersion": "v1", "kind": "ConfigMap", "name": one["metadata"]["name"], "uid": one["metadata"]["uid"],
         "blockOwnerDeletion": True}
        for one in owners
    ]  # fmt: skip
    child = config_map("child")
    world.create("configmaps", {**child, "metadata": {**child["metadata"], "ownerReferences": references}})
    world.registry.delete("configmaps", "default", "a", propagation="Foreground")
    world.settle()
    assert world.store.get("configmaps", "default", "a") is None
    assert [ref["name"] for ref in world.get("configmaps", "child")["metadata"]["ownerReferences"]] == ["b"]
