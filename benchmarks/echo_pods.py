"""What benchmarks of many pods share: echo pods in Deployments behind Services, asking them, and the memory they take."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SERVED_BY = re.compile(rb"^X-Served-By: (\S+)", re.MULTILINE)
_REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def deployment_and_service(name: str, namespace: str, replicas: int) -> list[dict[str, Any]]:
    metadata, labels = {"name": name, "namespace": namespace}, {"app": name}
    container = {"name": "echo", "image": "echo", "ports": [{"containerPort": 8080}]}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
            },
        },
    ]


def memory_used_mib() -> float:
    """Return what the machine uses without caches, but with the labs' tmpfs (Shmem counts as cache)."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    values = {name: int(text.split()[0]) for name, text in fields.items()}
    return (values["MemTotal"] - values["MemAvailable"]) / 1024


def until(check: Callable[[], bool], what: Callable[[], str], at_most_s: float) -> None:
    """Look ten times a second until a check holds; end the program with ``what`` when it does not in time."""
    deadline = time.monotonic() + at_most_s
    while not check():
        if time.monotonic() > deadline:
            raise SystemExit(f"after {at_most_s:g} s: {what()}")
        time.sleep(0.1)


def served_by(answer: bytes) -> str:
    """Return the pod that an HTTP answer is from, NAMESPACE/NAME; '' when it is from none."""
    found = _SERVED_BY.search(answer)
    return found[1].decode() if found else ""


def ask(address: str, port: int, timeout_s: float = 10) -> str:
    """Return which pod answers there, as asked from the network namespace that this thread is in.

    Raises:
        OSError: no connection, or it breaks.
    """
    with socket.create_connection((address, port), timeout=timeout_s) as connection:
        connection.sendall(_REQUEST)
        data = b""
        while chunk := connection.recv(4096):
            data += chunk
    return served_by(data)
