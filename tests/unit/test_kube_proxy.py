"""kube-proxy's loop: when it syncs, what it writes, how it recovers; with an API and iptables that are stand-ins."""

from __future__ import annotations

import http.client
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from proxy_support import NODE, FakeIptables, endpoint, endpoint_slice, node_object, service

from testbed.dataplane.chains import service_suffix
from testbed.dataplane.flows import UdpFlow
from testbed.errors import ApiError, InputError, LabError, LockHeld
from testbed.kernel.iptables import Backend, Iptables
from testbed.model.proxyconfig import parse_proxy_config
from testbed.model.service import ServicePortName, parse_node
from testbed.programs.answers import Answer, Listener
from testbed.programs.kube_proxy import (
    NODES,
    SERVICES,
    SLICES,
    Changed,
    Listed,
    Pace,
    ProxyLoop,
    Stop,
    Watcher,
    parse_command,
    run,
    sync_once,
)
from testbed.programs.proxy_iptables import IptablesProxier
from testbed.programs.proxy_status import ProxyHealth, ProxyMetrics

SUFFIX = service_suffix(ServicePortName("ns", "web", "p80", "TCP"))
SVC, SLICE = service("web", "172.30.0.41"), endpoint_slice("web", endpoint("10.180.0.1"))


class FakeFlows:
    """Connection tracking that a test fills."""

    def __init__(self) -> None:
        self.there: list[UdpFlow] = []

    def list(self) -> Iterable[UdpFlow]:
        return list(self.there)

    def delete(self, flows: Iterable[UdpFlow]) -> int:
        gone = set(flows)
        before = len(self.there)
        self.there = [flow for flow in self.there if flow not in gone]
        return before - len(self.there)


class FakeLinks:
    """Links by name."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {"cni0": 4}

    def index(self, name: str) -> int:
        return self.names.get(name, 0)

    def name(self, index: int) -> str:
        return next((name for name, number in self.names.items() if number == index), "")


class Proxy:
    """A `ProxyLoop` over stand-ins, whose time the test sets."""

    def __init__(self, **config: Any) -> None:
        parsed, problems = parse_proxy_config({"clusterCIDR": "10.0.0.0/8", **config})
        assert not problems
        self.now_s = 1000.0
        self.iptables = FakeIptables()
        self.log: list[str] = []
        self.checks: list[Any] = []
        self.told: list[tuple[str, str, str, str]] = []
        self.flows = FakeFlows()
        self.links = FakeLinks()
        proxier = IptablesProxier(Iptables(self.iptables, Backend.LEGACY), clock=lambda: self.now_s)
        self.loop = ProxyLoop(
            parsed, NODE, proxier,
            health=ProxyHealth(60), metrics=ProxyMetrics(), flows=self.flows, links=self.links, log=self.log.append,
            tell=lambda obj, kind, reason, message: self.told.append((obj["kind"], obj["metadata"]["name"], reason, message)),
            local_addresses=lambda: [], on_health_checks=lambda checks, node: self.checks.append(checks),
            clock=lambda: self.now_s,
        )  # fmt: skip

    def accept(self, *messages: Any) -> None:
        for message in messages:
            self.loop.accept(message, self.now_s)
        self.loop.step(self.now_s)

    def start(self, services: list[Any] | None = None, slices: list[Any] | None = None) -> None:
        """Let everything be listed at once."""
        self.accept(
            Listed(SERVICES, tuple([SVC] if services is None else services)),
            Listed(SLICES, tuple([SLICE] if slices is None else slices)),
            Listed(NODES, (node_object(),)),
        )

    def sleep(self, seconds: float) -> None:
        """Let time pass as the process would: woken when the loop asked to be."""
        until = self.now_s + seconds
        while self.now_s < until:
            self.now_s = min(until, self.now_s + max(0.001, self.loop.wait_s(self.now_s)))
            self.loop.step(self.now_s)

    @property
    def syncs(self) -> int:
        return len(self.iptables.payloads)

    @property
    def nat(self) -> str:
        return "\n".join(rule for rules in self.iptables.tables["nat"].values() for rule in rules)


def test_nothing_is_written_before_everything_was_listed() -> None:
    """Half a picture would delete the other half's rules."""
    proxy = Proxy()
    proxy.accept(Listed(SERVICES, (SVC,)), Listed(NODES, (node_object(),)))
    proxy.sleep(10)
    assert proxy.syncs == 0
    proxy.accept(Listed(SLICES, (SLICE,)))
    assert proxy.syncs == 1
    assert "--to-destination 10.180.0.1:80" in proxy.nat
    assert proxy.loop.has_synced


