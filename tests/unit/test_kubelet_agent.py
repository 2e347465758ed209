"""A kubelet at work on a real registry and a pretended runtime: pods from binding to removal. Time is virtual."""

from __future__ import annotations

import asyncio
import base64
from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise
from typing import Any

import pytest

from testbed.errors import NotPresent
from testbed.model.topology import NodeSpec
from tests.kubelet_world import SIGKILL, SIGQUIT, SIGTERM, Behaviour, NodeWorld, node_world, run

ECHO = {"name": "web", "image": "echo", "ports": [{"name": "http", "containerPort": 8080}]}
HTTP = {"httpGet": {"path": "/healthz", "port": "http"}}


def two(**fields: Any) -> dict[str, Any]:
    """Return a spec with two echo containers."""
    return {"containers": [{"name": "a", "image": "echo"}, {"name": "b", "image": "echo"}], **fields}


# --- coming up -------------------------------------------------------------------------------------------------------


def test_a_pod_comes_up() -> None:
    """A bound pod gets an address, runs, is ready, and its story is told in events."""

    async def main() -> None:
        async with node_world() as world:
            world.pod()
            await world.until(world.is_ready)
            status = world.status()
            assert (status["phase"], status["podIP"], status["hostIP"]) == ("Running", "10.244.1.2", "192.168.93.11")
            assert status["podIPs"] == [{"ip": "10.244.1.2"}]
            assert status["qosClass"] == "BestEffort"
            shown = world.container()
            assert (shown["ready"], shown["started"], shown["restartCount"]) == (True, True, 0)
            assert "running" in shown["state"]
            (spec,) = world.runtime.started
            assert shown["containerID"] == f"testbed://{spec.container_id}"
            assert spec.argv == ("nginx", "-g", "daemon off;")
            (sandbox,) = world.runtime.sandboxes.values()
            assert (sandbox.hostname, sandbox.address) == ("web", IPv4Address("10.244.1.2"))
            assert "10.244.1.2\tweb" in sandbox.etc_files["hosts"]
            assert world.events("Pulled") == ['Container image "nginx:1.17.1" already present on machine']
            assert (world.events("Created"), world.events("Started")) == (
                ["Created container web"],
                ["Started container web"],
            )

    run(main)


def test_pods_of_other_nodes_are_left_alone() -> None:
    """Only pods bound to the node are run, whenever they are bound."""

    async def main() -> None:
        async with node_world() as world:
            world.pod("there", spec={"nodeName": "node2"})
            waiting = world.pod("waiting", spec={"nodeName": ""})
            await world.stays(lambda: not world.runtime.sandboxes, 5)
            world.registry.update("pods", {**waiting, "spec": {**waiting["spec"], "nodeName": "node1"}})
            await world.until(lambda: world.is_ready("waiting"))

    run(main)


def test_a_pod_that_was_there_before_the_kubelet() -> None:
    """What was bound before the kubelet came is run too."""

    async def main() -> None:
        world = NodeWorld()
        world.pod()
        task = asyncio.create_task(world.kubelet.run())
        await world.until(world.is_ready)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(main)


def test_host_network() -> None:
    """A pod of the host network has the node's address and takes none of the pods'."""

    async def main() -> None:
        async with node_world() as world:
            world.pod("host", spec={"hostNetwork": True})
            await world.until(lambda: world.is_ready("host"))
            assert world.status("host")["podIP"] == "192.168.93.11"
            (sandbox,) = world.runtime.sandboxes.values()
            assert (sandbox.address, sandbox.network, sandbox.hostname) == (None, None, "node1")
            world.pod("own")
            await world.until(lambda: world.is_ready("own"))
            assert world.status("own")["podIP"] == "10.244.1.2"

    run(main)


def test_services_before_the_pod_are_in_its_environment() -> None:
    """A Service that exists when the pod starts is in its variables."""

    async def main() -> None:
        async with node_world() as world:
            service = world.create("services", "db", spec={"ports": [{"port": 5432}]})
            world.pod()
            await world.until(world.is_ready)
            assert world.runtime.started[0].env["DB_SERVICE_HOST"] == service["spec"]["clusterIP"]

    run(main)


def test_an_unknown_image_is_announced() -> None:
    """A stand-in runs, and a Warning says that it is one."""

    async def main() -> None:
        async with node_world() as world:
            world.pod(image="example.com/cart:v3", ports=[{"containerPort": 9000}], imagePullPolicy="Never")
            await world.until(world.is_ready)
            (spec,) = world.runtime.started
            assert (spec.builtin, spec.builtin_args["ports"]) == ("echo", [["TCP", 9000]])
            (message,) = world.events("StandIn")
            assert "example.com/cart:v3" in message

    run(main)


