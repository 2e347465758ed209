"""PID 1 of the nested kernel: makes it a usable machine, runs one command, and carries its input and output.

Runs by path under ``python -I -S`` with the standard library alone, because every import costs more in there. What it
does is written in a plan, a JSON file that `plan.guest_plan` makes: no value of the user's becomes part of a command line.

The root is the host's, read-only (hostfs). Over it comes an overlay whose written part is in memory, so that nothing
done inside reaches the host but what is written into a shared folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import select
import signal
import socket
import struct
import sys
import termios
import tty

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))
from testbed.vm import wire

TYPE_CHECKING = False  # typing costs an import
if TYPE_CHECKING:
    from typing import Any

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_FINIT_MODULE = {"x86_64": 313, "aarch64": 273}
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_CHUNK = 16384
_MOST_QUEUED = 1 << 17

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    encoded = (os.fsencode(source), os.fsencode(target), fstype.encode() or None)
    if _libc.mount(*encoded, ctypes.c_ulong(flags), os.fsencode(data) or None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"mount {source!r} on {target!r}")


class Modules:
    """Loads kernel modules from a folder laid out like /lib/modules/RELEASE, without starting a program for each."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._needs: dict[str, list[str]] = {}
        with open(f"{folder}/modules.dep") as file:
            for line in file:
                path, _, needed = line.partition(":")
                self._needs[os.path.basename(path).split(".")[0].replace("-", "_")] = [path, *needed.split()]

    def load(self, name: str) -> None:
        """Load a module after those it needs; one that is there already, or that this kernel has built in, is fine."""
        for path in reversed(self._needs.get(name, ())):
            fd = os.open(f"{self._folder}/{path}", os.O_RDONLY)
            try:
                if _libc.syscall(_FINIT_MODULE[platform.machine()], fd, b"", 0) < 0:
                    number = ctypes.get_errno()
                    if number != errno.EEXIST:
                        raise OSError(number, os.strerror(number), f"load module {path}")
            finally:
                os.close(fd)


