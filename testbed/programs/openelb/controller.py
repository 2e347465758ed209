"""openelb-controller: gives annotated Services addresses, and takes them back.

::

    watcher threads (eips, services, namespaces, bgpconfs, bgppeers) ── queue ── main loop ── plan_service, plan_eip ──▶ API

What is to be done is decided in `testbed.controllers.openelb`; here is who calls it, in which order, and what happens when
the API refuses. The webhook runs in the API's own process (`testbed.registry.admission`), as long as a pod of this is ready.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from testbed.controllers.openelb.ipam import (
    ServicePlan,
    Told,
    is_ours,
    key_of,
    plan_eip,
    plan_service,
    port_conflicts,
    waiting_services,
)
from testbed.controllers.openelb.names import BGP_CONFS, BGP_PEERS, EIPS, LAYER2, SYSTEM_NAMESPACE
from testbed.controllers.openelb.pools import Pool, parse_pool, status_of
from testbed.errors import ApiError, InputError, TestbedError
from testbed.model.objects import Object, is_terminating, name_of, namespace_of
from testbed.programs.answers import Listener
from testbed.programs.kube_proxy import Changed, Listed, Stop, Watcher
from testbed.programs.lease import Leadership
from testbed.programs.openelb.faces import answer_faces
from testbed.programs.openelb.flags import ControllerFlags, parse_controller_flags
from testbed.programs.proxy_events import Events
from testbed.programs.proxy_status import ProxyMetrics

SERVICES: Final = "services"
NAMESPACES: Final = "namespaces"
_RESOURCES: Final = (EIPS, SERVICES, NAMESPACES, BGP_CONFS, BGP_PEERS)
_NEEDED: Final = frozenset({EIPS, SERVICES, NAMESPACES})
_COMPONENT: Final = "openelb-controller"
_LEASE: Final = "openelb-controller"
_FIRST_RETRY_S: Final = 0.5
_LAST_RETRY_S: Final = 60.0
_CONFLICT_RETRY_S: Final = 0.05
_IDLE_S: Final = 5.0
_NOT_ANNOUNCED: Final = (
    "{what}: the speakers of this testbed announce by layer2 only, not by {protocol} yet; addresses are given out, but "
    "nobody outside learns the way to them"
)

Message = Listed | Changed | Stop
Tell = Callable[[Object, str, str, str], None]


class ObjectApi(Protocol):
    """What is needed of `testbed.api.client.ApiClient`."""

    def get(self, resource: str, namespace: str, name: str) -> Object: ...

    def update(self, obj: Object, *, subresource: str = "") -> Object: ...

    def patch(self, resource: str, namespace: str, name: str, patch: Object, *, subresource: str = "") -> Object: ...


class Mirror:
    """The objects of a resource as they are now: what the watch says, and what our own writes returned sooner."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}

    def replace(self, objects: Sequence[Object]) -> set[str]:
        """Take a list in, and return the keys of what differs."""
        new = {_key(obj): obj for obj in objects}
        differs = {key for key in self.objects.keys() | new.keys() if self.objects.get(key) != new.get(key)}
        self.objects = new
        return differs

    def put(self, obj: Object) -> bool:
        """Take one state in; say whether it was news. A watch repeats what our own write has told already."""
        known = self.objects.get(_key(obj))
        if known is not None and _is_older(obj["metadata"], known["metadata"]):
            return False
        self.objects[_key(obj)] = obj
        return True

    def drop(self, obj: Object) -> None:
        known = self.objects.get(_key(obj))
        if known is not None and known["metadata"]["uid"] == obj["metadata"]["uid"]:
            del self.objects[_key(obj)]

    def sorted(self) -> list[Object]:
        return [self.objects[key] for key in sorted(self.objects)]


def _is_older(one: Object, known: Object) -> bool:
    return one["uid"] == known["uid"] and int(one["resourceVersion"]) <= int(known["resourceVersion"])


def _key(obj: Object) -> str:
    return key_of(obj) if namespace_of(obj) else name_of(obj)


