"""Who asks: tokens and what anonymous people hear; certificates; admission of pods and by webhooks."""

# ruff: noqa: E501 (a row of a table is one line)

from __future__ import annotations

import base64
import json
import ssl
from ipaddress import IPv4Address
from typing import Any

import pytest
from registry_support import make_registry, pod, refusal, service

from testbed.api.access import ADMIN, ANONYMOUS, Tokens, refuse_anonymous
from testbed.api.certificates import kubeconfig, make_credentials
from testbed.api.paths import parse_path
from testbed.errors import ApiError
from testbed.model.objects import Object
from testbed.registry.accounts import MOUNT_PATH, ServiceAccountAdmission
from testbed.registry.admission import CONFIGURATIONS, AdmissionRequest, Denial

ACCOUNT: Object = {"metadata": {"name": "web", "namespace": "dev", "uid": "u1"}}


def tokens(now: list[float] | None = None) -> Tokens:
    clock = now or [1000.0]
    return Tokens(b"key", "admin-token", now_s=lambda: clock[0])


def find(namespace: str, name: str) -> Object | None:
    return ACCOUNT if (namespace, name) == ("dev", "web") else None


def test_a_service_accounts_token() -> None:
    """It names its account and groups, carries a real token's claims, and ends in time or with its account."""
    now = [1000.0]
    issuer = tokens(now)
    token = issuer.issue(ACCOUNT, pod={"metadata": {"name": "p", "uid": "u2"}}, seconds=600)
    user = issuer.user_of(token, find)
    assert user is not None and user.name == "system:serviceaccount:dev:web"
    assert set(user.groups) >= {"system:serviceaccounts", "system:serviceaccounts:dev"}
    payload = token.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert (claims["sub"], claims["exp"], claims["kubernetes.io"]["pod"]["name"]) == (user.name, 1600, "p")
    assert issuer.user_of(token, lambda *_: None) is None
    assert issuer.user_of(token, lambda *_: {"metadata": {**ACCOUNT["metadata"], "uid": "another"}}) is None
    now[0] = 1601
    assert issuer.user_of(token, find) is None


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "admin-token2", "é", "\udcff.x", "..", "=.=.="])
def test_tokens_that_are_wrong(token: str) -> None:
    """None of them is anybody's; the administrator's is the administrator's."""
    issuer = tokens()
    assert issuer.user_of(token, find) is None
    assert issuer.user_of("admin-token", find) is ADMIN
    other = Tokens(b"another key", "x", now_s=lambda: 1000.0).issue(ACCOUNT)
    assert issuer.user_of(other, find) is None


@pytest.mark.parametrize(
    ("verb", "path", "text"),
    [
        ("list", "/api/v1/pods", 'pods is forbidden: User "system:anonymous" cannot list resource "pods" in API group "" at the cluster scope'),
        ("get", "/apis/apps/v1/namespaces/dev/deployments/web", 'deployments.apps "web" is forbidden: User "system:anonymous" cannot get resource "deployments" in API group "apps" in the namespace "dev"'),
        ("get", "/api", 'forbidden: User "system:anonymous" cannot get path "/api"'),
    ],
)  # fmt: skip
def test_what_anonymous_people_hear(verb: str, path: str, text: str) -> None:
    """403 in the RBAC authorizer's words; health and version are for everybody."""
    target = parse_path(path)
    error = refusal(refuse_anonymous, ANONYMOUS, verb, target.described() if target else None, path)
    assert (error.code, str(error)) == (403, text)
    refuse_anonymous(ANONYMOUS, "get", None, "/healthz")
    refuse_anonymous(ADMIN, verb, None, path)


def test_certificates_are_good_for_their_names() -> None:
    """The server's is verified for its addresses and names, strictly, by the lab's own authority alone."""
    credentials = make_credentials("lab", names=["kubernetes.default.svc"], addresses=[IPv4Address("10.96.0.1")])
    other = make_credentials("lab", names=["kubernetes.default.svc"], addresses=[IPv4Address("10.96.0.1")])

    def handshake(authority: str, name: str) -> str:
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cadata=authority)
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        with _file(credentials.server + credentials.server_key) as path:
            server.load_cert_chain(path)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ours = client.wrap_bio(to_client, to_server, server_hostname=name)
        theirs = server.wrap_bio(to_server, to_client, server_side=True)
        done: set[Any] = set()
        for _ in range(10):
            for side in (ours, theirs):
                try:
                    side.do_handshake()
                    done.add(side)
                except ssl.SSLWantReadError:
                    continue
                except ssl.SSLError as error:
                    return error.reason or "refused"
            if len(done) == 2:
                return "ok"
        raise AssertionError("the handshake does not end")

    assert handshake(credentials.authority, "10.96.0.1") == "ok"
    assert handshake(credentials.authority, "kubernetes.default.svc") == "ok"
    assert handshake(credentials.authority, "10.96.0.2") == "CERTIFICATE_VERIFY_FAILED"
    assert handshake(other.authority, "10.96.0.1") == "CERTIFICATE_VERIFY_FAILED"
    document = json.loads(kubeconfig("lab", "https://127.0.0.1:1", credentials, "t"))
    assert document["contexts"][0]["name"] == document["current-context"] == "kubernetes-admin@lab"


def _file(text: str) -> Any:
    import contextlib
    import tempfile

    @contextlib.contextmanager
    def written() -> Any:
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(text)
            file.flush()
            yield file.name

    return written()


