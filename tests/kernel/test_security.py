"""What a lab keeps from other users of the machine, and from the text of manifests and scenarios (docs/isolation.md).

One lab serves all of it. ``nobody`` stands for another user.
"""

# ruff: noqa: E501  # tables

from __future__ import annotations

import base64
import contextlib
import copy
import hmac
import http.client
import io
import itertools
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import hostile_texts
from machine import processes_below

from testbed.errors import ApiError, MissingFeature
from testbed.kernel.pace import patient
from testbed.lab.handle import Lab
from testbed.lab.kubectl import find_kubectl
from testbed.lab.start import start_lab
from testbed.manifests import load_scenario
from testbed.manifests.kinds import validate_object
from testbed.manifests.topology import load_topology
from testbed.scenario.runner import run_scenario

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]
NOBODY = 65534


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab with a namespace ``dev``, a Service with an echo server, and a shell with the machine's programs."""
    topology = load_topology(ROOT / "topologies/three-nodes.yaml")
    with start_lab(topology, name=f"secure-{os.getpid()}", proxy_mode="iptables", attached=True) as made:
        for obj in yaml.safe_load_all(_OBJECTS):
            made.api.create(obj)
        _until_ready(made, "web", "shell")
        yield made


_OBJECTS = """
{apiVersion: v1, kind: Namespace, metadata: {name: dev}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: dev, labels: {app: web}}
spec: {containers: [{name: web, image: echo, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: dev}
spec: {selector: {app: web}, clusterIP: 10.96.0.80, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: shell, namespace: dev}
spec: {containers: [{name: shell, image: client}]}
"""


def _until_ready(lab: Lab, *names: str) -> None:
    def ready() -> bool:
        pods, _ = lab.api.list("pods", "dev")
        found = {pod["metadata"]["name"]: pod for pod in pods}
        return all(
            any(
                one["type"] == "Ready" and one["status"] == "True"
                for one in found[name]["status"].get("conditions", ())
            )
            for name in names
        )

    deadline = time.monotonic() + patient(60)
    while not ready():
        assert time.monotonic() < deadline, f"not ready: {names}"
        time.sleep(0.05)


# --- other users -------------------------------------------------------------------------------------------------------

_AS_NOBODY = """
import os, socket, sys
folder = sys.argv[1]
for name in ("kubeconfig", "lab.log", "lab.json", "lock", "private"):
    try:
        open(f"{folder}/{name}")
        print("opened", name)
    except OSError:
        pass
for name in ("spawner.sock", "api/api.sock"):
    with socket.socket(socket.AF_UNIX) as made:
        try:
            made.connect(f"{folder}/{name}")
            print("connected", name)
        except OSError:
            pass
try:
    print("listed", os.listdir(folder))
except OSError:
    pass
for folder in os.environ["PROCESSES"].split():
    for name in ("environ", "mem", "root/etc/hostname", "ns/net", "fd"):
        try:
            print("read", folder, name, os.listdir(f"{folder}/fd") if name == "fd" else open(f"{folder}/{name}", "rb").read(1))
        except OSError:
            pass
"""


def of_nobody(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, check=False, timeout=60, **options
    )  # fmt: skip


def test_another_user_reads_and_reaches_nothing(lab: Lab) -> None:
    """Files, sockets and processes of a lab are closed to other users of the machine."""
    every = " ".join(f"/proc/{pid}" for pid in processes_below(lab.pid))
    env = {**os.environ, "PROCESSES": every}
    assert of_nobody("/usr/bin/python3", "-c", _AS_NOBODY, str(lab.folder), env=env, cwd="/").stdout == ""
    root = subprocess.run(
        ["/usr/bin/python3", "-c", _AS_NOBODY, str(lab.folder)], capture_output=True, text=True, env=env, check=False
    )
    assert "opened kubeconfig" in root.stdout and "connected spawner.sock" in root.stdout  # the test can see


