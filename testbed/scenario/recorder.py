"""Packets of a scenario's steps, kept in the report folder: `testbed capture` as processes beside the scenario.

A step with ``capture:`` has one of its own, which listens before the step is tried. For steps that fail, when nobody can say
any more what should have been captured, a flight recorder runs from the beginning at every uplink and bridge; it forgets
what it has whenever a step begins.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Protocol

from testbed.errors import LabError
from testbed.kernel.interrupts import HeldInterrupts
from testbed.kernel.pace import patient
from testbed.model.topology import Topology

KEPT = "64MiB"
"""What the flight recorder remembers of a step."""
_LISTENS_WITHIN_S = 30.0
_ENDS_WITHIN_S = 30.0
_MOST_POINTS = 64
_BRIDGE = "cni0"


class Recorder(Protocol):
    """Keeps the packets of steps."""

    def begin(self, number: int, points: Sequence[str]) -> None:
        """A step begins, whose packets at some points are to be kept. Raises TestbedError when they cannot be captured."""
        ...

    def end(self, number: int, *, failed: bool) -> tuple[str, ...]:
        """The step has ended; return the names of the files with its packets."""
        ...


class _Process:
    """One `testbed capture` that listens."""

    def __init__(self, lab: str, file: Path, arguments: Sequence[str]) -> None:
        """Raises LabError with what it said when it does not begin to listen."""
        self.file = file
        self._said = b""
        argv = [sys.executable, "-m", "testbed", "capture", "-l", lab, "-w", str(file), "--forget-from", "0"]
        argv += arguments
        with HeldInterrupts() as interrupts:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                with interrupts.let_in():
                    self._wait_until_listening()
            except BaseException:
                self.discard()
                raise

    def _wait_until_listening(self) -> None:
        assert self._process.stderr
        fd, deadline = self._process.stderr.fileno(), time.monotonic() + patient(_LISTENS_WITHIN_S)
        while b"listening at" not in self._said:
            ready = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]
            data = os.read(fd, 65536) if ready else b""
            if not data:
                said = self._said.decode(errors="replace").strip().removeprefix("error: ")
                raise LabError(f"cannot capture: {said or f'it did not listen within {_LISTENS_WITHIN_S:g} s'}")
            self._said += data

    def forget(self) -> None:
        """Keep nothing of what was until now: our now, as packets may come before the capture has heard of it."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), b"%d\n" % time.time_ns())

    def finish(self) -> None:
        """End the capture when everything until now is in the file."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.communicate(timeout=patient(_ENDS_WITHIN_S))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def discard(self) -> None:
        """End it at once, without a file."""
        self._process.kill()
        self._process.communicate()
        self.file.unlink(missing_ok=True)


class LabRecorder(AbstractContextManager["LabRecorder"]):
    """Implements `Recorder` on a lab. Files are called PREFIX-step-N.pcapng, and PREFIX-step-N-failed.pcapng."""

    def __init__(
        self, lab: str, topology: Topology, folder: Path, prefix: str, *, warn: Callable[[str], None]
    ) -> None:  # fmt: skip
        self._lab = lab
        self._topology = topology
        self._folder = folder
        self._prefix = prefix
        self._warn = warn
        self._flight: _Process | None = None
        self._own: _Process | None = None

    def __enter__(self) -> LabRecorder:
        points = flight_points(self._topology)
        if points:
            try:
                self._flight = _Process(self._lab, self._file("flight"), [*points, "--keep", KEPT])
            except LabError as error:
                self._warn(f"warning: packets of a step that fails will not be kept: {error}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (self._flight, self._own):
            if process is not None:
                process.discard()
        self._flight = self._own = None

    def _file(self, what: str) -> Path:
        return self._folder / f"{self._prefix}-{what}.pcapng"

    def begin(self, number: int, points: Sequence[str]) -> None:
        if points:
            self._own = _Process(self._lab, self._file(f"step-{number}"), points)
        if self._flight is not None:
            self._flight.forget()

    def end(self, number: int, *, failed: bool) -> tuple[str, ...]:
        files: list[Path] = []
        if self._own is not None:
            self._own.finish()
            files.append(self._own.file)
            self._own = None
        if failed and self._flight is not None:
            self._flight.finish()
            files.append(self._flight.file.rename(self._file(f"step-{number}-failed")))
            self._flight = None
        return tuple(file.name for file in files)


def flight_points(topology: Topology) -> list[str]:
    """Return where packets are recorded that nobody asked for: every uplink, and bridges where that is not too many."""
    uplinks = [f"{machine.name}:{machine.interface}" for machine in topology.machines]
    bridges = [f"{node.name}:{_BRIDGE}" for node in topology.nodes]
    return next(points for points in (uplinks + bridges, uplinks, []) if len(points) <= _MOST_POINTS)
