"""One pod on its node, from its binding to the deletion of its object."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from testbed.controllers.events import record_event
from testbed.errors import ApiError, KernelError, TestbedError
from testbed.kubelet.container import ContainerRunner
from testbed.kubelet.environment import MissingReference, service_variables
from testbed.kubelet.logs import ContainerLog
from testbed.kubelet.runtime import Volume
from testbed.kubelet.specs import Start, container_start, not_honoured, sandbox_spec
from testbed.kubelet.status import ContainerView, pod_status, waiting
from testbed.kubelet.texts import dns_config_warnings, hostname_of
from testbed.kubelet.volumes import UnsupportedVolume, live_sources, volumes_of
from testbed.model.objects import Object, is_terminating, name_of, namespace_of

if TYPE_CHECKING:
    from testbed.kubelet.agent import Kubelet

_log = logging.getLogger("testbed.kubelet")
_SANDBOX_RETRY_S = 1.0


class PodWorker:
    """Brings one pod up, keeps it up, and takes it down. Implements `container.Surroundings` for its containers."""

    def __init__(self, kubelet: Kubelet, pod: Object) -> None:
        self.kubelet = kubelet
        self.pod = pod
        self.runtime = kubelet.runtime
        self.node = kubelet.node_name
        self.address = kubelet.node_address
        self.uid: str = pod["metadata"]["uid"]
        self.label = f"{name_of(pod)}_{namespace_of(pod)}({self.uid})"
        self._start_time = kubelet.now()
        self._deleted = asyncio.Event()
        self._status_due = False
        self._has_address = False
        self._has_sandbox = False
        self._services: Mapping[str, str] = {}
        policy = pod["spec"].get("restartPolicy", "Always")
        # An init container that fails is tried again under Always as well, and ends the pod under Never.
        init_policy = "Never" if policy == "Never" else "OnFailure"
        self._init = [
            self._runner(c, c.get("restartPolicy") or init_policy) for c in pod["spec"].get("initContainers") or ()
        ]
        self._main = [self._runner(c, policy) for c in pod["spec"]["containers"]]
        waiting_for = "PodInitializing" if self._init else "ContainerCreating"
        for runner in self._main:
            runner.view = ContainerView(name=runner.name, image=runner.view.image, state=waiting(waiting_for))
        self._tasks: dict[ContainerRunner, asyncio.Task[int]] = {}
        self._has_ended = self._take_up()

    def _take_up(self) -> bool:
        """Go on from what the status says that an earlier kubelet of this node did; say whether nothing is to be run.

        Its containers are gone with it: those that ran have ended, and starting them again counts as a restart.
        """
        status = self.pod.get("status") or {}
        known = {one["name"]: one for one in status.get("containerStatuses") or () if one.get("containerID")}
        if status.get("startTime"):
            self._start_time = status["startTime"]
        never = self.pod["spec"].get("restartPolicy") == "Never"
        for runner in self._main if known else ():
            runner.take_up(known.get(runner.name), is_over=never)
        return status.get("phase") in ("Succeeded", "Failed") or (bool(known) and never)

    def _runner(self, container: Mapping[str, Any], policy: str) -> ContainerRunner:
        return ContainerRunner(container, self, restart_policy=policy, grace_s=self._grace_s)

    def _grace_s(self) -> float:
        metadata = self.pod["metadata"]
        if "deletionGracePeriodSeconds" in metadata:
            return float(metadata["deletionGracePeriodSeconds"])
        return float(self.pod["spec"].get("terminationGracePeriodSeconds", 30))

    def runner(self, container: str) -> ContainerRunner | None:
        return next((one for one in (*self._init, *self._main) if one.name == container), None)

    # -- what the outside tells ------------------------------------------------------------------------------------

    def update(self, pod: Object) -> None:
        """Take a newer state of the object."""
        self.pod = pod
        if is_terminating(pod):
            self._delete()
        if pod["spec"].get("readinessGates"):  # somebody else's conditions: they may open or close the pod
            self.changed()

    def _delete(self) -> None:
        if self._deleted.is_set():  # once more, perhaps with a shorter grace period
            for runner in self._tasks:
                runner.hurry()
        self._deleted.set()

    def remove(self) -> None:
        """The object is gone: nobody waits for a graceful end."""
        self.pod = {**self.pod, "metadata": {**self.pod["metadata"], "deletionGracePeriodSeconds": 0}}
        self._delete()

    def reference_changed(self, resource: str, name: str) -> None:
        """A ConfigMap or Secret of the namespace changed: its mounted files follow."""
        if self._has_sandbox and (resource, name) in live_sources(self.pod):
            self.kubelet.spawn(self._refresh_volumes(), f"volumes of {name_of(self.pod)}")

    # -- the life of a pod -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Return when the pod's object is gone."""
        if is_terminating(self.pod):
            self._deleted.set()
        living = asyncio.create_task(self._live(), name=f"pod {name_of(self.pod)}")
        deleted = asyncio.create_task(self._deleted.wait())
        try:
            await asyncio.wait([living, deleted], return_when=asyncio.FIRST_COMPLETED)
            if not deleted.done():
                living.result()  # the pod completed: keep its status until it is deleted
                await deleted
            elif not living.done():
                living.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await living
            await self._stop_containers()
        finally:
            living.cancel()
            deleted.cancel()
            await self._clean_up()
        self._forget_object()

    async def _live(self) -> None:
        self.changed()
        if self._has_ended:
            return
        volumes = await self._volumes()
        await self._create_sandbox(volumes)
        for field in dict.fromkeys(
            field for container in self.pod["spec"]["containers"] for field in not_honoured(self.pod, container)
        ):
            self.say("Warning", "NotHonoured", f"{field} is accepted but has no effect here")
        for reason, message in dns_config_warnings(self.pod, self.kubelet.cluster, self.kubelet.node_resolv_conf):
            self.say("Warning", reason, message)
        self._services = self._service_variables()
        for runner in self._init:
            if not await self._run_init(runner):
                return
        for runner in self._main:
            if "waiting" in runner.view.state:
                runner.view = replace(runner.view, state=waiting("ContainerCreating"))
            self._start(runner)
        # Not gather: when the pod is deleted this is cancelled, and the containers must live on until they have drained.
        await asyncio.wait([self._tasks[runner] for runner in self._main])
        # Every container has ended for good; sidecars end now, and the namespaces are of no more use.
        await self._stop_containers()
        self._write_status()

    async def _run_init(self, runner: ContainerRunner) -> bool:
        """Run an init container to its end, or a sidecar to its start; say whether the pod may go on."""
        task = self._start(runner)
        if runner.definition.get("restartPolicy") == "Always":
            started = asyncio.ensure_future(runner.started.wait())
            await asyncio.wait([started, task], return_when=asyncio.FIRST_COMPLETED)
            started.cancel()
            return True
        await asyncio.wait([task])  # which, unlike awaiting the task, does not cancel it when this is cancelled
        return task.result() == 0

    def _start(self, runner: ContainerRunner) -> asyncio.Task[int]:
        task = asyncio.create_task(runner.run(), name=f"{name_of(self.pod)}/{runner.name}")
        self._tasks[runner] = task
        return task

    async def _volumes(self) -> tuple[Volume, ...]:
        """Return the volumes, waiting for ConfigMaps and Secrets that are not there yet."""
        said = ""
        while True:
            try:
                return self._find_volumes()
            except (MissingReference, UnsupportedVolume) as error:
                if str(error) != said:
                    said = str(error)
                    self.say("Warning", "FailedMount", said)
                await self.references_changed()

    def _find_volumes(self) -> tuple[Volume, ...]:
        return volumes_of(
            self.pod, find=self._find, pod_ip=self._pod_ip, host_ip=str(self.kubelet.node_address),
            token_of=self.kubelet.token_of,
        )  # fmt: skip

    async def _refresh_volumes(self) -> None:
        with contextlib.suppress(MissingReference, UnsupportedVolume, KernelError):
            for volume in self._find_volumes():
                if volume.files is not None:
                    await self.runtime.update_volume(self.uid, volume.name, volume.files)

    async def _create_sandbox(self, volumes: tuple[Volume, ...]) -> None:
        while True:
            try:
                if not self.pod["spec"].get("hostNetwork"):
                    self._take_address()
                volumes = self._find_volumes() or volumes  # once more: files may hold the address
                spec = sandbox_spec(
                    self.pod,
                    node=self.node,
                    hostname=hostname_of(self.pod, self.node),
                    address=self.address,
                    pod_cidr=self.kubelet.spec.pod_cidr,
                    volumes=volumes,
                    cluster=self.kubelet.cluster,
                    node_resolv_conf=self.kubelet.node_resolv_conf,
                )
                async with self.kubelet.slots:
                    await self.runtime.create_sandbox(spec)
                self._has_sandbox = True
                self.changed()
                return
            except (KernelError, OSError) as error:
                self.say("Warning", "FailedCreatePodSandBox", f"Failed to create pod sandbox: {error}")
                self._give_back_address()
                await asyncio.sleep(_SANDBOX_RETRY_S)

    def _take_address(self) -> None:
        address = self.kubelet.addresses.allocate()
        if address is None:
            raise KernelError(f"no free address is left in {self.kubelet.spec.pod_cidr} of node {self.node}")
        self.address, self._has_address = address, True

    def _give_back_address(self) -> None:
        if self._has_address:
            self.kubelet.addresses.release(self.address)
            self._has_address = False

    @property
    def _pod_ip(self) -> str:
        on_host = self.pod["spec"].get("hostNetwork")
        return str(self.address) if self._has_address or on_host else ""

    def _service_variables(self) -> Mapping[str, str]:
        namespace = namespace_of(self.pod)
        links = self.pod["spec"].get("enableServiceLinks") is not False
        services = self.kubelet.registry.list("services", namespace) if links else []
        master = self.kubelet.registry.store.get("services", "default", "kubernetes")
        if master is not None and not (links and namespace == "default"):  # every pod is told where the API is
            services = [*services, master]
        return service_variables(services, namespace)

    # -- the end of a pod ------------------------------------------------------------------------------------------

    async def _stop_containers(self) -> None:
        """Stop main containers together, then sidecars, last started first."""
        if self._grace_s() == 0:
            await asyncio.gather(*(runner.kill() for runner in self._tasks))
        else:
            await asyncio.gather(*(runner.stop() for runner in self._main if runner in self._tasks))
            for runner in reversed(self._init):
                if runner in self._tasks:
                    await runner.stop()
        results = await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                _log.error("container of %s: %r", name_of(self.pod), result)

    async def _clean_up(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await self.runtime.remove_sandbox(self.uid)
        self._give_back_address()

    def _forget_object(self) -> None:
        """Write the last status, and delete the object for good."""
        self._write_status()
        with contextlib.suppress(ApiError):  # deleted by force meanwhile
            current = self.kubelet.registry.get("pods", namespace_of(self.pod), name_of(self.pod))
            if current["metadata"]["uid"] == self.uid:
                self.kubelet.registry.delete("pods", namespace_of(self.pod), name_of(self.pod), grace_s=0)

    # -- for its containers ----------------------------------------------------------------------------------------

    def prepare(self, container: Mapping[str, Any], container_id: str) -> Start:
        return container_start(
            self.pod, container, self.kubelet.catalogue, container_id=container_id, find=self._find,
            services=self._services, pod_ip=self._pod_ip, host_ip=str(self.kubelet.node_address),
        )  # fmt: skip

    async def references_changed(self) -> None:
        await self.kubelet.references.wait_for(namespace_of(self.pod))

    def say(self, kind: str, reason: str, message: str, container: str = "") -> None:
        if self.kubelet.is_down:
            return
        field_path = f"spec.containers{{{container}}}" if container else ""
        record_event(
            self.kubelet.registry, self.pod, kind, reason, message, "kubelet", host=self.node, field_path=field_path
        )

    def new_log(self) -> ContainerLog:
        return ContainerLog(self.kubelet.clock_ns)

    def now(self) -> str:
        return self.kubelet.now()

    def clock(self) -> float:
        return self.kubelet.clock()

    def _find(self, resource: str, name: str) -> Object | None:
        return self.kubelet.registry.store.get(resource, namespace_of(self.pod), name)

    def changed(self) -> None:
        """Write the status once for all that happens in this turn of the event loop."""
        if not self._status_due:
            self._status_due = True
            asyncio.get_running_loop().call_soon(self._write_due_status)

    def _write_due_status(self) -> None:
        if self._status_due:
            self._write_status()

    def _write_status(self) -> None:
        self._status_due = False
        if self.kubelet.is_down:
            return
        registry = self.kubelet.registry
        current = registry.store.get("pods", namespace_of(self.pod), name_of(self.pod))
        if current is None or current["metadata"]["uid"] != self.uid:
            return
        status = pod_status(
            current,
            init=[runner.view for runner in self._init],
            main=[runner.view for runner in self._main],
            has_sandbox=self._has_sandbox,
            pod_ip=self._pod_ip,
            host_ip=str(self.kubelet.node_address),
            now=self.now(),
            start_time=self._start_time,
        )
        if status == current.get("status"):
            return
        try:
            registry.update("pods", {**current, "status": status}, subresource="status")
        except TestbedError as error:
            _log.error("status of pod %s/%s: %s", namespace_of(self.pod), name_of(self.pod), error)
