"""kube-proxy as a process in a namespace, against the real API server: starts, follows changes, answers, ends."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from proxy_support import endpoint, endpoint_slice, node_object, service

from testbed.api.client import ApiClient
from testbed.kernel.iptables import Backend
from testbed.model.cluster import ClusterConfig

pytestmark = pytest.mark.root

PROGRAM = """
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
        client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns"}})
        client.create(node_object())
        yield client
    finally:
        client.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def test_process_follows_the_api(api: ApiClient, tmp_path: Path, eventually: Callable[..., Any]) -> None:
    """Rules appear, change and go with the API's objects; health and mode are answered; SIGTERM leaves the rules."""
    args = {
        "node_name": "node1", "api_socket": str(tmp_path / "api.sock"), "lock_file": str(tmp_path / "lock"),
        "ready_file": str(tmp_path / "ready"), "iptables_backend": Backend.LEGACY.value,
        "config": {"clusterCIDR": "10.0.0.0/8", "iptables": {"minSyncPeriod": "0s"}},
    }  # fmt: skip
    command = 'ip link set lo up; exec "$0" -c "$1" "$2"'
    holder = subprocess.Popen(["unshare", "--net", "sleep", "100"])
    enter = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]

    def seen(*argv: str) -> str:
        return subprocess.run([*enter, *argv], capture_output=True, text=True, check=False).stdout

    def nat() -> str:
        return seen("iptables-legacy-save", "-t", "nat")

    def netns(pid: object) -> str:
        return str(Path(f"/proc/{pid}/ns/net").readlink())

    try:
        eventually(lambda: netns(holder.pid) != netns("self"))
        proxy = subprocess.Popen([*enter, "sh", "-c", command, sys.executable, PROGRAM, json.dumps(args)])
        try:
            eventually(lambda: (tmp_path / "ready").exists(), within_s=20)
            assert "KUBE-POSTROUTING" in nat()
            web = service("web", "172.30.0.41")
            api.create(web)
            api.create(endpoint_slice("web", endpoint("10.180.0.1")))
            eventually(lambda: "--to-destination 10.180.0.1:80" in nat())
            stored = api.get("endpointslices.discovery.k8s.io", "ns", "web-x")
            api.update({**stored, "endpoints": [endpoint("10.180.0.2")]})
            eventually(lambda: "--to-destination 10.180.0.2:80" in nat() and "10.180.0.1:80" not in nat())
            assert '"nodeEligible": true' in seen("curl", "-sS", "http://127.0.0.1:10256/healthz")
            assert seen("curl", "-sS", "http://127.0.0.1:10249/proxyMode") == "iptables"
            api.delete("services", "ns", "web")
            eventually(lambda: "KUBE-SVC-" not in nat() and "KUBE-SEP-" not in nat())
        finally:
            proxy.terminate()
        assert proxy.wait(10) == 0
        assert "KUBE-POSTROUTING" in nat()
    finally:
        holder.kill()
        holder.wait()
