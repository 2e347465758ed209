"""The subresources of pods that are streams: log, exec, attach, portforward.

::

    kubectl ──HTTP: text──────────────────▶ log            ┐
    kubectl ──websocket: CHANNEL DATA─────▶ exec, attach   ├─▶ NodeServer: what the pod's kubelet serves
    kubectl ──websocket: SPDY frames──────▶ portforward    ┘

Channels of exec and attach (v4, v5.channel.k8s.io): 0 stdin, 1 stdout, 2 stderr, 3 a Status at the end, 4 the terminal's
size; v5 adds 255, whose byte names a channel that its sender has finished. SPDY upgrades are refused (issue 3).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from aiohttp import WSMsgType, web

from testbed.api.forward import SPDY_TUNNEL, serve_channels, serve_tunnel
from testbed.errors import ApiError, Cause, KernelError
from testbed.model.objects import Object, name_of
from testbed.registry import Registry
from testbed.registry.errors import bad_request

STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
_V4, _V5 = "v4.channel.k8s.io", "v5.channel.k8s.io"
#: How soon we notice that a reader has gone while nothing is written.
_LIVENESS_S = 5.0
_MAX_MESSAGE = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOptions:
    """What of a log is wanted; None is no limit."""

    follow: bool = False
    previous: bool = False
    timestamps: bool = False
    tail_lines: int | None = None
    since_s: int | None = None
    since_time_ns: int | None = None
    limit_bytes: int | None = None


class ExitStatus(Protocol):
    """How a program ended; 128 + signal when a signal ended it."""

    @property
    def code(self) -> int: ...


class Session(Protocol):
    """A running program with somebody at its other end; see `kubelet.runtime.Session`, which is one."""

    async def read(self) -> tuple[int, bytes] | None: ...
    async def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...
    def resize(self, columns: int, rows: int) -> None: ...
    async def wait(self) -> ExitStatus: ...
    def leave(self) -> None: ...


class NodeServer(Protocol):
    """What a kubelet serves to the API server. Everything raises ApiError with the kubelet's words."""

    def log(self, pod: Object, container: str, options: LogOptions) -> AsyncIterator[bytes]:
        """Return the pieces of a container's log; an ApiError comes at once, not with the first piece."""

    async def exec(self, pod: Object, container: str, argv: Sequence[str], *, stdin: bool, tty: bool) -> Session:
        """Start a program in a running container. KernelError when it cannot be executed."""

    def attach(self, pod: Object, container: str, *, stdin: bool) -> Session:
        """Join a running container's first process."""

    async def connect(self, pod: Object, port: int) -> socket.socket:
        """Return a non-blocking connection to a port of the pod's loopback. OSError as connect(2) has it."""


class Nodes(Protocol):
    """Finds the kubelet of a node."""

    def server_of(self, node: str) -> NodeServer:
        """Return it, or raise the ApiError of a node that does not answer."""


def add_stream_routes(app: web.Application, registry: Registry, nodes: Nodes) -> None:
    """Serve the streams of pods in an API application."""
    streams = _Streams(registry, nodes)
    pod = "/api/v1/namespaces/{namespace}/pods/{name}"
    app.router.add_get(f"{pod}/log", streams.log)
    for method in ("GET", "POST"):
        app.router.add_route(method, f"{pod}/exec", streams.exec)
        app.router.add_route(method, f"{pod}/attach", streams.attach)
        app.router.add_route(method, f"{pod}/portforward", streams.forward)
    app.on_shutdown.append(streams.close)


def chosen_container(pod: Object, name: str) -> str:
    """Return the container that a request means. Source: pkg/registry/core/pod/strategy.go, validateContainer (v1.30)."""
    spec = pod["spec"]
    names = [one["name"] for one in (*(spec.get("initContainers") or ()), *spec["containers"])]
    if name:
        if name not in names:
            raise bad_request(f"container {name} is not valid for pod {name_of(pod)}")
        return name
    if len(spec["containers"]) > 1:
        raise bad_request(
            f"a container name must be specified for pod {name_of(pod)}, choose one of: [{' '.join(names)}]"
        )
    return str(spec["containers"][0]["name"])


