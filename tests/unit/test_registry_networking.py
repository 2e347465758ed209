"""The registry's rules for Ingresses, IngressClasses, Leases, Secrets of a type, Events and webhook configurations."""

# ruff: noqa: E501 (a row of a table is one line, so that whole texts can be compared and searched)

from __future__ import annotations

from typing import Any

import pytest
from registry_support import make_registry, refusal

from testbed.model.objects import Object
from testbed.registry import Registry
from testbed.registry.ingresses import DefaultIngressClass

INGRESSES = "ingresses.networking.k8s.io"
CLASSES = "ingressclasses.networking.k8s.io"
WEBHOOKS = "validatingwebhookconfigurations.admissionregistration.k8s.io"
BACKEND = {"service": {"name": "web", "port": {"number": 80}}}


@pytest.fixture
def registry() -> Registry:
    return make_registry()


def ingress(
    path: Object | None = None, /, *, annotations: dict[str, str] | None = None, host: str = "", **spec: Any
) -> Object:
    """Return an Ingress ``web`` of one path; fields of ``path`` replace those of a valid one, None removes."""
    one = {"path": "/", "pathType": "Prefix", "backend": BACKEND, **(path or {})}
    one = {key: value for key, value in one.items() if value is not None}
    rules = [{**({"host": host} if host else {}), "http": {"paths": [one]}}]
    return {
        "metadata": {"name": "web", "namespace": "dev", "annotations": annotations or {}},
        "spec": {"rules": rules, **spec},
    }


def ingress_class(name: str = "nginx", controller: str = "k8s.io/ingress-nginx", *, is_default: str = "") -> Object:
    annotations = {"ingressclass.kubernetes.io/is-default-class": is_default} if is_default else {}
    return {"metadata": {"name": name, "annotations": annotations}, "spec": {"controller": controller}}


def webhooks(**changes: Any) -> Object:
    """Return a configuration ``w`` of one webhook."""
    one = {
        "name": "validate.example.com",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "clientConfig": {"service": {"name": "hook", "namespace": "dev"}},
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
        **changes,
    }
    return {"metadata": {"name": "w"}, "webhooks": [{key: value for key, value in one.items() if value is not None}]}


def secret(type_: str, data: dict[str, str] | None = None) -> Object:
    return {"metadata": {"name": "s", "namespace": "dev"}, "type": type_, "data": data or {}}


HOST = "a lowercase RFC 1123 subdomain must consist of"