# --- pods and their accounts ---


def registry_with_accounts() -> Any:
    registry = make_registry()
    registry.admission.mutators.append(ServiceAccountAdmission(registry.store, lambda n: 0))
    registry.create("serviceaccounts", {"metadata": {"name": "default", "namespace": "dev"}})
    return registry


def test_pods_get_their_token() -> None:
    """Account, volume and mounts, as upstream's admission writes them."""
    made = registry_with_accounts().create("pods", pod())
    spec = made["spec"]
    assert (spec["serviceAccountName"], spec["serviceAccount"]) == ("default", "default")
    assert spec["volumes"][0]["name"] == "kube-api-access-bbbbb"
    assert [list(source) for source in spec["volumes"][0]["projected"]["sources"]] == [
        ["serviceAccountToken"], ["configMap"], ["downwardAPI"],
    ]  # fmt: skip
    mount = {"name": "kube-api-access-bbbbb", "readOnly": True, "mountPath": MOUNT_PATH}
    assert spec["containers"][0]["volumeMounts"] == [mount]


def test_pods_that_want_no_token() -> None:
    """automountServiceAccountToken, of the pod before the account's, and mounts of their own at that place."""
    registry = registry_with_accounts()
    assert "volumes" not in registry.create("pods", pod("a", automountServiceAccountToken=False))["spec"]
    metadata = {"name": "quiet", "namespace": "dev"}
    registry.create("serviceaccounts", {"metadata": metadata, "automountServiceAccountToken": False})
    assert "volumes" not in registry.create("pods", pod("b", serviceAccountName="quiet"))["spec"]
    loud = pod("c", serviceAccountName="quiet", automountServiceAccountToken=True)
    assert len(registry.create("pods", loud)["spec"]["volumes"]) == 1
    error = refusal(registry.create, "pods", pod("d", serviceAccountName="nobody"))
    wanted = 'pods "d" is forbidden: error looking up service account dev/nobody: serviceaccount "nobody" not found'
    assert (error.code, str(error)) == (403, wanted)


# --- webhooks in process ---


def configuration(**webhook: Any) -> Object:
    rule = {"operations": ["CREATE", "DELETE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["services"]}
    entry = {
        "name": "check.example.io", "rules": [rule], "clientConfig": {"url": "https://example.io"}, "sideEffects": "None",
        "admissionReviewVersions": ["v1"], **webhook,
    }  # fmt: skip
    return {"metadata": {"name": "check"}, "webhooks": [entry]}


def test_webhooks_are_called_while_a_configuration_names_them() -> None:
    """Denials carry the webhook's name; without configuration, rule or label nobody is asked."""
    registry = make_registry()
    asked: list[AdmissionRequest] = []

    def deny(request: AdmissionRequest) -> Denial | None:
        asked.append(request)
        return Denial("port 80 is mine") if request.operation == "CREATE" else None

    registry.admission.webhooks["check.example.io"] = deny
    registry.create("services", service("before"))
    registry.create(CONFIGURATIONS, configuration())
    error = refusal(registry.create, "services", service("after"))
    wanted = 'admission webhook "check.example.io" denied the request: port 80 is mine'
    assert (error.code, str(error)) == (400, wanted)
    assert registry.store.get("services", "dev", "after") is None
    registry.create("pods", pod())
    registry.patch("services", "dev", "before", {"metadata": {"labels": {"a": "b"}}})
    registry.delete("services", "dev", "before")
    assert [request.operation for request in asked] == ["CREATE", "DELETE"]
    assert asked[1].object is None and asked[1].old is not None
    registry.delete(CONFIGURATIONS, "", "check")
    registry.create("services", service("after"))


@pytest.mark.parametrize(
    "webhook",
    [
        {"objectSelector": {"matchLabels": {"a": "b"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "prod"}}},
        {
            "rules": [
                {"operations": ["*"], "apiGroups": ["*"], "apiVersions": ["*"], "resources": ["*"], "scope": "Cluster"}
            ]
        },
        {"rules": [{"operations": ["*"], "apiGroups": ["apps"], "apiVersions": ["*"], "resources": ["*"]}]},
        {"rules": [{"operations": ["*"], "apiGroups": ["*"], "apiVersions": ["*"], "resources": ["services/status"]}]},
    ],
)
def test_webhooks_that_do_not_match(webhook: dict[str, Any]) -> None:
    """Selectors, scope, group and subresource each keep a webhook out."""
    registry = make_registry()
    registry.admission.webhooks["check.example.io"] = lambda _request: Denial("no")
    registry.create(CONFIGURATIONS, configuration(**webhook))
    registry.create("services", service())


def test_validators_see_what_would_be_stored() -> None:
    """A validator gets the defaulted object, and its refusal stores nothing, also in a dry run."""
    registry = make_registry()
    seen: list[AdmissionRequest] = []

    def check(request: AdmissionRequest) -> None:
        seen.append(request)
        raise ApiError(403, "Forbidden", "not today")

    registry.admission.validators.append(check)
    for dry_run in (True, False):
        assert refusal(registry.create, "services", service(), dry_run=dry_run).code == 403
    assert seen[0].object is not None and seen[0].object["spec"]["clusterIP"].startswith("10.96.")
    assert [request.dry_run for request in seen] == [True, False]
    registry.admission.validators.clear()
    registry.create("services", service(clusterIP=seen[0].object["spec"]["clusterIP"]))