def test_a_change_is_synced_and_only_what_changed_is_written() -> None:
    """The second sync is partial, in one process, and removes the chains of the endpoint that left."""
    other = service("other", "172.30.0.42"), endpoint_slice("other", endpoint("10.180.0.9"))
    proxy = Proxy()
    proxy.start([SVC, other[0]], [SLICE, other[1]])
    calls = len(proxy.iptables.calls)
    proxy.accept(Changed(SLICES, False, endpoint_slice("web", endpoint("10.180.0.2"))))
    assert len(proxy.iptables.calls) == calls + 1
    assert "10.180.0.9" not in proxy.iptables.payloads[-1]
    assert "10.180.0.2:80" in proxy.nat and "10.180.0.9:80" in proxy.nat and "10.180.0.1" not in proxy.nat
    assert sum(chain.startswith("KUBE-SEP-") for chain in proxy.iptables.tables["nat"]) == 2


def test_removing_everything_leaves_no_service_chain() -> None:
    """After the last Service went, only the fixed chains are there."""
    proxy = Proxy()
    proxy.start()
    proxy.accept(Changed(SLICES, True, SLICE))
    proxy.sleep(1)
    assert "has no endpoints" in "".join(proxy.iptables.tables["filter"]["KUBE-SERVICES"])
    proxy.accept(Changed(SERVICES, True, SVC))
    proxy.sleep(1)
    assert [chain for chain in proxy.iptables.tables["nat"] if chain.startswith(("KUBE-SVC-", "KUBE-SEP-"))] == []
    assert proxy.iptables.tables["filter"]["KUBE-SERVICES"] == []


def test_changes_are_taken_together_at_the_pace() -> None:
    """Two syncs may follow each other at once; then there is one per minSyncPeriod, however many changes come."""
    proxy = Proxy(iptables={"minSyncPeriod": "1s"})
    proxy.start()
    for n in range(2, 12):
        proxy.accept(Changed(SLICES, False, endpoint_slice("web", endpoint(f"10.180.0.{n}"))))
    assert proxy.syncs == 2
    assert "10.180.0.11:80" not in proxy.nat
    proxy.sleep(1.1)
    assert proxy.syncs == 3
    assert "10.180.0.11:80" in proxy.nat


def test_no_pace() -> None:
    """minSyncPeriod 0 syncs every change at once."""
    proxy = Proxy(iptables={"minSyncPeriod": "0s"})
    proxy.start()
    for n in range(2, 7):
        proxy.accept(Changed(SLICES, False, endpoint_slice("web", endpoint(f"10.180.0.{n}"))))
    assert proxy.syncs == 6


def test_the_same_object_again_writes_nothing() -> None:
    """A list repeated after an outage changes nothing."""
    proxy = Proxy()
    proxy.start()
    proxy.sleep(5)
    proxy.start()
    proxy.sleep(5)
    assert proxy.syncs == 1


def test_a_failed_sync_is_repeated_in_full() -> None:
    """After a failure the next sync, syncPeriod later, reads what is there and writes all that is missing."""
    proxy = Proxy()
    proxy.start()
    proxy.iptables.failing = LockHeld("iptables-legacy-restore waited 5 s for the xtables lock")
    proxy.accept(Changed(SLICES, False, endpoint_slice("web", endpoint("10.180.0.2"))))
    assert proxy.syncs == 1
    assert "sync failed, next try in 30 s" in proxy.log[-1] and "xtables lock" in proxy.log[-1]
    assert proxy.loop.metrics.value("sync_proxy_rules_iptables_restore_failures_total") == 1
    proxy.iptables.failing = None
    proxy.sleep(31)
    assert proxy.syncs == 2
    assert ["iptables-legacy-save"] in proxy.iptables.calls[-3:]
    assert "10.180.0.2:80" in proxy.nat


