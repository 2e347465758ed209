"""Webhooks of ours: when they are called, what their denials say, and what happens while nobody answers at their Service."""

from __future__ import annotations

from typing import Any

import pytest
from registry_support import make_registry, pod, refusal, service

from testbed.model.objects import Object
from testbed.registry import Registry
from testbed.registry.admission import AdmissionRequest, Denial

CONFIGURATIONS = "validatingwebhookconfigurations.admissionregistration.k8s.io"
NAME = "validate.example.com"
CALLED = f'Internal error occurred: failed calling webhook "{NAME}": failed to call webhook: '


def configuration(client: Object | None = None, **changes: Any) -> Object:
    """Return a configuration of one webhook about new pods, reached through Service dev/hook."""
    one = {
        "name": NAME,
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "clientConfig": client or {"service": {"name": "hook", "namespace": "dev", "path": "/check"}},
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
        **changes,
    }
    return {"metadata": {"name": "w"}, "webhooks": [one]}


def endpoints(*, ready: bool = True, port: str = "https") -> Object:
    """Return Endpoints of dev/hook with one address."""
    place = "addresses" if ready else "notReadyAddresses"
    subset = {place: [{"ip": "10.244.1.5"}], "ports": [{"name": port, "port": 8443}]}
    return {"metadata": {"name": "hook", "namespace": "dev"}, "subsets": [subset]}


HOOK = service("hook", ports=[{"name": "https", "port": 443, "targetPort": 8443}])


def make(denial: Denial | None, *objects: tuple[str, Object]) -> tuple[Registry, list[AdmissionRequest]]:
    """Return a registry with these objects and a webhook that says ``denial``, and what it has been asked."""
    registry = make_registry()
    asked: list[AdmissionRequest] = []

    def webhook(request: AdmissionRequest) -> Denial | None:
        asked.append(request)
        return denial

    registry.admission.webhooks[NAME] = webhook
    for resource, obj in objects:
        registry.create(resource, obj)
    return registry, asked


@pytest.mark.parametrize(
    ("denial", "code", "reason"),
    [
        pytest.param(Denial("no"), 400, "BadRequest", id="without a code of its own (ingress-nginx)"),
        pytest.param(Denial.forbidden("no"), 403, "Forbidden", id="controller-runtime's (openelb)"),
    ],
)
def test_a_denial_says_who_and_why(denial: Denial, code: int, reason: str) -> None:
    """A denial carries the webhook's name, its words, and its code and reason."""
    registry, asked = make(
        denial, ("services", HOOK), ("endpoints", endpoints()), (CONFIGURATIONS, configuration())
    )  # fmt: skip
    error = refusal(registry.create, "pods", pod())
    assert (error.code, error.reason) == (code, reason)
    assert error.message == f'admission webhook "{NAME}" denied the request: no'
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("objects", "changes", "text"),
    [
        pytest.param((), {}, 'service "hook" not found', id="no Service"),
        pytest.param((("services", HOOK),), {}, 'no endpoints available for service "hook"', id="no Endpoints"),
        pytest.param(
            (("services", HOOK), ("endpoints", endpoints(ready=False))),
            {},
            'no endpoints available for service "hook"',
            id="the controller's pod is not ready",
        ),
        pytest.param(
            (("services", HOOK), ("endpoints", endpoints(port="metrics"))),
            {},
            'no endpoints available for service "hook"',
            id="endpoints of another port",
        ),
        pytest.param(
            (("services", service("hook", ports=[{"port": 80}])),),
            {},
            'no service port 443 found for service "hook"',
            id="the Service has no such port",
        ),
        pytest.param(
            (("services", service("hook", ports=[], type="ExternalName", externalName="a.example.com")),),
            {},
            'unsupported service type "ExternalName"',
            id="an ExternalName",
        ),
    ],
)
def test_a_webhook_nobody_answers_for_fails_the_write(
    objects: tuple[tuple[str, Object], ...], changes: Object, text: str
) -> None:
    """With failurePolicy Fail, the default, a write that a webhook should see is a 500 in upstream's words."""
    registry, asked = make(None, *objects, (CONFIGURATIONS, configuration(**changes)))
    error = refusal(registry.create, "pods", pod())
    assert (error.code, error.reason) == (500, "InternalError")
    assert error.message == f'{CALLED}Post "https://hook.dev.svc:443/check?timeout=10s": {text}'
    assert registry.list("pods") == [] and asked == []


def test_the_url_of_a_failed_call_is_that_of_the_configuration() -> None:
    """Port, path and time-out come from the configuration."""
    client = {"service": {"name": "hook", "namespace": "dev", "port": 8443}}
    registry, _ = make(None, (CONFIGURATIONS, configuration(client, timeoutSeconds=29)))
    error = refusal(registry.create, "pods", pod())
    assert 'Post "https://hook.dev.svc:8443/?timeout=29s": service "hook" not found' in error.message


def test_a_webhook_that_may_be_ignored_lets_pass_while_nobody_answers() -> None:
    """failurePolicy Ignore: without endpoints the write passes; with them the webhook decides."""
    registry, asked = make(Denial("no"), (CONFIGURATIONS, configuration(failurePolicy="Ignore")))
    registry.create("pods", pod("early"))
    assert asked == []
    registry.create("services", HOOK)
    registry.create("endpoints", endpoints())
    assert refusal(registry.create, "pods", pod("late")).code == 400


def test_only_what_the_rules_name_needs_the_service() -> None:
    """A write outside the rules passes while the webhook cannot be reached."""
    registry, _ = make(None, (CONFIGURATIONS, configuration()))
    registry.create("configmaps", {"metadata": {"name": "c", "namespace": "dev"}})


def test_a_webhook_by_url_needs_no_service() -> None:
    """It is asked."""
    registry, asked = make(None, (CONFIGURATIONS, configuration({"url": "https://example.com/check"})))
    registry.create("pods", pod())
    assert len(asked) == 1


def test_without_its_configuration_a_webhook_is_not_asked() -> None:
    """Deleting the configuration switches the check off; webhooks that nobody here implements change nothing."""
    registry, asked = make(Denial("no"), (CONFIGURATIONS, configuration(name="other.example.com")))
    registry.create("pods", pod())
    registry.create(CONFIGURATIONS, {**configuration(), "metadata": {"name": "ours"}})
    assert refusal(registry.create, "pods", pod("b")).code == 500
    registry.delete(CONFIGURATIONS, "", "ours")
    registry.create("pods", pod("c"))
    assert asked == []
