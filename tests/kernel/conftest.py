"""An API server, a network namespace, and kube-proxy as a process in it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from proxy_support import node_object

from testbed.api.client import ApiClient
from testbed.kernel.iptables import Backend
from testbed.model.cluster import ClusterConfig

_PROGRAM = """
import json, sys
from testbed.programs import kube_proxy
sys.exit(kube_proxy.main(json.loads(sys.argv[1])))
"""


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiClient]:
    """A client of a real API server with the namespace ``ns`` in it."""
    from aiohttp import web

    from testbed.api.server import make_app
    from testbed.registry.registry import Registry
    from testbed.store import Store

    config = ClusterConfig(
        pod_cidr=IPv4Network("10.0.0.0/8"), service_cidr=IPv4Network("172.30.0.0/16"),
        node_port_range=(30000, 32767), domain="cluster.local", dns=IPv4Address("172.30.0.10"),
    )  # fmt: skip
    uids = map(str, itertools.count())
    options: dict[str, Any] = {"now": lambda: "2026-01-01T00:00:00Z", "new_uid": lambda: next(uids)}
    registry = Registry(Store(**options), config, **options, pick=lambda n: 0)
    loop, started = asyncio.new_event_loop(), threading.Event()
    runner = web.AppRunner(make_app(registry, ready=lambda: True))

    async def start() -> None:
        await runner.setup()
        await web.UnixSite(runner, str(tmp_path / "api.sock")).start()
        started.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(10)
    client = ApiClient(str(tmp_path / "api.sock"))
    try:
        for name in ("default", "ns"):
            client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        client.create(node_object())
        yield client
    finally:
        client.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


class NodeNamespace:
    """A network namespace that stands for a node, and kube-proxies in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock_file = folder / "lock"
        self._proxies: list[subprocess.Popen[bytes]] = []
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdin and self._holder.stdout
        self._holder.stdin.write(b"x")
        self._holder.stdin.flush()
        self._holder.stdout.read(1)  # cat runs, so the namespace is there
        self.enter = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *argv: str) -> str:
        """Return what a program in the namespace writes; it must succeed."""
        env = {**os.environ, "XTABLES_LOCKFILE": str(self.lock_file)}
        done = subprocess.run([*self.enter, *argv], capture_output=True, text=True, check=False, timeout=60, env=env)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def start_proxy(
        self, backend: Backend, *, env: Mapping[str, str] | None = None, config: Mapping[str, Any] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a kube-proxy that looks after its rules every second; its log is ``log`` in the folder."""
        args = {
            "node_name": "node1", "api_socket": str(self.folder / "api.sock"), "lock_file": str(self.lock_file),
            "ready_file": str(self.ready_file), "iptables_backend": backend.value,
            "config": {"clusterCIDR": "10.0.0.0/8", "iptables": {"minSyncPeriod": "0s", "syncPeriod": "1s"}, **(config or {})},
        }  # fmt: skip
        with open(self.folder / "log", "ab") as log:
            proxy = subprocess.Popen(
                [*self.enter, sys.executable, "-c", _PROGRAM, json.dumps(args)],
                stderr=log,
                env={**os.environ, **(env or {})},
            )
        self._proxies.append(proxy)
        return proxy

    @property
    def ready_file(self) -> Path:
        return self.folder / "ready"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def close(self) -> None:
        for proxy in self._proxies:
            if proxy.poll() is None:
                proxy.send_signal(signal.SIGKILL)
            proxy.wait(10)
        self._holder.communicate()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeNamespace]:
    """A namespace for one node; what was started in it ends with the test."""
    made = NodeNamespace(tmp_path)
    try:
        yield made
    finally:
        made.close()
