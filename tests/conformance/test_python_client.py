"""The Python ``kubernetes`` client: typed calls, patches, watches that resume, the dynamic client, kubectl proxy."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import HERE, Server

kubernetes = pytest.importorskip("kubernetes", reason="the Python kubernetes client is not installed: ./dev setup")
from kubernetes import client, config, dynamic, watch  # noqa: E402


@contextmanager
def closing_all(api: Any) -> Iterator[Any]:
    """Close a client and its kept-alive connections, which its own ``close`` leaves to the garbage collector."""
    with api:
        try:
            yield api
        finally:
            api.rest_client.pool_manager.clear()


@pytest.fixture
def api(server: Server) -> Iterator[Any]:
    """The typed client's connection."""
    with closing_all(config.new_client_from_config(str(server.kubeconfig))) as api:
        yield api


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"ports": [{"port": 80}], **spec},
    }


def test_typed_calls(api: Any) -> None:
    """Create, read, replace, patch in three ways, list by label, delete, and errors as ApiException."""
    core, apps = client.CoreV1Api(api), client.AppsV1Api(api)
    made = core.create_namespaced_service("default", service("web"))
    assert made.spec.type == "ClusterIP" and made.spec.cluster_ip.startswith("10.")
    made.spec.type = "NodePort"
    assert core.replace_namespaced_service("web", "default", made).spec.ports[0].node_port >= 30086
    merged = core.patch_namespaced_service("web", "default", {"metadata": {"labels": {"tier": "x"}}})
    assert merged.metadata.labels == {"app": "web", "tier": "x"}
    operations = [{"op": "replace", "path": "/spec/ports/0/port", "value": 81}]
    assert core.patch_namespaced_service("web", "default", operations).spec.ports[0].port == 81
    listed = core.list_namespaced_service("default", label_selector="tier=x")
    assert [item.metadata.name for item in listed.items] == ["web"]
    body = client.V1Deployment(
        metadata=client.V1ObjectMeta(name="d"),
        spec=client.V1DeploymentSpec(
            selector=client.V1LabelSelector(match_labels={"a": "b"}),
            template=client.V1PodTemplateSpec(
                metadata=client.V1ObjectMeta(labels={"a": "b"}),
                spec=client.V1PodSpec(containers=[client.V1Container(name="c", image="nginx")]),
            ),
        ),
    )
    apps.create_namespaced_deployment("default", body)
    scaled = apps.patch_namespaced_deployment_scale("d", "default", {"spec": {"replicas": 2}})
    assert scaled.spec.replicas == 2
    patch = {"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "nginx:2"}]}}}}
    assert apps.patch_namespaced_deployment("d", "default", patch).spec.template.spec.containers[0].image == "nginx:2"
    core.delete_namespaced_service("web", "default")
    with pytest.raises(client.ApiException) as refused:
        core.read_namespaced_service("web", "default")
    assert refused.value.status == 404 and json.loads(refused.value.body)["reason"] == "NotFound"
    made.metadata.resource_version = "1"
    core.create_namespaced_service("default", service("web"))
    with pytest.raises(client.ApiException) as stale:
        core.replace_namespaced_service("web", "default", made)
    assert stale.value.status == 409


def test_pages(api: Any) -> None:
    """limit and continue bring every object once, as of the first page."""
    core = client.CoreV1Api(api)
    for number in range(7):
        core.create_namespaced_config_map("default", {"metadata": {"name": f"c{number}"}})
    names, token = [], None
    while True:
        page = core.list_namespaced_config_map("default", limit=3, _continue=token)
        names += [item.metadata.name for item in page.items]
        token = page.metadata._continue
        if len(names) == 3:
            core.delete_namespaced_config_map("c6", "default")
            core.create_namespaced_config_map("default", {"metadata": {"name": "c5x"}})
        if not token:
            break
    assert names == [f"c{number}" for number in range(7)], "the pages show one moment"


def test_watch_resumes(api: Any) -> None:
    """A watch from where an earlier one stopped brings the rest, and nothing twice."""
    core = client.CoreV1Api(api)
    start = core.list_namespaced_service("default").metadata.resource_version
    for name in ("a", "b", "c"):
        core.create_namespaced_service("default", service(name))

    def take(version: str, count: int) -> list[tuple[str, str, str]]:
        stream, seen = watch.Watch(), []
        for event in stream.stream(
            core.list_namespaced_service, "default", resource_version=version, timeout_seconds=10
        ):
            metadata = event["object"].metadata
            seen.append((event["type"], metadata.name, metadata.resource_version))
            if len(seen) == count:
                stream.stop()
        return seen

    first = take(start, 2)
    core.delete_namespaced_service("a", "default")
    rest = take(first[-1][2], 2)
    assert [entry[:2] for entry in first + rest] == [("ADDED", "a"), ("ADDED", "b"), ("ADDED", "c"), ("DELETED", "a")]


def test_dynamic_client(server: Server, api: Any) -> None:
    """Discovery, custom resources, apply by patch, and watches through the dynamic client."""
    import yaml

    cache = server.folder / "discovery.json"
    found = dynamic.DynamicClient(api, cache_file=str(cache))
    assert found.version["kubernetes"]["gitVersion"].startswith("v1.30.")
    definition = yaml.safe_load((HERE / "manifests" / "crd.yaml").read_text())
    found.resources.get(api_version="apiextensions.k8s.io/v1", kind="CustomResourceDefinition").create(body=definition)
    found.resources.invalidate_cache()
    eips = found.resources.get(api_version="network.example.io/v1alpha2", kind="Eip")
    body = {
        "apiVersion": "network.example.io/v1alpha2",
        "kind": "Eip",
        "metadata": {"name": "p"},
        "spec": {"address": "1.2.3.4"},
    }
    assert eips.create(body=body, namespace="default").spec.protocol == "layer2"
    patch = {"spec": {"replicas": 3}}
    patched = eips.patch(name="p", namespace="default", body=patch, content_type="application/merge-patch+json")
    assert patched.spec.replicas == 3
    assert [item.metadata.name for item in eips.get(namespace="default").items] == ["p"]
    with closing(eips.watch(namespace="default", timeout=5)) as events:
        assert next(events)["object"].metadata.name == "p"
    eips.delete(name="p", namespace="default")


def test_custom_objects_api(server: Server, api: Any, kubectl: Path) -> None:
    """Custom objects come and go by the untyped calls, and deleting the definition takes them along."""
    assert server.kubectl("apply", "-f", "crd.yaml", program=kubectl).returncode == 0
    custom = client.CustomObjectsApi(api)
    where = ("network.example.io", "v1alpha2", "default", "eips")
    body = {
        "apiVersion": "network.example.io/v1alpha2",
        "kind": "Eip",
        "metadata": {"name": "p"},
        "spec": {"address": "1.2.3.4"},
    }
    custom.create_namespaced_custom_object(*where, body)
    assert len(custom.list_namespaced_custom_object(*where)["items"]) == 1
    client.ApiextensionsV1Api(api).delete_custom_resource_definition("eips.network.example.io")
    with pytest.raises(client.ApiException):
        custom.list_namespaced_custom_object(*where)


def test_token_alone(server: Server) -> None:
    """The bearer token of the kubeconfig does without the certificate."""
    settings = client.Configuration()
    authority = server.folder / "ca.crt"
    authority.write_text(server.credentials.authority)
    settings.host = f"https://127.0.0.1:{server.port}"
    settings.ssl_ca_cert = str(authority)
    settings.api_key = {"authorization": "Bearer the-administrator"}
    with closing_all(client.ApiClient(settings)) as api:
        assert client.CoreV1Api(api).list_node().items
        review = client.AuthenticationV1Api(api).create_self_subject_review({"metadata": {}})
        assert review.status.user_info.username == "kubernetes-admin"


def test_kubectl_proxy(server: Server, kubectl: Path, eventually: Callable[..., Any]) -> None:
    """kubectl proxy hands the API on without credentials."""
    env = {"KUBECONFIG": str(server.kubeconfig), "HOME": str(server.folder)}
    command = [str(kubectl), "proxy", "--port=0"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().rsplit(" ", 1)[1].strip()
            with urllib.request.urlopen(f"http://{address}/api/v1/nodes", timeout=10) as answer:
                nodes = json.load(answer)["items"]
        finally:
            process.terminate()
            process.communicate(timeout=10)
    assert [node["metadata"]["name"] for node in nodes] == ["node1", "node2", "node3"]
