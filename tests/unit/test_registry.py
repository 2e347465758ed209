"""The registry's rules for objects other than Services: defaults, what may change, deletion, generated names."""

# ruff: noqa: E501 (a row of a table is one line, so that whole texts can be compared and searched)

from __future__ import annotations

import re
from typing import Any

import pytest
from registry_support import NOW, deployment, make_registry, pod, refusal, service

from testbed.model.objects import Object
from testbed.registry import Registry
from testbed.store import Event

SUBDOMAIN = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an "
    "alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*"
    "[a-z0-9])?)*')"
)


@pytest.fixture
def registry() -> Registry:
    return make_registry()


def config_map(data: dict[str, str], **fields: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "cm", "namespace": "dev"},
        "data": data,
        **fields,
    }


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resource", "manifest", "text"),
    [
        pytest.param("deployments.apps", deployment(labels={"app": "x"}), 'Deployment.apps "web" is invalid: spec.template.metadata.labels: Invalid value: map[string]string{"app":"x"}: `selector` does not match template `labels`', id="selector does not match"),
        pytest.param("deployments.apps", deployment(selector=None), 'Deployment.apps "web" is invalid: spec.selector: Required value', id="no selector"),
        pytest.param("deployments.apps", deployment(replicas=-1), 'Deployment.apps "web" is invalid: spec.replicas: Invalid value: -1: must be greater than or equal to 0', id="negative replicas"),
        pytest.param("deployments.apps", deployment(strategy={"type": "X"}), 'Deployment.apps "web" is invalid: spec.strategy.type: Unsupported value: "X": supported values: "Recreate", "RollingUpdate"', id="bad strategy"),
        pytest.param("pods", pod("A"), f'Pod "A" is invalid: metadata.name: Invalid value: "A": {SUBDOMAIN}', id="name"),
        pytest.param("pods", pod("a/b"), f'Pod "a/b" is invalid: metadata.name: Invalid value: "a/b": {SUBDOMAIN}', id="name that is a path"),
        pytest.param("pods", pod("a\nb"), f'Pod "a\nb" is invalid: metadata.name: Invalid value: "a\\nb": {SUBDOMAIN}', id="name with a newline"),
        pytest.param("pods", pod(containers=[]), 'Pod "a" is invalid: spec.containers: Required value', id="no containers"),
        pytest.param("pods", pod(containers=[{"name": "c"}]), 'Pod "a" is invalid: spec.containers[0].image: Required value', id="no image"),
        pytest.param("pods", pod(containers=[{"name": "c", "image": "i"}] * 2), 'Pod "a" is invalid: spec.containers[1].name: Duplicate value: "c"', id="one container name twice"),
        pytest.param("pods", pod(containers=[{"name": "c", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/x"}]}]), 'Pod "a" is invalid: spec.containers[0].volumeMounts[0].name: Not found: "v"', id="mount of no volume"),
        pytest.param("pods", pod(volumes=[{"name": "v", "emptyDir": {}}], containers=[{"name": "c", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/x:y"}]}]), "Pod \"a\" is invalid: spec.containers[0].volumeMounts[0].mountPath: Invalid value: \"/x:y\": must not contain ':'", id="mount path with a colon"),
        pytest.param("pods", pod(containers=[{"name": "c", "image": "i", "ports": [{"containerPort": 70000}]}]), 'Pod "a" is invalid: spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive', id="container port"),
        pytest.param("pods", pod(restartPolicy="X"), 'Pod "a" is invalid: spec.restartPolicy: Unsupported value: "X": supported values: "Always", "Never", "OnFailure"', id="restart policy"),
        pytest.param("pods", pod(volumes=[{"name": "v", "configMap": {"name": "c", "items": [{"key": "k", "path": "../etc"}]}}]), "Pod \"a\" is invalid: spec.volumes[0].configMap.items[0].path: Invalid value: \"../etc\": must not contain '..'", id="item outside its volume"),
        pytest.param("configmaps", config_map({"../x": "y"}), "ConfigMap \"cm\" is invalid: [data[../x]: Invalid value: \"../x\": a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+'), data[../x]: Invalid value: \"../x\": must not start with '..']", id="config key that is a path"),
        pytest.param("configmaps", config_map({"..": "y"}), "ConfigMap \"cm\" is invalid: data[..]: Invalid value: \"..\": must not be '..'", id="config key .."),
        pytest.param("endpoints", {"metadata": {"name": "e", "namespace": "dev"}, "subsets": [{"addresses": [{"ip": "127.0.0.1"}], "ports": [{"port": 80}]}]}, 'Endpoints "e" is invalid: subsets[0].addresses[0].ip: Invalid value: "127.0.0.1": may not be in the loopback range (127.0.0.0/8, ::1/128)', id="loopback endpoint"),
        pytest.param("endpointslices.discovery.k8s.io", {"metadata": {"name": "e", "namespace": "dev"}, "addressType": "IPv4", "endpoints": [{"addresses": ["fd00::1"]}]}, 'EndpointSlice.discovery.k8s.io "e" is invalid: endpoints[0].addresses[0]: Invalid value: "fd00::1": must be a valid IPv4 address', id="slice of another family"),
        pytest.param("namespaces", {"metadata": {"name": "a.b"}}, "Namespace \"a.b\" is invalid: metadata.name: Invalid value: \"a.b\": a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')", id="namespace name"),
    ],
)  # fmt: skip
def test_refused_in_kubernetes_words(registry: Registry, resource: str, manifest: Object, text: str) -> None:
    """A wrong object is refused with the text of a real API server, and nothing is stored."""
    revision = registry.store.revision
    error = refusal(registry.create, resource, manifest)
    assert str(error) == text
    assert (error.code, error.reason) == (422, "Invalid")
    assert registry.store.revision == revision


# --- defaults --------------------------------------------------------------------------------------------------------


def test_defaults_of_a_pod(registry: Registry) -> None:
    """A pod of one container gets the defaults of API and admission, and starts Pending."""
    container = {
        "name": "c",
        "image": "nginx",
        "ports": [{"containerPort": 80}],
        "readinessProbe": {"httpGet": {"port": 80}},
    }
    stored = registry.create("pods", pod(containers=[container]))
    spec = stored["spec"]
    assert {key: value for key, value in spec.items() if key not in ("containers", "tolerations")} == {
        "restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler", "enableServiceLinks": True,
        "terminationGracePeriodSeconds": 30, "securityContext": {}, "serviceAccountName": "default", "serviceAccount": "default",
    }  # fmt: skip
    assert spec["containers"] == [{
        "name": "c", "image": "nginx", "imagePullPolicy": "Always", "resources": {},
        "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
        "ports": [{"containerPort": 80, "protocol": "TCP"}],
        "readinessProbe": {
            "httpGet": {"port": 80, "path": "/", "scheme": "HTTP"},
            "timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3,
        },
    }]  # fmt: skip
    assert [(each["key"], each["tolerationSeconds"]) for each in spec["tolerations"]] == [
        ("node.kubernetes.io/not-ready", 300), ("node.kubernetes.io/unreachable", 300),
    ]  # fmt: skip
    assert stored["status"] == {"phase": "Pending", "qosClass": "BestEffort"}


@pytest.mark.parametrize(
    ("image", "policy"),
    [("nginx", "Always"), ("nginx:latest", "Always"), ("nginx:1.25", "IfNotPresent"), ("host:5000/nginx", "Always"), ("nginx@sha256:00", "IfNotPresent")],
)  # fmt: skip
def test_pull_policy_follows_the_tag(registry: Registry, image: str, policy: str) -> None:
    """Only a tag other than latest, or a digest, makes IfNotPresent the default."""
    stored = registry.create("pods", pod(containers=[{"name": "c", "image": image}]))
    assert stored["spec"]["containers"][0]["imagePullPolicy"] == policy


def test_defaults_of_workloads(registry: Registry) -> None:
    """Deployments roll by 25 %, DaemonSets one by one; a template gets pod defaults, but no admission's."""
    spec = registry.create("deployments.apps", deployment())["spec"]
    assert (spec["replicas"], spec["revisionHistoryLimit"], spec["progressDeadlineSeconds"]) == (1, 10, 600)
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}}
    assert spec["template"]["spec"]["restartPolicy"] == "Always"
    assert "tolerations" not in spec["template"]["spec"] and "serviceAccountName" not in spec["template"]["spec"]
    daemon_set = {**deployment("ds"), "kind": "DaemonSet"}
    spec = registry.create("daemonsets.apps", daemon_set)["spec"]
    assert spec["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}}


def test_secrets_take_plain_text(registry: Registry) -> None:
    """stringData becomes base64 data; data that is no base64 is refused."""
    secret = {"metadata": {"name": "s", "namespace": "dev"}, "data": {"a": "eA=="}, "stringData": {"b": "ü"}}
    stored = registry.create("secrets", secret)
    assert (stored["data"], stored["type"], "stringData" in stored) == ({"a": "eA==", "b": "w7w="}, "Opaque", False)
    assert refusal(registry.create, "secrets", {**secret, "data": {"a": "%"}}).code == 400


def test_namespaces_carry_their_name_as_a_label(registry: Registry) -> None:
    """The label is there from the start, with the finalizer and the phase."""
    found = registry.get("namespaces", "", "dev")
    assert found["metadata"]["labels"] == {"kubernetes.io/metadata.name": "dev"}
    assert (found["spec"], found["status"]) == ({"finalizers": ["kubernetes"]}, {"phase": "Active"})


def test_kinds_without_rules_are_stored_as_they_are(registry: Registry) -> None:
    """RBAC and other kinds that nothing acts on keep what they were given."""
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "system:x"},
        "rules": [{"verbs": ["get"]}],
    }
    assert registry.create("clusterroles.rbac.authorization.k8s.io", role)["rules"] == [{"verbs": ["get"]}]
    assert registry.list("clusterroles.rbac.authorization.k8s.io")
    assert refusal(registry.list, "unknowns").code == 404


# --- updates ---------------------------------------------------------------------------------------------------------


def test_generation_counts_changes_of_the_spec(registry: Registry) -> None:
    """Labels and status leave the generation alone; the spec raises it."""
    created = registry.create("deployments.apps", deployment())
    assert created["metadata"]["generation"] == 1
    labelled = registry.patch("deployments.apps", "dev", "web", {"metadata": {"labels": {"a": "b"}}})
    assert labelled["metadata"]["generation"] == 1
    registry.patch("deployments.apps", "dev", "web", {"status": {"replicas": 3}}, subresource="status")
    scaled = registry.patch("deployments.apps", "dev", "web", {"spec": {"replicas": 3}})
    assert (scaled["metadata"]["generation"], scaled["status"]) == (2, {"replicas": 3})


def test_the_selector_of_a_workload_is_for_life(registry: Registry) -> None:
    """A changed selector is refused in Kubernetes' words."""
    registry.create("deployments.apps", deployment())
    changed = deployment(labels={"app": "x"}, selector={"matchLabels": {"app": "x"}})
    assert str(refusal(registry.update, "deployments.apps", changed)) == (
        'Deployment.apps "web" is invalid: spec.selector: Invalid value: v1.LabelSelector{MatchLabels:map[string]string{"app":"x"}, '
        "MatchExpressions:[]v1.LabelSelectorRequirement(nil)}: field is immutable"
    )


def test_a_pod_hardly_changes(registry: Registry) -> None:
    """Image, node (once) and labels may change; anything else of the spec may not."""
    registry.create("pods", pod())
    registry.patch("pods", "dev", "a", {"spec": {"nodeName": "node1"}})
    current = registry.get("pods", "dev", "a")
    image = {**current["spec"]["containers"][0], "image": "nginx:1.26"}
    registry.update("pods", {**current, "spec": {**current["spec"], "containers": [image]}})
    for change in ({"nodeName": "node2"}, {"hostNetwork": True}, {"containers": [{**image, "command": ["x"]}]}):
        error = refusal(registry.patch, "pods", "dev", "a", {"spec": change})
        assert str(error).startswith(
            'Pod "a" is invalid: spec: Forbidden: pod updates may not change fields other than '
        ), change
    error = refusal(registry.patch, "pods", "dev", "a", {"spec": {"containers": [image, {**image, "name": "b"}]}})
    assert str(error) == 'Pod "a" is invalid: spec.containers: Forbidden: pod updates may not add or remove containers'


def test_stale_and_foreign_writes_conflict(registry: Registry) -> None:
    """A write with an older resourceVersion or another uid is refused; the object stays."""
    old = registry.create("configmaps", config_map({"a": "1"}))
    registry.update("configmaps", config_map({"a": "2"}))
    assert refusal(registry.update, "configmaps", {**old, "data": {}}).code == 409
    foreign = {**config_map({}), "metadata": {"name": "cm", "namespace": "dev", "uid": "other"}}
    assert refusal(registry.update, "configmaps", foreign).code == 409
    assert registry.get("configmaps", "dev", "cm")["data"] == {"a": "2"}


def test_the_same_again_makes_no_event(registry: Registry) -> None:
    """Writing the manifest again, without what the server filled in, changes nothing."""
    for resource, manifest in (
        ("services", service()),
        ("pods", pod()),
        ("deployments.apps", deployment()),
        ("configmaps", config_map({"a": "b"})),
    ):
        stored = registry.create(resource, manifest)
        seen: list[Event] = []
        subscription = registry.store.subscribe(seen.append)
        assert registry.update(resource, manifest) is stored
        assert seen == [], resource
        subscription.cancel()


def test_immutable_data_stays(registry: Registry) -> None:
    """An immutable ConfigMap keeps its data and cannot become mutable."""
    registry.create("configmaps", config_map({"a": "1"}, immutable=True))
    error = refusal(registry.update, "configmaps", config_map({"a": "2"}))
    assert [cause.field for cause in error.causes] == ["immutable", "data"]


def test_what_is_stored_belongs_to_the_registry(registry: Registry) -> None:
    """Changing a manifest after it was stored does not change the stored object."""
    manifest = service(selector={"a": "b"})
    registry.create("services", manifest)
    manifest["spec"]["selector"]["a"] = "c"
    assert registry.get("services", "dev", "web")["spec"]["selector"] == {"a": "b"}


# --- names -----------------------------------------------------------------------------------------------------------


def test_generated_names(registry: Registry) -> None:
    """generateName adds five characters of the alphabet without vowels, and finds free names."""
    manifest = pod()
    manifest["metadata"] = {"generateName": "web-", "namespace": "dev"}
    names = {registry.create("pods", manifest)["metadata"]["name"] for _ in range(50)}
    assert len(names) == 50
    assert all(re.fullmatch("web-[bcdfghjklmnpqrstvwxz2456789]{5}", name) for name in names)
    assert (
        refusal(registry.create, "pods", {**pod(), "metadata": {"generateName": "A/", "namespace": "dev"}}).code == 422
    )


# --- deletion --------------------------------------------------------------------------------------------------------


def test_a_running_pod_gets_its_grace_period(registry: Registry) -> None:
    """Deleting says until when; a shorter period may be asked for later, zero removes at once."""
    registry.create("pods", pod(nodeName="node1"))
    first = registry.delete("pods", "dev", "a")["metadata"]
    assert (first["deletionTimestamp"], first["deletionGracePeriodSeconds"]) == ("2024-01-01T00:00:30Z", 30)
    assert registry.delete("pods", "dev", "a", grace_s=60)["metadata"]["deletionGracePeriodSeconds"] == 30
    assert registry.delete("pods", "dev", "a", grace_s=5)["metadata"]["deletionTimestamp"] == "2024-01-01T00:00:05Z"
    registry.delete("pods", "dev", "a", grace_s=0)
    assert registry.list("pods") == []


@pytest.mark.parametrize("how", ["never scheduled", "finished"])
def test_pods_that_do_not_run_go_at_once(registry: Registry, how: str) -> None:
    """No kubelet would end a pod without a node, and a finished one needs no time."""
    registry.create("pods", pod() if how == "never scheduled" else pod(nodeName="node1"))
    if how == "finished":
        registry.patch("pods", "dev", "a", {"status": {"phase": "Succeeded"}}, subresource="status")
    registry.delete("pods", "dev", "a")
    assert registry.list("pods") == []


def test_finalizers_hold_deletion(registry: Registry) -> None:
    """An object with finalizers waits; when the last one is removed, it goes, and what it held is free."""
    held = service(clusterIP="10.96.1.1")
    held["metadata"]["finalizers"] = ["example.com/a", "example.com/b"]
    registry.create("services", held)
    assert registry.delete("services", "dev", "web")["metadata"]["deletionTimestamp"] == NOW
    registry.patch("services", "dev", "web", {"metadata": {"finalizers": ["example.com/b"]}})
    assert registry.list("services")
    assert "already allocated" in str(refusal(registry.create, "services", service("b", clusterIP="10.96.1.1")))
    registry.patch("services", "dev", "web", {"metadata": {"finalizers": None}})
    assert registry.list("services") == []
    registry.create("services", service("b", clusterIP="10.96.1.1"))


def test_a_finalizer_of_a_pod_outlasts_its_grace_period(registry: Registry) -> None:
    """Removing the finalizer before the kubelet is done does not remove the pod."""
    manifest = pod(nodeName="node1")
    manifest["metadata"]["finalizers"] = ["example.com/a"]
    registry.create("pods", manifest)
    registry.delete("pods", "dev", "a")
    registry.patch("pods", "dev", "a", {"metadata": {"finalizers": None}})
    assert registry.list("pods"), "the kubelet has not reported its end"
    registry.delete("pods", "dev", "a", grace_s=0)
    assert registry.list("pods") == []


def test_a_namespace_terminates_until_it_is_finalized(registry: Registry) -> None:
    """Nothing new may be made in a terminating namespace; it goes once its controller says that it is empty."""
    terminating = registry.delete("namespaces", "", "dev")
    assert (terminating["status"]["phase"], terminating["metadata"]["deletionTimestamp"]) == ("Terminating", NOW)
    error = refusal(registry.create, "pods", pod())
    assert (error.code, str(error)) == (
        403, 'pods "a" is forbidden: unable to create new content in namespace dev because it is being terminated',
    )  # fmt: skip
    registry.finalize_namespace("dev")
    assert registry.store.get("namespaces", "", "dev") is None
    assert (
        str(refusal(registry.delete, "namespaces", "", "default"))
        == 'namespaces "default" is forbidden: this namespace may not be deleted'
    )


def test_preconditions_of_deletion(registry: Registry) -> None:
    """A deletion meant for another uid or revision is a conflict."""
    registry.create("configmaps", config_map({}))
    assert refusal(registry.delete, "configmaps", "dev", "cm", uid="other").code == 409
    assert refusal(registry.delete, "configmaps", "dev", "cm", resource_version="999").code == 409
    assert registry.list("configmaps", "dev")
