"""The one process of a lab that forks, unshares and enters namespaces: single-threaded, preloaded, without an event loop.

It builds the underlay, then answers requests: from the control process (pods' sandboxes and containers), over a socket
pair, and from command lines outside the lab (where is what, links, Mininet's CLI), over a socket in the lab's folder.
Every child is known by its pidfd, so that nobody's exit status is ever taken by somebody else's wait.

A request is ``(number, operation, keyword arguments)``; its answer ``(number, value)`` or ``(number, exception)``. Ends of
containers and of execs are sent to the control process unasked, as ``(None, ("ended", its id, ExitStatus))``.
"""

from __future__ import annotations

import gc
import heapq
import os
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from testbed.dataplane.outside_dns import render_outside_dnsmasq, render_outside_hosts
from testbed.errors import InputError, KernelError, NotPresent, TestbedError
from testbed.kernel.netns import inside_network
from testbed.kernel.processes import Target, exec_child, exit_code, fork_in, reset_signals, session_child
from testbed.kernel.rootfs import Bind
from testbed.kubelet.runtime import ContainerSpec, ExecResult, ExitStatus, Mount, SandboxSpec, Volume, pod_link_name
from testbed.lab.container import (
    ContainerStart,
    environment_of,
    fork_container,
    identity_of,
    order_of,
    prepare_mounts,
)
from testbed.lab.folder import describe_oserror
from testbed.lab.forker import FORKED_ELSEWHERE, Forker, ForkerGone
from testbed.lab.frames import FrameReader, send_frame
from testbed.lab.hostpaths import HostPaths
from testbed.lab.streams import Streams
from testbed.lab.volumefiles import write_atomically
from testbed.model.topology import Topology
from testbed.underlay.holder import Holder
from testbed.underlay.network import LabNetwork, make_private_folder

_OUTPUT_LIMIT = 10 * 1024  # what a kubelet keeps of a probe's output
_ACCEPT_AGAIN_S = 0.1

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
    sandbox: _Sandbox
    ended: bool = False
    when_ended: list[Callable[[], None]] = field(default_factory=list)


