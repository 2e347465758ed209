"""Runs one command in a nested kernel, with our standard input, output, signals and terminal as its own."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import ClassVar

from testbed.errors import KernelError
from testbed.kernel.pace import patient
from testbed.vm import wire
from testbed.vm.machine import Machine, start_machine
from testbed.vm.plan import BOOT_WITHIN_S, VmRequest, explain_end, last_messages

TIMED_OUT = 124
"""Exit status when time was up, as of timeout(1)."""

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_END_WITHIN_S = 5.0  # for killing everything inside and writing shared folders out
_DEAF_AFTER_S = 3.0
_MOST_QUEUED = 1 << 20
_CHUNK = select.PIPE_BUF  # a pipe that is ready takes this much without blocking


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: ``status`` as a shell shows it, and what it wrote to descriptor 3 if it was asked to."""

    status: int
    answer: bytes


def own_terminal() -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return which of our standard descriptors are a terminal that the command should have, and its rows and columns.

    Input only together with output: in ``testbed vm -- … | less`` the terminal's input is less's.
    """
    if not os.isatty(1):
        return (), (0, 0)
    size = os.get_terminal_size(1)
    return tuple(fd for fd in (0, 1, 2) if os.isatty(fd)), (size.lines, size.columns)


def run_command(request: VmRequest) -> Ended:
    """Run a command in a nested kernel that boots for it and ends with it.

    Raises:
        KernelError: the nested kernel did not boot, or ended early.
    """
    with _signals_as_bytes() as signals, start_machine(request) as machine, _raw_terminal(request):
        return _Relay(request, machine, signals).run()


@contextmanager
def _signals_as_bytes() -> Iterator[int]:
    """Have each signal for the command arrive as a byte at the returned descriptor."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    numbers = [number for number in (*_PASSED_ON, signal.SIGWINCH) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


@contextmanager
def _raw_terminal(request: VmRequest) -> Iterator[None]:
    """Leave lines, echo and Ctrl-C to the terminal inside."""
    if 0 not in request.terminal:
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


