"""A container's first process: forked into a new PID namespace, it makes the rest of the container around itself.

Echo servers, of which there may be a thousand, come from the forker, into mounts that `prepare_mounts` made for them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from testbed.errors import TestbedError
from testbed.kernel import linux
from testbed.kernel.processes import Target, become, open_terminal, reset_signals
from testbed.kernel.rootfs import Bind, enter_root, write_upper
from testbed.kubelet.runtime import ContainerSpec, SandboxSpec
from testbed.lab.forker import limit_open_files

_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerStart:
    """All that the first process must know. ``folder`` holds upper/ and work/ of its overlay."""

    sandbox: SandboxSpec
    spec: ContainerSpec
    folder: str
    binds: tuple[Bind, ...]
    keep: tuple[str, ...]  # folders that must stay visible (rootfs.enter_root)
    hide: tuple[str, ...]  # and those that must not be


def fork_container(
    start: ContainerStart, node_pidfd: int, network_fd: int, uts_fd: int, report: int, stdin: int, stdout: int,
    stderr: int,
) -> int:  # fmt: skip
    """Fork and return the pid.

    Args:
        node_pidfd: the process that holds the node's namespaces.
        network_fd, uts_fd: the pod's namespaces (the node's for hostNetwork).
        report: a pipe that closes when the program runs, or says why it does not.
        stdin, stdout, stderr: its standard streams; with a tty, stdin is where the terminal is sent (`open_terminal`).
    """
    own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.unshare(linux.CLONE_NEWPID)  # of children only
        pid = os.fork()
        if pid == 0:
            place = (node_pidfd, network_fd, uts_fd)
            _be_container(start, place, report, (stdin, stdout, stderr))
        return pid
    finally:
        linux.setns(own_pid_namespace, linux.CLONE_NEWPID)
        os.close(own_pid_namespace)


def _be_container(
    start: ContainerStart, place: tuple[int, int, int], report: int, streams: tuple[int, int, int]
) -> NoReturn:  # fmt: skip
    status = 128
    spec = start.spec
    try:
        _enter_container(start, place, report, streams)
        if spec.builtin:
            os.close(report)
            status = _run_builtin(spec)
        else:
            try:
                os.execvpe(spec.argv[0], list(spec.argv), dict(os.environ))
            except FileNotFoundError:  # containerd's words
                os.write(report, f'exec: "{spec.argv[0]}": executable file not found in $PATH'.encode())
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException as error:
        message = f"{type(error).__name__}: {error}" if not isinstance(error, TestbedError) else str(error)
        try:
            os.write(report, message.encode())
        except OSError:  # already closed: the program was running
            os.write(2, f"{message}\n".encode())
    finally:
        os._exit(status)


def _run_builtin(spec: ContainerSpec) -> int:
    from testbed.programs.builtins import run_builtin

    return run_builtin(spec.builtin, spec.builtin_args)


def _enter_container(
    start: ContainerStart, place: tuple[int, int, int], report: int, streams: tuple[int, int, int]
) -> None:  # fmt: skip
    node_pidfd, network_fd, uts_fd = place
    sandbox, spec = start.sandbox, start.spec
    os.setsid()
    signal.set_wakeup_fd(-1)
    reset_signals()
    console = os.dup(streams[0]) if spec.tty else -1
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    # The node's mounts first, so that a hostPath is a path of the node; then the sandbox's network and name.
    linux.setns(node_pidfd, linux.CLONE_NEWNS)
    linux.setns(network_fd, linux.CLONE_NEWNET)
    linux.setns(uts_fd, linux.CLONE_NEWUTS)
    linux.close_descriptors_except(report, console)
    linux.unshare(linux.CLONE_NEWNS)
    _make_root(start, proc=True)
    limit_open_files()
    if spec.tty:  # only now: the terminal is one of the container's own /dev/pts
        terminal = open_terminal(console, uid=spec.uid)
        for number in range(3):
            os.dup2(terminal, number)
        os.close(terminal)
        os.close(console)
    elif spec.uid:
        for number in range(1, 3):
            os.fchown(number, spec.uid, -1)  # so that it can open /dev/stdout once more (as runc does)
    become(identity_of(f"{sandbox.namespace}/{sandbox.pod_name}", spec, -1))
    os.environ.clear()
    os.environ.update(environment_of(sandbox, spec))
    linux.set_process_name(spec.builtin or spec.argv[0].rsplit("/", 1)[-1])


def _make_root(start: ContainerStart, *, proc: bool) -> None:
    upper = f"{start.folder}/upper"
    write_upper(upper, {f"/etc/{name}": text for name, text in start.sandbox.etc_files.items()})
    write_upper(upper, start.spec.files)
    for path in start.spec.own_folders:
        os.makedirs(upper + path, exist_ok=True)
        os.chown(upper + path, start.spec.uid, start.spec.gid)
    privileged = start.spec.privileged
    enter_root(start.folder, binds=start.binds, keep=start.keep, hide=start.hide, proc=proc, privileged=privileged)


def prepare_mounts(start: ContainerStart, node_pidfd: int, network_fd: int) -> int:
    """Make a container's mount namespace, all but /proc, and return a descriptor of it. Only for a process with one thread."""
    own = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in ("net", "mnt")]
    prepared = -1
    try:
        linux.setns(node_pidfd, linux.CLONE_NEWNS)
        linux.setns(network_fd, linux.CLONE_NEWNET)  # which /sys shows
        linux.unshare(linux.CLONE_NEWNS)
        prepared = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        _make_root(start, proc=False)
    except BaseException:
        if prepared >= 0:
            os.close(prepared)
        raise
    finally:
        for fd in own:
            linux.setns(fd, 0)
            os.close(fd)
    return prepared