@pytest.mark.parametrize(
    ("resource", "manifest", "text"),
    [
        pytest.param(
            INGRESSES,
            ingress({"pathType": None}),
            "spec.rules[0].http.paths[0].pathType: Required value: pathType must be specified",
            id="no pathType",
        ),
        pytest.param(
            INGRESSES,
            ingress({"pathType": "X"}),
            'spec.rules[0].http.paths[0].pathType: Unsupported value: "X": supported values: "Exact", "ImplementationSpecific", "Prefix"',
            id="unknown pathType",
        ),
        pytest.param(
            INGRESSES,
            ingress({"path": "web"}),
            'spec.rules[0].http.paths[0].path: Invalid value: "web": must be an absolute path',
            id="relative path",
        ),
        pytest.param(
            INGRESSES,
            ingress({"path": "/a//b"}),
            "spec.rules[0].http.paths[0].path: Invalid value: \"/a//b\": must not contain '//'",
            id="path with two slashes",
        ),
        pytest.param(
            INGRESSES,
            ingress({"path": "/a/.."}),
            "spec.rules[0].http.paths[0].path: Invalid value: \"/a/..\": cannot end with '/..'",
            id="path that leads up",
        ),
        pytest.param(
            INGRESSES,
            ingress({"backend": None}),
            'spec.rules[0].http.paths[0].backend: Invalid value: "": resource or service backend is required',
            id="no backend",
        ),
        pytest.param(
            INGRESSES,
            ingress({"backend": {"service": {"name": "web"}}}),
            "spec.rules[0].http.paths[0].backend: Required value: port name or number is required",
            id="no port",
        ),
        pytest.param(
            INGRESSES,
            ingress({"backend": {"service": {"name": "web", "port": {"name": "http", "number": 80}}}}),
            'spec.rules[0].http.paths[0].backend: Invalid value: "": cannot set both port name & port number',
            id="two ports",
        ),
        pytest.param(
            INGRESSES,
            ingress({"backend": {"service": {"name": "web", "port": {"number": 70000}}}}),
            "spec.rules[0].http.paths[0].backend.service.port.number: Invalid value: 70000: must be between 1 and 65535, inclusive",
            id="port out of range",
        ),
        pytest.param(
            INGRESSES,
            ingress(host="10.0.0.1"),
            'spec.rules[0].host: Invalid value: "10.0.0.1": must be a DNS name, not an IP address',
            id="address as host",
        ),
        pytest.param(
            INGRESSES,
            ingress(host="a.*.com"),
            "spec.rules[0].host: Invalid value: \"a.*.com\": a wildcard DNS-1123 subdomain must start with '*.'",
            id="wildcard in the middle",
        ),
        pytest.param(
            INGRESSES, ingress(host="A.com"), f'spec.rules[0].host: Invalid value: "A.com": {HOST}', id="capitals"
        ),
        pytest.param(
            INGRESSES,
            ingress(rules=[]),
            "spec: Invalid value: []networking.IngressRule(nil): either `defaultBackend` or `rules` must be specified",
            id="nothing",
        ),
        pytest.param(
            INGRESSES,
            ingress(rules=[{"http": {"paths": []}}]),
            "spec.rules[0].http.paths: Required value",
            id="no paths",
        ),
        pytest.param(
            INGRESSES,
            ingress(annotations={"kubernetes.io/ingress.class": "x"}, ingressClassName="y"),
            'annotations.kubernetes.io/ingress.class: Invalid value: "x": can not be set when the class field is also set',
            id="two classes",
        ),
        pytest.param(
            CLASSES,
            ingress_class(controller="nginx"),
            'spec.controller: Invalid value: "nginx": must be a domain-prefixed path (such as "acme.io/foo")',
            id="controller without domain",
        ),
        pytest.param(CLASSES, ingress_class(controller=""), "spec.controller: Required value", id="no controller"),
        pytest.param(
            "leases.coordination.k8s.io",
            {"metadata": {"name": "l", "namespace": "dev"}, "spec": {"leaseDurationSeconds": 0}},
            "spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0",
            id="lease without duration",
        ),
        pytest.param(
            "events",
            {"metadata": {"name": "e", "namespace": "dev"}, "involvedObject": {"namespace": "other"}},
            'involvedObject.namespace: Invalid value: "other": does not match event.namespace',
            id="event of another namespace",
        ),
        pytest.param(
            "secrets",
            secret("kubernetes.io/dockerconfigjson"),
            "data[.dockerconfigjson]: Required value",
            id="registry login without login",
        ),
        pytest.param(
            "secrets", secret("kubernetes.io/ssh-auth"), "data[ssh-privatekey]: Required value", id="ssh without key"
        ),
        pytest.param(
            "secrets",
            secret("kubernetes.io/basic-auth"),
            "data[username]: Required value, data[password]: Required value",
            id="nobody",
        ),
        pytest.param(
            WEBHOOKS,
            webhooks(name="short.name"),
            'webhooks[0].name: Invalid value: "short.name": should be a domain with at least three segments separated by dots',
            id="short webhook name",
        ),
        pytest.param(
            WEBHOOKS,
            webhooks(sideEffects=None),
            "webhooks[0].sideEffects: Required value: must specify one of None, NoneOnDryRun",
            id="no side effects",
        ),
        pytest.param(
            WEBHOOKS,
            webhooks(admissionReviewVersions=[]),
            "webhooks[0].admissionReviewVersions: Required value: must specify one of v1, v1beta1",
            id="no review versions",
        ),
        pytest.param(
            WEBHOOKS,
            webhooks(timeoutSeconds=31),
            "webhooks[0].timeoutSeconds: Invalid value: 31: the timeout value must be between 1 and 30 seconds",
            id="long timeout",
        ),
        pytest.param(
            WEBHOOKS,
            webhooks(clientConfig={}),
            "webhooks[0].clientConfig: Required value: exactly one of url or service is required",
            id="nobody to call",
        ),
        pytest.param(
            WEBHOOKS,
            webhooks(failurePolicy="Maybe"),
            'webhooks[0].failurePolicy: Unsupported value: "Maybe": supported values: "Fail", "Ignore"',
            id="unknown failure policy",
        ),
    ],
)
def test_what_is_refused(registry: Registry, resource: str, manifest: Object, text: str) -> None:
    """A 422 with Kubernetes' text, and nothing is stored."""
    error = refusal(registry.create, resource, manifest)
    assert error.code == 422
    assert text in error.message
    assert registry.list(resource) == []


