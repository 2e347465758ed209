"""Running scenarios against a lab without machines: real objects and controllers, scripted answers, time by hand."""

# ruff: noqa: E501  # whole texts, in tables

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from controllers_world import World
from scenario_world import FakeLab

from testbed.dataplane.doctor import Finding
from testbed.errors import KernelError, LabError
from testbed.kernel.processes import Completed
from testbed.manifests import load_objects, load_scenario
from testbed.model.objects import Object, name_of
from testbed.model.scenario import Condition, ObjectRef, ScaleStep, Scenario, Selector, WaitStep
from testbed.probes import ArpAnswer, Observation, Outcome
from testbed.scenario.objects import describe, holds, ready_endpoints, selected
from testbed.scenario.recorder import Recorder
from testbed.scenario.runner import RETRY_EVERY_S, ScenarioResult, Status, StepResult, run_scenario

WEB = """\
apiVersion: v1
kind: Namespace
metadata: {name: dev}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: dev}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: nginx}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: dev}
spec: {selector: {app: web}, ports: [{port: 80}]}
"""
ADMIN = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web-admin, namespace: dev}
spec:
  selector: {matchLabels: {app: admin}}
  template:
    metadata: {labels: {app: admin}}
    spec: {containers: [{name: web, image: nginx}]}
"""
HEADER = """\
apiVersion: testbed/v1
kind: Scenario
metadata: {name: s}
spec:
  topology: three-nodes
  proxyModes: [iptables, ipvs]
  steps:
"""
GET = 'from: client, get: "http://10.96.1.10/"'


class Bench:
    """A scenario folder and the lab its steps run in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world = World()
        self.world.settle()
        (folder / "web.yaml").write_text(WEB)
        (folder / "admin.yaml").write_text(ADMIN)
        self.began: list[tuple[int, int, str]] = []
        self.ended: list[tuple[int, int, str]] = []
        self.lab: FakeLab

    def load(self, *steps: str) -> Scenario:
        (self.folder / "scenario.yaml").write_text(HEADER + "".join(f"    - {step}\n" for step in steps))
        scenario = load_scenario(self.folder)
        if not hasattr(self, "lab"):
            self.lab = FakeLab(self.world, scenario.topology)
        return scenario

    def run(self, *steps: str, mode: str = "iptables") -> ScenarioResult:
        """Run some steps as a scenario; time passes only while it pauses."""
        return self.run_loaded(self.load(*steps), mode)

    def run_loaded(
        self, scenario: Scenario, mode: str = "iptables", recorder: Recorder | None = None
    ) -> ScenarioResult:
        return run_scenario(
            scenario, mode, self.lab, clock=lambda: self.world.now_s, pause=self.world.advance, recorder=recorder,
            on_begin=lambda number, total, step: self.began.append((number, total, step.title)),
            on_end=lambda result, total: self.ended.append((result.number, total, result.status.value)),
        )  # fmt: skip

    def prepare(self) -> None:
        """Have the objects of both files, running."""
        self.load("apply: web.yaml")
        for file in ("web.yaml", "admin.yaml"):
            for source in load_objects(self.folder / file):
                self.lab.api.apply(source.object)
        self.world.settle()

    def last(self, *steps: str, mode: str = "iptables") -> StepResult:
        """Run steps after the objects of both files exist; return the last one's result."""
        self.prepare()
        return self.run("apply: [web.yaml, admin.yaml]", *steps, mode=mode).steps[-1]

    def pods(self, app: str = "web") -> list[str]:
        found = self.world.pods("dev")
        return sorted(f"dev/{name_of(pod)}" for pod in found if pod["metadata"]["labels"]["app"] == app)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def answered(pod: str = "", **fields: Any) -> Observation:
    return Observation(outcome=Outcome.ANSWERED, answered_by=pod, **fields)


REFUSED = Observation(outcome=Outcome.REFUSED, detail="Connection refused")


class FakeRecorder:
    """A recorder that notes what it is told, and cannot capture at ``broken``."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.told: list[tuple[str, int, object]] = []

    def begin(self, number: int, points: Sequence[str]) -> None:
        if self.broken in points:
            raise LabError(f"cannot capture: there is no point {self.broken!r}")
        self.told.append(("begin", number, list(points)))

    def end(self, number: int, *, failed: bool) -> tuple[str, ...]:
        self.told.append(("end", number, failed))
        return (f"step-{number}.pcapng",)


# ── packets of steps ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_recorder_is_told_of_every_step_and_its_points(bench: Bench) -> None:
    """Pods of a capture are those that are there when the step begins; a step's tries are one recording."""
    bench.prepare()
    recorder = FakeRecorder()
    steps = bench.load(
        "apply: [web.yaml, admin.yaml]",
        "{wait: {deployment: dev/web, for: available}, capture: [node1, 'dev/app=web:eth0', svc/dev/web]}",
    )
    result = bench.run_loaded(steps, recorder=recorder)
    assert recorder.told == [
        ("begin", 1, []), ("end", 1, False),
        ("begin", 2, ["node1", *(f"{pod}:eth0" for pod in bench.pods()), "svc/dev/web"]), ("end", 2, False),
    ]  # fmt: skip
    assert [step.captures for step in result.steps] == [("step-1.pcapng",), ("step-2.pcapng",)]


