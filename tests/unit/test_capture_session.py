"""A capture without points: what it hears while it starts, and what its recorder forgets."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from capture_support import record, tcp

from testbed.capture.cluster import LabCluster, Names
from testbed.capture.session import CaptureOptions, CaptureSession
from testbed.capture.sinks import PcapngSink, RecorderSink
from testbed.scenario.recorder import _Process

FRAME = tcp("10.0.0.1:1", "10.0.0.2:80", 2)


class FakeCluster:
    """A lab that lives on; ``on_close``: what happens in the last moment of starting."""

    def __init__(self, on_close: Callable[[], None]) -> None:
        self.lab = SimpleNamespace(name="fake", first_process=-1, why_ended=lambda within_s: "")
        self._on_close = on_close

    def close(self) -> None:
        on_close, self._on_close = self._on_close, lambda: None
        on_close()


class FakeFile:
    """Takes blocks, which are the packets' time stamps."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def blocks(self, batch: Sequence[Any]) -> list[bytes]:
        return [b"%d" % seen[0].time_ns for seen in batch]

    def write_blocks(self, blocks: Sequence[bytes]) -> None:
        self.written += [int(block) for block in blocks]

    def finish(self, processes: Sequence[Any], start_ns: int, end_ns: int) -> None:
        pass

    def close(self) -> None:
        pass


def session(*, on_close: Callable[[], None] = lambda: None, forget_fd: int | None = None) -> CaptureSession:
    options = CaptureOptions(snap_bytes=262144, buffer_kib=2048, forget_fd=forget_fd)
    cluster = cast(LabCluster, FakeCluster(on_close))
    return CaptureSession(cluster, [], options, tracker=None, names=cast(Names, None), say=lambda _: None)


def test_ctrl_c_in_the_last_moment_before_it_runs() -> None:
    """There is nothing to stop yet and nobody waits any more: it is not lost."""
    with pytest.raises(KeyboardInterrupt):
        session(on_close=lambda: signal.raise_signal(signal.SIGINT)).run(lambda: pytest.fail("it has begun"))


def test_a_recorder_forgets_what_is_older_than_it_is_told() -> None:
    """The time is the scenario's, however late it is read; a line that is cut is read when the rest has come."""
    reading, writing = os.pipe()
    file = FakeFile()
    recorder = RecorderSink(cast(PcapngSink, file), 1 << 20)

    def make_sinks() -> list[RecorderSink]:
        recorder.write([(record(time_ns / 1000, 0, FRAME), 0, None) for time_ns in (1000, 1999, 2000, 3000)])
        os.write(writing, b"1500\n2000\n25")
        return [recorder]

    session(forget_fd=reading).run(make_sinks)
    assert file.written == [2000, 3000]
    os.close(reading)
    os.close(writing)


def test_a_scenario_says_from_when_on_packets_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line with the time at which the step began; a capture that has ended has nothing to forget."""
    program, said = tmp_path / "capture", tmp_path / "said"
    program.write_text(f"#!/bin/sh\necho listening at >&2\nhead -n 1 >{said}.new\nmv {said}.new {said}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    process = _Process("fake", tmp_path / "c.pcapng", [])
    before = time.time_ns()
    process.forget()
    after = time.time_ns()
    process._process.wait(10)
    process.forget()
    process.finish()
    assert before <= int(said.read_text()) <= after