@pytest.mark.parametrize(
    "argv", [("exec", "node1", "--", "id"), ("down",), ("kubeconfig",), ("doctor",), ("capture", "node1", "--duration", "1s"), ("up", "other")]
)  # fmt: skip
def test_another_users_commands(lab: Lab, argv: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    """They end with a message, say who must run them, and do nothing."""
    del lab, tmp_path_factory
    env = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    done = of_nobody(sys.executable, "-m", "testbed", *argv, env={**env, "PYTHONPATH": str(ROOT)}, cwd="/")
    if "No module named" in done.stderr or "Permission denied" in done.stderr.partition("error:")[0]:
        pytest.skip(f"another user cannot read {ROOT} or its Python")
    assert done.returncode in (2, 3)
    assert re.search(r"run this command as root, or with sudo|no lab is running", done.stderr)
    assert "Traceback" not in done.stderr


class Server:
    """The API as it listens on the host."""

    def __init__(self, lab: Lab) -> None:
        settings = json.loads(lab.kubeconfig.read_text())
        self.cluster = settings["clusters"][0]["cluster"]
        self.user = settings["users"][0]["user"]
        self.authority = base64.b64decode(self.cluster["certificate-authority-data"]).decode()
        self.port = int(self.cluster["server"].rpartition(":")[2])

    def ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, certificate: str = ""
    ) -> tuple[int, str]:
        context = ssl.create_default_context(cadata=self.authority)
        if certificate:
            context.load_cert_chain(certificate)
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            connection.endheaders()
            response = connection.getresponse()
            return response.status, response.read(4096).decode(errors="replace") if response.status != 101 else ""


@pytest.fixture(scope="module")
def server(lab: Lab) -> Server:
    return Server(lab)


WEBSOCKET = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol": "v5.channel.k8s.io",
}  # fmt: skip
POD = "/api/v1/namespaces/dev/pods/web"


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/", {}), ("GET", "/api", {}), ("GET", "/apis", {}), ("GET", "/openapi/v2", {}), ("GET", "/openapi/v3", {}),
        ("GET", "/metrics", {}), ("GET", "/healthz/", {}), ("GET", "//version", {}), ("GET", "/version/../api/v1/pods", {}),
        ("GET", "/api/v1/pods", {}), ("GET", "/api/v1/pods?watch=1", {}), ("GET", "/api/v1/%70ods", {}),
        ("GET", "/api/v1/namespaces/kube-system/secrets", {}), ("HEAD", POD, {}),
        ("POST", "/api/v1/namespaces/dev/pods", {}), ("PUT", POD, {}), ("PATCH", POD, {}), ("DELETE", POD, {}),
        ("GET", f"{POD}/log", {}), ("GET", f"{POD}/log?follow=1", {}), ("POST", f"{POD}/exec?command=id&stdout=1", {}),
        ("GET", f"{POD}/exec?command=id&stdout=1", WEBSOCKET), ("GET", f"{POD}/attach?stdout=1", WEBSOCKET),
        ("GET", f"{POD}/portforward?ports=8080", WEBSOCKET), ("POST", f"{POD}/eviction", {}), ("POST", f"{POD}/binding", {}),
        ("POST", "/api/v1/namespaces/dev/serviceaccounts/default/token", {}),
        ("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", {}), ("PUT", "/testbed/v1/nodes/node1/power", {}),
        ("GET", "/api/v1/pods", {"X-Remote-User": "kubernetes-admin", "X-Remote-Group": "system:masters"}),
        ("GET", "/api/v1/pods", {"Impersonate-User": "kubernetes-admin"}),
    ],
)  # fmt: skip
def test_without_credentials(server: Server, method: str, path: str, headers: dict[str, str]) -> None:
    """Whoever shows nothing is system:anonymous and is refused, streams and watches included, before anything is done."""
    status, said = server.ask(method, path, headers)
    assert status == 403
    assert "system:anonymous" in said or method == "HEAD"


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz", "/version"])
def test_what_everybody_may_ask(server: Server, path: str) -> None:
    """As on a cluster (ClusterRole system:public-info-viewer)."""
    assert server.ask("GET", path)[0] == 200


