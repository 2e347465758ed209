"""The nginx of this pod: its files, its master process, and whether it serves the configuration that was written last.

::

    configure ─▶ nginx -t ─▶ nginx.conf, generation N+1 ─▶ "draining N" ─▶ SIGHUP ─▶ workers of N+1 answer ─▶ done

nginx's own reload loses nothing but requests that a client sends on a kept connection in the moment in which the old worker
closes it. So the old workers are told by a file, before they are told to end, to answer with ``Connection: close``: then
it is the client that leaves, after an answer (docs/adr/0013-ingress.md).
"""

from __future__ import annotations

import contextlib
import http.client
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from testbed.dataplane.ingress.render import GENERATION_FILE, render_generation
from testbed.errors import KernelError

CONFIG_FILE: Final = "/etc/nginx/nginx.conf"
WORK_FOLDER: Final = "/tmp/nginx"  # in the pod
RUNNING_FILE: Final = f"{WORK_FOLDER}/running"
_TEST_WITHIN_S: Final = 60.0
_SERVES_WITHIN_S: Final = 30.0
#: Pauses between looks at whether a generation serves grow from the one to the other: nginx may be busy on that very core.
_POLL_S: Final = (0.005, 0.05)
_KEPT_MARKS: Final = 100


@dataclass(frozen=True, slots=True)
class Ended:
    """The nginx master has ended."""

    pid: int
    status: int


class ConfigRefused(KernelError):
    """nginx does not take a configuration; ``line`` is where it says so, 0 when it does not say."""

    def __init__(self, reason: str, line: int = 0) -> None:
        self.reason = reason
        self.line = line
        super().__init__(f"nginx refuses the configuration: {reason}")