def test_a_capture_that_cannot_be_made_fails_its_step(bench: Bench) -> None:
    """Whoever asks for packets is not left without them silently; the step is not tried."""
    result = bench.run_loaded(bench.load("{apply: web.yaml, capture: node1}"), recorder=FakeRecorder("node1"))
    assert result.steps[0].status is Status.FAILED and result.steps[0].attempts == 0
    assert (result.steps[0].wanted, result.steps[0].seen) == (
        "a capture at node1", "cannot capture: there is no point 'node1'",
    )  # fmt: skip


# ── the whole run ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_steps_run_in_order_and_say_so(bench: Bench) -> None:
    """Each step begins and ends in order; objects are really there afterwards."""
    result = bench.run("apply: web.yaml", "wait: {deployment: dev/web, for: available}", f"expect: {{{GET}}}")
    assert result.passed
    assert [step.status for step in result.steps] == [Status.PASSED] * 3
    assert result.steps[0].seen == "namespace/dev created, deployment/web created, service/web created"
    assert bench.began == [
        (1, 3, "apply web.yaml"),
        (2, 3, "wait for deployment dev/web: available"),
        (3, 3, "client → http://10.96.1.10/: answers"),
    ]
    assert bench.ended == [(1, 3, "passed"), (2, 3, "passed"), (3, 3, "passed")]
    assert len(bench.pods()) == 2
    assert result.duration_s == pytest.approx(bench.world.now_s)


def test_nothing_runs_after_a_failure(bench: Bench) -> None:
    """The steps behind a failed one are told, and touch nothing."""
    bench.load("apply: web.yaml")
    bench.lab.answers = lambda _round: [REFUSED]
    result = bench.run(
        "apply: web.yaml", f"expect: {{{GET}, within: 0s}}", "apply: admin.yaml", "fault: {link: node1, down: true}"
    )
    assert not result.passed
    assert [step.status.value for step in result.steps] == ["passed", "failed", "not run", "not run"]
    assert [begun[0] for begun in bench.began] == [1, 2]
    assert bench.ended[2:] == [(3, 4, "not run"), (4, 4, "not run")]
    assert (bench.pods("admin"), bench.lab.links) == ([], [])
    assert (result.steps[3].attempts, result.steps[3].wanted) == (0, "")


@pytest.mark.parametrize(("mode", "ran"), [("iptables", ["a", "b"]), ("ipvs", ["a", "c"])])
def test_steps_of_other_modes_are_left_out(bench: Bench, mode: str, ran: list[str]) -> None:
    """`modes:` decides; numbers count the steps that run."""
    steps = [
        "{name: a, exec: {in: node1, run: a}}",
        "{name: b, exec: {in: node1, run: b}, modes: [iptables]}",
        "{name: c, exec: {in: node1, run: c}, modes: [ipvs]}",
    ]
    result = bench.run(*steps, mode=mode)
    assert bench.lab.ran == [("node1", (name,)) for name in ran]
    assert [(step.number, step.step.title) for step in result.steps] == list(enumerate(ran, 1))


# ── trying again ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("within", "good_from", "attempts", "status"),
    [
        ("0s", 2, 1, Status.FAILED),
        ("1s", 1, 1, Status.PASSED),
        ("1s", 4, 4, Status.PASSED),
        ("1s", 11, 11, Status.PASSED),  # the last try is at the deadline
        ("1s", 12, 11, Status.FAILED),
        ("50ms", 2, 1, Status.FAILED),  # sooner than the next try
    ],
)
def test_an_expectation_is_tried_until_its_deadline(
    bench: Bench, within: str, good_from: int, attempts: int, status: Status
) -> None:
    """Every 0.1 s, until it holds or `within` is over."""
    bench.load("apply: web.yaml")
    bench.lab.answers = lambda number: [answered() if number >= good_from else REFUSED]
    result = bench.run(f"expect: {{{GET}, within: {within}}}").steps[0]
    assert (result.attempts, len(bench.lab.asked), result.status) == (attempts, attempts, status)
    assert result.duration_s == pytest.approx((attempts - 1) * RETRY_EVERY_S)


def test_time_that_requests_take_counts(bench: Bench) -> None:
    """A request that runs out of patience uses up the deadline: 5 s hold three tries of 1.9 s."""
    bench.load("apply: web.yaml")

    def slow(_round: int) -> list[Observation]:
        bench.world.advance(1.9)
        return [Observation(outcome=Outcome.TIMED_OUT, detail="no answer within 1.9 s")]

    bench.lab.answers = slow
    result = bench.run(f"expect: {{{GET}, patience: 1900ms}}").steps[0]
    assert (result.attempts, result.status) == (3, Status.FAILED)
    assert result.wanted == "an answer (within 5 s)"
    assert result.seen == "timed out (no answer within 1.9 s)"


def test_a_statistical_expectation_is_never_tried_again(bench: Bench) -> None:
    """Sampling until luck strikes would prove nothing, whatever `within` says."""
    bench.prepare()
    a, b = bench.pods()
    bench.lab.answers = lambda _round: [answered(a)] * 250 + [answered(b)] * 50
    result = bench.run(
        "apply: web.yaml",
        f"expect: {{{GET}, times: 300, answeredBy: {{each: dev/app=web, spread: even}}, within: 30s}}",
    ).steps[-1]
    assert (result.status, result.attempts, len(bench.lab.asked)) == (Status.FAILED, 1, 1)
    assert (
        result.wanted
        == "300 answers, from each pod of dev/app=web (2 ready), spread evenly at random (chi-square p > 1e-06)"
    )
    assert result.counts == {a: 250, b: 50}
    assert len(result.observations) == 300


