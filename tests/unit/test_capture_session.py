"""A capture without points: what it hears while it starts."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from testbed.capture.cluster import LabCluster, Names
from testbed.capture.session import CaptureOptions, CaptureSession


class FakeCluster:
    """A lab that lives on; ``on_close``: what happens in the last moment of starting."""

    def __init__(self, on_close: Callable[[], None]) -> None:
        self.lab = SimpleNamespace(name="fake", first_process=-1, why_ended=lambda within_s: "")
        self._on_close = on_close

    def close(self) -> None:
        on_close, self._on_close = self._on_close, lambda: None
        on_close()


def session(*, on_close: Callable[[], None] = lambda: None) -> CaptureSession:
    options = CaptureOptions(snap_bytes=262144, buffer_kib=2048)
    cluster = cast(LabCluster, FakeCluster(on_close))
    return CaptureSession(cluster, [], options, tracker=None, names=cast(Names, None), say=lambda _: None)


def test_ctrl_c_in_the_last_moment_before_it_runs() -> None:
    """There is nothing to stop yet and nobody waits any more: it is not lost."""
    with pytest.raises(KeyboardInterrupt):
        session(on_close=lambda: signal.raise_signal(signal.SIGINT)).run(lambda: pytest.fail("it has begun"))
