"""A process whose only work is to keep a set of namespaces alive."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from testbed.errors import KernelError
from testbed.kernel import linux


@dataclass(frozen=True, slots=True)
class Holder:
    """The process and what refers to it. ``network_fd`` is its network namespace, for links and sockets."""

    pid: int
    pidfd: int
    network_fd: int

    def release(self) -> None:
        """End the process and with it everything that lives in its namespaces alone; succeeds when it is gone already."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.pidfd)
        os.close(self.network_fd)


def hold_namespaces(name: str, flags: int, set_up: Callable[[], None]) -> Holder:
    """Fork a process, give it new namespaces (CLONE_NEW…), run ``set_up`` in them, and return when that is done.

    Raises:
        KernelError: what ``set_up`` or the kernel said; nothing is left behind.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _hold(name, flags, set_up, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as report:
        problem = report.read()
    if problem != b"ready":
        os.waitpid(pid, 0)
        raise KernelError(problem.decode(errors="replace") or f"{name}: the process that holds its namespaces died")
    try:
        pidfd = os.pidfd_open(pid)
        return Holder(pid, pidfd, os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise KernelError(f"{name}: {error}") from error


def spawn_holder(name: str) -> Holder:
    """Start a process that keeps the namespaces alive which the caller is in. It ends with the lab's PID namespace.

    Raises:
        KernelError: it could not be started.
    """
    try:
        pid = os.posix_spawn("/bin/sleep", ["pause", "infinity"], {}, setsigmask=(), setsid=True)
    except OSError as error:
        raise KernelError(f"{name}: no process can be started to hold its namespaces: {error.strerror}") from error
    return Holder(pid, os.pidfd_open(pid), os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC))


def _hold(name: str, flags: int, set_up: Callable[[], None], report: int) -> NoReturn:
    try:
        linux.set_parent_death_signal(signal.SIGKILL)
        # SIGINT is for the spawner; SIGTERM must not end a pod's network while its programs drain
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        linux.close_descriptors_except(report)
        linux.set_process_name("pause")
        linux.unshare(flags)
        set_up()
        os.write(report, b"ready")
        os.close(report)
        while True:
            signal.pause()
    except BaseException as error:
        os.write(report, f"{name}: {error}".encode())
    finally:
        os._exit(1)
