"""kube-proxy: keeps one node's kernel rules equal to the Services and EndpointSlices of the API.

::

    watcher threads (services, endpointslices, nodes) ── queue ── main loop ── tracker ── proxier ── kernel
                                                                      └─ health, metrics, health-check node ports

Runs in a process forked inside the node's namespaces, and imports nothing heavy. The main loop alone touches the
tracker and the kernel. SIGTERM ends it and leaves the rules in place, as upstream does.

Source: kubernetes cmd/kube-proxy/app/server.go, pkg/proxy/iptables/proxier.go (v1.30).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final, Protocol

from testbed.dataplane.changes import ChangeTracker
from testbed.dataplane.flows import UdpFlow, concerns_udp, stale_udp_flows
from testbed.dataplane.health import HealthCheck, health_checks, render_health_check
from testbed.dataplane.iptables import needs_route_localnet, node_port_addresses
from testbed.dataplane.state import ProxyState
from testbed.errors import ApiError, InputError, KernelError, LabError, TestbedError
from testbed.kernel.addresses import link_index, link_name, list_local_addresses
from testbed.kernel.conntrack import delete_udp_flows, list_udp_flows
from testbed.kernel.runner import Runner, SubprocessRunner
from testbed.kernel.sysctl import apply_sysctls
from testbed.model.objects import Object, name_of, namespace_of
from testbed.model.proxyconfig import DetectLocalMode, KubeProxyConfig, node_address, parse_proxy_config
from testbed.model.service import PROXIED_SELECTOR, NodeName, NodeView, parse_node, parse_service_cidr
from testbed.programs.answers import Answer, Listener
from testbed.programs.proxy_command import parse_command
from testbed.programs.proxy_events import Events
from testbed.programs.proxy_modes import Proxier, clean_up_all, clean_up_other_modes, make_proxier
from testbed.programs.proxy_status import ProxyHealth, ProxyMetrics
from testbed.programs.proxy_userspace import Unserved, UserspaceProxier
from testbed.programs.userspace_loop import Notice
from testbed.programs.userspace_process import OPEN_FILES, set_open_files

__all__ = ["ProxyLoop", "Watcher", "main", "make_proxier", "parse_command", "sync_once"]

SERVICES: Final = "services"
SLICES: Final = "endpointslices.discovery.k8s.io"
NODES: Final = "nodes"
SERVICE_CIDRS: Final = "servicecidrs.networking.k8s.io"

#: A sync that writes everything happens at least this often, whatever the changes.
FULL_SYNC_INTERVAL_S: Final = 3600.0
_CHANGES_TOTAL: Final = {
    SERVICES: "sync_proxy_rules_service_changes_total",
    SLICES: "sync_proxy_rules_endpoint_changes_total",
}
_BURST: Final = 2
_FAILURES: Final = {
    "iptables": "sync_proxy_rules_iptables_restore_failures_total",
    "nftables": "sync_proxy_rules_nftables_sync_failures_total",
    "ipvs": "sync_proxy_rules_iptables_restore_failures_total",
}
_BACK_OFF_FIRST_S: Final = 0.05
_BACK_OFF_LAST_S: Final = 5.0
_WATCH_TIMEOUT_S: Final = 300.0
#: After a repair: whoever flushes tables often does so one by one.
_RECHECK_S: Final = 1.0


def resources_of(mode: str) -> tuple[str, ...]:
    """Return what a kube-proxy of this mode watches; nothing is written before each was listed once."""
    return (SERVICES, SLICES, NODES, SERVICE_CIDRS) if mode == "nftables" else (SERVICES, SLICES, NODES)


class Api(Protocol):
    """What kube-proxy needs of `testbed.api.client.ApiClient`."""

    def list(
        self, resource: str, namespace: str | None = None, *, label_selector: str = "", field_selector: str = ""
    ) -> tuple[list[Object], str]: ...

    def watch(
        self,
        resource: str,
        namespace: str | None = None,
        *,
        resource_version: str = "",
        label_selector: str = "",
        field_selector: str = "",
        timeout_s: float | None = None,
        bookmarks: bool = False,
    ) -> Iterator[tuple[str, Object]]: ...


@dataclass(frozen=True, slots=True)
class Listed:
    """All objects of a resource, as of now."""

    resource: str
    objects: tuple[Object, ...]


@dataclass(frozen=True, slots=True)
class Changed:
    """One object of a resource was added, modified or deleted."""

    resource: str
    deleted: bool
    object: Object


class Stop:
    """The process was asked to end."""


Message = Listed | Changed | Stop


class Watcher:
    """Lists a resource, then watches it, for ever; lists again when the API has forgotten our place.

    Args:
        api: Its own client: a watch holds a connection.
        resource: A `Resource.key`.
        emit: Called with each `Listed` and `Changed`, on this watcher's thread.
        log: Called with one line when the API cannot be reached, once per outage.
    """

    def __init__(
        self,
        api: Api,
        resource: str,
        emit: Callable[[Message], None],
        log: Callable[[str], None],
        *,
        label_selector: str = "",
        field_selector: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._api = api
        self._resource = resource
        self._emit = emit
        self._log = log
        self._label_selector = label_selector
        self._field_selector = field_selector
        self._sleep = sleep
        self._version = ""  # '' asks for a list first
        self._back_off_s = _BACK_OFF_FIRST_S
        self._in_outage = False

    def run(self) -> None:
        while True:
            self.run_once()

    def run_once(self) -> None:
        """List if that is due, then follow one watch to its end; wait before returning when that went wrong."""
        try:
            if not self._version:
                objects, version = self._api.list(
                    self._resource, label_selector=self._label_selector, field_selector=self._field_selector
                )
                self._emit(Listed(self._resource, tuple(objects)))
                self._version = version
                self._recovered()
            if self._follow() == 0:
                self._sleep(_BACK_OFF_FIRST_S)  # a watch that ends at once must not become a busy loop
        except ApiError as error:
            if error.code == 410:
                self._version = ""  # our place is no longer in the history
                return
            self._failed(error)
        except (TestbedError, OSError, ValueError) as error:
            self._failed(error)

    def _follow(self) -> int:
        seen = 0
        events = self._api.watch(
            self._resource,
            resource_version=self._version,
            label_selector=self._label_selector,
            field_selector=self._field_selector,
            timeout_s=_WATCH_TIMEOUT_S,
            bookmarks=True,  # so that a place where nothing changes is not forgotten while others change
        )
        for kind, obj in events:
            seen += 1
            if kind == "ERROR":
                raise ApiError(int(obj.get("code") or 500), str(obj.get("reason")), str(obj.get("message")))
            self._version = str(obj["metadata"]["resourceVersion"])
            self._recovered()
            if kind != "BOOKMARK":
                self._emit(Changed(self._resource, kind == "DELETED", obj))
        return seen

    def _recovered(self) -> None:
        self._back_off_s = _BACK_OFF_FIRST_S
        self._in_outage = False

    def _failed(self, error: Exception) -> None:
        if not self._in_outage:
            self._log(f"watching {self._resource}: {error}; trying again")
            self._in_outage = True
        self._sleep(self._back_off_s)
        self._back_off_s = min(_BACK_OFF_LAST_S, self._back_off_s * 2)


class Pace:
    """Says when the next sync may start: a token bucket that holds two and gains one per ``period_s``."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._tokens = float(_BURST)
        self._at_s = 0.0

    def wait_s(self, now_s: float) -> float:
        """Return how long to wait from now until a sync may start."""
        if self._period_s <= 0:
            return 0.0
        self._refill(now_s)
        return max(0.0, (1 - self._tokens) * self._period_s)

    def take(self, now_s: float) -> None:
        if self._period_s > 0:
            self._refill(now_s)
            self._tokens -= 1

    def _refill(self, now_s: float) -> None:
        self._tokens = min(float(_BURST), self._tokens + (now_s - self._at_s) / self._period_s)
        self._at_s = now_s


