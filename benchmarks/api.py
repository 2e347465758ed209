"""The API under load: 5,000 Services with an EndpointSlice each, made over TLS by 8 clients, while 5 watchers look on.

Prints creates per second (the budget: at least 500), the ratio to a bare TLS echo of the same requests in the same run, how
long all Services as a Table take (at most 1 s), what an object costs in memory, and what watchers saw.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import random
import ssl
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from multiprocessing.connection import Connection
from typing import Any

from testbed.api.certificates import Credentials, make_credentials

CLIENTS, WATCHERS = 8, 5
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
_spawn = multiprocessing.get_context("spawn")


def service(number: int) -> bytes:
    spec = {"selector": {"app": f"app-{number}"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}
    metadata = {"name": f"svc-{number}", "namespace": "default", "labels": {"app": f"app-{number}"}}
    return json.dumps({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}).encode()


def endpoint_slice(number: int) -> bytes:
    endpoints = [
        {
            "addresses": [f"10.244.{number // 250}.{number % 250 + 1}"],
            "conditions": {"ready": True},
            "nodeName": "node1",
        }
    ]
    metadata = {
        "name": f"svc-{number}-x",
        "namespace": "default",
        "labels": {"kubernetes.io/service-name": f"svc-{number}"},
    }
    ports = [{"name": "http", "port": 8080, "protocol": "TCP"}]
    obj = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata}
    return json.dumps({**obj, "addressType": "IPv4", "endpoints": endpoints, "ports": ports}).encode()


def serve(pipe: Connection, credentials: Credentials, what: str) -> None:
    """Be the server: ``api`` alone, with ``controllers``, or ``bare``: what answers every POST with its body."""
    from aiohttp import web

    from testbed.api.access import Tokens
    from testbed.api.server import make_app
    from testbed.controllers import ControllerDriver, default_controllers
    from testbed.model.cluster import ClusterConfig
    from testbed.registry import Registry
    from testbed.store import Store

    def now() -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await request.read(), status=201, content_type="application/json")

    async def run() -> None:
        store = Store(now=now, new_uid=lambda: str(uuid.uuid4()))
        new_uid = lambda: str(uuid.uuid4())  # noqa: E731
        registry = Registry(store, ClusterConfig(), now=now, new_uid=new_uid, pick=random.randrange)
        registry.create("namespaces", {"metadata": {"name": "default"}})
        if what == "controllers":
            loop = asyncio.get_running_loop()
            driver = ControllerDriver(
                registry,
                default_controllers(registry.config, pick=random.randrange),
                now_s=time.monotonic,
                call_later=loop.call_later,
                on_error=lambda key, error: print(key, error, file=sys.stderr),
            )
            driver.start()
            due = False

            def work() -> None:
                nonlocal due
                due = False
                driver.run_pending()

            def wake(_event: object) -> None:
                nonlocal due
                if not due:
                    due = True
                    loop.call_soon(work)

            store.subscribe(wake)
        tokens = Tokens(b"key", "token", now_s=time.time)
        app = make_app(registry, ready=lambda: True, tokens=tokens)
        if what == "bare":
            app = web.Application()
            app.router.add_route("*", "/{tail:.*}", echo)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=credentials.authority)
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(credentials.server + credentials.server_key)
            file.flush()
            context.load_cert_chain(file.name)
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        pipe.send((os.getpid(), runner.addresses[0][1]))
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        await runner.cleanup()

    asyncio.run(run())


@contextmanager
def server(credentials: Credentials, what: str) -> Iterator[tuple[int, int]]:
    """Run a server in a process of its own; gives its pid and port."""
    ours, theirs = _spawn.Pipe()
    process = _spawn.Process(target=serve, args=(theirs, credentials, what))
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join(20)


def connect(port: int, authority: str) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection(
        "127.0.0.1", port, context=ssl.create_default_context(cadata=authority), timeout=60
    )


HEADERS = {"Authorization": "Bearer token", "Content-Type": "application/json"}


def create(port: int, authority: str, numbers: list[int], go: Any, done: Any) -> None:
    """Be some of the clients: create Services and their slices, one after the other."""
    connection = connect(port, authority)
    connection.connect()
    done.put("connected")
    go.wait()
    for number in numbers:
        for path, body in (
            ("/api/v1/namespaces/default/services", service(number)),
            ("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", endpoint_slice(number)),
        ):
            connection.request("POST", path, body, HEADERS)
            response = connection.getresponse()
            answer = response.read()
            assert response.status == 201, answer
    done.put("done")


def watch(port: int, authority: str, expected: int, ready: Any, seen: Any) -> None:
    """Be a watcher of Services: count events, and check that revisions only grow."""
    connection = connect(port, authority)
    connection.request("GET", "/api/v1/services?watch=true", headers=HEADERS)
    response = connection.getresponse()
    ready.put("watching")
    names, last = set(), 0
    while len(names) < expected:
        event = json.loads(response.readline())
        revision = int(event["object"]["metadata"]["resourceVersion"])
        assert event["type"] == "ADDED" and revision > last, event
        last = revision
        names.add(event["object"]["metadata"]["name"])
    seen.put(len(names))


def memory_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(port: int, authority: str, count: int) -> float:
    """Create ``count`` Services and slices by all clients; return the seconds that it took."""
    go, done = _spawn.Event(), _spawn.Queue()
    numbers = [list(range(client, count, CLIENTS)) for client in range(CLIENTS)]
    clients = [_spawn.Process(target=create, args=(port, authority, mine, go, done)) for mine in numbers]
    for client in clients:
        client.start()
    for _ in clients:
        assert done.get(timeout=60) == "connected"
    began = time.perf_counter()
    go.set()
    for _ in clients:
        assert done.get(timeout=600) == "done"
    took = time.perf_counter() - began
    for client in clients:
        client.join()
    return took


def measure(count: int) -> dict[str, float]:
    """Return what was measured."""
    credentials = make_credentials("bench", names=["localhost"], addresses=[IPv4Address("127.0.0.1")])
    authority = credentials.authority
    with server(credentials, "bare") as (_, port):
        bare_s = load(port, authority, count)
    with server(credentials, "controllers") as (_, port):
        with_controllers_s = load(port, authority, count)
    with server(credentials, "api") as (pid, port):
        ready, seen = _spawn.Queue(), _spawn.Queue()
        watchers = [_spawn.Process(target=watch, args=(port, authority, count, ready, seen)) for _ in range(WATCHERS)]
        for watcher in watchers:
            watcher.start()
        for _ in watchers:
            ready.get(timeout=60)
        before_kib, before_s = memory_kib(pid), cpu_s(pid)
        took = load(port, authority, count)
        used_s = cpu_s(pid) - before_s
        watched = [seen.get(timeout=60) for _ in watchers]
        after_kib = memory_kib(pid)
        for watcher in watchers:
            watcher.join()
        connection = connect(port, authority)
        connection.connect()
        began = time.perf_counter()
        connection.request("GET", "/api/v1/services", headers={**HEADERS, "Accept": TABLE})
        table = json.loads(connection.getresponse().read())
        table_s = time.perf_counter() - began
        assert len(table["rows"]) == count and watched == [count] * WATCHERS
    return {
        "objects": 2 * count,
        "createsPerSecond": round(2 * count / took, 1),
        "withControllersPerSecond": round(2 * count / with_controllers_s, 1),
        "timesABareTlsEcho": round(took / bare_s, 2),
        "serverCpuPerCreateMs": round(used_s / (2 * count) * 1000, 3),
        "tableOfAllSeconds": round(table_s, 3),
        "memoryPerObjectKiB": round((after_kib - before_kib) / (2 * count), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--services", type=int, default=5000)
    arguments = parser.parse_args()
    results = measure(arguments.services)
    if arguments.json:
        json.dump(results, sys.stdout)
        print()
    else:
        for name, value in results.items():
            print(f"{name:>24}  {value}")


if __name__ == "__main__":
    main()