def test_an_error_is_a_failed_try(bench: Bench) -> None:
    """What the lab refuses may come right; at the deadline its own words are what was seen."""
    bench.load("apply: web.yaml")

    def broken(number: int) -> list[Observation]:
        if number < 3:
            raise KernelError("client: ask ended with status 137 and no answer")
        return [answered()]

    bench.lab.answers = broken
    assert bench.run(f"expect: {{{GET}}}").steps[0].attempts == 3
    bench.lab.asked.clear()
    failed = bench.run(f"expect: {{{GET}, within: 100ms}}").steps[0]
    assert (failed.status, failed.wanted, failed.seen) == (
        Status.FAILED, "client → http://10.96.1.10/: answers (within 0.1 s)", "client: ask ended with status 137 and no answer"
    )  # fmt: skip


def test_other_errors_are_not_hidden(bench: Bench) -> None:
    """A broken invariant of ours is a traceback, not a failed expectation."""
    bench.load("apply: web.yaml")

    def broken(_round: int) -> list[Observation]:
        raise AssertionError("ours")

    bench.lab.answers = broken
    with pytest.raises(AssertionError, match="ours"):
        bench.run(f"expect: {{{GET}}}")


# ── objects ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_applying_again_changes_nothing(bench: Bench) -> None:
    """The words of kubectl: created, configured, unchanged."""
    bench.run("apply: web.yaml")
    (bench.folder / "web.yaml").write_text(WEB.replace("replicas: 2", "replicas: 3"))
    result = bench.run("apply: web.yaml").steps[0]
    assert result.seen == "namespace/dev unchanged, deployment/web configured, service/web unchanged"


def test_what_the_api_refuses_points_at_its_line(bench: Bench) -> None:
    """The API's own words, and the place in the manifest; objects before it stay."""
    taken = WEB.replace("ports: [{port: 80}]", "ports: [{port: 80}], clusterIP: 10.96.1.10, type: ClusterIP")
    (bench.folder / "web.yaml").write_text(taken)
    bench.load("apply: web.yaml")
    other = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "first", "namespace": "default"},
             "spec": {"clusterIP": "10.96.1.10", "ports": [{"port": 80}]}}  # fmt: skip
    bench.lab.api.apply(other)
    result = bench.run("apply: web.yaml").steps[0]
    assert (result.status, result.attempts) == (Status.FAILED, 1)
    assert result.wanted == "apply web.yaml"
    assert result.seen == (
        'Service "web" is invalid: spec.clusterIPs: Invalid value: []string{"10.96.1.10"}: '
        "failed to allocate IP 10.96.1.10: provided IP is already allocated"
    )
    assert result.where == f"{bench.folder}/web.yaml:15"
    assert len(bench.world.registry.list("deployments.apps", "dev")) == 1


def test_deleting_what_is_absent_succeeds(bench: Bench) -> None:
    """By file in reverse order, and by name; the second time there is nothing left to delete."""
    bench.prepare()
    by_name = "delete: {deployment: dev/web-admin}"
    assert bench.run("apply: [web.yaml, admin.yaml]", by_name, by_name).passed
    bench.world.advance(60)
    assert (bench.pods("admin"), len(bench.pods())) == ([], 2)
    assert bench.run("{delete: web.yaml, name: everything}", "{delete: web.yaml, name: again}").passed
    bench.world.advance(60)
    assert [name_of(one) for one in bench.world.registry.list("namespaces")].count("dev") == 0


def test_deleting_passes_on_other_refusals(bench: Bench) -> None:
    """Only 404 means success."""
    bench.load("apply: web.yaml")
    (bench.folder / "system.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: kube-system}\n")
    result = bench.run("delete: system.yaml").steps[0]
    assert (result.status, result.seen) == (
        Status.FAILED, 'namespaces "kube-system" is forbidden: this namespace may not be deleted'
    )  # fmt: skip


def test_scaling(bench: Bench) -> None:
    """Without `within` the number is set and that is all; with it the step lasts until that many pods are ready."""
    bench.prepare()
    bench.world.kubelet.holds = lambda _pod: bench.world.now_s < 3
    at_once = bench.run("apply: web.yaml", "scale: {deployment: dev/web, replicas: 4}").steps[-1]
    assert (at_once.status, at_once.attempts, bench.world.now_s) == (Status.PASSED, 1, 0)
    waited = bench.run("apply: web.yaml", "scale: {deployment: dev/web, replicas: 5, within: 10s}").steps[-1]
    assert (waited.status, len(bench.pods())) == (Status.PASSED, 5)
    assert 3 <= bench.world.now_s < 3.5
    bench.world.kubelet.holds = lambda _pod: True
    failed = bench.run("apply: web.yaml", "scale: {deployment: dev/web, replicas: 6, within: 2s}").steps[-1]
    assert (failed.status, failed.wanted, failed.seen) == (
        Status.FAILED, "6 ready (within 2 s)", "web 5/6 available, 6 updated"
    )  # fmt: skip


def test_scaling_what_is_not_there(bench: Bench) -> None:
    """The API's words."""
    scenario = bench.load("apply: web.yaml")
    step = ScaleStep(
        file="s", line=1, title="scale it", object=ObjectRef("deployments.apps", "dev", "gone"), replicas=1
    )
    result = bench.run_loaded(replace(scenario, steps=(step,))).steps[0]
    assert (result.wanted, result.seen) == ("scale it", 'deployments.apps "gone" not found')


# ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wait", "wanted", "seen_before"),
    [
        ("deployment: dev/web, for: available", "deployment dev/web available", "web 0/2 available, 2 updated"),
        ("deployment: dev/web, for: ready", "deployment dev/web ready", "web 0/2 available, 2 updated"),
        ("pods: dev/app=web, for: ready, count: 2", "exactly 2 pod dev/app=web ready", "{a} Pending, not ready; {b} Pending, not ready"),
        ("pods: dev/app=web, for: running", "pod dev/app=web running", "{a} Pending, not ready; {b} Pending, not ready"),
        ("pods: dev/web, for: ready", "pod dev/web ready", "{a} Pending, not ready; {b} Pending, not ready"),
        ("service: dev/web, for: endpoints", "service dev/web endpoints", "no ready endpoint"),
        ("service: dev/web, for: endpoints, count: 2", "service dev/web endpoints, 2 of them", "no ready endpoint"),
    ],
)  # fmt: skip
def test_waiting_for_pods_to_run(bench: Bench, wait: str, wanted: str, seen_before: str) -> None:
    """Not before they are; then at once. What is missing is told object by object."""
    bench.world.kubelet.holds = lambda _pod: True
    failed = bench.last(f"wait: {{{wait}, within: 1s}}")
    a, b = [pod.removeprefix("dev/") for pod in bench.pods()]
    assert (failed.status, failed.attempts) == (Status.FAILED, 11)
    assert failed.wanted == f"{wanted} (within 1 s)"
    assert sorted(failed.seen.split("; ")) == sorted(seen_before.format(a=a, b=b).split("; "))

    bench.world.kubelet.holds = lambda _pod: bench.world.now_s < 5
    began = bench.world.now_s
    passed = bench.run("apply: web.yaml", f"wait: {{{wait}}}").steps[-1]
    assert passed.status is Status.PASSED
    assert 5 - began <= passed.duration_s < 5.3 - began
    assert passed.wanted == wanted


@pytest.mark.parametrize(
    ("wait", "wanted", "seen"),
    [
        ("pods: dev/app=web, for: ready, count: 1", "exactly 1 pod dev/app=web ready", "{a} Running, ready; {b} Running, ready"),
        ("service: dev/web, for: endpoints, count: 3", "service dev/web endpoints, 3 of them", "{addresses}"),
        ("deployment: dev/web, for: deleted", "deployment dev/web deleted", "web 2/2 available, 2 updated"),
        ("pods: dev/app=web, for: succeeded", "pod dev/app=web succeeded", "{a} Running, ready; {b} Running, ready"),
        ("node: node9, for: ready", "node node9 ready", "no such object"),
    ],
)  # fmt: skip
def test_waiting_in_vain(bench: Bench, wait: str, wanted: str, seen: str) -> None:
    """Too many are as wrong as too few, and what is not there is not ready."""
    bench.prepare()
    if "node9" in wait:
        scenario = bench.load("apply: web.yaml")
        about = {"file": "s", "line": 1, "title": "wait", "within_s": 0.0}
        step = WaitStep(**about, resource="nodes", selector=Selector("", "node9"), condition=Condition.READY)
        failed = bench.run_loaded(replace(scenario, steps=(step,))).steps[0]
        assert (failed.wanted, failed.seen) == (wanted, seen)
        return
    failed = bench.run("apply: web.yaml", f"wait: {{{wait}, within: 0s}}").steps[-1]
    a, b = [pod.removeprefix("dev/") for pod in bench.pods()]
    addresses = ", ".join(sorted(pod["status"]["podIP"] for pod in bench.world.pods("dev") if name_of(pod) in (a, b)))
    assert (failed.status, failed.attempts, failed.wanted) == (Status.FAILED, 1, wanted)
    assert sorted(failed.seen.split("; ")) == sorted(seen.format(a=a, b=b, addresses=addresses).split("; "))


def test_waiting_until_it_is_gone(bench: Bench) -> None:
    """Deleted means no object of it is left; the pods that end are told meanwhile."""
    bench.prepare()
    terminating = bench.pods("admin")[0].removeprefix("dev/")
    bench.world.kubelet.holds = lambda _pod: bench.world.now_s < 4
    steps = ("apply: [web.yaml, admin.yaml]", "delete: admin.yaml")
    failed = bench.run(*steps, "wait: {pods: dev/app=admin, for: deleted, within: 1s}").steps[-1]
    assert (failed.status, failed.seen) == (Status.FAILED, f"{terminating} Running, terminating")
    assert bench.run(
        *steps, "wait: {pods: dev/app=admin, for: deleted}", "wait: {deployment: dev/web-admin, for: deleted}"
    ).passed


def condition(kind: str, status: str = "True") -> Object:
    return {"conditions": [{"type": kind, "status": status}]}


def an(
    kind: str, status: Object | None = None, *, generation: int = 1, terminating: bool = False, **spec: Any
) -> Object:
    metadata = {"name": "x", "namespace": "dev", "generation": generation}
    ending = {"deletionTimestamp": "2024-01-01T00:00:00Z"} if terminating else {}
    return {"kind": kind, "metadata": {**metadata, **ending}, "spec": spec, "status": status or {}}


ROLLED_OUT = {"observedGeneration": 1, "replicas": 3, "updatedReplicas": 3, "availableReplicas": 3}