class Flows(Protocol):
    """The node's connection tracking; `KernelFlows` is the real one."""

    def list(self) -> Iterable[UdpFlow]: ...

    def delete(self, flows: Iterable[UdpFlow]) -> int: ...


class KernelFlows:
    """Connection tracking of the network namespace this process is in."""

    def list(self) -> Iterable[UdpFlow]:
        return list_udp_flows()

    def delete(self, flows: Iterable[UdpFlow]) -> int:
        return delete_udp_flows(flows)


class Links(Protocol):
    """Links by name and index; `KernelLinks` is the real one."""

    def index(self, name: str) -> int: ...

    def name(self, index: int) -> str: ...


class KernelLinks:
    """Links of the network namespace this process is in."""

    def index(self, name: str) -> int:
        return link_index(name)

    def name(self, index: int) -> str:
        return link_name(index)


class ProxyLoop:
    """Takes messages in, and syncs when something changed, the pace allows, and everything was listed once.

    Reads no clock and waits for nothing: the caller passes the time and asks `wait_s` how long it may sleep.

    Args:
        config: The node's configuration.
        node: Name of the node; its Node object is used once it appears.
        proxier: Applies states.
        flows: The node's connection tracking.
        links: The node's links; asked only when pods are told by a bridge.
        local_addresses: Returns the node's addresses; asked only when NodePorts are limited to some, or UDP flows may be
            stale.
        health, metrics: Told of every sync.
        log: Called with one line per thing worth knowing.
        tell: Writes an event about an object: its kind (Normal, Warning), reason, message.
        on_health_checks: Called after every sync with the health-check node ports to answer on.
        answering: Returns a state whose endpoints are who answers UDP clients, as connection tracking has it.
        clock: Measures how long a sync took.
    """

    def __init__(
        self,
        config: KubeProxyConfig,
        node: str,
        proxier: Proxier,
        *,
        health: ProxyHealth,
        metrics: ProxyMetrics,
        flows: Flows,
        links: Links,
        tell: Callable[[Object, str, str, str], None] = lambda obj, kind, reason, message: None,
        local_addresses: Callable[[], Iterable[IPv4Address]] = list_local_addresses,
        log: Callable[[str], None] = lambda line: None,
        on_health_checks: Callable[[tuple[HealthCheck, ...], NodeView], None] = lambda checks, node: None,
        answering: Callable[[ProxyState], ProxyState] = lambda state: state,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.health = health
        self.metrics = metrics
        self.has_synced = False
        self._node = NodeView(name=NodeName(node))
        self.node_object: Object = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}
        self._proxier = proxier
        self._flows = flows
        self._links = links
        self._tell = tell
        self._bridge = _Bridge(config.bridge_interface)
        self._local_addresses = local_addresses
        self._log = log
        self._on_health_checks = on_health_checks
        self._answering = answering
        self._clock = clock
        self._tracker = ChangeTracker(config.hostname_override or node)
        self._pace = Pace(config.min_sync_period_s)
        self._not_listed = set(resources_of(config.mode))
        self._service_cidrs: dict[str, tuple[IPv4Network, ...]] = {}
        self._wanted = False
        self._not_before_s = 0.0  # after a failure
        self._last_sync_s = 0.0
        self._next_check_s = 0.0
        self._tend_s = 0.0
        self._period_s = config.sync_period_s
        self._state = ProxyState(services={}, endpoints={})
        self._pending: frozenset[Any] = frozenset()
        self._refused: Mapping[Any, str] = {}
        self._unserved: Mapping[Any, Unserved] = {}
        self._triggers_s: list[float] = []

    def accept(self, message: Listed | Changed, now_s: float) -> None:
        """Take one message in; the kernel is not touched."""
        before, was_waiting = (self._node, self._all_service_cidrs()), bool(self._not_listed)
        if isinstance(message, Listed):
            self._accept_list(message)
        else:
            self._accept_change(message)
        if self._not_listed:
            return
        if was_waiting or self._tracker.has_changes or (self._node, self._all_service_cidrs()) != before:
            self._not_before_s = 0.0  # a new change is a new chance after a failure
            self._want(now_s)

    def _accept_list(self, message: Listed) -> None:
        self._not_listed.discard(message.resource)
        if message.resource == SERVICES:
            self._tracker.replace_services(message.objects)
        elif message.resource == SLICES:
            self._tracker.replace_slices(message.objects)
        elif message.resource == SERVICE_CIDRS:
            self._service_cidrs = {name_of(obj): parse_service_cidr(obj) for obj in message.objects}
        else:
            for obj in message.objects:
                self._saw_node(obj)

    def _accept_change(self, message: Changed) -> None:
        obj, name = message.object, (namespace_of(message.object), name_of(message.object))
        if message.resource in _CHANGES_TOTAL:
            self.metrics.count(_CHANGES_TOTAL[message.resource])
        if message.resource == SERVICES and message.deleted:
            self._tracker.delete_service(*name)
        elif message.resource == SERVICES:
            self._tracker.set_service(obj)
        elif message.resource == SLICES and message.deleted:
            self._tracker.delete_slice(*name)
        elif message.resource == SLICES:
            self._tracker.set_slice(obj)
        elif message.resource == SERVICE_CIDRS:
            self._service_cidrs.pop(name_of(obj), None)
            if not message.deleted:
                self._service_cidrs[name_of(obj)] = parse_service_cidr(obj)
        elif not message.deleted:
            self._saw_node(obj)

    def _all_service_cidrs(self) -> frozenset[IPv4Network]:
        return frozenset(network for networks in self._service_cidrs.values() for network in networks)

    def _saw_node(self, obj: Object) -> None:
        if name_of(obj) == self._node.name:
            self.node_object = {"apiVersion": "v1", "kind": "Node", **obj}
            self._node = parse_node(obj)
            self.health.saw_node(self._node)

    def _want(self, now_s: float) -> None:
        self._wanted = True
        self.health.queued(now_s)
        services, endpoints = self._tracker.pending
        self.metrics.set("sync_proxy_rules_service_changes_pending", services)
        self.metrics.set("sync_proxy_rules_endpoint_changes_pending", endpoints)
        self.metrics.set("sync_proxy_rules_last_queued_timestamp_seconds", now_s)

    def wait_s(self, now_s: float) -> float:
        """Return how long nothing needs to be done if no message comes."""
        if self._not_listed:
            return FULL_SYNC_INTERVAL_S
        due = [max(0.0, self._last_sync_s + FULL_SYNC_INTERVAL_S - now_s)]
        if self._wanted:
            due.append(max(self._pace.wait_s(now_s), self._not_before_s - now_s, 0.0))
        if self.has_synced:
            due.append(max(0.0, self._next_check_s - now_s))
            due.append(max(0.0, self._tend_s - now_s))
        return min(due)

    def step(self, now_s: float) -> None:
        """Do what is due now: check what is installed, and sync."""
        if self._not_listed:
            return
        if self.has_synced and now_s >= self._next_check_s:
            self._check(now_s)
        overdue = now_s >= self._last_sync_s + FULL_SYNC_INTERVAL_S
        if overdue and not self._wanted and self.has_synced:
            self._proxier.require_full()
        if (self._wanted or overdue) and now_s >= self._not_before_s and self._pace.wait_s(now_s) <= 0:
            self._pace.take(now_s)
            self._sync(now_s)
            self._tend_s = now_s
        if self.has_synced and now_s >= self._tend_s:
            self._tend(now_s)

    def _tend(self, now_s: float) -> None:
        """Have the proxier do what time alone makes due."""
        try:
            self._tend_s = now_s + min(self._proxier.tend(), FULL_SYNC_INTERVAL_S)
        except KernelError as error:
            self._tend_s = now_s + self._period_s
            self._log(f"looking after the rules failed: {error}")

    def _check(self, now_s: float) -> None:
        """Look whether our rules are still there; if not, have all of them written again."""
        self._next_check_s = now_s + self._period_s
        if self._bridge.look(self.config, self._links) and self._bridge.now != self._bridge.used:
            self._want(now_s)
        try:
            damage = self._proxier.find_damage()
        except KernelError as error:
            self._log(f"looking at the installed rules failed: {error}")
            return
        if damage:
            self._log(f"somebody else changed our rules ({damage}); writing all of them again")
            self._tell(
                self.node_object, "Warning", "ProxyRulesChanged",
                f"somebody else changed kube-proxy's rules: {damage}; they are being restored",
            )  # fmt: skip
            self._next_check_s = now_s + min(_RECHECK_S, self._period_s)
            self._proxier.require_full()
            self._want(now_s)

    def _sync(self, now_s: float) -> None:
        started = self._clock()
        state, changed = self._tracker.take()
        self._pending |= changed
        self._wanted = False
        self._triggers_s += filter(None, map(_seconds_of, self._tracker.take_trigger_times()))
        addresses = tuple(self._local_addresses()) if self.config.node_port_addresses else ()
        cidrs = self._all_service_cidrs()
        present = self._present_config()
        try:
            settings = self._proxier.make_settings(present, self._node, addresses, cidrs)
            report = self._proxier.sync(state, self._pending, settings)
        except KernelError as error:
            self.metrics.count(_FAILURES.get(self.config.mode, _FAILURES["iptables"]))
            self._retry_later(now_s)
            self._log(f"sync failed, next try in {self._period_s:g} s: {error}")
            self._tell(self.node_object, "Warning", "ProxySyncFailed", f"could not write the proxy's rules: {error}")
            return
        self._forget_flows(state)
        self._state, self._pending = state, frozenset()
        self._on_health_checks(health_checks(state), self._node)
        ended = self._clock()
        self._last_sync_s = now_s
        self.has_synced = True
        if self._next_check_s == 0:
            self._next_check_s = now_s + self._period_s
        self._note_refused(report.refused, now_s)
        if not report.refused:
            self.health.updated(ended)
        self._note_unserved(getattr(report, "unserved", {}), now_s)
        self._measure(report, started, ended)

    def _retry_later(self, now_s: float) -> None:
        self._not_before_s = now_s + self._period_s
        self._want(now_s)

    def _present_config(self) -> KubeProxyConfig:
        """Return the configuration, with the bridge that tells pods under the name that it has now."""
        if not self._bridge.look(self.config, self._links):
            return self.config
        used, self._bridge.used = self._bridge.used, self._bridge.now
        if self._bridge.now != used:
            wanted, now = self.config.bridge_interface, self._bridge.now
            if now == wanted:
                message = f"the bridge {wanted} has its name back"
            else:
                message = f"the bridge {wanted} is called {now} now: rules that tell pods by it say {now}"
            self._log(message)
            self._tell(self.node_object, "Warning", "BridgeRenamed", message)
        return replace(self.config, bridge_interface=self._bridge.now)

    def _note_refused(self, refused: Mapping[Any, str], now_s: float) -> None:
        for name, reason in refused.items():
            if self._refused.get(name) == reason:
                continue
            self._log(f"the rules of Service {name} are refused ({reason}); all others are in place")
            obj = self._tracker.service(name.namespace, name.name)
            if obj is not None:
                self._tell(
                    {"apiVersion": "v1", "kind": "Service", **obj}, "Warning", "ProxyRulesRefused",
                    f"node {self._node.name} cannot program port {name}: {reason}; trying again every {self._period_s:g} s",
                )  # fmt: skip
        self._refused = dict(refused)
        self.health.refused(map(str, refused))
        if refused:
            self.metrics.count(_FAILURES.get(self.config.mode, _FAILURES["iptables"]))
            self._retry_later(now_s)

    def _note_unserved(self, unserved: Mapping[Any, Unserved], now_s: float) -> None:
        """Say which Services ask for what this mode or node cannot give; no fault of kube-proxy's, so it stays healthy."""
        for name, problem in unserved.items():
            if self._unserved.get(name) == problem:
                continue
            self._log(f"Service {name}: {problem.message}")
            obj = self._tracker.service(name.namespace, name.name)
            if obj is not None:
                message = f"node {self._node.name}, port {name}: {problem.message}"
                self._tell({"apiVersion": "v1", "kind": "Service", **obj}, "Warning", problem.reason, message)
        self._unserved = dict(unserved)
        if unserved:
            self._not_before_s = now_s + self._period_s
            self._wanted = True

    def _forget_flows(self, state: ProxyState) -> None:
        if not concerns_udp(self._pending):
            return
        started = self._clock()
        deleted = [
            old for name in self._pending if name not in state.services and (old := self._state.services.get(name))
        ]
        try:
            answering = self._answering(state)
            stale = stale_udp_flows(self._flows.list(), answering, deleted, tuple(self._local_addresses()))
            self.metrics.count("conntrack_reconciler_deleted_entries_total", self._flows.delete(stale) if stale else 0)
        except KernelError as error:
            self._log(f"forgetting UDP flows failed: {error}")
        self.metrics.observe("conntrack_reconciler_sync_duration_seconds", self._clock() - started)

    def _measure(self, report: Any, started_s: float, ended_s: float) -> None:
        metrics, took_s = self.metrics, ended_s - started_s
        kind = "full" if report.full else "partial"
        metrics.observe("sync_proxy_rules_duration_seconds", took_s)
        metrics.observe(f"sync_{kind}_proxy_rules_duration_seconds", took_s)
        metrics.set("sync_proxy_rules_last_timestamp_seconds", ended_s)
        metrics.set("sync_proxy_rules_service_changes_pending", 0)
        metrics.set("sync_proxy_rules_endpoint_changes_pending", 0)
        for trigger_s in self._triggers_s:
            metrics.observe("network_programming_duration_seconds", max(0.0, ended_s - trigger_s))
        self._triggers_s.clear()
        for table, rules in report.payload.rules.items():
            metrics.set("sync_proxy_rules_iptables_total", rules, table=table)
        for table, rules in report.payload.written.items():
            metrics.set("sync_proxy_rules_iptables_last", rules, table=table)
        metrics.count("sync_proxy_rules_iptables_partial_restore_failures_total", int(report.partial_failed))
        for policy, count in zip(("internal", "external"), report.payload.no_local_endpoints, strict=True):
            metrics.set("sync_proxy_rules_no_local_endpoints_total", count, traffic_policy=policy)