class ControllerLoop:
    """Takes messages in and does what they make necessary. Reads no clock; only one thread uses it."""

    def __init__(
        self, api: ObjectApi, tell: Tell, log: Callable[[str], None], metrics: ProxyMetrics | None = None
    ) -> None:
        self._api = api
        self._tell = tell
        self._log = log
        self.metrics = metrics or ProxyMetrics("")
        self.eips, self.services, self.namespaces = Mirror(), Mirror(), Mirror()
        self._not_listed = set(_NEEDED)
        self._due: dict[tuple[str, str], float] = {}  # (resource, key) -> when
        self._back_off_s: dict[tuple[str, str], float] = {}
        self._told: set[str] = set()  # uids of what is not announced

    # -- messages --------------------------------------------------------------------------------------------------

    def accept(self, message: Listed | Changed, now_s: float) -> None:
        """Take one message in; nothing is written."""
        if message.resource in (BGP_CONFS, BGP_PEERS):
            objects = message.objects if isinstance(message, Listed) else () if message.deleted else (message.object,)
            for obj in objects:
                self._tell_not_announced(obj, name_of(obj), "BGP")
            return
        mirror = {EIPS: self.eips, SERVICES: self.services, NAMESPACES: self.namespaces}[message.resource]
        if isinstance(message, Listed):
            changed = mirror.replace(message.objects)
            was_waiting = bool(self._not_listed)
            self._not_listed.discard(message.resource)
            if was_waiting and not self._not_listed:
                self._want_all(now_s)
                return
        elif message.deleted:
            mirror.drop(message.object)
            changed = {_key(message.object)}
        else:
            changed = {_key(message.object)} if mirror.put(message.object) else set()
        for key in changed:
            self._changed(message.resource, key, now_s)

    def _changed(self, resource: str, key: str, now_s: float) -> None:
        if resource == SERVICES:
            service = self.services.objects.get(key)
            if service is None:  # what it had is free
                for pool in map(parse_pool, self.eips.sorted()):
                    if pool is not None and pool.address_of(key):
                        self._want(EIPS, pool.name, now_s)
            elif is_ours(service):
                self._want(SERVICES, key, now_s)
            return
        if resource == EIPS:
            self._want(EIPS, key, now_s)
            if key not in self.eips.objects:
                self.metrics.drop("addresses_total", eipName=key)
                self.metrics.drop("addresses_in_use_total", eipName=key)
                self.metrics.drop("services_allocated_total", eipName=key)
        for waiting in waiting_services(self.services.objects):
            self._want(SERVICES, waiting, now_s)

    def _want(self, resource: str, key: str, now_s: float) -> None:
        self._due[(resource, key)] = now_s
        self._back_off_s.pop((resource, key), None)

    def _want_all(self, now_s: float) -> None:
        for name in self.eips.objects:
            self._want(EIPS, name, now_s)
        for key, service in self.services.objects.items():
            if is_ours(service):
                self._want(SERVICES, key, now_s)

    # -- work ------------------------------------------------------------------------------------------------------

    def wait_s(self, now_s: float) -> float:
        """Return how long nothing needs to be done if no message comes."""
        if self._not_listed or not self._due:
            return _IDLE_S
        return min(_IDLE_S, max(0.0, min(self._due.values()) - now_s))

    def step(self, now_s: float) -> None:
        """Do what is due: Eips before Services, in the order of their names."""
        if self._not_listed:
            return
        for item in sorted(item for item, when_s in self._due.items() if when_s <= now_s):
            del self._due[item]
            resource, key = item
            try:
                is_done = self._do_eip(key) if resource == EIPS else self._do_service(key)
            except ApiError as error:
                if error.code not in (404, 409):
                    self._log(f"{resource} {key}: {error}")
                    self._later(item, now_s)
                else:  # somebody else was faster: the watch brings what it is now
                    self._due.setdefault(item, now_s + _CONFLICT_RETRY_S)
                continue
            except (TestbedError, OSError) as error:
                self._log(f"{resource} {key}: {error}; trying again")
                self._later(item, now_s)
                continue
            if is_done:
                self._back_off_s.pop(item, None)
            else:
                self._later(item, now_s)

    def _later(self, item: tuple[str, str], now_s: float) -> None:
        wait_s = self._back_off_s.get(item, _FIRST_RETRY_S)
        self._back_off_s[item] = min(_LAST_RETRY_S, 2 * wait_s)
        self._due.setdefault(item, now_s + wait_s)

    def _do_eip(self, name: str) -> bool:
        eip = self.eips.objects.get(name)
        if eip is None:
            return True
        pool = parse_pool(eip)
        if pool is not None and pool.protocol != LAYER2 and not is_terminating(eip):
            self._tell_not_announced(eip, name, "BGP" if pool.protocol == "bgp" else "VIP (keepalived)")
        plan = plan_eip(eip, self.services.objects)
        for told in plan.events:
            self._tell_about(eip, told)
        for key in plan.services:
            self._do_service(key)
        if plan.finalizers is not None:
            metadata = {"finalizers": plan.finalizers, "resourceVersion": eip["metadata"]["resourceVersion"]}
            eip = self._api.patch(EIPS, "", name, {"metadata": metadata})
            if is_terminating(eip):
                return True
            self.eips.put(eip)
        if plan.status is not None:
            eip = self._api.update({**eip, "status": plan.status}, subresource="status")
            self.eips.put(eip)
        self._measure(parse_pool(eip))
        return True

    def _do_service(self, key: str) -> bool:
        service = self.services.objects.get(key)
        if service is None:
            return True
        plan = plan_service(service, self.eips.sorted(), self.namespaces.objects)
        if plan.is_empty:
            return True
        for pool in plan.pools:
            self._write_pool(pool)
        self._write_service(key, service, plan)
        for told in plan.events:
            self._tell_about(service, told)
        current = self.services.objects.get(key)
        if current is not None and plan.ingress:
            for told in port_conflicts(current, self.eips.sorted(), self.services.objects):
                self._tell_about(current, told)
        return not plan.retry

    def _write_pool(self, pool: Pool) -> None:
        eip = self.eips.objects[pool.name]
        stored = self._api.update({**eip, "status": status_of(pool)}, subresource="status")
        self.eips.put(stored)
        self._measure(pool)

    def _write_service(self, key: str, service: Object, plan: ServicePlan) -> None:
        namespace, name = namespace_of(service), name_of(service)
        # The ingress goes first when the finalizer goes, because that may be the last thing that holds the Service.
        releases = plan.ingress == []
        if releases:
            service = self._write_ingress(service, [])
        if plan.metadata is not None:
            metadata = {**plan.metadata, "resourceVersion": service["metadata"]["resourceVersion"]}
            service = self._api.patch(SERVICES, namespace, name, {"metadata": metadata})
            if is_terminating(service) and not service["metadata"].get("finalizers"):
                self.services.objects.pop(key, None)
                return
            self.services.put(service)
        if plan.ingress and not releases:
            self._write_ingress(service, plan.ingress)

    def _write_ingress(self, service: Object, ingress: list[Object]) -> Object:
        patch = {"status": {"loadBalancer": {"ingress": ingress or None}}}
        stored = self._api.patch(SERVICES, namespace_of(service), name_of(service), patch, subresource="status")
        self.services.put(stored)
        return stored

    def _tell_about(self, obj: Object, told: Told) -> None:
        self._tell(obj, told.kind, told.reason, told.message)

    def _tell_not_announced(self, obj: Object, what: str, protocol: str) -> None:
        if obj["metadata"]["uid"] not in self._told:
            self._told.add(obj["metadata"]["uid"])
            self._tell(obj, "Warning", "NotAnnounced", _NOT_ANNOUNCED.format(what=what, protocol=protocol))

    def _measure(self, pool: Pool | None) -> None:
        if pool is None:
            return
        self.metrics.set("addresses_total", pool.range.size, eipName=pool.name)
        self.metrics.set("addresses_in_use_total", len(pool.used), eipName=pool.name)
        self.metrics.set("services_allocated_total", sum(map(len, pool.used.values())), eipName=pool.name)


