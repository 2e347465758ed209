"""The seam between the kubelet and the process that makes namespaces: plain requests, plain answers.

A *sandbox* is a pod's network and UTS namespace. A *container* is one start of one program in it, with a mount and PID
namespace and a fresh overlay file system of its own: a restart keeps the address and loses the files. Volumes belong to
the sandbox and outlive containers.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Something to mount. With ``files`` it is filled with them; with ``host_path`` it is that path of the node."""

    name: str
    #: Relative path -> text, bytes that are not UTF-8 as surrogate escapes (PEP 383); None for an emptyDir.
    files: Mapping[str, str] | None = None
    host_path: str = ""
    host_type: str = ""  # what must be there, or is made: hostPath's ``type``
    default_mode: int = 0o644
    modes: Mapping[str, int] = field(default_factory=dict)  # of single files, by relative path
    group: int | None = None  # the pod's fsGroup: owns the files, and may read them whatever their mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """Where a container sees a volume. ``sub_path`` names one entry of the volume, '' all of it."""

    volume: str
    path: str
    sub_path: str = ""
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """A pod's namespaces and network. ``address`` is None for hostNetwork: the pod then joins the node's namespaces."""

    pod_uid: str
    namespace: str
    pod_name: str
    node: str
    hostname: str
    address: IPv4Address | None
    network: IPv4Network | None  # the node's pod CIDR; its first address is the gateway, cni0
    etc_files: Mapping[str, str] = field(default_factory=dict)  # 'hosts', 'resolv.conf', 'hostname' -> text
    volumes: tuple[Volume, ...] = ()


def pod_link_name(pod_uid: str) -> str:
    """Return the name of the node's end of a pod's link."""
    return f"veth{hashlib.sha256(pod_uid.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """One start of one container.

    Either ``argv`` is run, or, when ``builtin`` names one of our own programs (`programs.catalogue`), that program with
    ``builtin_args`` (JSON values).
    """

    container_id: str  # unique over restarts
    pod_uid: str
    name: str
    argv: tuple[str, ...] = ()
    builtin: str = ""
    builtin_args: Mapping[str, object] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    add_capabilities: tuple[str, ...] = ()  # 'NET_ADMIN'; container runtimes' default set is the base
    drop_capabilities: tuple[str, ...] = ()  # 'ALL' empties the set
    privileged: bool = False
    files: Mapping[str, str] = field(default_factory=dict)  # absolute path -> text, written into the fresh overlay
    own_folders: tuple[str, ...] = ()  # folders of the image that belong to the container's user
    file_capabilities: tuple[
        str, ...
    ] = ()  # of the image's program: what a user other than root gets, if it is allowed
    mounts: tuple[Mount, ...] = ()
    stdin: bool = False  # somebody may write to it; else it reads the end of the file
    tty: bool = False  # its standard streams are one terminal


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a program ended: ``code`` as a shell shows it (128 + signal when a signal ended it)."""

    code: int
    signal: int = 0


@dataclass(frozen=True, slots=True)
class ExecResult:
    """The end of a command run inside a container. ``status`` is 124 when it ran out of time and was killed."""

    status: int
    output: str  # stdout and stderr, at most 10 KiB of the beginning


class Output(Protocol):
    """Takes what a container writes."""

    def write(self, stream: int, data: bytes) -> None:
        """Take what has arrived on stream 1 (standard output, or the terminal) or 2 (standard error)."""

    def close(self) -> None:
        """Nothing will follow."""


class Input(Protocol):
    """The way into a running program. Nothing here fails because the program has ended, or reads nothing."""

    async def write(self, data: bytes) -> None:
        """Return when the program's side has taken the data (or is gone)."""

    def close(self) -> None:
        """Let the program read the end of its standard input."""

    def resize(self, columns: int, rows: int) -> None:
        """Set the size of the terminal, if it is one."""


class Session(Input, Protocol):
    """A program with somebody at its other end."""

    async def read(self) -> tuple[int, bytes] | None:
        """Return the next (stream, data); None when there will be no more. Waits for nobody who does not call it."""

    async def wait(self) -> ExitStatus: ...

    def leave(self) -> None:
        """Close our side. The program is not killed: it may go on without us, as on a cluster."""


class Runtime(Protocol):
    """Makes and removes sandboxes and containers. Every failure is a KernelError that names the pod."""

    async def create_sandbox(self, spec: SandboxSpec) -> None: ...

    async def remove_sandbox(self, pod_uid: str) -> None:
        """Remove namespaces, links, volumes and what is left of its containers; succeeds when it is not there."""

    async def update_volume(self, pod_uid: str, volume: str, files: Mapping[str, str]) -> None:
        """Replace the files of a volume in place, so that running containers see them."""

    async def start_container(self, spec: ContainerSpec, output: Output) -> Input:
        """Return when the program has been exec'd. KernelError when it cannot be (file not found, no permission).

        What it writes goes to ``output``, which is closed when it has ended and all is read.
        """

    async def wait_container(self, container_id: str) -> ExitStatus:
        """Return when the container's first process has ended (and with it all others) and its output is read."""

    async def signal_container(self, container_id: str, signal: int) -> None:
        """Send a signal to the first process; succeeds when it has ended already."""

    async def remove_container(self, container_id: str) -> None:
        """Drop its file system and what is known of it."""

    async def exec(self, container_id: str, argv: Sequence[str], *, timeout_s: float) -> ExecResult: ...

    async def open_exec(self, container_id: str, argv: Sequence[str], *, stdin: bool, tty: bool) -> Session:
        """Run a program in a container with its streams in our hands. KernelError when it cannot be started."""

    async def connect_pod(self, pod_uid: str, port: int, *, timeout_s: float) -> socket.socket:
        """Return a non-blocking TCP socket, connected to a port of the pod's own loopback. Raises OSError."""

    async def connect(self, node: str, address: IPv4Address, port: int, *, timeout_s: float) -> socket.socket:
        """Return a connected, non-blocking TCP socket that belongs to the node's network namespace (for probes).

        Raises OSError (ConnectionRefusedError, TimeoutError) as a kubelet on that node would see it.
        """
