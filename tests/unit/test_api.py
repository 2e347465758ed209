"""The HTTP face and its client, over a real unix socket."""

# ruff: noqa: E501 (a row of a table is one line, so that whole texts can be compared and searched)

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiohttp import web
from registry_support import deployment, make_registry, pod, refusal, service

from testbed.api import watching
from testbed.api.client import LAST_APPLIED, ApiClient
from testbed.api.paths import parse_path
from testbed.api.server import make_app
from testbed.errors import ApiError, LabError
from testbed.model.objects import Object
from testbed.registry import Registry

T = TypeVar("T")


class Lab:
    """A registry behind a socket; ``call`` runs a function where the registry lives, as a controller would."""

    def __init__(self, registry: Registry, path: str, loop: asyncio.AbstractEventLoop) -> None:
        self.registry = registry
        self.path = path
        self._loop = loop
        self.client = ApiClient(path)
        self.is_ready = True

    def call(self, function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        async def run() -> T:
            return function(*arguments, **keywords)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def busy_until(self, event: threading.Event) -> None:
        """Keep the server from looking at anything until then."""
        self._loop.call_soon_threadsafe(event.wait, 10)

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("localhost", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(self.path)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            text = response.read()
            try:
                return response.status, json.loads(text), response.headers
            except ValueError:
                return response.status, text.decode(), response.headers
        finally:
            connection.close()


@contextmanager
def serving(registry: Registry, path: Path) -> Iterator[Lab]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    lab = Lab(registry, str(path), loop)

    async def start() -> web.AppRunner:
        runner = web.AppRunner(make_app(registry, ready=lambda: lab.is_ready))
        await runner.setup()
        await web.UnixSite(runner, str(path)).start()
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield lab
    finally:
        lab.client.close()
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with serving(make_registry(history=8), tmp_path / "api.sock") as lab:
        yield lab


def test_create_get_patch_delete(lab: Lab) -> None:
    """An object goes in, comes back defaulted, is patched, replaced, deleted, and then is a 404 Status."""
    client = lab.client
    created = client.create(service())
    assert created["spec"]["type"] == "ClusterIP"
    assert client.get("services", "dev", "web") == created
    patched = client.patch("services", "dev", "web", {"metadata": {"labels": {"a": "b"}}})
    assert patched["metadata"]["labels"] == {"a": "b"}
    replaced = client.update({**patched, "metadata": {**patched["metadata"], "labels": {}}})
    assert replaced["metadata"].get("labels") in (None, {})
    error = refusal(client.update, patched)
    assert (error.code, error.reason) == (409, "Conflict")
    client.delete("services", "dev", "web")
    error = refusal(client.get, "services", "dev", "web")
    assert (error.code, error.reason, str(error), error.details) == (
        404, "NotFound", 'services "web" not found', {"name": "web", "kind": "services"},
    )  # fmt: skip


def test_causes_reach_the_client(lab: Lab) -> None:
    """A 422 carries one cause per field, and the client gives them back as they were."""
    error = refusal(lab.client.create, service(ports=[{"port": 1}, {"port": 2}]))
    assert [cause.field for cause in error.causes] == ["spec.ports[0].name", "spec.ports[1].name"]
    assert {cause.reason for cause in error.causes} == {"FieldValueRequired"}


def test_lists_and_selectors(lab: Lab) -> None:
    """Lists carry the resourceVersion, are sorted, and can be selected by labels and fields."""
    for name, labels in (("a", {"app": "x", "tier": "1"}), ("b", {"app": "y"}), ("c", {})):
        lab.client.create({**pod(name), "metadata": {"name": name, "namespace": "dev", "labels": labels}})
    lab.client.patch("pods", "dev", "b", {"spec": {"nodeName": "node1"}})

    def names(label_selector: str = "", field_selector: str = "") -> str:
        found, _ = lab.client.list("pods", "dev", label_selector=label_selector, field_selector=field_selector)
        return "".join(obj["metadata"]["name"] for obj in found)

    assert names() == "abc"
    for selector, expected in (
        ("app=x", "a"), ("app==x", "a"), ("app!=x", "bc"), ("app in (x,y)", "ab"), ("app notin (x)", "bc"),
        ("app", "ab"), ("!app", "c"), ("app,tier", "a"), ("app,!tier", "b"), ("tier>0", "a"), ("app=", ""),
    ):  # fmt: skip
        assert names(selector) == expected, selector
    for selector, expected in (
        ("metadata.name=a", "a"), ("spec.nodeName=node1", "b"), ("spec.nodeName=", "ac"), ("status.phase=Pending", "abc"),
        ("metadata.name!=a,spec.nodeName!=node1", "c"), ("metadata.namespace=prod", ""),
    ):  # fmt: skip
        assert names(field_selector=selector) == expected, selector
    assert lab.client.list("pods")[1] == str(lab.registry.store.revision)
    for selector in ("app=x,", "a b", "app in (x", "=x", "app in x", "-a", "a=b=c", "((("):
        assert refusal(lab.client.list, "pods", "dev", label_selector=selector).code == 400, selector
    for selector in ("spec.foo=x", "nonsense"):
        assert refusal(lab.client.list, "pods", "dev", field_selector=selector).code == 400, selector


def take(watch: Iterator[tuple[str, Object]], count: int) -> list[tuple[str, str]]:
    return [(kind, obj["metadata"].get("name", "")) for kind, obj in (next(watch) for _ in range(count))]


def test_watch_brings_the_state_and_then_the_changes(lab: Lab) -> None:
    """Without a resourceVersion the present objects come first; then every change, in order; close ends it."""
    lab.client.create(service("a"))
    with lab.client.watch("services", "dev") as watch:
        assert take(watch, 1) == [("ADDED", "a")]
        lab.client.create(service("b"))
        lab.client.create(service("c", namespace="default"))
        lab.client.patch("services", "dev", "a", {"metadata": {"labels": {"x": "y"}}})
        lab.client.delete("services", "dev", "b")
        assert take(watch, 3) == [("ADDED", "b"), ("MODIFIED", "a"), ("DELETED", "b")]
        threading.Timer(0.05, watch.close).start()
        assert list(watch) == []


def test_watch_resumes_from_a_list(lab: Lab) -> None:
    """A watch from a list's resourceVersion brings what came after it, and nothing twice."""
    lab.client.create(service("a"))
    _, version = lab.client.list("services")
    lab.client.create(service("b"))
    with lab.client.watch("services", resource_version=version) as watch:
        lab.client.create(service("c"))
        assert take(watch, 2) == [("ADDED", "b"), ("ADDED", "c")]


def test_watch_from_a_forgotten_version_is_410(lab: Lab) -> None:
    """After compaction a watcher hears 410 Expired, which tells it to list again."""
    for number in range(20):
        lab.client.create(service(f"s{number}"))
    with lab.client.watch("services", resource_version="3") as watch:
        error = refusal(next, watch)
    assert (error.code, error.reason, str(error)) == (410, "Expired", "too old resource version: 3 (14)")


def test_a_watch_that_is_over_leaves_no_connection(lab: Lab, eventually: Callable[..., Any]) -> None:
    """Neither one that the server refused to go on with nor one that was left: kube-proxy looks for garbage hardly ever."""
    for number in range(20):
        lab.client.create(service(f"s{number}"))
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            refusal(next, lab.client.watch("services", resource_version="3"))
            with lab.client.watch("services") as left:
                next(left)
        # the server is in this process, too, and has the other ends
        eventually(lambda: len(os.listdir("/proc/self/fd")) == before)
    finally:
        gc.enable()


def test_watch_with_a_selector(lab: Lab) -> None:
    """An object that begins to match is ADDED, one that ceases to match is DELETED, at the revision of the change."""
    lab.client.create(service("a"))
    _, version = lab.client.list("services")
    with lab.client.watch("services", "dev", resource_version=version, label_selector="app=x") as watch:
        for labels in ({"app": "x"}, {"app": "x", "more": "y"}, {"app": "z"}, {"other": "y"}, {"app": "x"}):
            lab.client.patch("services", "dev", "a", {"metadata": {"labels": {"app": None, "more": None, **labels}}})
        lab.client.delete("services", "dev", "a")
        seen = [next(watch) for _ in range(5)]
    assert [kind for kind, _ in seen] == ["ADDED", "MODIFIED", "DELETED", "ADDED", "DELETED"]
    assert seen[2][1]["metadata"]["labels"] == {"app": "x", "more": "y"}, "the last state that matched"
    revisions = [int(obj["metadata"]["resourceVersion"]) for _, obj in seen]
    assert revisions == sorted(revisions)


def test_watch_ends_in_time_and_bookmarks_only_on_request(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """timeoutSeconds ends the stream; bookmarks carry kind and revision, and come only to those who asked."""
    monkeypatch.setattr(watching, "BOOKMARK_INTERVAL_S", 0.1)
    monkeypatch.setattr(watching, "LIVENESS_INTERVAL_S", 0.05)
    assert list(lab.client.watch("services", timeout_s=1)) == []
    seen = list(lab.client.watch("services", timeout_s=1, bookmarks=True))
    assert seen and {kind for kind, _ in seen} == {"BOOKMARK"}
    assert (seen[0][1]["kind"], seen[0][1]["metadata"]["resourceVersion"]) == (
        "Service",
        str(lab.registry.store.revision),
    )


@pytest.mark.parametrize(("limit", "value"), [("MAX_WATCH_BACKLOG", 50), ("MAX_WATCH_BACKLOG_BYTES", 100_000)])
def test_a_watcher_that_stops_reading_is_cut_off(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    """The queue of a watcher is bounded: who does not read loses the connection, not the lab its memory."""
    monkeypatch.setattr(watching, limit, value)
    lab.client.create({**service("a")})
    with lab.client.watch("services") as watch:
        next(watch)

        def flood() -> None:
            for number in range(5000):
                annotations = {"number": f"{number}", "filler": "x" * 2000}
                lab.registry.patch("services", "dev", "a", {"metadata": {"annotations": annotations}})

        lab.call(flood)
        with pytest.raises((LabError, StopIteration)):
            for _ in range(5001):
                next(watch)


def test_apply_as_kubectl_does(lab: Lab) -> None:
    """created, unchanged, configured; what the manifest dropped goes, what others set stays."""
    client = lab.client
    manifest = service(selector={"app": "x", "tier": "y"})
    assert client.apply(manifest)[1] == "created"
    assert client.apply(manifest)[1] == "unchanged"
    client.patch("services", "dev", "web", {"metadata": {"labels": {"by": "others"}}})
    assert client.apply(manifest)[1] == "unchanged"
    changed = service(selector={"app": "x"}, type="NodePort")
    stored, what = client.apply(changed)
    assert (what, stored["spec"]["selector"], stored["metadata"]["labels"]) == (
        "configured",
        {"app": "x"},
        {"by": "others"},
    )
    node_port = stored["spec"]["ports"][0]["nodePort"]
    changed["spec"]["ports"] = [{"port": 81}]
    stored, what = client.apply(changed)
    assert (what, stored["spec"]["ports"]) == (
        "configured", [{"port": 81, "targetPort": 81, "protocol": "TCP", "nodePort": node_port}],
    )  # fmt: skip
    assert json.loads(stored["metadata"]["annotations"][LAST_APPLIED])["spec"] == changed["spec"]
    assert client.apply(deployment())[1] == "created"
    assert client.apply(deployment())[1] == "unchanged"


def test_status_and_scale(lab: Lab) -> None:
    """/status changes the status alone, /scale the replicas; both answer in their own form."""
    lab.client.create(deployment())
    scaled = lab.client.scale("deployments.apps", "dev", "web", 5)
    assert (scaled["kind"], scaled["spec"]["replicas"], scaled["status"]["selector"]) == ("Scale", 5, "app=web")
    patched = lab.client.patch(
        "deployments.apps", "dev", "web", {"status": {"replicas": 2}, "spec": {"replicas": 9}}, subresource="status"
    )
    assert (patched["spec"]["replicas"], patched["status"]["replicas"], patched["metadata"]["generation"]) == (5, 2, 2)
    assert lab.request("GET", "/apis/apps/v1/namespaces/dev/deployments/web/scale")[1]["status"]["replicas"] == 2
    assert refusal(lab.client.scale, "deployments.apps", "dev", "web", -1).code == 422
    assert refusal(lab.client.scale, "daemonsets.apps", "dev", "web", 1).code == 404


def test_graceful_deletion_over_http(lab: Lab) -> None:
    """DELETE of a running pod answers with the terminating pod; gracePeriodSeconds 0 removes it."""
    lab.client.create(pod("a", nodeName="node1"))
    terminating = lab.client.delete("pods", "dev", "a", grace_s=7)
    assert terminating["metadata"]["deletionGracePeriodSeconds"] == 7
    lab.client.delete("pods", "dev", "a", grace_s=0)
    assert refusal(lab.client.get, "pods", "dev", "a").code == 404


def test_a_collection_can_be_deleted(lab: Lab) -> None:
    """DELETE of a collection takes those that the selector chooses."""
    for name, labels in (("a", {"app": "x"}), ("b", {"app": "y"})):
        lab.client.create({**service(name), "metadata": {"name": name, "namespace": "dev", "labels": labels}})
    status, answer, _ = lab.request("DELETE", "/api/v1/namespaces/dev/services?labelSelector=app%3Dx")
    assert (status, [obj["metadata"]["name"] for obj in answer["items"]]) == (200, ["a"])
    assert [obj["metadata"]["name"] for obj in lab.client.list("services")[0]] == ["b"]


def test_strict_and_lenient_field_validation(lab: Lab) -> None:
    """Unknown fields: refused when Strict, warned of when not, silent when Ignore; dry runs store nothing."""
    body = json.dumps(service(foo=1)).encode()
    url = "/api/v1/namespaces/dev/services"
    status, answer, _ = lab.request("POST", f"{url}?fieldValidation=Strict", body, Content_Type="application/json")
    assert (status, answer["message"]) == (
        400, 'Service in version "v1" cannot be handled as a Service: strict decoding error: unknown field "spec.foo"',
    )  # fmt: skip
    status, _, headers = lab.request("POST", f"{url}?dryRun=All", body, Content_Type="application/json")
    assert (status, headers["Warning"]) == (201, '299 - "unknown field \\"spec.foo\\""')
    assert lab.client.list("services")[0] == []
    assert (
        "Warning" not in lab.request("POST", f"{url}?fieldValidation=Ignore", body, Content_Type="application/json")[2]
    )


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "code"),
    [
        ("POST", "/api/v1/namespaces/dev/services", b'{"kind":', {"Content_Type": "application/json"}, 400),
        ("POST", "/api/v1/namespaces/dev/services", b"", {"Content_Type": "application/json"}, 400),
        ("POST", "/api/v1/namespaces/dev/services", b"[]", {"Content_Type": "application/json"}, 400),
        ("POST", "/api/v1/namespaces/dev/services", b'"\xff"', {"Content_Type": "application/json"}, 400),
        ("POST", "/api/v1/namespaces/dev/services", b'{"metadata":{"name":"\\ud800"}}', {"Content_Type": "application/json"}, 400),
        ("POST", "/api/v1/namespaces/dev/services", b'{"a":' * 5000 + b"1" + b"}" * 5000, {"Content_Type": "application/json"}, 400),
        ("POST", "/api/v1/namespaces/dev/services", b'{"metadata":{"managedFields":[{"fieldsV1":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}]}}", {"Content_Type": "application/json"}, 400),
        ("POST", "/api/v1/namespaces/dev/services", b"a: b", {"Content_Type": "text/plain"}, 415),
        ("POST", "/api/v1/namespaces/dev/services", b"a: [", {"Content_Type": "application/yaml"}, 400),
        ("POST", "/api/v1/namespaces/dev/services", b"k8s\0", {"Content_Type": "application/vnd.kubernetes.protobuf"}, 400),
        ("POST", "/api/v1/namespaces/dev/services", b" " * (3 << 20) + b"{}", {"Content_Type": "application/json"}, 413),
        ("POST", "/api/v1/namespaces/dev/services", b'{"metadata":{"namespace":"prod"}}', {"Content_Type": "application/json"}, 400),
        ("POST", "/api/v1/namespaces/dev/services", b'{"metadata":[]}', {"Content_Type": "application/json"}, 400),
        ("POST", "/api/v1/namespaces/dev/services", b'{"kind":{"a":1}}', {"Content_Type": "application/json"}, 400),
        ("POST", "/api/v1/namespaces/dev/services?dryRun=Some", b"{}", {"Content_Type": "application/json"}, 400),
        ("POST", "/api/v1/services", b"{}", {"Content_Type": "application/json"}, 405),
        ("PUT", "/api/v1/namespaces/dev/services/x", b'{"metadata":{"name":"y"}}', {"Content_Type": "application/json"}, 400),
        ("PATCH", "/api/v1/namespaces/default", b"{}", {"Content_Type": "application/json-patch+json"}, 400),
        ("PATCH", "/api/v1/namespaces/default", b"{}", {"Content_Type": "application/apply-patch+yaml"}, 415),
        ("PATCH", "/api/v1/namespaces/default", b"{}", {"Content_Type": "application/json"}, 415),
        ("PATCH", "/api/v1/namespaces/default", b'{"metadata":{"name":"x"}}', {"Content_Type": "application/merge-patch+json"}, 400),
        ("PATCH", "/api/v1/namespaces/default", b'{"metadata":null}', {"Content_Type": "application/merge-patch+json"}, 400),
        ("DELETE", "/api/v1/namespaces", None, {}, 405),
        ("DELETE", "/api/v1/namespaces/default", None, {}, 403),
        ("DELETE", "/api/v1/namespaces/dev/pods/x", b'{"gracePeriodSeconds":"x"}', {}, 400),
        ("GET", "/api/v1/nothing", None, {}, 404),
        ("GET", "/apis/none/v1", None, {}, 404),
        ("GET", "/api/v2", None, {}, 404),
        ("GET", "/nowhere", None, {}, 404),
        ("GET", "/api/v1/namespaces/dev/services/a%2Fb", None, {}, 404),
        ("GET", "/api/v1/namespaces/dev/services/%FF", None, {}, 404),
        ("GET", "/api/v1/services?watch=1&resourceVersion=x", None, {}, 400),
        ("GET", "/api/v1/services?watch=1&timeoutSeconds=x", None, {}, 400),
        ("OPTIONS", "/api/v1/services", None, {}, 405),
        ("POST", "/api/v1/namespaces/dev/pods/x/binding", b'{"target":1}', {"Content_Type": "application/json"}, 400),
    ],
)  # fmt: skip
def test_mistakes_of_the_client_have_a_status(
    lab: Lab, method: str, path: str, body: bytes | None, headers: dict[str, str], code: int
) -> None:
    """Whatever a client gets wrong, the answer is a Status with the right code, and nothing is stored."""
    revision = lab.registry.store.revision
    status, answer, _ = lab.request(method, path, body, **headers)
    assert (status, answer["kind"], answer["status"], answer["code"]) == (code, "Status", "Failure", code)
    assert answer["message"]
    assert lab.registry.store.revision == revision


def test_discovery_follows_the_table(lab: Lab) -> None:
    """/api, /apis and the lists below them name every resource; /version says 1.30."""
    assert lab.request("GET", "/api")[1]["versions"] == ["v1"]
    groups = {
        group["name"]: group["preferredVersion"]["groupVersion"] for group in lab.request("GET", "/apis")[1]["groups"]
    }
    assert groups["apps"] == "apps/v1"
    listed = {
        f"{entry['name']}"
        for path in ("/api/v1", *(f"/apis/{version}" for version in groups.values()))
        for entry in lab.request("GET", path)[1]["resources"]
    }
    assert {"pods", "pods/status", "deployments", "deployments/scale", "endpointslices", "clusterroles"} <= listed
    assert lab.request("GET", "/version")[1]["gitVersion"].startswith("v1.30.")
    assert lab.request("GET", "/apis/apps")[1]["kind"] == "APIGroup"


def test_health_and_readiness(lab: Lab) -> None:
    """/healthz answers at once; /readyz follows what the lab says of itself."""
    assert lab.request("GET", "/healthz")[:2] == (200, "ok")
    assert lab.client.is_ready()
    lab.is_ready = False
    assert lab.request("GET", "/readyz")[0] == 500
    assert not lab.client.is_ready()


def test_a_lab_that_is_not_there(tmp_path: Path) -> None:
    """Without a server the client raises LabError and names the socket."""
    client = ApiClient(str(tmp_path / "none.sock"))
    with pytest.raises(LabError, match=r"none\.sock"):
        client.get("pods", "dev", "a")
    assert not client.is_ready()


def test_stopping_the_server_ends_open_watches(tmp_path: Path) -> None:
    """The server does not wait for its watchers: they are told that it is over."""
    with serving(make_registry(), tmp_path / "api.sock") as lab:
        watch = lab.client.watch("services", "default")
        lab.client.create(service("a", namespace="default"))
        assert take(watch, 1) == [("ADDED", "a")]
    assert list(watch) == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/api/v1/namespaces", ("namespaces", None, "", "")),
        ("/api/v1/namespaces/dev", ("namespaces", None, "dev", "")),
        ("/api/v1/namespaces/dev/finalize", ("namespaces", None, "dev", "finalize")),
        ("/api/v1/namespaces/dev/pods/", ("pods", "dev", "", "")),
        ("/api/v1/namespaces/dev/pods/a/status", ("pods", "dev", "a", "status")),
        ("/apis/apps/v1/deployments", ("deployments.apps", None, "", "")),
        ("/api/v1/pods/a", None),
        ("/api/v1/namespaces/dev/nodes", None),
        ("/api/v1/namespaces/dev/pods/a/b", None),
        ("/apis/apps/v1beta1/deployments", None),
        ("/apis/apps/v1/pods", None),
    ],
)
def test_what_a_path_names(path: str, expected: tuple[str, str | None, str, str] | None) -> None:
    """Paths are read as Kubernetes reads them; what makes no sense names nothing."""
    target = parse_path(path)
    seen = target and (target.resource.key, target.namespace, target.name, target.subresource)
    assert seen == expected


def test_errors_keep_their_type() -> None:
    """ApiError is what both sides raise."""
    assert issubclass(type(refusal(make_registry().get, "pods", "dev", "x")), ApiError)


def test_who_has_gone_before_the_answer_is_no_error(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """As when a container that watches is killed: nothing about it gets into the lab's log."""
    for path in ("/api/v1/pods?watch=true", "/api/v1/pods"):
        asked = threading.Event()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(lab.path)
            assert lab.request("GET", "/healthz")[0] == 200  # accepted
            lab.busy_until(asked)
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: lab\r\n\r\n".encode())
        asked.set()
        assert lab.request("GET", "/healthz")[0] == 200
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