class NginxProcess:
    """Starts, reloads and ends nginx. Only one thread uses it.

    Args:
        status_port: where nginx tells which generation it serves, on 127.0.0.1.
        ended: called with each `Ended`, on another thread.
    """

    def __init__(self, status_port: int, ended: Callable[[Ended], None]) -> None:
        self._status_port = status_port
        self._ended = ended
        self._files: set[str] = set()
        self.generation = 0
        self.pid = 0
        self.is_alive = False

    def write_files(self, files: Mapping[str, bytes]) -> None:
        """Write the files that a configuration names, readable by nobody else; names stand for contents."""
        for path, content in files.items():
            if path in self._files:
                continue
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(f"{path}.new", path)
            self._files.add(path)

    def forget_files(self, kept: Mapping[str, bytes]) -> None:
        """Remove the files that a configuration no longer names."""
        for path in self._files - set(kept):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self._files.discard(path)

    def test(self, text: str) -> None:
        """Have nginx read a configuration without using it.

        Raises:
            ConfigRefused: in nginx's words.
        """
        self._prepare_folders()
        if not os.path.exists(GENERATION_FILE):
            _write(GENERATION_FILE, render_generation(self.generation))
        candidate = f"{CONFIG_FILE}.new"
        _write(candidate, text)
        try:
            done = subprocess.run(
                ["nginx", "-t", "-q", "-c", candidate], capture_output=True, text=True, timeout=_TEST_WITHIN_S,
                check=False, env=_environment(),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ConfigRefused(f"nginx -t took over {_TEST_WITHIN_S:g} s") from None
        if done.returncode != 0:
            raise refusal(done.stderr, candidate)

    def start(self, text: str) -> None:
        """Start nginx with a configuration, and return when it answers.

        Raises:
            ConfigRefused: it does not come up with it.
        """
        self._prepare_folders()
        self._write(text)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{WORK_FOLDER}/nginx.pid")
        Path(RUNNING_FILE).touch()
        # As many connections as this container may have: a soft limit goes up to the hard one without any right.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        process = subprocess.Popen(["nginx", "-c", CONFIG_FILE], env=_environment(), start_new_session=True)
        self.pid, self.is_alive = process.pid, True
        threading.Thread(target=self._wait, args=(process,), name="nginx", daemon=True).start()
        self._until_served()

    def reload(self, text: str) -> None:
        """Have nginx go on with another configuration; requests that are under way end with the old one.

        Raises:
            ConfigRefused: nginx goes on with the old one.
        """
        old = self.generation
        previous = Path(CONFIG_FILE).read_text()
        self._write(text)
        mark = f"{WORK_FOLDER}/draining-{old}"
        Path(mark).touch()
        try:
            os.kill(self.pid, signal.SIGHUP)
            self._until_served()
        except (ConfigRefused, ProcessLookupError) as error:
            os.unlink(mark)
            _write(CONFIG_FILE, previous)
            if isinstance(error, ProcessLookupError):
                raise ConfigRefused("nginx has ended") from error
            raise
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{WORK_FOLDER}/draining-{old - _KEPT_MARKS}")

    def serving_generation(self) -> int | None:
        """Return which generation answers, or None when nothing does."""
        connection = http.client.HTTPConnection("127.0.0.1", self._status_port, timeout=1.0)
        try:
            connection.request("GET", "/generation")
            answer = connection.getresponse().read()
            return int(answer) if answer.isdigit() else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def status(self) -> dict[str, int]:
        """Return nginx's own counters: connections by state, and totals of accepted, handled and requests."""
        connection = http.client.HTTPConnection("127.0.0.1", self._status_port, timeout=1.0)
        try:
            connection.request("GET", "/nginx_status")
            return parse_stub_status(connection.getresponse().read().decode(errors="replace"))
        except (OSError, http.client.HTTPException):
            return {}
        finally:
            connection.close()

    def quit(self, within_s: float) -> None:
        """End nginx after the requests that are under way; by force when that takes too long."""
        for number, patience_s in ((signal.SIGQUIT, within_s), (signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            deadline = time.monotonic() + patience_s
            while self.is_alive and time.monotonic() < deadline:
                time.sleep(0.02)
            if not self.is_alive:
                break
        with contextlib.suppress(FileNotFoundError):
            os.unlink(RUNNING_FILE)

    def end_orphans(self) -> None:
        """End workers whose master was killed: they would keep the ports. They are our children now (we are PID 1)."""
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != self.pid and _is_orphan(int(entry)):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(int(entry), signal.SIGQUIT)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if process.pid == self.pid:
            self.is_alive = False
        self._ended(Ended(process.pid, status))

    def _write(self, text: str) -> None:
        self.generation += 1
        _write(CONFIG_FILE, text)
        _write(GENERATION_FILE, render_generation(self.generation))

    def _prepare_folders(self) -> None:
        os.makedirs(WORK_FOLDER, mode=0o700, exist_ok=True)

    def _until_served(self) -> None:
        deadline = time.monotonic() + _SERVES_WITHIN_S
        pause_s, longest_s = _POLL_S
        while time.monotonic() < deadline:
            if self.serving_generation() == self.generation:
                return
            if not self.is_alive:
                raise ConfigRefused("nginx ended")
            time.sleep(pause_s)
            pause_s = min(longest_s, 1.5 * pause_s)
        raise ConfigRefused(f"generation {self.generation} does not answer within {_SERVES_WITHIN_S:g} s")


def _write(path: str, text: str) -> None:
    Path(f"{path}.tmp").write_text(text)
    os.replace(f"{path}.tmp", path)


def _environment() -> dict[str, str]:
    # The real image preloads an allocator that this machine does not have.
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def _is_orphan(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return False
    return name == "nginx" and fields[1] == str(os.getpid()) and fields[0] != "Z"


def refusal(stderr: str, path: str) -> ConfigRefused:
    """Return what ``nginx -t`` said: its first [emerg] line, without time and process."""
    lines = [line for line in stderr.splitlines() if "[emerg]" in line] or stderr.splitlines() or ["no reason given"]
    reason = lines[0].partition("[emerg] ")[2] or lines[0]
    reason = reason.partition(": ")[2] if reason.split(":")[0].replace("#", "").isdigit() else reason
    _, found, number = reason.rpartition(f" in {path}:")
    return ConfigRefused(reason.replace(path, CONFIG_FILE), int(number) if found and number.isdigit() else 0)


def parse_stub_status(text: str) -> dict[str, int]:
    """Return the numbers of nginx's stub_status page (ngx_http_stub_status_module)."""
    words = text.split()
    numbers = [int(word) for word in words if word.isdigit()]
    names = ("active", "accepted", "handled", "requests", "reading", "writing", "waiting")
    return dict(zip(names, numbers, strict=True)) if len(numbers) == len(names) else {}