@pytest.mark.parametrize(
    ("obj", "wanted", "met", "words"),
    [
        # Deployments: seen by their controller, all new, all available, nothing old left
        (an("Deployment", ROLLED_OUT, replicas=3), Condition.AVAILABLE, True, "x 3/3 available, 3 updated"),
        (an("Deployment", ROLLED_OUT, replicas=3, generation=2), Condition.AVAILABLE, False, "x 3/3 available, 3 updated"),
        (an("Deployment", {**ROLLED_OUT, "replicas": 4}, replicas=3), Condition.AVAILABLE, False, "x 3/3 available, 3 updated"),
        (an("Deployment", {**ROLLED_OUT, "updatedReplicas": 2}, replicas=3), Condition.AVAILABLE, False, "x 3/3 available, 2 updated"),
        (an("Deployment", {**ROLLED_OUT, "availableReplicas": 2}, replicas=3), Condition.READY, False, "x 2/3 available, 3 updated"),
        (an("Deployment", {"observedGeneration": 1}, replicas=0), Condition.AVAILABLE, True, "x 0/0 available, 0 updated"),
        (an("Deployment", {"observedGeneration": 1}), Condition.AVAILABLE, False, "x 0/1 available, 0 updated"),
        # ReplicaSets have no updatedReplicas
        (an("ReplicaSet", {"observedGeneration": 1, "replicas": 2, "availableReplicas": 2}, replicas=2), Condition.READY, True, "x 2/2 available"),
        (an("ReplicaSet", {"observedGeneration": 1, "replicas": 3, "availableReplicas": 2}, replicas=2), Condition.READY, False, "x 2/2 available"),
        # DaemonSets: on every node that is meant
        (an("DaemonSet", {"observedGeneration": 1, "desiredNumberScheduled": 3, "updatedNumberScheduled": 3, "numberAvailable": 3}),
         Condition.AVAILABLE, True, "x 3/3 available"),
        (an("DaemonSet", {"observedGeneration": 1, "desiredNumberScheduled": 3, "updatedNumberScheduled": 2, "numberAvailable": 3}),
         Condition.AVAILABLE, False, "x 3/3 available"),
        (an("DaemonSet", {"observedGeneration": 1, "desiredNumberScheduled": 0}), Condition.AVAILABLE, False, "x 0/0 available"),
        # Pods
        (an("Pod", {"phase": "Running", **condition("Ready")}), Condition.READY, True, "x Running, ready"),
        (an("Pod", {"phase": "Running", **condition("Ready", "False")}), Condition.READY, False, "x Running, not ready"),
        (an("Pod", {"phase": "Running", **condition("Ready")}, terminating=True), Condition.READY, False, "x Running, terminating"),
        (an("Pod", {"phase": "Running"}, terminating=True), Condition.RUNNING, False, "x Running, terminating"),
        (an("Pod", {"phase": "Running"}), Condition.RUNNING, True, "x Running, not ready"),
        (an("Pod", {"phase": "Succeeded"}), Condition.SUCCEEDED, True, "x Succeeded, not ready"),
        (an("Pod", {"phase": "Failed"}), Condition.SUCCEEDED, False, "x Failed, not ready"),
        (an("Pod"), Condition.RUNNING, False, "x Pending, not ready"),
        (an("Pod", {"phase": "Pending", "containerStatuses": [{"state": {"running": {}}}, {"state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}),
         Condition.READY, False, "x Pending, not ready CrashLoopBackOff"),
        # Nodes and Jobs
        (an("Node", condition("Ready")), Condition.READY, True, "x ready"),
        (an("Node", condition("Ready", "Unknown")), Condition.READY, False, "x not ready"),
        (an("Job", {"succeeded": 1, **condition("Complete")}), Condition.SUCCEEDED, True, "x 0 active, 1 succeeded, 0 failed"),
        (an("Job", {"active": 2, "failed": 1}), Condition.SUCCEEDED, False, "x 2 active, 0 succeeded, 1 failed"),
        (an("Job", {"failed": 6, **condition("Failed")}), Condition.SUCCEEDED, False, "x 0 active, 0 succeeded, 6 failed"),
    ],
)  # fmt: skip
def test_conditions(obj: Object, wanted: Condition, met: bool, words: str) -> None:
    """When an object is in a condition, and its state in a few words."""
    assert (holds(obj, wanted), describe(obj)) == (met, words)


def owned(name: str, owner_kind: str, owner: str, **labels: str) -> Object:
    references = [{"kind": owner_kind, "name": owner, "uid": "u", "controller": True}]
    return {"metadata": {"name": name, "namespace": "dev", "labels": labels, "ownerReferences": references}}


PODS = [
    owned("web-7d4b9c-aaaaa", "ReplicaSet", "web-7d4b9c", app="web", **{"pod-template-hash": "7d4b9c"}),
    owned("web-admin-5f6f7-bbbbb", "ReplicaSet", "web-admin-5f6f7", app="admin", **{"pod-template-hash": "5f6f7"}),
    owned("proxy-ccccc", "DaemonSet", "proxy", app="proxy"),
    {"metadata": {"name": "web-2", "namespace": "dev", "labels": {"app": "web", "tier": "x"}}},
]


@pytest.mark.parametrize(
    ("selector", "with_owned", "names"),
    [
        (Selector("dev", "web"), True, ["web-7d4b9c-aaaaa"]),  # not web-admin's, and not the pod web-2
        (Selector("dev", "web-admin"), True, ["web-admin-5f6f7-bbbbb"]),
        (Selector("dev", "web-7d4b9c"), True, ["web-7d4b9c-aaaaa"]),  # the ReplicaSet's name
        (Selector("dev", "proxy"), True, ["proxy-ccccc"]),
        (Selector("dev", "web-2"), True, ["web-2"]),
        (Selector("dev", "web"), False, []),
        (Selector("dev", "we"), True, []),
        (Selector("dev", labels=(("app", "web"),)), True, ["web-7d4b9c-aaaaa", "web-2"]),
        (Selector("dev", labels=(("app", "web"), ("tier", "x"))), True, ["web-2"]),
    ],
)
def test_whose_pods(selector: Selector, with_owned: bool, names: list[str]) -> None:
    """By labels, by name, or by the name of the workload that owns them: names that begin alike are not enough."""
    assert [name_of(pod) for pod in selected(PODS, selector, with_owned=with_owned)] == names


def test_ready_endpoints() -> None:
    """Unknown readiness counts as ready; an address in two slices is one."""
    slices = [
        {"endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": True}}, {"addresses": ["10.0.0.2"], "conditions": {"ready": False}}]},
        {"endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.3"], "conditions": {"ready": None}}, {"addresses": ["10.0.0.4"], "conditions": None}]},
        {"endpoints": None},
    ]  # fmt: skip
    assert ready_endpoints(slices) == {"10.0.0.1", "10.0.0.3", "10.0.0.4"}


