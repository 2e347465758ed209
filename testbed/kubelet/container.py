"""One container of a pod: started, watched, probed, started again, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any, Protocol

from testbed.errors import InputError, KernelError
from testbed.kernel.pace import patient
from testbed.kubelet.logs import ContainerLog
from testbed.kubelet.prober import probe
from testbed.kubelet.probes import ProbeState, timing_of
from testbed.kubelet.restarts import next_back_off_s, should_restart
from testbed.kubelet.runtime import ContainerSpec, ExitStatus, Input, Runtime
from testbed.kubelet.specs import RefusedContainer, Start
from testbed.kubelet.status import ContainerView, container_status, running, terminated, waiting

_NO_LIMIT_S = 86400.0  # a postStart hook may take as long as it likes


class Surroundings(Protocol):
    """What a container asks of the pod that it is part of."""

    runtime: Runtime
    node: str
    address: IPv4Address
    label: str  # NAME_NAMESPACE(UID), as events name a pod

    def prepare(self, container: Mapping[str, Any], container_id: str) -> Start:
        """Return what to start, read anew at each start; RefusedContainer or InputError when it must not be."""

    async def references_changed(self) -> None:
        """Return when a ConfigMap or Secret of the namespace has changed."""

    def say(self, kind: str, reason: str, message: str, container: str = "") -> None:
        """Record an event about the pod."""

    def changed(self) -> None:
        """Have the pod's status written soon."""

    def new_log(self) -> ContainerLog: ...

    def now(self) -> str: ...

    def clock(self) -> float: ...


