"""The ingress controller's loop with an nginx that holds state and refuses like the real one."""

# ruff: noqa: E501

from __future__ import annotations

import threading
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
from ingress_objects import CLASS, OPTIONS, Object, config_map, ingress, key_pair, service, slices, tls_secret

from testbed.errors import ApiError
from testbed.programs.ingress.controller import RESOURCES, IngressLoop, ingress_at
from testbed.programs.ingress.metrics import RequestMetrics, last_number, nginx_metrics
from testbed.programs.ingress.nginx_process import ConfigRefused, Ended, parse_stub_status, refusal
from testbed.programs.ingress.status import StatusPublisher
from testbed.programs.kube_proxy import Changed, Listed
from testbed.programs.proxy_status import ProxyMetrics

ROOT = [("/", "Prefix", "a")]
KEYS = {
    "Ingress": RESOURCES[0],
    "IngressClass": RESOURCES[1],
    "Service": RESOURCES[2],
    "EndpointSlice": RESOURCES[3],
    "Secret": RESOURCES[4],
    "ConfigMap": RESOURCES[5],
}


class FakeNginx:
    """Serves what it was given last; refuses a text that holds ``bad``, at its line."""

    def __init__(self, bad: str = "") -> None:
        self.bad = bad
        self.pid, self.generation, self.is_alive = 0, 0, False
        self.text = ""
        self.did: list[str] = []
        self.files: dict[str, bytes] = {}

    def write_files(self, files: Mapping[str, bytes]) -> None:
        self.files.update(files)

    def forget_files(self, kept: Mapping[str, bytes]) -> None:
        self.files = {path: content for path, content in self.files.items() if path in kept}

    def test(self, text: str) -> None:
        self.did.append("test")
        if self.bad and self.bad in text:
            line = text[: text.index(self.bad)].count("\n") + 1
            raise ConfigRefused(f"bad in /etc/nginx/nginx.conf:{line}", line)

    def start(self, text: str) -> None:
        self.did.append("start")
        self.pid, self.is_alive, self.text = self.pid + 1, True, text
        self.generation += 1

    def reload(self, text: str) -> None:
        assert self.is_alive
        self.did.append("reload")
        self.text = text
        self.generation += 1

    def end_orphans(self) -> None:
        self.did.append("end orphans")


class Run:
    """A loop with its clock in hand."""

    def __init__(self, *objects: Object, bad: str = "") -> None:
        self.nginx = FakeNginx(bad)
        self.lines: list[str] = []
        self.told: list[tuple[str, str]] = []
        self.now = 100.0
        self.metrics = ProxyMetrics("x_")
        self.loop = IngressLoop(
            OPTIONS, self.nginx, self.metrics, default_certificate=b"PEM", log=self.lines.append, clock=lambda: self.now,
            tell=lambda obj, kind, reason, message: self.told.append((obj["metadata"]["name"], reason)),
            pod={"metadata": {"name": "controller", "namespace": "ingress-nginx"}},
        )  # fmt: skip
        every = [CLASS, *objects]
        self.loop.accept(Listed(key, tuple(one for one in every if KEYS[one["kind"]] == key)) for key in RESOURCES)
        self.pass_time()

    def pass_time(self, seconds: float = 1.0) -> None:
        self.now += seconds
        self.loop.step()

    def change(self, obj: Object, *, deleted: bool = False) -> None:
        self.loop.accept([Changed(KEYS[obj["kind"]], deleted, obj)])
        self.pass_time()


A = [service("a"), slices("a", "10.0.0.1", "10.0.0.2")]


def test_nginx_starts_when_everything_was_listed_once() -> None:
    """Not before, and with all of it."""
    run = Run(*A, ingress("x", {"a.com": ROOT}))
    assert run.nginx.did == ["test", "start"] and run.loop.has_synced
    assert 'server_name "a.com"' in run.nginx.text and run.nginx.files
    fresh = IngressLoop(OPTIONS, FakeNginx(), ProxyMetrics("x_"), default_certificate=b"PEM", clock=lambda: 5.0)
    fresh.accept([Listed(RESOURCES[0], ())])
    fresh.step()
    assert not fresh.has_synced