def _seconds_of(moment: str) -> float | None:
    try:
        return datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return None


class _Bridge:
    """Follows the link that detectLocal.bridgeInterface names when somebody renames it."""

    def __init__(self, wanted: str) -> None:
        self._index = 0
        self.used = self.now = wanted

    def look(self, config: KubeProxyConfig, links: Links) -> bool:
        """Find out the bridge's present name; say whether one is told pods by at all."""
        wanted = config.bridge_interface
        if config.detect_local_mode is not DetectLocalMode.BRIDGE_INTERFACE or not wanted:
            return False
        index = links.index(wanted)
        self._index = index or self._index
        self.now = wanted if index or not self._index else links.name(self._index) or wanted
        return True


class Faces:
    """The HTTP listeners of one kube-proxy: health, metrics, and one per health-check node port."""

    def __init__(
        self,
        health: ProxyHealth,
        metrics: ProxyMetrics,
        config: KubeProxyConfig,
        log: Callable[[str], None],
        document: Mapping[str, Any] | None = None,
    ) -> None:
        self._health = health
        self._metrics = metrics
        self._config = config
        self._document = document
        self._log = log
        self._checks: dict[tuple[str, str], HealthCheck] = {}
        self._listeners: dict[tuple[str, int], Listener] = {}

    def open_metrics(self) -> None:
        """Listen on metricsBindAddress."""
        self._listen(self._config.metrics_bind_address, self._answer_metrics)

    def open_health(self) -> None:
        """Listen on healthzBindAddress.

        Called after the first sync: upstream answers that it is healthy while it starts, and whoever waits for a ready
        kube-proxy here waits for its rules.
        """
        self._listen(self._config.healthz_bind_address, self._answer_health)

    def _listen(self, bind: str, answer: Callable[[str], Answer]) -> None:
        if not bind:
            return
        host, _, port = bind.rpartition(":")
        try:
            Listener(host, int(port), answer)
        except OSError as error:  # upstream goes on as well
            self._log(f"cannot listen on {bind}: {error.strerror}")

    def _answer_health(self, path: str) -> Answer:
        now_s = time.time()
        headers = {"X-Content-Type-Options": "nosniff"}
        if path == "/healthz":
            status, body = self._health.healthz(now_s)
        elif path == "/livez":
            status, body = self._health.livez(now_s)
        else:
            return Answer(404, "404 page not found\n")
        self._metrics.count(f"proxy_{path[1:]}_total", code=str(status))
        return Answer(status, body, "application/json", headers)

    def _answer_metrics(self, path: str) -> Answer:
        if path == "/metrics":
            return Answer(200, self._metrics.render(), "text/plain; version=0.0.4; charset=utf-8")
        if path == "/proxyMode":
            return Answer(200, self._config.mode)
        if path == "/healthz":
            return Answer(200, "ok")
        if path == "/configz":
            return Answer(200, json.dumps({"kubeproxy.config.k8s.io": self._document}), "application/json")
        return Answer(404, "404 page not found\n")

    def show_health_checks(self, checks: Iterable[HealthCheck], node: NodeView) -> None:
        """Listen on exactly the ports of these checks and answer with their counts."""
        self._checks = {(check.namespace, check.name): check for check in checks}
        hosts = self._health_check_hosts(node) if self._checks else []
        wanted = {(host, check.port): owner for owner, check in self._checks.items() for host in hosts}
        for address in self._listeners.keys() - wanted.keys():
            self._listeners.pop(address).close()
        for address, owner in wanted.items():
            if address not in self._listeners:
                try:
                    self._listeners[address] = Listener(*address, self._answer_check(owner))
                except OSError as error:
                    self._log(
                        f"service {owner[0]}/{owner[1]}: cannot listen on {address[0]}:{address[1]}: {error.strerror}"
                    )

    def _health_check_hosts(self, node: NodeView) -> list[str]:
        addresses = node_port_addresses(self._config, node_address(self._config, node), list_local_addresses())
        return ["0.0.0.0"] if addresses is None else [str(address) for address in addresses]

    def _answer_check(self, owner: tuple[str, str]) -> Callable[[str], Answer]:
        def answer(path: str) -> Answer:
            check = self._checks.get(owner)
            if check is None:
                return Answer(404, "404 page not found\n")
            status, body = render_health_check(check, proxy_healthy=self._health.is_healthy(time.time()))
            headers = {
                "X-Content-Type-Options": "nosniff",
                "X-Load-Balancing-Endpoint-Weight": str(check.local_endpoints),
            }
            return Answer(status, body, "application/json", headers)

        return answer


