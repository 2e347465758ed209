"""Pages, versions, Tables and watches over HTTP: what informers and kubectl rely on."""

# ruff: noqa: E501 (a row of a table is one line)

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from registry_support import deployment, make_registry, pod, refusal, service
from test_api import Lab, serving

from testbed.api.client import ApiClient
from testbed.errors import ApiError
from testbed.model.objects import DEFINITIONS

TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
SERVICES = "/api/v1/namespaces/dev/services"
JSON = {"Content_Type": "application/json"}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with serving(make_registry(history=12), tmp_path / "api.sock") as lab:
        yield lab


def names(answer: Any) -> list[str]:
    return [obj["metadata"]["name"] for obj in answer["items"]]


def test_pages_are_of_one_moment_until_it_is_forgotten(lab: Lab) -> None:
    """A continue token shows the state of the first page; when the history is too short it is a 410 with a new token."""
    for name in "abcde":
        lab.client.create(service(name))
    _, first, _ = lab.request("GET", f"{SERVICES}?limit=2")
    assert (names(first), first["metadata"]["remainingItemCount"]) == (["a", "b"], 3)
    lab.client.delete("services", "dev", "d")
    lab.client.create(service("c2"))
    token = first["metadata"]["continue"]
    _, second, _ = lab.request("GET", f"{SERVICES}?limit=2&continue={token}")
    assert (names(second), second["metadata"]["resourceVersion"]) == (["c", "d"], first["metadata"]["resourceVersion"])
    for number in range(20):
        lab.client.patch("services", "dev", "a", {"metadata": {"labels": {"n": str(number)}}})
    status, refused, _ = lab.request("GET", f"{SERVICES}?limit=2&continue={token}")
    assert (status, refused["reason"]) == (410, "Expired")
    _, rest, _ = lab.request("GET", f"{SERVICES}?continue={refused['metadata']['continue']}")
    assert names(rest) == ["c", "c2", "e"], "an inconsistent list may go on"


def test_lists_at_a_version(lab: Lab) -> None:
    """Exact shows the past, a version in the future is a 504, and matches that make no sense are 422."""
    lab.client.create(service("a"))
    version = int(lab.client.list("services")[1])
    lab.client.create(service("b"))
    _, past, _ = lab.request("GET", f"{SERVICES}?resourceVersion={version}&resourceVersionMatch=Exact")
    assert names(past) == ["a"]
    _, now, _ = lab.request("GET", f"{SERVICES}?resourceVersion={version}&resourceVersionMatch=NotOlderThan")
    assert names(now) == ["a", "b"]
    for query, code in (
        ("resourceVersion=999999", 504), ("resourceVersionMatch=Exact", 422), ("resourceVersion=0&resourceVersionMatch=Exact", 422),
        ("resourceVersion=1&resourceVersionMatch=Some", 422), ("resourceVersion=x", 400), ("limit=x", 400), ("continue=x", 400),
        ("limit=1&continue=eyJydiI6MX0", 400),
    ):  # fmt: skip
        assert lab.request("GET", f"{SERVICES}?{query}")[0] == code, query


def test_tables(lab: Lab) -> None:
    """Rows carry metadata unless asked otherwise; includeObject and PartialObjectMetadata are honoured; 406 for the rest."""
    lab.client.create(service("a"))
    _, table, _ = lab.request("GET", SERVICES, Accept=TABLE)
    assert [column["name"] for column in table["columnDefinitions"]][:3] == ["Name", "Type", "Cluster-IP"]
    assert table["columnDefinitions"][0]["format"] == "name" and table["columnDefinitions"][6]["priority"] == 1
    row = table["rows"][0]
    assert (row["cells"][0], row["object"]["kind"], "spec" in row["object"]) == ("a", "PartialObjectMetadata", False)
    _, table, _ = lab.request("GET", f"{SERVICES}/a?includeObject=Object", Accept=TABLE)
    assert table["rows"][0]["object"]["spec"]["type"] == "ClusterIP"
    partial = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
    _, listed, _ = lab.request("GET", SERVICES, Accept=partial)
    assert (listed["kind"], names(listed)) == ("PartialObjectMetadataList", ["a"])
    assert lab.request("GET", SERVICES, Accept="text/html")[0] == 406
    assert lab.request("GET", f"{SERVICES}?includeObject=Some", Accept=TABLE)[0] == 400


def lines(lab: Lab, path: str, count: int, **headers: str) -> list[Any]:
    """Return the first events of a watch."""
    import http.client
    import socket

    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(10)
    connection.sock.connect(lab.path)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        return [json.loads(line) for line in (response.readline() for _ in range(count)) if line]
    finally:
        connection.close()