def _token(key: bytes, **header: str) -> str:
    def encoded(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    account = {"namespace": "kube-system", "serviceaccount": {"name": "kube-proxy", "uid": "x"}}
    claims = {
        "exp": 1 << 40,
        "nbf": 0,
        "iat": 0,
        "sub": "system:serviceaccount:kube-system:kube-proxy",
        "kubernetes.io": account,
    }
    signed = ".".join(encoded(json.dumps(part).encode()) for part in ({"alg": "HS256", **header}, claims))
    return f"{signed}.{encoded(hmac.digest(key, signed.encode(), 'sha256')) if key else ''}"


@pytest.mark.parametrize(
    "header",
    [
        "Bearer", "Bearer ", "Bearer x", "Bearer .", "Bearer ..", "Bearer a.b.c", "bearer \xe9", "Basic a3ViZXJuZXRlcy1hZG1pbjo=",
        "Bearer " + _token(b"another key"), "Bearer " + _token(b"", alg="none"), "Bearer " + _token(b"\0" * 32),
    ],
    ids=lambda header: header[:16],
)  # fmt: skip
def test_wrong_credentials(server: Server, header: str) -> None:
    """Tokens of another lab, unsigned ones and what is no token are a 401, also where nobody need show anything."""
    for path in (f"{POD}/log", "/api/v1/pods?watch=1", "/version"):
        assert server.ask("GET", path, {"Authorization": header})[0] == 401


def test_a_certificate_of_another_lab(server: Server, tmp_path: Path) -> None:
    """One of another authority ends the connection, whatever name it bears."""
    from testbed.api.certificates import make_credentials

    other = make_credentials("other", names=("x",), addresses=())
    (tmp_path / "pem").write_text(other.admin + other.admin_key)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        server.ask("GET", "/version", certificate=str(tmp_path / "pem"))


_LISTENS = 1 << 16  # __SO_ACCEPTCON


def test_what_listens_on_the_host(lab: Lab, server: Server) -> None:
    """Of all sockets that a lab's processes hold, the host's namespace has one, on 127.0.0.1, and one in the lab's folder."""
    inodes = set()
    for pid in processes_below(lab.pid):
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(entry.path)))
    assert len(inodes) > 20
    held = []
    for kind in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet", "unix"):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if kind == "unix":
                if fields[6] in inodes and int(fields[3], 16) & _LISTENS:
                    held.append(fields[7])
            elif fields[-1 if kind == "packet" else 9] in inodes:
                held.append((kind, fields[1]))
    assert held == [("tcp", f"0100007F:{server.port:04X}"), str(lab.folder / "spawner.sock")]


# --- text --------------------------------------------------------------------------------------------------------------


def _object(api_version: str, kind: str, **fields: Any) -> dict[str, Any]:
    metadata = {"name": "x", "namespace": "dev", "labels": {"a": "b"}, "annotations": {"a": "b"}}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}


