"""tcpdump at each point: checking a filter, starting, what it says while it starts and ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field

from testbed.capture.points import Point
from testbed.errors import InputError, MissingFeature
from testbed.kernel.processes import spawn_in_network

_CHECK_TIMEOUT_S = 10.0
_PIPE_BYTES = 1 << 20
_COUNTS = re.compile(r"(\d+) packets? (captured|received by filter|dropped by kernel)")
_WHAT = ("captured", "received by filter", "dropped by kernel")
_IGNORED = re.compile(r"^tcpdump: (listening on|data link type|verbose output)")


def check_tcpdump() -> str:
    """Return the path of tcpdump.

    Raises:
        MissingFeature: it is not installed.
    """
    found = shutil.which("tcpdump") or shutil.which("tcpdump", path="/usr/sbin:/sbin")
    if found is None:
        raise MissingFeature("captures are made by tcpdump, which is not installed (apt-get install tcpdump)")
    return found


def check_filters(filters: Iterable[str]) -> None:
    """Have tcpdump compile the filters.

    Raises:
        InputError: the first one that it does not understand, in its words.
    """
    tcpdump = check_tcpdump()
    for text in dict.fromkeys(filters):
        argv = [tcpdump, "-y", "EN10MB", "-d", "--", text]
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, errors="replace", timeout=_CHECK_TIMEOUT_S, check=False,
                stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
        except (subprocess.TimeoutExpired, ValueError) as error:  # names are looked up; a NUL is no argument
            raise InputError(f"--filter {text!r}: tcpdump could not compile it: {error}") from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("tcpdump: ")
            raise InputError(
                f"--filter {text!r}: {reason}; filters are those of tcpdump, see `man pcap-filter`, for example "
                "'tcp port 80 and host 10.244.1.2'"
            )


@dataclass(slots=True)
class PointProcess:
    """tcpdump at one point. ``counts`` are what it said last of its packets."""

    point: Point
    pid: int
    output: int  # a pipe: the pcap stream; -1 when it has ended
    complaints: int  # a pipe: what it writes to standard error; -1 when it has ended
    said: str = ""
    listening: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    status: int | None = None
    gone: str = ""  # why it ended before it was asked to
    packets: int = 0  # that came through the pipe
    at_stop: tuple[int, int] | None = (
        None  # when the capture was stopped: received by the filter, dropped by the kernel
    )
    is_wanted: bool = True  # what the kernel still holds belongs to the capture

    def ask_counts(self) -> None:
        """Have it say how many packets there have been until now: `is_dry` then knows what is still to come."""
        self.counts.clear()
        self.said = ""
        self.signal(signal.SIGUSR1)

    @property
    def is_dry(self) -> bool:
        """Everything that was received before `ask_counts` has come through the pipe."""
        if self.at_stop is None and len(self.counts) == len(_WHAT):
            self.at_stop = (self.counts["received by filter"], self.counts["dropped by kernel"])
        return self.output < 0 or (self.at_stop is not None and self.packets >= self.at_stop[0] - self.at_stop[1])

    def read_complaints(self) -> bool:
        """Read what it has said; return whether that was the end."""
        try:
            data = os.read(self.complaints, 65536)
        except BlockingIOError:
            return False
        self.said = (self.said + data.decode(errors="replace"))[-4096:]
        if "listening on" in self.said:
            self.listening = True
        for number, what in _COUNTS.findall(self.said):
            self.counts[what] = int(number)
        return not data

    @property
    def last_words(self) -> str:
        """What it complained about."""
        lines = [
            line for line in self.said.splitlines() if line and not _IGNORED.match(line) and not _COUNTS.match(line)
        ]
        return (lines[-1] if lines else "").removeprefix("tcpdump: ")

    @property
    def received(self) -> int:
        """How many packets passed the filter while the capture ran."""
        counted = self.at_stop[0] if self.at_stop else self.counts.get("received by filter", 0) if self.is_wanted else 0
        return max(counted, self.packets) if self.at_stop is None else counted

    @property
    def lost(self) -> int:
        """How many of them are missing: the kernel's buffer was full, or was not empty when the capture had to end."""
        if not self.is_wanted or (self.at_stop is None and self.gone):
            return self.counts.get("dropped by kernel", 0)
        return max(0, self.received - self.packets)

    def signal(self, number: int) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def reap(self) -> None:
        """Collect its exit status, when it has one. Its number is ours until then."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """End it, whatever it does."""
        if self.status is None:
            self.signal(signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
        for fd in (self.output, self.complaints):
            if fd >= 0:
                os.close(fd)
        self.output = self.complaints = -1


def start_tcpdump(
    point: Point, *, pidfd: int, network_fd: int, snap_bytes: int, buffer_kib: int
) -> PointProcess:  # fmt: skip
    """Start tcpdump at a point; it has begun to capture when it says so (`PointProcess.listening`).

    Args:
        pidfd: of the lab's first process, with which it ends.
        network_fd: of the place's network namespace.
        buffer_kib: size of the kernel's ring for packets that tcpdump has not read yet.
    """
    argv = [
        check_tcpdump(), "-i", point.interface, "-s", str(snap_bytes), "-B", str(buffer_kib), "-w", "-",
        "-U",  # every packet is written as it comes, not when a buffer is full
        "-Z", "root",  # another user would lose the signal that ends it with us (prctl(2), PR_SET_PDEATHSIG)
        "--time-stamp-precision=nano", "-n",
    ]  # fmt: skip
    if point.filter:
        argv += ["--", point.filter]
    output, theirs = os.pipe2(os.O_CLOEXEC)
    complaints, their_complaints = os.pipe2(os.O_CLOEXEC)
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a smaller pipe works, with more waiting
        fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    try:
        pid = spawn_in_network(point.place, pidfd, network_fd, argv, (nothing, theirs, their_complaints))
    except BaseException:
        os.close(output)
        os.close(complaints)
        raise
    finally:
        for fd in (theirs, their_complaints, nothing):
            os.close(fd)
    os.set_blocking(output, False)
    os.set_blocking(complaints, False)
    return PointProcess(point, pid, output, complaints)
