"""The one process of a lab that forks, unshares and enters namespaces: single-threaded, preloaded, without an event loop.

It builds the underlay, then answers requests: from the control process (pods' sandboxes and containers), over a socket
pair, and from command lines outside the lab (where is what, links, Mininet's CLI), over a socket in the lab's folder.
Every child is known by its pidfd, so that nobody's exit status is ever taken by somebody else's wait.

A request is ``(number, operation, keyword arguments)``; its answer ``(number, value)`` or ``(number, exception)``. Ends of
containers are sent to the control process unasked, as ``(None, ("ended", container id, ExitStatus))``.
"""

from __future__ import annotations

import gc
import hashlib
import heapq
import os
import selectors
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from testbed.dataplane.outside_dns import render_outside_dnsmasq, render_outside_hosts
from testbed.errors import InputError, KernelError, NotPresent, TestbedError
from testbed.kernel.processes import Target, exec_child, exit_code, fork_in, reset_signals
from testbed.kernel.rootfs import Bind
from testbed.kubelet.runtime import ContainerSpec, ExecResult, ExitStatus, Mount, SandboxSpec, Volume
from testbed.lab.container import (
    LOG_MODE,
    ContainerStart,
    environment_of,
    fork_container,
    identity_of,
    order_of,
    prepare_mounts,
)
from testbed.lab.forker import FORKED_ELSEWHERE, Forker
from testbed.lab.frames import FrameReader, send_frame
from testbed.model.topology import Topology
from testbed.underlay.holder import Holder
from testbed.underlay.hosts import inside_network
from testbed.underlay.network import LabNetwork, make_private_folder

_OUTPUT_LIMIT = 10 * 1024  # what a kubelet keeps of a probe's output

Reply = Callable[[Any, Sequence[int]], None]


@dataclass(slots=True)
class _Sandbox:
    spec: SandboxSpec
    folder: str
    containers: dict[str, _Container] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.spec.namespace}/{self.spec.pod_name}"


@dataclass(slots=True)
class _Container:
    spec: ContainerSpec
    folder: str
    pid: int
    pidfd: int
    ended: bool = False