def test_watches_as_tables(lab: Lab) -> None:
    """One Table for each event; only the first has the columns."""
    for name in "ab":
        lab.client.create(service(name))
    events = lines(lab, f"{SERVICES}?watch=true&resourceVersion=0", 2, Accept=TABLE)
    assert [event["object"]["rows"][0]["cells"][0] for event in events] == ["a", "b"]
    assert [event["object"]["columnDefinitions"] is None for event in events] == [False, True]


def test_streaming_lists(lab: Lab) -> None:
    """sendInitialEvents brings the state and then the bookmark that ends it; without NotOlderThan it is a 422."""
    lab.client.create(service("a"))
    query = "watch=true&sendInitialEvents=true&allowWatchBookmarks=true"
    events = lines(lab, f"{SERVICES}?{query}&resourceVersionMatch=NotOlderThan", 2)
    assert [event["type"] for event in events] == ["ADDED", "BOOKMARK"]
    assert events[1]["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
    assert lab.request("GET", f"{SERVICES}?{query}")[0] == 422


def test_an_old_version_ends_a_watch_with_an_error_event(lab: Lab) -> None:
    """The stream opens, says 410 Expired, and ends."""
    for number in range(30):
        lab.client.create(service(f"s{number}"))
    events = lines(lab, f"{SERVICES}?watch=true&resourceVersion=1", 2)
    assert [(event["type"], event["object"]["code"], event["object"]["reason"]) for event in events] == [
        ("ERROR", 410, "Expired")
    ]


def test_watchers_see_every_event_once_and_in_order(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Twenty of them (a hundred in the long form), while objects come and go quickly."""
    count = 100 if request.config.getoption("--slow") else 20
    with serving(make_registry(), tmp_path / "api.sock") as lab:
        _, version = lab.client.list("services")
        seen: list[list[tuple[str, str]]] = [[] for _ in range(count)]

        def look(number: int) -> None:
            with lab.client.watch("services", resource_version=version) as watch:
                for kind, obj in watch:
                    seen[number].append((kind, obj["metadata"]["resourceVersion"]))
                    if len(seen[number]) == 150:
                        return

        watchers = [threading.Thread(target=look, args=(number,)) for number in range(len(seen))]
        for watcher in watchers:
            watcher.start()
        for number in range(50):
            lab.client.create(service(f"s{number}"))
            lab.client.patch("services", "dev", f"s{number}", {"metadata": {"labels": {"a": "b"}}})
            lab.client.delete("services", "dev", f"s{number}")
        for watcher in watchers:
            watcher.join(30)
        assert all(one == seen[0] for one in seen)
        revisions = [int(revision) for _, revision in seen[0]]
        assert len(set(revisions)) == 150 and revisions == sorted(revisions)


def test_deletion_propagates_as_asked(lab: Lab) -> None:
    """Foreground and Orphan hold the object with the collector's finalizer; Background takes it off; two words are too many."""
    path = "/apis/apps/v1/namespaces/dev/deployments/web"
    for policy, finalizers in (("Foreground", ["foregroundDeletion"]), ("Orphan", ["orphan"])):
        lab.client.create(deployment())
        status, answer, _ = lab.request("DELETE", path, json.dumps({"propagationPolicy": policy}).encode(), **JSON)
        assert (status, answer["metadata"]["finalizers"]) == (200, finalizers)
        assert "deletionTimestamp" in answer["metadata"]
        assert lab.request("DELETE", f"{path}?propagationPolicy=Background")[0] == 200
        assert lab.request("GET", path)[0] == 404, "nothing holds it any more"
    lab.client.create(deployment())
    body = json.dumps({"propagationPolicy": "Orphan", "orphanDependents": True}).encode()
    assert lab.request("DELETE", path, body, **JSON)[0] == 422
    assert lab.request("DELETE", f"{path}?propagationPolicy=Sideways")[0] == 422


def test_preconditions(lab: Lab) -> None:
    """A deletion that names another uid or version is a 409, and nothing happens."""
    made = lab.client.create(service())
    for preconditions in ({"uid": "other"}, {"resourceVersion": "1"}):
        body = json.dumps({"preconditions": preconditions}).encode()
        assert lab.request("DELETE", f"{SERVICES}/web", body, **JSON)[0] == 409
    body = json.dumps({"preconditions": {"uid": made["metadata"]["uid"]}}).encode()
    assert lab.request("DELETE", f"{SERVICES}/web", body, **JSON)[0] == 200


def test_binding_eviction_and_tokens(lab: Lab) -> None:
    """Pods are bound once, evicted gracefully; a server without TLS issues no tokens."""
    lab.client.create(pod("a"))
    base = "/api/v1/namespaces/dev/pods/a"
    body = json.dumps({"target": {"kind": "Node", "name": "node1"}}).encode()
    assert lab.request("POST", f"{base}/binding", body, **JSON)[0] == 201
    assert lab.client.get("pods", "dev", "a")["spec"]["nodeName"] == "node1"
    assert lab.request("POST", f"{base}/binding", body, **JSON)[0] == 409
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": "a"},
        "deleteOptions": {"gracePeriodSeconds": 3},
    }
    assert lab.request("POST", f"{base}/eviction", json.dumps(eviction).encode(), **JSON)[0] == 201
    assert lab.client.get("pods", "dev", "a")["metadata"]["deletionGracePeriodSeconds"] == 3
    lab.client.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "x", "namespace": "dev"}})
    assert lab.request("POST", "/api/v1/namespaces/dev/serviceaccounts/x/token", b"{}", **JSON)[0] == 501