# ── programs ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("step", "done", "passed", "wanted", "seen"),
    [
        ("run: ls", Completed(0, b"a\n", b""), True, "status 0", "status 0, printed 'a'"),
        ("run: ls", Completed(2, b"", b"ls: no\n"), False, "status 0", "status 2, printed '', said 'ls: no'"),
        ("run: ls, status: 2", Completed(2, b"", b""), True, "status 2", "status 2, printed ''"),
        ("run: ls, prints: b", Completed(0, b"abc", b""), True, "status 0, 'b' printed", "status 0, printed 'abc'"),
        ("run: ls, prints: x", Completed(0, b"abc", b"x"), False, "status 0, 'x' printed", "status 0, printed 'abc', said 'x'"),
        ("run: ls, prints: a", Completed(1, b"a", b""), False, "status 0, 'a' printed", "status 1, printed 'a'"),
        ("run: ls, prints: x", Completed(0, b"y" * 500, b""), False, "status 0, 'x' printed", f"status 0, printed '{'y' * 400}…'"),
        ("run: ls, prints: x", Completed(0, b"\xff", b""), False, "status 0, 'x' printed", "status 0, printed '\ufffd'"),
    ],
)  # fmt: skip
def test_programs(bench: Bench, step: str, done: Completed, passed: bool, wanted: str, seen: str) -> None:
    """Status and output both have to be as wanted; errors are shown, not searched."""
    bench.load("apply: web.yaml")
    bench.lab.programs = lambda _run: done
    result = bench.run(f"exec: {{in: node1, {step}}}").steps[0]
    assert (result.status is Status.PASSED, result.attempts) == (passed, 1)
    assert (result.wanted, result.seen, result.where) == (wanted, seen, "`ls` in node1")


def test_programs_are_run_again_within(bench: Bench) -> None:
    """Only where `within` says so."""
    bench.load("apply: web.yaml")
    bench.lab.programs = lambda run: Completed(0 if run == 3 else 1, b"", b"")
    result = bench.run("exec: {in: node1, run: \"sh -c 'a b'\", within: 1s}").steps[0]
    assert (result.status, result.attempts, result.where) == (Status.PASSED, 3, "`sh -c 'a b'` in node1")
    assert bench.lab.ran == [("node1", ("sh", "-c", "a b"))] * 3


def test_outputs_are_kept(bench: Bench) -> None:
    """What a step keeps is put into the words of later ones, and can be what another output must differ from."""
    bench.load("apply: web.yaml")
    bench.lab.programs = lambda run: Completed(0, b"10.96.0.8\n" if run < 3 else b"10.96.0.9\n", b"")
    result = bench.run(
        "exec: {in: node1, run: first, keep: address}", "exec: {in: node1, run: 'ask {{address}}'}",
        "exec: {in: node1, run: again, differs: address}",
    )  # fmt: skip
    assert [step.status for step in result.steps] == [Status.PASSED] * 3
    assert bench.lab.ran[1] == ("node1", ("ask", "10.96.0.8"))


@pytest.mark.parametrize(
    ("wanted", "passed"),
    [
        ("names: [hairpin-off]", True),
        ("names: [hairpin-off], at: [node node1]", True),
        ("names: [hairpin-off], at: [node node2]", False),
        ("names: []", False),
        ("names: [hairpin-off, dns-down]", False),
    ],
)
def test_the_doctor_names_exactly(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, wanted: str, passed: bool
) -> None:  # fmt: skip
    """A doctor step wants exactly these causes, and the places it names among theirs."""
    found = Finding(cause="hairpin-off", where="node node1", what="seen", do="mend it")
    monkeypatch.setattr("testbed.scenario.runner.examine", lambda _lab: ((found,), None))
    bench.load("apply: web.yaml")
    result = bench.run(f"doctor: {{{wanted}, within: 0s}}").steps[0]
    assert (result.status is Status.PASSED, result.seen) == (passed, "hairpin-off at node node1: seen")