def test_keys_that_are_no_variables_are_announced() -> None:
    """The container starts without them, and a Warning lists them."""

    async def main() -> None:
        async with node_world() as world:
            world.create("configmaps", "c", data={"1st": "1", "index.html": "2"})
            world.pod(envFrom=[{"configMapRef": {"name": "c"}}])
            await world.until(world.is_ready)
            assert world.runtime.started[0].env["index.html"] == "2"
            assert "1st" not in world.runtime.started[0].env
            assert world.events("InvalidEnvironmentVariableNames") == [
                "Keys [1st] from the EnvFrom configMap default/c were skipped since they are considered invalid environment "
                "variable names."
            ]

    run(main)


def test_an_impossible_image_name() -> None:
    """The pod waits with InvalidImageName, and others are not held up."""

    async def main() -> None:
        async with node_world() as world:
            world.pod(image="NGINX:::")
            world.pod("other")
            await world.until(lambda: world.is_ready("other"))
            assert world.container()["state"]["waiting"]["reason"] == "InvalidImageName"
            assert world.status()["phase"] == "Pending"

    run(main)


def test_a_program_that_cannot_start() -> None:
    """A start that is refused is an Error, counts as an end with 128, and is tried again with back-off."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["web"] = Behaviour(
                fails_to_start='exec: "nope": executable file not found in $PATH'
            )
            world.pod(command=["nope"])
            await world.until(lambda: world.runtime.times("start", "web")[1:])
            assert world.container()["restartCount"] >= 1
            await world.until(lambda: world.container()["state"].get("waiting", {}).get("reason") == "CrashLoopBackOff")
            last = world.container()["lastState"]["terminated"]
            assert (last["exitCode"], last["reason"]) == (128, "StartError")
            assert "executable file not found in $PATH" in world.events("Failed")[0]
            world.runtime.behaviours["web"].fails_to_start = ""
            await world.until(world.is_ready)
            assert len(world.runtime.containers) == 1

    run(main)


def test_a_sandbox_that_fails_is_tried_again() -> None:
    """A refused sandbox is told in an event and tried again; its address is not lost."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.sandbox_problems = ["no memory", "no memory"]
            world.pod()
            await world.until(world.is_ready)
            assert "no memory" in world.events("FailedCreatePodSandBox")[0]
            assert len(world.runtime.sandboxes) == 1

    run(main)


def test_no_address_left() -> None:
    """Without a free address a pod waits, says so, and starts when one is given back."""
    small = NodeSpec(
        name="node1", network="lan", address=IPv4Address("192.168.93.11"), pod_cidr=IPv4Network("10.244.1.0/29")
    )

    async def main() -> None:
        async with node_world(small) as world:
            for number in range(5):
                world.pod(f"p{number}")
            await world.until(lambda: all(world.is_ready(f"p{number}") for number in range(5)))
            world.pod("late")
            await world.until(lambda: world.events("FailedCreatePodSandBox"))
            freed = world.status("p2")["podIP"]
            world.registry.delete("pods", "default", "p2")
            await world.until(lambda: world.is_ready("late"))
            assert world.status("late")["podIP"] == freed

    run(main)


