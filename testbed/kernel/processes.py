"""Processes in other namespaces: entering all of a target's, running a function or a program there, and waiting for it.

Whoever calls these must have one thread only, or fork first: setns(2) refuses to change the mount namespace of a
process that shares its file system state with another thread. `call_in` and `run_in` fork, so any process may use them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import select
import signal
import socket
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from testbed.errors import KernelError, NotPresent
from testbed.kernel import linux
from testbed.kernel.interrupts import HeldInterrupts

T = TypeVar("T")

ALL_NAMESPACES = linux.CLONE_NEWNS | linux.CLONE_NEWUTS | linux.CLONE_NEWNET | linux.CLONE_NEWPID


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A place where programs can run: the namespaces of a living process, and who a program there is by default.

    ``pidfd`` belongs to whoever holds this value; `close` gives it back.
    """

    name: str
    pidfd: int
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    capabilities: frozenset[str] | None = None  # None: all that the caller has
    #: What the program's file would give it, as far as ``capabilities`` allow: for users other than root.
    file_capabilities: frozenset[str] = frozenset()

    def close(self) -> None:
        os.close(self.pidfd)


@dataclass(frozen=True, slots=True)
class Completed:
    """The end of a program: ``status`` as a shell shows it (128 + signal); 124 when it ran out of time and was killed."""

    status: int
    stdout: bytes
    stderr: bytes


def exit_code(wait_status: int) -> int:
    """Return the status of waitpid(2) as a shell shows it."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


def fork_in(target: Target, child: Callable[[], int], *, ends_with_us: bool = False) -> int:
    """Fork a child that lives in every namespace of the target and ends with what ``child()`` returns; return its pid.

    The caller's own namespaces stay as they were. Whoever may be interrupted holds that until the pid is known
    (`HeldInterrupts`).

    Args:
        ends_with_us: kill it when we end, however we end.
    """

    def enter() -> int:
        linux.setns(target.pidfd, linux.CLONE_NEWNS | linux.CLONE_NEWUTS | linux.CLONE_NEWNET)
        return child()

    return _fork_in_pid_namespace(target.pidfd, target.name, enter, ends_with_us=ends_with_us)


def spawn_in_network(
    name: str, pidfd: int, network_fd: int, argv: Sequence[str], fds: tuple[int, int, int]
) -> int:  # fmt: skip
    """Start a program in a network namespace, and otherwise in ours; return its pid.

    It is born in the PID namespace of another process, so that it ends with that, and it is killed when we end. It leads a
    session of its own: a terminal's Ctrl-C is for us.

    Args:
        name: of the place, for messages.
        pidfd: of a process of the PID namespace.
        fds: the program's standard descriptors.

    Raises:
        NotPresent: the PID namespace is gone.
    """

    def child() -> int:
        linux.setns(network_fd, linux.CLONE_NEWNET)
        os.setsid()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        linux.close_range(3)
        reset_signals()
        return execute(argv, os.environ)

    return _fork_in_pid_namespace(pidfd, name, child, ends_with_us=True)


def _fork_in_pid_namespace(pidfd: int, name: str, child: Callable[[], int], *, ends_with_us: bool) -> int:
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    ourselves = os.pidfd_open(os.getpid()) if ends_with_us else -1
    try:
        try:
            linux.setns(pidfd, linux.CLONE_NEWPID)  # of children only: the child is born inside
        except OSError as error:
            raise NotPresent(f"{name}: its process has ended ({error.strerror})") from error
        try:
            pid = os.fork()
            if pid == 0:
                _be_child(name, child, parent=ourselves)
            return pid
        except OSError as error:  # ENOMEM: the PID namespace's first process is gone
            raise NotPresent(f"{name}: no process can start there ({error.strerror})") from error
        finally:
            with _ignore_oserror():
                linux.setns(own, linux.CLONE_NEWPID)
    finally:
        os.close(own)
        if ourselves >= 0:
            os.close(ourselves)


class _ignore_oserror:  # noqa: N801  # reads as a statement; contextlib costs an import in every forked server
    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, OSError)


def _be_child(name: str, child: Callable[[], int], *, parent: int) -> NoReturn:
    status = 126
    try:
        if parent >= 0:
            _end_with(parent)
        status = child()
    except BaseException as error:
        os.write(2, f"{name}: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def _end_with(parent: int) -> None:
    """Be killed when the parent, a pidfd, ends; end now if it has: in another PID namespace, getppid(2) does not tell."""
    linux.set_parent_death_signal(signal.SIGKILL)
    if select.select([parent], [], [], 0)[0]:
        os._exit(1)


def become(target: Target) -> None:
    """Take the target's working directory, groups, user and capabilities: the last thing before exec."""
    with _ignore_oserror():
        os.chdir(target.cwd)
    if target.capabilities is not None:
        linux.limit_bounding_set(linux.capability_mask(target.capabilities))
    if target.gid or target.groups:
        os.setgroups(target.groups)
        os.setgid(target.gid)
    # Last, because all of this takes capabilities; a user other than root loses them by becoming one.
    if target.uid:
        given = target.file_capabilities & (target.capabilities or frozenset())
        if given:
            linux.keep_capabilities()
        os.setuid(target.uid)
        if given:
            linux.make_ambient(linux.capability_mask(given))
    elif target.capabilities is not None:
        linux.set_capabilities(linux.capability_mask(target.capabilities))