@pytest.mark.parametrize(
    "manifest",
    [
        pytest.param(ingress({"pathType": "ImplementationSpecific", "path": None}), id="any path"),
        pytest.param(ingress(host="*.example.com"), id="wildcard"),
        pytest.param(ingress(rules=[], defaultBackend=BACKEND), id="default backend only"),
        pytest.param(ingress(rules=[{"host": "a.com"}]), id="a host without paths"),
        pytest.param(ingress({"backend": {"resource": {"kind": "Bucket", "name": "b"}}}), id="a resource"),
        pytest.param(ingress(tls=[{"hosts": ["a.com"], "secretName": "s"}]), id="tls"),
    ],
)
def test_ingresses_that_are_fine(registry: Registry, manifest: Object) -> None:
    """They are stored in their first generation; a change of the spec makes another."""
    created = registry.create(INGRESSES, manifest)
    assert created["metadata"]["generation"] == 1
    changed = registry.patch(INGRESSES, "dev", "web", {"spec": {"ingressClassName": "nginx"}})
    assert changed["metadata"]["generation"] == 2


def test_the_default_class(registry: Registry) -> None:
    """An Ingress that names no class gets the default one; one that names a class in either way is left alone."""
    registry.admission.mutators.append(DefaultIngressClass(registry.store))
    registry.create(CLASSES, ingress_class("other"))
    registry.create(CLASSES, ingress_class("nginx", is_default="true"))
    assert registry.create(INGRESSES, ingress())["spec"]["ingressClassName"] == "nginx"
    for number, named in enumerate(
        (ingress(ingressClassName="other"), ingress(annotations={"kubernetes.io/ingress.class": "x"}))
    ):
        named["metadata"]["name"] = f"web{number}"
        assert registry.create(INGRESSES, named)["spec"].get("ingressClassName") != "nginx"


def test_a_class_keeps_its_controller(registry: Registry) -> None:
    """Its controller is for life."""
    registry.create(CLASSES, ingress_class())
    error = refusal(registry.patch, CLASSES, "", "nginx", {"spec": {"controller": "a.b/c"}})
    assert 'spec.controller: Invalid value: "a.b/c": field is immutable' in error.message


def test_defaults_of_webhooks(registry: Registry) -> None:
    """What is not said is what Kubernetes says."""
    (made,) = registry.create(WEBHOOKS, webhooks())["webhooks"]
    assert (made["failurePolicy"], made["matchPolicy"], made["timeoutSeconds"]) == ("Fail", "Equivalent", 10)
    assert (made["namespaceSelector"], made["objectSelector"]) == ({}, {})
    assert made["rules"][0]["scope"] == "*"
    assert made["clientConfig"]["service"]["port"] == 443
    assert "reinvocationPolicy" not in made