def test_at_most_eight_sandboxes_at_once() -> None:
    """Many pods start without all of them asking the runtime together."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.start_s = 0.01
            for number in range(40):
                world.pod(f"p{number}")
            await world.until(lambda: all(world.is_ready(f"p{number}") for number in range(40)))
            assert 2 <= world.runtime.most_at_once <= 8
            assert len({world.status(f"p{number}")["podIP"] for number in range(40)}) == 40

    run(main)


def test_status_is_written_rarely() -> None:
    """A pod without probes costs at most four writes of its status until it is ready."""

    async def main() -> None:
        async with node_world() as world:
            writes: list[str] = []
            world.store.subscribe(lambda event: writes.append(event.type.value), "pods")
            for number in range(50):
                world.pod(f"p{number}")
            await world.until(lambda: all(world.is_ready(f"p{number}") for number in range(50)))
            assert writes.count("ADDED") == 50
            assert writes.count("MODIFIED") <= 4 * 50

    run(main)


# --- volumes and configuration ---------------------------------------------------------------------------------------

VOLUME = {"volumes": [{"name": "conf", "configMap": {"name": "settings"}}]}
MOUNTED = {"name": "web", "image": "nginx", "volumeMounts": [{"name": "conf", "mountPath": "/conf"}]}


def test_a_late_config_map() -> None:
    """A pod waits in ContainerCreating for its ConfigMap, says why, and starts as soon as it is there."""

    async def main() -> None:
        async with node_world() as world:
            world.pod(spec={"containers": [MOUNTED], **VOLUME})
            await world.until(lambda: world.events("FailedMount"))
            assert world.events("FailedMount") == [
                'MountVolume.SetUp failed for volume "conf" : configmap "settings" not found'
            ]
            assert world.container()["state"]["waiting"]["reason"] == "ContainerCreating"
            await world.stays(lambda: not world.runtime.started, 30)
            created_at = world.loop.time()
            world.create("configmaps", "settings", data={"a": "1"})
            assert await world.until(world.is_ready) - created_at < 1
            uid = world.get()["metadata"]["uid"]
            assert world.runtime.volumes[uid, "conf"] == {"a": "1"}

    run(main)


def test_a_changed_config_map_reaches_the_running_pod() -> None:
    """Mounted files follow the ConfigMap; nothing is restarted, and other pods are not touched."""

    async def main() -> None:
        async with node_world() as world:
            settings = world.create("configmaps", "settings", data={"a": "1"})
            world.pod(spec={"containers": [MOUNTED], **VOLUME})
            await world.until(world.is_ready)
            uid = world.get()["metadata"]["uid"]
            world.registry.update("configmaps", {**settings, "data": {"a": "2"}})
            await world.until(lambda: world.runtime.volumes[uid, "conf"] == {"a": "2"})
            assert world.container()["restartCount"] == 0

    run(main)


def test_a_missing_key_of_the_environment() -> None:
    """A container whose variable cannot be filled waits with CreateContainerConfigError until it can."""

    async def main() -> None:
        async with node_world() as world:
            reference = {"configMapKeyRef": {"name": "settings", "key": "a"}}
            world.pod(env=[{"name": "A", "valueFrom": reference}])
            await world.until(lambda: "waiting" in world.container().get("state", {}) and world.events("Failed"))
            waiting = world.container()["state"]["waiting"]
            assert waiting == {"reason": "CreateContainerConfigError", "message": 'configmap "settings" not found'}
            world.create("configmaps", "settings", data={"a": "1"})
            await world.until(world.is_ready)
            assert world.runtime.started[0].env["A"] == "1"

    run(main)


def test_a_volume_that_nothing_provides() -> None:
    """A pod with a claim stays in ContainerCreating and names it, and can be deleted."""

    async def main() -> None:
        async with node_world() as world:
            world.pod(spec={"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]})
            await world.until(lambda: world.events("FailedMount"))
            assert "persistentVolumeClaim" in world.events("FailedMount")[0]
            world.registry.delete("pods", "default", "web")
            await world.until(world.is_gone, within_s=2)

    run(main)


# --- restarts --------------------------------------------------------------------------------------------------------


def test_a_crash_loop() -> None:
    """A crashing container starts again at once, then after 10, 20, 40 s, in the same sandbox with the same address."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["web"] = Behaviour(*[(1, 1)] * 5)
            world.pod()
            await world.until(lambda: len(world.runtime.times("start", "web")) == 3)
            address = world.status()["podIP"]
            await world.until(lambda: "waiting" in world.container()["state"])
            shown = world.container()
            waiting = shown["state"]["waiting"]
            assert waiting["reason"] == "CrashLoopBackOff"
            assert waiting["message"].startswith("back-off 20s restarting failed container=web")
            assert shown["lastState"]["terminated"]["exitCode"] == 1
            assert not world.is_ready()
            assert world.status()["phase"] == "Running"
            await world.until(lambda: len(world.runtime.times("start", "web")) == 5, within_s=120)
            starts = world.runtime.times("start", "web")
            gaps = [round(after - before - 1) for before, after in pairwise(starts)]
            assert gaps == [0, 10, 20, 40]
            assert world.container()["restartCount"] == 4
            assert world.status()["podIP"] == address
            assert len(world.runtime.times("create_sandbox")) == 1
            assert len({spec.container_id for spec in world.runtime.started}) == 5
            assert len(world.runtime.containers) == 1

    run(main)


