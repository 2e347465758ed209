"""A client of the lab's API, from the standard library: programs of the cluster and the scenario runner use it.

It speaks over the API's unix socket, or, as `in_cluster` says, as any program in a pod does: to Service ``kubernetes``,
with the token of its service account. `ApiClient` keeps one connection per thread; `Watch` has one of its own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol
from urllib.parse import quote, urlencode

from testbed.errors import ApiError, Cause, LabError
from testbed.kernel.pace import patient
from testbed.model.json_values import three_way_merge_patch
from testbed.model.objects import BY_KEY, BY_KIND, Object, Resource

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
#: The server closes connections that were idle for 75 s (aiohttp); we drop them sooner, so none dies under a request.
_MAX_IDLE_S = 30.0
ACCOUNT_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")

Applied = Literal["created", "configured", "unchanged"]


class Server(Protocol):
    """Where an API is and how it is spoken to; ``str()`` of it is what messages show."""

    def open(self, timeout_s: float | None) -> http.client.HTTPConnection:
        """Return a connection that connects when it is used."""

    def headers(self) -> Mapping[str, str]:
        """Return what goes with each request."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, socket_path: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._socket_path = socket_path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._socket_path)
        except OSError as error:
            self.sock.close()
            raise LabError(
                f"the lab's API does not answer at {self._socket_path}: {error.strerror or error}"
            ) from error


@dataclass(frozen=True, slots=True)
class UnixServer:
    """The API's socket: who can open it is the administrator."""

    path: str

    def __str__(self) -> str:
        return self.path

    def open(self, timeout_s: float | None) -> http.client.HTTPConnection:
        return _UnixConnection(self.path, timeout_s)

    def headers(self) -> Mapping[str, str]:
        return {}


class _TlsConnection(http.client.HTTPSConnection):
    """One that notices when the other end has vanished, as a cut link makes it: a watch may be silent for hours."""

    def connect(self) -> None:
        super().connect()
        for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            self.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


@dataclass(frozen=True, slots=True)
class ClusterServer:
    """The API as pods reach it. The token is read for each request: the kubelet may replace it."""

    host: str
    port: int
    token_file: Path
    context: ssl.SSLContext

    def __str__(self) -> str:
        return f"https://{self.host}:{self.port}"

    def open(self, timeout_s: float | None) -> http.client.HTTPConnection:
        return _TlsConnection(self.host, self.port, timeout=timeout_s, context=self.context)

    def headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self.token_file.read_text().strip()}"}


def in_cluster(env: Mapping[str, str], folder: Path = ACCOUNT_FOLDER) -> ClusterServer:
    """Return the API that a pod's environment and service account name.

    Raises:
        LabError: this is no pod, or one without a service account's token.
    """
    host, port = env.get("KUBERNETES_SERVICE_HOST", ""), env.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port.isdigit():
        raise LabError("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: this is no pod of a cluster")
    try:
        context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        (folder / "token").read_bytes()
    except OSError as error:
        raise LabError(f"cannot read the service account's {error.filename or folder}: {error.strerror}") from error
    return ClusterServer(host, int(port), folder / "token", context)


