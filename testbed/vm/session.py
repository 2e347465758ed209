"""Runs one command in a nested kernel, with our standard input, output, signals and terminal as its own."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from testbed.errors import KernelError
from testbed.vm import wire
from testbed.vm.machine import Machine, start_machine
from testbed.vm.plan import BOOT_WITHIN_S, VmRequest

TIMED_OUT = 124
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def own_terminal() -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return which of our standard descriptors are a terminal that the command should have, and its rows and columns.

    None of them unless both input and output are: a terminal cannot be shared between us and the next program of a pipe.
    """
    if not (os.isatty(0) and os.isatty(1)):
        return (), (0, 0)
    size = os.get_terminal_size(1)
    return tuple(fd for fd in (0, 1, 2) if os.isatty(fd)), (size.lines, size.columns)


def run_command(request: VmRequest) -> int:
    """Return the exit status of the command, as a shell shows it.

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
    def __init__(self, request: VmRequest, machine: Machine, signals: int) -> None:
        self._request = request
        self._machine = machine
        self._signals = signals
        self._frames = wire.Frames()
        self._is_up = False
        self._reads_stdin = True
        self._under_way = 0
        self._closed: set[int] = set()
        self._status: int | None = None

    def run(self) -> int:
        started = time.monotonic()
        timeout_s = self._request.timeout_s
        while self._status is None:
            wanted = [self._machine.line.fileno(), self._signals]
            if self._is_up and self._reads_stdin and self._under_way < wire.WINDOW_BYTES:
                wanted.append(0)
            limit_s = timeout_s if self._is_up else min(timeout_s or BOOT_WITHIN_S, BOOT_WITHIN_S)
            left_s = None if limit_s is None else max(0.0, started + limit_s - time.monotonic())
            ready = select.select(wanted, [], [], left_s)[0]
            if not ready:
                if timeout_s is not None and time.monotonic() - started >= timeout_s:
                    return self._time_out(timeout_s)
                raise KernelError(f"the nested kernel did not boot within {BOOT_WITHIN_S:g} s{self._last_messages()}")
            if self._signals in ready:
                self._pass_signals(os.read(self._signals, 256))
            if 0 in ready:
                self._read_stdin()
            if self._machine.line.fileno() in ready:
                self._read_line()
        return self._status

    def _time_out(self, timeout_s: float) -> int:
        os.write(
            2, f"testbed vm: time is up ({timeout_s:g} s): the command and everything in there was ended\n".encode()
        )
        return TIMED_OUT

    def _last_messages(self) -> str:
        lines = self._machine.kernel_messages().strip().splitlines()[-80:]
        return "; its last messages:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""

    def _send(self, data: bytes) -> None:
        self._machine.line.sendall(data)

    def _pass_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGWINCH:
                if self._request.terminal and self._is_up:
                    packed = fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))
                    self._send(wire.window(*struct.unpack("HHHH", packed)[:2]))
            elif self._is_up:
                self._send(wire.number(wire.SIGNAL, number))
            else:
                self._status = 128 + number

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
        except OSError:
            data = b""
        if not data:
            raise KernelError(f"the nested kernel ended before the command did{self._last_messages()}")
        for kind, payload in self._frames.feed(data):
            if kind == wire.STDOUT or kind == wire.TERMINAL:
                self._write(1, payload)
            elif kind == wire.STDERR:
                self._write(2, payload)
            elif kind == wire.TAKEN:
                count = wire.read_number(payload)
                self._under_way -= count
                self._reads_stdin = self._reads_stdin and bool(count)
            elif kind == wire.READY:
                self._is_up = True
            elif kind == wire.FAILED:
                raise KernelError(f"the nested kernel could not be set up: {payload.decode()}{self._last_messages()}")
            elif kind == wire.EXIT:
                self._status = wire.read_number(payload)

    def _write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view and fd not in self._closed:
            try:
                view = view[os.write(fd, view) :]
            except BrokenPipeError:
                self._closed.add(fd)
                self._send(wire.frame(wire.CLOSE, wire.STDOUT if fd == 1 else wire.STDERR))