class Spawner:
    """The state of the spawner; `serve` runs it until the control process or the lab ends."""

    def __init__(
        self, topology: Topology, lab_folder: str, control: socket.socket, forker: Forker | None = None
    ) -> None:
        self.lab_folder = lab_folder
        self.private = make_private_folder(lab_folder)
        self.network = LabNetwork(topology, lab_folder, self.private)
        self._control = control
        self._forker = forker
        self._selector = selectors.DefaultSelector()
        self._sandboxes: dict[str, _Sandbox] = {}
        self._containers: dict[str, _Container] = {}
        self._keep = _folders_to_keep()
        self._deadlines: list[tuple[float, int, Callable[[], None]]] = []
        self._deadline_count = 0
        self._lifelines: list[int] = []
        self._control_gone: Callable[[], None] = lambda: None

    # -- serving ---------------------------------------------------------------------------------------------------

    def serve(self, listener: socket.socket, *, until: Sequence[int] = ()) -> None:
        """Answer requests until the control process is gone, or one of the descriptors ``until`` reports an end."""
        self._add_connection(self._control)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
        running = True

        def stop() -> None:
            nonlocal running
            running = False

        self._lifelines = list(until)
        for fd in until:
            self._selector.register(fd, selectors.EVENT_READ, stop)
        self._control_gone = stop
        gc.collect()
        gc.freeze()  # what exists now is shared with every child; collecting would copy its pages
        while running:
            for key, _events in self._selector.select(self._until_next_deadline()):
                key.data()
            while self._deadlines and self._deadlines[0][0] <= time.monotonic():
                heapq.heappop(self._deadlines)[2]()

    def _until_next_deadline(self) -> float | None:
        return max(0.0, self._deadlines[0][0] - time.monotonic()) if self._deadlines else None

    def _call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self._deadline_count += 1
        heapq.heappush(self._deadlines, (time.monotonic() + delay_s, self._deadline_count, call))

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.setblocking(True)
        self._add_connection(connection)

    def _add_connection(self, connection: socket.socket) -> None:
        reader = FrameReader(connection)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(connection, reader))

    def _read(self, connection: socket.socket, reader: FrameReader) -> None:
        try:
            messages = reader.receive()
        except ConnectionError:
            messages = None
        if messages is None:
            self._selector.unregister(connection)
            connection.close()
            if connection is self._control:
                self._control_gone()
            return
        for (number, operation, arguments), fds in messages:
            self._answer(connection, number, operation, arguments, fds)

    def _answer(
        self, connection: socket.socket, number: int, operation: str, arguments: dict[str, Any], fds: list[int]
    ) -> None:
        answered = False

        def reply(value: Any, reply_fds: Sequence[int] = ()) -> None:
            nonlocal answered
            answered = True
            try:
                send_frame(connection, (number, value), reply_fds)
            except OSError:
                return  # whoever asked has gone away

        try:
            getattr(self, f"do_{operation}")(reply, fds, **arguments)
        except Exception as error:
            if answered:
                raise
            reply(error if isinstance(error, TestbedError | OSError) else KernelError(f"{operation}: {error!r}"))
        finally:
            for fd in fds:
                os.close(fd)

    def _watch_child(self, pid: int, ended: Callable[[int], None]) -> int:
        """Call ``ended(wait status)`` once when a child ends; return its pidfd."""
        fd = os.pidfd_open(pid)

        def reap() -> None:
            self._selector.unregister(fd)
            _, status = os.waitpid(pid, 0)
            ended(status)

        self._selector.register(fd, selectors.EVENT_READ, reap)
        return fd

    def start_outside_dns(self) -> None:
        """Run the DNS server of the topology's outside names on its host, if it has one, until that or the lab ends."""
        host = self.network.topology.outside_dns
        if not host:
            return
        folder = Path(self.private, "outside-dns")
        folder.mkdir()
        (folder / "hosts").write_text(render_outside_hosts(self.network.topology))
        config = folder / "dnsmasq.conf"
        config.write_text(render_outside_dnsmasq(self.network.topology, str(folder / "hosts")))
        place = Target(name=host, pidfd=self.network[host].holder.pidfd, env=dict(os.environ))
        pid = fork_in(place, exec_child(place, ["dnsmasq", "--keep-in-foreground", "-C", str(config)]))
        self._watch_child(pid, lambda status: print(f"outside DNS on {host} ended: {exit_code(status)}", flush=True))

    # -- sandboxes -------------------------------------------------------------------------------------------------

    def do_create_sandbox(self, reply: Reply, _fds: list[int], *, spec: SandboxSpec) -> None:
        if spec.pod_uid in self._sandboxes:
            raise KernelError(f"{spec.namespace}/{spec.pod_name}: its sandbox is there already")
        sandbox = _Sandbox(spec, f"{self.private}/pods/{spec.pod_uid}")
        os.makedirs(f"{sandbox.folder}/volumes")
        try:
            for volume in spec.volumes:
                self._fill_volume(sandbox, volume.name, volume.files)
            if spec.address is not None and spec.network is not None:
                digest = hashlib.sha256(spec.pod_uid.encode()).hexdigest()
                self.network.add_pod(
                    sandbox.name,
                    f"veth{digest[:8]}",
                    node=spec.node,
                    hostname=spec.hostname,
                    address=spec.address,
                    network=spec.network,
                )
        except BaseException:
            shutil.rmtree(sandbox.folder, ignore_errors=True)
            raise
        self._sandboxes[spec.pod_uid] = sandbox
        reply(None, ())

    def do_remove_sandbox(self, reply: Reply, _fds: list[int], *, pod_uid: str) -> None:
        sandbox = self._sandboxes.pop(pod_uid, None)
        if sandbox is not None:
            for container in list(sandbox.containers.values()):
                self._remove_container(sandbox, container)
            if sandbox.spec.address is not None:
                self.network.delete_pod(sandbox.name)
            shutil.rmtree(sandbox.folder, ignore_errors=True)
        reply(None, ())

    def do_update_volume(
        self, reply: Reply, _fds: list[int], *, pod_uid: str, volume: str, files: Mapping[str, str]
    ) -> None:
        self._fill_volume(self._sandbox(pod_uid), volume, files)
        reply(None, ())

    def _sandbox(self, pod_uid: str) -> _Sandbox:
        try:
            return self._sandboxes[pod_uid]
        except KeyError:
            raise NotPresent(f"pod {pod_uid} has no sandbox") from None

    def _fill_volume(self, sandbox: _Sandbox, name: str, files: Mapping[str, str] | None) -> None:
        """Make a volume's files be exactly these, each replaced in one step so that no reader sees half of one."""
        folder = Path(sandbox.folder, "volumes", name)
        folder.mkdir(exist_ok=True)
        if files is None:
            folder.chmod(0o777)  # an emptyDir, open to every user of the pod
            return
        wanted = set()
        for relative, text in files.items():
            path = folder / relative
            if not path.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{sandbox.name}: volume {name!r}: file name {relative!r} leads out of the volume")
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f"..{path.name}.new")
            new.write_text(text)
            new.replace(path)
            wanted.add(path)
        for path in [path for path in folder.rglob("*") if path.is_file() and path not in wanted]:
            path.unlink()

    # -- containers ------------------------------------------------------------------------------------------------

    def do_start_container(self, reply: Reply, _fds: list[int], *, spec: ContainerSpec) -> None:
        sandbox = self._sandbox(spec.pod_uid)
        folder = f"{sandbox.folder}/{spec.container_id}"
        for part in ("upper", "work"):
            os.makedirs(f"{folder}/{part}")
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            container = self._start(sandbox, spec, folder, writing)
        except OSError as error:
            os.close(reading)
            raise KernelError(f"{sandbox.name}: could not start container {spec.name!r}: {error.strerror}") from error
        finally:
            os.close(writing)
        self._containers[spec.container_id] = container
        sandbox.containers[spec.container_id] = container
        os.set_blocking(reading, False)
        started = partial(self._container_started, reading, sandbox, container, reply)
        self._selector.register(reading, selectors.EVENT_READ, started)

    def _container_started(self, reading: int, sandbox: _Sandbox, container: _Container, reply: Reply) -> None:
        """The pipe closed: by exec, which means the program runs, or with words, which say why it does not."""
        problem = os.read(reading, 4096)
        self._selector.unregister(reading)
        os.close(reading)
        if problem:
            message = problem.decode(errors="replace")
            reply(KernelError(f"{sandbox.name}: could not start container {container.spec.name!r}: {message}"), ())
        else:
            reply(None, ())

    def _container_ended(self, container: _Container, status: int) -> None:
        container.ended = True
        ended = ExitStatus(exit_code(status), os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
        try:
            send_frame(self._control, (None, ("ended", container.spec.container_id, ended)))
        except OSError:
            return  # the control process is gone, and with it the lab

    def _start(self, sandbox: _Sandbox, spec: ContainerSpec, folder: str, report: int) -> _Container:
        """Fork the first process of a container, here or, for the echo server, in the forker."""
        start = ContainerStart(
            sandbox=sandbox.spec,
            spec=spec,
            folder=folder,
            log=f"{sandbox.folder}/{spec.name}.log",
            binds=tuple(self._bind(sandbox, mount) for mount in spec.mounts),
            keep=self._keep,
        )
        node: Holder = self.network[sandbox.spec.node].holder
        place: Holder = node if sandbox.spec.address is None else self.network[sandbox.name].holder
        if spec.builtin == FORKED_ELSEWHERE and self._forker is not None:
            pid = self._fork_elsewhere(self._forker, start, node, place, report)
        else:
            pid = fork_container(start, node.pidfd, place.network_fd, place.uts_fd, report)
        container = _Container(spec, folder, pid, -1)
        container.pidfd = self._watch_child(pid, lambda status: self._container_ended(container, status))
        return container

    def _fork_elsewhere(
        self, forker: Forker, start: ContainerStart, node: Holder, place: Holder, report: int
    ) -> int:  # fmt: skip
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        log = os.open(start.log, LOG_MODE, 0o600)
        mounts = -1
        try:
            mounts = prepare_mounts(start, node.pidfd, place.network_fd)
            return forker.fork(order_of(start.spec), (mounts, place.network_fd, place.uts_fd, report, null, log, log))
        finally:
            for fd in (null, log, mounts):
                if fd >= 0:
                    os.close(fd)

    def _bind(self, sandbox: _Sandbox, mount: Mount) -> Bind:
        volume = next((found for found in sandbox.spec.volumes if found.name == mount.volume), None)
        if volume is None:
            raise KernelError(f"{sandbox.name}: no volume {mount.volume!r} to mount at {mount.path}")
        source = self._volume_path(sandbox, volume)
        if mount.sub_path:
            # An emptyDir is the pod's to write: a link in it must not lead the mount out of the volume.
            inside = os.path.realpath(f"{source}/{mount.sub_path}")
            if not volume.host_path and not inside.startswith(f"{os.path.realpath(source)}/"):
                raise InputError(f"{sandbox.name}: subPath {mount.sub_path!r} leads out of volume {volume.name!r}")
            if volume.files is None and not os.path.exists(inside):
                os.makedirs(inside)
            source = inside
        return Bind(source, mount.path, mount.read_only or volume.files is not None)

    def _volume_path(self, sandbox: _Sandbox, volume: Volume) -> str:
        return volume.host_path or f"{sandbox.folder}/volumes/{volume.name}"

    def do_signal_container(self, reply: Reply, _fds: list[int], *, container_id: str, signal_number: int) -> None:
        container = self._containers.get(container_id)
        if container is not None and not container.ended:
            signal.pidfd_send_signal(container.pidfd, signal_number)
        reply(None, ())

    def do_remove_container(self, reply: Reply, _fds: list[int], *, container_id: str) -> None:
        container = self._containers.get(container_id)
        if container is not None:
            self._remove_container(self._sandbox(container.spec.pod_uid), container)
        reply(None, ())

    def _remove_container(self, sandbox: _Sandbox, container: _Container) -> None:
        if not container.ended:
            signal.pidfd_send_signal(container.pidfd, signal.SIGKILL)
            self._selector.unregister(container.pidfd)
            _, status = os.waitpid(container.pid, 0)
            self._container_ended(container, status)
        os.close(container.pidfd)
        shutil.rmtree(container.folder, ignore_errors=True)
        del self._containers[container.spec.container_id], sandbox.containers[container.spec.container_id]

    def do_exec(
        self, reply: Reply, _fds: list[int], *, container_id: str, argv: Sequence[str], timeout_s: float
    ) -> None:  # fmt: skip
        """Run a command in a container; answer with an ExecResult when it has ended or its time is over."""
        container = self._containers.get(container_id)
        if container is None or container.ended:
            raise NotPresent(f"container {container_id} is not running")
        sandbox = self._sandbox(container.spec.pod_uid)
        output = os.memfd_create("output")
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            target = self._container_target(sandbox, container)
            pid = fork_in(target, exec_child(target, argv, (null, output, output)))
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(null)
        has_ended = late = False

        def ended(status: int) -> None:
            nonlocal has_ended
            has_ended = True
            os.close(pidfd)
            text = os.pread(output, _OUTPUT_LIMIT, 0).decode(errors="replace")
            os.close(output)
            reply(ExecResult(124 if late else exit_code(status), text), ())

        def expire() -> None:
            nonlocal late
            if not has_ended:
                late = True
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

        pidfd = self._watch_child(pid, ended)
        self._call_later(timeout_s, expire)

    def do_connect(
        self, reply: Reply, _fds: list[int], *, node: str
    ) -> None:  # fmt: skip
        """Answer with a TCP socket that belongs to a node's network namespace."""
        with inside_network(self.network[node].holder.network_fd):
            made = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        with made:
            reply(None, (made.fileno(),))

    # -- for command lines -----------------------------------------------------------------------------------------

    def do_target(self, reply: Reply, _fds: list[int], *, where: str) -> None:
        """Answer with a Target (without pidfd) and its pidfd: a node, an outside host, or NAMESPACE/POD[/CONTAINER]."""
        namespace, _, rest = where.partition("/")
        if rest:
            pod, _, container_name = rest.partition("/")
            sandbox = next((s for s in self._sandboxes.values() if s.name == f"{namespace}/{pod}"), None)
            if sandbox is None:
                names = ", ".join(sorted(s.name for s in self._sandboxes.values())) or "none"
                raise InputError(f"there is no pod {where!r} in this lab; pods: {names}")
            running = [c for c in sandbox.containers.values() if not c.ended and container_name in ("", c.spec.name)]
            if not running:
                wanted = f"container {container_name!r}" if container_name else "container"
                raise NotPresent(f"pod {sandbox.name} has no running {wanted}; see its status and events")
            target = self._container_target(sandbox, running[0])
        elif where in self.network.nameToNode and where not in {switch.name for switch in self.network.switches}:
            target = Target(name=where, pidfd=self.network[where].holder.pidfd)
        else:
            hosts = ", ".join(host.name for host in self.network.hosts if "/" not in host.name)
            raise InputError(f"there is no {where!r} in this lab; nodes and hosts: {hosts}; a pod is NAMESPACE/POD")
        answer = Target(
            name=target.name, pidfd=-1, env=target.env, cwd=target.cwd, uid=target.uid, gid=target.gid,
            groups=target.groups, capabilities=target.capabilities,
        )  # fmt: skip
        reply(answer, (target.pidfd,))

    def _container_target(self, sandbox: _Sandbox, container: _Container) -> Target:
        return identity_of(sandbox.name, container.spec, container.pidfd, environment_of(sandbox.spec, container.spec))

    def do_topology(self, reply: Reply, _fds: list[int]) -> None:
        reply(self.network.topology, ())

    def do_detach(self, reply: Reply, _fds: list[int]) -> None:
        """Live on when whoever started the lab has ended."""
        for fd in self._lifelines:
            self._selector.unregister(fd)
            os.close(fd)
        self._lifelines = []
        reply(None, ())

    def do_places(self, reply: Reply, _fds: list[int]) -> None:
        """Answer with the names of nodes, outside hosts and pods."""
        hosts = [host.name for host in self.network.hosts if "/" not in host.name]
        reply({"hosts": hosts, "pods": sorted(s.name for s in self._sandboxes.values())}, ())

    def do_set_link(self, reply: Reply, _fds: list[int], *, where: str, up: bool) -> None:
        self.network.set_link(where, up=up)
        reply(None, ())

    def do_signal_pod(self, reply: Reply, _fds: list[int], *, pod: str, signal_number: int) -> None:
        """Send a signal to the first process of every container of a pod."""
        sandbox = next((s for s in self._sandboxes.values() if s.name == pod), None)
        if sandbox is None:
            raise InputError(f"there is no pod {pod!r} in this lab")
        for container in sandbox.containers.values():
            if not container.ended:
                signal.pidfd_send_signal(container.pidfd, signal_number)
        reply(None, ())

    def do_cli(self, reply: Reply, fds: list[int]) -> None:
        """Run Mininet's CLI on the caller's terminal (three descriptors); answer when it ends."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for number, fd in enumerate(fds[:3]):
                    os.dup2(fd, number)
                reset_signals()
                _run_cli(self.network)
                status = 0
            finally:
                os._exit(status)
        pidfd = -1

        def ended(status: int) -> None:
            os.close(pidfd)
            reply(exit_code(status), ())

        pidfd = self._watch_child(pid, ended)


def preload() -> None:
    """Import what forked programs run: a cold import of kube-proxy would cost each node 0.3 s, shared pages cost nothing."""
    import yaml

    from testbed.programs import builtins, dns, kube_proxy

    del yaml, builtins, dns, kube_proxy


def _run_cli(network: LabNetwork) -> None:
    from testbed.underlay.stock import CLI

    if os.isatty(0):
        CLI(network)
        return
    # Commands from a file or a pipe: Mininet would give the lines that follow a command to that command as its input.
    never, held_open = os.pipe()
    with open(never) as nothing, open(held_open, "w"):
        CLI(network, stdin=nothing)


def _folders_to_keep() -> tuple[str, ...]:
    """Return folders that our own programs may still import from, wherever they are mounted."""
    import sys

    package = Path(__file__).resolve().parents[2]
    return tuple(dict.fromkeys((str(package), sys.prefix, sys.base_prefix)))
