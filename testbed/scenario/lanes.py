"""Nested kernels side by side. Each has one processor, so a course is split over as many as this machine has processors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

from testbed.kernel import linux
from testbed.scenario.nested import Results, read_results

T = TypeVar("T")

_MOST_LANES = 4
_END_WITHIN_S = 10.0


def count_lanes(processors: int, available_mib: int, needed_mib: int) -> int:
    """Return how many nested kernels of that many MiB this machine has room for, at least one."""
    return max(1, min(_MOST_LANES, processors, available_mib // needed_mib))


def split(groups: Sequence[Sequence[T]], weigh: Callable[[T], int], count: int) -> list[list[T]]:
    """Return at most ``count`` lists of about the same weight. A group stays together, and the order within a list stays.

    The list with the first of all comes first.
    """
    lanes: list[list[int]] = [[] for _ in range(min(count, len(groups)))]
    weights = [sum(map(weigh, group)) for group in groups]
    for number in sorted(range(len(groups)), key=lambda number: (-weights[number], number)):
        min(lanes, key=lambda lane: sum(weights[each] for each in lane)).append(number)
    return [[item for number in sorted(lane) for item in groups[number]] for lane in sorted(lanes, key=min)]


class Lane:
    """`testbed run` once more, beside this one, with a nested kernel of its own; what it says is kept until it is asked for.

    As a context manager it ends with the block, and with this process.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        """``arguments``: of `testbed`, without where its results go."""
        self._results = os.memfd_create("results")
        argv = [sys.executable, "-m", "testbed", *arguments, "--results-fd", str(self._results)]
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(self._results,),
            preexec_fn=_end_with_parent,  # no other thread runs here
        )

    def __enter__(self) -> Lane:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(_END_WITHIN_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        os.close(self._results)

    def finish(self, say: Callable[[str], None]) -> tuple[Results, int]:
        """Pass on what it has said and says, until it ends; return its results and exit status.

        Raises:
            LabError: it ended without results.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            say(line.rstrip("\n"))
        status = self._process.wait(_END_WITHIN_S)
        with open(os.dup(self._results), "rb") as file:
            file.seek(0)
            return read_results(file.read(), status), status


def _end_with_parent() -> None:
    linux.set_parent_death_signal(signal.SIGKILL)
