"""Jobs: pods until enough have succeeded."""

from __future__ import annotations

from typing import Any

import pytest
from controllers_world import World, template

from testbed.controllers.job import JobPlan, plan_job
from testbed.controllers.pods import condition_of
from testbed.errors import ApiError
from testbed.model.objects import Object


@pytest.mark.parametrize(
    ("spec", "counts", "plan"),
    [
        pytest.param({"completions": 1}, (0, 0, 0), JobPlan(create=1), id="the first pod"),
        pytest.param({"completions": 5, "parallelism": 2}, (1, 1, 0), JobPlan(create=1), id="as many as may run"),
        pytest.param({"completions": 5, "parallelism": 9}, (0, 4, 0), JobPlan(create=1), id="no more than are missing"),
        pytest.param({"completions": 2}, (0, 2, 1), JobPlan(end="Complete"), id="enough"),
        pytest.param(
            {"backoffLimit": 1, "completions": 1}, (1, 0, 2), JobPlan(delete=1, end="Failed"), id="too many failed"
        ),
        pytest.param({"backoffLimit": 1, "completions": 1}, (0, 0, 1), JobPlan(create=1), id="one more try"),
        pytest.param(
            {"completions": 3, "parallelism": 3, "suspend": True}, (2, 0, 0), JobPlan(delete=2), id="suspended"
        ),
        pytest.param({"parallelism": 3}, (2, 1, 0), JobPlan(), id="a work queue runs dry"),
        pytest.param({"parallelism": 3}, (0, 1, 0), JobPlan(end="Complete"), id="a work queue is done"),
    ],
)
def test_what_a_job_needs_next(spec: Object, counts: tuple[int, int, int], plan: JobPlan) -> None:
    """Pods are made up to parallelism and completions, and the backoff limit ends it."""
    active, succeeded, failures = counts
    assert plan_job(spec, active=active, succeeded=succeeded, failures=failures) == plan


@pytest.fixture
def world() -> World:
    world = World()
    world.settle()
    return world


def start(world: World, name: str = "once", **spec: Any) -> None:
    pod_template = template({}, restartPolicy="Never")
    world.create(
        "jobs.batch",
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"template": pod_template, **spec},
        },
    )
    world.settle()


def end_pod(world: World, phase: str) -> None:
    running = next(pod for pod in world.pods() if pod["status"]["phase"] == "Running")
    world.kubelet.set_ready(running, False, phase=phase)
    world.settle()


def test_a_job_completes(world: World) -> None:
    """After the wanted successes the Job is Complete, keeps its pods and starts no more."""
    start(world, completions=2, parallelism=1)
    for _ in range(2):
        end_pod(world, "Succeeded")
    status = world.get("jobs.batch", "once")["status"]
    assert (status["succeeded"], status.get("active", 0)) == (2, 0)
    assert (condition_of({"status": status}, "Complete") or {})["status"] == "True"
    assert [pod["status"]["phase"] for pod in world.pods()] == ["Succeeded"] * 2
    assert {pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] for pod in world.pods()} == {"once"}
    world.registry.delete("jobs.batch", "default", "once")
    world.settle()
    assert world.left("default") == []
    assert not world.errors


def test_what_a_job_tells_of_its_pods(world: World) -> None:
    """ready, terminating and uncountedTerminatedPods are there from the first on, also with nothing to tell."""
    start(world, completions=1)
    status = world.get("jobs.batch", "once")["status"]
    assert {field: status.get(field) for field in ("active", "ready", "terminating", "uncountedTerminatedPods")} == {
        "active": 1, "ready": 1, "terminating": 0, "uncountedTerminatedPods": {},
    }  # fmt: skip
    end_pod(world, "Succeeded")
    status = world.get("jobs.batch", "once")["status"]
    del status["conditions"], status["startTime"], status["completionTime"]
    assert status == {"ready": 0, "succeeded": 1, "terminating": 0, "uncountedTerminatedPods": {}}


def test_a_job_tries_again_after_a_pause_and_gives_up(world: World) -> None:
    """A failed pod is replaced after 10 s; one failure above the limit fails the Job."""
    start(world, completions=1, backoffLimit=1)
    end_pod(world, "Failed")
    assert len(world.pods()) == 1
    world.advance(11)
    assert len(world.pods()) == 2
    end_pod(world, "Failed")
    status = world.get("jobs.batch", "once")["status"]
    assert (condition_of({"status": status}, "Failed") or {})["reason"] == "BackoffLimitExceeded"
    world.advance(100)
    assert len(world.pods()) == 2


def test_a_job_selects_its_own_pods(world: World) -> None:
    """Its selector and its template's labels are made from its uid, and one that somebody else wrote is refused."""
    start(world)
    job = world.get("jobs.batch", "once")
    uid = job["metadata"]["uid"]
    assert job["spec"]["selector"] == {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    (pod,) = world.pods()
    assert pod["metadata"]["labels"]["batch.kubernetes.io/controller-uid"] == uid
    assert pod["metadata"]["labels"]["job-name"] == "once"
    with pytest.raises(ApiError, match="`selector` not auto-generated"):
        start(world, name="other", selector={"matchLabels": {"a": "b"}})


def test_a_job_that_takes_too_long(world: World) -> None:
    """After activeDeadlineSeconds its pods are deleted and it has failed."""
    start(world, activeDeadlineSeconds=30)
    world.advance(29)
    assert len(world.pods()) == 1
    world.advance(2)
    assert world.pods() == []
    failed = condition_of(world.get("jobs.batch", "once"), "Failed")
    assert failed is not None
    assert (failed["reason"], failed["message"]) == (
        "DeadlineExceeded",
        "Job was active longer than specified deadline",
    )
    assert world.messages("DeadlineExceeded") == ["Job was active longer than specified deadline"]


def test_a_job_that_is_not_kept(world: World) -> None:
    """With ttlSecondsAfterFinished it is deleted that long after its end, and its pods with it."""
    start(world, ttlSecondsAfterFinished=60)
    end_pod(world, "Succeeded")
    world.advance(59)
    assert world.get("jobs.batch", "once")
    world.advance(2)
    assert world.store.get("jobs.batch", "default", "once") is None
    assert world.left("default") == []


def test_suspending_and_resuming(world: World) -> None:
    """A suspended Job has no pods and says so; resumed, it starts, and its time counts from there."""
    start(world, suspend=True, activeDeadlineSeconds=50)
    assert world.pods() == []
    suspended = condition_of(world.get("jobs.batch", "once"), "Suspended")
    assert suspended is not None
    assert (suspended["status"], suspended["reason"]) == ("True", "JobSuspended")
    world.advance(100)
    world.change("jobs.batch", "once", suspend=False)
    world.settle()
    assert len(world.pods()) == 1
    assert world.messages("Suspended") + world.messages("Resumed") == ["Job suspended", "Job resumed"]
    world.advance(49)
    assert len(world.pods()) == 1
    world.advance(2)
    assert world.pods() == []