def reset_signals() -> None:
    """Undo what Python and our parents set: a program expects SIGPIPE to end it and nothing to be blocked."""
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def execute(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Replace this process by the program; return 127 or 126 with a message, as a shell does, when that fails."""
    try:
        os.execvpe(argv[0], list(argv), dict(env))
    except FileNotFoundError:
        os.write(2, f"{argv[0]}: command not found\n".encode())
        return 127
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
        return 126


def exec_child(target: Target, argv: Sequence[str], fds: tuple[int, int, int] = (0, 1, 2)) -> Callable[[], int]:
    """Return what a child of `fork_in` does to run a program with the given standard descriptors."""

    def child() -> int:
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        linux.close_range(3)
        reset_signals()
        become(target)
        return execute(argv, target.env)

    return child


def open_terminal(console: int, *, uid: int) -> int:
    """Make a new terminal of this process's /dev/pts the controlling one, and return its descriptor.

    The other side of it is sent over ``console``, a Unix socket: it must be made in here, so that `tty` finds its name.
    The caller must lead a session.
    """
    ours, theirs = os.openpty()
    os.fchown(theirs, uid, -1)
    with socket.socket(fileno=os.dup(console)) as connection:
        socket.send_fds(connection, [b"t"], [ours])
    os.close(ours)
    fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
    return theirs


def session_child(
    target: Target, argv: Sequence[str], fds: tuple[int, int, int], *, tty: bool, report: int
) -> Callable[[], int]:  # fmt: skip
    """Return what a child of `fork_in` does to run a program that somebody talks to.

    Args:
        fds: its standard descriptors; with ``tty``, the first is where the terminal is sent (`open_terminal`).
        report: a pipe that closes when the program runs, or says why it does not.
    """

    def child() -> int:
        os.setsid()
        chosen = (open_terminal(fds[0], uid=target.uid),) * 3 if tty else fds
        for number, fd in enumerate(chosen):
            os.dup2(fd, number)
            if not tty and target.uid:
                os.fchown(number, target.uid, -1)  # so that it can open /dev/stdout once more (as runc does)
        linux.close_descriptors_except(report)
        reset_signals()
        become(target)
        try:
            os.execvpe(argv[0], list(argv), dict(target.env))
        except FileNotFoundError:
            where = "$PATH" if "/" not in argv[0] else ""
            what = "executable file not found in $PATH" if where else f"stat {argv[0]}: no such file or directory"
            os.write(report, f'exec: "{argv[0]}": {what}'.encode())
        except OSError as error:
            os.write(report, f'exec: "{argv[0]}": {str(error.strerror).lower()}'.encode())
        return 126

    return child


def reap_orphans(own: int) -> None:
    """Collect ended processes that became ours when their parent died; the end of our own child is for its thread."""
    with contextlib.suppress(ChildProcessError):
        while True:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None or found.si_pid == own:
                return
            os.waitpid(found.si_pid, 0)


def wait_until_ended(pid: int, interrupts: HeldInterrupts, *, timeout_s: float | None) -> int:
    """Wait for a child and return its status as a shell shows it; kill it and return 124 when time is out.

    Interrupted, kill it as well: a child that nobody waits for would keep its PID namespace, and with it a lab, from ending.

    Args:
        interrupts: held since before the fork, and let in while we wait.
    """
    pidfd = os.pidfd_open(pid)
    try:
        with interrupts.let_in():
            late = not select.select([pidfd], [], [], timeout_s)[0]
        if late:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    except BaseException:
        with _ignore_oserror():
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    finally:
        os.close(pidfd)
    return 124 if late else exit_code(status)


def run_in(target: Target, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
    """Run a program in the target's namespaces and collect what it writes.

    Raises:
        NotPresent: the target's process has ended.
    """
    streams = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
    try:
        os.write(streams[0], stdin)
        os.lseek(streams[0], 0, os.SEEK_SET)
        with HeldInterrupts() as interrupts:
            child = exec_child(target, argv, (streams[0], streams[1], streams[2]))
            pid = fork_in(target, child, ends_with_us=True)
            status = wait_until_ended(pid, interrupts, timeout_s=timeout_s)
        return Completed(status, _contents(streams[1]), _contents(streams[2]))
    finally:
        for fd in streams:
            os.close(fd)


def _contents(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def call_in(target: Target, function: Callable[..., T], *args: Any, timeout_s: float) -> T:
    """Return ``function(*args)`` as seen from inside the target's namespaces. Its exceptions come back as they are.

    Raises:
        NotPresent: the target's process has ended.
        KernelError: the function ended without an answer, or took longer than ``timeout_s``.
    """
    answer = os.memfd_create("answer")

    def child() -> int:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills us
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            result: tuple[bool, object] = (True, function(*args))
        except Exception as error:
            result = (False, error)
        try:
            packed = pickle.dumps(result)
        except Exception as error:
            packed = pickle.dumps((False, KernelError(f"{target.name}: answer cannot be sent back: {error}")))
        os.write(answer, packed)
        return 0

    try:
        sys.stdout.flush()
        started = time.monotonic()
        with HeldInterrupts() as interrupts:
            pid = fork_in(target, child, ends_with_us=True)
            status = wait_until_ended(pid, interrupts, timeout_s=timeout_s)
        if status == 124 and time.monotonic() - started >= timeout_s:
            raise KernelError(f"{target.name}: {function.__name__} did not end within {timeout_s:g} s")
        packed = _contents(answer)
        if not packed:
            raise KernelError(f"{target.name}: {function.__name__} ended with status {status} and no answer")
        succeeded, value = pickle.loads(packed)  # noqa: S301  # written by our own child
        if succeeded:
            return value  # type: ignore[no-any-return]
        raise value
    finally:
        os.close(answer)