def prepare_node(config: KubeProxyConfig, node: str, log: Callable[[str], None]) -> None:
    """Set the kernel settings that the rules rely on. One that is missing or read-only is logged, as upstream does."""
    conntrack = config.conntrack
    wanted = {
        "net/netfilter/nf_conntrack_tcp_timeout_established": conntrack.tcp_established_timeout_s,
        "net/netfilter/nf_conntrack_tcp_timeout_close_wait": conntrack.tcp_close_wait_timeout_s,
        "net/netfilter/nf_conntrack_tcp_be_liberal": float(conntrack.tcp_be_liberal),
        "net/netfilter/nf_conntrack_udp_timeout": conntrack.udp_timeout_s,
        "net/netfilter/nf_conntrack_udp_timeout_stream": conntrack.udp_stream_timeout_s,
    }
    settings = {name: f"{value:.0f}" for name, value in wanted.items() if value > 0}
    if config.mode not in ("nftables", "ipvs", "userspace") and needs_route_localnet(config):
        settings["net/ipv4/conf/all/route_localnet"] = "1"
    for name, value in settings.items():
        try:
            apply_sysctls({name: value}, node)
        except KernelError as error:
            log(str(error))


def is_tcp_liberal() -> bool:
    """Say whether conntrack takes packets outside of its window: then those it cannot place must not be dropped."""
    try:
        return Path("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal").read_text().strip() != "0"
    except OSError:
        return False


