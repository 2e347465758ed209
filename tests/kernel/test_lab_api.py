"""A lab's API from outside and inside: kubeconfig, TLS, identities, Service kubernetes, pods' tokens."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.lab.folder import state_root

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]
TESTBED = [sys.executable, "-m", "testbed"]
FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"


def command(*argv: str, status: int = 0) -> str:
    done = subprocess.run([*TESTBED, *argv], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def lab() -> Iterator[str]:
    """A lab that the tests of this file share; ``up`` says how to use it."""
    name = f"api-{os.getpid()}"
    said = command("up", name)
    assert f'eval "$(testbed env {name})"' in said and f"testbed kubectl -l {name}" in said
    yield name
    command("down", name)


@pytest.fixture(scope="module")
def kubectl() -> None:
    from testbed.errors import MissingFeature
    from testbed.lab.kubectl import find_kubectl

    try:
        find_kubectl()
    except MissingFeature as error:
        pytest.skip(str(error))


def ask(server: str, path: str, context: ssl.SSLContext, **headers: str) -> tuple[int, Any]:
    host, port = server.removeprefix("https://").split(":")
    connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        body = response.read()
        return response.status, json.loads(body) if body[:1] == b"{" else body.decode()
    finally:
        connection.close()


def test_who_may_ask_from_the_host(lab: str, tmp_path: Path) -> None:
    """The kubeconfig is its owner's alone; without it a user of the machine is refused, but for health and version."""
    import base64

    path = Path(command("kubeconfig", lab).strip())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert command("env", lab) == f"export KUBECONFIG={path}\n"
    settings = json.loads(path.read_text())
    cluster, user = settings["clusters"][0]["cluster"], settings["users"][0]["user"]
    assert cluster["server"].startswith("https://127.0.0.1:")
    authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
    plain = ssl.create_default_context(cadata=authority)
    pods = "/api/v1/namespaces/kube-system/pods"
    status, answer = ask(cluster["server"], pods, plain)
    assert (status, answer["reason"]) == (403, "Forbidden") and "system:anonymous" in answer["message"]
    assert ask(cluster["server"], pods, plain, Authorization="Bearer wrong")[0] == 401
    assert ask(cluster["server"], pods, plain, Authorization=f"Bearer {user['token']}")[0] == 200
    assert ask(cluster["server"], "/version", plain)[1]["gitVersion"].startswith("v1.30.")
    with_certificate = ssl.create_default_context(cadata=authority)
    pair = tmp_path / "admin.pem"
    pair.write_bytes(b"".join(base64.b64decode(user[f"client-{part}-data"]) for part in ("certificate", "key")))
    with_certificate.load_cert_chain(pair)
    assert ask(cluster["server"], pods, with_certificate)[0] == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(cluster["server"], pods, ssl.create_default_context())


@pytest.mark.usefixtures("kubectl")
def test_kubectl_and_a_pods_own_token(lab: str) -> None:
    """kubectl drives the lab; a pod reads the API through Service kubernetes with its token, as its ServiceAccount."""
    command("kubectl", "-l", lab, "create", "namespace", "dev")
    command("kubectl", "-l", lab, "run", "web", "-n", "dev", "--image=nginx")
    command("kubectl", "-l", lab, "wait", "pod/web", "-n", "dev", "--for=condition=Ready", "--timeout=60s")
    assert command("kubectl", "-l", lab, "get", "pods", "-n", "dev", "-l", "run=web", "-o", "name") == "pod/web\n"
    assert command("exec", "-l", lab, "dev/web", "--", "cat", f"{FOLDER}/namespace") == "dev"

    def curl(*more: str, path: str) -> Any:
        argv = ["curl", "-s", "--max-time", "20", "--cacert", f"{FOLDER}/ca.crt", *more, f"https://10.96.0.1{path}"]
        return json.loads(command("exec", "-l", lab, "dev/web", "--", *argv))

    token = command("exec", "-l", lab, "dev/web", "--", "cat", f"{FOLDER}/token")
    bearer = ("-H", f"Authorization: Bearer {token}")
    listed = curl(*bearer, path="/api/v1/namespaces/dev/pods")
    assert [pod["metadata"]["name"] for pod in listed["items"]] == ["web"]
    review = ("-X", "POST", "-H", "Content-Type: application/json", "-d", "{}")
    who = curl(*bearer, *review, path="/apis/authentication.k8s.io/v1/selfsubjectreviews")
    assert who["status"]["userInfo"]["username"] == "system:serviceaccount:dev:default"
    assert curl(path="/api/v1/pods")["code"] == 403
    names = ["--connect-to", "kubernetes.default.svc:443:10.96.0.1:443"]
    argv = [
        "curl",
        "-s",
        "--max-time",
        "20",
        "--cacert",
        f"{FOLDER}/ca.crt",
        *names,
        "https://kubernetes.default.svc/version",
    ]
    assert json.loads(command("exec", "-l", lab, "dev/web", "--", *argv))["minor"] == "30"
    slices = json.loads(command("kubectl", "-l", lab, "get", "endpointslice", "kubernetes", "-o", "json"))
    assert slices["ports"] == [{"name": "https", "port": 6443, "protocol": "TCP"}]


@pytest.mark.usefixtures("kubectl")
def test_kubectls_exit_status_is_ours(lab: str) -> None:
    """Refusals of the API reach the user as they are, with kubectl's own status."""
    done = subprocess.run(
        [*TESTBED, "kubectl", "-l", lab, "get", "pods", "nope"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, 'Error from server (NotFound): pods "nope" not found\n')


def test_a_lab_that_is_gone_has_no_kubeconfig(eventually: Callable[..., Any]) -> None:
    """It goes with the lab's folder, and the port with the lab's processes."""
    name = f"gone-{os.getpid()}"
    command("up", name)
    path = Path(command("kubeconfig", name).strip())
    server = json.loads(path.read_text())["clusters"][0]["cluster"]["server"]
    command("down", name)
    assert not path.exists() and not (state_root() / name).exists()

    def refused() -> bool:
        try:
            ask(server, "/version", ssl._create_unverified_context())
        except ConnectionRefusedError:
            return True
        return False

    assert eventually(refused)
