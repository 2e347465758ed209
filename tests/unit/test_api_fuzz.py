"""Anything at all sent to the API: a Status with a code that says whose mistake it was, never a 500, never a change."""

# ruff: noqa: E501 (a row of a table is one line)

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registry_support import deployment, make_registry, pod, service
from test_api import Lab, serving
from test_custom_resources import definition, eip

from testbed.model.objects import BY_KIND, DEFINITIONS

MANIFESTS = Path(__file__).parents[1] / "conformance" / "manifests"
JSON, MERGE, STRATEGIC, JSON_PATCH = (
    "application/json", "application/merge-patch+json", "application/strategic-merge-patch+json", "application/json-patch+json",
)  # fmt: skip


def valid_objects() -> list[Any]:
    """Return manifests that the API takes as they are."""
    found = [
        obj
        for path in ("services.yaml", "web.yaml", "others.yaml", "crd.yaml")
        for obj in yaml.safe_load_all((MANIFESTS / path).read_text())
    ]
    return [*found, service(), deployment(), pod(), definition(), eip()]


OBJECTS = valid_objects()
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=12)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a value."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """Return a valid object with one to three places replaced, removed or renamed."""
    obj = copy.deepcopy(draw(st.sampled_from(OBJECTS)))
    for _ in range(draw(st.integers(1, 3))):
        candidates = list(places(obj))
        if not candidates:
            break
        *parents, last = draw(st.sampled_from(candidates))
        at = obj
        for part in parents:
            at = at[part]
        match draw(st.integers(0, 3)):
            case 0 if isinstance(at, dict):
                del at[last]
            case 1 if isinstance(at, dict):
                at[draw(st.text(max_size=8))] = at.pop(last)
            case 2 if isinstance(at, list):
                at.insert(last, copy.deepcopy(at[last]))
            case _:
                at[last] = draw(anything)
    return obj


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    registry = make_registry()
    registry.create(DEFINITIONS, definition())
    registry.create("services", service("there"))
    registry.create("deployments.apps", deployment("there"))
    registry.create("pods", pod("there"))
    registry.create("eips.example.io", {**eip(), "metadata": {"name": "there", "namespace": "dev"}})
    with serving(registry, tmp_path_factory.mktemp("fuzz") / "api.sock") as lab:
        yield lab


TARGETS = (
    "/api/v1/namespaces/dev/services/there", "/apis/apps/v1/namespaces/dev/deployments/there",
    "/api/v1/namespaces/dev/pods/there", "/apis/example.io/v1/namespaces/dev/eips/there",
    f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{definition()['metadata']['name']}",
)  # fmt: skip


def collection_of(obj: Any) -> str:
    """Return the URL that takes an object of this kind; a kind that was mutated goes to Services."""
    api_version, kind = obj.get("apiVersion"), obj.get("kind")
    known = isinstance(api_version, str) and isinstance(kind, str)
    resource = BY_KIND.get((api_version, kind)) if known else None
    if resource is None:
        return "/apis/example.io/v1/namespaces/dev/eips" if kind == "Eip" else "/api/v1/namespaces/dev/services"
    base = f"/apis/{resource.api_version}" if resource.group else "/api/v1"
    return f"{base}/namespaces/dev/{resource.plural}" if resource.namespaced else f"{base}/{resource.plural}"


def check(lab: Lab, method: str, path: str, body: bytes, content_type: str) -> None:
    """Send it as a dry run; the answer is a success or a Status, and nothing changes."""
    revision = lab.registry.store.revision
    query = "&dryRun=All" if "?" in path else "?dryRun=All"
    status, answer, _ = lab.request(method, path + query, body, Content_Type=content_type)
    assert status < 500, (status, answer)
    if status >= 400:
        assert (answer["kind"], answer["code"], answer["status"]) == ("Status", status, "Failure")
        assert answer["message"] and answer["reason"]
    else:
        assert status in (200, 201)
    assert lab.registry.store.revision == revision


def long_form(request: pytest.FixtureRequest, short: int, full: int) -> settings:
    examples = full if request.config.getoption("--slow") else short
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=examples, suppress_health_check=quiet)


@pytest.mark.timeout(1200)
def test_mutations_of_valid_manifests(lab: Lab, request: pytest.FixtureRequest) -> None:
    """Created and put in place of what is there: a Status with the right code, never a 500, never a change."""

    @long_form(request, 300, 10_000)
    @given(mutated(), st.sampled_from(["", "&fieldValidation=Strict", "&fieldValidation=Ignore"]))
    def run(obj: Any, validation: str) -> None:
        body = json.dumps(obj).encode()
        check(lab, "POST", f"{collection_of(obj)}?x=1{validation}", body, JSON)
        name = next((path for path in TARGETS if collection_of(obj) == path.rpartition("/")[0]), TARGETS[0])
        check(lab, "PUT", f"{name}?x=1{validation}", body, JSON)

    run()


@pytest.mark.timeout(1200)
def test_patches_of_any_kind(lab: Lab, request: pytest.FixtureRequest) -> None:
    """Parts of valid objects and anything else as patches of every media type, also of status and scale."""
    operation = st.fixed_dictionaries(
        {"op": st.sampled_from(["add", "remove", "replace", "move", "copy", "test", "x"]), "path": st.sampled_from(["/spec", "/metadata/name", "/spec/ports/0", "", "x", "/a/b/c", "/metadata"])},
        optional={"value": anything, "from": st.sampled_from(["/spec", "/x", "", 1])},
    )  # fmt: skip
    bodies = mutated() | anything | st.lists(operation, max_size=4)

    @long_form(request, 300, 10_000)
    @given(
        st.sampled_from(TARGETS),
        st.sampled_from(["", "/status", "/scale"]),
        st.sampled_from([MERGE, STRATEGIC, JSON_PATCH]),
        bodies,
    )
    def run(path: str, subresource: str, content_type: str, body: Any) -> None:
        check(lab, "PATCH", path + subresource, json.dumps(body).encode(), content_type)

    run()


@pytest.mark.timeout(600)
def test_any_bytes_on_any_path(lab: Lab, request: pytest.FixtureRequest) -> None:
    """Truncated JSON, wrong types, unknown paths, selectors and parameters that make no sense."""
    words = st.sampled_from(["api", "apis", "v1", "apps", "namespaces", "dev", "pods", "services", "there", "status", "scale",
                             "%2F", "", "..", "%00", "é", "watch", "openapi", "v3", "eviction", "binding", "token"])  # fmt: skip
    paths = st.lists(words, max_size=7).map(lambda parts: "/" + "/".join(parts))
    parameter = st.tuples(
        st.sampled_from(["labelSelector", "fieldSelector", "limit", "continue", "resourceVersion", "resourceVersionMatch",
                         "includeObject", "fieldValidation", "propagationPolicy", "gracePeriodSeconds", "timeoutSeconds"]),
        st.text(max_size=10),
    )  # fmt: skip
    bodies = st.binary(max_size=60) | st.sampled_from([json.dumps(obj).encode()[:-1] for obj in OBJECTS])
    types = st.sampled_from([JSON, MERGE, STRATEGIC, JSON_PATCH, "application/yaml", "application/vnd.kubernetes.protobuf", "text/plain", ";", ""])  # fmt: skip

    @long_form(request, 300, 10_000)
    @given(
        st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE"]),
        paths | st.sampled_from(TARGETS),
        st.lists(parameter, max_size=2),
        bodies,
        types,
    )
    def run(method: str, path: str, parameters: list[tuple[str, str]], body: bytes, content_type: str) -> None:
        from urllib.parse import quote, urlencode

        query = urlencode([(name, value) for name, value in parameters])
        revision = lab.registry.store.revision
        full = f"{quote(path, safe='/%')}?{query}&dryRun=All"
        status, answer, _ = lab.request(method, full, None if method == "GET" else body, Content_Type=content_type)
        assert status < 500 or (status == 504 and "resourceVersion" in query), (method, full, status, answer)
        assert status < 400 or answer["kind"] == "Status", (method, full, answer)
        assert lab.registry.store.revision == revision

    run()


def test_a_body_of_twenty_megabytes(lab: Lab) -> None:
    """A 413, whatever it is."""
    body = b'{"metadata":{"annotations":{"a":"' + b"x" * (20 << 20) + b'"}}}'
    for method, path in (("POST", "/api/v1/namespaces/dev/services"), ("PATCH", TARGETS[0]), ("DELETE", TARGETS[0])):
        try:
            status, answer, _ = lab.request(method, path, body, Content_Type=JSON if method != "PATCH" else MERGE)
        except (BrokenPipeError, ConnectionResetError):
            continue  # the server has answered and closed before it had read all of it
        assert (status, answer["kind"]) == (413, "Status")
    assert lab.client.get("services", "dev", "there")["metadata"]["name"] == "there"