def test_fields_that_are_there_twice(lab: Lab) -> None:
    """Strict refuses with the path, Warn warns, and the last one counts."""
    body = b'{"metadata":{"name":"x"},"spec":{"ports":[{"port":80,"port":81}]}}'
    status, answer, _ = lab.request("POST", f"{SERVICES}?fieldValidation=Strict", body, **JSON)
    assert status == 400 and 'strict decoding error: duplicate field "spec.ports[0].port"' in answer["message"]
    status, answer, headers = lab.request("POST", SERVICES, body, **JSON)
    assert (status, answer["spec"]["ports"][0]["port"]) == (201, 81)
    assert headers["Warning"] == '299 - "duplicate field \\"spec.ports[0].port\\""'


def test_patches_by_media_type(lab: Lab) -> None:
    """Each type does what it says; what a patch cannot do is a 422 or a 400 and changes nothing."""
    lab.client.create(service(ports=[{"port": 80, "name": "a"}, {"port": 81, "name": "b"}]))
    url = f"{SERVICES}/web"
    for media_type, patch, code in (
        ("strategic-merge-patch", {"spec": {"ports": [{"port": 81, "name": "c"}]}}, 200),
        ("json-patch", [{"op": "test", "path": "/spec/ports/1/name", "value": "c"}, {"op": "remove", "path": "/spec/ports/0"}], 200),
        ("merge-patch", {"metadata": {"labels": {"a": "b"}}}, 200),
        ("json-patch", [{"op": "test", "path": "/spec/type", "value": "x"}], 422),
        ("json-patch", [{"op": "replace", "path": "", "value": 1}], 400),
        ("json-patch", {"op": "remove"}, 400),
        ("json-patch", [{"op": "remove", "path": "spec"}], 400),
        ("strategic-merge-patch", [], 400),
    ):  # fmt: skip
        media = f"application/{media_type}+json"
        status, answer, _ = lab.request("PATCH", url, json.dumps(patch).encode(), Content_Type=media)
        assert status == code, (media_type, patch, answer)
    stored = lab.client.get("services", "dev", "web")
    assert ([port["name"] for port in stored["spec"]["ports"]], stored["metadata"]["labels"]) == (["c"], {"a": "b"})
    status, _, _ = lab.request(
        "PATCH", f"{url}?dryRun=All", b'{"spec":{"type":"NodePort"}}', Content_Type="application/merge-patch+json"
    )
    assert status == 200 and lab.client.get("services", "dev", "web") == stored


def test_custom_resources_in_two_versions(lab: Lab) -> None:
    """Lists, watches and answers speak the version of the URL; discovery and OpenAPI know both."""
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    versions = [{"name": name, "served": True, "storage": name == "v1", "schema": schema} for name in ("v1", "v1beta1")]
    names_ = {"plural": "things", "kind": "Thing", "shortNames": ["th"]}
    spec = {"group": "example.io", "scope": "Cluster", "names": names_, "versions": versions}
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.example.io"},
        "spec": spec,
    }
    lab.call(lab.registry.create, DEFINITIONS, definition)
    body = b'{"apiVersion":"example.io/v1beta1","kind":"Thing","metadata":{"name":"x"},"a":1}'
    assert lab.request("POST", "/apis/example.io/v1beta1/things", body, **JSON)[1]["apiVersion"] == "example.io/v1beta1"
    for version in ("v1", "v1beta1"):
        _, listed, _ = lab.request("GET", f"/apis/example.io/{version}/things")
        assert [obj["apiVersion"] for obj in listed["items"]] == [f"example.io/{version}"]
        (event,) = lines(lab, f"/apis/example.io/{version}/things?watch=true", 1)
        assert event["object"]["apiVersion"] == f"example.io/{version}"
    group = lab.request("GET", "/apis/example.io")[1]
    assert (group["preferredVersion"]["version"], len(group["versions"])) == ("v1", 2)
    assert "apis/example.io/v1beta1" in lab.request("GET", "/openapi/v3")[1]["paths"]
    paths = lab.request("GET", "/openapi/v3/apis/example.io/v1")[1]["paths"]
    assert paths["/apis/example.io/v1/things/{name}"]["patch"]["x-kubernetes-group-version-kind"]["kind"] == "Thing"
    lab.call(
        lab.registry.update,
        DEFINITIONS,
        {
            **lab.registry.get(DEFINITIONS, "", "things.example.io"),
            "metadata": {"name": "things.example.io", "finalizers": []},
        },
    )
    lab.client.delete(DEFINITIONS, "", "things.example.io")
    assert lab.request("GET", "/apis/example.io/v1/things")[0] == 404