def test_kubectl(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the lab's kubeconfig, in the scenario's folder; without a program, a plain word."""
    bench.load("apply: web.yaml")
    step = "kubectl: {run: apply -f web.yaml, prints: web}"
    bench.lab.kubeconfig = tmp_path / "config"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "none"))
    assert "no kubectl on PATH and none in our own environment" in bench.run(step).steps[0].seen
    program = tmp_path / "kubectl"
    code = "import os, sys; print(sys.argv[1:], os.listdir())"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"\n')
    program.chmod(0o755)
    result = bench.run(step).steps[0]
    assert (result.status, result.where) == (Status.PASSED, "`kubectl apply -f web.yaml`")
    assert f"['--kubeconfig={tmp_path}/config', 'apply', '-f', 'web.yaml']" in result.seen
    assert "'web.yaml', " in result.seen.split("]")[1]


# ── places ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_requests_start_where_they_are_to(bench: Bench) -> None:
    """A machine by name; of several pods the first ready one by name; the answer's claims go to whom they name."""
    bench.prepare()
    first, second = bench.pods()
    result = bench.run(
        "apply: [web.yaml, admin.yaml]",
        f"expect: {{{GET}, times: 7}}",
        'expect: {from: dev/app=web, tcp: "10.96.1.10:80"}',
        'expect: {from: dev/web, tcp: "10.96.1.10:80", body: ""}',
    )
    assert result.passed
    assert [(where, str(request), times, only) for where, request, times, only in bench.lab.asked] == [
        ("client", "http://10.96.1.10/", 7, False),
        (first, "tcp 10.96.1.10:80", 1, True),
        (first, "tcp 10.96.1.10:80", 1, False),
    ]
    assert [step.where for step in result.steps[1:3]] == [
        "http://10.96.1.10/ from client", f"tcp 10.96.1.10:80 from {first}"
    ]  # fmt: skip
    pod = bench.world.get("pods", first.removeprefix("dev/"), "dev")
    bench.world.kubelet.set_ready(pod, False)
    bench.run("apply: [web.yaml, admin.yaml]", "exec: {in: dev/app=web, run: ls}")
    assert bench.lab.ran == [(second, ("ls",))]


def test_a_place_that_is_not_ready_is_waited_for(bench: Bench) -> None:
    """A pod that starts is a place a moment later."""
    bench.world.kubelet.holds = lambda _pod: bench.world.now_s < 2
    passed = bench.last(f"expect: {{{GET.replace('client', 'dev/app=web')}}}")
    assert (passed.status, passed.attempts) == (Status.PASSED, 21)
    for pod in bench.world.pods("dev"):
        bench.world.kubelet.set_ready(pod, False)
    failed = bench.run("apply: web.yaml", "{name: look, exec: {in: dev/app=web, run: ls}}").steps[-1]
    assert (failed.status, failed.attempts, failed.wanted, failed.seen) == (
        Status.FAILED, 1, "look", "no pod of dev/app=web is ready"
    )  # fmt: skip


def test_who_is_ready_to_answer(bench: Bench) -> None:
    """answeredBy means the pods that are ready now; who is not may not be missed."""
    bench.prepare()
    first, second = bench.pods()
    bench.world.kubelet.set_ready(bench.world.get("pods", second.removeprefix("dev/"), "dev"), False)
    bench.lab.answers = lambda _round: [answered(first)]
    step = f"expect: {{{GET}, times: 2, answeredBy: {{each: dev/web}}, within: 0s}}"
    result = bench.run("apply: web.yaml", step).steps[-1]
    assert (result.status, result.wanted) == (Status.PASSED, "2 answers, from each pod of dev/web (1 ready)")
    assert result.counts == {first: 1}


@pytest.mark.parametrize(
    ("client", "address"),
    [
        ("client", "192.168.93.100"),
        ("node2", "192.168.93.12"),
        ("10.1.2.3", "10.1.2.3"),
        ("dev/app=web", ""),
        ("dev/web-admin", ""),
    ],
)
def test_whose_address_the_server_sees(bench: Bench, client: str, address: str) -> None:
    """Machines by the topology, pods by their status (the first ready one by name, as for `from`), or as written."""
    bench.prepare()
    if not address:
        pods = bench.pods("admin" if "admin" in client else "web")
        address = bench.world.get("pods", pods[0].removeprefix("dev/"), "dev")["status"]["podIP"]
    for seen, status in ((address, Status.PASSED), ("172.16.0.1", Status.FAILED)):
        bench.lab.answers = lambda _round, seen=seen: [answered(seen_client=seen)]  # type: ignore[misc]
        step = f"expect: {{{GET}, sees: {{client: {client}}}, within: 0s}}"
        result = bench.run("apply: [web.yaml, admin.yaml]", step).steps[-1]
        assert (result.status, result.wanted) == (status, f"an answer, client address {address} seen by the server")


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("word", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP), ("start", signal.SIGCONT)]
)
def test_signals(bench: Bench, word: str, number: int) -> None:
    """Every selected pod, or those on one node."""
    result = bench.last(f"fault: {{{word}: dev/web}}")
    assert bench.lab.signals == [(pod, number) for pod in bench.pods()]
    assert result.seen == ", ".join(bench.pods())
    bench.lab.signals.clear()
    name = bench.pods()[0].removeprefix("dev/")
    node = bench.world.get("pods", name, "dev")["spec"]["nodeName"]
    there = [
        pod
        for pod in bench.pods()
        if bench.world.get("pods", pod.removeprefix("dev/"), "dev")["spec"]["nodeName"] == node
    ]
    bench.run("apply: [web.yaml, admin.yaml]", f"fault: {{{word}: dev/app=web@{node}}}")
    assert bench.lab.signals == [(pod, number) for pod in there]
    assert len(there) == 1, "the scheduler spreads two pods over three nodes"