@pytest.mark.parametrize(
    ("policy", "code", "phase"),
    [("Never", 0, "Succeeded"), ("Never", 3, "Failed"), ("OnFailure", 0, "Succeeded")],
)
def test_pods_that_end(policy: str, code: int, phase: str) -> None:
    """A pod that may end does, with its exit code, and is started only once; its object stays."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["web"] = Behaviour((2, code))
            world.pod(spec={"restartPolicy": policy})
            await world.until(lambda: world.status().get("phase") == phase)
            ended = world.container()["state"]["terminated"]
            assert (ended["exitCode"], ended["reason"]) == (code, "Completed" if code == 0 else "Error")
            await world.stays(lambda: not world.is_gone() and len(world.runtime.started) == 1, 60)
            world.registry.delete("pods", "default", "web")
            await world.until(world.is_gone)
            await world.until(lambda: not world.runtime.sandboxes)

    run(main)


def test_on_failure_tries_again() -> None:
    """OnFailure repeats a failure and stops at the first success."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["web"] = Behaviour((1, 1), (1, 0))
            world.pod(spec={"restartPolicy": "OnFailure"})
            await world.until(lambda: world.status().get("phase") == "Succeeded")
            assert world.container()["restartCount"] == 1

    run(main)


def test_one_container_crashes_alone() -> None:
    """The other container of the pod goes on, and the pod is not ready meanwhile."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["a"] = Behaviour((5, 1), (1, 1))
            world.pod(spec=two())
            await world.until(world.is_ready)
            await world.until(lambda: "waiting" in world.container("web", "a")["state"])
            assert "running" in world.container("web", "b")["state"]
            assert not world.is_ready()
            await world.until(world.is_ready)
            assert world.container("web", "b")["restartCount"] == 0

    run(main)


# --- init containers -------------------------------------------------------------------------------------------------


def init(*names: str, **fields: Any) -> dict[str, Any]:
    return {"initContainers": [{"name": name, "image": "busybox", **fields} for name in names], "containers": [ECHO]}


def test_init_containers_run_one_after_another() -> None:
    """Each init container ends before the next starts, and all before the others."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours |= {"one": Behaviour((2, 0)), "two": Behaviour((3, 0))}
            world.pod(spec=init("one", "two"))
            await world.until(lambda: world.runtime.times("start", "two"))
            assert world.container()["state"]["waiting"]["reason"] == "PodInitializing"
            assert world.status()["phase"] == "Pending"
            await world.until(world.is_ready)
            assert [spec.name for spec in world.runtime.started] == ["one", "two", "web"]
            assert world.runtime.times("start", "two")[0] >= 2
            assert world.runtime.times("start", "web")[0] >= 5
            assert world.container("web", "one")["state"]["terminated"]["reason"] == "Completed"

    run(main)


def test_a_failing_init_container_is_repeated() -> None:
    """Under Always a failing init container is tried again until it succeeds."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["one"] = Behaviour((1, 1), (1, 0))
            world.pod(spec=init("one"))
            await world.until(world.is_ready)
            assert [spec.name for spec in world.runtime.started] == ["one", "one", "web"]

    run(main)


def test_a_failing_init_container_ends_a_pod_that_never_restarts() -> None:
    """Under Never the pod has failed, and its containers never start."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["one"] = Behaviour((1, 1))
            world.pod(spec={**init("one"), "restartPolicy": "Never"})
            await world.until(lambda: world.status().get("phase") == "Failed")
            assert [spec.name for spec in world.runtime.started] == ["one"]

    run(main)


