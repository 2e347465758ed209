"""Starts and ends a nested kernel on this machine.

UML is several processes that trace each other. They live in a PID namespace of their own whose first process dies with
us, however we die, and with it the kernel ends all others. Their files are in a tmpfs that only their mount namespace
has, so that nothing is left of them either: the guest's memory (``TMPDIR``), UML's folder (``uml_dir``), the plan.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from testbed.errors import InputError, MissingFeature
from testbed.kernel import linux
from testbed.kernel.pace import is_nested
from testbed.vm.plan import VmRequest, guest_plan, uml_command

PROGRAM = "linux.uml"
MODULES = Path("/usr/lib/uml/modules")
_PRIVATE = "/dev/shm"  # a place that is there everywhere and that the guest covers by its own


def check_machine() -> None:
    """Refuse where no nested kernel can run.

    Raises:
        InputError: not root.
        MissingFeature: UML or its modules are missing.
    """
    if os.geteuid() != 0:
        raise InputError("a nested kernel needs root, to mount what it keeps in memory: run this as root, or with sudo")
    if is_nested():
        raise MissingFeature("this is the nested kernel already, and there is none inside it")
    missing = [program for program in (PROGRAM, "tini") if shutil.which(program) is None]
    if missing or modules_folder() is None:
        raise MissingFeature(
            f"{', '.join(missing) or 'the modules of ' + PROGRAM} not found: the nested kernel is User-Mode Linux "
            "(apt-get install user-mode-linux tini)"
        )


def modules_folder() -> Path | None:
    """Return where the modules of the installed UML are, None when there are none."""
    try:
        return next(
            (folder for folder in sorted(MODULES.iterdir(), reverse=True) if (folder / "modules.dep").is_file()), None
        )
    except OSError:
        return None


def available_memory_mib() -> int:
    """Return how much memory programs could still get on this machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")


class Machine:
    """A running nested kernel: ``line`` is our end of its serial line, ``log`` what its kernel printed."""

    def __init__(self, pid: int, line: socket.socket, log: int, lifeline: int) -> None:
        self._pid = pid
        self.line = line
        self._log = log
        self._lifeline = lifeline

    def kernel_messages(self) -> str:
        """Return the last of what its kernel printed, 256 KiB at most."""
        start = max(0, os.fstat(self._log).st_size - (1 << 18))
        return os.pread(self._log, 1 << 18, start).decode(errors="replace")

    def close(self) -> None:
        """End it and everything in it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self.line.close()
        os.close(self._log)
        os.close(self._lifeline)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_machine(request: VmRequest) -> Machine:
    """Boot a nested kernel that will run the command; returns at once."""
    check_machine()
    folder = modules_folder()
    assert folder is not None
    plan = guest_plan(request, modules=str(folder))
    log = os.memfd_create("kernel-messages")
    ours, theirs = socket.socketpair()
    alive, lifeline = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.unshare(linux.CLONE_NEWPID)  # of children only
        try:
            pid = os.fork()
            if pid == 0:
                os.close(lifeline)
                _be_first_process(request, plan, theirs.fileno(), log, alive)
        finally:
            linux.setns(own, linux.CLONE_NEWPID)
    finally:
        os.close(own)
        os.close(alive)
        theirs.close()
    return Machine(pid, ours, log, lifeline)


def _be_first_process(request: VmRequest, plan: str, line: int, log: int, alive: int) -> NoReturn:
    try:
        linux.set_parent_death_signal(signal.SIGKILL)
        if select.select([alive], [], [], 0)[0]:  # our parent was gone before it was asked for
            os._exit(3)
        os.setsid()  # the terminal's signals are for our parent, who passes them on
        null = os.open(os.devnull, os.O_RDONLY)
        for source, number in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, number)
        linux.close_descriptors_except(line)
        os.set_inheritable(line, True)
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
        linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
        size = request.memory_mib + 64
        linux.mount("tmpfs", _PRIVATE, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, f"mode=0700,size={size}m")
        Path(_PRIVATE, "plan").write_text(plan)
        # UML splits its command line at blanks: names that may hold one are given as links
        os.symlink(os.path.realpath(sys.executable), f"{_PRIVATE}/python")
        os.symlink(Path(__file__).resolve().parent, f"{_PRIVATE}/vm")
        init = [f"{_PRIVATE}/python", "-I", "-S", "-X", "utf8", f"{_PRIVATE}/vm/guest.py", f"{_PRIVATE}/plan"]
        argv = uml_command(PROGRAM, memory_mib=request.memory_mib, line_fd=line, folder=_PRIVATE, init=init)
        for number in signal.valid_signals():
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.chdir("/")
        os.environ["TMPDIR"] = _PRIVATE
        os.execvp("tini", ["tini", "-s", "--", *argv])  # noqa: S606
    except BaseException as error:
        os.write(2, f"could not isolate the nested kernel: {error}\n".encode())
    finally:
        os._exit(3)
