"""The standard streams of a program in a container, as the spawner makes them and hands our side of them on.

::

    pipes:     stdin ◀── ours[2]     stdout ──▶ ours[0]     stderr ──▶ ours[1]     (no ours[2]: stdin is /dev/null)
    terminal:  made by the program's own process in its own /dev/pts; its other side comes back over a Unix socket
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass


@dataclass(slots=True)
class Streams:
    """Both sides of one program's standard streams. ``theirs`` are its descriptors 0, 1 and 2."""

    ours: list[int]
    theirs: tuple[int, int, int]
    tty: bool

    @classmethod
    def make(cls, *, stdin: bool, tty: bool) -> Streams:
        if tty:
            mine, program = socket.socketpair()
            fd = program.detach()
            return cls([mine.detach()], (fd, fd, fd), True)
        out, out_writer = os.pipe2(os.O_CLOEXEC)
        err, err_writer = os.pipe2(os.O_CLOEXEC)
        if stdin:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            return cls([out, err, writer], (reader, out_writer, err_writer), False)
        return cls([out, err], (os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), out_writer, err_writer), False)

    def take(self) -> list[int]:
        """Return what our side needs: stdout, stderr and perhaps stdin; of a terminal one descriptor for all of it.

        They stay this value's to close. Called when the program runs: its terminal has been sent by then.
        """
        if not self.tty:
            return self.ours
        with socket.socket(fileno=self.ours.pop()) as connection:
            connection.setblocking(False)
            _, fds, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
        self.ours = fds
        return self.ours

    def close_theirs(self) -> None:
        """The program has been forked (or never will be)."""
        for fd in set(self.theirs):
            with contextlib.suppress(OSError):
                os.close(fd)
        self.theirs = (-1, -1, -1)

    def close(self) -> None:
        for fd in self.ours:
            os.close(fd)
        self.ours = []
        self.close_theirs()
