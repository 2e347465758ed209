"""What a kubelet serves to the API server: logs, exec, attach, port-forward of its pods (`api.streams.NodeServer`)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from testbed.api.streams import LogOptions, Session
from testbed.errors import ApiError, KernelError, NotPresent
from testbed.kubelet.logs import ContainerLog
from testbed.kubelet.runtime import ExitStatus
from testbed.model.objects import Object, name_of
from testbed.registry.errors import bad_request

if TYPE_CHECKING:
    from testbed.kubelet.agent import Kubelet
    from testbed.kubelet.container import ContainerRunner

_CONNECT_TIMEOUT_S = 5.0
_ATTACH_BACKLOG = 4 * 1024 * 1024  # bytes that a slow client may be behind before it is dropped


def log_to_read(status: Mapping[str, Any], pod: str, container: str, *, previous: bool) -> str:
    """Return the ID of the start of a container whose log is meant.

    Raises:
        ApiError: 400 in the kubelet's words. Source: pkg/kubelet/kubelet_pods.go, validateContainerLogStatus (v1.30).
    """
    state, last = status.get("state") or {}, status.get("lastState") or {}
    last_id = (last.get("terminated") or {}).get("containerID", "")
    if previous:
        if not last_id:
            raise bad_request(f'previous terminated container "{container}" in pod "{pod}" not found')
        return _plain_id(last_id)
    if "running" in state:
        return _plain_id(status["containerID"])
    if "terminated" in state or last_id:
        found = (state.get("terminated") or {}).get("containerID") or last_id
        if not found:
            raise bad_request(f'container "{container}" in pod "{pod}" is terminated')
        return _plain_id(found)
    reason = (state.get("waiting") or {}).get("reason", "")
    if not reason:
        raise bad_request(f'container "{container}" in pod "{pod}" is waiting to start - no logs yet')
    words = {"ErrImagePull": "image can't be pulled", "ImagePullBackOff": "trying and failing to pull image"}
    text = words.get(reason, reason)
    raise bad_request(f'container "{container}" in pod "{pod}" is waiting to start: {text}')


def _plain_id(container_id: str) -> str:
    return container_id.rpartition("/")[2]


class KubeletServer:
    """One kubelet's answers. Whatever pod is asked for must be bound to its node."""

    def __init__(self, kubelet: Kubelet) -> None:
        self._kubelet = kubelet

    def log(self, pod: Object, container: str, options: LogOptions) -> AsyncIterator[bytes]:
        runner = self._runner(pod, container)
        container_id = log_to_read(runner.shown, name_of(pod), container, previous=options.previous)
        log = runner.logs.get(container_id)
        if log is None:  # a node that was down has lost it
            raise bad_request(f"unable to retrieve container logs for testbed://{container_id}")
        return log.read(options)

    async def exec(self, pod: Object, container: str, argv: Sequence[str], *, stdin: bool, tty: bool) -> Session:
        runner = self._running(pod, container)
        try:
            return await self._kubelet.runtime.open_exec(runner.view.container_id, argv, stdin=stdin, tty=tty)
        except NotPresent:
            raise _not_found(container) from None
        except KernelError as error:
            # The words of containerd and runc, as `kubectl exec` has always shown them.
            raise KernelError(
                f'failed to exec in container: failed to start exec "{runner.view.container_id}": '
                f"OCI runtime exec failed: exec failed: unable to start container process: {error}: unknown"
            ) from error

    def attach(self, pod: Object, container: str, *, stdin: bool) -> Session:
        runner = self._running(pod, container)
        log = runner.logs[runner.view.container_id]
        return AttachedSession(runner, log, stdin=stdin)

    async def connect(self, pod: Object, port: int) -> socket.socket:
        return await self._kubelet.runtime.connect_pod(pod["metadata"]["uid"], port, timeout_s=_CONNECT_TIMEOUT_S)

    def _runner(self, pod: Object, container: str) -> ContainerRunner:
        runner = self._kubelet.runner(pod["metadata"]["uid"], container)
        if runner is None:
            raise bad_request(f'container "{container}" in pod "{name_of(pod)}" is not available')
        return runner

    def _running(self, pod: Object, container: str) -> ContainerRunner:
        runner = self._kubelet.runner(pod["metadata"]["uid"], container)
        if runner is None or not runner.view.is_running:
            raise _not_found(container)
        return runner


def _not_found(container: str) -> ApiError:
    return ApiError(
        500,
        "InternalError",
        f'Internal error occurred: unable to upgrade connection: container not found ("{container}")',
    )


class AttachedSession:
    """A running container's first process, seen from now on. Implements `runtime.Session`."""

    def __init__(self, runner: ContainerRunner, log: ContainerLog, *, stdin: bool) -> None:
        definition = runner.definition
        self._input = runner.input if stdin and definition.get("stdin") else None
        self._stdin_once = bool(definition.get("stdinOnce"))
        self._terminal = runner.input if definition.get("tty") else None
        self._pieces: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue()
        self._waiting_bytes = 0
        self._stop = log.listen(self._hear)
        if log.closed:
            self._pieces.put_nowait(None)

    def _hear(self, stream: int, data: bytes) -> None:
        self._waiting_bytes += len(data)
        if not data or self._waiting_bytes > _ATTACH_BACKLOG:
            self._stop()
            self._pieces.put_nowait(None)
            return
        self._pieces.put_nowait((stream, data))

    async def read(self) -> tuple[int, bytes] | None:
        piece = await self._pieces.get()
        if piece is not None:
            self._waiting_bytes -= len(piece[1])
        return piece

    async def write(self, data: bytes) -> None:
        if self._input is not None:
            await self._input.write(data)

    def close(self) -> None:
        if self._input is not None and self._stdin_once:
            self._input.close()

    def resize(self, columns: int, rows: int) -> None:
        if self._terminal is not None:
            self._terminal.resize(columns, rows)

    async def wait(self) -> ExitStatus:
        return ExitStatus(0)  # an attach that ends with its container has succeeded, whatever became of that

    def leave(self) -> None:
        self._stop()
        with contextlib.suppress(OSError):
            self.close()
