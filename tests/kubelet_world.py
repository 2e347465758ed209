"""A node without a kernel for tests: a runtime that keeps state and fails like the real one, time that passes by itself."""

from __future__ import annotations

import asyncio
import selectors
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network
from itertools import count
from typing import Any, TypeVar

from testbed.controllers import ensure_system_namespaces
from testbed.errors import KernelError, NotPresent
from testbed.kubelet.agent import Kubelet
from testbed.kubelet.runtime import ContainerSpec, ExecResult, ExitStatus, Output, SandboxSpec
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Object
from testbed.model.topology import NodeSpec
from testbed.programs.catalogue import Catalogue
from testbed.registry import Registry
from testbed.store import Store

T = TypeVar("T")
_EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
POD_CIDR = IPv4Network("10.244.1.0/24")
NODE = NodeSpec(name="node1", network="lan", address=IPv4Address("192.168.93.11"), pod_cidr=POD_CIDR)
SIGQUIT, SIGKILL, SIGTERM = 3, 9, 15


class _Selector(selectors.SelectSelector):
    """Never waits: when nothing is ready, time jumps to the next timer."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise AssertionError("everything waits, and nothing will ever happen")
            self.now_s += max(timeout, 0.0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock starts at 0 and jumps over waits: ten minutes of back-off take no time."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine on a virtual loop."""

    async def body() -> T:
        return await main()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(body())


class Behaviour:
    """What the program of a container does: its next ends, and how it takes signals.

    Attributes:
        exits: ``(after seconds, code)`` for each start in turn; starts after the last never end by themselves.
        deaf_to: Signals that it ignores.
        stop_s: How long it takes to end after a signal.
        fails_to_start: Words of a refused start; '' for none.
    """

    def __init__(
        self,
        *exits: tuple[float, int],
        deaf_to: Sequence[int] = (),
        stop_s: float = 0.0,
        fails_to_start: str = "",
        exec_status: int = 0,
    ) -> None:
        self.exits = list(exits)
        self.deaf_to = set(deaf_to)
        self.stop_s = stop_s
        self.fails_to_start = fails_to_start
        self.exec_status = exec_status