def log_options(query: Any, pod_name: str) -> LogOptions:
    """Return the options of a log request, or raise their problems. Source: ValidatePodLogOptions (v1.30)."""
    numbers = {name: _number(query, name) for name in ("tailLines", "sinceSeconds", "limitBytes")}
    since_time = query.get("sinceTime")
    causes = []
    for field, least, words in (
        ("tailLines", 0, "must be greater than or equal to 0"),
        ("limitBytes", 1, "must be greater than 0"),
        ("sinceSeconds", 1, "must be greater than 0"),
    ):
        value = numbers[field]
        if value is not None and value < least:
            causes.append(Cause(field, f"Invalid value: {value}: {words}", "FieldValueInvalid"))
    if since_time and numbers["sinceSeconds"] is not None:
        words = "at most one of `sinceTime` or `sinceSeconds` may be specified"
        causes.append(Cause("", f"Forbidden: {words}", "FieldValueForbidden"))
    if causes:
        shown = [f"{cause.field or '<nil>'}: {cause.message}" for cause in causes]
        text = shown[0] if len(shown) == 1 else "[" + ", ".join(shown) + "]"
        details = {"name": pod_name, "kind": "PodLogOptions"}
        message = f'PodLogOptions "{pod_name}" is invalid: {text}'
        raise ApiError(422, "Invalid", message, causes=tuple(causes), details=details)
    return LogOptions(
        follow=_flag(query, "follow"),
        previous=_flag(query, "previous"),
        timestamps=_flag(query, "timestamps"),
        tail_lines=numbers["tailLines"],
        since_s=numbers["sinceSeconds"],
        since_time_ns=_time_ns(since_time) if since_time else None,
        limit_bytes=numbers["limitBytes"],
    )


def _flag(query: Any, name: str) -> bool:
    # apimachinery's Convert_Slice_string_To_bool: a parameter that is there is true unless it says otherwise
    return name in query and query[name].lower() not in ("false", "0")


def _number(query: Any, name: str) -> int | None:
    text = query.get(name)
    if text is None or text == "":
        return None
    if not (text.removeprefix("-").isascii() and text.removeprefix("-").isdecimal() and len(text) < 19):
        raise bad_request(f'invalid {name} {text!r}: strconv.ParseInt: parsing "{text}": invalid syntax')
    return int(text)