def order_of(spec: ContainerSpec) -> dict[str, Any]:
    """Return what the forker must know of a container (`Forker.fork`)."""
    who = identity_of(spec.name, spec, -1)
    arguments: Mapping[str, Any] = spec.builtin_args
    return {
        "ports": [(str(protocol), int(port)) for protocol, port in arguments["ports"]],
        "identity": dict(arguments["identity"]),
        "text": str(arguments.get("text", "")),
        "capabilities": -1 if who.capabilities is None else linux.capability_mask(who.capabilities),
        "privileged": spec.privileged,
        "cwd": spec.cwd,
        "uid": who.uid,
        "gid": who.gid,
        "groups": who.groups,
    }


def identity_of(name: str, spec: ContainerSpec, pidfd: int, env: Mapping[str, str] | None = None) -> Target:
    """Return who a program in this container is."""
    capabilities: frozenset[str] | None = None
    if not spec.privileged:
        dropped = (
            frozenset(linux.CAPABILITIES) if "ALL" in spec.drop_capabilities else frozenset(spec.drop_capabilities)
        )
        added = frozenset(linux.CAPABILITIES) if "ALL" in spec.add_capabilities else frozenset(spec.add_capabilities)
        capabilities = (linux.DEFAULT_CAPABILITIES - dropped) | added
    return Target(
        name=name, pidfd=pidfd, env=env or {}, cwd=spec.cwd, uid=spec.uid, gid=spec.gid, groups=spec.groups,
        capabilities=capabilities, file_capabilities=frozenset(spec.file_capabilities),
    )  # fmt: skip


def environment_of(sandbox: SandboxSpec, spec: ContainerSpec) -> dict[str, str]:
    terminal = {"TERM": "xterm"} if spec.tty else {}
    home = {} if spec.env.get("HOME") else {"HOME": home_of(spec.uid, spec.files.get("/etc/passwd"))}
    return {"PATH": _DEFAULT_PATH, "HOSTNAME": sandbox.hostname, **terminal, **spec.env, **home}


def home_of(uid: int, passwd: str | None = None) -> str:
    """Return a user's home by an /etc/passwd (None: the machine's, which containers see), '/' for an unknown user, as runc."""
    if passwd is None:
        passwd = Path("/etc/passwd").read_text(errors="replace")
    for line in passwd.splitlines():
        fields = line.split(":")
        if len(fields) == 7 and fields[2] == str(uid):
            return fields[5] or "/"
    return "/"
