"""One proxy mode's lab as a benchmark uses it: filled with Services, and sampled. The only part that touches labs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

from testbed.bench import objects
from testbed.bench.clients import OWN_PORTS, fetch_metrics, first_answers
from testbed.bench.machine import measured_cpu, pids_beside, read_offloads
from testbed.bench.objects import Target
from testbed.bench.parse import (
    could_not_begin,
    parse_iperf3_tcp,
    parse_iperf3_udp,
    parse_metrics,
    parse_service_order,
    parse_wrk,
)
from testbed.bench.statistics import quantile
from testbed.errors import ApiError, KernelError, LabError, TestbedError
from testbed.kernel.pace import patient
from testbed.lab.handle import Lab
from testbed.manifests.objects import load_objects
from testbed.manifests.topology import TOPOLOGIES
from testbed.model.benchmark import Benchmark, Case, NetPath, Position, Workload
from testbed.model.topology import Topology

T = TypeVar("T")

READY_WITHIN_S = patient(30)
SYNC_WITHIN_S = patient(60)
_SERVICE_WITHIN_S = patient(0.05)
_PROGRAM_WITHIN_S = patient(20)
_BEGIN_WITHIN_S = patient(2)
_LOOK_EVERY_S = 0.05
_QUIET_S = 0.25
"""How long a change is left alone before we look: looking costs processor time that the nodes need."""
_INGRESS = TOPOLOGIES.parent / "scenarios" / "ingress"
_WEBHOOK_NOT_YET = (500, 503)
_MODE_SECTIONS = ("iptables", "ipvs", "nftables")

POD = f"{objects.NAMESPACE}/{objects.CLIENT}"


def lab_topology(benchmark: Benchmark) -> Topology:
    """Return the benchmark's topology; to measure syncs, kube-proxy does not wait between them."""
    topology = benchmark.topology
    if not benchmark.has(Workload.SYNC):
        return topology
    proxy = dict(topology.kube_proxy)
    for section in _MODE_SECTIONS:
        proxy[section] = {**(proxy.get(section) or {}), "minSyncPeriod": "0s"}
    return replace(topology, kube_proxy=proxy)


