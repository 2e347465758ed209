"""What keeps a set of namespaces alive: descriptors, and for those with mounts of their own a process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from testbed.errors import KernelError
from testbed.kernel import linux


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Descriptors of a network and a UTS namespace. ``pid`` and ``pidfd`` are the process that lives there, or 0 and -1."""

    network_fd: int
    uts_fd: int
    pid: int = 0
    pidfd: int = -1

    @property
    def nsenter_options(self) -> list[str]:
        """The options by which nsenter(1), run by our child, finds the namespaces."""
        if self.pid:
            return [f"--target={self.pid}", "--net", "--uts"]
        ours = f"/proc/{os.getpid()}/fd"
        return [f"--net={ours}/{self.network_fd}", f"--uts={ours}/{self.uts_fd}"]

    def release(self) -> None:
        """Give the namespaces up: what else lives in them may go on. Succeeds when the process is gone already."""
        if self.pid:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
            os.close(self.pidfd)
        os.close(self.network_fd)
        os.close(self.uts_fd)


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
        return Holder(network_fd=_open(pid, "net"), uts_fd=_open(pid, "uts"), pid=pid, pidfd=pidfd)
    except OSError as error:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise KernelError(f"{name}: {error}") from error


@contextmanager
def new_namespaces() -> Iterator[Holder]:
    """Be in a new network and UTS namespace for the length of a block. Only for a process with one thread.

    No process holds them, so they cost neither the time nor the memory of one; a thousand pods are made this way.
    """
    own = [_open("self", name) for name in ("net", "uts")]
    made: list[int] = []
    try:
        linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWUTS)
        made += [_open("self", name) for name in ("net", "uts")]
        yield Holder(network_fd=made[0], uts_fd=made[1])
    except BaseException:
        for fd in made:
            os.close(fd)
        raise
    finally:
        for fd in own:
            linux.setns(fd, 0)
            os.close(fd)


def _open(process: int | str, namespace: str) -> int:
    return os.open(f"/proc/{process}/ns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)


def _hold(name: str, flags: int, set_up: Callable[[], None], report: int) -> NoReturn:
    try:
        linux.set_parent_death_signal(signal.SIGKILL)
        # SIGINT is for the spawner; SIGTERM must not end a node while its programs drain
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