def test_our_own_client_finds_custom_resources(lab: Lab) -> None:
    """apply, get, list and delete of a kind that a manifest has just defined; one that nobody defined is a 404."""
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    spec = {
        "group": "example.io", "scope": "Namespaced", "names": {"plural": "things", "kind": "Thing"},
        "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
    }  # fmt: skip
    thing = {"apiVersion": "example.io/v1", "kind": "Thing", "metadata": {"name": "x", "namespace": "dev"}, "a": 1}
    assert refusal(lab.client.apply, thing).code == 404
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.example.io"},
        "spec": spec,
    }
    assert [lab.client.apply(obj)[1] for obj in (definition, thing, thing)] == ["created", "created", "unchanged"]
    fresh = ApiClient(lab.path)
    assert fresh.get("things.example.io", "dev", "x")["a"] == 1
    assert len(fresh.list("things.example.io", "dev")[0]) == 1
    fresh.delete("things.example.io", "dev", "x")
    assert refusal(fresh.get, "things.example.io", "dev", "x").code == 404
    assert refusal(fresh.get, "others.example.io", "dev", "x").code == 404
    fresh.close()


def test_aggregated_discovery(lab: Lab) -> None:
    """One answer for all groups, in the media type that was asked for; clients that want the plain form get it."""
    accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json"
    status, answer, headers = lab.request("GET", "/apis", Accept=accept)
    assert (status, answer["kind"]) == (200, "APIGroupDiscoveryList")
    assert headers["Content-Type"] == "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
    apps = next(item for item in answer["items"] if item["metadata"]["name"] == "apps")
    deployments = next(one for one in apps["versions"][0]["resources"] if one["resource"] == "deployments")
    assert {one["subresource"] for one in deployments["subresources"]} == {"status", "scale"}
    assert lab.request("GET", "/apis", Accept="application/json," + accept)[1]["kind"] == "APIGroupList"


def test_openapi_tells_how_lists_are_merged(lab: Lab) -> None:
    """kubectl makes strategic patches from these documents; every reference in them leads somewhere."""
    document = lab.request("GET", "/openapi/v3/apis/apps/v1")[1]
    schemas = document["components"]["schemas"]
    containers = schemas["io.k8s.api.PodSpec"]["properties"]["containers"]
    assert (containers["x-kubernetes-patch-merge-key"], containers["x-kubernetes-patch-strategy"]) == ("name", "merge")
    references = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            references.update([value["$ref"]] if "$ref" in value else [])
            for inner in value.values():
                collect(inner)
        elif isinstance(value, list):
            for inner in value:
                collect(inner)

    collect(document)
    assert {f"#/components/schemas/{name}" for name in schemas} >= references
    accept = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"
    assert lab.request("GET", "/openapi/v2", Accept=accept)[2]["Content-Type"].startswith("application/com.github")
    assert lab.request("GET", "/openapi/v3/apis/none/v1")[0] == 404


def test_reviews(lab: Lab) -> None:
    """They answer, and store nothing."""
    revision = lab.registry.store.revision
    base = "/apis/authorization.k8s.io/v1"
    assert lab.request("POST", f"{base}/selfsubjectaccessreviews", b"{}", **JSON)[1]["status"]["allowed"] is True
    review = lab.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", b"{}", **JSON)[1]
    assert review["status"]["userInfo"]["username"] == "kubernetes-admin"
    assert lab.request("GET", f"{base}/selfsubjectaccessreviews")[0] == 405
    assert lab.registry.store.revision == revision


def test_errors_are_api_errors() -> None:
    """The error that carries a continue token is an ApiError like any other."""
    assert ApiError(410, "Expired", "x").list_continue == ""
