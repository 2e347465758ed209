"""The kubelet of one node: registers it, and gives every pod bound to it a worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from testbed.controllers.events import record_event
from testbed.controllers.nodes import LEASE_NAMESPACE, LEASES
from testbed.errors import ApiError
from testbed.kubelet.container import ContainerRunner
from testbed.kubelet.node import Machine, PodAddresses, node_object, node_status
from testbed.kubelet.pod import PodWorker
from testbed.kubelet.runtime import Runtime
from testbed.model.cluster import DEFAULT_NODE_MONITOR_GRACE_S, ClusterConfig
from testbed.model.objects import Object
from testbed.model.topology import NodeSpec
from testbed.programs.catalogue import Catalogue
from testbed.registry import Registry
from testbed.store import Event, EventType

_log = logging.getLogger("testbed.kubelet")
RENEWALS_PER_LEASE = 4  # nodeLeaseRenewIntervalFraction: 0.25
STATUS_REPORT_S = 300.0  # nodeStatusReportFrequency: how often the conditions say that nothing has changed
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
        clock: Callable[[], float], now: Callable[[], str], clock_ns: Callable[[], int] = time.time_ns,
        node_resolv_conf: str = "",
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
        self.clock_ns = clock_ns
        self.node_resolv_conf = node_resolv_conf
        self.token_of = token_of
        self.addresses = PodAddresses(spec.pod_cidr)
        self.references = References()
        self.slots = asyncio.Semaphore(_SANDBOXES_AT_ONCE)
        self.is_down = False  # it has lost its machine: it must not say anything any more
        lease_s = cluster.node_monitor_grace_s or DEFAULT_NODE_MONITOR_GRACE_S
        self._lease_s = max(1, int(lease_s))
        self._renew_s = lease_s / RENEWALS_PER_LEASE
        self._workers: dict[str, PodWorker] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] | None = None
        self._report_due = 0.0

    async def run(self) -> None:
        """Register the node and serve its pods; raises what a worker could not cope with.

        Cancelled, it behaves like a machine that loses its power: the pods are gone from the node, and nobody is told.
        """
        self._failed = asyncio.get_running_loop().create_future()
        self._register()
        store = self.registry.store
        subscriptions = [store.subscribe(self._saw_pod, "pods")]
        subscriptions += [store.subscribe(self._saw_reference, resource) for resource in ("configmaps", "secrets")]
        for pod in self.registry.list("pods"):
            self._serve(pod)
        try:
            while not self._failed.done():
                self._renew_lease()
                await asyncio.wait([self._failed], timeout=self._renew_s)
                if self.clock() >= self._report_due:
                    self._report()
            self._failed.result()
        finally:
            self.is_down = True
            for subscription in subscriptions:
                subscription.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run something beside everything else; its failure is the kubelet's."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("%s failed", task.get_name(), exc_info=task.exception())

    def runner(self, pod_uid: str, container: str) -> ContainerRunner | None:
        """Return what runs a container of one of the node's pods."""
        worker = self._workers.get(pod_uid)
        return worker.runner(container) if worker is not None else None

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
        """Create the Node, or take up the one that this kubelet had before it went down; say what has begun."""
        node = node_object(self.spec, _machine(), self.now())
        current = self.registry.store.get("nodes", "", self.node_name)
        if current is None:
            self.registry.create("nodes", node)
            current = self.registry.get("nodes", "", self.node_name)
        self._write_status(current, node["status"])
        self._say("Starting", "Starting kubelet.")
        self._say("NodeAllocatableEnforced", "Updated Node Allocatable limit across pods")
        for reason in ("NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID", "NodeReady"):
            self._say(reason, f"Node {self.node_name} status is now: {reason}")

    def _say(self, reason: str, message: str) -> None:
        # upstream's kubelet gives the node's name for its uid, by which `kubectl describe node` looks for it
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.node_name, "uid": self.node_name}}
        record_event(self.registry, node, "Normal", reason, message, "kubelet", host=self.node_name)

    def _write_status(self, node: Object, status: Object) -> None:
        """Write a status whose conditions keep their transition time while their value stays."""
        self._report_due = self.clock() + STATUS_REPORT_S
        known = {one["type"]: one for one in (node.get("status") or {}).get("conditions") or ()}
        conditions = []
        for one in status["conditions"]:
            before = known.pop(one["type"], None)
            if before is not None and before.get("status") == one["status"] and before.get("lastTransitionTime"):
                one = {**one, "lastTransitionTime": before["lastTransitionTime"]}
            conditions.append(one)
        new = {**(node.get("status") or {}), **status, "conditions": [*known.values(), *conditions]}
        self.registry.update("nodes", {**node, "status": new}, subresource="status")

    def _report(self) -> None:
        node = self.registry.store.get("nodes", "", self.node_name)
        if node is not None:  # deleted by hand; a real kubelet does not register again either before it restarts
            self._write_status(node, node_status(self.spec, _machine(), self.now()))

    def _renew_lease(self) -> None:
        """Renew the node's Lease: the sign of life that the node controller looks at."""
        node = self.registry.store.get("nodes", "", self.node_name)
        if node is None:
            return
        spec = {
            "holderIdentity": self.node_name,
            "leaseDurationSeconds": self._lease_s,
            "renewTime": self.now().removesuffix("Z") + ".000000Z",
        }
        with contextlib.suppress(ApiError):  # somebody else's write came between, or the namespace is not there yet
            current = self.registry.store.get(LEASES, LEASE_NAMESPACE, self.node_name)
            if current is not None:
                self.registry.update(LEASES, {**current, "spec": spec})
                return
            owner = {"apiVersion": "v1", "kind": "Node", "name": self.node_name, "uid": node["metadata"]["uid"]}
            metadata = {"name": self.node_name, "namespace": LEASE_NAMESPACE, "ownerReferences": [owner]}
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
            self.registry.create(LEASES, lease)


def _machine() -> Machine:
    release = Path("/etc/os-release")
    fields = dict(line.partition("=")[::2] for line in release.read_text().splitlines()) if release.exists() else {}
    disk = os.statvfs("/")
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Machine(
        kernel=platform.release(),
        os_image=fields.get("PRETTY_NAME", "Linux").strip('"'),
        architecture={"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
        cpus=os.cpu_count() or 1,
        memory_kib=pages * size // 1024,
        storage_kib=disk.f_blocks * disk.f_frsize // 1024,
        machine_id=_first_line("/etc/machine-id"),
        system_uuid=_first_line("/sys/class/dmi/id/product_uuid"),
        boot_id=_first_line("/proc/sys/kernel/random/boot_id"),
    )


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return ""
