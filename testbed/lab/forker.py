"""A small, quiet process that forks echo servers, so that a thousand of them fit into memory.

A forked process pays for each page that it or its parent writes afterwards. The spawner holds Mininet and works all the
time: an echo server forked from it cost 3.7 MiB. One forked from here, where only the standard library and the server
are loaded and nothing else happens, costs about a third of that (docs/adr/0004-forker.md).
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
from collections.abc import Sequence
from typing import Any

from testbed.errors import LabError
from testbed.kernel import linux
from testbed.lab.container import ContainerStart, fork_container
from testbed.lab.frames import FrameReader, send_frame

FORKED_ELSEWHERE = "echo"
"""The builtin program that the forker forks."""


class Forker:
    """The spawner's side. Messages from the forker: ``(pid, None)`` with a pidfd, or ``(pid, wait status)``."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader(connection)
        self._ends: dict[int, int] = {}
        self._forked: list[tuple[Any, list[int]]] = []

    def fileno(self) -> int:
        return self._connection.fileno()

    def fork(self, start: ContainerStart, fds: Sequence[int]) -> tuple[int, int]:
        """Fork as `fork_container` does, given its descriptors in order; return pid and pidfd.

        Raises:
            OSError: why there is none.
        """
        send_frame(self._connection, start, fds)
        while not self._forked:
            self.wait()
        (answer, _), fds = self._forked.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer, fds[0]

    def wait(self) -> None:
        """Wait for messages and keep them for `fork` and `take_ends`."""
        messages = self._reader.receive()
        if messages is None:
            raise LabError("the process that forks echo servers has died")
        for message, fds in messages:
            answer, status = message
            if status is None:
                self._forked.append((message, fds))
            else:
                self._ends[answer] = status

    def take_ends(self) -> dict[int, int]:
        """Return pid -> wait status of what has ended since the last call."""
        ends, self._ends = self._ends, {}
        return ends


def start_forker(*not_for_it: int) -> Forker:
    """Fork the forker from this process, which should have loaded little so far; it closes descriptors ``not_for_it``."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        try:
            ours.close()
            for fd in not_for_it:
                os.close(fd)
            linux.set_process_name("forker")
            linux.set_parent_death_signal(signal.SIGKILL)
            _serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    return Forker(ours)


def _serve(connection: socket.socket) -> None:
    from testbed.programs.builtins import run_builtin

    del run_builtin  # loaded now, for every child
    reader = FrameReader(connection)
    children: dict[int, int] = {}  # pidfd -> pid
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    gc.collect()
    gc.freeze()
    while True:
        for fd, _event in poll.poll():
            if fd == connection.fileno():
                messages = reader.receive()
                if messages is None:
                    return
                for start, fds in messages:
                    _fork(connection, start, fds, children, poll)
                continue
            poll.unregister(fd)
            pid = children.pop(fd)
            os.close(fd)
            _, status = os.waitpid(pid, 0)
            send_frame(connection, (pid, status))


def _fork(
    connection: socket.socket, start: ContainerStart, fds: list[int], children: dict[int, int], poll: select.poll
) -> None:  # fmt: skip
    try:
        pid = fork_container(start, *fds)
    except OSError as error:
        send_frame(connection, (error, None))
        return
    finally:
        for fd in fds:
            os.close(fd)
    pidfd = os.pidfd_open(pid)
    children[pidfd] = pid
    poll.register(pidfd, select.POLLIN)
    send_frame(connection, (pid, None), (pidfd,))