class Spawner:
    """The state of the spawner; `serve` runs it until the control process or the lab ends."""

    def __init__(
        self,
        topology: Topology,
        lab_folder: str,
        control: socket.socket,
        forker: Forker | None = None,
        iptables_backend: str = "",
    ) -> None:
        self.lab_folder = lab_folder
        self.private = make_private_folder(lab_folder)
        self.network = LabNetwork(topology, lab_folder, self.private, iptables_backend)
        self._control = control
        self._forker = forker
        self._selector = selectors.DefaultSelector()
        self._sandboxes: dict[str, _Sandbox] = {}
        self._containers: dict[str, _Container] = {}
        self._host_paths = HostPaths(lab_folder, self.private)
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
        self._listen(listener)
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
                # What was handled before it may have closed this one, and its number may already be somebody else's.
                if self._selector.get_map().get(key.fd) is key:
                    _call(key.data)
            while self._deadlines and self._deadlines[0][0] <= time.monotonic():
                _call(heapq.heappop(self._deadlines)[2])

    def _until_next_deadline(self) -> float | None:
        return max(0.0, self._deadlines[0][0] - time.monotonic()) if self._deadlines else None

    def _call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self._deadline_count += 1
        heapq.heappush(self._deadlines, (time.monotonic() + delay_s, self._deadline_count, call))

    def _listen(self, listener: socket.socket) -> None:
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:  # who called has gone away
            return
        except OSError as error:  # no descriptor is free: the caller waits until one is
            _log(f"cannot answer a command line: {error.strerror}")
            self._selector.unregister(listener)
            self._call_later(_ACCEPT_AGAIN_S, lambda: self._listen(listener))
            return
        connection.setblocking(True)
        self._add_connection(connection)

    def _add_connection(self, connection: socket.socket) -> None:
        reader = FrameReader(connection)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(connection, reader))

    def _read(self, connection: socket.socket, reader: FrameReader) -> None:
        try:
            messages = reader.receive()
        except Exception as error:  # what follows on a connection that we cannot read has no beginning
            if not isinstance(error, ConnectionError):
                _log(f"cannot read a request: {error!r}")
            messages = None
        if messages is None:
            self._selector.unregister(connection)
            connection.close()
            if connection is self._control:
                self._control_gone()
            return
        for message, fds in messages:
            _call(partial(self._answer, connection, message, fds))

    def _answer(self, connection: socket.socket, message: tuple[int, str, dict[str, Any]], fds: list[int]) -> None:
        number, operation, arguments = message
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
        self._watch_child(pid, lambda status: _log(f"outside DNS on {host} ended: {exit_code(status)}"))

    # -- sandboxes -------------------------------------------------------------------------------------------------

    def do_create_sandbox(self, reply: Reply, _fds: list[int], *, spec: SandboxSpec) -> None:
        if spec.pod_uid in self._sandboxes:
            raise KernelError(f"{spec.namespace}/{spec.pod_name}: its sandbox is there already")
        sandbox = _Sandbox(spec, f"{self.private}/pods/{spec.pod_uid}")
        os.makedirs(f"{sandbox.folder}/volumes")
        try:
            for volume in spec.volumes:
                self._fill_volume(sandbox, volume, volume.files)
            if spec.address is not None and spec.network is not None:
                self.network.add_pod(
                    sandbox.name,
                    pod_link_name(spec.pod_uid),
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
        sandbox = self._sandboxes.get(pod_uid)
        if sandbox is None:
            reply(None, ())
            return

        def finish() -> None:
            if sandbox.containers:
                return
            if self._sandboxes.pop(pod_uid, None) is not None:
                if sandbox.spec.address is not None:
                    self.network.delete_pod(sandbox.name)
                shutil.rmtree(sandbox.folder, ignore_errors=True)
            reply(None, ())

        if not sandbox.containers:
            finish()
        for container in list(sandbox.containers.values()):
            self._remove_container(container, finish)

    def do_update_volume(
        self, reply: Reply, _fds: list[int], *, pod_uid: str, volume: str, files: Mapping[str, str]
    ) -> None:
        sandbox = self._sandbox(pod_uid)
        known = next((one for one in sandbox.spec.volumes if one.name == volume), None)
        if known is None:
            raise NotPresent(f"{sandbox.name} has no volume {volume!r}")
        self._fill_volume(sandbox, known, files)
        reply(None, ())

    def _sandbox(self, pod_uid: str) -> _Sandbox:
        try:
            return self._sandboxes[pod_uid]
        except KeyError:
            raise NotPresent(f"pod {pod_uid} has no sandbox") from None

    def _fill_volume(self, sandbox: _Sandbox, volume: Volume, files: Mapping[str, str] | None) -> None:
        """Make a volume's files be exactly these, all changed in one step."""
        folder = Path(sandbox.folder, "volumes", volume.name)
        folder.mkdir(exist_ok=True)
        if files is None:
            folder.chmod(0o777)  # an emptyDir, open to every user of the pod
            return
        for path in files:
            inside = os.path.normpath(path)
            if inside.startswith(("/", "..")) or inside == ".":
                raise InputError(f"{sandbox.name}: volume {volume.name!r}: file name {path!r} leads out of the volume")
        write_atomically(folder, files, volume.modes, volume.default_mode, volume.group)

    # -- containers ------------------------------------------------------------------------------------------------

    def do_start_container(self, reply: Reply, _fds: list[int], *, spec: ContainerSpec) -> None:
        sandbox = self._sandbox(spec.pod_uid)
        folder = f"{sandbox.folder}/{spec.container_id}"
        _make_layers(folder)
        streams = Streams.make(stdin=spec.stdin, tty=spec.tty)
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            container = self._start(sandbox, spec, folder, writing, streams)
        except BaseException as error:
            os.close(reading)
            streams.close()
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                reason = f"could not start container {spec.name!r}: {describe_oserror(error)}"
                raise KernelError(f"{sandbox.name}: {reason}") from error
            raise
        finally:
            os.close(writing)
            streams.close_theirs()
        self._containers[spec.container_id] = container
        sandbox.containers[spec.container_id] = container
        failed = f"{sandbox.name}: could not start container {spec.name!r}: "
        self._when_started(reading, streams, failed, reply)

    def _when_started(self, reading: int, streams: Streams, failed: str, reply: Reply) -> None:
        """Answer with our side of a program's streams when it runs, or with why it does not.

        The pipe closes by exec, which means that it runs, or with words. Until then the streams hold what it writes.
        """
        os.set_blocking(reading, False)

        def started() -> None:
            self._selector.unregister(reading)
            try:
                problem = os.read(reading, 4096)
                os.close(reading)
                if problem:
                    reply(KernelError(failed + problem.decode(errors="replace")), ())
                else:
                    reply(None, streams.take())
            finally:
                streams.close()

        self._selector.register(reading, selectors.EVENT_READ, started)

    def _container_ended(self, container: _Container, status: int) -> None:
        container.ended = True
        self._tell_end(container.spec.container_id, status)
        for call in container.when_ended:
            call()

    def _tell_end(self, what: str, status: int) -> None:
        ended = ExitStatus(exit_code(status), os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
        try:
            send_frame(self._control, (None, ("ended", what, ended)))
        except OSError:
            return  # the control process is gone, and with it the lab

    def _start(
        self, sandbox: _Sandbox, spec: ContainerSpec, folder: str, report: int, streams: Streams
    ) -> _Container:  # fmt: skip
        """Fork the first process of a container, here or, for the echo server, in the forker as long as that lives."""
        start = ContainerStart(
            sandbox=sandbox.spec,
            spec=spec,
            folder=folder,
            binds=tuple(self._bind(sandbox, mount, privileged=spec.privileged) for mount in spec.mounts),
            keep=self._keep,
            hide=(os.path.realpath(self.lab_folder),),
        )
        node: Holder = self.network[sandbox.spec.node].holder
        place: Holder = node if sandbox.spec.address is None else self.network[sandbox.name].holder
        pid = 0
        if spec.builtin == FORKED_ELSEWHERE and self._forker is not None and not spec.tty:
            pid = self._fork_elsewhere(self._forker, start, node, place, report, streams)
        if not pid:
            pid = fork_container(start, node.pidfd, place.network_fd, place.uts_fd, report, *streams.theirs)
        container = _Container(spec, folder, pid, -1, sandbox)
        container.pidfd = self._watch_child(pid, lambda status: self._container_ended(container, status))
        return container

    def _fork_elsewhere(
        self, forker: Forker, start: ContainerStart, node: Holder, place: Holder, report: int, streams: Streams
    ) -> int:  # fmt: skip
        """Return the pid of a container that the forker has forked; 0 when there is no forker any more."""
        mounts = prepare_mounts(start, node.pidfd, place.network_fd)
        try:
            fds = (mounts, place.network_fd, place.uts_fd, report, *streams.theirs)
            return forker.fork(order_of(start.spec), fds)
        except ForkerGone as error:
            # A new one could only be forked from here, as large as what the spawner forks itself.
            _log(f"{error}; from now on they are forked by the spawner and take more memory each")
            self._forker = None
            forker.close()
        finally:
            os.close(mounts)
        shutil.rmtree(start.folder)
        _make_layers(start.folder)
        return 0

    def _bind(self, sandbox: _Sandbox, mount: Mount, *, privileged: bool) -> Bind:
        volume = next((found for found in sandbox.spec.volumes if found.name == mount.volume), None)
        if volume is None:
            raise KernelError(f"{sandbox.name}: no volume {mount.volume!r} to mount at {mount.path}")
        if volume.host_path:
            node: Holder = self.network[sandbox.spec.node].holder
            shown = self._host_paths.find(sandbox.spec.node, node.pidfd, volume)
            is_closed = shown.is_kernels and not privileged
            return Bind(
                shown.source, mount.path, mount.read_only or is_closed, below=mount.sub_path,
                makes_folders=not shown.is_kernels, recursive=False, has_devices=privileged,
            )  # fmt: skip
        is_empty_dir = volume.files is None
        return Bind(
            f"{sandbox.folder}/volumes/{volume.name}", mount.path, mount.read_only or not is_empty_dir,
            below=mount.sub_path, makes_folders=is_empty_dir,
        )  # fmt: skip

    def do_signal_container(self, reply: Reply, _fds: list[int], *, container_id: str, signal_number: int) -> None:
        container = self._containers.get(container_id)
        if container is not None and not container.ended:
            signal.pidfd_send_signal(container.pidfd, signal_number)
        reply(None, ())

    def do_remove_container(self, reply: Reply, _fds: list[int], *, container_id: str) -> None:
        container = self._containers.get(container_id)
        if container is None:
            reply(None, ())
        else:
            self._remove_container(container, lambda: reply(None, ()))

    def _remove_container(self, container: _Container, then: Callable[[], None]) -> None:
        """Kill a container if it runs, forget it once it has ended, and call ``then``.

        That is not waited for here: the kernel ends a PID namespace's first process only when all others in it have
        been reaped, and of some of these it is we who are the parent, or a command line that has been stopped.
        """

        def forget() -> None:
            if self._containers.pop(container.spec.container_id, None) is not None:
                os.close(container.pidfd)
                shutil.rmtree(container.folder, ignore_errors=True)
                del container.sandbox.containers[container.spec.container_id]
            then()

        if container.ended:
            forget()
        else:
            container.when_ended.append(forget)
            signal.pidfd_send_signal(container.pidfd, signal.SIGKILL)

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

    def do_open_exec(
        self, reply: Reply, _fds: list[int], *, container_id: str, exec_id: str, argv: Sequence[str], stdin: bool,
        tty: bool,
    ) -> None:  # fmt: skip
        """Start a program in a container and answer with its streams; its end is told like a container's."""
        container = self._containers.get(container_id)
        if container is None or container.ended:
            raise NotPresent(f"container {container_id} is not running")
        target = self._container_target(self._sandbox(container.spec.pod_uid), container)
        if tty:
            target = replace(target, env={"TERM": "xterm", **target.env})
        streams = Streams.make(stdin=stdin, tty=tty)
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            pid = fork_in(target, session_child(target, argv, streams.theirs, tty=tty, report=writing))
        except BaseException:
            os.close(reading)
            streams.close()
            raise
        finally:
            os.close(writing)
            streams.close_theirs()

        def ended(status: int) -> None:
            os.close(pidfd)
            self._tell_end(exec_id, status)

        pidfd = self._watch_child(pid, ended)
        self._when_started(reading, streams, "", reply)

    def do_connect(
        self, reply: Reply, _fds: list[int], *, node: str = "", pod_uid: str = ""
    ) -> None:  # fmt: skip
        """Answer with a TCP socket that belongs to the network namespace of a node, or of a pod."""
        if pod_uid:
            sandbox = self._sandbox(pod_uid)
            node = sandbox.spec.node if sandbox.spec.address is None else sandbox.name
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

    def do_network(self, reply: Reply, _fds: list[int], *, where: str) -> None:
        """Answer with the network namespace of a node, an outside host or a pod NAMESPACE/POD."""
        host = self.network.nameToNode.get(where)
        if host is None or host.holder is None or host in self.network.switches:
            raise InputError(f"there is no {where!r} in this lab")
        reply(None, (host.holder.network_fd,))

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


def _call(handler: Callable[[], None]) -> None:
    """Call what answers one event. A mistake in it is one request's, or one container's, and not the whole lab's end."""
    try:
        handler()
    except Exception:
        with suppress(OSError):  # the disk that the log is on may be full
            traceback.print_exc()
            sys.stderr.flush()


def _log(message: str) -> None:
    with suppress(OSError):
        print(f"spawner: {message}", file=sys.stderr, flush=True)


def _make_layers(folder: str) -> None:
    """Make what a container's overlay is made of."""
    for part in ("upper", "work"):
        os.makedirs(f"{folder}/{part}")


def preload(proxy_mode: str) -> None:
    """Import what forked programs run: a cold import of kube-proxy would cost each node 0.3 s, shared pages cost nothing."""
    import yaml

    if proxy_mode == "ipvs":  # 22 MiB, and 1.6 s in the nested kernel
        from testbed.kernel import ipvs_node, pyroute2_messages
        from testbed.programs import proxy_ipvs

        pyroute2_messages.load()
        del ipvs_node, proxy_ipvs, pyroute2_messages

    from testbed.programs import builtins, dns, kube_proxy
    from testbed.programs.openelb import speaker_main

    del yaml, builtins, dns, kube_proxy, speaker_main


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
    package = Path(__file__).resolve().parents[2]
    return tuple(dict.fromkeys((str(package), sys.prefix, sys.base_prefix)))