def test_endpoints_are_reloaded_without_a_test_and_counted_apart() -> None:
    """nginx -t is for text of users; pods that come and go change none of it."""
    run = Run(*A, ingress("x", {"a.com": ROOT}))
    run.change(slices("a", "10.0.0.3"))
    assert run.nginx.did[2:] == ["reload"] and "server 10.0.0.3:8080" in run.nginx.text
    assert run.metrics.value("endpoint_updates") == 1 and run.metrics.value("success") == 0
    run.change(ingress("y", {"b.com": ROOT}))
    assert run.nginx.did[3:] == ["test", "reload"] and run.metrics.value("success") == 1
    assert ("controller", "RELOAD") in run.told and ("y", "Sync") in run.told
    run.change(slices("a"))  # nobody is left: another kind of location, but no new text of a user
    assert "return 503;" in run.nginx.text
    run.change(slices("a", "10.0.0.4"))  # back: now the annotations' directives return with it
    assert run.nginx.did[-2:] == ["test", "reload"]


def test_what_changes_nothing_reloads_nothing() -> None:
    """Status, labels, other people's objects."""
    run = Run(*A, ingress("x", {"a.com": ROOT}))
    did = list(run.nginx.did)
    run.change({**ingress("x", {"a.com": ROOT}), "status": {"loadBalancer": {}}})
    run.change(ingress("other", {"o.com": ROOT}, ingress_class="traefik"))
    run.change(config_map("unrelated", {"a": "b"}))
    run.change(slices("unrelated", "10.9.9.9"))
    assert run.nginx.did == did


def test_ingresses_that_lead_nowhere_are_told() -> None:
    """By a gauge of 0 and 1 for each Ingress, as upstream; one that is gone is told no more."""
    run = Run(*A, service("idle"), ingress("x", {"a.com": ROOT}), ingress("y", {"b.com": [("/", "Prefix", "idle")]}))

    def orphaned(name: str, kind: str) -> float:
        return run.metrics.value("orphan_ingress", namespace="dev", ingress=name, type=kind)

    assert (orphaned("x", "no-service"), orphaned("x", "no-endpoint")) == (0, 0)
    assert (orphaned("y", "no-service"), orphaned("y", "no-endpoint")) == (0, 1)
    run.change(slices("idle", "10.0.0.7"))
    assert orphaned("y", "no-endpoint") == 0
    run.change(service("a"), deleted=True)
    assert (orphaned("x", "no-service"), orphaned("x", "no-endpoint")) == (1, 0)
    run.change(ingress("x", {"a.com": ROOT}), deleted=True)
    assert 'ingress="x"' not in run.metrics.render() and 'ingress="y"' in run.metrics.render()


def test_the_end_of_certificates_is_told() -> None:
    """For each host with a Secret of its own: the seconds since 1970, under upstream's labels."""
    from cryptography import x509

    tls = [{"hosts": ["a.com"], "secretName": "tls"}]
    run = Run(*A, tls_secret("tls", "a.com"), ingress("x", {"a.com": ROOT, "b.com": ROOT}, tls=tls))
    labels = {"namespace": "ingress-nginx", "class": "k8s.io/ingress-nginx", "secret_name": "tls"}
    end = x509.load_pem_x509_certificate(key_pair("a.com")[1]).not_valid_after_utc.timestamp()
    assert run.metrics.value("ssl_expire_time_seconds", host="a.com", **labels) == end
    run.change(tls_secret("tls", "a.com"), deleted=True)
    assert 'host="a.com"' not in run.metrics.render()


def test_changes_that_come_together_are_applied_together() -> None:
    """Of endpoints the first one waits for nothing; those that follow wait for quiet, but not for ever."""
    run = Run(*A, ingress("x", {"a.com": ROOT}))
    run.now += 1.0
    begin = run.now
    reloads = []
    for count in range(1, 31):
        run.loop.accept([Changed(RESOURCES[3], False, slices("a", f"10.0.1.{count}"))])
        run.pass_time(0.02)
        if run.nginx.did.count("reload") > len(reloads):
            reloads.append(round(run.now - begin, 2))
    assert reloads[0] == 0.02
    assert all(0.15 < later - sooner < 0.3 for sooner, later in pairwise(reloads)) and len(reloads) > 1, reloads


