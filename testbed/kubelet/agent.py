"""The kubelet of one node: registers it, and gives every pod bound to it a worker."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from testbed.errors import ApiError
from testbed.kubelet.node import Machine, PodAddresses, node_object
from testbed.kubelet.pod import PodWorker
from testbed.kubelet.runtime import Runtime
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Object
from testbed.model.topology import NodeSpec
from testbed.programs.catalogue import Catalogue
from testbed.registry import Registry
from testbed.store import Event, EventType

_log = logging.getLogger("testbed.kubelet")
HEARTBEAT_S = 10.0
_SANDBOXES_AT_ONCE = 8  # each waits for the one spawner; more would only make the first ones ready later


class References:
    """Lets pods wait for a change of any ConfigMap or Secret in their namespace."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def wait_for(self, namespace: str) -> None:
        if namespace not in self._waiting:
            self._waiting[namespace] = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._waiting[namespace])

    def changed(self, namespace: str) -> None:
        future = self._waiting.pop(namespace, None)
        if future is not None and not future.done():
            future.set_result(None)


class Kubelet:
    """One node's kubelet. `run` never returns by itself."""

    def __init__(
        self, spec: NodeSpec, registry: Registry, runtime: Runtime, catalogue: Catalogue, *, cluster: ClusterConfig,
        clock: Callable[[], float], now: Callable[[], str], node_resolv_conf: str = "",
        token_of: Callable[[Object], str] | None = None,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.node_name = spec.name
        self.node_address = spec.address
        self.registry = registry
        self.runtime = runtime
        self.catalogue = catalogue
        self.cluster = cluster
        self.clock = clock
        self.now = now
        self.node_resolv_conf = node_resolv_conf
        self.token_of = token_of
        self.addresses = PodAddresses(spec.pod_cidr)
        self.references = References()
        self.slots = asyncio.Semaphore(_SANDBOXES_AT_ONCE)
        self._workers: dict[str, PodWorker] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Register the node and serve its pods; raises what a worker could not cope with."""
        self._failed = asyncio.get_running_loop().create_future()
        self._register()
        store = self.registry.store
        subscriptions = [store.subscribe(self._saw_pod, "pods")]
        subscriptions += [store.subscribe(self._saw_reference, resource) for resource in ("configmaps", "secrets")]
        for pod in self.registry.list("pods"):
            self._serve(pod)
        try:
            while not self._failed.done():
                await asyncio.wait([self._failed], timeout=HEARTBEAT_S)
                self._beat()
            self._failed.result()
        finally:
            for subscription in subscriptions:
                subscription.cancel()
            for task in self._tasks:
                task.cancel()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run something beside everything else; its failure is the kubelet's."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("%s failed", task.get_name(), exc_info=task.exception())

    # -- pods ------------------------------------------------------------------------------------------------------

    def _saw_pod(self, event: Event) -> None:
        if event.type is EventType.DELETED:
            worker = self._workers.get(event.object["metadata"]["uid"])
            if worker is not None:
                worker.remove()
            return
        self._serve(event.object)

    def _serve(self, pod: Object) -> None:
        if pod["spec"].get("nodeName") != self.node_name:
            return
        uid = pod["metadata"]["uid"]
        worker = self._workers.get(uid)
        if worker is not None:
            worker.update(pod)
            return
        worker = self._workers[uid] = PodWorker(self, pod)
        self.spawn(self._work(worker), f"pod {pod['metadata']['name']}")

    async def _work(self, worker: PodWorker) -> None:
        try:
            await worker.run()
        finally:
            del self._workers[worker.uid]

    def _saw_reference(self, event: Event) -> None:
        namespace = event.key.namespace
        self.references.changed(namespace)
        for worker in self._workers.values():
            if worker.pod["metadata"].get("namespace") == namespace:
                worker.reference_changed(event.key.resource, event.key.name)

    # -- the node --------------------------------------------------------------------------------------------------

    def _register(self) -> None:
        node = node_object(self.spec, _machine(), self.now())
        self.registry.create("nodes", node)
        # creation ignores a status, as on a cluster
        current = self.registry.get("nodes", "", self.node_name)
        self.registry.update("nodes", {**current, "status": node["status"]}, subresource="status")

    def _beat(self) -> None:
        """Renew the heartbeat time of the node's conditions."""
        try:
            node = self.registry.get("nodes", "", self.node_name)
        except ApiError:
            return  # deleted by hand; a real kubelet does not register again either before it restarts
        status = node.get("status") or {}
        now = self.now()
        conditions = [{**condition, "lastHeartbeatTime": now} for condition in status.get("conditions") or ()]
        self.registry.update("nodes", {**node, "status": {**status, "conditions": conditions}}, subresource="status")


def _machine() -> Machine:
    release = Path("/etc/os-release")
    fields = dict(line.partition("=")[::2] for line in release.read_text().splitlines()) if release.exists() else {}
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Machine(
        kernel=platform.release(),
        os_image=fields.get("PRETTY_NAME", "Linux").strip('"'),
        architecture={"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
        cpus=os.cpu_count() or 1,
        memory_kib=pages * size // 1024,
    )