def test_a_change_after_a_failure_is_not_kept_waiting() -> None:
    """A new change is tried at the pace, not after syncPeriod, and brings what failed before with it."""
    proxy = Proxy()
    proxy.start()
    proxy.iptables.failing = LockHeld("lock")
    proxy.accept(Changed(SERVICES, False, service("two", "172.30.0.42")))
    proxy.iptables.failing = None
    proxy.accept(Changed(SERVICES, False, service("three", "172.30.0.43")))
    proxy.sleep(1.1)
    rejects = "".join(proxy.iptables.tables["filter"]["KUBE-SERVICES"])
    assert "ns/two:p80" in rejects and "ns/three:p80" in rejects


def test_health_fails_when_changes_wait_too_long() -> None:
    """With syncs failing, /healthz turns to 503 after its timeout, and back once one succeeds."""
    proxy = Proxy()
    proxy.start()
    health = proxy.loop.health
    proxy.iptables.failing = LockHeld("lock")
    proxy.accept(Changed(SERVICES, False, service("two", "172.30.0.42")))
    assert health.healthz(proxy.now_s)[0] == 200
    assert health.healthz(proxy.now_s + 61)[0] == 503
    proxy.iptables.failing = None
    proxy.sleep(31)
    assert health.healthz(proxy.now_s + 61)[0] == 200


@pytest.mark.parametrize("damage", ["flush", "delete chains", "flush one chain"])
def test_an_outside_flush_is_repaired_within_the_sync_period(damage: str) -> None:
    """Whatever of ours somebody takes away is back after syncPeriod, and said so."""
    proxy = Proxy()
    proxy.start()
    wanted = {
        table: {chain: list(rules) for chain, rules in chains.items()}
        for table, chains in proxy.iptables.tables.items()
    }
    nat = proxy.iptables.tables["nat"]
    if damage == "flush":
        for rules in nat.values():
            rules.clear()
    elif damage == "delete chains":
        for chain in [chain for chain in nat if chain.startswith("KUBE-")]:
            del nat[chain]
        nat["OUTPUT"].clear()
    else:
        nat["KUBE-NODEPORTS"].append("-j RETURN")
    proxy.sleep(31)
    assert "somebody else changed our rules" in proxy.log[-1]
    assert proxy.iptables.tables == wanted


def test_node_labels_cause_a_full_sync() -> None:
    """A node that moves to another zone reads everything, and writes what differs; a status update alone does nothing."""
    proxy = Proxy()
    proxy.start()
    proxy.accept(Changed(NODES, False, {**node_object(), "status": {**node_object()["status"], "phase": "x"}}))
    calls = len(proxy.iptables.calls)
    proxy.accept(Changed(NODES, False, node_object(topology__kubernetes_io="zone-a")))
    assert proxy.iptables.calls[calls:] == [["iptables-legacy-save"]]


def test_a_node_that_is_going_is_not_eligible() -> None:
    """/healthz refuses for a node with the autoscaler's taint; /livez does not care."""
    proxy = Proxy()
    proxy.start()
    node = node_object()
    node["spec"]["taints"] = [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]
    proxy.accept(Changed(NODES, False, node))
    status, body = proxy.loop.health.healthz(proxy.now_s)
    assert status == 503 and body.endswith('"nodeEligible": false}')
    assert proxy.loop.health.livez(proxy.now_s)[0] == 200


def test_udp_flows_are_reconciled_after_the_rules_are_in() -> None:
    """A flow to a UDP Service that something else than an endpoint answers is forgotten; others are not looked at."""
    proxy = Proxy()
    proxy.start([service("dns", "172.30.0.10", protocol="UDP", port=53)], [])
    lost = flow("172.30.0.10:53", "172.30.0.10:53")  # sent before there was an endpoint
    kept = [
        flow("172.30.0.10:53", "10.180.0.1:53"),
        flow("172.30.0.10:54", "1.1.1.1:54"),
        flow("8.8.8.8:53", "8.8.8.8:53"),
    ]
    proxy.flows.there = [lost, *kept]
    proxy.accept(Changed(SLICES, False, endpoint_slice("dns", endpoint("10.180.0.1"), protocol="UDP", port=53)))
    assert proxy.flows.there == kept
    assert proxy.loop.metrics.value("conntrack_reconciler_deleted_entries_total") == 1
    proxy.accept(Changed(SERVICES, True, service("dns", "172.30.0.10", protocol="UDP", port=53)))
    proxy.sleep(1)
    assert proxy.flows.there == kept[1:]
    assert proxy.log == []