def test_a_change_of_more_than_endpoints_waits_for_what_belongs_to_it() -> None:
    """An Ingress and its Service and endpoints, applied one after the other, are one reload."""
    run = Run(*A, ingress("x", {"a.com": ROOT}))
    for obj in (ingress("y", {"b.com": [("/", "Prefix", "b")]}), service("b"), slices("b", "10.0.2.1")):
        run.loop.accept([Changed(KEYS[obj["kind"]], False, obj)])
        run.pass_time(0.02)
        assert "reload" not in run.nginx.did
    run.pass_time(0.03)
    assert run.nginx.did.count("reload") == 1 and "server 10.0.2.1:8080" in run.nginx.text


def test_a_refused_configuration_is_named_and_the_old_one_stays() -> None:
    """The log and an event name the Ingress; the same text is not tried again; what repairs it is."""
    run = Run(*A, ingress("x", {"a.com": ROOT}), bad="broken.com")
    old = run.nginx.text
    bad = ingress("bad", {"a.com": [("/broken.com", "Prefix", "a")]})
    run.change(bad)
    assert run.nginx.text == old and ("bad", "Rejected") in run.told
    assert any("ingress dev/bad" in line and "the last good configuration stays" in line for line in run.lines), (
        run.lines
    )
    tests = run.nginx.did.count("test")
    run.change(config_map("unrelated", {"a": "b"}))
    assert run.nginx.did.count("test") == tests
    assert run.metrics.value("config_last_reload_successful") == 0 and run.metrics.value("errors") == 1
    run.change(bad, deleted=True)
    run.change(ingress("good", {"good.com": ROOT}))
    assert 'server_name "good.com"' in run.nginx.text and run.metrics.value("config_last_reload_successful") == 1


def test_a_start_leaves_out_what_nginx_refuses() -> None:
    """With nothing older to keep, the others are served without it."""
    run = Run(
        *A, ingress("bad", {"a.com": [("/broken.com", "Prefix", "a")]}), ingress("x", {"b.com": ROOT}), bad="broken.com"
    )
    assert run.loop.has_synced and 'server_name "b.com"' in run.nginx.text and "broken.com" not in run.nginx.text
    assert "starting without ingress dev/bad" in run.lines


def test_a_killed_nginx_is_started_again() -> None:
    """Its orphans are ended first, because they hold the ports."""
    run = Run(*A, ingress("x", {"a.com": ROOT}))
    run.nginx.is_alive = False
    run.now += 10
    run.loop.accept([Ended(run.nginx.pid, -9)])
    run.loop.step()
    assert run.nginx.did[2:] == ["end orphans", "test", "start"] and run.nginx.is_alive
    run.loop.accept([Ended(1, 0)])  # of an earlier one: nothing to do
    assert run.nginx.did[2:] == ["end orphans", "test", "start"]


def test_the_ingress_of_a_line() -> None:
    """A line of a location leads to its Ingress; other lines to none."""
    run = Run(*A, ingress("x", {"a.com": [("/p", "Exact", "a")]}))
    lines = run.nginx.text.split("\n")
    at = next(number for number, line in enumerate(lines, 1) if 'location = "/p"' in line)
    assert str(ingress_at(run.nginx.text, at)) == str(ingress_at(run.nginx.text, at + 7)) == "dev/x"
    assert ingress_at(run.nginx.text, 1) is None and ingress_at(run.nginx.text, 10**6) is None


def test_what_nginx_says_is_read() -> None:
    """Its refusals, its counters, and the times of several tries."""
    said = '2026/11/25 22:00:00 [emerg] 12#12: pcre2_compile() failed: missing ) in "x" in /etc/nginx/nginx.conf.new:77\nnginx: configuration file ... test failed\n'
    error = refusal(said, "/etc/nginx/nginx.conf.new")
    assert (error.line, error.reason) == (77, 'pcre2_compile() failed: missing ) in "x" in /etc/nginx/nginx.conf:77')
    assert refusal("", "x").line == 0
    page = "Active connections: 2 \nserver accepts handled requests\n 9 9 30 \nReading: 0 Writing: 1 Waiting: 1 \n"
    assert parse_stub_status(page)["requests"] == 30 and parse_stub_status("nothing") == {}
    assert 'connections{state="waiting"} 1' in nginx_metrics(parse_stub_status(page), "")
    assert [last_number(text) for text in ("0.5", "5.0, 0.1", "-", "", "0.1 : 0.2")] == [0.5, 0.1, None, None, 0.2]