def sync_once(
    config: KubeProxyConfig,
    node: NodeView,
    services: Iterable[Object],
    slices: Iterable[Object],
    *,
    runner: Runner,
    backend: str = "",
    local_addresses: Iterable[IPv4Address] = (),
    service_cidrs: Iterable[IPv4Network] = (),
) -> Any:
    """Program the runner's network namespace once for these objects and return the `SyncReport`."""
    tracker = ChangeTracker(config.hostname_override or node.name)
    tracker.replace_services(services)
    tracker.replace_slices(slices)
    state, changed = tracker.take()
    proxier = make_proxier(config, runner, backend)
    return proxier.sync(
        state, changed, proxier.make_settings(config, node, tuple(local_addresses), tuple(service_cidrs))
    )


def collect_garbage_seldom() -> None:
    """Have this process look for cycles seldom: Services and rules have none, and looking doubles the time of a full sync."""
    gc.set_threshold(200_000, 20, 100)


def main(args: Mapping[str, Any]) -> int:
    """Run until SIGTERM and return the exit status: 0, or 2 and 3 when it could not start.

    Args (keys of ``args``; `testbed.programs.proxy_command.parse_command` makes them):
        node_name, api_socket: Which node this is, and where the API listens.
        config: A KubeProxyConfiguration as decoded from YAML; may be absent.
        lock_file: XTABLES_LOCKFILE of this node; may be absent.
        iptables_backend: ``legacy`` or ``nft``; absent: what the node uses.
        ready_file: Written once, when the first sync is in the kernel; may be absent.
        cleanup: Remove all rules of kube-proxy and end. Needs no node and no API.
        init_only: Set what needs privileges, and end.
    """
    node = str(args.get("node_name") or "")
    collect_garbage_seldom()

    def log(line: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} kube-proxy {node}: {line}\n")
        sys.stderr.flush()

    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: messages.put(Stop()))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        config, problems = parse_proxy_config(args.get("config") or {})
        if problems:
            raise InputError("its configuration is wrong: " + "; ".join(str(problem) for problem in problems))
        env = {"XTABLES_LOCKFILE": str(args["lock_file"])} if args.get("lock_file") else {}
        runner = SubprocessRunner({**env, "PATH": os.environ.get("PATH", "") or "/usr/sbin:/usr/bin:/sbin:/bin"})
        backend, lock_file = str(args.get("iptables_backend") or ""), str(args.get("lock_file") or "")
        if args.get("cleanup"):
            clean_up_all(runner, backend)
            return 0
        if not args.get("init_only") and not os.path.exists(str(args["api_socket"])):
            raise LabError(f"there is no API at {args['api_socket']} (TESTBED_API_SOCKET)")
        proxier = make_proxier(config, runner, backend, lock_file=lock_file)
        clean_up_other_modes(config, runner, backend)
        if isinstance(proxier, UserspaceProxier) and not args.get("init_only"):
            if (most := set_open_files(OPEN_FILES)) < OPEN_FILES:
                log(f"userspace mode wants {OPEN_FILES} file descriptors, this machine lets it have {most}")
            proxier.start()
    except TestbedError as error:
        log(str(error))
        if isinstance(error, KernelError):
            _tell_why_not(node, str(args.get("api_socket") or ""), f"kube-proxy cannot run: {error}", log)
        return error.exit_status
    prepare_node(config, node, log)
    if args.get("init_only"):
        return 0
    if is_tcp_liberal():
        config = replace(config, conntrack=replace(config.conntrack, tcp_be_liberal=True))
    _run_on_node(config, node, proxier, args, messages, log)
    return 0