_POD_SPEC = {
    "hostname": "h", "subdomain": "s", "nodeName": "node1", "restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
    "nodeSelector": {"kubernetes.io/os": "linux"}, "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["alias"]}],
    "dnsConfig": {"nameservers": ["1.2.3.4"], "searches": ["s"], "options": [{"name": "ndots", "value": "5"}]},
    "containers": [
        {
            "name": "c", "image": "busybox", "command": ["true"], "args": ["a"], "workingDir": "/", "ports": [{"name": "p", "containerPort": 1}],
            "env": [{"name": "E", "value": "v"}],
            "volumeMounts": [{"name": "e", "mountPath": "/e", "subPath": "s"}, {"name": "c", "mountPath": "/c"}],
        }
    ],
    "volumes": [{"name": "e", "emptyDir": {}}, {"name": "c", "configMap": {"name": "m", "optional": True, "items": [{"key": "k", "path": "p"}]}}],
}  # fmt: skip
FORMS: list[dict[str, Any]] = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x", "labels": {"a": "b"}}},
    {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "x", "labels": {"a": "b"}}, "spec": {"podCIDR": "10.9.0.0/24"}},
    _object("v1", "ConfigMap", data={"key": "text"}),
    _object("v1", "Secret", type="Opaque", stringData={"key": "text"}),
    _object("v1", "Service", spec={"selector": {"a": "b"}, "clusterIP": "", "externalIPs": ["192.0.2.1"], "ports": [{"name": "p", "port": 80, "targetPort": "t", "protocol": "TCP"}]}),
    _object("v1", "Service", spec={"type": "ExternalName", "externalName": "e.example"}),
    _object("v1", "Service", spec={"type": "LoadBalancer", "loadBalancerIP": "192.0.2.2", "loadBalancerSourceRanges": ["192.0.2.0/24"], "ports": [{"port": 80, "appProtocol": "http"}]}),
    _object("v1", "Endpoints", subsets=[{"addresses": [{"ip": "192.0.2.1", "hostname": "h"}], "ports": [{"name": "p", "port": 80}]}]),
    _object("discovery.k8s.io/v1", "EndpointSlice", addressType="IPv4", endpoints=[{"addresses": ["192.0.2.1"], "hostname": "h", "nodeName": "node1", "zone": "z"}], ports=[{"name": "p", "port": 80}]),
    _object("networking.k8s.io/v1", "Ingress", spec={
        "ingressClassName": "nginx", "tls": [{"hosts": ["h.example"], "secretName": "s"}],
        "rules": [{"host": "h.example", "http": {"paths": [{"path": "/p", "pathType": "ImplementationSpecific", "backend": {"service": {"name": "web", "port": {"number": 80}}}}]}}],
    }),
    _object("apps/v1", "Deployment", spec={"replicas": 0, "selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}),
    _object("v1", "Pod", spec=_POD_SPEC),
]  # fmt: skip
INGRESS_ANNOTATIONS = (
    "rewrite-target", "server-alias", "upstream-vhost", "permanent-redirect", "app-root", "cors-allow-origin", "auth-url", "mirror-target",
    "configuration-snippet", "server-snippet", "proxy-read-timeout", "upstream-hash-by", "session-cookie-name", "canary-by-header",
)  # fmt: skip


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], bool]]:
    """Return where text is, as a value or (True) as a key of a map."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if path and path[-1] in (
                "labels",
                "annotations",
                "data",
                "stringData",
                "nodeSelector",
                "matchLabels",
                "selector",
            ):
                yield (*path, key), True
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    elif isinstance(value, str):
        yield path, False


def replaced(document: dict[str, Any], path: tuple[Any, ...], text: str, *, is_key: bool) -> dict[str, Any]:
    made = copy.deepcopy(document)
    inner: Any = made
    for part in path[:-1]:
        inner = inner[part]
    if is_key:
        inner[text] = inner.pop(path[-1])
    else:
        inner[path[-1]] = text
    return made


def hostile_objects(texts: list[str], every: int) -> Iterator[dict[str, Any]]:
    """Return objects with one text each, and for each text three pods: everywhere but in image and command, and there.

    Of the texts each place, or pod, gets one in ``every``, in turns.
    """
    turns = itertools.count()

    def chosen() -> list[str]:
        return texts[next(turns) % every :: every]

    for form in FORMS:
        places = [(path, is_key) for path, is_key in leaves(form) if path[0] not in ("apiVersion", "kind")]
        if form["kind"] != "Pod":
            yield from (replaced(form, path, text, is_key=is_key) for path, is_key in places for text in chosen())
            continue
        for text in chosen():
            for where in ("", "command", "image"):
                pod = form
                for path, is_key in places:
                    special = next((name for name in ("command", "image", "nodeName") if name in path), "")
                    if special == where:
                        tried = replaced(pod, path, text, is_key=is_key)
                        pod = pod if validate_object(tried) else tried
                yield copy.deepcopy(pod)
    for name in INGRESS_ANNOTATIONS:
        for text in chosen():
            made = copy.deepcopy(next(form for form in FORMS if form["kind"] == "Ingress"))
            made["metadata"]["annotations"] = {f"nginx.ingress.kubernetes.io/{name}": text}
            yield made


def test_text_in_manifests_stays_text(
    lab: Lab, eventually: Callable[..., Any], request: pytest.FixtureRequest
) -> None:  # fmt: skip
    """Every field of text of every kind, with what shells and configuration files might take for more: none of it is run.

    What the API takes is acted upon: by kube-proxy, DNS, the ingress controller, the kubelet. All of them go on, and the last
    Service and pod made are served.
    """
    every = 1 if request.config.getoption("--slow") else 3
    canary = Path(f"/var/tmp/testbed-canary-{os.getpid()}")
    for name in ("ingress-nginx.yaml", "nodeport.yaml"):
        for obj in yaml.safe_load_all((ROOT / "scenarios/ingress" / name).read_text()):
            if obj["kind"] != "ValidatingWebhookConfiguration":
                lab.api.create(obj)
    taken, refused, pods = 0, 0, []
    for number, obj in enumerate(hostile_objects(hostile_texts(str(canary)), every)):
        if obj["metadata"]["name"] == "x":
            obj["metadata"]["name"] = f"x{number}"
        try:
            made = lab.api.create(obj)
        except ApiError as error:
            assert error.code in (400, 404, 422), f"{error.code} {error}: {obj}"
            refused += 1
            continue
        taken += 1
        if made["kind"] == "Pod":
            pods.append(made["metadata"]["name"])
    assert taken > 400 // every and refused > 1000 // every and len(pods) >= 3 * len(hostile_texts("")) // every

    def states() -> set[str]:
        found = [pod["status"] for pod in lab.api.list("pods", "dev")[0] if pod["metadata"]["name"] in pods]
        waiting = [
            one["state"].get("waiting", {}).get("reason") for pod in found for one in pod.get("containerStatuses", ())
        ]
        return {pod["phase"] for pod in found if pod["phase"] != "Pending"} | {reason for reason in waiting if reason}

    eventually(lambda: states() == {"Succeeded", "Failed", "InvalidImageName"}, within_s=60)
    for obj in yaml.safe_load_all(_OBJECTS.replace("web", "last").replace("10.96.0.80", "10.96.0.81")):
        if obj["metadata"]["name"] == "last":
            lab.api.create(obj)

    def served(where: str, *argv: str) -> bool:
        return lab.run(where, ["curl", "-s", "--max-time", "5", *argv], timeout_s=20).status == 0

    eventually(lambda: served("node1", "http://10.96.0.81/"), within_s=60)
    eventually(lambda: served("dev/shell", "http://last.dev.svc.cluster.local/"), within_s=60)
    last = copy.deepcopy(next(form for form in FORMS if form["kind"] == "Ingress"))
    last["metadata"]["name"], last["spec"]["rules"][0]["host"] = "last", "last.example"
    lab.api.create(last)
    asked = ("--fail", "-H", "Host: last.example", "http://192.168.93.11:30080/p")
    eventually(lambda: served("client", *asked), within_s=60)
    programs = [pod for pod in lab.api.list("pods", "ingress-nginx")[0] if "admission" not in pod["metadata"]["name"]]
    programs += lab.api.list("pods", "kube-system")[0]
    for pod in programs:
        assert all(one["restartCount"] == 0 for one in pod["status"]["containerStatuses"]), pod["metadata"]["name"]
    assert not canary.exists()
    assert "canary" not in lab.run("node1", ["iptables-save"], timeout_s=20).stdout.decode()
    assert "canary" not in lab.run("node1", ["nft", "list", "tables"], timeout_s=20).stdout.decode()
    everywhere = [f"{pod['metadata']['namespace']}/{pod['metadata']['name']}" for pod in programs]
    for where in ("client", *everywhere):
        assert lab.run(where, ["test", "-e", str(canary)], timeout_s=20).status == 1


def test_words_of_a_scenario_are_words(lab: Lab, tmp_path: Path) -> None:
    """What a step runs gets its words as they are, and what it sends is sent as it is."""
    canary = tmp_path / "canary"
    texts = [text for text in hostile_texts(str(canary)) if "\0" not in text and "{{" not in text]
    steps = [
        {
            "exec": {
                "in": "node1",
                "run": ["printf", "<%s>", "--", *texts],
                "prints": "".join(f"<{text}>" for text in ["--", *texts]),
            }
        }
    ]
    steps.append(
        {
            "exec": {
                "in": "client",
                "run": f"echo $HOME `touch {canary}` ; touch {canary}",
                "prints": f"$HOME `touch {canary}` ; touch {canary}",
            }
        }
    )
    (tmp_path / "scenario.yaml").write_text(
        yaml.safe_dump({
            "apiVersion": "testbed/v1", "kind": "Scenario", "metadata": {"name": "s"},
            "spec": {"topology": "three-nodes", "proxyModes": ["iptables"], "steps": steps},
        })
    )  # fmt: skip
    result = run_scenario(load_scenario(tmp_path), "iptables", lab)
    assert [(step.status.value, step.seen) for step in result.steps if step.status.value != "passed"] == []
    assert not canary.exists()


# --- files of a pod ----------------------------------------------------------------------------------------------------


def test_what_nodes_and_pods_see_of_the_machines_files(lab: Lab, tmp_path: Path) -> None:
    """A node writes your files, but for /etc, /run and /sys; a pod reads them, and what it writes is its own."""

    if ROOT.is_relative_to("/tmp"):
        pytest.skip("this clone is below /tmp, which pods have one of their own of")

    def run(where: str, script: str) -> str:
        done = lab.run(where, ["sh", "-c", script], timeout_s=20)
        return (done.stdout + done.stderr).decode()

    mark = f"testbed-mark-{os.getpid()}"
    assert run("node1", f"touch {tmp_path}/node /etc/{mark} /run/{mark}") == ""
    assert os.listdir(tmp_path) == ["node"]
    assert run(
        "dev/shell",
        f"stat -c %s {shlex.quote(str(ROOT))}/setup.cfg /etc/shadow; "
        f"touch /var/{mark} {shlex.quote(str(ROOT))}/{mark} && ls /var/{mark}",
    ) == (f"{(ROOT / 'setup.cfg').stat().st_size}\n{Path('/etc/shadow').stat().st_size}\n/var/{mark}\n")
    assert not [path for path in (Path("/etc"), Path("/run"), Path("/var"), ROOT) if (path / mark).exists()]


@pytest.fixture(scope="module")
def kubectl(lab: Lab) -> list[str]:
    """The words that kubectl is run with."""
    try:
        return [find_kubectl(), f"--kubeconfig={lab.kubeconfig}"]
    except MissingFeature as error:
        pytest.skip(str(error))


@pytest.mark.skipif(shutil.which("tar") is None, reason="kubectl cp needs tar")
def test_kubectl_cp_from_a_pod_that_lies(lab: Lab, kubectl: list[str], tmp_path: Path) -> None:
    """Its tar may say what it likes: names that lead out, links and what is behind them change nothing outside the target."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, link in (
            ("../../escaped", ""),
            (f"{tmp_path}/escaped", ""),
            ("sub", str(tmp_path)),
            ("sub/escaped", ""),
            ("good", ""),
        ):
            member = tarfile.TarInfo(name)
            if link:
                member.type, member.linkname = tarfile.SYMTYPE, link
                tar.addfile(member)
            else:
                member.size = 4
                tar.addfile(member, io.BytesIO(b"text"))
    script = f"base64 -d > /tmp/evil.tar <<'END'\n{base64.encodebytes(archive.getvalue()).decode()}END\n"
    script += "printf '#!/bin/sh\\ncat /tmp/evil.tar\\n' > /usr/bin/tar; chmod 755 /usr/bin/tar"
    assert lab.run("dev/shell", ["sh", "-c", script], timeout_s=20).status == 0
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    subprocess.run([*kubectl, "cp", "dev/shell:/data", str(target / "c")], capture_output=True, check=False, timeout=60)
    assert not [path for path in tmp_path.rglob("escaped") if target not in path.parents]
    assert Path(shutil.which("tar") or "").read_bytes()[:4] == b"\x7fELF"  # the machine's is what it was