def test_a_sidecar_runs_along() -> None:
    """An init container with restartPolicy Always starts first, stays, and ends when the pod is done."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["web"] = Behaviour((5, 0))
            world.pod(spec={**init("proxy", restartPolicy="Always", image="echo"), "restartPolicy": "Never"})
            await world.until(lambda: world.status().get("phase") == "Succeeded")
            assert [spec.name for spec in world.runtime.started] == ["proxy", "web"]
            assert world.runtime.times(f"signal {SIGTERM}", "proxy")[0] >= 5

    run(main)


# --- probes ----------------------------------------------------------------------------------------------------------


def probed(**probes: Any) -> dict[str, Any]:
    return {"containers": [{**ECHO, **probes}]}


def test_readiness_follows_the_program() -> None:
    """A pod is ready when its probe succeeds, unready after three failures, and never restarted for that."""

    async def main() -> None:
        async with node_world() as world:
            world.pod(spec=probed(readinessProbe={**HTTP, "periodSeconds": 2}))
            await world.stays(lambda: not world.is_ready(), 5)
            assert world.status()["phase"] == "Running"
            assert (
                'Readiness probe failed: Get "http://10.244.1.2:8080/healthz": dial tcp 10.244.1.2:8080: connect: '
                "connection refused"
            ) in world.events("Unhealthy")
            world.runtime.status_at[8080] = 200
            await world.until(world.is_ready, within_s=2.1)
            world.runtime.status_at[8080] = 503
            failing_since = world.loop.time()
            unready_at = await world.until(lambda: not world.is_ready())
            assert 4 <= unready_at - failing_since <= 6.1
            assert "Readiness probe failed: HTTP probe failed with statuscode: 503" in world.events("Unhealthy")
            world.runtime.status_at[8080] = 200
            await world.until(world.is_ready)
            assert world.container()["restartCount"] == 0

    run(main)


def test_a_slow_start_costs_little() -> None:
    """A program that needs 0.25 s is ready long before a probe's period is over."""

    async def main() -> None:
        async with node_world() as world:
            world.loop.call_later(0.25, world.runtime.status_at.__setitem__, 8080, 200)
            world.pod(spec=probed(readinessProbe=HTTP))
            assert await world.until(world.is_ready) < 0.6

    run(main)


def test_liveness_restarts_and_keeps_the_address() -> None:
    """Three failures of liveness end the container gracefully; it starts again in the same sandbox."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.status_at[8080] = 200
            world.pod(spec=probed(livenessProbe={**HTTP, "periodSeconds": 1}))
            await world.until(world.is_ready)
            await world.stays(world.is_ready, 5)
            address = world.status()["podIP"]
            world.runtime.status_at[8080] = 500
            await world.until(lambda: world.container()["restartCount"] == 1)
            world.runtime.status_at[8080] = 200
            await world.until(world.is_ready)
            assert world.runtime.times(f"signal {SIGTERM}", "web")
            assert world.status()["podIP"] == address
            assert len(world.runtime.times("create_sandbox")) == 1
            assert "Container web failed liveness probe, will be restarted" in world.events("Killing")
            await world.stays(lambda: world.container()["restartCount"] == 1, 30)

    run(main)


def test_startup_holds_the_others_back() -> None:
    """Until the startup probe succeeds, liveness is not asked and the pod is not ready."""

    async def main() -> None:
        async with node_world() as world:
            startup = {"exec": {"command": ["started"]}, "periodSeconds": 5, "failureThreshold": 10}
            world.runtime.behaviours["web"] = Behaviour(exec_status=1)
            world.pod(spec=probed(startupProbe=startup, livenessProbe={**HTTP, "periodSeconds": 1}))
            await world.stays(lambda: not world.is_ready(), 20)
            assert not world.runtime.times("connect")
            assert world.container()["restartCount"] == 0
            assert not world.container()["started"]
            world.runtime.status_at[8080] = 200
            world.runtime.behaviours["web"].exec_status = 0
            await world.until(world.is_ready)

    run(main)


def test_startup_that_never_succeeds_restarts() -> None:
    """A startup probe has failureThreshold periods; quick tries in between do not use them up."""

    async def main() -> None:
        async with node_world() as world:
            startup = {"exec": {"command": ["started"]}, "periodSeconds": 5, "failureThreshold": 3}
            world.runtime.behaviours["web"] = Behaviour(exec_status=1)
            world.pod(spec=probed(startupProbe=startup))
            killed_at = await world.until(lambda: world.runtime.times(f"signal {SIGTERM}", "web"))
            assert 10 <= killed_at <= 21
            assert "Container web failed startup probe, will be restarted" in world.events("Killing")

    run(main)


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        ({"tcpSocket": {"port": "http"}}, "dial tcp 10.244.1.2:8080: connect: connection refused"),
        ({"tcpSocket": {"port": 81}}, "dial tcp 10.244.1.2:81: i/o timeout"),
        (
            {"httpGet": {"port": 81}},
            'Get "http://10.244.1.2:81/": context deadline exceeded (Client.Timeout exceeded while awaiting headers)',
        ),
        ({"exec": {"command": ["check"]}}, "not well\n"),
    ],
)  # fmt: skip
def test_what_failing_probes_say(probe: dict[str, Any], words: str) -> None:
    """Failures are told in the kubelet's words."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.silent_ports.add(81)
            world.runtime.behaviours["web"] = Behaviour(exec_status=1)
            world.pod(spec=probed(readinessProbe=probe))
            await world.until(lambda: world.events("Unhealthy"))
            assert world.events("Unhealthy") == [f"Readiness probe failed: {words}"]

    run(main)