def test_requests_are_counted() -> None:
    """One datagram a request; nonsense and requests of no Ingress are left out."""
    metrics = RequestMetrics("nginx_ingress_controller_")
    line = b'<190>Nov 25 nginx: {"host":"a.com","namespace":"dev","ingress":"x","service":"a","path":"/","method":"GET","status":"200","canary":"","request_time":"0.02","request_length":"80"}'
    for datagram in (line, line, b"nonsense", b"<1> {", b'<1> {"ingress":""}', line.replace(b"GET", b'E\\"VIL')):
        metrics.take(datagram)
    text = metrics.render()
    assert (
        'requests{canary="",host="a.com",ingress="x",method="GET",namespace="dev",path="/",service="a",status="200"} 2'
        in text
    )
    assert 'method="OTHER"' in text and "EVIL" not in text
    assert (
        'request_duration_seconds_bucket{canary="",host="a.com",ingress="x",method="GET",namespace="dev",path="/",service="a",status="200",le="0.025"} 2'
        in text
    )


class FakeStatusApi:
    """Holds Ingresses' statuses, and can refuse one as somebody else's newer write does."""

    def __init__(self, pods: list[Object]) -> None:
        self.pods = pods
        self.patched: list[tuple[str, Any]] = []
        self.conflicts = 0

    def get(self, resource: str, namespace: str, name: str) -> Object:
        return next(one for one in self.pods if one["metadata"]["name"] == name)

    def list(
        self, resource: str, namespace: str | None = None, *, label_selector: str = "", field_selector: str = ""
    ) -> tuple[list[Object], str]:
        return self.pods, "1"

    def patch(self, resource: str, namespace: str, name: str, patch: Object, *, subresource: str = "") -> Object:
        if self.conflicts:
            self.conflicts -= 1
            raise ApiError(409, "Conflict", "modified")
        self.patched.append((name, patch["status"]["loadBalancer"]["ingress"]))
        return {}

    def create(self, obj: Object) -> Object:
        raise AssertionError

    def update(self, obj: Object, *, subresource: str = "") -> Object:
        raise AssertionError


def own_pod(name: str) -> Object:
    return {
        "metadata": {"name": name, "namespace": "ingress-nginx", "labels": {"app": "c", "pod-template-hash": "1"}},
        "spec": {},
        "status": {"phase": "Running"},
    }


@pytest.mark.parametrize("others", [[], ["other"]])
def test_status_is_written_kept_and_cleared(others: list[str]) -> None:
    """Written once, tried again after a conflict, taken back from what is no longer ours, cleared by the last replica."""
    shown = service("lb", namespace="ingress-nginx", type="LoadBalancer")
    shown["status"] = {"loadBalancer": {"ingress": [{"ip": "192.168.93.232"}]}}
    ours = {("dev", name): ingress(name, {f"{name}.com": ROOT}) for name in ("x", "y")}
    every = dict(ours)
    api = FakeStatusApi([own_pod("me"), *(own_pod(name) for name in others)])
    leader = threading.Event()
    leader.set()
    from testbed.dataplane.ingress.settings import Options

    publisher = StatusPublisher(
        api, Options(publish_service="ingress-nginx/lb"), ("ingress-nginx", "me"), leader,
        lambda: (ours, every, {("ingress-nginx", "lb"): shown}), print,
    )  # fmt: skip
    api.conflicts = 1
    publisher.publish_once()
    assert api.patched == [("y", [{"ip": "192.168.93.232"}])]
    publisher.publish_once()
    assert ("x", [{"ip": "192.168.93.232"}]) in api.patched
    for name in ours:
        ours[name] = every[name] = {**ours[name], "status": shown["status"]}
    api.patched.clear()
    publisher.publish_once()
    assert api.patched == []
    del ours[("dev", "y")]  # its class was changed
    publisher.publish_once()
    assert api.patched == [("y", None)]
    api.patched.clear()
    publisher.stop()
    assert api.patched == ([] if others else [("x", None)])