class LabSite:
    """A lab in one proxy mode. As a context manager it ends the lab."""

    def __init__(self, lab: Lab, mode: str, benchmark: Benchmark) -> None:
        self.mode = mode
        self._lab = lab
        self._benchmark = benchmark
        nodes = [node.name for node in lab.topology.nodes]
        self._client_node, self._server_node = nodes[:2]
        self._nodes = nodes
        self._outside = lab.topology.hosts[0].name if lab.topology.hosts else ""
        self._fillers = 0
        self._generation = 0
        self._targets: dict[Position, Target] = {}
        self._fixed: dict[NetPath, Target] = {}
        self._pids: dict[tuple[str, str], list[int]] = {}

    def __enter__(self) -> LabSite:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lab.__exit__(kind, value, trace)

    # -- setting up ------------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Make the pods and the Services that are asked, and wait until all of them answer.

        Raises:
            LabError: a pod did not become ready, or a Service has no endpoints.
        """
        paths = {case.path for case in self._benchmark.cases} - {NetPath.NONE}
        if not paths:
            self._lab.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": objects.NAMESPACE}})
            return
        balanced = NetPath.LOAD_BALANCER in paths
        for obj in objects.base_objects(self._client_node, self._server_node, balanced=balanced):
            self._lab.api.create(obj)
        pods = {name: self._wait_for_pod(name) for name in (objects.CLIENT, objects.NEAR, objects.FAR)}
        services = {name: self._wait_for_endpoints(name) for name in (objects.NEAR, objects.FAR)}
        node = str(self._lab.topology.node(self._client_node).address)
        self._fixed = {
            NetPath.DIRECT: Target(pods[objects.FAR]),
            NetPath.DIRECT_SAME_NODE: Target(pods[objects.NEAR]),
            NetPath.CLUSTER_IP: Target(services[objects.FAR]),
            NetPath.CLUSTER_IP_SAME_NODE: Target(services[objects.NEAR]),
            NetPath.NODE_PORT: Target(node, objects.HTTP_NODE_PORT, objects.IPERF_NODE_PORT),
            NetPath.LOAD_BALANCER: Target(str(objects.BALANCER_ADDRESS)),
        }
        if balanced:
            self._announce_balancer(node)
        if NetPath.INGRESS in paths:
            self._install_ingress()
            self._fixed[NetPath.INGRESS] = Target(node, objects.INGRESS_NODE_PORT, host=objects.INGRESS_HOST)
        for path in paths:
            self._wait_for_answer(path, self._fixed[path])

    def _announce_balancer(self, node: str) -> None:
        """Do by hand what a load balancer's controller and its router do: an address for the Service, a route to a node."""
        status = {"status": {"loadBalancer": {"ingress": [{"ip": str(objects.BALANCER_ADDRESS)}]}}}
        self._lab.api.patch("services", objects.NAMESPACE, objects.FAR, status, subresource="status")
        argv = ["ip", "route", "replace", f"{objects.BALANCER_ADDRESS}/32", "via", node]
        self._run(self._outside, argv)

    def _install_ingress(self) -> None:
        """Install ingress-nginx as the scenario does, behind a port of each node; its pod is on the node that is asked."""
        for name in ("ingress-nginx.yaml", "nodeport.yaml"):
            for source in load_objects(_INGRESS / name):
                obj = source.object
                if obj["kind"] == "Deployment":
                    pod = obj["spec"]["template"]["spec"]
                    pod["nodeSelector"] = {"kubernetes.io/hostname": self._client_node}
                self._lab.api.apply(obj)

        def is_available() -> bool:
            found = self._lab.api.get("deployments.apps", "ingress-nginx", "ingress-nginx-controller")
            return bool(found.get("status", {}).get("availableReplicas"))

        self._eventually(is_available, "the ingress controller is not available", READY_WITHIN_S)

        def is_admitted() -> bool:
            try:
                self._lab.api.apply(objects.ingress_object())
            except ApiError as error:
                if error.code not in _WEBHOOK_NOT_YET:
                    raise
                return False
            return True

        self._eventually(is_admitted, "the ingress controller's webhook does not answer", READY_WITHIN_S)

    def _wait_for_pod(self, name: str) -> str:
        """Return a pod's address once it is ready."""

        def ready() -> str:
            pod = self._lab.api.get("pods", objects.NAMESPACE, name)
            conditions = {each["type"]: each["status"] for each in pod.get("status", {}).get("conditions", ())}
            return str(pod["status"]["podIP"]) if conditions.get("Ready") == "True" else ""

        return self._eventually(ready, f"pod {objects.NAMESPACE}/{name} is not ready", READY_WITHIN_S)

    def _wait_for_endpoints(self, name: str) -> str:
        """Return a Service's ClusterIP once it has an endpoint."""

        def has_endpoint() -> str:
            selector = f"kubernetes.io/service-name={name}"
            slices, _ = self._lab.api.list(
                "endpointslices.discovery.k8s.io", objects.NAMESPACE, label_selector=selector
            )
            found = [each for one in slices for each in one.get("endpoints") or () if each["conditions"].get("ready")]
            if not found:
                return ""
            return str(self._lab.api.get("services", objects.NAMESPACE, name)["spec"]["clusterIP"])

        what = f"Service {objects.NAMESPACE}/{name} has no endpoints: there is nothing to measure"
        return self._eventually(has_endpoint, what, READY_WITHIN_S)

    def _wait_for_answer(self, path: NetPath, target: Target) -> None:
        def answers() -> bool:
            try:
                return bool(
                    self._lab.call(self._client_of(path), first_answers, target, 0.0, timeout_s=_PROGRAM_WITHIN_S)
                )
            except KernelError:
                return False

        what = f"{target.address}:{target.http_port} ({path.value}) does not answer"
        self._eventually(answers, what, READY_WITHIN_S)

    def _eventually(self, check: Callable[[], T], otherwise: str, within_s: float) -> T:
        """Return the first true answer.

        Raises:
            LabError: there was none in time, or the lab ended.
        """
        deadline = time.monotonic() + within_s
        while not (answer := check()):
            if ended := self._lab.why_ended():
                raise LabError(f"{self.mode}: {ended}")
            if time.monotonic() > deadline:
                raise LabError(f"{self.mode}: {otherwise} after {within_s:g} s{self._last_events()}")
            time.sleep(_LOOK_EVERY_S)
        return answer

    def _last_events(self) -> str:
        with contextlib.suppress(TestbedError, KeyError):
            events, _ = self._lab.api.list("events", objects.NAMESPACE)
            warnings = [event["message"] for event in events if event.get("type") == "Warning"]
            return "".join(f"\n    {message}" for message in warnings[-3:])
        return ""

    def prepare(self, services: int) -> None:
        """Have that many Services beside those that are asked, in every node's kernel; targets are where they should be."""
        heard = {node: self._metrics(node) for node in self._nodes}
        before = self._fillers
        for number in range(before, services):
            self._lab.api.create(objects.filler_service(number))
            addresses = objects.nobody(number, self._benchmark.endpoints)
            self._lab.api.create(objects.filler_slice(number, addresses))
        self._fillers = max(before, services)
        if self._fillers > before:
            self._wait_for_kernels(heard, self._fillers - before)
        self._place_targets()

    def _wait_for_kernels(self, heard: Mapping[str, Mapping[str, float]], changes: int) -> None:
        name = "kubeproxy_sync_proxy_rules_endpoint_changes_total"
        for node in self._nodes:
            wanted = heard[node].get(name, 0) + changes

            def has_all(node: str = node, wanted: float = wanted) -> bool:
                now = self._metrics(node)
                return now.get(name, 0) >= wanted and is_synced(now)

            what = f"kube-proxy of {node} has not written {changes} more Services"
            self._eventually(has_all, what, SYNC_WITHIN_S + _SERVICE_WITHIN_S * changes)

    def _place_targets(self) -> None:
        positions = list(
            dict.fromkeys(
                case.position for case in self._benchmark.cases if case.position and case.path is not NetPath.NONE
            )
        )
        self._targets = dict.fromkeys(positions, self._fixed.get(NetPath.CLUSTER_IP, Target("")))
        if not positions or not self._fillers:
            return
        services, _ = self._lab.api.list("services", objects.NAMESPACE)
        addresses = {
            service["metadata"]["name"]: str(service["spec"]["clusterIP"])
            for service in services
            if service["metadata"]["name"].startswith("s-")
        }
        picked = objects.pick_positions(self._service_order(addresses), positions)
        server = self._fixed[NetPath.DIRECT].address
        for name in dict.fromkeys(picked.values()):
            number = int(name.removeprefix("s-"))
            self._lab.api.update(objects.filler_slice(number, [server], self._next_generation()))
        self._targets = {position: Target(addresses[name]) for position, name in picked.items()}
        for target in self._targets.values():
            self._wait_for_answer(NetPath.CLUSTER_IP, target)

    def _service_order(self, addresses: Mapping[str, str]) -> list[str]:
        """Return Services as packets of the client's node meet them; modes with maps and tables have no order: by name."""
        if self.mode not in ("iptables", "userspace"):
            return sorted(addresses)
        by_address = {address: name for name, address in addresses.items()}
        rules = self._run(self._client_node, ["iptables-save", "-t", "nat"])
        order = parse_service_order(rules, by_address)
        if len(order) != len(addresses):
            raise LabError(f"{self.mode}: {self._client_node} has rules for {len(order)} of {len(addresses)} Services")
        return order

    def _next_generation(self) -> int:
        self._generation += 1
        return self._generation

    # -- sampling --------------------------------------------------------------------------------------------------

    def sample(self, case: Case) -> dict[str, float]:
        """Measure once; return metrics of `summary.METRICS` by name.

        Raises:
            TestbedError: a program refused, or there was no answer.
        """
        match case.workload:
            case Workload.THROUGHPUT:
                return self._throughput(case)
            case Workload.CONNECTIONS:
                return self._connections(case)
            case Workload.LATENCY:
                return self._latency(case)
            case Workload.SYNC:
                return self._full_sync() if case.is_full else self._change()

    def offloads(self) -> dict[str, dict[str, bool]]:
        """Return place and interface -> offload -> on."""
        places = [POD, self._client_node] if self._fixed else [self._client_node]
        interface = self._lab.topology.node(self._client_node).interface
        return {
            f"{place} {name}": self._lab.call(place, read_offloads, name, timeout_s=_PROGRAM_WITHIN_S)
            for place, name in ((place, "eth0" if place == POD else interface) for place in places)
        }

    def _client_of(self, path: NetPath) -> str:
        return self._outside if path.is_from_outside else POD

    def _target(self, case: Case) -> Target:
        return self._targets[case.position] if case.position else self._fixed[case.path]

    def _throughput(self, case: Case) -> dict[str, float]:
        target = self._target(case)
        argv = ["iperf3", "-c", target.address, "-p", str(target.iperf_port), "-J"]
        argv += ["-t", str(int(self._benchmark.duration_s))]
        argv += ["-P", str(case.streams)] if case.streams else ["-u", "-b", f"{case.rate_mbit:g}M"]
        deadline = time.monotonic() + _BEGIN_WITHIN_S
        while True:
            with measured_cpu(self._server_pids(case.path, "iperf3")) as meter:
                text = self._run(self._client_of(case.path), argv, is_json=True)
            if not could_not_begin(text) or time.monotonic() > deadline:
                break
            time.sleep(_LOOK_EVERY_S)
        values = parse_iperf3_tcp(text) if case.streams else parse_iperf3_udp(text)
        size = values.pop("gb")
        return values | {f"{name}_gb": seconds / size for name, seconds in meter.seconds().items() if size}

    def _connections(self, case: Case) -> dict[str, float]:
        target = self._target(case)
        argv = ["wrk", "-t", "1", "-c", str(self._benchmark.clients), "-d", f"{int(self._benchmark.duration_s)}s"]
        argv += ["--latency"] + ([] if case.keep_alive else ["-H", "Connection: close"])
        argv += ["-H", f"Host: {target.host}"] if target.host else []
        argv.append(f"http://{target.address}:{target.http_port}/")
        self._forget_flows()
        with measured_cpu(self._server_pids(case.path, "http")) as meter:
            text = self._run(self._client_of(case.path), argv)
        values = parse_wrk(text)
        count = values.pop("count")
        return values | {name: seconds / count * 1e6 for name, seconds in meter.seconds().items()}

    def _latency(self, case: Case) -> dict[str, float]:
        self._forget_flows()
        duration_s = self._benchmark.duration_s
        timeout_s = duration_s + _PROGRAM_WITHIN_S
        where = self._client_of(case.path)
        # IPVS remembers a connection through a Service, one that was reset for ten seconds, and rewrites what its pod says to
        # that port of the client, asked directly or not: whoever goes without a Service has ports of its own.
        ports = OWN_PORTS if case.path.is_baseline else ()
        took = self._lab.call(where, first_answers, self._target(case), duration_s, ports, timeout_s=timeout_s)
        return {f"p{share}": quantile(took, share / 100) / 1000 for share in (10, 50, 99)}

    def _forget_flows(self) -> None:
        """Empty the nodes' conntrack tables: those of the sample before would fill them up, and new ones be dropped."""
        for node in self._nodes:
            self._run(node, ["conntrack", "-F"])

    def _server_pids(self, path: NetPath, container: str) -> list[int]:
        name = objects.NEAR if path in (NetPath.DIRECT_SAME_NODE, NetPath.CLUSTER_IP_SAME_NODE) else objects.FAR
        if (name, container) not in self._pids:
            target = self._lab.target(f"{objects.NAMESPACE}/{name}/{container}")
            try:
                self._pids[name, container] = pids_beside(target.pidfd)
            finally:
                target.close()
        return self._pids[name, container]

    def _run(self, where: str, argv: Sequence[str], *, is_json: bool = False) -> str:
        """Return what a program prints; one that prints JSON says there what went wrong."""
        timeout_s = self._benchmark.duration_s + _PROGRAM_WITHIN_S
        done = self._lab.run(where, argv, timeout_s=timeout_s)
        text = done.stdout.decode(errors="replace")
        if done.status == 124:
            raise KernelError(f"{where}: {argv[0]} did not end within {timeout_s:g} s")
        if done.status and not (is_json and text):
            reason = " ".join(done.stderr.decode(errors="replace").split())[-300:]
            raise KernelError(f"{where}: `{' '.join(argv)}` ended with status {done.status}: {reason}")
        return text

    # -- syncs -----------------------------------------------------------------------------------------------------

    def _metrics(self, node: str) -> dict[str, float]:
        """Return kube-proxy's metrics; none while it does not answer."""
        text = self._lab.call(node, fetch_metrics, timeout_s=_PROGRAM_WITHIN_S)
        return parse_metrics(text)

    def _change(self) -> dict[str, float]:
        """Change one endpoint, and see how long every node's kernel took."""
        before = {node: self._metrics(node) for node in self._nodes}
        number = self._fillers // 2
        generation = self._next_generation()
        changed = objects.filler_slice(
            number, objects.nobody(number, self._benchmark.endpoints, generation), generation
        )
        started = time.time()
        self._lab.api.update(changed)
        time.sleep(_QUIET_S)
        ended, own = [], []
        for node in self._nodes:
            was = before[node]

            def has_it(node: str = node, was: dict[str, float] = was) -> dict[str, float]:
                now = self._metrics(node)
                heard = now.get(_HEARD, 0) > was.get(_HEARD, 0)
                return now if heard and now.get(_LAST, 0) >= started and is_synced(now) else {}

            now = self._eventually(has_it, f"kube-proxy of {node} has not written a change", SYNC_WITHIN_S)
            ended.append(now[_LAST])
            syncs = now[f"{_TOOK}_count"] - was.get(f"{_TOOK}_count", 0)
            own.append((now[f"{_TOOK}_sum"] - was.get(f"{_TOOK}_sum", 0)) / syncs)
        return {"to_kernel": (max(ended) - started) * 1000, "own": max(own) * 1000}

    def _full_sync(self) -> dict[str, float]:
        """Delete the kube-proxy of a node, and see how long its successor takes: to start, and to write all rules."""
        pods, _ = self._lab.api.list("pods", "kube-system", label_selector="k8s-app=kube-proxy")
        mine = [pod["metadata"]["name"] for pod in pods if pod["spec"].get("nodeName") == self._client_node]
        started = time.time()
        for name in mine:
            with contextlib.suppress(ApiError):
                self._lab.api.delete("pods", "kube-system", name, grace_s=0)

        def has_synced() -> dict[str, float]:
            now = self._metrics(self._client_node)
            return now if now.get(_LAST, 0) > started and now.get(f"{_FULL}_count", 0) else {}

        what = f"the new kube-proxy of {self._client_node} has not synced"
        now = self._eventually(has_synced, what, SYNC_WITHIN_S)
        own = now[f"{_FULL}_sum"] / now[f"{_FULL}_count"]
        return {"to_kernel": (now[_LAST] - started) * 1000, "own": own * 1000}


_PREFIX = "kubeproxy_sync_"
_LAST = f"{_PREFIX}proxy_rules_last_timestamp_seconds"
_HEARD = f"{_PREFIX}proxy_rules_endpoint_changes_total"
_TOOK = f"{_PREFIX}proxy_rules_duration_seconds"
_FULL = f"{_PREFIX}full_proxy_rules_duration_seconds"


def is_synced(metrics: Mapping[str, Any]) -> bool:
    """Say whether nothing waits to be written; a kube-proxy that says nothing, or has written nothing yet, is not."""
    pending = sum(metrics.get(f"{_PREFIX}proxy_rules_{what}_changes_pending", 0) for what in ("service", "endpoint"))
    queued = metrics.get(f"{_PREFIX}proxy_rules_last_queued_timestamp_seconds", 0)
    last = metrics.get(_LAST, 0)
    return not pending and bool(last > 0 and last >= queued)