@pytest.mark.parametrize("probe", [{"tcpSocket": {"port": 8080}}, {"exec": {"command": ["check"]}}, HTTP])
def test_probes_that_succeed(probe: dict[str, Any]) -> None:
    """Each kind of probe can succeed."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.status_at[8080] = 302
            world.pod(spec=probed(readinessProbe=probe))
            await world.until(world.is_ready)

    run(main)


def test_a_probe_that_meets_the_containers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime refuses to exec in a container that has just ended: that is a failed probe, and nothing breaks."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["web"] = Behaviour((3, 1))
            real = world.runtime.exec
            calls = 0

            async def exec_(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if 2 <= calls <= 4:
                    raise NotPresent("container x is not running")
                return await real(*args, **kwargs)

            monkeypatch.setattr(world.runtime, "exec", exec_)
            world.pod(
                spec=probed(livenessProbe={"exec": {"command": ["check"]}, "periodSeconds": 1, "failureThreshold": 9})
            )
            await world.until(lambda: world.container().get("restartCount") == 1)
            await world.until(world.is_ready)
            world.registry.delete("pods", "default", "web")
            await world.until(world.is_gone)

    run(main)


# --- the end of a pod ------------------------------------------------------------------------------------------------


def test_deletion_is_graceful() -> None:
    """nginx gets SIGQUIT; while it drains the object stays; then sandbox, address and object go."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["web"] = Behaviour(stop_s=7)
            world.pod()
            await world.until(world.is_ready)
            deleted_at = world.loop.time()
            world.registry.delete("pods", "default", "web")
            await world.stays(lambda: not world.is_gone() and world.is_ready(), 6)
            gone_at = await world.until(world.is_gone)
            assert 7 <= gone_at - deleted_at < 8
            assert world.runtime.times(f"signal {SIGQUIT}", "web")
            assert not world.runtime.times(f"signal {SIGKILL}", "web")
            assert not world.runtime.sandboxes
            assert not world.runtime.containers
            assert world.events("Killing") == ["Stopping container web"]

    run(main)


def test_sigkill_after_the_grace_period() -> None:
    """A program that does not listen is killed when its grace period is over."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["web"] = Behaviour(deaf_to=(SIGQUIT,))
            world.pod(spec={"terminationGracePeriodSeconds": 4})
            await world.until(world.is_ready)
            deleted_at = world.loop.time()
            world.registry.delete("pods", "default", "web")
            await world.until(world.is_gone)
            assert [round(at - deleted_at) for at in world.runtime.times(f"signal {SIGKILL}", "web")] == [4]

    run(main)


def test_a_shorter_grace_period_counts_at_once() -> None:
    """A second deletion that asks for less time is followed, and so is one that asks for none."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["web"] = Behaviour(deaf_to=(SIGQUIT,))
            for name, grace_s, longest_s in (("shorter", 2, 4), ("forced", 0, 2)):
                world.pod(name)
                await world.until(lambda name=name: world.is_ready(name))
                world.registry.delete("pods", "default", name)
                await asyncio.sleep(1)
                world.registry.delete("pods", "default", name, grace_s=grace_s)
                await world.until(lambda name=name: world.is_gone(name), within_s=longest_s)
                await world.until(lambda: not world.runtime.sandboxes, within_s=longest_s)

    run(main)


def test_forced_deletion_cleans_up() -> None:
    """A pod whose object is gone at once leaves nothing behind, and its name and address can be used again."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["web"] = Behaviour(deaf_to=(SIGQUIT,))
            world.pod()
            await world.until(world.is_ready)
            world.registry.delete("pods", "default", "web", grace_s=0)
            world.pod()
            await world.until(lambda: len(world.runtime.sandboxes) == 1 and world.is_ready())
            assert list(world.runtime.sandboxes) == [world.get()["metadata"]["uid"]]

    run(main)


def test_status_is_kept_while_terminating() -> None:
    """Of two containers the one that ends first is shown as ended while the other still drains."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours |= {"a": Behaviour(stop_s=2), "b": Behaviour(stop_s=10)}
            world.pod(spec=two())
            await world.until(world.is_ready)
            world.registry.delete("pods", "default", "web")
            await asyncio.sleep(5)
            assert world.container("web", "a")["state"].get("terminated", {}).get("exitCode") == 0
            assert "running" in world.container("web", "b")["state"]
            assert not world.is_ready()
            await world.until(world.is_gone)

    run(main)


