"""What a user of the Python `kubernetes` client would write; run as a program: KUBECONFIG, then exec or portforward.

A program of its own, because the client leaves its sockets to the garbage collector, which our tests count as an error.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from kubernetes import client, config
from kubernetes.stream import portforward, stream


def run_commands(api: Any) -> dict[str, Any]:
    call = api.connect_get_namespaced_pod_exec
    told = {"stderr": True, "stdin": False, "stdout": True, "tty": False}
    once = stream(call, "web", "default", command=["sh", "-c", "echo hi"], **told)
    talk = stream(call, "web", "default", command=["sh"], **{**told, "stdin": True}, _preload_content=False)
    talk.write_stdin("echo $((40+2)); echo oops >&2\n")
    line = talk.readline_stdout(timeout=20)  # gives '' once the connection has been closed, whatever came before that
    talk.write_stdin("exit 3\n")
    talk.run_forever(timeout=20)
    return {"once": once, "line": line, "errors": talk.read_stderr(), "status": talk.returncode}


def forward_ports(api: Any) -> dict[str, Any]:
    forwarded = portforward(api.connect_get_namespaced_pod_portforward, "web", "default", ports="80,81")
    connection = forwarded.socket(80)
    connection.setblocking(True)
    connection.settimeout(20)
    connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
    answer = connection.recv(4096).splitlines()[0].decode()
    deadline = time.monotonic() + 20
    while forwarded.error(81) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return {"answer": answer, "error": forwarded.error(81)}


if __name__ == "__main__":
    api = client.CoreV1Api(config.new_client_from_config(sys.argv[1]))
    print(json.dumps(run_commands(api) if sys.argv[2] == "exec" else forward_ports(api)))