def with_kind(resource: str, obj: Object) -> Object:
    """Return an object of a list with the apiVersion and kind that lists leave out; events and updates need them."""
    kinds = {
        EIPS: ("network.kubesphere.io/v1alpha2", "Eip"),
        BGP_CONFS: ("network.kubesphere.io/v1alpha2", "BgpConf"),
        BGP_PEERS: ("network.kubesphere.io/v1alpha2", "BgpPeer"),
        SERVICES: ("v1", "Service"),
        NAMESPACES: ("v1", "Namespace"),
    }
    api_version, kind = kinds.get(resource, ("", ""))
    return {"apiVersion": api_version, "kind": kind, **obj}


def with_kinds(message: Message) -> Message:
    """Return a message whose objects say what they are."""
    if isinstance(message, Listed):
        return Listed(message.resource, tuple(with_kind(message.resource, obj) for obj in message.objects))
    if isinstance(message, Changed):
        return replace(message, object=with_kind(message.resource, message.object))
    return message


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run until SIGTERM; return the exit status: 0, or 1 when it could not start."""
    from testbed.api.client import ApiClient, in_cluster

    def log(line: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} openelb-controller: {line}\n")
        sys.stderr.flush()

    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: messages.put(Stop()))
    try:
        flags = parse_controller_flags(argv)
        server = in_cluster(env)
        metrics = ProxyMetrics("")
        events = Events(ApiClient(server), env.get("NODE_NAME", ""), log, component=_COMPONENT)
        loop = ControllerLoop(ApiClient(server), events.tell, log, metrics)
        if flags.metrics_port:
            Listener("0.0.0.0", flags.metrics_port, answer_faces(metrics))
    except InputError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    except (TestbedError, OSError) as error:
        log(str(error))
        return 1
    for resource in _RESOURCES:
        watcher = Watcher(ApiClient(server), resource, lambda message: messages.put(with_kinds(message)), log)
        threading.Thread(target=watcher.run, name=f"watch-{resource}", daemon=True).start()
    leadership = _leadership(flags, ApiClient(server), env, log)
    run(loop, messages, leadership)
    return 0


def _leadership(flags: ControllerFlags, api: Any, env: Mapping[str, str], log: Callable[[str], None]) -> Leadership:
    namespace = env.get("OPENELB_NAMESPACE") or SYSTEM_NAMESPACE
    identity = env.get("HOSTNAME", "openelb-controller")
    leadership = Leadership(api, namespace, _LEASE, identity, log)
    if flags.elects_leader:
        leadership.start()
    else:
        leadership.is_leader.set()
    return leadership


def run(loop: ControllerLoop, messages: queue.SimpleQueue[Message], leadership: Leadership) -> None:
    """Turn the loop until a `Stop` arrives; messages are taken in always, acted upon only by the leader."""
    while True:
        wait_s = loop.wait_s(time.monotonic()) if leadership.is_leader.is_set() else 0.2
        with contextlib.suppress(queue.Empty):
            message = messages.get(timeout=wait_s)
            while True:
                if isinstance(message, Stop):
                    leadership.release()
                    return
                loop.accept(message, time.monotonic())
                message = messages.get_nowait()
        if leadership.is_leader.is_set():
            loop.step(time.monotonic())