def flow(destination: str, answered_by: str) -> UdpFlow:
    ends = [end.split(":") for end in ("10.180.7.7:5000", destination, answered_by)]
    (a, b), (c, d), (e, f) = ((IPv4Address(address), int(port)) for address, port in ends)
    return UdpFlow(a, b, c, d, e, f)


def test_health_check_ports_are_told() -> None:
    """After each sync the health-check node ports are known, with their counts."""
    obj = service("web", "172.30.0.41", ingress=["1.2.3.4"], externalTrafficPolicy="Local", healthCheckNodePort=31000)
    proxy = Proxy()
    proxy.start([obj])
    [check] = proxy.checks[-1]
    assert (check.port, check.local_endpoints) == (31000, 1)


def test_there_is_a_full_sync_every_hour() -> None:
    """A full sync happens at least hourly without any change."""
    proxy = Proxy()
    proxy.start()
    proxy.sleep(3600.5)
    assert proxy.loop.metrics.samples("sync_full_proxy_rules_duration_seconds") == 2


def test_pace_allows_a_burst_of_two() -> None:
    """The bucket holds two syncs, and never more, however long nothing happened."""
    pace = Pace(2.0)
    assert pace.wait_s(1000.0) == 0
    pace.take(1000.0)
    assert pace.wait_s(1000.0) == 0
    pace.take(1000.0)
    assert pace.wait_s(1000.0) == pytest.approx(2.0)
    assert pace.wait_s(1001.5) == pytest.approx(0.5)


class FakeApi:
    """A list and a script of watches: each entry is an error to raise, or the events of one watch."""

    def __init__(self, items: list[Any], *script: Any) -> None:
        self.items = items
        self.script = list(script)
        self.asked: list[tuple[str, str]] = []

    def list(self, resource: str, namespace: str | None = None, **selectors: str) -> tuple[list[Any], str]:
        self.asked.append(("list", ""))
        if self.script and isinstance(self.script[0], LabError):
            raise self.script.pop(0)
        return self.items, "10"

    def watch(
        self, resource: str, namespace: str | None = None, *, resource_version: str = "", bookmarks: bool, **rest: Any
    ) -> Iterator[Any]:
        assert bookmarks, "else a quiet resource is listed again whenever the history of the others has moved on"
        self.asked.append(("watch", resource_version))
        step = self.script.pop(0) if self.script else []
        if isinstance(step, Exception):
            raise step
        yield from step


def event(kind: str, version: str) -> tuple[str, Any]:
    obj = service("web", "172.30.0.41")
    obj["metadata"]["resourceVersion"] = version
    return kind, obj


@pytest.fixture
def watched() -> Callable[..., tuple[FakeApi, Watcher, list[Any], list[float]]]:
    """A watcher over a `FakeApi`, what it emitted, and how long it slept each time."""

    def make(*script: Any) -> tuple[FakeApi, Watcher, list[Any], list[float]]:
        api, emitted, slept = FakeApi([], *script), [], []
        watcher = Watcher(api, SERVICES, emitted.append, lambda line: None, sleep=slept.append)
        return api, watcher, emitted, slept

    return make


def test_a_watch_goes_on_where_the_last_one_ended(watched: Any) -> None:
    """Bookmarks move the place too, and are not passed on."""
    api, watcher, emitted, _ = watched([event("ADDED", "11"), event("BOOKMARK", "15")], [event("DELETED", "16")])
    watcher.run_once()
    watcher.run_once()
    assert api.asked == [("list", ""), ("watch", "10"), ("watch", "15")]
    assert [(type(m).__name__, getattr(m, "deleted", None)) for m in emitted] == [
        ("Listed", None), ("Changed", False), ("Changed", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "gone", [ApiError(410, "Expired", "too old"), [("ERROR", {"code": 410})]], ids=["refused", "in the stream"]
)
def test_a_forgotten_place_means_a_new_list(watched: Any, gone: Any) -> None:
    """410 leads to a list at once."""
    api, watcher, _, slept = watched(gone)
    watcher.run_once()
    watcher.run_once()
    assert [verb for verb, _ in api.asked] == ["list", "watch", "list", "watch"]
    assert slept == [0.05]  # after the second watch, which ended at once


def test_an_api_that_is_away_is_asked_less_and_less_often(watched: Any) -> None:
    """Waits double up to five seconds, and start again from the first once something is answered."""
    api, watcher, _, slept = watched(*[LabError("no answer")] * 9, [event("ADDED", "11")], LabError("no answer"))
    for _ in range(11):
        watcher.run_once()
    assert slept == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 0.05]
    assert api.script == []