def _time_ns(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
        return int(moment.timestamp()) * 10**9 + moment.microsecond * 1000
    except ValueError:
        layout = "2006-01-02T15:04:05Z07:00"
        raise bad_request(f'parsing time "{text}" as "{layout}": cannot parse "{text}" as "2006"') from None


def status_of_end(code: int, argv: Sequence[str]) -> Object:
    """Return the Status that ends an exec or attach. Source: kubelet's remotecommand server, containerd's exec."""
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    words = f"error executing command [{' '.join(argv)}], exit code {code}"
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: {words}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def status_of_failure(error: Exception, *, what: str) -> Object:
    """Return the Status for a program that was not started."""
    if isinstance(error, ApiError):
        return {
            "metadata": {}, "status": "Failure", "message": error.message, "reason": error.reason, "code": error.code
        }  # fmt: skip
    message = f"Internal error occurred: {what}: {error}"
    details = {"causes": [{"message": f"{what}: {error}"}]}
    return {
        "metadata": {}, "status": "Failure", "message": message, "reason": "InternalError", "details": details,
        "code": 500,
    }  # fmt: skip


class _Streams:
    def __init__(self, registry: Registry, nodes: Nodes) -> None:
        self._registry = registry
        self._nodes = nodes
        self._open: set[asyncio.Task[Any]] = set()

    async def close(self, _app: web.Application) -> None:
        """End what is open, so that the server can go."""
        for task in tuple(self._open):
            task.cancel()

    def _pod(self, request: web.Request) -> Object:
        return self._registry.get("pods", request.match_info["namespace"], request.match_info["name"])

    # -- logs --------------------------------------------------------------------------------------------------------

    async def log(self, request: web.Request) -> web.StreamResponse:
        pod = self._pod(request)
        options = log_options(request.query, name_of(pod))
        container = chosen_container(pod, request.query.get("container", ""))
        node = pod["spec"].get("nodeName")
        if not node:
            return web.Response(text="")  # nobody could have written anything
        pieces = self._nodes.server_of(node).log(pod, container, options)
        response = web.StreamResponse(headers={"Content-Type": "text/plain", "Cache-Control": "no-cache, private"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        coming: asyncio.Future[bytes] | None = None
        try:
            while True:
                coming = asyncio.ensure_future(anext(pieces))
                while not coming.done():
                    await asyncio.wait([coming], timeout=_LIVENESS_S)
                    if request.transport is None or request.transport.is_closing():
                        return response
                try:
                    await response.write(coming.result())
                except StopAsyncIteration:
                    break
            await response.write_eof()
        except ConnectionError:
            pass  # the reader has gone, as most that follow do
        finally:
            self._open.discard(task)
            if coming is not None:
                coming.cancel()
        return response

    # -- exec and attach -----------------------------------------------------------------------------------------------

    def _running_pod(self, request: web.Request, what: str) -> tuple[Object, NodeServer]:
        pod = self._pod(request)
        phase = (pod.get("status") or {}).get("phase")
        if phase in ("Succeeded", "Failed"):
            raise bad_request(f"cannot {what} a container in a completed pod; current phase is {phase}")
        node = pod["spec"].get("nodeName")
        if not node:
            raise bad_request(f"pod {name_of(pod)} does not have a host assigned")
        return pod, self._nodes.server_of(node)

    async def exec(self, request: web.Request) -> web.StreamResponse:
        pod, server = self._running_pod(request, "exec into")
        container = chosen_container(pod, request.query.get("container", ""))
        argv = request.query.getall("command", [])
        if not argv:
            raise bad_request("you must specify at least one command for the container")
        stdin, tty = _flag(request.query, "stdin"), _flag(request.query, "tty")
        _refuse_no_streams(request)
        socket_ = await self._upgrade(request, (_V5, _V4))
        try:
            session = await server.exec(pod, container, argv, stdin=stdin, tty=tty)
        except (ApiError, KernelError, OSError) as error:
            await _end(socket_, status_of_failure(error, what=_EXEC_FAILED))
            return socket_
        return await self._serve(request, socket_, session, argv)

    async def attach(self, request: web.Request) -> web.StreamResponse:
        pod, server = self._running_pod(request, "attach to")
        container = chosen_container(pod, request.query.get("container", ""))
        _refuse_no_streams(request)
        socket_ = await self._upgrade(request, (_V5, _V4))
        try:
            session = server.attach(pod, container, stdin=_flag(request.query, "stdin"))
        except (ApiError, KernelError) as error:
            await _end(socket_, status_of_failure(error, what="error attaching to container"))
            return socket_
        return await self._serve(request, socket_, session, ())

    async def _serve(
        self, request: web.Request, socket_: web.WebSocketResponse, session: Session, argv: Sequence[str]
    ) -> web.WebSocketResponse:  # fmt: skip
        tty = _flag(request.query, "tty")
        wanted = {STDOUT: _flag(request.query, "stdout"), STDERR: _flag(request.query, "stderr") and not tty}
        typing = asyncio.create_task(_pass_input(socket_, session), name="stdin")
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            talking = asyncio.create_task(_pass_output(socket_, session, wanted), name="stdout")
            await asyncio.wait([typing, talking], return_when=asyncio.FIRST_COMPLETED)
            if not talking.done():  # the client has gone
                talking.cancel()
                return socket_
            talking.result()
            status = await session.wait()
            await _end(socket_, status_of_end(status.code if argv else 0, argv))
        except ConnectionError:
            pass
        finally:
            self._open.discard(task)
            typing.cancel()
            session.leave()
        return socket_

    # -- port-forward --------------------------------------------------------------------------------------------------

    async def forward(self, request: web.Request) -> web.StreamResponse:
        pod = self._pod(request)
        phase = (pod.get("status") or {}).get("phase")
        node = pod["spec"].get("nodeName")
        if not node:
            raise bad_request(f"pod {name_of(pod)} does not have a host assigned")
        server = self._nodes.server_of(node)
        if phase != "Running":
            raise bad_request(f"unable to forward port because pod is not running. Current status={phase}")
        socket_ = await self._upgrade(request, (SPDY_TUNNEL, _V4))
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)

        async def connect(port: int) -> socket.socket:
            return await server.connect(pod, port)

        try:
            if socket_.ws_protocol == SPDY_TUNNEL:
                await serve_tunnel(socket_, connect, pod)
            else:
                await serve_channels(socket_, connect, pod, _ports(request))
        finally:
            self._open.discard(task)
        return socket_

    async def _upgrade(self, request: web.Request, protocols: Sequence[str]) -> web.WebSocketResponse:
        wanted = request.headers.get("Upgrade", "").lower()
        if wanted.startswith("spdy/"):
            raise bad_request(
                "this lab streams over websockets only, which kubectl 1.31 and newer use; "
                "run `testbed kubectl` instead, or `testbed exec`"
            )
        if wanted != "websocket":
            raise bad_request("Upgrade request required")
        asked = [one.strip() for one in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if one.strip()]
        if not any(one in protocols for one in asked):
            raise bad_request(
                f"unable to upgrade: unable to negotiate protocol: client supports [{' '.join(asked)}], "
                f"server accepts [{' '.join(protocols)}]"
            )
        opened = web.WebSocketResponse(protocols=protocols, max_msg_size=_MAX_MESSAGE)
        await opened.prepare(request)
        return opened


_EXEC_FAILED = "error executing command in container"


def _refuse_no_streams(request: web.Request) -> None:
    if not any(_flag(request.query, name) for name in ("stdin", "stdout", "stderr")):
        raise bad_request("you must specify at least 1 of stdin, stdout, stderr")


def _ports(request: web.Request) -> list[int]:
    texts = [text for part in request.query.getall("ports", []) for text in part.split(",")]
    if not texts:
        raise bad_request('query parameter "ports" is required')
    for text in texts:
        if not (text.isascii() and text.isdecimal() and 0 < int(text) < 65536):
            raise bad_request(f'unable to parse "{text}" as a port')
    return [int(text) for text in texts]


async def _pass_input(socket_: web.WebSocketResponse, session: Session) -> None:
    """Pass on what the client sends; return when it has gone."""
    async for message in socket_:
        if message.type is WSMsgType.TEXT:
            data = message.data.encode()
        elif message.type is WSMsgType.BINARY:
            data = message.data
        else:
            return
        if not data:
            continue
        channel, rest = data[0], data[1:]
        if channel == STDIN:
            await session.write(rest)
        elif channel == RESIZE:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                size = json.loads(rest)
                session.resize(int(size["Width"]) & 0xFFFF, int(size["Height"]) & 0xFFFF)
        elif channel == CLOSE and rest[:1] == bytes([STDIN]) and socket_.ws_protocol == _V5:
            session.close()


async def _pass_output(socket_: web.WebSocketResponse, session: Session, wanted: dict[int, bool]) -> None:
    while (piece := await session.read()) is not None:
        stream, data = piece
        if wanted.get(stream):
            await socket_.send_bytes(bytes([stream]) + data)


async def _end(socket_: web.WebSocketResponse, status: Object) -> None:
    with contextlib.suppress(ConnectionError):
        await socket_.send_bytes(bytes([ERROR]) + json.dumps(status).encode())
        await socket_.close()