def test_signals_to_nobody_fail(bench: Bench) -> None:
    """A fault that hits nothing would make every later step mean something else."""
    bench.prepare()
    used = {pod["spec"]["nodeName"] for pod in bench.world.pods("dev") if pod["metadata"]["labels"]["app"] == "web"}
    free = ({"node1", "node2", "node3"} - used).pop()
    result = bench.run("apply: web.yaml", f"fault: {{kill: dev/web@{free}}}").steps[-1]
    assert (result.status, result.attempts) == (Status.FAILED, 1)
    assert (result.wanted, result.seen) == (f"a pod dev/web on node {free}", "there is none")
    bench.world.registry.delete("deployments.apps", "dev", "web")
    bench.world.advance(60)
    result = bench.run("{modes: [ipvs], apply: web.yaml}", "fault: {kill: dev/web}").steps[-1]
    assert (result.wanted, result.seen) == ("a pod dev/web", "there is none")


def test_links(bench: Bench) -> None:
    """Down and up again."""
    assert bench.run("fault: {link: node2, down: true}", "fault: {link: client, down: false}").passed
    assert bench.lab.links == [("node2", False), ("client", True)]


def test_names_are_asked_for_where_the_step_says(bench: Bench) -> None:
    """Pods ask as their resolv.conf says; machines, which have none for the cluster, ask cluster DNS. Pods stand for addresses."""
    bench.prepare()
    addresses = {
        str(pod["status"]["podIP"]) for pod in bench.world.pods("dev") if pod["metadata"]["labels"]["app"] == "web"
    }
    answer = "".join(f"web-pods.dev.svc.cluster.local. 30 IN A {address}\n" for address in sorted(addresses))
    bench.lab.programs = lambda _run: Completed(0, f";; status: NOERROR\n{answer}".encode(), b"")
    result = bench.run(
        "apply: [web.yaml, admin.yaml]",
        "expect: {from: dev/web, resolve: web-pods, answers: dev/app=web}",
        "expect: {from: client, resolve: web-pods.dev.svc.cluster.local, answers: dev/app=web}",
        "expect: {from: client, resolve: x, server: 192.168.93.53, answers: 10.9.9.9, within: 1s}",
    )
    assert [step.status for step in result.steps] == [Status.PASSED, Status.PASSED, Status.PASSED, Status.FAILED]
    assert [argv[1] for _, argv in bench.lab.ran][:3] == ["+search", "@10.96.0.10", "@192.168.93.53"]
    assert bench.lab.ran[0][0] == bench.pods()[0]
    assert result.steps[-1].wanted == "NOERROR: 10.9.9.9 (within 1 s)"
    assert result.steps[-1].seen == f"NOERROR: {', '.join(sorted(addresses))}"
    assert "dig @192.168.93.53 +search" in result.steps[-1].where


NODE1, NODE2, STRANGER = "0a:58:c0:a8:5d:0b", "0a:58:c0:a8:5d:0c", "02:00:00:00:00:01"


@pytest.mark.parametrize(
    ("answers", "expected", "passed", "seen"),
    [
        pytest.param([NODE2], "[node2]", True, f"answered by node2 ({NODE2})", id="the one that should"),
        pytest.param(
            [NODE2, NODE2], "[node2]", True, f"answered by node2 ({NODE2})", id="twice by the same: kernel and speaker"
        ),
        pytest.param(
            [NODE2, NODE1], "[node2]", False, f"answered by node1 ({NODE1}), node2 ({NODE2})", id="one too many"
        ),
        pytest.param(
            [NODE2, NODE1], "[node1, node2]", True, f"answered by node1 ({NODE1}), node2 ({NODE2})", id="several"
        ),
        pytest.param([], "[node2]", False, "answered by nobody", id="nobody"),
        pytest.param([], "[]", True, "answered by nobody", id="nobody, as expected"),
        pytest.param([NODE1], "[]", False, f"answered by node1 ({NODE1})", id="somebody after all"),
        pytest.param([STRANGER], "[node1]", False, f"answered by {STRANGER}", id="a stranger is shown by its MAC"),
    ],
)
def test_who_answers_arp(bench: Bench, answers: list[str], expected: str, passed: bool, seen: str) -> None:
    """The machines whose MACs answer are compared with those that are expected, as sets."""
    bench.load("fault: {link: node2, down: true}")
    bench.lab.arp_answers = lambda _question: [ArpAnswer(mac, 0.1) for mac in answers]
    (result,) = bench.run(f"expect: {{from: client, arp: 192.168.93.231, answeredBy: {expected}, within: 1s}}").steps
    assert ((result.status is Status.PASSED), result.seen, result.where) == (
        passed,
        seen,
        "arp 192.168.93.231 from client",
    )
    assert bench.lab.arps[0] == ("client", IPv4Address("192.168.93.231")) and (result.attempts == 1) == passed


def test_anybody_may_answer_arp(bench: Bench) -> None:
    """Without answeredBy one answer is enough; it is asked again until the time is over."""
    bench.load("fault: {link: node2, down: true}")
    bench.lab.arp_answers = lambda question: [ArpAnswer(STRANGER, 0.1)] if question == 3 else []
    (result,) = bench.run("expect: {from: client, arp: 192.168.93.231}").steps
    assert (result.status, result.attempts) == (Status.PASSED, 3)
