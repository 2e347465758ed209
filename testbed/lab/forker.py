"""A small, quiet process that forks echo servers, so that a thousand of them fit into memory.

A forked process pays for each page that it or its parent writes afterwards, and in CPython even reading an object writes
its reference count. So the forker does next to nothing between two forks, and a server's first steps are few: its mount
namespace comes ready from the spawner, signals and limits are inherited, and the order is decoded in the child
(docs/adr/0004-forker.md has the figures). Its children are the spawner's: it never waits for them.
"""

from __future__ import annotations

import errno
import gc
import marshal
import os
import resource
import signal
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from testbed.errors import LabError
from testbed.kernel import linux
from testbed.kernel.pace import patient
from testbed.kernel.rootfs import mount_proc
from testbed.programs import echo

FORKED_ELSEWHERE = "echo"
"""The builtin program that the forker forks."""

OPEN_FILES = (4096, 1 << 20)
"""Soft and, at most, hard limit of open files in a container."""


def limit_open_files() -> None:
    """Have this process and its children open as many files as a container may, as far as our own limit goes."""
    soft, most = OPEN_FILES
    hard = min(most, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard), hard))


_ANSWER = struct.Struct("=i")  # a pid, or a negative errno
_ORDER_BYTES = 65536
_FDS_BYTES = socket.CMSG_SPACE(7 * _ANSWER.size)


_ANSWER_WITHIN_S = 10.0


class ForkerGone(LabError):
    """The forker has died, or does not answer."""


class Forker:
    """The spawner's side."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self._connection.settimeout(patient(_ANSWER_WITHIN_S))
        self._pid = pid

    def close(self) -> None:
        """End it. What it has forked lives on."""
        self._connection.close()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def fork(self, order: Mapping[str, Any], fds: Sequence[int]) -> int:
        """Return the pid of a new container's first process, which is a child of the calling process.

        Args:
            order: plain values: ``capabilities`` (a mask, or -1 for what the forker has), ``privileged``, ``cwd``,
                ``uid``, ``gid``, ``groups``, and ``ports``, ``identity`` and ``text`` for `echo.serve`.
            fds: a mount, a network and a UTS namespace; a pipe that closes when the program runs, or says why it does
                not; standard input, output and error.

        Raises:
            OSError: why there is none.
            ForkerGone: there will be no more.
        """
        try:
            socket.send_fds(self._connection, [marshal.dumps(dict(order))], list(fds))
            answer = self._connection.recv(_ANSWER.size)
        except TimeoutError:
            raise ForkerGone(
                f"the process that forks echo servers has not answered within {_ANSWER_WITHIN_S:g} s"
            ) from None
        except ConnectionError:
            answer = b""
        if not answer:
            raise ForkerGone("the process that forks echo servers has died")
        (pid,) = _ANSWER.unpack(answer)
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return int(pid)


def start_forker(*not_for_it: int) -> Forker:
    """Fork the forker from this process, which should have loaded little so far and will be the servers' parent.

    It closes the descriptors ``not_for_it``.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
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
    return Forker(ours, pid)


def _serve(connection: socket.socket) -> None:
    os.setsid()
    limit_open_files()
    echo.rehearse()
    gc.collect()
    gc.freeze()
    gc.disable()
    while True:
        order, ancillary, _flags, _address = connection.recvmsg(_ORDER_BYTES, _FDS_BYTES, socket.MSG_CMSG_CLOEXEC)
        if not order:
            return
        fds = struct.unpack("=7i", ancillary[0][2])
        try:
            pid = linux.clone_sibling(linux.CLONE_NEWPID)
        except OSError as error:
            pid = -(error.errno or errno.EIO)
        if pid == 0:
            _be_container(order, *fds)
        connection.send(_ANSWER.pack(pid))
        for fd in fds:
            os.close(fd)


def _be_container(
    packed: bytes, mounts: int, network: int, uts: int, report: int, stdin: int, stdout: int, stderr: int
) -> NoReturn:  # fmt: skip
    status = 128
    try:
        order = marshal.loads(packed)  # noqa: S302  # written by the spawner
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        linux.setns(mounts, linux.CLONE_NEWNS)
        linux.setns(network, linux.CLONE_NEWNET)
        linux.setns(uts, linux.CLONE_NEWUTS)
        linux.close_range(3, report - 1)
        linux.close_range(report + 1)
        mount_proc("/proc", privileged=order["privileged"])
        linux.set_process_name(FORKED_ELSEWHERE)
        if order["cwd"] != "/":
            os.chdir(order["cwd"])
        if order["gid"] or order["groups"]:
            os.setgroups(order["groups"])
            os.setgid(order["gid"])
        # Last, because the others take capabilities; the bounding set is about exec, and this never does.
        if order["uid"]:
            os.setuid(order["uid"])
        elif order["capabilities"] >= 0:
            linux.set_capabilities(order["capabilities"])
        os.close(report)
        report = 2
        status = echo.serve(order["ports"], order["identity"], text=order["text"])
    except BaseException as error:
        os.write(report, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)
