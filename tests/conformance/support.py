"""A cluster without machines behind the real API over TLS: real controllers, a pretended kubelet, a clock that stands still."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from controllers_world import FakeKubelet, World

from testbed.api.access import Tokens
from testbed.api.certificates import Credentials, kubeconfig, make_credentials
from testbed.api.server import make_app
from testbed.model.objects import Object
from testbed.store import Event

T = TypeVar("T")
HERE = Path(__file__).parent
NOW_S = datetime(2024, 1, 1, 0, 1, 38, tzinfo=UTC).timestamp()  # 98 s after everything in a World was made
ADMIN_TOKEN = "the-administrator"
BUNDLED = Path(sys.prefix) / "bin" / "kubectl"
OLD = Path(sys.prefix) / "kubectl-1.20" / "usr" / "bin" / "kubectl"


class RunningKubelet(FakeKubelet):
    """As its parent, and says of the containers that they run."""

    def set_ready(self, pod: Object, ready: bool, **status: Any) -> Object:
        started = {"running": {"startedAt": self._registry.now()}}
        containers = [
            {"name": one["name"], "image": one["image"], "imageID": "", "ready": ready, "started": True,
             "restartCount": 0, "state": started}
            for one in pod["spec"]["containers"]
        ]  # fmt: skip
        return super().set_ready(pod, ready, containerStatuses=containers, startTime=self._registry.now(), **status)


class Server:
    """A served World. ``call`` runs a function where the registry lives."""

    def __init__(self, world: World, folder: Path, loop: asyncio.AbstractEventLoop, credentials: Credentials) -> None:
        self.world = world
        self.folder = folder
        self.credentials = credentials
        self.kubeconfig = folder / "kubeconfig"
        self.port = 0
        self._loop = loop

    def call(self, function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        async def run() -> T:
            return function(*arguments, **keywords)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def kubectl(
        self, *argv: str, program: Path = BUNDLED, cwd: Path | None = None, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl as a user would; colours, editors and the user's own configuration are out of the way."""
        env = {
            "PATH": os.environ["PATH"], "HOME": str(self.folder), "KUBECONFIG": str(self.kubeconfig), "LANG": "C.UTF-8",
            "KUBE_EDITOR": shlex.join([sys.executable, str(HERE / "manifests" / "editor.py")]), "TZ": "UTC",
        }  # fmt: skip
        command = [str(program), *argv]
        return subprocess.run(
            command, env=env, cwd=cwd or HERE / "manifests", capture_output=True, text=True, timeout=timeout_s,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    def client_context(self, *, with_certificate: bool) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.credentials.authority)
        if with_certificate:
            with tempfile.NamedTemporaryFile("w") as file:
                file.write(self.credentials.admin + self.credentials.admin_key)
                file.flush()
                context.load_cert_chain(file.name)
        return context


def _settle_after_events(world: World, loop: asyncio.AbstractEventLoop) -> None:
    due = False

    def settle() -> None:
        nonlocal due
        due = False
        world.settle()

    def wake(_event: Event) -> None:
        nonlocal due
        if not due:
            due = True
            loop.call_soon(settle)

    world.store.subscribe(wake)


@contextmanager
def serving_world(folder: Path, *, history: int | None = None, with_controllers: bool = True) -> Iterator[Server]:
    """Serve a new World on 127.0.0.1 over TLS."""
    world = World()
    if history is not None:
        world.store._history = type(world.store._history)(world.store._history, maxlen=history)
    world.kubelet = RunningKubelet(world.registry)
    world.settle()
    credentials = make_credentials("test", names=["localhost"], addresses=[IPv4Address("127.0.0.1")])
    loop = asyncio.new_event_loop()
    server = Server(world, folder, loop, credentials)
    tokens = Tokens(b"key of the test", ADMIN_TOKEN, now_s=time.time)

    async def start() -> web.AppRunner:
        if with_controllers:
            _settle_after_events(world, loop)
        runner = web.AppRunner(make_app(world.registry, ready=lambda: True, tokens=tokens, now_s=lambda: NOW_S))
        await runner.setup()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=credentials.authority)
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(credentials.server + credentials.server_key)
            file.flush()
            context.load_cert_chain(file.name)
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        server.port = runner.addresses[0][1]
        return runner

    async def stop(runner: web.AppRunner) -> None:
        assert runner.server is not None
        for connection in runner.server.connections:  # a close over TLS waits for the client's, and the loop ends now
            if connection.transport is not None:
                connection.transport.abort()
        for _ in range(3):  # the steps from there to the end of the socket
            await asyncio.sleep(0)
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    server.kubeconfig.write_text(kubeconfig("test", f"https://127.0.0.1:{server.port}", credentials, ADMIN_TOKEN))
    server.kubeconfig.chmod(0o600)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(stop(runner), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


#: What differs from run to run, or with kubectl's own clock.
_CHANGING = (
    (re.compile(r"https://127\.0\.0\.1:\d+"), "https://127.0.0.1:PORT"),
    (re.compile(r"\b\d+[ydhms](\d+[dhms])? ago\b"), "AGE ago"),
    (re.compile(r"(?m)^(  (?:Normal|Warning) +\S+ +)\d+[ydhms]\d*[dhms]?( +)"), r"\1AGE\2"),
    (re.compile(r"/tmp/\S+?(?=/|\s)"), "/tmp/X"),
    (re.compile(r"(?m)^(diff .*|[-+]{3} .*)$"), "DIFF HEADER"),
    # how often controllers write is not what these files are about
    (re.compile(r'("?resourceVersion"?: )"\d+"'), r'\1"RV"'),
    (re.compile(r"(Resource Version: +)\d+"), r"\1RV"),
)
_UID = re.compile(r"\buid-\d+\b")  # as a World gives them out


class Uids:
    """Names for uids in the order in which they appear: the same object has the same name in every output."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def rename(self, text: str) -> str:
        return _UID.sub(lambda found: self._names.setdefault(found[0], f"UID-{len(self._names) + 1}"), text)


def normalised(text: str, uids: Uids) -> str:
    """Return kubectl's output without what changes from run to run."""
    for pattern, replacement in _CHANGING:
        text = pattern.sub(replacement, text)
    text = uids.rename(text)
    head, found, events = text.partition("\nEvents:\n")
    if found:  # its columns are as wide as the ages are
        text = head + found + re.sub(r"(?<=\S) {2,}", "  ", events)
    return "\n".join(line.rstrip() for line in text.splitlines())


def transcript(done: subprocess.CompletedProcess[str], uids: Uids) -> str:
    """Return what a command printed: standard output, then lines of standard error with ``! ``, then its status."""
    lines = normalised(done.stdout, uids).splitlines()
    lines += [f"! {line}" for line in normalised(done.stderr, uids).splitlines()]
    lines += [f"? {done.returncode}"] if done.returncode else []
    return "\n".join(lines).strip("\n")


__all__ = ["ADMIN_TOKEN", "BUNDLED", "HERE", "OLD", "Server", "Uids", "serving_world", "transcript"]