def test_readiness_is_probed_while_terminating() -> None:
    """A draining program that says it is not ready becomes not ready; liveness does not restart it any more."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.status_at[8080] = 200
            world.runtime.behaviours["web"] = Behaviour(stop_s=20)
            fast = {**HTTP, "periodSeconds": 1, "failureThreshold": 1}
            world.pod(spec=probed(readinessProbe=fast, livenessProbe=fast))
            await world.until(world.is_ready)
            world.registry.delete("pods", "default", "web")
            await world.stays(world.is_ready, 3)
            world.runtime.status_at[8080] = 503
            await world.until(lambda: not world.is_ready(), within_s=3)
            assert not world.is_gone()
            await world.until(world.is_gone)
            assert len(world.runtime.started) == 1
            assert len(world.runtime.times(f"signal {SIGTERM}", "web")) == 1

    run(main)


def test_pre_stop_comes_before_the_signal() -> None:
    """The preStop hook has run before the stop signal is sent, and takes its time from the grace period."""

    async def main() -> None:
        async with node_world() as world:
            world.pod(lifecycle={"preStop": {"exec": {"command": ["sleep", "5"]}}})
            await world.until(world.is_ready)
            deleted_at = world.loop.time()
            world.registry.delete("pods", "default", "web")
            await world.until(world.is_gone)
            assert [round(at - deleted_at) for at in world.runtime.times(f"signal {SIGQUIT}")] == [5]

    run(main)


@pytest.mark.parametrize("hook", [{"exec": {"command": ["sleep", "500"]}}, {"sleep": {"seconds": 500}}])
def test_a_long_pre_stop_is_cut_off(hook: dict[str, Any]) -> None:
    """A hook that takes longer than the grace period does not hold the pod."""

    async def main() -> None:
        async with node_world() as world:
            world.pod(lifecycle={"preStop": hook}, spec=None)
            await world.until(world.is_ready)
            world.registry.delete("pods", "default", "web", grace_s=5)
            await world.until(world.is_gone, within_s=8)

    run(main)


def test_deleting_a_pod_that_waits_for_its_next_start() -> None:
    """A pod in back-off goes at once, without another start."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["web"] = Behaviour(*[(1, 1)] * 9)
            world.pod()
            await world.until(
                lambda: "waiting" in world.container().get("state", {}) and world.container()["restartCount"]
            )
            starts = len(world.runtime.started)
            world.registry.delete("pods", "default", "web")
            await world.until(world.is_gone, within_s=1)
            assert len(world.runtime.started) == starts

    run(main)