def set_up(plan: dict[str, Any]) -> None:
    """Make the machine: file systems, modules, the loopback interface, limits."""
    modules = Modules(plan["modules"])
    modules.load("overlay")
    mount("tmpfs", "/run", "tmpfs", 0, "mode=0755,nr_inodes=0")
    for name in ("changes", "work", "root"):
        os.mkdir(f"/run/{name}", 0o755)
    mount("overlay", "/run/root", "overlay", 0, "lowerdir=/,upperdir=/run/changes,workdir=/run/work")
    for folder in ("proc", "sys", "dev", "run", "tmp", "lib/modules"):
        os.makedirs(f"/run/root/{folder}", exist_ok=True)
    release = os.path.basename(plan["modules"])
    # a link, not a mount: the file systems of a lab's pods are overlays over this one, and hold no mounts of it
    os.symlink(plan["modules"], f"/run/root/lib/modules/{release}")
    for folder in plan["shares"]:
        os.makedirs(f"/run/root{folder}", exist_ok=True)
        mount("none", f"/run/root{folder}", "hostfs", 0, folder)
    # not chroot: the kernel's own threads change their root as well, and it is they who start modprobe
    if _libc.syscall(_PIVOT_ROOT[platform.machine()], b"/run/root", b"/run/root/run") < 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    os.chdir("/")
    _libc.umount2(b"/run", _MNT_DETACH)
    quiet = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    mount("proc", "/proc", "proc", quiet)
    mount("sysfs", "/sys", "sysfs", quiet)
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", quiet)
    mount("devtmpfs", "/dev", "devtmpfs", _MS_NOSUID)
    for folder in ("/dev/pts", "/dev/shm"):
        os.makedirs(folder, exist_ok=True)
    mount("devpts", "/dev/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "gid=5,mode=620,ptmxmode=666")
    mount("tmpfs", "/dev/shm", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777")
    for name, target in (("fd", "self/fd"), ("stdin", "self/fd/0"), ("stdout", "self/fd/1"), ("stderr", "self/fd/2")):
        if not os.path.lexists(f"/dev/{name}"):
            os.symlink(f"/proc/{target}", f"/dev/{name}")
    mount("tmpfs", "/run", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,nr_inodes=0")
    os.mkdir("/run/lock", 0o1777)
    for name in plan["load"]:
        modules.load(name)
    for setting, value in plan["sysctls"].items():
        with open(f"/proc/sys/{setting}", "w") as file:
            file.write(value)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))
    socket.sethostname(plan["hostname"])


class Command:
    """The command, what it reads and writes, and the serial line to whoever waits for it."""

    def __init__(self, line: int, plan: dict[str, Any]) -> None:
        self._line = line
        self._plan = plan
        self._frames = wire.Frames()
        self._to_line = bytearray()
        self._pid = 0
        self._stdin = -1
        self._to_stdin = bytearray()
        self._stdin_ends = False
        self._outputs: dict[int, bytes] = {}  # descriptor -> kind of frame
        self._terminal = -1
        self._is_cut_short = False
        self._wakeup, self._woken = os.pipe()
        for fd in (line, self._wakeup, self._woken):
            os.set_blocking(fd, False)

    def start(self) -> None:
        """Start the command with its standard descriptors, each a pipe or the one terminal."""
        theirs = self._open_descriptors()
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._be_command(theirs)
            finally:
                os._exit(126)
        for fd in set(theirs):
            os.close(fd)

    def _open_descriptors(self) -> list[int]:
        """Return the command's sides of its descriptors 0, 1, 2 and, if it is to answer, 3."""
        on_terminal: list[int] = self._plan["terminal"]
        theirs = [-1, -1, -1]
        if on_terminal:
            self._terminal, slave = os.openpty()
            self._set_window(*self._plan["window"])
            for number in on_terminal:
                theirs[number] = slave
            self._outputs[self._terminal] = wire.TERMINAL
            if 0 in on_terminal:
                self._stdin = self._terminal
            else:
                tty.setraw(slave)  # the terminal outside does what a terminal does to output
        if theirs[0] < 0 and self._plan["stdin"]:
            theirs[0], self._stdin = os.pipe()
        elif theirs[0] < 0:
            theirs[0] = os.open(os.devnull, os.O_RDONLY)
        pipes = [(1, wire.STDOUT), (2, wire.STDERR)]
        if self._plan["answers"]:
            theirs.append(-1)
            pipes.append((wire.ANSWER_FD, wire.ANSWER))
        for number, kind in pipes:
            if theirs[number] < 0:
                ours, theirs[number] = os.pipe()
                self._outputs[ours] = kind
        if self._stdin >= 0:
            os.set_blocking(self._stdin, False)
        return theirs

    def _be_command(self, fds: list[int]) -> None:
        signal.set_wakeup_fd(-1)
        os.setsid()
        spare = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in fds]  # out of the way of the numbers they get
        for number, fd in enumerate(spare):
            os.dup2(fd, number)
        os.closerange(len(fds), 256)
        if 0 in self._plan["terminal"]:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number in signal.valid_signals():
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_DFL)
        argv = self._plan["argv"]
        try:
            os.chdir(self._plan["cwd"])
        except OSError as error:
            self._last_words(f"cannot enter {self._plan['cwd']} inside: {error.strerror}", 126)
        try:
            os.execvpe(argv[0], argv, self._plan["env"])  # noqa: S606  # the command is an argument list
        except FileNotFoundError:
            self._last_words(f"{argv[0]}: command not found", 127)
        except OSError as error:
            self._last_words(f"{argv[0]}: {error.strerror}", 126)

    def _last_words(self, text: str, status: int) -> None:
        os.write(2, os.fsencode(f"testbed vm: {text}\n"))
        os._exit(status)

    def relay(self) -> int:
        """Carry bytes until the command has ended; return its status as a shell shows it."""
        status = None
        while status is None and not self._is_cut_short:
            for fd, events in self._poll():
                self._serve(fd, events)
            status = self._reap()
        for fd in list(self._outputs):  # what it wrote last; others that still have it open are not waited for
            os.set_blocking(fd, False)
            while fd in self._outputs and self._forward(fd):
                continue
        return 0 if status is None else status

    def _poll(self) -> list[tuple[int, int]]:
        wanted = {self._line: select.POLLIN, self._wakeup: select.POLLIN}
        if self._to_line:
            wanted[self._line] |= select.POLLOUT
        if len(self._to_line) < _MOST_QUEUED:
            wanted |= dict.fromkeys(self._outputs, select.POLLIN)
        if self._to_stdin and self._stdin >= 0:
            wanted[self._stdin] = wanted.get(self._stdin, 0) | select.POLLOUT
        poll = select.poll()
        for fd, events in wanted.items():
            poll.register(fd, events)
        return poll.poll()

    def _serve(self, fd: int, events: int) -> None:
        if fd == self._line:
            if events & select.POLLOUT:
                self._drain()
            if events & select.POLLIN:
                for kind, payload in self._frames.feed(os.read(self._line, 65536)):
                    self._obey(kind, payload)
        elif fd == self._wakeup:
            os.read(self._wakeup, 4096)
        else:
            if fd == self._stdin and events & (select.POLLOUT | select.POLLERR):
                self._feed_stdin()
            if fd in self._outputs and events & (select.POLLIN | select.POLLHUP):
                self._forward(fd)

    def _reap(self) -> int | None:
        """Collect every process that has ended; return the status of the command if it is among them."""
        found = None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return found
            if pid == 0:
                return found
            if pid == self._pid:
                code = os.waitstatus_to_exitcode(status)
                found = code if code >= 0 else 128 - code

    def send(self, data: bytes) -> None:
        self._to_line += data
        self._drain()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._to_line:
                del self._to_line[: os.write(self._line, self._to_line[:_CHUNK])]

    def flush(self) -> None:
        """Wait until everything has been sent."""
        os.set_blocking(self._line, True)
        self._drain()

    def _forward(self, fd: int) -> bool:
        """Send on what was written; return False when there is nothing, now or ever."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # EIO: nobody has the terminal open any more
            data = b""
        if not data:
            self._close_output(fd)
            return False
        self.send(wire.frame(self._outputs[fd], data))
        return True

    def _close_output(self, fd: int) -> None:
        del self._outputs[fd]
        if fd != self._terminal:
            os.close(fd)

    def _feed_stdin(self) -> None:
        try:
            count = os.write(self._stdin, self._to_stdin)
        except BlockingIOError:
            return
        except OSError:  # nobody reads it any more
            self._to_stdin.clear()
            self._end_stdin()
            self.send(wire.number(wire.TAKEN, 0))
            return
        del self._to_stdin[:count]
        self.send(wire.number(wire.TAKEN, count))
        if not self._to_stdin and self._stdin_ends:
            self._end_stdin()

    def _end_stdin(self) -> None:
        if self._stdin >= 0 and self._stdin != self._terminal:
            os.close(self._stdin)
        self._stdin = -1

    def _obey(self, kind: bytes, payload: bytes) -> None:
        if kind == wire.STDIN and self._stdin >= 0:
            self._to_stdin += payload
        elif kind == wire.STDIN_END:
            self._stdin_ends = True
            if not self._to_stdin:
                self._end_stdin()
        elif kind == wire.WINDOW and self._terminal >= 0:
            self._set_window(*wire.read_window(payload))
        elif kind == wire.SIGNAL:
            self._signal(wire.read_number(payload))
            self.send(wire.frame(wire.GOT))
        elif kind == wire.CLOSE:
            for fd in [fd for fd, output in self._outputs.items() if output == payload]:
                self._close_output(fd)
        elif kind == wire.END:
            self._is_cut_short = True

    def _signal(self, number: int) -> None:
        # What a terminal sends goes to the whole group, as from a terminal; the rest to the command alone.
        target = -self._pid if number in (signal.SIGINT, signal.SIGQUIT) else self._pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, number)

    def _set_window(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def finish(shares: list[str]) -> None:
    """End everything else and bring what was written into shared folders to the host."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    for folder in shares:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        _libc.syncfs(fd)
        os.close(fd)


def main() -> None:
    with open(sys.argv[1], "rb") as file:
        plan = json.load(file)
    mount("devtmpfs", "/dev", "devtmpfs", _MS_NOSUID)
    console = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)  # the kernel's messages: tracebacks go there
    for number in (0, 1, 2):
        os.dup2(console, number)
    line = os.open("/dev/ttyS0", os.O_RDWR | os.O_NOCTTY)
    tty.setraw(line)
    try:
        set_up(plan)
    except Exception as error:
        os.write(line, wire.frame(wire.FAILED, f"{type(error).__name__}: {error}".encode()))
        signal.pause()
    command = Command(line, plan)
    command.send(wire.frame(wire.READY))
    command.start()
    status = command.relay()
    finish(plan["shares"])
    command.send(wire.number(wire.EXIT, status))
    command.flush()
    while True:  # the host ends us; PID 1 must not end by itself
        signal.pause()


if __name__ == "__main__":
    main()