def test_run_ends_on_stop_and_reports_the_first_sync() -> None:
    """Messages that wait are taken in together for one sync; that is announced once; Stop ends the loop."""
    proxy = Proxy()
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for message in (Listed(SERVICES, (SVC,)), Listed(SLICES, (SLICE,)), Listed(NODES, (node_object(),))):
        messages.put(message)

    class StopAfterSync(FakeIptables):
        def run(self, argv: Any, **options: Any) -> str:
            if argv[0].endswith("restore"):
                messages.put(Stop())
            return super().run(argv, **options)

    iptables = StopAfterSync()
    proxy.loop._proxier = IptablesProxier(Iptables(iptables, Backend.LEGACY))
    announced: list[int] = []
    run(proxy.loop, messages, lambda: announced.append(len(iptables.payloads)))
    assert len(iptables.payloads) == 1
    assert announced == [1]


def test_sync_once_programs_a_namespace() -> None:
    """One call, no loop: the rules for these objects, as the given node."""
    iptables = FakeIptables()
    config, _ = parse_proxy_config({})
    report = sync_once(config, parse_node(node_object()), [SVC], [SLICE], runner=iptables)
    assert report.full
    assert "10.180.0.1:80" in report.payload.text
    assert len(iptables.payloads) == 1


def test_listener_answers_and_ends() -> None:
    """An answer arrives whole; after close the port is free for the next."""
    listener = Listener("127.0.0.1", 0, lambda path: Answer(503, f"saw {path}", headers={"X-Test": "1"}))
    connection = http.client.HTTPConnection("127.0.0.1", listener.port, timeout=5)
    connection.request("GET", "/healthz?verbose")
    response = connection.getresponse()
    assert (response.status, response.read(), response.headers["X-Test"]) == (503, b"saw /healthz", "1")
    connection.close()
    listener.close()
    Listener("127.0.0.1", listener.port, lambda path: Answer(200, "")).close()


def test_metrics_text() -> None:
    """The exposition format has upstream's names, labels, and cumulative buckets."""
    metrics = ProxyMetrics()
    metrics.observe("sync_proxy_rules_duration_seconds", 0.003)
    metrics.count("proxy_healthz_total", code="200")
    metrics.set("sync_proxy_rules_iptables_total", 7, table="nat")
    text = metrics.render()
    assert 'kubeproxy_sync_proxy_rules_duration_seconds_bucket{le="0.002"} 0\n' in text
    assert 'kubeproxy_sync_proxy_rules_duration_seconds_bucket{le="0.004"} 1\n' in text
    assert 'kubeproxy_proxy_healthz_total{code="200"} 1\n' in text
    assert 'kubeproxy_sync_proxy_rules_iptables_total{table="nat"} 7\n' in text


ENV = {"NODE_NAME": "n0", "TESTBED_API_SOCKET": "/api.sock", "XTABLES_LOCKFILE": "/run/xtables.lock"}


def test_command_line() -> None:
    """A kubeadm-like command becomes the arguments of main; flags beside --config do not count."""
    argv = ["/usr/local/bin/kube-proxy", "--config=/c", "--hostname-override", "N1", "--proxy-mode=ipvs", "-v=2"]
    args = parse_command(argv, ENV, lambda path: {"mode": "iptables", "read": path})
    assert args["config"] == {"mode": "iptables", "read": "/c"}
    assert (args["node_name"], args["api_socket"], args["lock_file"]) == ("n1", "/api.sock", "/run/xtables.lock")
    assert parse_command(["kube-proxy", "--cleanup"], {}, lambda path: {})["cleanup"] is True