class _Relay:
    """Carries bytes both ways until the command has ended and everything it wrote is written."""

    _OUTPUTS: ClassVar = {wire.STDOUT: 1, wire.TERMINAL: 1, wire.STDERR: 2}

    def __init__(self, request: VmRequest, machine: Machine, signals: int) -> None:
        self._request = request
        self._machine = machine
        self._line = machine.line.fileno()
        self._signals = signals
        self._frames = wire.Frames()
        self._is_up = False
        self._is_over = False
        self._reads_stdin = request.stdin
        self._under_way = 0
        self._unheard_since = 0.0
        self._queued = {1: bytearray(), 2: bytearray()}
        self._answer = bytearray()
        self._status: int | None = None

    def run(self) -> Ended:
        began = time.monotonic()
        timeout_s = self._request.timeout_s
        limit_s: float | None = min(timeout_s or BOOT_WITHIN_S, BOOT_WITHIN_S)
        while self._status is None or any(self._queued.values()):
            if self._is_up and not self._is_over:
                limit_s = timeout_s
            if not self._step(None if limit_s is None else max(0.0, began + limit_s - time.monotonic())):
                if self._is_over:
                    break
                if timeout_s is None or limit_s != timeout_s:
                    raise KernelError(
                        f"the nested kernel did not boot within {BOOT_WITHIN_S:g} s{self._last_messages()}"
                    )
                self._is_over = True
                limit_s = timeout_s + patient(_END_WITHIN_S)
                self._send(wire.frame(wire.END))
        if self._is_over:
            self._say(f"time is up ({timeout_s:g} s): everything in the nested kernel was ended")
            return Ended(TIMED_OUT, bytes(self._answer))
        if reason := explain_end(self._machine.kernel_messages(), self._request.memory_mib):
            self._say(reason)
        assert self._status is not None
        return Ended(self._status, bytes(self._answer))

    def _step(self, within_s: float | None) -> bool:
        """Wait for something and do it; return False when nothing happened in time."""
        wanted = [self._signals]
        if self._status is None and sum(map(len, self._queued.values())) < _MOST_QUEUED:
            wanted.append(self._line)
        if self._is_up and self._status is None and self._reads_stdin and self._under_way < wire.WINDOW_BYTES:
            wanted.append(0)
        ready, writable, _ = select.select(wanted, [fd for fd, data in self._queued.items() if data], [], within_s)
        if self._signals in ready:
            self._pass_signals(os.read(self._signals, 256))
        for fd in writable:
            self._write(fd)
        if 0 in ready:
            self._read_stdin()
        if self._line in ready:
            self._read_line()
        return bool(ready or writable)

    def _say(self, text: str) -> None:
        with suppress(OSError):
            end = "\r\n" if 0 in self._request.terminal else "\n"
            os.write(2, f"testbed vm: {text}{end}".encode())

    def _last_messages(self) -> str:
        messages = self._machine.kernel_messages()
        if reason := explain_end(messages, self._request.memory_mib):
            return f": {reason}"
        lines = last_messages(messages)
        return "; the last it said:" + "".join(f"\n    {line}" for line in lines) if lines else ""

    def _send(self, data: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # reading says why
            self._machine.line.sendall(data)

    def _pass_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGWINCH:
                if self._request.terminal and self._is_up:
                    packed = fcntl.ioctl(1, termios.TIOCGWINSZ, bytes(8))
                    self._send(wire.window(*struct.unpack("HHHH", packed)[:2]))
            elif self._is_up and not self._is_deaf():
                self._unheard_since = self._unheard_since or time.monotonic()
                self._send(wire.number(wire.SIGNAL, number))
            else:
                self._status = 128 + number
                if self._is_up:
                    self._say("the nested kernel does not answer; everything in it was ended")

    def _is_deaf(self) -> bool:
        """Say whether an earlier signal has not been taken for a while: then the next one is for us."""
        return bool(self._unheard_since) and time.monotonic() - self._unheard_since > patient(_DEAF_AFTER_S)

    def _read_stdin(self) -> None:
        try:
            data = os.read(0, wire.WINDOW_BYTES - self._under_way)
        except OSError:
            data = b""
        if data:
            self._under_way += len(data)
            self._send(wire.frame(wire.STDIN, data))
        else:
            self._reads_stdin = False
            self._send(wire.frame(wire.STDIN_END))

    def _read_line(self) -> None:
        try:
            data = self._machine.line.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        if not data:
            when = "before the command did" if self._is_up else "while it booted"
            raise KernelError(f"the nested kernel ended {when}{self._last_messages()}")
        for kind, payload in self._frames.feed(data):
            self._obey(kind, payload)

    def _obey(self, kind: bytes, payload: bytes) -> None:
        if kind in self._OUTPUTS:
            self._queued[self._OUTPUTS[kind]] += payload
        elif kind == wire.ANSWER:
            self._answer += payload
        elif kind == wire.TAKEN:
            count = wire.read_number(payload)
            self._under_way -= count
            self._reads_stdin = self._reads_stdin and bool(count)
        elif kind == wire.GOT:
            self._unheard_since = 0.0
        elif kind == wire.READY:
            self._is_up = True
        elif kind == wire.FAILED:
            raise KernelError(f"the nested kernel could not be set up: {payload.decode()}{self._last_messages()}")
        elif kind == wire.EXIT:
            self._status = wire.read_number(payload)

    def _write(self, fd: int) -> None:
        queue = self._queued[fd]
        try:
            del queue[: os.write(fd, queue[:_CHUNK])]
        except BlockingIOError:  # somebody made it so
            return
        except OSError:  # nobody reads it, or it is full: the command meets that as well
            queue.clear()
            kinds = [kind for kind, number in self._OUTPUTS.items() if number == fd]
            self._send(b"".join(wire.frame(wire.CLOSE, kind) for kind in kinds))
