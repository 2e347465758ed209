"""Steps with a time limit each: what runs goes to a log of its own, how far it is goes to the terminal.

A program gets a session of its own, so that Ctrl-C reaches us alone and we end things in the order that leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: Before a command: what it runs dies when we do, however we die. With `unshare --kill-child` that reaches everything below.
WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
PROGRESS_EVERY_S = 20.0
_GRACE_S = 5.0  # between SIGTERM and SIGKILL for a program that ran out of time
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class StepFailed(Exception):
    """A step ended otherwise than wanted; the message says which, how, and where its log is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a step took."""

    title: str
    duration_s: float


@dataclass(slots=True, kw_only=True)
class Steps:
    """Runs programs one after the other. ``env`` is the environment of all of them; ``logs`` is a folder."""

    logs: Path
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    timings: list[Timing] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Tell people; it goes to summary.log as well."""
        print(text, flush=True)
        with (self.logs / "summary.log").open("a") as summary:
            summary.write(text + "\n")

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Say how long what is done inside took, also when it failed."""
        self.say(f"▸ {title}")
        began = time.monotonic()
        mark = "✗"
        try:
            yield
            mark = "✓"
        finally:
            duration_s = time.monotonic() - began
            self.timings.append(Timing(title=title, duration_s=duration_s))
            self.say(f"{mark} {title:<68} {duration_s:6.0f} s")

    def run(
        self, argv: Sequence[str | Path], *, limit_s: float, log: str,
        env: Mapping[str, str] | None = None, show: bool = False,
    ) -> str:  # fmt: skip
        """Run a program to its end and return what it printed, both streams together.

        Args:
            log: name of the log, to which it is appended.
            env: variables beside the environment of all steps.
            show: print its output, too, as what the step is about.

        Raises:
            StepFailed: it ended with another status than 0, or not within ``limit_s``.
        """
        words = [str(word) for word in argv]
        file = self.logs / f"{log}.log"
        with file.open("ab") as out:
            out.write(f"$ {shlex.join(words)}\n".encode())
            out.flush()
            start = out.tell()
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env={**self.env, **(env or {})},
            )  # fmt: skip
            try:
                self._wait(process, words, limit_s, file, start)
            finally:
                _end(process)
        text = _text(file, start)
        if show:
            self.say("\n".join(f"  {line}" for line in _ESCAPES.sub("", text).splitlines()))
        if process.returncode != 0:
            tail = "\n".join(f"    {line}" for line in _ESCAPES.sub("", text).splitlines()[-15:])
            raise StepFailed(
                f"{shlex.join(words)} ended with status {process.returncode}; its log {file} ends with\n{tail}"
            )
        return text

    def _wait(
        self, process: subprocess.Popen[bytes], words: Sequence[str], limit_s: float, file: Path, start: int
    ) -> None:
        began = time.monotonic()
        while True:
            left_s = limit_s - (time.monotonic() - began)
            try:
                process.wait(timeout=max(0.0, min(left_s, PROGRESS_EVERY_S)))
                return
            except subprocess.TimeoutExpired:
                pass
            if time.monotonic() - began >= limit_s:
                tail = _last_line(file, start)
                raise StepFailed(
                    f"{shlex.join(words)} did not end within {limit_s:.0f} s; last line of {file}: {tail}"
                ) from None
            self.say(f"  {time.monotonic() - began:5.0f} s of {limit_s:.0f} s: {_last_line(file, start)}"[:150])


def _text(file: Path, start: int) -> str:
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read().decode(errors="replace")


def _last_line(file: Path, start: int) -> str:
    lines = [line for line in _ESCAPES.sub("", _text(file, start)).splitlines() if line.strip()]
    return lines[-1].strip() if lines else "(no output yet)"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and what it started; nothing to do for one that has ended."""
    for number, grace_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace_s)


def interrupt_on(*numbers: signal.Signals) -> None:
    """Make these signals interrupt as Ctrl-C does, so that everything is put away on the way out."""

    def interrupt(number: int, frame: object) -> None:
        for each in numbers:  # a second one must not interrupt the cleaning up
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in numbers:
        signal.signal(number, interrupt)