class ApiClient:
    """What a lab's API can be asked for. Refusals are raised as ApiError, a lab that is not there as LabError."""

    def __init__(self, server: str | Server, timeout_s: float = 10) -> None:
        """``server``: the path of the API's socket, or another way to reach it."""
        self._server: Server = UnixServer(server) if isinstance(server, str) else server
        self._timeout_s = patient(timeout_s)
        self._local = threading.local()
        self._discovered: dict[tuple[str, str], Resource] = {}  # by apiVersion and kind

    def get(self, resource: str, namespace: str, name: str) -> Object:
        """Return one object."""
        return self._object("GET", self._path(resource, namespace, name))

    def list(
        self, resource: str, namespace: str | None = None, *, label_selector: str = "", field_selector: str = ""
    ) -> tuple[list[Object], str]:
        """Return the objects of a namespace (None: of all) and the resourceVersion to watch from."""
        query = _query(labelSelector=label_selector, fieldSelector=field_selector)
        answer = self._call("GET", self._path(resource, namespace) + query)
        return answer["items"], answer["metadata"]["resourceVersion"]

    def create(self, obj: Object) -> Object:
        """Store a new object and return it as stored."""
        resource, namespace, _ = self._place(obj)
        return self._object("POST", self._path(resource, namespace), obj)

    def update(self, obj: Object, *, subresource: str = "") -> Object:
        """Replace an object and return what is stored now."""
        resource, namespace, name = self._place(obj)
        return self._object("PUT", self._path(resource, namespace, name, subresource), obj)

    def patch(self, resource: str, namespace: str, name: str, patch: Object, *, subresource: str = "") -> Object:
        """Apply a JSON merge patch and return what is stored now."""
        return self._object(
            "PATCH", self._path(resource, namespace, name, subresource), patch, "application/merge-patch+json"
        )

    def delete(self, resource: str, namespace: str, name: str, grace_s: int | None = None) -> Object:
        """Delete an object, or begin to; return what the server answers: the object, or a Status."""
        options: Object = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        return self._object("DELETE", self._path(resource, namespace, name), options)

    def scale(self, resource: str, namespace: str, name: str, replicas: int) -> Object:
        """Set the replicas of a workload and return its Scale."""
        return self.patch(resource, namespace, name, {"spec": {"replicas": replicas}}, subresource="scale")

    def apply(self, obj: Object) -> tuple[Object, Applied]:
        """Make the cluster hold what ``obj`` says, as ``kubectl apply`` does, and say what that took.

        Fields that an earlier apply set and this one leaves out are removed; fields that others set stay. Lists are
        replaced whole, because the patch is a JSON merge patch.
        """
        resource, namespace, name = self._place(obj)
        if not name:
            raise ApiError(400, "BadRequest", "metadata.name: an object without a name can be created, not applied")
        bare = self._without_annotation(obj)
        text = json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
        annotations = {**bare["metadata"]["annotations"], LAST_APPLIED: text}
        modified = {**bare, "metadata": {**bare["metadata"], "annotations": annotations}}
        try:
            current = self.get(resource, namespace, name)
        except ApiError as error:
            if error.code != 404:
                raise
            return self.create(modified), "created"
        last_text = (current["metadata"].get("annotations") or {}).get(LAST_APPLIED)
        try:
            original = json.loads(last_text) if last_text else {}
        except ValueError:
            original = {}  # somebody else's annotation: then nothing is removed
        patch = three_way_merge_patch(original if isinstance(original, dict) else {}, modified, current)
        patch.pop("status", None)
        if not patch:
            return current, "unchanged"
        stored = self.patch(resource, namespace, name, patch)
        same = stored["metadata"]["resourceVersion"] == current["metadata"]["resourceVersion"]
        return stored, "unchanged" if same else "configured"

    def watch(
        self,
        resource: str,
        namespace: str | None = None,
        *,
        resource_version: str = "",
        label_selector: str = "",
        field_selector: str = "",
        timeout_s: float | None = None,
        bookmarks: bool = False,
    ) -> Watch:
        """Return the changes after ``resource_version``; without one, the present state comes first as ADDED."""
        query = _query(
            watch="true",
            resourceVersion=resource_version,
            labelSelector=label_selector,
            fieldSelector=field_selector,
            timeoutSeconds=str(max(1, round(timeout_s))) if timeout_s is not None else "",
            allowWatchBookmarks="true" if bookmarks else "",
        )
        return Watch(self._server, self._path(resource, namespace) + query, self._timeout_s)

    def resource_of(self, obj: Object) -> Resource:
        """Return the resource of an object; one that is not built in is asked for.

        Raises:
            ApiError: 404 when there is none.
        """
        api_version, kind = str(obj.get("apiVersion", "")), str(obj.get("kind", ""))
        found = BY_KIND.get((api_version, kind)) or self._discovered.get((api_version, kind))
        if found is None and api_version.count("/") == 1:
            self._discover(api_version)
            found = self._discovered.get((api_version, kind))
        if found is None:
            raise ApiError(404, "NotFound", f'no matches for kind "{kind}" in version "{api_version}"')
        return found

    def _known(self, key: str) -> Resource:
        found = BY_KEY.get(key) or next((one for one in self._discovered.values() if one.key == key), None)
        group = key.partition(".")[2]
        if found is None and group:
            answer: Object = self._call("GET", f"/apis/{quote(group, safe='')}")
            self._discover(answer["preferredVersion"]["groupVersion"])
            found = next((one for one in self._discovered.values() if one.key == key), None)
        if found is None:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        return found

    def _discover(self, api_version: str) -> None:
        group, version = api_version.split("/")
        try:
            answer = self._call("GET", f"/apis/{quote(group, safe='')}/{quote(version, safe='')}")
        except ApiError as error:
            if error.code != 404:
                raise
            return
        for entry in answer["resources"]:
            if "/" not in entry["name"]:
                self._discovered[(api_version, entry["kind"])] = Resource(
                    group=group, version=version, plural=entry["name"], kind=entry["kind"],
                    namespaced=entry["namespaced"], is_custom=True,
                )  # fmt: skip

    def _path(self, key: str, namespace: str | None, name: str = "", subresource: str = "") -> str:
        resource = self._known(key)
        parts = ["", "apis", resource.group, resource.version] if resource.group else ["", "api", "v1"]
        if resource.namespaced and namespace is not None:
            parts += ["namespaces", namespace]
        parts.append(resource.plural)
        parts += [part for part in (name, subresource) if part]
        return "/".join(quote(part, safe="") for part in parts)

    def _place(self, obj: Object) -> tuple[str, str, str]:
        """Return resource, namespace and name of an object."""
        resource = self.resource_of(obj)
        metadata = obj.get("metadata") or {}
        namespace = metadata.get("namespace") or "default"
        return resource.key, namespace if resource.namespaced else "", metadata.get("name") or ""

    def _without_annotation(self, obj: Object) -> Object:
        metadata = dict(obj["metadata"])
        metadata["annotations"] = {
            key: value for key, value in (metadata.get("annotations") or {}).items() if key != LAST_APPLIED
        }
        if self.resource_of(obj).namespaced:
            metadata.setdefault("namespace", "default")
        return {**obj, "metadata": metadata}

    def set_power(self, node: str, *, on: bool) -> None:
        """Take away a node's power or give it back. ApiError 404 when there is no such node."""
        self._call("PUT", f"/testbed/v1/nodes/{quote(node, safe='')}/power", {"on": on})

    def is_ready(self) -> bool:
        """Say whether the lab answers that it is ready."""
        try:
            return self._request("GET", "/readyz", None, "")[0] == 200
        except (LabError, OSError):
            return False

    def close(self) -> None:
        """Close this thread's connection. The next call opens a new one."""
        connection = self._local.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    def _object(
        self, method: str, path: str, body: Object | None = None, content_type: str = "application/json"
    ) -> Object:
        answer: Object = self._call(method, path, body, content_type)
        return answer

    def _call(self, method: str, path: str, body: Object | None = None, content_type: str = "application/json") -> Any:
        status, answer = self._request(
            method, path, json.dumps(body).encode() if body is not None else None, content_type
        )
        return _decoded(status, answer)

    def _request(self, method: str, path: str, body: bytes | None, content_type: str) -> tuple[int, bytes]:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._server.open(self._timeout_s)
        elif time.monotonic() - self._local.last_used > _MAX_IDLE_S:
            connection.close()
        try:
            headers = {"Accept": "application/json", **self._server.headers()}
            if body is not None:
                headers["Content-Type"] = content_type
            self._local.last_used = time.monotonic()
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            answer = response.read()
        except (http.client.HTTPException, OSError) as error:
            connection.close()
            if isinstance(error, TimeoutError):
                raise LabError(
                    f"the lab's API at {self._server} took over {self._timeout_s:g} s for {method} {path}"
                ) from error
            raise LabError(f"the lab's API at {self._server} broke off during {method} {path}: {error}") from error
        except LabError:
            connection.close()
            raise
        self._local.last_used = time.monotonic()
        return response.status, answer