def test_flags_are_fields_of_the_configuration() -> None:
    """Upstream's old flags, of every kind of value, are read as the fields they stand for; all of them are known."""
    words = (
        "--proxy-mode iptables --masquerade-all --iptables-localhost-nodeports=false --iptables-masquerade-bit 5 "
        "--nodeport-addresses=primary,10.0.0.0/8 --feature-gates=ServiceTrafficDistribution=true --iptables-sync-period=9s "
        "--conntrack-tcp-be-liberal --pod-bridge-interface cni0"
    )
    config = parse_command(["kube-proxy", *words.split()], ENV, lambda path: {})["config"]
    assert config == {
        "mode": "iptables",
        "iptables": {"masqueradeAll": True, "localhostNodePorts": False, "masqueradeBit": 5, "syncPeriod": "9s"},
        "nodePortAddresses": ["primary", "10.0.0.0/8"],
        "featureGates": {"ServiceTrafficDistribution": True},
        "conntrack": {"tcpBeLiberal": True},
        "detectLocal": {"bridgeInterface": "cni0"},
    }
    assert parse_proxy_config(config)[1] == ()


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        ("", {}, "kube-proxy does not know its node: set --hostname-override or NODE_NAME"),
        ("", {"NODE_NAME": "n"}, "kube-proxy does not know where the API is: set TESTBED_API_SOCKET to its socket"),
        ("--proxy-mod ipvs", ENV, "kube-proxy: unknown flag: --proxy-mod"),
        ("--proxy-mode", ENV, "kube-proxy: flag needs an argument: --proxy-mode"),
        ("ipvs", ENV, "kube-proxy takes no argument 'ipvs', only flags"),
        (
            "--masquerade-all=maybe", ENV,
            "kube-proxy: invalid argument 'maybe' for --masquerade-all: must be true or false",
        ),
        (
            "--iptables-masquerade-bit=x", ENV,
            "kube-proxy: invalid argument 'x' for --iptables-masquerade-bit: must be a whole number",
        ),
    ],
)  # fmt: skip
def test_wrong_command_lines(words: str, env: dict[str, str], message: str) -> None:
    """Each mistake has its sentence."""
    with pytest.raises(InputError) as refusal:
        parse_command(["kube-proxy", *words.split()], env, lambda path: {})
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "kube-proxy cannot read --config {}: No such file or directory"),
        ("mode: [", "kube-proxy cannot read --config {}: while parsing a flow node"),
        ("- mode", "kube-proxy cannot read --config {}: it holds no mapping, but list"),
        ("mode: ebpf", "its configuration is wrong: mode: Invalid value: 'ebpf'"),
        ("mode: iptables", "there is no API at /api.sock (TESTBED_API_SOCKET)"),
    ],
)
def test_bad_starts_are_one_line(text: str | None, message: str, tmp_path: Path) -> None:
    """As a container starts it: a status other than 0 and a line that names the fault, never a traceback."""
    config = tmp_path / "config.conf"
    if text is not None:
        config.write_text(text)
    program = (
        "import sys; from testbed.programs.builtins import run_builtin; "
        "sys.exit(run_builtin('kube-proxy', {'argv': sys.argv[1:]}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "kube-proxy", f"--config={config}"],
        env={**os.environ, **ENV}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode in (2, 3)
    assert message.format(config) in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_refused_rule_takes_out_its_service_only() -> None:
    """The Service is named in an event and in /healthz, others are programmed, and it is tried again after syncPeriod."""
    proxy = Proxy()
    proxy.start()
    proxy.iptables.refused = "ns/bad:p80 "
    proxy.accept(
        Changed(SERVICES, False, service("bad", "172.30.0.66")),
        Changed(SERVICES, False, service("good", "172.30.0.42")),
    )
    rejects = "".join(proxy.iptables.tables["filter"]["KUBE-SERVICES"])
    assert "ns/good:p80" in rejects and "ns/bad:p80" not in rejects
    assert [(kind, name, reason) for kind, name, reason, _ in proxy.told] == [("Service", "bad", "ProxyRulesRefused")]
    assert "No chain/target/match by that name" in proxy.told[0][3]
    proxy.sleep(62)
    status, body = proxy.loop.health.healthz(proxy.now_s)
    assert status == 503 and json.loads(body)["refused"] == ["ns/bad:p80"]
    assert len(proxy.told) == 1
    proxy.iptables.refused = ""
    proxy.sleep(31)
    assert "ns/bad:p80" in "".join(proxy.iptables.tables["filter"]["KUBE-SERVICES"])
    status, body = proxy.loop.health.healthz(proxy.now_s)
    assert status == 200 and "refused" not in body


def test_a_refused_rule_at_the_start() -> None:
    """The first sync programs all other Services too, and is enough to be announced."""
    proxy = Proxy()
    proxy.iptables.refused = "ns/bad:p80 "
    proxy.start([service(f"s{n}", f"172.30.1.{n}") for n in range(1, 10)] + [service("bad", "172.30.0.66")], [])
    assert proxy.loop.has_synced
    assert len(proxy.iptables.tables["filter"]["KUBE-SERVICES"]) == 9
    assert [told[1] for told in proxy.told] == ["bad"]


def test_damage_is_an_event_on_the_node() -> None:
    """Who looks at the node sees that somebody changed the rules, and what."""
    proxy = Proxy()
    proxy.start()
    del proxy.iptables.tables["nat"]["KUBE-POSTROUTING"]
    proxy.sleep(31)
    assert "KUBE-POSTROUTING" in proxy.iptables.tables["nat"]
    [(kind, name, reason, message)] = proxy.told
    assert (kind, name, reason) == ("Node", NODE, "ProxyRulesChanged")
    assert "1 chains are gone, for example KUBE-POSTROUTING" in message


def test_a_renamed_bridge_is_followed() -> None:
    """Rules that tell pods by the bridge take its new name within syncPeriod, and the old one when it is back."""
    proxy = Proxy(detectLocalMode="BridgeInterface", detectLocal={"bridgeInterface": "cni0"})
    proxy.start()
    assert "! -i cni0 -j KUBE-MARK-MASQ" in proxy.nat
    proxy.links.names = {"br9": 4}
    proxy.sleep(31)
    assert "! -i br9 -j KUBE-MARK-MASQ" in proxy.nat and "cni0" not in proxy.nat
    assert proxy.told[-1][2:] == (
        "BridgeRenamed",
        "the bridge cni0 is called br9 now: rules that tell pods by it say br9",
    )
    proxy.links.names = {"cni0": 4}
    proxy.sleep(31)
    assert "! -i cni0 -j KUBE-MARK-MASQ" in proxy.nat and "br9" not in proxy.nat


def test_how_long_programming_took_is_measured_from_the_slices_annotation() -> None:
    """network_programming_duration_seconds runs from the trigger time to the rules."""
    proxy = Proxy()
    proxy.start()
    changed = endpoint_slice("web", endpoint("10.180.0.2"))
    changed["metadata"]["annotations"] = {"endpoints.kubernetes.io/last-change-trigger-time": "1970-01-01T00:16:38Z"}
    proxy.accept(Changed(SLICES, False, changed))
    text = proxy.loop.metrics.render()
    assert 'kubeproxy_network_programming_duration_seconds_bucket{le="1"} 0' in text
    assert 'kubeproxy_network_programming_duration_seconds_bucket{le="2"} 1' in text
    assert 'kubeproxy_sync_proxy_rules_iptables_last{table="nat"} 4' in text
    assert "kubeproxy_sync_proxy_rules_endpoint_changes_total 1" in text


def test_in_a_large_cluster_unused_chains_go_once_per_sync_period() -> None:
    """Above 1000 endpoints the chain of an endpoint that left stays until a change after syncPeriod."""
    names = [f"10.181.{n // 250}.{n % 250 + 1}" for n in range(1002)]
    proxy = Proxy()
    proxy.start([SVC], [endpoint_slice("web", *map(endpoint, names))])

    def chains() -> int:
        return sum(chain.startswith("KUBE-SEP-") for chain in proxy.iptables.tables["nat"])

    proxy.accept(Changed(SLICES, False, endpoint_slice("web", *map(endpoint, names[:1001]))))
    assert "10.181.4.2:80" not in "".join(proxy.iptables.tables["nat"][f"KUBE-SVC-{SUFFIX}"])
    assert chains() == 1002
    proxy.sleep(31)
    proxy.accept(Changed(SLICES, False, endpoint_slice("web", *map(endpoint, names[:1001]), endpoint("10.182.0.1"))))
    assert chains() == 1002
    assert proxy.log == []
    proxy.accept(Changed(SLICES, False, endpoint_slice("web", *map(endpoint, names[:10]))))
    proxy.sleep(2)
    assert chains() == 10  # small again: at once