def test_deleting_a_pod_at_any_moment_leaves_nothing() -> None:
    """However early a pod is deleted, its object, sandbox and containers go, and nothing starts afterwards."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.start_s = 0.05
            for step in range(30):
                name = f"p{step}"
                world.pod(name)
                await asyncio.sleep(0.005 * step)
                world.registry.delete("pods", "default", name, grace_s=1)
                await world.until(lambda name=name: world.is_gone(name), within_s=5)
            await asyncio.sleep(5)
            assert not world.runtime.sandboxes
            assert not world.runtime.containers

    run(main)


# --- the node --------------------------------------------------------------------------------------------------------


def test_the_node_is_registered_and_beats() -> None:
    """The Node is there with its pod CIDR and ready; its Lease is renewed every 10 s, its status said again in 5 minutes."""

    async def main() -> None:
        async with node_world() as world:

            def ready() -> Any:
                node = world.registry.get("nodes", "", "node1")
                return next(one for one in node["status"]["conditions"] if one["type"] == "Ready")

            first = ready()
            assert first["status"] == "True"
            assert world.registry.get("nodes", "", "node1")["spec"]["podCIDR"] == "10.244.1.0/24"
            lease = world.registry.get("leases.coordination.k8s.io", "kube-node-lease", "node1")
            assert lease["spec"] == {
                "holderIdentity": "node1", "leaseDurationSeconds": 40, "renewTime": "2024-01-01T00:00:00.000000Z"
            }  # fmt: skip
            assert [one["kind"] for one in lease["metadata"]["ownerReferences"]] == ["Node"]
            await asyncio.sleep(25)
            assert ready() == first
            lease = world.registry.get("leases.coordination.k8s.io", "kube-node-lease", "node1")
            assert lease["spec"]["renewTime"] == "2024-01-01T00:00:20.000000Z"
            await asyncio.sleep(300)
            later = ready()
            assert later["lastHeartbeatTime"] > first["lastHeartbeatTime"]
            assert later["lastTransitionTime"] == first["lastTransitionTime"]
            world.registry.delete("nodes", "", "node1")
            await asyncio.sleep(25)

    run(main)


def test_a_node_that_loses_its_power_and_gets_it_back() -> None:
    """The pods are gone from the machine and nobody is told; booted, it starts those that are still bound to it again."""

    async def main() -> None:
        async with node_world() as world:
            world.pod()
            world.pod("once", spec={"restartPolicy": "Never"})
            await world.until(lambda: world.is_ready() and world.is_ready("once"))
            before = world.get()
            await world.power_off()
            assert world.runtime.sandboxes == {}
            await asyncio.sleep(100)
            assert world.get() == before
            world.power_on()
            await world.until(lambda: world.container().get("restartCount") == 1 and world.is_ready())
            last = world.container()["lastState"]["terminated"]
            assert (last["reason"], last["exitCode"]) == ("ContainerStatusUnknown", 137)
            # What must not run twice has failed, and is not started again.
            await world.until(lambda: world.status("once")["phase"] == "Failed")
            assert world.container("once")["restartCount"] == 0

    run(main)


def test_a_post_start_hook_that_fails() -> None:
    """The container is ended and started again; while the hook runs it is not ready."""

    async def main() -> None:
        async with node_world() as world:
            world.runtime.behaviours["web"] = Behaviour(exec_status=1)
            world.pod(lifecycle={"postStart": {"exec": {"command": ["prepare"]}}})
            await world.until(lambda: world.container().get("restartCount") == 1)
            assert world.events("FailedPostStartHook") == ["PostStartHook failed"]
            assert world.events("Killing") == ["FailedPostStartHook"]
            world.pod("slow", lifecycle={"postStart": {"exec": {"command": ["sleep", "20"]}}})
            await world.until(lambda: world.runtime.times("exec", "sleep 20"))
            await world.stays(lambda: not world.is_ready("slow"), 15)
            await world.until(lambda: world.is_ready("slow"))

    run(main)


def test_a_readiness_gate() -> None:
    """A pod whose containers are ready is not, before somebody else has said so in a condition of its own."""

    async def main() -> None:
        async with node_world() as world:
            containers = [{"name": "web", "image": "nginx"}]
            world.pod(spec={"containers": containers, "readinessGates": [{"conditionType": "example.com/ok"}]})
            await world.until(lambda: world.condition("ContainersReady") == "True")
            assert not world.is_ready()
            (ready,) = [one for one in world.status()["conditions"] if one["type"] == "Ready"]
            assert ready["reason"] == "ReadinessGatesNotReady"
            assert ready["message"] == (
                'corresponding condition of pod readiness gate "example.com/ok" does not exist.'
            )
            conditions = [*world.status()["conditions"], {"type": "example.com/ok", "status": "True"}]
            world.registry.patch("pods", "default", "web", {"status": {"conditions": conditions}}, subresource="status")
            await world.until(world.is_ready)

    run(main)


def test_a_slow_start_is_no_news() -> None:
    """Probes are tried often at first, and told only as often as a period is long."""

    async def main() -> None:
        async with node_world() as world:
            world.pod(readinessProbe={"httpGet": {"port": 80}, "periodSeconds": 10})
            await asyncio.sleep(5)
            assert len(world.runtime.times("connect")) > 4
            assert world.events("Unhealthy") == []
            await asyncio.sleep(28)
            (event,) = [one for one in world.registry.list("events") if one["reason"] == "Unhealthy"]
            assert event["count"] in (2, 3)

    run(main)


def test_data_that_is_no_text() -> None:
    """Binary data of ConfigMaps and Secrets becomes files of the same bytes."""

    async def main() -> None:
        async with node_world() as world:
            data = bytes(range(256))
            world.create("configmaps", "c", binaryData={"raw": base64.b64encode(data).decode()})
            world.create("secrets", "s", data={"raw": base64.b64encode(data).decode()})
            volumes = [{"name": "c", "configMap": {"name": "c"}}, {"name": "s", "secret": {"secretName": "s"}}]
            pod = world.pod(spec={"volumes": volumes})
            await world.until(world.is_ready)
            for name in ("c", "s"):
                files = world.runtime.volumes[pod["metadata"]["uid"], name]
                assert files is not None
                assert files["raw"].encode(errors="surrogateescape") == data

    run(main)