class Watch:
    """An open watch: iterate over ``(type, object)``; it ends when the server ends it or `close` is called.

    Raises:
        ApiError: The server refused to go on, for example 410: then list and watch again.
        LabError: The connection broke.
    """

    def __init__(self, server: Server, path: str, timeout_s: float) -> None:
        self._server = server
        self._connection = server.open(timeout_s)
        self._closed = False
        self._lines = self._read(path)

    def __iter__(self) -> Iterator[tuple[str, Object]]:
        return self

    def __next__(self) -> tuple[str, Object]:
        kind, obj = next(self._lines)
        if kind == "ERROR":
            self._lines.close()
            raise _error_of(obj, 500)
        return kind, obj

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._lines.close()

    def close(self) -> None:
        """End the watch; may be called from another thread: the iteration then stops, and closes the connection."""
        self._closed = True
        if self._connection.sock is not None:
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads

    def _read(self, path: str) -> Generator[tuple[str, Object], None, None]:
        try:
            self._connection.request("GET", path, headers={"Accept": "application/json", **self._server.headers()})
            response = self._connection.getresponse()
            if response.status != 200:
                _decoded(response.status, response.read())
            if self._connection.sock is not None:
                self._connection.sock.settimeout(None)  # events come when they come
            rest = b""
            while not self._closed and (piece := response.read1(1 << 16)):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    yield event["type"], event["object"]
        except (http.client.HTTPException, OSError, ValueError) as error:
            if not self._closed:
                raise LabError(f"the watch of {path} broke off: {error}") from error
        finally:
            self._connection.close()


def _decoded(status: int, answer: bytes) -> Any:
    try:
        value = json.loads(answer)
    except ValueError:
        raise LabError(f"the lab's API answered {status} with no JSON: {answer[:200]!r}") from None
    if status >= 400:
        raise _error_of(value, status)
    return value


def _error_of(status: Object, code: int) -> ApiError:
    details = dict(status.get("details") or {})
    causes = [
        Cause(cause.get("field", ""), cause.get("message", ""), cause.get("reason", ""))
        for cause in details.pop("causes", ())
    ]
    return ApiError(
        status.get("code", code), status.get("reason", ""), status.get("message", ""), causes=causes, details=details
    )


def _query(**parameters: str) -> str:
    given = {name: value for name, value in parameters.items() if value}
    return "?" + urlencode(given) if given else ""