class ContainerRunner:
    """Runs one container until its restart policy lets it end, or `stop` is called; ``view`` is what it is doing."""

    def __init__(
        self, definition: Mapping[str, Any], pod: Surroundings, *, restart_policy: str, grace_s: Callable[[], float]
    ) -> None:
        self.definition = definition
        self.name: str = definition["name"]
        self.started = asyncio.Event()  # running, and past its startup probe
        self.view = ContainerView(name=self.name, image=definition["image"])
        self.logs: dict[str, ContainerLog] = {}  # by container ID: of the last two starts
        self.input: Input | None = None
        self._pod = pod
        self._policy = restart_policy
        self._grace_s = grace_s
        self._stopping = False
        self._stop_signal = signal.SIGTERM
        self._wake = asyncio.Event()
        self._deadline_s = 0.0  # of the end that is under way
        self._hurried = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None

    def take_up(self, status: Mapping[str, Any] | None, *, is_over: bool) -> None:
        """Go on from the status that an earlier kubelet wrote: what ran then is lost.

        Source: kubelet_pods.go, convertToAPIContainerStatuses (ContainerStatusUnknown).
        """
        if status is None:
            return
        ended = (status.get("state") or {}).get("terminated")
        state: Mapping[str, Any] = {"terminated": ended} if ended else terminated(
            code=137, signal=0, reason="ContainerStatusUnknown",
            message="The container could not be located when the pod was terminated",
            started_at=((status.get("state") or {}).get("running") or {}).get("startedAt", "1970-01-01T00:00:00Z"),
            finished_at=self._pod.now(), container_id=status["containerID"].rpartition("/")[2],
        )  # fmt: skip
        restarts = int(status.get("restartCount", 0))
        if is_over:
            self.view = replace(
                self.view, state=state, restart_count=restarts, last_state=status.get("lastState") or {}
            )
        else:
            self.view = replace(self.view, last_state=state, restart_count=restarts + 1)

    # -- the life of a container -----------------------------------------------------------------------------------

    async def run(self) -> int:
        """Return the exit code of the last start, when there will be no other."""
        waited_s: float | None = None
        while True:
            began = self._pod.clock()
            code = await self._run_once()
            if self._stopping or not should_restart(self._policy, code):
                return code
            waited_s = next_back_off_s(waited_s, self._pod.clock() - began)
            if waited_s:
                message = (
                    f"back-off {_go_duration(waited_s)} restarting failed container={self.name} pod={self._pod.label}"
                )
                words = f"Back-off restarting failed container {self.name} in pod {self._pod.label}"
                self._pod.say("Warning", "BackOff", words, self.name)
                self._show(state=waiting("CrashLoopBackOff", message), last_state=self.view.state)
                await self._sleep(waited_s)
                if self._stopping:
                    return code
            else:
                self._show(last_state=self.view.state)
            self._show(restart_count=self.view.restart_count + 1)

    async def _run_once(self) -> int:
        """One start, to its end; a start that fails ends with code 128."""
        container_id = secrets.token_hex(32)
        spec = await self._prepare(container_id)
        if spec is None:
            return 0
        pod = self._pod
        started_at = pod.now()
        try:
            self.logs = {**dict(list(self.logs.items())[-1:]), container_id: pod.new_log()}
            self.input = await pod.runtime.start_container(spec, self.logs[container_id])
        except (KernelError, InputError) as error:
            pod.say("Warning", "Failed", f"Error: {error}", self.name)
            await self._remove(container_id)
            state = terminated(
                code=128, signal=0, reason="StartError", message=str(error), started_at="1970-01-01T00:00:00Z",
                finished_at=pod.now(), container_id=container_id,
            )  # fmt: skip
            self._show(state=state, container_id=container_id, is_ready=False, has_started=False)
            return 128
        pod.say("Normal", "Created", f"Created container {self.name}", self.name)
        pod.say("Normal", "Started", f"Started container {self.name}", self.name)
        self._show(state=running(started_at), container_id=container_id)
        probing = asyncio.create_task(self._watch_over(container_id), name=f"probes {self.name}")
        try:
            if self._stopping:  # asked to while it was being started
                await self._end(container_id)
            status = await pod.runtime.wait_container(container_id)
        finally:
            probing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await probing
        self.started.clear()
        self._show_end(status, started_at, container_id)
        await self._remove(container_id)
        return status.code

    async def _prepare(self, container_id: str) -> ContainerSpec | None:
        """Return what to start, waiting until it can be; None when stopped while waiting."""
        pod = self._pod
        said = ""
        while not self._stopping:
            try:
                start = pod.prepare(self.definition, container_id)
            except RefusedContainer as error:
                reason, message = "CreateContainerConfigError", str(error)
            except InputError as error:
                reason, message = "InvalidImageName", str(error)
            else:
                pod.say(
                    "Normal", "Pulled", f'Container image "{self.view.image}" already present on machine', self.name
                )
                self._stop_signal = start.stop_signal
                if start.is_stand_in:
                    pod.say(
                        "Warning", "StandIn",
                        f'image "{self.view.image}" is not in the catalogue: an echo server answers on its containerPorts',
                        self.name,
                    )  # fmt: skip
                for message in start.skipped:
                    pod.say("Warning", "InvalidEnvironmentVariableNames", message)
                return start.spec
            if message != said:
                event_reason = "InspectFailed" if reason == "InvalidImageName" else "Failed"
                pod.say("Warning", event_reason, f"Error: {message}", self.name)
                self._show(state=waiting(reason, message))
                said = message
            await self._either(pod.references_changed())
        return None

    async def _remove(self, container_id: str) -> None:
        await self._pod.runtime.remove_container(container_id)

    async def _watch_over(self, container_id: str) -> None:
        """Run the postStart hook, then the probes; a hook that fails ends this start of the container."""
        hook = (self.definition.get("lifecycle") or {}).get("postStart")
        if hook:
            succeeded, _ = await probe(
                self._pod.runtime, hook, self.definition, container_id, node=self._pod.node, address=self._pod.address,
                timeout_s=_NO_LIMIT_S,
            )  # fmt: skip
            if not succeeded:
                if not self._stopping:
                    self._pod.say("Warning", "FailedPostStartHook", "PostStartHook failed", self.name)
                    self._pod.say("Normal", "Killing", "FailedPostStartHook", self.name)
                    self._ending = asyncio.create_task(self._end(container_id))
                return
        await self._probe(container_id)

    # -- probes ----------------------------------------------------------------------------------------------------

    async def _probe(self, container_id: str) -> None:
        """Run the startup probe, then liveness and readiness together; without a probe a running container is ready."""
        definition = self.definition
        startup = definition.get("startupProbe")
        if startup and not await self._probe_startup(startup, container_id):
            return
        self.started.set()
        readiness, liveness = definition.get("readinessProbe"), definition.get("livenessProbe")
        self._show(has_started=True, is_ready=not readiness)
        tasks = []
        if readiness:
            tasks.append(asyncio.create_task(self._probe_readiness(readiness, container_id)))
        if liveness:
            tasks.append(asyncio.create_task(self._probe_liveness(liveness, container_id)))
        try:
            if tasks:
                await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(
        self, definition: Mapping[str, Any], container_id: str, kind: str, timeout_s: float, *, tell: bool = True
    ) -> bool:  # fmt: skip
        pod = self._pod
        healthy, words = await probe(
            pod.runtime, definition, self.definition, container_id, node=pod.node, address=pod.address,
            timeout_s=patient(timeout_s),
        )  # fmt: skip
        if not healthy and tell and not self._stopping:
            pod.say("Warning", "Unhealthy", f"{kind} probe failed: {words}", self.name)
        return healthy

    async def _probe_startup(self, definition: Mapping[str, Any], container_id: str) -> bool:
        timing = timing_of(definition)
        state = ProbeState(timing, begins_as=False)
        await asyncio.sleep(timing.initial_delay_s)
        # In a hurry only as far as time goes: failures are told and counted once a period, as a kubelet probes.
        failures_due = self._pod.clock() + timing.period_s
        while True:
            is_due = self._pod.clock() >= failures_due
            if await self._ask(definition, container_id, "Startup", timing.timeout_s, tell=is_due):
                if state.observe(True):
                    return True
            elif is_due:
                failures_due += timing.period_s  # not from now on: tries come late, and would ever be later
                if state.observe(False):
                    await self._kill_unhealthy(container_id, "startup")
                    return False
            await asyncio.sleep(state.next_delay_s(hurry=True))

    async def _probe_readiness(self, definition: Mapping[str, Any], container_id: str) -> None:
        timing = timing_of(definition)
        state = ProbeState(timing, begins_as=False)
        await asyncio.sleep(timing.initial_delay_s)
        failures_due = self._pod.clock() + timing.period_s
        while True:
            is_due = not state.is_hurrying or self._pod.clock() >= failures_due
            healthy = await self._ask(definition, container_id, "Readiness", timing.timeout_s, tell=is_due)
            if is_due and not healthy:
                failures_due += timing.period_s
            state.observe(healthy)
            if state.verdict != self.view.is_ready:
                self._show(is_ready=state.verdict)
            await asyncio.sleep(state.next_delay_s(hurry=True))

    async def _probe_liveness(self, definition: Mapping[str, Any], container_id: str) -> None:
        timing = timing_of(definition)
        state = ProbeState(timing, begins_as=True)
        await asyncio.sleep(timing.initial_delay_s)
        while True:
            healthy = await self._ask(definition, container_id, "Liveness", timing.timeout_s)
            if state.observe(healthy) and not healthy:
                await self._kill_unhealthy(container_id, "liveness")
                return
            await asyncio.sleep(state.next_delay_s(hurry=False))

    async def _kill_unhealthy(self, container_id: str, kind: str) -> None:
        if self._stopping:
            return  # it is on its way out, and nobody will restart it
        message = f"Container {self.name} failed {kind} probe, will be restarted"
        self._pod.say("Normal", "Killing", message, self.name)
        # Not awaited: the probes end with the container, and this runs as one of them.
        self._ending = asyncio.create_task(self._end(container_id))

    # -- stopping --------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End the container for good: preStop hook, the image's stop signal, SIGKILL when the grace period is over."""
        self._stopping = True
        self._wake.set()
        if self.view.is_running:
            self._pod.say("Normal", "Killing", f"Stopping container {self.name}", self.name)
            if self._ending is not None and not self._ending.done():  # by a failed probe: one hook, one signal
                self.hurry()
                await self._ending
            else:
                await self._end(self.view.container_id)

    def hurry(self) -> None:
        """Take the grace period anew: it may have become shorter while the container ends."""
        self._deadline_s = min(self._deadline_s, self._pod.clock() + self._grace_s())
        self._hurried.set()

    async def kill(self) -> None:
        """End the container at once."""
        self._stopping = True
        self._wake.set()
        if self.view.is_running:
            await self._pod.runtime.signal_container(self.view.container_id, signal.SIGKILL)

    async def _end(self, container_id: str) -> None:
        pod = self._pod
        self._deadline_s = pod.clock() + self._grace_s()
        hook = (self.definition.get("lifecycle") or {}).get("preStop")
        if hook:
            running_hook = asyncio.create_task(
                probe(
                    pod.runtime,
                    hook,
                    self.definition,
                    container_id,
                    node=pod.node,
                    address=pod.address,
                    timeout_s=max(0.1, self._grace_s()),
                )
            )
            if not await self._within_grace(running_hook) or not running_hook.result()[0]:
                pod.say("Warning", "FailedPreStopHook", "PreStopHook failed", self.name)
            # after a preStop hook that took it all, two more seconds (kuberuntime_container.go)
            if self._grace_s() > 0:
                self._deadline_s = max(self._deadline_s, pod.clock() + 2.0)
        await pod.runtime.signal_container(container_id, self._stop_signal)
        with contextlib.suppress(KeyError):  # it ended, and was removed, meanwhile
            ended = asyncio.ensure_future(pod.runtime.wait_container(container_id))
            if not await self._within_grace(ended):
                await pod.runtime.signal_container(container_id, signal.SIGKILL)
            else:
                ended.result()

    async def _within_grace(self, work: asyncio.Future[Any]) -> bool:
        """Wait for something until the deadline, which `hurry` may bring nearer; say whether it came in time."""
        try:
            while not work.done():
                left_s = self._deadline_s - self._pod.clock()
                if left_s <= 0:
                    return False
                self._hurried.clear()
                hurried = asyncio.ensure_future(self._hurried.wait())
                done, _ = await asyncio.wait((work, hurried), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                hurried.cancel()
                if not done:
                    return False
            return True
        finally:
            work.cancel()

    @property
    def shown(self) -> dict[str, Any]:
        """What the pod's status says of this container."""
        return container_status(self.view)

    # -- small things ----------------------------------------------------------------------------------------------

    def _show(self, **changes: Any) -> None:
        self.view = replace(self.view, **changes)
        self._pod.changed()

    def _show_end(self, status: ExitStatus, started_at: str, container_id: str) -> None:
        reason = "Completed" if status.code == 0 else "Error"
        state = terminated(
            code=status.code, signal=status.signal, reason=reason, message="", started_at=started_at,
            finished_at=self._pod.now(), container_id=container_id,
        )  # fmt: skip
        self._show(state=state, is_ready=False, has_started=False)

    async def _sleep(self, delay_s: float) -> None:
        """Sleep, unless stopped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._wake.wait()

    async def _either(self, other: Any) -> None:
        """Return when ``other`` has happened or `stop` was called."""
        tasks = [asyncio.ensure_future(other), asyncio.ensure_future(self._wake.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()


def _go_duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