class FakeInput:
    """Keeps what was written to a program, and the size of its terminal."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False
        self.size = (0, 0)

    async def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def resize(self, columns: int, rows: int) -> None:
        self.size = (columns, rows)


class _Running:
    def __init__(self, spec: ContainerSpec, behaviour: Behaviour, output: Output) -> None:
        self.spec = spec
        self.output = output
        self.input = FakeInput()
        self.behaviour = behaviour
        self.end: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()

    def finish(self, code: int, signal: int = 0) -> None:
        if not self.end.done():
            self.output.close()
            self.end.set_result(ExitStatus(code, signal))


class FakeRuntime:
    """Implements `kubelet.runtime.Runtime`; ``calls`` is what was asked, with the time, in order."""

    def __init__(self) -> None:
        self.sandboxes: dict[str, SandboxSpec] = {}
        self.volumes: dict[tuple[str, str], Mapping[str, str] | None] = {}
        self.containers: dict[str, _Running] = {}
        self.behaviours: dict[str, Behaviour] = {}
        self.started: list[ContainerSpec] = []
        self.calls: list[tuple[float, str, str]] = []
        self.sandbox_problems: list[str] = []
        self.status_at: dict[int, int] = {}  # what the server of a port answers; no entry: connection refused
        self.silent_ports: set[int] = set()
        self.most_at_once = 0
        self.at_once = 0
        self.start_s = 0.0
        self._answering: set[asyncio.Task[None]] = set()

    def _note(self, what: str, which: str) -> None:
        self.calls.append((round(asyncio.get_running_loop().time(), 3), what, which))

    def times(self, what: str, which: str = "") -> list[float]:
        """Return when something was asked of a container by name (or a pod)."""
        return [at for at, called, name in self.calls if called == what and which in ("", name)]

    async def create_sandbox(self, spec: SandboxSpec) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.start_s)
        self.at_once -= 1
        self._note("create_sandbox", spec.pod_name)
        if self.sandbox_problems:
            raise KernelError(f"{spec.namespace}/{spec.pod_name}: {self.sandbox_problems.pop(0)}")
        if spec.pod_uid in self.sandboxes:
            raise KernelError(f"{spec.pod_name}: its sandbox is there already")
        used = [other.address for other in self.sandboxes.values() if other.address is not None]
        if spec.address is not None and spec.address in used:
            raise KernelError(f"{spec.pod_name}: address {spec.address} is in use")
        self.sandboxes[spec.pod_uid] = spec
        for volume in spec.volumes:
            self.volumes[spec.pod_uid, volume.name] = volume.files

    async def remove_sandbox(self, pod_uid: str) -> None:
        spec = self.sandboxes.pop(pod_uid, None)
        if spec is None:
            return
        self._note("remove_sandbox", spec.pod_name)
        for container_id, container in list(self.containers.items()):
            if container.spec.pod_uid == pod_uid:
                container.finish(137, SIGKILL)
                del self.containers[container_id]

    async def update_volume(self, pod_uid: str, volume: str, files: Mapping[str, str]) -> None:
        if pod_uid not in self.sandboxes:
            raise NotPresent(f"pod {pod_uid} has no sandbox")
        self.volumes[pod_uid, volume] = files

    async def start_container(self, spec: ContainerSpec, output: Output) -> FakeInput:
        sandbox = self.sandboxes.get(spec.pod_uid)
        if sandbox is None:
            raise NotPresent(f"pod {spec.pod_uid} has no sandbox")
        known = {volume.name for volume in sandbox.volumes}
        for mount in spec.mounts:
            if mount.volume not in known:
                raise KernelError(f"{sandbox.pod_name}: no volume {mount.volume!r} to mount at {mount.path}")
        self._note("start", spec.name)
        behaviour = self.behaviours.setdefault(spec.name, Behaviour())
        container = self.containers[spec.container_id] = _Running(spec, behaviour, output)
        if behaviour.fails_to_start:
            container.finish(128)  # as the real one, which keeps what is left until it is removed
            raise KernelError(f"{sandbox.pod_name}: {behaviour.fails_to_start}")
        self.started.append(spec)
        if behaviour.exits:
            after_s, code = behaviour.exits.pop(0)
            asyncio.get_running_loop().call_later(after_s, container.finish, code)
        return container.input

    async def wait_container(self, container_id: str) -> ExitStatus:
        return await asyncio.shield(self.containers[container_id].end)

    async def signal_container(self, container_id: str, signal: int) -> None:
        container = self.containers.get(container_id)
        if container is None or container.end.done():
            return
        self._note(f"signal {int(signal)}", container.spec.name)
        if signal == SIGKILL:
            container.finish(137, SIGKILL)
        elif signal not in container.behaviour.deaf_to:
            asyncio.get_running_loop().call_later(container.behaviour.stop_s, container.finish, 0)

    async def remove_container(self, container_id: str) -> None:
        container = self.containers.pop(container_id, None)
        if container is not None:
            container.finish(137, SIGKILL)

    async def exec(self, container_id: str, argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        container = self.containers.get(container_id)
        if container is None or container.end.done():
            raise NotPresent(f"container {container_id} is not running")
        self._note("exec", " ".join(argv))
        if argv[0] == "sleep":
            await asyncio.sleep(min(float(argv[1]), timeout_s))
            return ExecResult(124 if float(argv[1]) > timeout_s else 0, "")
        return ExecResult(container.behaviour.exec_status, "not well\n" if container.behaviour.exec_status else "")

    async def connect(self, node: str, address: IPv4Address, port: int, *, timeout_s: float) -> socket.socket:
        self._note("connect", f"{address}:{port}")
        if port in self.silent_ports:
            await asyncio.sleep(timeout_s)
            raise TimeoutError
        if port not in self.status_at:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=theirs)

        async def answer() -> None:
            try:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(f"HTTP/1.1 {self.status_at[port]} Whatever\r\nContent-Length: 0\r\n\r\n".encode())
            except asyncio.IncompleteReadError:
                pass  # a TCP probe only connects
            finally:
                writer.close()

        task = asyncio.create_task(answer())
        self._answering.add(task)  # nobody else holds it
        task.add_done_callback(self._answering.discard)
        return ours


class NodeWorld:
    """One kubelet on a real registry. Make it inside a virtual loop."""

    def __init__(self, node: NodeSpec = NODE) -> None:
        self.loop = asyncio.get_running_loop()
        uids = count(1)
        self.store = Store(now=self.now, new_uid=lambda: f"uid-{next(uids)}")
        self.cluster = ClusterConfig()
        self.registry = Registry(
            self.store, self.cluster, now=self.now, new_uid=lambda: f"uid-{next(uids)}", pick=lambda n: 0
        )
        ensure_system_namespaces(self.registry)
        self.runtime = FakeRuntime()
        self.catalogue = Catalogue(find_program=lambda name: None)
        self._node = node
        self.power_on()

    def power_on(self) -> None:
        """Start a kubelet."""
        self.kubelet = Kubelet(
            self._node, self.registry, self.runtime, self.catalogue, cluster=self.cluster, clock=self.loop.time,
            now=self.now,
        )  # fmt: skip
        self.task = asyncio.create_task(self.kubelet.run())

    async def power_off(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def now(self) -> str:
        return (_EPOCH + timedelta(seconds=int(self.loop.time()))).strftime("%Y-%m-%dT%H:%M:%SZ")

    def create(self, resource: str, name: str, **fields: Any) -> Object:
        return self.registry.create(resource, {"metadata": {"name": name, "namespace": "default"}, **fields})

    def pod(self, name: str = "web", *, spec: Mapping[str, Any] | None = None, **container: Any) -> Object:
        """Create a pod bound to the node, of one container ``web``, or with what ``spec`` says."""
        one = {"name": "web", "image": "nginx:1.17.1", **container}
        return self.create("pods", name, spec={"nodeName": "node1", "containers": [one], **(spec or {})})

    def get(self, name: str = "web") -> Object:
        return self.registry.get("pods", "default", name)

    def status(self, name: str = "web") -> Object:
        found: Object = self.get(name).get("status") or {}
        return found

    def container(self, name: str = "web", container: str = "web") -> Object:
        """Return one container's status; {} before there is one."""
        status = self.status(name)
        every = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
        return next((one for one in every if one["name"] == container), {})

    def condition(self, kind: str, name: str = "web") -> str:
        conditions = self.status(name).get("conditions") or ()
        return str(next((one["status"] for one in conditions if one["type"] == kind), ""))

    def is_ready(self, name: str = "web") -> bool:
        return self.condition("Ready", name) == "True"

    def is_gone(self, name: str = "web") -> bool:
        return self.store.get("pods", "default", name) is None

    def events(self, reason: str = "") -> list[str]:
        """Return the messages of events with a reason (of all), without the scheduler's."""
        return [one["message"] for one in self.registry.list("events", "default") if reason in ("", one["reason"])]

    async def until(self, check: Callable[[], Any], within_s: float = 60.0) -> float:
        """Wait until something holds, and return the time; it is looked at after each change."""
        deadline = self.loop.time() + within_s
        while not check():
            if self.loop.time() > deadline:
                raise AssertionError(f"not within {within_s:g} s; status: {self.registry.list('pods')}")
            await asyncio.sleep(0.01)
        return self.loop.time()

    async def stays(self, check: Callable[[], Any], for_s: float) -> None:
        """Assert that something holds all the time."""
        end = self.loop.time() + for_s
        while self.loop.time() < end:
            assert check(), self.registry.list("pods")
            await asyncio.sleep(for_s / 50)


@asynccontextmanager
async def node_world(node: NodeSpec = NODE) -> AsyncIterator[NodeWorld]:
    """A running kubelet; when the body ends it must still be running."""
    world = NodeWorld(node)
    await asyncio.sleep(0)
    try:
        yield world
        if world.task.done():
            world.task.result()
            raise AssertionError("the kubelet ended")
    finally:
        await world.power_off()