def _tell_why_not(node: str, api_socket: str, message: str, log: Callable[[str], None]) -> None:
    """Write an event about the node: a pod's log is not where its owner looks first."""
    from testbed.api.client import ApiClient

    if not node or not os.path.exists(api_socket):
        return
    api = ApiClient(api_socket)
    try:
        about: Object = {"apiVersion": "v1", "kind": "Node", **api.get(NODES, "", node)}
    except (TestbedError, OSError) as error:
        log(f"an event about it is lost: {error}")
        return
    Events(api, node, log).write(about, "Warning", "FailedToStartProxy", message)


def _run_on_node(
    config: KubeProxyConfig,
    node: str,
    proxier: Proxier,
    args: Mapping[str, Any],
    messages: queue.SimpleQueue[Message],
    log: Callable[[str], None],
) -> None:
    from testbed.api.client import ApiClient

    socket_path = str(args["api_socket"])
    health, metrics = ProxyHealth(2 * config.sync_period_s), ProxyMetrics()
    faces = Faces(health, metrics, config, log, args.get("config") or {})
    faces.open_metrics()
    events = Events(ApiClient(socket_path), node, log)
    loop = ProxyLoop(
        config, node, proxier,
        health=health, metrics=metrics, flows=KernelFlows(), links=KernelLinks(), log=log, tell=events.tell,
        on_health_checks=faces.show_health_checks,
        answering=proxier.answering if isinstance(proxier, UserspaceProxier) else lambda state: state,
    )  # fmt: skip
    if isinstance(proxier, UserspaceProxier):

        def on_notice(notice: Notice) -> None:
            log(notice.message)
            if notice.kind:
                events.tell(loop.node_object, *notice)

        proxier.on_notice = on_notice

    def on_first_sync() -> None:
        faces.open_health()
        events.tell(loop.node_object, "Normal", "Starting", "")
        if args.get("ready_file"):
            Path(str(args["ready_file"])).write_text("synced\n")

    selectors = {SERVICES: (PROXIED_SELECTOR, ""), SLICES: (PROXIED_SELECTOR, ""), NODES: ("", f"metadata.name={node}")}
    for resource in resources_of(config.mode):
        labels, fields = selectors.get(resource, ("", ""))
        api: Api = ApiClient(socket_path)
        watcher = Watcher(api, resource, messages.put, log, label_selector=labels, field_selector=fields)
        threading.Thread(target=watcher.run, name=f"watch-{resource}", daemon=True).start()
    run(loop, messages, on_first_sync)


def run(loop: ProxyLoop, messages: queue.SimpleQueue[Message], on_first_sync: Callable[[], None]) -> None:
    """Turn the loop until a `Stop` arrives. Messages that wait together are taken in together, for one sync."""
    announced = False
    while True:
        with contextlib.suppress(queue.Empty):
            message = messages.get(timeout=loop.wait_s(time.time()))
            while True:
                if isinstance(message, Stop):
                    return
                loop.accept(message, time.time())
                message = messages.get_nowait()
        loop.step(time.time())
        if not announced and loop.has_synced:
            announced = True
            on_first_sync()
